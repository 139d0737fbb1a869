// Decode steps of linear attention, for the host: parameters and launch.

#pragma once

#include <cuda_runtime.h>

#include "linear_parameters.h"

namespace attnvariants {

inline constexpr int kStateColumns = 32;  // of a head's state in a block: 128 bytes of a row

struct LinearDecode {
  const void* q;  // [B, Q, H, K]; rows of all tensors are contiguous
  const void* k;  // [B, Q, H, K]
  const void* v;  // [B, Q, H, V]
  void* state;    // [B, H, K, V], fp32 or bf16, updated
  int* lengths;   // [B], advanced by Q; null
  void* out;      // contiguous [B, Q, H, V]

  // With a norm: what its last block needs of the others.
  float* o;            // contiguous [B, Q, H, V]
  float* squares;      // sums of a block's squares, [B, Q, H, blocks of a head]
  unsigned* arrivals;  // [B * H]; all 0 before and after a launch

  Strides q_strides, k_strides, v_strides;
  Map feature_map;
  int batch, steps, heads, key_dim, value_dim;
  LogDecay decay;
  LinearEpilogue epilogue;
  int64_t state_batch, state_head, state_row;  // strides
  float scale;
  bool state_is_float;  // else bf16
  bool state_aligned;   // rows start at multiples of 16 bytes
};

inline int blocks_of_a_head(const LinearDecode& call) {
  return (call.value_dim + kStateColumns - 1) / kStateColumns;
}

cudaError_t launch_linear_decode(const LinearDecode& call, Dtype dtype, cudaStream_t stream);

}  // namespace attnvariants
