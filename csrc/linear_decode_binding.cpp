// The operator attnvariants::_linear_decode. Its schema is in
// attnvariants/ops/_cuda_linear_decode.py, which has checked the arguments.

#include "linear_decode.h"
#include "tensors.h"

namespace attnvariants {
namespace {

void linear_decode(
    Tensor q, Tensor k, Tensor v, OptionalTensor g, Tensor state, OptionalTensor lengths,
    OptionalTensor norm_weight, OptionalTensor gate, OptionalTensor arrivals, Tensor out,
    int64_t feature_map, double scale, int64_t norm, double eps, int64_t activation) {
  check_contiguous_rows(q, "q");
  check_contiguous_rows(k, "k");
  check_contiguous_rows(v, "v");
  check_contiguous_rows(state, "state");

  LinearDecode call = {};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.state = float_pointer(state);
  call.out = out.mutable_data_ptr();
  call.q_strides = strides_of(q);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.state_batch = state.stride(0);
  call.state_head = state.stride(1);
  call.state_row = state.stride(2);
  call.batch = static_cast<int>(q.size(0));
  call.steps = static_cast<int>(q.size(1));
  call.heads = static_cast<int>(q.size(2));
  call.key_dim = static_cast<int>(q.size(3));
  call.value_dim = static_cast<int>(v.size(3));
  call.scale = static_cast<float>(scale);
  call.eps = static_cast<float>(eps);
  call.feature_map = static_cast<Map>(feature_map);
  call.activation = static_cast<Map>(activation);
  call.norm = static_cast<Norm>(norm);
  call.state_aligned = is_aligned(state, 4);
  if (lengths.has_value()) call.lengths = static_cast<int*>(lengths->mutable_data_ptr());
  if (g.has_value()) {
    call.g = g->const_data_ptr();
    call.g_is_float = is_float(*g);
    call.g_per_channel = g->dim() == 4;
    if (call.g_per_channel) check_contiguous_rows(*g, "g");
    call.g_strides = g->dim() == 1 ? Strides{0, 0, g->stride(0)} : strides_of(*g);
  }
  if (norm_weight.has_value()) {
    check_contiguous_rows(*norm_weight, "norm_weight");
    call.norm_weight = norm_weight->const_data_ptr();
    call.weight_is_float = is_float(*norm_weight);
    call.weight_head = norm_weight->dim() == 2 ? norm_weight->stride(0) : 0;
  }
  if (gate.has_value()) {
    call.gate = gate->const_data_ptr();
    call.gate_is_float = is_float(*gate);
    call.gate_per_head = gate->dim() == 3;
    if (!call.gate_per_head) check_contiguous_rows(*gate, "gate");
    call.gate_strides = strides_of(*gate);
  }

  const OnDeviceOf device(q);
  OptionalTensor o, squares;  // live until the launch
  if (call.norm != Norm::kNone) {
    STD_TORCH_CHECK(arrivals.has_value(), "attnvariants: a norm needs counters");
    o = empty_floats(q, {call.batch, call.steps, call.heads, call.value_dim});
    squares = empty_floats(q, {call.batch, call.steps, call.heads, blocks_of_a_head(call)});
    call.o = float_pointer(*o);
    call.squares = float_pointer(*squares);
    call.arrivals = static_cast<unsigned*>(arrivals->mutable_data_ptr());
  }
  device.check(launch_linear_decode(call, dtype_of(q), device.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(attnvariants, ATTNVARIANTS_DEVICE, library) {
  library.impl("_linear_decode", TORCH_BOX(&linear_decode));
}

}  // namespace
}  // namespace attnvariants
