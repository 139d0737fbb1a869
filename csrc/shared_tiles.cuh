// Tiles of matrices in shared memory that carry their shape, and their way from and to global memory.

#pragma once

#include "elements.cuh"
#include "tensor_core.cuh"

namespace attnvariants {

template <typename T>
inline constexpr int kChunk = 16 / sizeof(T);  // elements of 16 bytes

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// A row-major matrix of kRows x kCols elements at a multiple of 128 bytes, in which 8 rows of the
// same columns lie in different banks: by a swizzle of the chunks of 16 bytes, or by a chunk between
// rows. The latter takes more memory and, where operands are not read by ldmatrix, fewer addresses.
template <typename T, int kRows_, int kCols_, bool kPadded_ = sizeof(T) == 4>
struct SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr bool kPadded = kPadded_;
  static constexpr int kPitch = kCols + (kPadded ? kChunk<T> : 0);
  static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kCols / kChunk<T>;  // per row
  static_assert(!kPadded || kChunks % 2 == 0);
  // Chunks of a row that are permuted among each other; 8 / kPeriod rows have the same permutation.
  static constexpr int kPeriod =
      kPadded ? 1 : (kChunks % 8 == 0 ? 8 : (kChunks % 4 == 0 ? 4 : (kChunks % 2 == 0 ? 2 : 1)));
  static_assert(kCols % kChunk<T> == 0);

  T* data;

  SharedTile() = default;
  __device__ __forceinline__ explicit SharedTile(void* memory) : data(static_cast<T*>(memory)) {}

  __device__ __forceinline__ T* at(int row, int col) const {
    const int chunk = (col / kChunk<T>) ^ swizzle(row);
    return data + row * kPitch + chunk * kChunk<T> + col % kChunk<T>;
  }

  // The same of row + lane_row and col + lane_col, where `row` is a multiple of 8, `col` one of two
  // chunks, and lane_col lies within two. What is left to compute where the former are constants is
  // the same for many of them.
  __device__ __forceinline__ T* at(int row, int col, int lane_row, int lane_col) const {
    const int chunk = col / kChunk<T>, permuted = chunk % kPeriod;
    const int lane_chunk = (lane_col / kChunk<T>) ^ swizzle(lane_row) ^ permuted;
    return data + (lane_row * kPitch + lane_chunk * kChunk<T> + lane_col % kChunk<T>) +
           (row * kPitch + (chunk - permuted) * kChunk<T>);
  }

  static __device__ __forceinline__ int swizzle(int row) {
    return row / (8 / kPeriod) % kPeriod;
  }
};

// Rows of a matrix in global memory, `stride` elements apart.
template <typename T>
struct GlobalRows {
  T* data;
  int64_t stride;
  int rows, cols;
  bool aligned;  // see load_run
};

// Starts to load rows `first` to `first + kRows`, by all threads of the block: asynchronously
// where they are aligned. What lies outside of the matrix is 0, in the columns below `filled`; the
// others are left alone. Ends no group of copies.
template <int kThreads, typename T, int kRows, int kCols, bool kPadded>
__device__ __forceinline__ void load_rows(
    const SharedTile<T, kRows, kCols, kPadded>& tile, const GlobalRows<const T>& from, int first,
    int filled = kCols) {
  constexpr int kChunks = SharedTile<T, kRows, kCols, kPadded>::kChunks;
  constexpr int kFit = kThreads / kChunks;
  constexpr int kAtOnce = kFit > 8 ? kFit / 8 * 8 : kFit;  // rows; 8 have the same swizzle again
  static_assert(kAtOnce > 0);
  const int own_row = static_cast<int>(threadIdx.x) / kChunks;
  const int col = static_cast<int>(threadIdx.x) % kChunks * kChunk<T>;
  if ((kAtOnce * kChunks < kThreads && own_row >= kAtOnce) || col >= filled) return;
  const T* source = from.data + (first + own_row) * from.stride + col;
  const int64_t next = kAtOnce * from.stride;
  T* target = tile.at(own_row, col);
  auto target_of = [&](int row) {
    return kPadded || kAtOnce % 8 == 0 ? target + row * tile.kPitch : tile.at(own_row + row, col);
  };
  if (from.aligned) {
    const unsigned rows = col < from.cols ? from.rows : 0;
#pragma unroll
    for (int row = 0; row < kRows; row += kAtOnce, source += next) {
      if (kRows % kAtOnce != 0 && own_row + row >= kRows) break;
      copy_async(target_of(row), source, static_cast<unsigned>(first + own_row + row) < rows);
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < kRows; row += kAtOnce, source += next) {
      if (own_row + row >= kRows) break;
      const int index = first + own_row + row;
      const int live = index >= 0 && index < from.rows ? from.cols - col : 0;
      T* elements = target_of(row);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        elements[i] = i < live ? source[i] : from_float<T>(0.0f);
      }
    }
  }
}

}  // namespace attnvariants
