// Softmax attention over whole sequences, for the host: parameters and launch.

#pragma once

#include <cuda_runtime.h>

#include "types.h"

namespace attnvariants {

inline constexpr int kMaxBands = 128;  // they travel with the kernel's parameters
inline constexpr int kUnlimited = -1;  // a window of all keys
inline constexpr int kFar = 1 << 29;   // further than any key

// Neighbouring KV heads with one window. Key j is visible where -right <= i - j < left.
struct Band {
  int first;  // rank of `head` in the order in which heads are worked on
  int head, left, right;
};

struct SoftmaxForward {
  const void* q;           // [B, T, H, K]; rows of all tensors are contiguous
  const void* k;           // [B, S, Hkv, K]
  const void* v;           // [B, S, Hkv, V]
  const void* gate;        // logits [B, T, H, V] or [B, T, H]; null
  const int* cu_seqlens;   // [sequences + 1], with S = T; null
  void* out;               // contiguous [B, T, H, V]
  float* lse;              // contiguous [B, H, T]; null
  float* max_logit;        // [H], -inf before; null

  Strides q_strides, k_strides, v_strides, gate_strides;
  int batch, queries, keys, heads, kv_heads, key_dim, value_dim, sequences;
  int block;    // tokens that see each other, of block-diagonal attention; 0
  float scale;  // not negative
  Gate activation;
  bool causal;
  bool relu;           // of the logits, in place of their softmax
  bool gate_is_float;  // else in the inputs' dtype
  bool gate_per_head;
  bool q_aligned, k_aligned, v_aligned, gate_aligned, out_aligned;  // see load_run

  // Filled by launch_softmax_forward.
  int tiles;    // of query rows, per head
  int section;  // heads that go through their tiles together
  int slots;    // for tiles of keys and of values in shared memory: 2 or 4
  int num_bands;
  Band bands[kMaxBands + 1];  // the last one has the number of KV heads as `first`
};

cudaError_t launch_softmax_forward(
    SoftmaxForward call, Dtype dtype, const int64_t* windows, cudaStream_t stream);

}  // namespace attnvariants
