// Elementwise functions of linear attention, in fp32: feature maps, gates, and the decay.

#pragma once

#include "activations.cuh"

namespace attnvariants {

__device__ __forceinline__ float apply_map(Map map, float x) {
  switch (map) {
    case Map::kEluPlusOne: return x > 0.0f ? x + 1.0f : expf(x);  // keeps NaN, as all do
    case Map::kElu: return x > 0.0f ? x : expm1f(x);
    case Map::kRelu: return x < 0.0f ? 0.0f : x;
    case Map::kSilu: return x * sigmoid(x);
    case Map::kSigmoid: return sigmoid(x);
    default: return x;
  }
}

// exp(g) for g <= 0 to about half a unit in the last place; 0 below the normal numbers.
//
// The device's exponential errs by up to two units. Under a constant decay that is a wrong decay,
// whose error grows with every token that the state remembers.
__device__ __forceinline__ float decay_of(float g) {
  if (g < -87.0f) return 0.0f;
  const float n = floorf(fmaf(g, 1.44269504f, 0.5f));
  float r = fmaf(n, -0.693145751953125f, g);  // log(2) in two parts
  r = fmaf(n, -1.42860682030941723e-6f, r);
  float series = fmaf(r, 1.0f / 5040.0f, 1.0f / 720.0f);
  series = fmaf(r, series, 1.0f / 120.0f);
  series = fmaf(r, series, 1.0f / 24.0f);
  series = fmaf(r, series, 1.0f / 6.0f);
  series = fmaf(r, series, 0.5f);
  const float power = __int_as_float((static_cast<int>(n) + 127) << 23);
  return (1.0f + fmaf(r * r, series, r)) * power;
}

}  // namespace attnvariants
