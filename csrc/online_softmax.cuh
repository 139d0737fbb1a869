// The running softmax of a few query rows over keys that come a few at a time.
//
// A row's columns are shared out over `lanes` neighbouring threads of a warp, 8 each, and every
// such group takes other keys: nothing is exchanged between groups before the end.

#pragma once

#include "elements.cuh"

namespace attnvariants {

// exp(x - origin). A row that has seen no key yet has the largest logit -inf, and -inf - -inf is
// NaN: its origin is 0.
__device__ __forceinline__ float softmax_origin(float row_max) {
  return row_max == -INFINITY ? 0.0f : row_max;
}
__device__ __forceinline__ float softmax_weight(float x, float origin) {
  return exp2f((x - origin) * 1.4426950408889634f);
}

template <int kRows>
struct OnlineSoftmax {
  float row_max[kRows];
  float total[kRows];
  float acc[kRows][kRun];  // not normalised; this thread's columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_max[r] = -INFINITY;
      total[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kRun; ++i) acc[r][i] = 0.0f;
    }
  }

  // Takes in the keys and values of this thread's group, [kKeys, 8] of their columns.
  //
  // Key j lies distance[j] + query[r] positions behind row r, which sees 0 <= that < capacity.
  template <typename T, int kKeys>
  __device__ __forceinline__ void add(
      const float (&q)[kRows][kRun], const Run<T> (&k)[kKeys], const Run<T> (&v)[kKeys],
      const int (&distance)[kKeys], const int (&query)[kRows], int capacity, float scale,
      int lanes) {
    float s[kRows][kKeys];
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      float key[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) key[i] = to_float(k[j].x[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = q[r][0] * key[0];
#pragma unroll
        for (int i = 1; i < kRun; ++i) sum += q[r][i] * key[i];
        s[r][j] = sum;
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kKeys; ++j) s[r][j] += __shfl_xor_sync(kFullWarp, s[r][j], offset);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float new_max = row_max[r];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const bool visible =
            static_cast<unsigned>(distance[j] + query[r]) < static_cast<unsigned>(capacity);
        s[r][j] = visible ? s[r][j] * scale : -INFINITY;
        new_max = fmaxf(new_max, s[r][j]);
      }
      const float origin = softmax_origin(new_max);
      const float rescale = softmax_weight(row_max[r], origin);
      row_max[r] = new_max;
      total[r] *= rescale;
#pragma unroll
      for (int i = 0; i < kRun; ++i) acc[r][i] *= rescale;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        s[r][j] = softmax_weight(s[r][j], origin);
        total[r] += s[r][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      float value[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) value[i] = to_float(v[j].x[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) acc[r][i] += s[r][j] * value[i];
      }
    }
  }

  // Adds up the groups of a warp.
  __device__ __forceinline__ void merge_groups(int lanes) {
    for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float other_max = __shfl_xor_sync(kFullWarp, row_max[r], offset);
        const float other_total = __shfl_xor_sync(kFullWarp, total[r], offset);
        const float new_max = fmaxf(row_max[r], other_max);
        const float origin = softmax_origin(new_max);
        const float mine = softmax_weight(row_max[r], origin);
        const float theirs = softmax_weight(other_max, origin);
        row_max[r] = new_max;
        total[r] = total[r] * mine + other_total * theirs;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float other = __shfl_xor_sync(kFullWarp, acc[r][i], offset);
          acc[r][i] = acc[r][i] * mine + other * theirs;
        }
      }
    }
  }
};

}  // namespace attnvariants
