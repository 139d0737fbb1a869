// The operator attnvariants::_linear_forward. Its schema is in
// attnvariants/ops/_cuda_linear_forward.py, which has checked the arguments.

#include "linear_forward.h"
#include "linear_tensors.h"

namespace attnvariants {
namespace {

void linear_forward(
    Tensor q, Tensor k, Tensor v, OptionalTensor g, OptionalTensor initial_state,
    OptionalTensor cu_seqlens, OptionalTensor norm_weight, OptionalTensor gate, Tensor out,
    Tensor state, int64_t feature_map, bool causal, double scale, int64_t norm, double eps,
    int64_t activation) {
  check_contiguous_rows(q, "q");
  check_contiguous_rows(k, "k");
  check_contiguous_rows(v, "v");

  LinearForward call = {};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  if (cu_seqlens.has_value()) {
    call.cu_seqlens = static_cast<const int*>(cu_seqlens->const_data_ptr());
  }
  if (initial_state.has_value()) {
    call.initial = static_cast<const float*>(initial_state->const_data_ptr());
  }
  call.state = float_pointer(state);
  call.out = out.mutable_data_ptr();
  call.q_strides = strides_of(q);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.batch = static_cast<int>(q.size(0));
  call.length = static_cast<int>(q.size(1));
  call.heads = static_cast<int>(q.size(2));
  call.key_dim = static_cast<int>(q.size(3));
  call.value_dim = static_cast<int>(v.size(3));
  call.sequences = static_cast<int>(state.size(0));
  call.scale = static_cast<float>(scale);
  call.feature_map = static_cast<Map>(feature_map);
  call.causal = causal;
  call.q_aligned = is_aligned(q);
  call.k_aligned = is_aligned(k);
  call.v_aligned = is_aligned(v);
  call.decay = log_decay_of(g);
  call.epilogue = epilogue_of(norm_weight, gate, norm, eps, activation);

  const OnDeviceOf device(q);
  device.check(plan_linear_forward(call, 0));
  OptionalTensor own, totals, squares;  // live until the launches
  if (!call.whole) {
    own = empty_floats(q, {call.slots, call.heads, call.key_dim, call.value_dim});
    call.own = float_pointer(*own);
    if (call.decay_width > 0) {
      totals = empty_floats(q, {call.slots, call.heads, call.decay_width});
      call.totals = float_pointer(*totals);
    }
  }
  if (call.norm_later) {
    squares = empty_floats(q, {call.batch, call.length, call.heads, call.value_tiles});
    call.squares = float_pointer(*squares);
  }
  device.check(launch_linear_forward(call, dtype_of(q), device.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(attnvariants, ATTNVARIANTS_DEVICE, library) {
  library.impl("_linear_forward", TORCH_BOX(&linear_forward));
}

}  // namespace
}  // namespace attnvariants
