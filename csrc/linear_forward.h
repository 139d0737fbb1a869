// Linear attention over whole sequences, for the host: parameters, plan and launches.

#pragma once

#include <cuda_runtime.h>

#include "linear_parameters.h"

namespace attnvariants {

struct LinearForward {
  const void* q;          // [B, T, H, K]; rows of all tensors are contiguous
  const void* k;          // [B, T, H, K]
  const void* v;          // [B, T, H, V]
  const int* cu_seqlens;  // [N + 1]; null
  const float* initial;   // contiguous [N, H, K, V]; null for zeros
  float* state;           // contiguous [N, H, K, V], behind the last token of every sequence
  void* out;              // contiguous [B, T, H, V]
  LogDecay decay;
  LinearEpilogue epilogue;

  Strides q_strides, k_strides, v_strides;
  int batch, length, heads, key_dim, value_dim, sequences;
  float scale;
  Map feature_map;
  bool causal;
  bool q_aligned, k_aligned, v_aligned;  // see load_run

  // Filled by plan_linear_forward.
  int warps;        // of a block
  int value_tiles;  // blocks of a head, which share out the values
  int span;         // tokens of a segment
  int slots;        // segments of all sequences, some of them unused if packed
  int decay_width;  // K per channel, 1 per token, 0 without a decay
  bool whole;       // every sequence is one segment
  bool norm_later;  // a norm over more than a block holds takes a pass of its own

  // Scratch.
  float* own;      // unless whole: states of the segments, [slots, H, K, V]
  float* totals;   // unless whole: log-decay of the segments, [slots, H, decay_width]
  float* squares;  // for a norm later: sums of squares, [B, T, H, value_tiles]
};

// Cuts long sequences into segments where heads and sequences leave processors idle. `processors`
// is the number of them, or 0 for those of the current device.
cudaError_t plan_linear_forward(LinearForward& call, int processors);

cudaError_t launch_linear_forward(const LinearForward& call, Dtype dtype, cudaStream_t stream);

}  // namespace attnvariants
