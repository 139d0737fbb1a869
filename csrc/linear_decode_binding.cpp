// The operator attnvariants::_linear_decode. Its schema is in
// attnvariants/ops/_cuda_linear_decode.py, which has checked the arguments.

#include "linear_decode.h"
#include "linear_tensors.h"

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
  call.state = state.mutable_data_ptr();
  call.state_is_float = is_float(state);
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
  call.feature_map = static_cast<Map>(feature_map);
  call.state_aligned = is_aligned(state, 4);
  if (lengths.has_value()) call.lengths = static_cast<int*>(lengths->mutable_data_ptr());
  call.decay = log_decay_of(g);
  call.epilogue = epilogue_of(norm_weight, gate, norm, eps, activation);

  const OnDeviceOf device(q);
  OptionalTensor o, squares;  // live until the launch
  if (call.epilogue.norm != Norm::kNone) {
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
