// Tiles of matrices that carry their shape: in shared memory, and in the registers of a warp for
// products by the tensor cores.
//
// A warp owns 16 rows of a product. In half precision a step of it takes 16 columns of the left
// operand, in fp32 8. There every number is split into two TF32 numbers, and of their four products
// all but the smallest are added up outside of the tensor cores, which cut off where fp32 rounds:
// sums are about as good as those of fp32 multiply-adds.

#pragma once

#include "shared_tiles.cuh"

namespace attnvariants {

template <typename T>
inline constexpr int kStep = sizeof(T) == 4 ? 8 : 16;  // columns of a left operand at a time

// The lane, as if it were another one every time: what is computed from it is computed again where
// it is used. A compiler would keep all addresses of a long loop in registers, and run out of them.
__device__ __forceinline__ int fresh_lane() {
  int lane = lane_index();
  asm volatile("" : "+r"(lane));
  return lane;
}

// Element e of 4 of a lane's part of a 16 x 8 block of accumulators: its row and its column.
__device__ __forceinline__ int row_of(int e, int lane = lane_index()) {
  return lane / 4 + e / 2 * 8;
}
__device__ __forceinline__ int col_of(int e, int lane = lane_index()) {
  return lane % 4 * 2 + e % 2;
}

// Operands in registers. In fp32 a step's columns are taken in the order 0 2 4 6 1 3 5 7, by the left
// and the right operand alike: so a lane's accumulators can be a left operand as they are, and it
// finds its columns side by side.

// 16 x kStep of a left operand.
template <typename T>
struct Left {
  uint32_t x[4];
};

// kStep x 16 of a right operand, as two parts of 8 columns.
template <typename T>
struct Right {
  uint32_t x[2][2];
};

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

// Rows `row` to `row + 16` and columns from `col` on.
template <typename T, int kRows, int kCols, bool kPadded>
__device__ __forceinline__ Left<T> load_left(
    const SharedTile<T, kRows, kCols, kPadded>& tile, int row, int col,
    int lane = lane_index()) {
  Left<T> a;
  if constexpr (sizeof(T) == 2) {
    load_matrices(a.x, tile.at(row, col, lane % 16, lane / 16 * 8));
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* place = tile.at(row + 8 * r, col, row_of(0, lane), col_of(0, lane));
      const float2 pair = *reinterpret_cast<const float2*>(place);
      a.x[r] = bits_of(pair.x);
      a.x[r + 2] = bits_of(pair.y);
    }
  }
  return a;
}

// The same of the transposed tile: its columns `col` to `col + 16`, and rows from `row` on.
template <typename T, int kRows, int kCols, bool kPadded>
__device__ __forceinline__ Left<T> load_left_transposed(
    const SharedTile<T, kRows, kCols, kPadded>& tile, int row, int col,
    int lane = lane_index()) {
  Left<T> a;
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(
        a.x, tile.at(row, col, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a.x[i] = bits_of(*tile.at(row, col + i % 2 * 8, col_of(i / 2, lane), row_of(0, lane)));
    }
  }
  return a;
}

// Rows from `row` on and columns `col` to `col + 16`.
template <typename T, int kRows, int kCols, bool kPadded>
__device__ __forceinline__ Right<T> load_right(
    const SharedTile<T, kRows, kCols, kPadded>& tile, int row, int col,
    int lane = lane_index()) {
  Right<T> b;
  if constexpr (sizeof(T) == 2) {
    uint32_t x[4];
    load_matrices_transposed(x, tile.at(row, col, lane % 16, lane / 16 * 8));
    b = {{{x[0], x[1]}, {x[2], x[3]}}};
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b.x[n][i] = bits_of(*tile.at(row, col + 8 * n, col_of(i, lane), row_of(0, lane)));
      }
    }
  }
  return b;
}

// The same of the transposed tile: its rows `row` to `row + 16`, and columns from `col` on.
template <typename T, int kRows, int kCols, bool kPadded>
__device__ __forceinline__ Right<T> load_right_transposed(
    const SharedTile<T, kRows, kCols, kPadded>& tile, int row, int col,
    int lane = lane_index()) {
  Right<T> b;
  if constexpr (sizeof(T) == 2) {
    uint32_t x[4];
    load_matrices(x, tile.at(row, col, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
    b = {{{x[0], x[1]}, {x[2], x[3]}}};
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const T* place = tile.at(row + 8 * n, col, row_of(0, lane), col_of(0, lane));
      const float2 pair = *reinterpret_cast<const float2*>(place);
      b.x[n][0] = bits_of(pair.x);
      b.x[n][1] = bits_of(pair.y);
    }
  }
  return b;
}

template <int kCount>
struct Split {
  uint32_t high[kCount], low[kCount];

  __device__ __forceinline__ explicit Split(const uint32_t (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = round_to_tf32(__uint_as_float(x[i]));
      low[i] = round_to_tf32(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
  }
};

// acc += a b for 16 columns: two 16 x 8 blocks of accumulators.
template <typename T>
__device__ __forceinline__ void multiply_step(
    float (&first)[4], float (&second)[4], const Left<T>& a, const Right<T>& b) {
  if constexpr (sizeof(T) == 2) {
    mma<T>(first, a.x, b.x[0]);
    mma<T>(second, a.x, b.x[1]);
  } else {
    const Split<4> left(a.x);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Split<2> right(b.x[n]);
      float large[4] = {}, small[4] = {};
      mma_tf32(small, left.low, right.high);
      mma_tf32(small, left.high, right.low);
      mma_tf32(large, left.high, right.high);
      float(&acc)[4] = n == 0 ? first : second;
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[e] = acc[e] + small[e] + large[e];
    }
  }
}

// A warp's 16 rows of a left operand, a step of columns at a time: kept in registers, or read from
// shared memory whenever they are needed.
template <typename T, int kCols_>
struct RegisterRows {
  static constexpr int kCols = kCols_, kUnroll = kCols;  // no index is known at run time only
  Left<T> x[kCols / kStep<T>];

  template <int kRows, bool kPadded>
  __device__ __forceinline__ void load(const SharedTile<T, kRows, kCols, kPadded>& tile, int row) {
#pragma unroll
    for (int i = 0; i < kCols / kStep<T>; ++i) x[i] = load_left(tile, row, i * kStep<T>);
  }
  __device__ __forceinline__ Left<T> step(int i) const { return x[i]; }
};

template <typename Tile>
struct SharedRows;
template <typename T, int kRows, int kCols_, bool kPadded>
struct SharedRows<SharedTile<T, kRows, kCols_, kPadded>> {
  static constexpr int kCols = kCols_, kUnroll = sizeof(T) == 4 ? 2 : 4;
  SharedTile<T, kRows, kCols, kPadded> tile;
  int row;

  __device__ __forceinline__ void load(const SharedTile<T, kRows, kCols, kPadded>& from, int first) {
    tile = from;
    row = first;
  }
  __device__ __forceinline__ Left<T> step(int i) const {
    return load_left(tile, row, i * kStep<T>);
  }
};

// --- Products.

// A warp's 16 x kCols sums in fp32. Element x[j][e] is in row row_of(e) and column 8 j + col_of(e).
template <int kCols_>
struct Accumulator {
  static constexpr int kCols = kCols_;
  float x[kCols / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[j][e] = 0.0f;
    }
  }

  // As a left operand, rounded to T.
  template <typename T>
  __device__ __forceinline__ RegisterRows<T, kCols> as_rows() const {
    RegisterRows<T, kCols> rows;
#pragma unroll
    for (int i = 0; i < kCols / kStep<T>; ++i) {
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float(&pair)[4] = x[2 * i + r / 2];
          rows.x[i].x[r] = pack<T>(pair[r % 2 * 2], pair[r % 2 * 2 + 1]);
        }
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r) rows.x[i].x[r] = bits_of(x[i][r % 2 * 2 + r / 2]);
      }
    }
    return rows;
  }

  // The transpose of a step of its columns, as a right operand rounded to T.
  template <typename T>
  __device__ __forceinline__ Right<T> as_right(int step) const {
    Right<T> b;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (sizeof(T) == 2) {
          const float(&block)[4] = x[2 * step + i];
          b.x[n][i] = pack<T>(block[2 * n], block[2 * n + 1]);
        } else {
          b.x[n][i] = bits_of(x[step][2 * n + i]);
        }
      }
    }
    return b;
  }

  // Writes the 16 rows from `row` on, rounded to T.
  template <typename T, int kRows, bool kPadded>
  __device__ __forceinline__ void write(const SharedTile<T, kRows, kCols, kPadded>& tile, int row) const {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        T* target = tile.at(row + row_of(e), 8 * j + col_of(e));
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(target) = pack<T>(x[j][e], x[j][e + 1]);
        } else {
          *reinterpret_cast<float2*>(target) = {x[j][e], x[j][e + 1]};
        }
      }
    }
  }
};

// Of `count` steps or columns, those between two looks at where the operands end: a quarter, or an
// eighth in fp32, if they can be shared out like that. The branches also keep the compiler from
// loading too far ahead, which costs registers.
template <typename T>
__host__ __device__ constexpr int part_of(int count) {
  for (int parts = sizeof(T) == 4 ? 8 : 4; parts > 1; --parts) {
    if (count % parts == 0) return count / parts;
  }
  return count;
}

// acc += a b^T with a [16, K] and b [N, K], for kBlocks blocks of 16 rows that share what is read of
// b. Only the first `depth` columns of both are looked at, rounded up as part_of has it: those
// beyond must then be 0.
template <int kBlocks, typename T, int kN, int kK, bool kPadded, typename Rows>
__device__ __forceinline__ void multiply_transposed(
    Accumulator<kN>* acc, const Rows* a, const SharedTile<T, kN, kK, kPadded>& b, int depth) {
  static_assert(Rows::kCols == kK && kN % 16 == 0);
  constexpr int kSteps = kK / kStep<T>, kPart = part_of<T>(kSteps);
#pragma unroll Rows::kUnroll
  for (int i = 0; i < kSteps; ++i) {
    if (i > 0 && i % kPart == 0 && i * kStep<T> >= depth) break;
    Left<T> left[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) left[m] = a[m].step(i);
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      const Right<T> right = load_right_transposed(b, 16 * n, i * kStep<T>);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        multiply_step<T>(acc[m].x[2 * n], acc[m].x[2 * n + 1], left[m], right);
      }
    }
  }
}

template <typename T, int kN, int kK, bool kPadded, typename Rows>
__device__ __forceinline__ void multiply_transposed(
    Accumulator<kN>& acc, const Rows& a, const SharedTile<T, kN, kK, kPadded>& b, int depth = kK) {
  multiply_transposed<1>(&acc, &a, b, depth);
}

// acc += a b with a [16, K] and b [K, N], for kBlocks blocks of 16 rows. Only the first `cols`
// columns of b are looked at, rounded up as part_of has it.
template <int kBlocks, typename T, int kK, int kN, bool kPadded, typename Rows>
__device__ __forceinline__ void multiply(
    Accumulator<kN>* acc, const Rows* a, const SharedTile<T, kK, kN, kPadded>& b, int cols) {
  static_assert(Rows::kCols == kK && kN % 16 == 0);
  constexpr int kCols = kN / 16, kPart = part_of<T>(kCols);
#pragma unroll
  for (int part = 0; part < kCols; part += kPart) {
    if (part > 0 && part * 16 >= cols) break;
#pragma unroll
    for (int i = 0; i < kK / kStep<T>; ++i) {
      Left<T> left[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) left[m] = a[m].step(i);
#pragma unroll
      for (int n = part; n < part + kPart; ++n) {
        const Right<T> right = load_right(b, i * kStep<T>, 16 * n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply_step<T>(acc[m].x[2 * n], acc[m].x[2 * n + 1], left[m], right);
        }
      }
    }
  }
}

template <typename T, int kK, int kN, bool kPadded, typename Rows>
__device__ __forceinline__ void multiply(
    Accumulator<kN>& acc, const Rows& a, const SharedTile<T, kK, kN, kPadded>& b, int cols = kN) {
  multiply<1>(&acc, &a, b, cols);
}

// Over the four lanes that share a row of accumulators.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

}  // namespace attnvariants
