// What the sources in csrc/ use of CUDA, for g++: found instead of the toolkit's header of this
// name. See fibers.h for what runs the threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <utility>

#include "warps.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // a block runs in one CPU thread; legal behind `extern` as well

struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

#define CUDA_ON_CPU_HERE __FILE__, __LINE__
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::Wait::kBlock, CUDA_ON_CPU_HERE)
#define __syncwarp() cuda_on_cpu::wait(cuda_on_cpu::Wait::kWarp, CUDA_ON_CPU_HERE)
#define __shfl_sync(mask, value, source) \
  cuda_on_cpu::exchange(mask, value, [&](int) { return (source) & 31; }, CUDA_ON_CPU_HERE)
#define __shfl_xor_sync(mask, value, bits) \
  cuda_on_cpu::exchange(mask, value, [&](int lane) { return lane ^ (bits); }, CUDA_ON_CPU_HERE)
#define __shfl_down_sync(mask, value, by) \
  cuda_on_cpu::exchange(                  \
      mask, value, [&](int lane) { return cuda_on_cpu::shifted(lane, (by)); }, CUDA_ON_CPU_HERE)
#define __shfl_up_sync(mask, value, by) \
  cuda_on_cpu::exchange(                \
      mask, value, [&](int lane) { return cuda_on_cpu::shifted(lane, -(by)); }, CUDA_ON_CPU_HERE)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(mask, vote, CUDA_ON_CPU_HERE)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, !(vote)) == 0)

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  cuda_on_cpu::pass_turn();
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  cuda_on_cpu::pass_turn();
  return old;
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = value < old ? value : old;
  cuda_on_cpu::pass_turn();
  return old;
}

template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  cuda_on_cpu::pass_turn();
  return old;
}

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
template <typename T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <typename T>
constexpr T max(T a, T b) { return a < b ? b : a; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace cuda_on_cpu {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t fail(cudaError_t error) { return last_error = error; }
}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) { *device = -1; return cudaSuccess; }  // torch's CPU
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Settings& settings = cuda_on_cpu::settings;
  *value = attribute == cudaDevAttrMultiProcessorCount ? settings.processors : settings.shared;
  return cudaSuccess;
}

namespace cuda_on_cpu {
// Dynamic shared memory that kernels may take, in bytes, where it is not the least, and how often
// it was reduced: a device keeps one number for all threads of the host.
inline constexpr size_t kLeastDynamicShared = 48 * 1024;
inline std::map<const void*, size_t> dynamic_shared_limits;
inline int reductions = 0;
}  // namespace cuda_on_cpu

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  size_t& limit = cuda_on_cpu::dynamic_shared_limits[reinterpret_cast<const void*>(kernel)];
  cuda_on_cpu::reductions += static_cast<size_t>(bytes) < limit;
  limit = bytes;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto limit = cuda_on_cpu::dynamic_shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t opted = limit == cuda_on_cpu::dynamic_shared_limits.end() ? 0 : limit->second;
  if (config->dynamicSmemBytes > std::max(opted, cuda_on_cpu::kLeastDynamicShared) ||
      cuda_on_cpu::settings.refuses) {
    return cuda_on_cpu::fail(cudaErrorInvalidValue);
  }
  cuda_on_cpu::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                        [&] { kernel(arguments...); });
  return cudaSuccess;
}

