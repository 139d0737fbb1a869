// Elements of tensors: conversions to and from fp32, and runs of 8 elements in registers.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "types.h"

namespace attnvariants {

inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// Two numbers in half precision, the first in the lower bits.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// 8 neighbouring elements of a row: 16 bytes in half precision, 32 in single.
template <typename T>
struct alignas(16) Run {
  T x[kRun];
};

// Elements `first` to `first + 8` of a row of `size` elements, 0 beyond it.
//
// `aligned` promises a multiple of 8 elements at a multiple of 16 bytes. It is the same for all
// threads, so that the branch costs next to nothing.
template <typename T>
__device__ __forceinline__ Run<T> load_run(const T* row, int first, int size, bool aligned) {
  Run<T> run;
  if (aligned) {
    constexpr int kLoads = sizeof(Run<T>) / sizeof(uint4);
    uint4* words = reinterpret_cast<uint4*>(run.x);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      words[i] = first < size ? reinterpret_cast<const uint4*>(row + first)[i] : uint4{0, 0, 0, 0};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.x[i] = first + i < size ? row[first + i] : from_float<T>(0.0f);
    }
  }
  return run;
}

template <typename T>
__device__ __forceinline__ void store_run(
    T* row, int first, int size, bool aligned, const Run<T>& run) {
  if (aligned) {
    constexpr int kStores = sizeof(Run<T>) / sizeof(uint4);
    if (first >= size) return;
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      reinterpret_cast<uint4*>(row + first)[i] = reinterpret_cast<const uint4*>(run.x)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (first + i < size) row[first + i] = run.x[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ Run<T> zero_run() {
  Run<T> run;
#pragma unroll
  for (int i = 0; i < kRun; ++i) run.x[i] = from_float<T>(0.0f);
  return run;
}

// One element of a tensor in the inputs' dtype or in fp32.
template <typename T>
__device__ __forceinline__ float load_either(const void* tensor, int64_t index, bool is_float) {
  return is_float ? static_cast<const float*>(tensor)[index]
                  : to_float(static_cast<const T*>(tensor)[index]);
}

}  // namespace attnvariants
