// One decode step of softmax attention over a cache, for the host: parameters, plan and launch.

#pragma once

#include <cuda_runtime.h>

#include "types.h"

namespace attnvariants {

inline constexpr int kMaxKvHeads = 128;  // the plan travels with the kernel's parameters

// A KV head, its slots in the cache, and the first of the work items that share them out.
struct HeadPlan {
  int head, first_item, slot, capacity;
};

struct SoftmaxDecode {
  const void* q;     // [B, Q, H, K]; rows of all tensors are contiguous
  const void* k;     // [B, Q, Hkv, K], new keys
  const void* v;     // [B, Q, Hkv, V], new values
  const void* gate;  // logits [B, Q, H, V], or [B, Q, H]
  void* k_cache;     // [B, slots, K]; `time` is the stride of a slot
  void* v_cache;     // [B, slots, V]
  int* lengths;      // [B]; advanced by Q
  void* out;         // contiguous [B, Q, H, V]
  float* row_max;    // contiguous [B, Q, H]: largest visible logit
  float* lse;        // contiguous [B, Q, H]

  // The softmax of every work item and query row. Row m is query m / G and head m % G of a group.
  float* part_acc;     // not normalised, [items * B, Q * G, V]
  float* part_max;     // [items * B, Q * G]
  float* part_total;   // [items * B, Q * G]
  unsigned* arrivals;  // [B * Hkv + B]; all 0 before and after a launch

  Strides q_strides, k_strides, v_strides, gate_strides, k_cache_strides, v_cache_strides;
  int batch, steps, heads, kv_heads, key_dim, value_dim;
  float scale;
  Gate activation;
  bool gate_is_float;  // else in the inputs' dtype
  bool gate_per_head;
  bool q_aligned, k_aligned, v_aligned;  // see load_run; both cached and new keys and values

  // Filled by plan_softmax_decode.
  int items;
  int row_blocks;  // of the query rows of a group, which read its keys and values once each
  int lanes;       // threads that share a key
  HeadPlan plan[kMaxKvHeads + 1];  // ends with first_item == items
};

// Shares out the slots of the KV heads. `resident` is the number of blocks that run at once, or 0
// for what the current device takes.
cudaError_t plan_softmax_decode(
    SoftmaxDecode& call, Dtype dtype, const int64_t* capacities, int resident);

cudaError_t launch_softmax_decode(const SoftmaxDecode& call, Dtype dtype, cudaStream_t stream);

}  // namespace attnvariants
