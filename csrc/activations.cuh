// Activations of output gates, in fp32. Exponentials are of numbers <= 0 only: none overflows.

#pragma once

#include <cuda_runtime.h>

#include "types.h"

namespace attnvariants {

__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

__device__ __forceinline__ float activate(Gate gate, float x) {
  if (gate == Gate::kSigmoid) return sigmoid(x);
  if (gate == Gate::kNsSigmoid) return 0.5f + 0.5f * sigmoid(x);
  return softplus(x);
}

// The same of several numbers, which need not ask one by one.
template <int kCount>
__device__ __forceinline__ void activate(Gate gate, float (&x)[kCount]) {
  if (gate == Gate::kSoftplus) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = softplus(x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = sigmoid(x[i]);
  if (gate == Gate::kNsSigmoid) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = 0.5f + 0.5f * x[i];
  }
}

}  // namespace attnvariants
