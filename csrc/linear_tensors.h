// Arguments that the operators of linear attention have in common.

#pragma once

#include "linear_parameters.h"
#include "tensors.h"

namespace attnvariants {

inline LogDecay log_decay_of(const OptionalTensor& g) {
  LogDecay decay = {};
  if (!g.has_value()) return decay;
  decay.g = g->const_data_ptr();
  decay.is_float = is_float(*g);
  decay.per_channel = g->dim() == 4;
  if (decay.per_channel) {
    check_contiguous_rows(*g, "g");
    decay.aligned = is_aligned(*g);
  }
  decay.strides = g->dim() == 1 ? Strides{0, 0, g->stride(0)} : strides_of(*g);
  return decay;
}

inline LinearEpilogue epilogue_of(
    const OptionalTensor& norm_weight, const OptionalTensor& gate, int64_t norm, double eps,
    int64_t activation) {
  LinearEpilogue epilogue = {};
  epilogue.norm = static_cast<Norm>(norm);
  epilogue.eps = static_cast<float>(eps);
  epilogue.activation = static_cast<Map>(activation);
  if (norm_weight.has_value()) {
    check_contiguous_rows(*norm_weight, "norm_weight");
    epilogue.norm_weight = norm_weight->const_data_ptr();
    epilogue.weight_is_float = is_float(*norm_weight);
    epilogue.weight_head = norm_weight->dim() == 2 ? norm_weight->stride(0) : 0;
  }
  if (gate.has_value()) {
    epilogue.gate = gate->const_data_ptr();
    epilogue.gate_is_float = is_float(*gate);
    epilogue.gate_per_head = gate->dim() == 3;
    if (!epilogue.gate_per_head) check_contiguous_rows(*gate, "gate");
    epilogue.gate_strides = strides_of(*gate);
  }
  return epilogue;
}

}  // namespace attnvariants
