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

}  // namespace attnvariants
