// Kernels that use what fibers.h offers, rightly and wrongly, for tests/test_cuda_on_cpu.py.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

extern __shared__ unsigned char dynamic_shared[];

namespace {

// out[i] = sum of x over the block, through dynamic shared memory.
__global__ void sum_of_block(const float* x, float* out, bool barrier) {
  float* shared = reinterpret_cast<float*>(dynamic_shared);
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (barrier) __syncthreads();
  float sum = 0.0f;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Eight results of lane i of every warp.
__global__ void warp_functions(int* out) {
  const int lane = threadIdx.x % 32, value = 100 + static_cast<int>(threadIdx.x);
  int* row = out + 8 * threadIdx.x;
  row[0] = __shfl_xor_sync(0xffffffffu, value, 5);
  row[1] = __shfl_sync(0xffffffffu, value, 7);
  row[2] = __shfl_up_sync(0xffffffffu, value, 3);
  row[3] = __shfl_down_sync(0xffffffffu, value, 3);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  row[5] = __any_sync(0xffffffffu, value == 140);
  row[6] = __all_sync(0xffffffffu, lane < 32);
  row[7] = atomicAdd(out + 8 * blockDim.x, 1) >= 0;
}

// The last block adds up what all blocks have left, right only if they arrive after they have.
__global__ void sum_of_blocks(const float* x, float* parts, unsigned* arrived, float* out,
                              bool barrier) {
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  __shared__ bool last;
  parts[index] = x[index];
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += parts[i];
  *out = sum;
}

__global__ void warps_part_at_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void warps_meet_in_two_lines() {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}

__global__ void lanes_part_at_a_shuffle(int* out) {
  if (threadIdx.x != 3) *out = __shfl_xor_sync(0xffffffffu, 1, 1);
}

template <typename... Parameters, typename... Arguments>
void launch(int blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = threads * sizeof(float);
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

extern "C" void run_sum(int blocks, int threads, const float* x, float* out, bool barrier) {
  launch(blocks, threads, sum_of_block, x, out, barrier);
}

extern "C" void run_sum_of_blocks(int blocks, int threads, const float* x, float* parts,
                                  unsigned* arrived, float* out, bool barrier) {
  launch(blocks, threads, sum_of_blocks, x, parts, arrived, out, barrier);
}

extern "C" void run_warp_functions(int* out) { launch(1, 64, warp_functions, out); }

extern "C" void run_wrong(int which) {
  int out = 0;
  if (which == 0) launch(1, 64, warps_part_at_a_barrier);
  if (which == 1) launch(1, 64, warps_meet_in_two_lines);
  if (which == 2) launch(1, 64, lanes_part_at_a_shuffle, &out);
}

extern "C" void round_trip(const float* x, int count, unsigned short* bf16, unsigned short* fp16,
                           float* back) {
  for (int i = 0; i < count; ++i) {
    const __nv_bfloat16 y = __float2bfloat16(x[i]);
    const __half z = __float2half(x[i]);
    std::memcpy(bf16 + i, &y, sizeof y);
    std::memcpy(fp16 + i, &z, sizeof z);
    back[2 * i] = __bfloat162float(y);
    back[2 * i + 1] = __half2float(z);
  }
}
