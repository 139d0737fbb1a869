// The operator attnvariants::_softmax_decode. Its schema is in
// attnvariants/ops/_cuda_softmax_decode.py, which has checked the arguments.

#include "softmax_decode.h"
#include "tensors.h"

namespace attnvariants {
namespace {

void softmax_decode(
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, Tensor k_cache, Tensor v_cache,
    Tensor lengths, std::vector<int64_t> capacities, double scale, int64_t activation,
    Tensor arrivals, Tensor out, Tensor row_max, Tensor lse) {
  STD_TORCH_CHECK(capacities.size() <= size_t{kMaxKvHeads},
                  "attnvariants: more than ", kMaxKvHeads, " KV heads");
  check_contiguous_rows(q, "q");
  check_contiguous_rows(k, "k");
  check_contiguous_rows(v, "v");
  check_contiguous_rows(k_cache, "cache.k");
  check_contiguous_rows(v_cache, "cache.v");

  SoftmaxDecode call = {};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.k_cache = k_cache.mutable_data_ptr();
  call.v_cache = v_cache.mutable_data_ptr();
  call.lengths = static_cast<int*>(lengths.mutable_data_ptr());
  call.out = out.mutable_data_ptr();
  call.row_max = float_pointer(row_max);
  call.lse = float_pointer(lse);
  call.arrivals = static_cast<unsigned*>(arrivals.mutable_data_ptr());
  call.q_strides = strides_of(q);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.k_cache_strides = {k_cache.stride(0), k_cache.stride(1), 0};
  call.v_cache_strides = {v_cache.stride(0), v_cache.stride(1), 0};
  call.batch = static_cast<int>(q.size(0));
  call.steps = static_cast<int>(q.size(1));
  call.heads = static_cast<int>(q.size(2));
  call.kv_heads = static_cast<int>(k.size(2));
  call.key_dim = static_cast<int>(q.size(3));
  call.value_dim = static_cast<int>(v.size(3));
  call.scale = static_cast<float>(scale);
  call.q_aligned = is_aligned(q);
  call.k_aligned = is_aligned(k) && is_aligned(k_cache);
  call.v_aligned = is_aligned(v) && is_aligned(v_cache);
  call.activation = static_cast<Gate>(activation);
  if (gate.has_value()) {
    call.gate_per_head = gate->dim() == 3;
    if (!call.gate_per_head) check_contiguous_rows(*gate, "gate");
    call.gate = gate->const_data_ptr();
    call.gate_strides = strides_of(*gate);
    call.gate_is_float = is_float(*gate);
  }

  const OnDeviceOf device(q);
  const Dtype dtype = dtype_of(q);
  device.check(plan_softmax_decode(call, dtype, capacities.data(), 0));
  const int64_t rows = int64_t{call.heads / call.kv_heads} * call.steps;
  const int64_t parts = rows * call.items * call.batch;
  const Tensor part_acc = empty_floats(q, {parts, call.value_dim});
  const Tensor part_max = empty_floats(q, {parts}), part_total = empty_floats(q, {parts});
  call.part_acc = float_pointer(part_acc);
  call.part_max = float_pointer(part_max);
  call.part_total = float_pointer(part_total);
  device.check(launch_softmax_decode(call, dtype, device.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(attnvariants, ATTNVARIANTS_DEVICE, library) {
  library.impl("_softmax_decode", TORCH_BOX(&softmax_decode));
}

}  // namespace
}  // namespace attnvariants
