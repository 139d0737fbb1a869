// Chunks of linear attention: a block's shared memory, what it loads, and the decay of a chunk.
//
// The key channels are taken in slices of 64. Of a decay, only exponentials of sums over intervals
// are ever formed, by additions: a difference of running sums would lose digits and make NaN of
// -inf. A sum per channel is that of whole groups of rows, 8 in a chunk, and of single rows.

#pragma once

#include "linear_forward.h"
#include "linear_products.cuh"
#include "maps.cuh"

namespace attnvariants {

inline constexpr int kSlice = 64;   // key channels
inline constexpr int kValues = 64;  // columns of a tile of the values, for 4 warps
inline constexpr int kGroups = 8;    // of a chunk's rows
inline constexpr int kMaxWarps = 8;
inline constexpr int kMaxSlices = 4;
inline constexpr int kMaxLevels = 6;

// Chunks of kRows_ tokens, for inputs of type T_.
template <typename T_, int kRows_>
struct Chunk {
  using T = T_;
  using E = Element<T>;
  static constexpr int kRows = kRows_, kGroupRows = kRows / kGroups, kBlocks = kRows / kBlock;
  // Steps of a loop over blocks whose operands fit in registers together.
  static constexpr int kUnroll = sizeof(E) == 2 && kRows == 64 ? 4 : 1;
};

// A log-decay that is smaller is replaced by this, whose exponential is 0 as well. Unlike those of
// -inf, its sums and multiples are numbers.
inline constexpr float kNothing = -1e30f;

template <typename T>
__device__ __forceinline__ float decay_factor(float sum) {
  if constexpr (sizeof(T) == 4) return decay_of(sum);
  return fast_exp2(sum * 1.4426950408889634f);
}

// A factor close to 1 with its rounding error: rounded the same way in every chunk, it would be a
// wrong decay.
struct Aging {
  float factor, rest;

  __device__ __forceinline__ float operator()(float state, float write) const {
    return fmaf(factor, state, fmaf(rest, state, write));
  }
};

__device__ __forceinline__ Aging aging_of(float total) {
  if (!(total > -0.25f)) return {decay_of(total), 0.0f};
  const float near = expm1f(total), factor = 1.0f + near;
  return {factor, near - (factor - 1.0f)};
}

// A sum and what it leaves out.
struct Sum {
  float high = 0.0f, low = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
  __device__ __forceinline__ float value() const { return high + low; }
};

template <typename E>
__device__ __forceinline__ void store_pair(E* target, float x, float y) {
  if constexpr (sizeof(E) == 2) *reinterpret_cast<uint32_t*>(target) = pack<E>(x, y);
  else *reinterpret_cast<float2*>(target) = float2{x, y};
}

template <typename E>
__device__ __forceinline__ float2 load_pair(const E* source) {
  if constexpr (sizeof(E) == 4) return *reinterpret_cast<const float2*>(source);
  else return {to_float(source[0]), to_float(source[1])};
}

inline constexpr int kStagedRow = kBlock + 4;  // rows lie in different banks

template <typename C>
class ChunkMemory {
 public:
  using E = typename C::E;
  static constexpr int kRows = C::kRows;
  using Keys = SharedTile<E, kRows, kSlice>;
  using Values = SharedTile<E, kRows, kValues>;
  using Scores = SharedTile<E, kRows, kRows>;

  static constexpr int bytes(int warps) {
    constexpr int kMost = kValuesAt + kMaxWarps / 4 * Values::kBytes;
    static_assert(kMost <= 99 * 1024);  // of any chip from sm_80 on
    return kValuesAt + warps / 4 * Values::kBytes;
  }

  __device__ __forceinline__ explicit ChunkMemory(unsigned char* base) : base_(base) {}

  // A slice, later times the decay since the start (q) or until the end (k) of the chunk.
  __device__ __forceinline__ Keys q() const { return Keys(base_); }
  __device__ __forceinline__ Keys k() const { return Keys(base_ + Keys::kBytes); }
  // Per channel: the rows of a level; two of them take turns.
  __device__ __forceinline__ Keys level(int index) const {
    return Keys(base_ + (2 + index % 2) * Keys::kBytes);
  }
  // In the place of a level.
  __device__ __forceinline__ Scores scores() const { return Scores(base_ + 2 * Keys::kBytes); }
  // Of 4 warps.
  __device__ __forceinline__ Values v(int part) const {
    return Values(base_ + kValuesAt + part * Values::kBytes);
  }

  // Per channel: the log-decay [rows, 64], and sums of groups of rows [groups, 64].
  __device__ __forceinline__ float* g() const { return at<float>(kDecayAt); }
  __device__ __forceinline__ float* totals() const { return at<float>(kTotalsAt); }
  // Per token, all [rows]: the log-decay; the decay at each level, since the start, until the end.
  __device__ __forceinline__ float* token_g() const { return g(); }
  __device__ __forceinline__ float* token_level(int level) const {
    return g() + (1 + level) * kRows;
  }
  __device__ __forceinline__ float* token_start() const { return token_level(kMaxLevels); }
  __device__ __forceinline__ float* token_end() const { return token_level(kMaxLevels + 1); }

  // Of the whole chunk, [64]; of the segment so far, [256].
  __device__ __forceinline__ Aging* aging() const { return at<Aging>(kAgingAt); }
  __device__ __forceinline__ Sum* segment() const { return at<Sum>(kSegmentAt); }

  // Squares of outputs, [warps, rows], and in the place of all tiles of keys 16 x 16 outputs of a
  // warp.
  __device__ __forceinline__ float* squares() const { return at<float>(kSquaresAt); }
  __device__ __forceinline__ float* staged(int warp) const {
    return at<float>(0) + warp * kBlock * kStagedRow;
  }

 private:
  static constexpr int kDecayAt = 4 * Keys::kBytes;
  static constexpr int kTotalsAt = kDecayAt + kRows * kSlice * 4;
  static constexpr int kAgingAt = kTotalsAt + kGroups * kSlice * 4;
  static constexpr int kSegmentAt = kAgingAt + kSlice * int{sizeof(Aging)};
  static constexpr int kSquaresAt = kSegmentAt + kMaxSlices * kSlice * int{sizeof(Sum)};
  static constexpr int kValuesAt = kSquaresAt + kMaxWarps * kRows * 4;
  static_assert(Scores::kBytes <= Keys::kBytes && kMaxLevels + 3 <= kSlice);
  static_assert(kMaxWarps * kBlock * kStagedRow * 4 <= kDecayAt);

  template <typename X>
  __device__ __forceinline__ X* at(int offset) const {
    return reinterpret_cast<X*>(base_ + offset);
  }

  unsigned char* base_;
};

// Where a chunk lies, and how much of it there is.
struct ChunkPlace {
  int batch, head;
  int64_t first;  // token
  int live;       // rows

  __device__ __forceinline__ int64_t offset(const Strides& strides) const {
    return batch * strides.batch + first * strides.time + head * strides.head;
  }
};

template <typename E, int kRows, int kCols>
__device__ __forceinline__ void store_run(
    const SharedTile<E, kRows, kCols>& tile, int row, int col, const float (&x)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += 2) store_pair(tile.at(row, col + i), x[i], x[i + 1]);
}

// phi of columns `first` to `first + filled` of the rows of a chunk; 0 where there are none.
template <typename T, typename Tile>
__device__ __forceinline__ void load_features(
    const Tile& tile, const void* x, const Strides& strides, const ChunkPlace& place, int first,
    int filled, int size, bool aligned, Map map) {
  constexpr int kRuns = Tile::kCols / kRun;
  const T* rows = static_cast<const T*>(x) + place.offset(strides);
  for (int i = threadIdx.x; i < Tile::kRows * kRuns; i += blockDim.x) {
    const int row = i / kRuns, col = i % kRuns * kRun;
    if (col >= filled) continue;
    float y[kRun] = {};
    if (row < place.live) {
      const Run<T> run = load_run(rows + row * strides.time, first + col, size, aligned);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        y[j] = first + col + j < size ? apply_map(map, to_float(run.x[j])) : 0.0f;
      }
    }
    store_run(tile, row, col, y);
  }
}

__device__ __forceinline__ float bounded(float g) { return g < kNothing ? kNothing : g; }

template <typename G>
__device__ __forceinline__ void load_log_decay_of(
    float* target, int rows, const LogDecay& decay, const ChunkPlace& place, int first,
    int filled, int size) {
  constexpr int kRuns = kSlice / kRun;
  const G* source = static_cast<const G*>(decay.g) + place.offset(decay.strides);
  for (int i = threadIdx.x; i < rows * kRuns; i += blockDim.x) {
    const int row = i / kRuns, col = i % kRuns * kRun;
    if (col >= filled) continue;
    Run<G> run = zero_run<G>();
    if (row < place.live) {
      run = load_run(source + row * decay.strides.time, first + col, size, decay.aligned);
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) target[row * kSlice + col + j] = bounded(to_float(run.x[j]));
  }
}

template <typename T>
__device__ __forceinline__ void load_log_decay(
    float* target, int rows, const LogDecay& decay, const ChunkPlace& place, int first,
    int filled, int size) {
  if (decay.is_float) load_log_decay_of<float>(target, rows, decay, place, first, filled, size);
  else load_log_decay_of<T>(target, rows, decay, place, first, filled, size);
}

// --- A decay per token.

// The decay of every row at every level, see linear_scores.cuh, since the start and until the end
// of the chunk, and the aging of the state. Begins with a barrier behind the loads of g.
template <typename C>
__device__ __forceinline__ void prepare_token_decay(
    const ChunkMemory<C>& memory, const LogDecay& decay, const ChunkPlace& place, bool levels) {
  using T = typename C::T;
  constexpr int kRows = C::kRows;
  for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
    float g = 0.0f;
    if (row < place.live) {
      const int64_t index = place.offset(decay.strides) + row * decay.strides.time;
      g = bounded(load_either<T>(decay.g, index, decay.is_float));
    }
    memory.token_g()[row] = g;
  }
  __syncthreads();
  auto sum = [&](int begin, int end) {
    Sum total;
    for (int row = begin; row < end; ++row) total.add(memory.token_g()[row]);
    return total.value();
  };
  for (int i = threadIdx.x; i < (kMaxLevels + 2) * kRows; i += blockDim.x) {
    const int level = i / kRows, row = i % kRows;
    if (level == kMaxLevels) {
      memory.token_start()[row] = decay_factor<T>(sum(0, row + 1));
    } else if (level > kMaxLevels) {
      memory.token_end()[row] = decay_factor<T>(sum(row + 1, kRows));
    } else if (levels && 1 << level < kRows) {
      const int half = row >> level;
      const bool is_query = half % 2 == 1;
      const float x = is_query ? sum(half << level, row + 1) : sum(row + 1, (half + 1) << level);
      memory.token_level(level)[row] = decay_factor<T>(x);
    }
  }
  if (threadIdx.x < kSlice) {
    const float total = sum(0, kRows);
    memory.aging()[threadIdx.x] = aging_of(total);
    if (threadIdx.x == 0) memory.segment()[0].add(total);
  }
}

// --- A decay per channel. A lane has two channels, and a warp one group of rows at a time.

template <typename C>
__device__ __forceinline__ float2 group_total(
    const ChunkMemory<C>& memory, int begin, int end, int lane) {
  float2 sum = {};
  for (int group = begin; group < end; ++group) {
    const float2 x = load_pair(memory.totals() + group * kSlice + 2 * lane);
    sum.x += x.x;
    sum.y += x.y;
  }
  return sum;
}

template <typename C>
__device__ __forceinline__ void add_up_groups(const ChunkMemory<C>& memory, int filled) {
  const int lane = fresh_lane(), warps = blockDim.x / 32;
  if (2 * lane >= filled) return;
  for (int group = threadIdx.x / 32; group < kGroups; group += warps) {
    float2 sum = {};
#pragma unroll
    for (int i = 0; i < C::kGroupRows; ++i) {
      const float2 g = load_pair(memory.g() + (group * C::kGroupRows + i) * kSlice + 2 * lane);
      sum.x += g.x;
      sum.y += g.y;
    }
    store_pair(memory.totals() + group * kSlice + 2 * lane, sum.x, sum.y);
  }
}

// The aging of the state, behind add_up_groups and a barrier.
template <typename C>
__device__ __forceinline__ void prepare_aging(
    const ChunkMemory<C>& memory, int slice, int filled) {
  const int channel = threadIdx.x;
  if (channel >= filled) return;
  float total = 0.0f;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) total += memory.totals()[group * kSlice + channel];
  memory.aging()[channel] = aging_of(total);
  memory.segment()[slice * kSlice + channel].add(total);
}

// target = source times the decay from the rows' run on (kForward) or up to its end. `sum` is that
// of rows of the run in other groups.
template <typename C, bool kForward, int kCount, typename Tile>
__device__ __forceinline__ void decay_rows(
    const Tile& target, const Tile& source, const float* g, int first, float2 sum, int lane) {
  using T = typename C::T;
  const int col = 2 * lane;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = first + (kForward ? i : kCount - 1 - i);
    const float2 own = load_pair(g + row * kSlice + col);
    if (kForward) {  // a query's own decay counts, a key's does not
      sum.x += own.x;
      sum.y += own.y;
    }
    const float2 x = load_pair(source.at(row, col));
    const float2 factor = {decay_factor<T>(sum.x), decay_factor<T>(sum.y)};
    store_pair(target.at(row, col), x.x * factor.x, x.y * factor.y);
    if (!kForward) {
      sum.x += own.x;
      sum.y += own.y;
    }
  }
}

// --- Either.

// q, if it is there, times the decay since the start of the chunk, and k times that until its end,
// in place.
template <typename C>
__device__ __forceinline__ void decay_slice(
    const ChunkMemory<C>& memory, bool per_channel, bool has_q, int filled) {
  const int lane = fresh_lane(), warps = blockDim.x / 32;
  if (2 * lane >= filled) return;
  constexpr int kCount = C::kGroupRows;
  for (int group = threadIdx.x / 32; group < kGroups; group += warps) {
    const int first = group * kCount;
    if (per_channel) {
      if (has_q) {
        decay_rows<C, true, kCount>(
            memory.q(), memory.q(), memory.g(), first, group_total(memory, 0, group, lane), lane);
      }
      decay_rows<C, false, kCount>(
          memory.k(), memory.k(), memory.g(), first, group_total(memory, group + 1, kGroups, lane),
          lane);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first + i;
      const float start = memory.token_start()[row], end = memory.token_end()[row];
      const float2 k = load_pair(memory.k().at(row, 2 * lane));
      store_pair(memory.k().at(row, 2 * lane), k.x * end, k.y * end);
      if (!has_q) continue;
      const float2 q = load_pair(memory.q().at(row, 2 * lane));
      store_pair(memory.q().at(row, 2 * lane), q.x * start, q.y * start);
    }
  }
}

}  // namespace attnvariants
