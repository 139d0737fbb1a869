// act(gate) * norm_weight * o, element by element.

#pragma once

#include "elements.cuh"
#include "linear_parameters.h"
#include "maps.cuh"

namespace attnvariants {

template <typename T>
__device__ __forceinline__ float weigh_and_gate(
    const LinearEpilogue& p, int b, int t, int h, int col, float o) {
  if (p.norm_weight != nullptr) {
    o *= load_either<T>(p.norm_weight, h * p.weight_head + col, p.weight_is_float);
  }
  if (p.gate != nullptr) {
    const int64_t index = b * p.gate_strides.batch + t * p.gate_strides.time +
                          h * p.gate_strides.head + (p.gate_per_head ? 0 : col);
    o *= apply_map(p.activation, load_either<T>(p.gate, index, p.gate_is_float));
  }
  return o;
}

}  // namespace attnvariants
