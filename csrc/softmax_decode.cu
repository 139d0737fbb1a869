// One decode step of softmax attention over a cache, in one launch.
//
//   out = act(gate) * softmax(scale q k^T) v      over the keys 0 <= i - j < capacity of a KV head
//
// Every block takes one part of the keys of one row and KV head, cached and new ones: it reads
// them once for up to 8 query rows of the group and leaves a partial softmax. The last block of a
// row and KV head adds up the parts, applies the gate, and only then, when nobody reads the cache
// any more, writes the new keys and values over the oldest ones of a ring. The last KV head of a
// row advances its length, which all of its blocks have read by then.
//
// Position p lies in slot p mod capacity of its head, so that a full head is a ring that never
// wraps around: full and local heads are the same to the kernel.

#include "combine_parts.cuh"
#include "last_block.cuh"
#include "online_softmax.cuh"
#include "softmax_decode.h"
#include "split_plan.h"

namespace attnvariants {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Keys that a thread loads at once. 8 loads of 16 bytes are in flight, 4 where the rows take most
// of the registers.
template <typename T, int kRows>
constexpr int kKeys = (kRows == 8 ? 2 : 4) * 2 / (sizeof(T) == 4 ? 4 : 2);

template <int kRows>
constexpr int kBlocksPerProcessor = kRows == 8 ? 2 : (kRows == 4 ? 3 : 4);

__device__ __forceinline__ HeadPlan find_head(const SoftmaxDecode& p, int item, int& parts) {
  int low = 0, high = p.kv_heads;  // first_item of low <= item < first_item of high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.plan[middle].first_item <= item) low = middle;
    else high = middle;
  }
  parts = p.plan[low + 1].first_item - p.plan[low].first_item;
  return p.plan[low];
}

// Adds up the warps of a block and leaves the partial softmax of its rows in global memory.
template <int kRows>
__device__ __forceinline__ void store_part(
    const SoftmaxDecode& p, const OnlineSoftmax<kRows>& rows, int64_t first_row, int live_rows) {
  __shared__ float warp_max[kWarps][kRows], warp_total[kWarps][kRows];
  __shared__ float warp_acc[kWarps][kRows][32 * kRun];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane < p.lanes) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) warp_acc[warp][r][lane * kRun + i] = rows.acc[r][i];
    }
    if (lane == 0) {
      warp_max[warp][r] = rows.row_max[r];
      warp_total[warp][r] = rows.total[r];
    }
  }
  __syncthreads();
  for (int r = 0; r < live_rows; ++r) {
    float row_max = warp_max[0][r];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) row_max = fmaxf(row_max, warp_max[w][r]);
    const float origin = softmax_origin(row_max);
    float weight[kWarps], total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[w] = softmax_weight(warp_max[w][r], origin);
      total += weight[w] * warp_total[w][r];
    }
    for (int col = threadIdx.x; col < p.value_dim; col += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += weight[w] * warp_acc[w][r][col];
      p.part_acc[(first_row + r) * p.value_dim + col] = sum;
    }
    if (threadIdx.x == 0) {
      p.part_max[first_row + r] = row_max;
      p.part_total[first_row + r] = total;
    }
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kRows>)
softmax_decode_kernel(const __grid_constant__ SoftmaxDecode p) {
  const int row_block = blockIdx.x % p.row_blocks;
  const int b = blockIdx.x / p.row_blocks % p.batch;
  const int item = blockIdx.x / p.row_blocks / p.batch;
  int parts;
  const HeadPlan plan = find_head(p, item, parts);
  const int head = plan.head, capacity = plan.capacity;
  const int group = p.heads / p.kv_heads, num_rows = group * p.steps;
  const int length = p.lengths[b];

  const int lane = threadIdx.x % 32, lanes = p.lanes;
  const int keys_at_once = kThreads / lanes;
  const int first = lane % lanes * kRun;  // this thread's columns
  const int own_key = threadIdx.x / lanes;

  float q[kRows][kRun];
  int query[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Rows beyond the last one repeat it, and are not stored.
    const int row = min(row_block * kRows + r, num_rows - 1);
    query[r] = row / group;
    const T* source = static_cast<const T*>(p.q) + b * p.q_strides.batch +
                      query[r] * p.q_strides.time + (head * group + row % group) * p.q_strides.head;
    const Run<T> run = load_run(source, first, p.key_dim, p.q_aligned);
#pragma unroll
    for (int i = 0; i < kRun; ++i) q[r][i] = to_float(run.x[i]);
  }

  // Keys 0 .. held - 1 are the slots of the cache, the Q new ones follow. Slot s holds the latest
  // position that is s modulo the capacity, `age` positions before the newest one.
  const int held = min(length, capacity), num_keys = held + p.steps;
  const int newest = length > 0 ? (length - 1) % capacity : 0;
  constexpr int kStep = kKeys<T, kRows>;
  const int tile = kStep * keys_at_once;
  const int size = ((num_keys + parts - 1) / parts + tile - 1) / tile * tile;
  const int part = item - plan.first_item;
  const int64_t part_start = static_cast<int64_t>(part) * size;
  const int start = part_start < num_keys ? static_cast<int>(part_start) : num_keys;
  const int end = min(size, num_keys - start) + start;

  const T* k_cache = static_cast<const T*>(p.k_cache) + b * p.k_cache_strides.batch +
                     plan.slot * p.k_cache_strides.time;
  const T* v_cache = static_cast<const T*>(p.v_cache) + b * p.v_cache_strides.batch +
                     plan.slot * p.v_cache_strides.time;
  const T* k_new =
      static_cast<const T*>(p.k) + b * p.k_strides.batch + head * p.k_strides.head;
  const T* v_new =
      static_cast<const T*>(p.v) + b * p.v_strides.batch + head * p.v_strides.head;

  OnlineSoftmax<kRows> rows;
  rows.clear();
  for (int base = start; base < end; base += tile) {
    Run<T> k[kStep], v[kStep];
    int distance[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const int key = base + j * keys_at_once + own_key;
      int age = newest - key;
      age = age < 0 ? age + capacity : age;
      // From the first query; those behind it are further away.
      distance[j] = key < held ? age + 1 : held - key;
      if (key >= end || distance[j] >= capacity) {
        // What no query sees is not even loaded: a weight of 0 does not stop a NaN.
        distance[j] = capacity;
        k[j] = zero_run<T>();
        v[j] = zero_run<T>();
        continue;
      }
      const bool cached = key < held;
      const T* k_row = cached ? k_cache + key * p.k_cache_strides.time
                              : k_new + (key - held) * p.k_strides.time;
      const T* v_row = cached ? v_cache + key * p.v_cache_strides.time
                              : v_new + (key - held) * p.v_strides.time;
      k[j] = load_run(k_row, first, p.key_dim, p.k_aligned);
      v[j] = load_run(v_row, first, p.value_dim, p.v_aligned);
    }
    rows.template add<T, kStep>(q, k, v, distance, query, capacity, p.scale, lanes);
  }
  rows.merge_groups(lanes);

  const int row_start = row_block * kRows;
  const int64_t first_row = (static_cast<int64_t>(item) * p.batch + b) * num_rows + row_start;
  store_part(p, rows, first_row, min(kRows, num_rows - row_start));
  if (is_last_block(p.arrivals + b * p.kv_heads + head, parts * p.row_blocks)) {
    combine_parts<T, kThreads>(p, b, plan, parts);
    append_rows<T, kThreads>(p, b, plan, length);
    if (threadIdx.x == 0) advance_length(p, b, length);
  }
}

using Kernel = void (*)(SoftmaxDecode);

struct Choice {
  Kernel kernel;
  int rows, keys;
};

template <typename T>
Choice choose(int rows) {
  if (rows == 1) return {softmax_decode_kernel<T, 1>, 1, kKeys<T, 1>};
  if (rows <= 4) return {softmax_decode_kernel<T, 4>, 4, kKeys<T, 4>};
  return {softmax_decode_kernel<T, 8>, 8, kKeys<T, 8>};
}

Choice choose(const SoftmaxDecode& call, Dtype dtype) {
  const int rows = call.heads / call.kv_heads * call.steps;
  if (dtype == Dtype::kFloat32) return choose<float>(rows);
  if (dtype == Dtype::kFloat16) return choose<__half>(rows);
  return choose<__nv_bfloat16>(rows);
}

cudaError_t count_resident(Kernel kernel, int& resident) {
  int device, processors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  resident = processors * (blocks > 0 ? blocks : 1);
  return error;
}

}  // namespace

cudaError_t plan_softmax_decode(
    SoftmaxDecode& call, Dtype dtype, const int64_t* capacities, int resident) {
  const Choice choice = choose(call, dtype);
  if (resident == 0) {
    const cudaError_t error = count_resident(choice.kernel, resident);
    if (error != cudaSuccess) return error;
  }
  const int rows = call.heads / call.kv_heads * call.steps;
  call.row_blocks = static_cast<int>(ceil_div(rows, choice.rows));
  call.lanes = 1;
  while (call.lanes * kRun < std::max(call.key_dim, call.value_dim)) call.lanes *= 2;

  const int tile = choice.keys * kThreads / call.lanes;
  std::vector<int64_t> tiles, parts, slots(1, 0);
  for (int h = 0; h < call.kv_heads; ++h) {
    tiles.push_back(ceil_div(capacities[h] + call.steps, tile));
    slots.push_back(slots.back() + capacities[h]);
  }
  const int64_t size =
      tiles_per_part(tiles, int64_t{call.batch} * call.row_blocks, std::max(resident, 1));
  for (int64_t n : tiles) parts.push_back(ceil_div(n, size));
  call.items = 0;
  int entry = 0;
  for (int head : longest_first(tiles, parts)) {
    call.plan[entry++] = {head, call.items, static_cast<int>(slots[head]),
                          static_cast<int>(capacities[head])};
    call.items += static_cast<int>(parts[head]);
  }
  call.plan[entry] = {0, call.items, 0, 0};
  return cudaSuccess;
}

cudaError_t launch_softmax_decode(const SoftmaxDecode& call, Dtype dtype, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.items) * call.batch * call.row_blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, choose(call, dtype).kernel, call);
}

}  // namespace attnvariants
