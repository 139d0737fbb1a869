// The running softmax of a warp's query rows, whose scores are accumulators of the tensor cores.

#pragma once

#include "online_softmax.cuh"
#include "tiles.cuh"
#include "visible_keys.cuh"

namespace attnvariants {

// Half precision takes powers of 2, which saves a product per element: logits are multiplied by a
// rounded log2(e), which fp32 would notice.
template <typename T>
inline constexpr bool kNatural = sizeof(T) == 4;

template <typename T>
__device__ __forceinline__ float power(float x) {
  if constexpr (kNatural<T>) return expf(x);
  else
    return fast_exp2(x);
}

// Of a lane's two rows in a block of 16. A lane's `total` is that of its own columns.
struct RowStatistics {
  float largest[2];  // logit so far, in units of the power
  float total[2];    // of the weights, relative to it

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = -INFINITY;
      total[r] = 0.0f;
    }
  }
};

// Scales the scores of the keys from `first` on, and hides those that a lane's two rows do not see.
template <int kKeys>
__device__ __forceinline__ void scale_and_mask(
    Accumulator<kKeys>& scores, float factor, int first, const Range (&visible)[2]) {
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first + 8 * j + col_of(e);
      const bool seen = key >= visible[e / 2].low && key < visible[e / 2].high;
      scores.x[j][e] = seen ? scores.x[j][e] * factor : -INFINITY;
    }
  }
}

template <int kKeys>
__device__ __forceinline__ void update_largest(
    RowStatistics& rows, const Accumulator<kKeys>& scores, float factor) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = scores.x[0][2 * r];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      largest = fmaxf(largest, fmaxf(scores.x[j][2 * r], scores.x[j][2 * r + 1]));
    }
    rows.largest[r] = fmaxf(rows.largest[r], row_max(largest) * factor);
  }
}

// Turns scores, still to be multiplied by `factor`, into weights relative to the largest logit so
// far, and the sums before to the same.
template <typename T, int kKeys, int kDim>
__device__ __forceinline__ void weigh(
    RowStatistics& rows, Accumulator<kKeys>& scores, Accumulator<kDim>& out, float factor) {
  const float before[2] = {rows.largest[0], rows.largest[1]};
  update_largest(rows, scores, factor);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float origin = softmax_origin(rows.largest[r]);
    const float rescale = power<T>(before[r] - origin);
    rows.total[r] *= rescale;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      out.x[j][2 * r] *= rescale;
      out.x[j][2 * r + 1] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        scores.x[j][e] = power<T>(fmaf(scores.x[j][e], factor, -origin));
        rows.total[r] += scores.x[j][e];
      }
    }
  }
}

// The same for the relu of the logits, which are not relative to anything.
template <int kKeys>
__device__ __forceinline__ void rectify(
    RowStatistics& rows, Accumulator<kKeys>& scores, float factor) {
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = scores.x[j][e] * factor;
      scores.x[j][e] = x < 0.0f ? 0.0f : x;  // keeps NaN, which a maximum would drop
      rows.total[e / 2] += scores.x[j][e];
    }
  }
}

}  // namespace attnvariants
