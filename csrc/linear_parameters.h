// Parameters that all kernels of linear attention have: the decay, and what follows attention.

#pragma once

#include "types.h"

namespace attnvariants {

// act(gate) * norm_weight * RMSNorm(o), each part optional.
struct LinearEpilogue {
  const void* norm_weight;  // [H, V] or [V]; null
  const void* gate;         // logits [B, T, H, V] or [B, T, H]; null
  int64_t weight_head;      // stride, 0 for a weight [V]
  Strides gate_strides;
  float eps;
  Map activation;
  Norm norm;
  bool weight_is_float, gate_is_float;  // else in the inputs' dtype
  bool gate_per_head;
};

// Log-decay of linear attention.
struct LogDecay {
  const void* g;  // [B, T, H, K], [B, T, H] or [H]; null
  Strides strides;
  bool is_float;  // else in the inputs' dtype
  bool per_channel;
  bool aligned;  // see load_run; only per channel
};

}  // namespace attnvariants
