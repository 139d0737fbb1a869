// The operator attnvariants::_softmax_forward. Its schema is in
// attnvariants/ops/_cuda_softmax_forward.py, which has checked the arguments.

#include "softmax_plan.h"
#include "tensors.h"

namespace attnvariants {
namespace {

// Rows can be copied 16 bytes at a time.
bool has_chunks(const Tensor& tensor) {
  return is_aligned(tensor, static_cast<int>(16 / tensor.element_size()));
}

void softmax_forward(
    Tensor q, Tensor k, Tensor v, OptionalTensor gate, OptionalTensor cu_seqlens,
    std::vector<int64_t> windows, bool causal, double scale, int64_t activation, int64_t block,
    bool relu, Tensor out, OptionalTensor lse, OptionalTensor max_logit) {
  check_contiguous_rows(q, "q");
  check_contiguous_rows(k, "k");
  check_contiguous_rows(v, "v");
  const int kv_heads = static_cast<int>(k.size(2));
  STD_TORCH_CHECK(windows.size() == static_cast<size_t>(kv_heads),
                  "attnvariants: one window per KV head");
  STD_TORCH_CHECK(count_bands(windows.data(), kv_heads) <= kMaxBands,
                  "attnvariants: windows change more than ", kMaxBands, " times");
  STD_TORCH_CHECK(relu || lse.has_value(), "attnvariants: a softmax needs lse");
  STD_TORCH_CHECK(scale >= 0.0, "attnvariants: the scale must not be negative");

  const int64_t sequences = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0;
  STD_TORCH_CHECK(std::max(q.size(1), k.size(1)) < kFar, "attnvariants: sequences too long");
  STD_TORCH_CHECK((q.size(1) / 64 + 1 + sequences) * q.size(0) * q.size(2) <= INT32_MAX,
                  "attnvariants: too many tiles for one launch");

  SoftmaxForward call = {};
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  if (lse.has_value()) call.lse = float_pointer(*lse);
  if (max_logit.has_value()) call.max_logit = float_pointer(*max_logit);
  call.q_strides = strides_of(q);
  call.k_strides = strides_of(k);
  call.v_strides = strides_of(v);
  call.batch = static_cast<int>(q.size(0));
  call.queries = static_cast<int>(q.size(1));
  call.keys = static_cast<int>(k.size(1));
  call.heads = static_cast<int>(q.size(2));
  call.kv_heads = kv_heads;
  call.key_dim = static_cast<int>(q.size(3));
  call.value_dim = static_cast<int>(v.size(3));
  call.block = static_cast<int>(block);
  call.scale = static_cast<float>(scale);
  call.activation = static_cast<Gate>(activation);
  call.causal = causal;
  call.relu = relu;
  call.q_aligned = has_chunks(q);
  call.k_aligned = has_chunks(k);
  call.v_aligned = has_chunks(v);
  call.out_aligned = is_aligned(out);
  if (cu_seqlens.has_value()) {
    call.cu_seqlens = static_cast<const int*>(cu_seqlens->const_data_ptr());
    call.sequences = static_cast<int>(sequences);
  }
  if (gate.has_value()) {
    call.gate = gate->const_data_ptr();
    call.gate_per_head = gate->dim() == 3;
    if (!call.gate_per_head) check_contiguous_rows(*gate, "gate");
    call.gate_strides = strides_of(*gate);
    call.gate_is_float = is_float(*gate);
    call.gate_aligned = is_aligned(*gate);
  }

  const OnDeviceOf device(q);
  device.check(launch_softmax_forward(call, dtype_of(q), windows.data(), device.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(attnvariants, ATTNVARIANTS_DEVICE, library) {
  library.impl("_softmax_forward", TORCH_BOX(&softmax_forward));
}

}  // namespace
}  // namespace attnvariants
