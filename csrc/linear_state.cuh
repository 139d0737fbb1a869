// States of linear attention: segments of sequences, the part of a state that a warp holds, and the
// scan that joins segments which were walked beside each other.

#pragma once

#include "linear_chunk.cuh"

namespace attnvariants {

inline constexpr int kScanThreads = 256;

struct Segment {
  int sequence, batch;
  int64_t begin, end;
  bool used;
};

// First and last token of a packed sequence. Numbers that are no bounds of sequences lead to no
// others than the tokens that there are.
__device__ __forceinline__ int2 bounds_of(const LinearForward& p, int sequence) {
  return {min(max(p.cu_seqlens[sequence], 0), p.length),
          min(max(p.cu_seqlens[sequence + 1], 0), p.length)};
}

__device__ __forceinline__ Segment find_segment(const LinearForward& p, int slot) {
  int n, place, first = 0, last = p.length;
  if (p.cu_seqlens == nullptr) {
    const int slots = p.slots / p.sequences;
    n = slot / slots;
    place = slot % slots;
  } else {
    // Sequence n has the slots from cu_seqlens[n] / span + n on, which is always enough.
    int high = p.sequences;
    n = 0;
    while (high - n > 1) {
      const int middle = (n + high) / 2;
      if (p.cu_seqlens[middle] / p.span + middle <= slot) n = middle;
      else high = middle;
    }
    const int2 bounds = bounds_of(p, n);
    first = bounds.x;
    last = bounds.y;
    place = slot - (first / p.span + n);
  }
  const int64_t begin = first + static_cast<int64_t>(place) * p.span;
  const int64_t end = min(begin + p.span, static_cast<int64_t>(last));
  return {n, p.cu_seqlens == nullptr ? n : 0, begin, end,
          place == 0 || (place > 0 && begin < last)};
}

// A warp's 16 columns of the state of a head, transposed: [16, K].
template <int kSlices>
struct WarpState {
  Accumulator<kSlice> x[kSlices];

  // Calls f(element, entry) for the entries of a state [K, V] in memory.
  template <typename F>
  __device__ __forceinline__ void for_entries(const LinearForward& p, int col, F f) {
    const int lane = fresh_lane();
    int key = col_of(0, lane);
#pragma unroll
    for (int j = 0; j < kSlices * kSlice / 8; ++j, key += 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int value = col + row_of(e, lane);
        if (key + e % 2 < p.key_dim && value < p.value_dim) {
          f(x[j / (kSlice / 8)].x[j % (kSlice / 8)][e], (key + e % 2) * p.value_dim + value);
        }
      }
    }
  }

  __device__ __forceinline__ void load(const LinearForward& p, const float* from, int col) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) x[slice].clear();
    if (from != nullptr) {
      for_entries(p, col, [&](float& element, int entry) { element = from[entry]; });
    }
  }

  __device__ __forceinline__ void store(const LinearForward& p, float* to, int col) {
    for_entries(p, col, [&](float& element, int entry) { to[entry] = element; });
  }
};

// S = exp(G_C) S + k^T v for a slice of the keys and a warp's 16 values.
template <typename C, typename Values>
__device__ __forceinline__ void update_state(
    const ChunkMemory<C>& memory, Accumulator<kSlice>& state, const Values& v, int col,
    int live, int depth, bool decays) {
  using T = typename C::T;
  const int lane = fresh_lane();
#pragma unroll
  for (int n = 0; n < kSlice / kBlock; ++n) {
    if (n * kBlock >= depth) break;
    Accumulator<kBlock> write;
    write.clear();
#pragma unroll (C::kUnroll)
    for (int i = 0; i < live; i += kBlock) {
      multiply_block<T>(write, left_block_transposed<T>(v, i, col, lane),
                        right_block<T>(memory.k(), i, n * kBlock, lane));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = state.x[2 * n + i][e];
        if (decays) s = memory.aging()[n * kBlock + 8 * i + col_of(e, lane)](s, write.x[i][e]);
        else s += write.x[i][e];
      }
    }
  }
}

// Joins the segments of every sequence: S = exp(total) S + own. Of a causal call, `own` is replaced
// by the state that the segment starts from. A thread has one entry of the state of a head.
static __global__ void __launch_bounds__(kScanThreads)
linear_scan_kernel(const __grid_constant__ LinearForward p) {
  const int64_t entries = static_cast<int64_t>(p.key_dim) * p.value_dim;
  const int blocks = static_cast<int>((entries + kScanThreads - 1) / kScanThreads);
  const int64_t entry = int64_t{blockIdx.x % blocks} * kScanThreads + threadIdx.x;
  const int head = blockIdx.x / blocks % p.heads, n = blockIdx.x / blocks / p.heads;
  if (entry >= entries) return;
  int first_slot = p.slots / p.sequences * n, length = p.length;
  if (p.cu_seqlens != nullptr) {
    const int2 bounds = bounds_of(p, n);
    first_slot = bounds.x / p.span + n;
    length = bounds.y - bounds.x;
  }
  const int channel = p.decay_width == 1 ? 0 : static_cast<int>(entry / p.value_dim);
  const int64_t whole = (static_cast<int64_t>(n) * p.heads + head) * entries + entry;
  float state = p.initial != nullptr ? p.initial[whole] : 0.0f;
  for (int place = 0; static_cast<int64_t>(place) * p.span < length; ++place) {
    const int64_t segment = static_cast<int64_t>(first_slot + place) * p.heads + head;
    float* const own = p.own + segment * entries + entry;
    const float write = *own;
    if (p.causal) *own = state;
    if (p.decay_width == 0) state += write;
    else state = aging_of(p.totals[segment * p.decay_width + channel])(state, write);
  }
  p.state[whole] = state;
}

}  // namespace attnvariants
