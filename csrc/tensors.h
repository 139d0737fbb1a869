// What the bindings need to know of tensors, through torch's stable ABI.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "types.h"

// Tests build the extension for the CPU.
#ifndef ATTNVARIANTS_DEVICE
#define ATTNVARIANTS_DEVICE CUDA
#endif

namespace attnvariants {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the device of a tensor the current one, for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : device_(tensor.get_device_index()) {
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
  }
  ~OnDeviceOf() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  // Torch's current stream, which a CUDA graph may be capturing.
  cudaStream_t stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS,
        "attnvariants: no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

  // CUDA remembers an error until someone asks for it: torch would blame its next kernel.
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    STD_TORCH_CHECK(false, "attnvariants: ", cudaGetErrorString(error));
  }

 private:
  int device_, previous_ = 0;
};

inline Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::Half) return Dtype::kFloat16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "attnvariants: unexpected dtype");
  return Dtype::kBFloat16;
}

inline bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

inline void check_contiguous_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) == 1,
                  "attnvariants: the rows of ", name, " must be contiguous");
}

// [B, Q, H, D], or [B, Q, H] without rows.
inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Every row starts at a multiple of 16 bytes and has a multiple of `run` elements.
inline bool is_aligned(const Tensor& tensor, int run = kRun) {
  const int64_t last = tensor.dim() - 1, size = tensor.element_size();
  bool aligned = tensor.size(last) % run == 0 &&
                 reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % sizeof(uint4) == 0;
  for (int64_t axis = 0; axis < last; ++axis) {
    aligned = aligned && tensor.stride(axis) * size % static_cast<int64_t>(sizeof(uint4)) == 0;
  }
  return aligned;
}

inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

inline float* float_pointer(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace attnvariants
