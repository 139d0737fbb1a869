// Products of 16 x 16 blocks for linear attention, in a precision that goes with its inputs.
//
// Scores and states are operands as well, and they have no bounds. bf16 inputs are multiplied as
// bf16. float16 inputs are multiplied as TF32, which has as many digits and does not overflow where
// float16 would. A number of float32 inputs is the sum of three of bf16, exactly; of the products
// of two, those below the last place are left out. Tensor cores cut off their sums: so the large
// and the small products of a block are added up apart, and joined outside. The result is about as
// good as that of fp32 multiply-adds.

#pragma once

#include "tiles.cuh"

namespace attnvariants {

inline constexpr int kBlock = 16;

template <typename T>
struct Multiplied {
  using Element = float;
};
template <>
struct Multiplied<__nv_bfloat16> {
  using Element = __nv_bfloat16;
};
template <typename T>
using Element = typename Multiplied<T>::Element;  // of tiles in shared memory

// [16, 16] of a left and of a right operand, a step after the other.
template <typename T>
struct LeftBlock {
  static constexpr int kSteps = kBlock / kStep<Element<T>>;
  Left<Element<T>> x[kSteps];
};
template <typename T>
struct RightBlock {
  static constexpr int kSteps = kBlock / kStep<Element<T>>;
  Right<Element<T>> x[kSteps];
};

template <typename T, typename Tile>
__device__ __forceinline__ LeftBlock<T> left_block(const Tile& tile, int row, int col, int lane) {
  LeftBlock<T> a;
#pragma unroll
  for (int i = 0; i < a.kSteps; ++i) {
    a.x[i] = load_left(tile, row, col + i * kStep<Element<T>>, lane);
  }
  return a;
}

// Of the transposed tile: its columns from `col` on, and the sum is over rows from `row` on.
template <typename T, typename Tile>
__device__ __forceinline__ LeftBlock<T> left_block_transposed(
    const Tile& tile, int row, int col, int lane) {
  LeftBlock<T> a;
#pragma unroll
  for (int i = 0; i < a.kSteps; ++i) {
    a.x[i] = load_left_transposed(tile, row + i * kStep<Element<T>>, col, lane);
  }
  return a;
}

template <typename T, typename Tile>
__device__ __forceinline__ RightBlock<T> right_block(
    const Tile& tile, int row, int col, int lane) {
  RightBlock<T> b;
#pragma unroll
  for (int i = 0; i < b.kSteps; ++i) {
    b.x[i] = load_right(tile, row + i * kStep<Element<T>>, col, lane);
  }
  return b;
}

template <typename T, typename Tile>
__device__ __forceinline__ RightBlock<T> right_block_transposed(
    const Tile& tile, int row, int col, int lane) {
  RightBlock<T> b;
#pragma unroll
  for (int i = 0; i < b.kSteps; ++i) {
    b.x[i] = load_right_transposed(tile, row, col + i * kStep<Element<T>>, lane);
  }
  return b;
}

// Block `index` of the columns of sums, transposed.
template <typename T, int kCols>
__device__ __forceinline__ RightBlock<T> right_block_of(
    const Accumulator<kCols>& sums, int index) {
  RightBlock<T> b;
#pragma unroll
  for (int i = 0; i < b.kSteps; ++i) {
    b.x[i] = sums.template as_right<Element<T>>(index * b.kSteps + i);
  }
  return b;
}

// Pairs of float32 numbers as three pairs of bf16, whose sum they are.
template <int kCount>
struct Thirds {
  uint32_t high[kCount], middle[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, uint32_t first, uint32_t second) {
    float x = __uint_as_float(first), y = __uint_as_float(second);
    high[i] = take(x, y);
    middle[i] = take(x, y);
    low[i] = take(x, y);
  }

 private:
  // Rounds a pair, and leaves what that loses.
  static __device__ __forceinline__ uint32_t take(float& x, float& y) {
    const uint32_t bits = pack<__nv_bfloat16>(x, y);
    x -= __uint_as_float(bits << 16);
    y -= __uint_as_float(bits & 0xffff0000u);
    return bits;
  }
};

__device__ __forceinline__ void multiply_thirds(
    float (&acc)[4], const Thirds<4>& a, const Thirds<2>& b) {
  using E = __nv_bfloat16;
  float large[4] = {}, small[4] = {};
  mma<E>(small, a.low, b.high);
  mma<E>(small, a.high, b.low);
  mma<E>(small, a.middle, b.middle);
  mma<E>(small, a.middle, b.high);
  mma<E>(small, a.high, b.middle);
  mma<E>(large, a.high, b.high);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += large[e] + small[e];
}

// acc += a b.
template <typename T>
__device__ __forceinline__ void multiply_block(
    Accumulator<kBlock>& acc, const LeftBlock<T>& a, const RightBlock<T>& b) {
  if constexpr (sizeof(Element<T>) == 2) {
    multiply_step<Element<T>>(acc.x[0], acc.x[1], a.x[0], b.x[0]);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < a.kSteps; ++i) {
      uint32_t left[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) left[r] = round_to_tf32(__uint_as_float(a.x[i].x[r]));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t right[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) right[r] = round_to_tf32(__uint_as_float(b.x[i].x[n][r]));
        mma_tf32(acc.x[n], left, right);
      }
    }
  } else {
    // A step of fp32 has neighbouring columns where one of bf16 has pairs of them.
    Thirds<4> left;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      left.set(r, a.x[r / 2].x[r % 2], a.x[r / 2].x[r % 2 + 2]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      Thirds<2> right;
#pragma unroll
      for (int r = 0; r < 2; ++r) right.set(r, b.x[r].x[n][0], b.x[r].x[n][1]);
      multiply_thirds(acc.x[n], left, right);
    }
  }
}

}  // namespace attnvariants
