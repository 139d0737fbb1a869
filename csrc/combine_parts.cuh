// What the last block of a row and KV head does with the parts that all of its blocks have left.

#pragma once

#include "activations.cuh"
#include "online_softmax.cuh"
#include "softmax_decode.h"

namespace attnvariants {

// out = act(gate) * sum_p w_p acc_p / sum_p w_p total_p, with w_p = exp(max_p - max). A warp takes
// one query row at a time: its lanes first share out the parts, then the columns.
template <typename T, int kThreads>
__device__ void combine_parts(const SoftmaxDecode& p, int b, const HeadPlan& plan, int parts) {
  constexpr int kColumns = 8;  // of 32 lanes: head dims to 256
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = p.heads / p.kv_heads, num_rows = group * p.steps;
  for (int row = warp; row < num_rows; row += kThreads / 32) {
    const int64_t first = (static_cast<int64_t>(plan.first_item) * p.batch + b) * num_rows + row;
    const int64_t next = static_cast<int64_t>(p.batch) * num_rows;
    float row_max = -INFINITY;
    for (int part = lane; part < parts; part += 32) {
      row_max = fmaxf(row_max, __ldcg(p.part_max + first + part * next));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, offset));
    }
    const float origin = softmax_origin(row_max);
    float total = 0.0f, acc[kColumns] = {};
    for (int base = 0; base < parts; base += 32) {
      float weight = 0.0f;
      if (base + lane < parts) {
        const int64_t index = first + (base + lane) * next;
        weight = softmax_weight(__ldcg(p.part_max + index), origin);
        total += weight * __ldcg(p.part_total + index);
      }
      const int count = min(32, parts - base);
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const float w = __shfl_sync(kFullWarp, weight, i);
        const float* source = p.part_acc + (first + (base + i) * next) * p.value_dim;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int col = lane + 32 * c;
          if (col < p.value_dim) acc[c] += w * __ldcg(source + col);
        }
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(kFullWarp, total, offset);
    }

    const int query = row / group, h = plan.head * group + row % group;
    const int64_t out_row = (static_cast<int64_t>(b) * p.steps + query) * p.heads + h;
    const int64_t gate_row = b * p.gate_strides.batch + query * p.gate_strides.time +
                             h * p.gate_strides.head;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int col = lane + 32 * c;
      if (col >= p.value_dim) break;
      float o = acc[c] / total;  // a query sees at least its own key
      if (p.activation != Gate::kNone) {
        const int64_t index = gate_row + (p.gate_per_head ? 0 : col);
        o *= activate(p.activation, load_either<T>(p.gate, index, p.gate_is_float));
      }
      static_cast<T*>(p.out)[out_row * p.value_dim + col] = from_float<T>(o);
    }
    if (lane == 0) {
      p.row_max[out_row] = total == total ? row_max : NAN;  // a maximum drops NaN, a sum does not
      p.lse[out_row] = row_max + logf(total);
    }
  }
}

// new [B, Q, Hkv, D] to the slots behind `length`; of more tokens than slots only the last ones.
template <typename T, int kThreads>
__device__ void append_to(
    const void* source, const Strides& from, void* target, const Strides& to, int dim,
    const SoftmaxDecode& p, int b, const HeadPlan& plan, int length) {
  const T* row = static_cast<const T*>(source) + b * from.batch + plan.head * from.head;
  T* slots = static_cast<T*>(target) + b * to.batch + plan.slot * to.time;
  for (int step = max(0, p.steps - plan.capacity); step < p.steps; ++step) {
    T* slot = slots + (length + step) % plan.capacity * to.time;
    for (int col = threadIdx.x; col < dim; col += kThreads) {
      slot[col] = row[step * from.time + col];
    }
  }
}

template <typename T, int kThreads>
__device__ void append_rows(const SoftmaxDecode& p, int b, const HeadPlan& plan, int length) {
  append_to<T, kThreads>(
      p.k, p.k_strides, p.k_cache, p.k_cache_strides, p.key_dim, p, b, plan, length);
  append_to<T, kThreads>(
      p.v, p.v_strides, p.v_cache, p.v_cache_strides, p.value_dim, p, b, plan, length);
}

// Called by one thread per KV head of the row: the last one has no reader of `lengths` left.
__device__ __forceinline__ void advance_length(const SoftmaxDecode& p, int b, int length) {
  unsigned* arrived = p.arrivals + p.batch * p.kv_heads + b;
  if (atomicAdd(arrived, 1u) + 1u == static_cast<unsigned>(p.kv_heads)) {
    *arrived = 0u;
    p.lengths[b] = length + p.steps;
  }
}

}  // namespace attnvariants
