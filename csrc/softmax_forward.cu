// Softmax attention over whole sequences, with windows per KV head and an output gate.
//
//   out = act(gate) * softmax(scale q k^T) v
//
// A block takes a tile of queries of one head and walks over the tiles of keys that they see. A
// warp owns 16 or 32 of the rows: it multiplies them by the keys, updates their running softmax
// in registers, and multiplies the weights by the values. Tiles of keys and of values take turns in
// a ring in shared memory, which asynchronous copies fill ahead of the products.

#include <algorithm>
#include <type_traits>

#include "activations.cuh"
#include "softmax_forward.h"
#include "softmax_plan.h"
#include "softmax_rows.cuh"
#include "visible_keys.cuh"

extern __shared__ __align__(128) unsigned char dynamic_shared[];

namespace attnvariants {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Tiles for head dims up to kDim. Two blocks of 16 rows share what a warp reads of keys and values,
// which halves the traffic of shared memory, where the registers allow it.
template <typename T, int kDim>
struct Shape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kBlocks = kWide || kDim > 128 ? 1 : 2;  // of 16 rows, per warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim > 128 ? (kWide ? 16 : 32) : (kWide ? 32 : 64);
  static constexpr int kResident = 2;  // blocks per processor, by registers

  using Tile = SharedTile<T, kRows, kDim>;
  using KeyTile = SharedTile<T, kKeys, kDim>;
  using OutTile = SharedTile<float, kRows, kDim, false>;
  // Queries stay in registers where there is room for them.
  using Queries = std::conditional_t<kDim <= 64 && !kWide, RegisterRows<T, kDim>,
                                     SharedRows<Tile>>;

  static constexpr int bytes(int slots) { return Tile::kBytes + slots * KeyTile::kBytes; }
  static_assert(OutTile::kBytes <= bytes(2));
  static_assert(bytes(2) + 512 <= 99 * 1024);  // what every chip gives to a block, less the rest
};

enum class Content { kKeys, kValues };

// The ring: copies 0, 1, 2, ... are the keys and the values of the first tile, of the second, ...
template <typename T, int kDim>
struct Ring {
  using Tile = typename Shape<T, kDim>::KeyTile;

  GlobalRows<const T> keys, values;
  int begin, tiles, slots;  // first key, and tiles of them

  __device__ __forceinline__ Tile slot(int copy) const {
    return Tile(dynamic_shared + Shape<T, kDim>::Tile::kBytes +
                (copy & (slots - 1)) * Tile::kBytes);
  }

  template <Content kContent>
  __device__ __forceinline__ void start(int copy) const {
    if (copy < 2 * tiles) {
      const int first = begin + copy / 2 * Tile::kRows;
      if constexpr (kContent == Content::kKeys) load_rows<kThreads>(slot(copy), keys, first);
      else
        load_rows<kThreads>(slot(copy), values, first);
    }
    commit_copies();
  }

  __device__ __forceinline__ void start_first() const {
    start<Content::kKeys>(0);
    if (slots == 4) {
      start<Content::kValues>(1);
      start<Content::kKeys>(2);
    }
  }

  // Returns when copy number `copy` is there for all, and starts the one that takes the slot of
  // the copy before, which all have read by then.
  template <Content kContent>
  __device__ __forceinline__ Tile next(int copy) const {
    if (slots == 4) wait_for_copies<2>();
    else
      wait_for_copies<0>();
    __syncthreads();
    constexpr bool kAreKeys = kContent == Content::kKeys;
    start<kAreKeys ? Content::kValues : Content::kKeys>(copy + slots - 1);
    return slot(copy);
  }
};

// `count` rows of one head from row `first` of a tile's sequence on.
template <typename T>
__device__ __forceinline__ GlobalRows<const T> rows_of(
    const void* x, const Strides& strides, const QueryTile& t, int head, int first, int count,
    int dim, bool aligned) {
  const T* data = static_cast<const T*>(x) + t.batch * strides.batch +
                  (t.start + first) * strides.time + head * strides.head;
  return {data, strides.time, count, dim, aligned};
}

// act(gate) * out of a warp's rows, from `first` on, which it has written to `tile`.
template <typename T, typename S>
__device__ __forceinline__ void store_rows(
    const SoftmaxForward& p, const QueryTile& t, int first) {
  constexpr int kRuns = S::OutTile::kCols / kRun;
  const typename S::OutTile tile(dynamic_shared);
#pragma unroll 1
  for (int index = lane_index(); index < S::kWarpRows * kRuns; index += 32) {
    const int row = first + index / kRuns, col = index % kRuns * kRun;
    if (row >= t.count || col >= p.value_dim) continue;
    const int64_t time = t.start + t.first + row;
    Run<float> o;
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      *reinterpret_cast<float4*>(o.x + i) = *reinterpret_cast<const float4*>(tile.at(row, col + i));
    }
    if (p.activation != Gate::kNone) {
      const int64_t at = t.batch * p.gate_strides.batch + time * p.gate_strides.time +
                         t.head * p.gate_strides.head;
      Run<float> gate;
      if (p.gate_per_head) {
        const float logit = load_either<T>(p.gate, at, p.gate_is_float);
#pragma unroll
        for (int i = 0; i < kRun; ++i) gate.x[i] = logit;
      } else if (p.gate_is_float) {
        gate = load_run(static_cast<const float*>(p.gate) + at, col, p.value_dim, p.gate_aligned);
      } else {
        const Run<T> logits =
            load_run(static_cast<const T*>(p.gate) + at, col, p.value_dim, p.gate_aligned);
#pragma unroll
        for (int i = 0; i < kRun; ++i) gate.x[i] = to_float(logits.x[i]);
      }
      activate(p.activation, gate.x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) o.x[i] *= gate.x[i];
    }
    Run<T> result;
#pragma unroll
    for (int i = 0; i < kRun; ++i) result.x[i] = from_float<T>(o.x[i]);
    const int64_t token = static_cast<int64_t>(t.batch) * p.queries + time;
    store_run(static_cast<T*>(p.out) + (token * p.heads + t.head) * p.value_dim, col,
              p.value_dim, p.out_aligned, result);
  }
}

// The largest of a head's logits so far; NaN stays. Not negative floats are ordered as their bits
// are, negative ones the other way round.
__device__ __forceinline__ void raise(float* target, float x) {
  x += 0.0f;  // -0 is 0
  if (x < 0.0f) atomicMin(reinterpret_cast<unsigned*>(target), __float_as_uint(x));
  else
    atomicMax(reinterpret_cast<int*>(target), x == x ? __float_as_int(x) : 0x7fffffff);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, (Shape<T, kDim>::kResident))
softmax_forward_kernel(const __grid_constant__ SoftmaxForward p) {
  using S = Shape<T, kDim>;
  constexpr int kBlocks = S::kBlocks, kKeys = S::kKeys;
  // What all threads share stays in shared memory, out of the way of registers.
  __shared__ QueryTile t;
  __shared__ Ring<T, kDim> ring;
  __shared__ Range seen_by_warp[kWarps], seen_by_all_rows[kWarps];
  if (threadIdx.x == 0) {
    find_head(p, blockIdx.x, t);
    find_rows<S::kRows>(p, t);
    const int begin = visible_keys(p, t, 0).low, end = visible_keys(p, t, t.count - 1).high;
    ring.keys = rows_of<T>(p.k, p.k_strides, t, t.kv_head, 0, end, p.key_dim, p.k_aligned);
    ring.values = rows_of<T>(p.v, p.v_strides, t, t.kv_head, 0, end, p.value_dim, p.v_aligned);
    ring.begin = begin;
    ring.tiles = end > begin ? (end - begin + kKeys - 1) / kKeys : 0;
    ring.slots = p.slots;
  }
  __syncthreads();
  if (t.count <= 0) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, warp_row = warp * S::kWarpRows;
  if (lane_index() == 0) {
    const Range upper = visible_keys(p, t, warp_row);
    const Range lower = visible_keys(p, t, warp_row + S::kWarpRows - 1);
    seen_by_warp[warp] = {upper.low, warp_row < t.count ? lower.high : 0};
    seen_by_all_rows[warp] = {lower.low, upper.high};
  }
  const typename S::Tile queries(dynamic_shared);
  load_rows<kThreads>(queries, rows_of<T>(p.q, p.q_strides, t, t.head, t.first, t.count, p.key_dim,
                                          p.q_aligned), 0);
  ring.start_first();

  RowStatistics statistics[kBlocks];
  Accumulator<kDim> out[kBlocks];
  typename S::Queries q[kBlocks];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    statistics[m].clear();
    out[m].clear();
  }
  const bool natural = kNatural<T> || p.relu;  // units of the logits
  const float scale = natural ? p.scale : p.scale * kLog2E;
  // Head dims far below kDim are common only where it is largest. In fp32 it is rather for shorter
  // stretches without a branch, over which the compiler would spread too many loads ahead.
  constexpr bool kTrimmed = S::kWide || kDim > 128;
  const int depth = kTrimmed ? p.key_dim : kDim, cols = kTrimmed ? p.value_dim : kDim;
  for (int tile = 0; tile < ring.tiles; ++tile) {
    const auto keys = ring.template next<Content::kKeys>(2 * tile);
    if (tile == 0) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) q[m].load(queries, warp_row + 16 * m);
    }
    const int first = ring.begin + tile * kKeys;
    const Range some = seen_by_warp[warp], all = seen_by_all_rows[warp];
    const bool seen = first < some.high && first + kKeys > some.low;
    RegisterRows<T, kKeys> weights[kBlocks];
    if (seen) {
      Accumulator<kKeys> scores[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) scores[m].clear();
      multiply_transposed<kBlocks>(scores, q, keys, depth);
      float factor = scale;
      if (first < all.low || first + kKeys > all.high) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const int row = warp_row + 16 * m;
          const Range visible[2] = {visible_keys(p, t, row + row_of(0)),
                                    visible_keys(p, t, row + row_of(2))};
          scale_and_mask(scores[m], scale, first, visible);
        }
        factor = 1.0f;
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (p.relu) {
          if (p.max_logit != nullptr) update_largest(statistics[m], scores[m], factor);
          rectify(statistics[m], scores[m], factor);
        } else {
          weigh<T>(statistics[m], scores[m], out[m], factor);
        }
        weights[m] = scores[m].template as_rows<T>();
      }
    }
    const auto values = ring.template next<Content::kValues>(2 * tile + 1);
    if (seen) multiply<kBlocks>(out, weights, values, cols);
  }

  // All have read the ring, and no copy is under way: the rows take its place.
  wait_for_copies<0>();
  __syncthreads();
  float largest = -INFINITY;
  bool broken = false;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * m + row_of(2 * r);
      if (row < t.count) largest = fmaxf(largest, statistics[m].largest[r]);
      const float total = row_sum(statistics[m].total[r]);
      broken = broken || (row < t.count && total != total);
      if (p.relu) continue;
      const bool blind = total == 0.0f;  // rows that see nothing give 0
      const float inverse = 1.0f / (blind ? 1.0f : total);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        out[m].x[j][2 * r] *= inverse;
        out[m].x[j][2 * r + 1] *= inverse;
      }
      if (lane_index() % 4 == 0 && row < t.count) {
        const float shift = statistics[m].largest[r];
        float lse = kNatural<T> ? shift + logf(total) : (shift + log2f(total)) * kLn2;
        if (blind) lse = -INFINITY;
        const int64_t head = static_cast<int64_t>(t.batch) * p.heads + t.head;
        p.lse[head * p.queries + t.start + t.first + row] = lse;
      }
    }
    out[m].template write<float>(typename S::OutTile(dynamic_shared), warp_row + 16 * m);
  }
  __syncwarp();
  store_rows<T, S>(p, t, warp_row);
  if (p.max_logit != nullptr) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    }
    broken = __any_sync(kFullWarp, broken);  // a maximum drops NaN, a sum does not
    if (lane_index() == 0) {
      raise(p.max_logit + t.head, broken ? NAN : (natural ? largest : largest * kLn2));
    }
  }
}

using Kernel = void (*)(SoftmaxForward);

struct Choice {
  Kernel kernel;
  int rows, bytes[2];  // of shared memory, with 2 and with 4 slots
};

template <typename T, int kDim>
Choice choice_of() {
  using S = Shape<T, kDim>;
  return {softmax_forward_kernel<T, kDim>, S::kRows, {S::bytes(2), S::bytes(4)}};
}

template <typename T>
Choice choose(int dim) {
  if (dim <= 32) return choice_of<T, 32>();
  if (dim <= 64) return choice_of<T, 64>();
  if (dim <= 96) return choice_of<T, 96>();
  if (dim <= 128) return choice_of<T, 128>();
  return choice_of<T, 256>();
}

Choice choose(const SoftmaxForward& call, Dtype dtype) {
  const int dim = std::max(call.key_dim, call.value_dim);
  if (dtype == Dtype::kFloat32) return choose<float>(dim);
  if (dtype == Dtype::kFloat16) return choose<__half>(dim);
  return choose<__nv_bfloat16>(dim);
}

}  // namespace

cudaError_t launch_softmax_forward(
    SoftmaxForward call, Dtype dtype, const int64_t* windows, cudaStream_t stream) {
  const Choice choice = choose(call, dtype);
  fill_bands(call, windows);
  call.section = heads_of_a_section(call, dtype);
  call.tiles = static_cast<int>(ceil_div(call.queries, choice.rows)) + call.sequences;

  int device, shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  // Copies further ahead are worth less than a second block per processor.
  const int deep = 2 * (choice.bytes[1] + 1024) <= shared;
  call.slots = deep ? 4 : 2;
  const int bytes = choice.bytes[deep];
  error = cudaFuncSetAttribute(
      choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.tiles) * call.batch * call.heads);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, choice.kernel, call);
}

}  // namespace attnvariants
