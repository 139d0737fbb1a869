// Scores inside a chunk, A_ij = q_i . (exp(G_i - G_j) k_j) for i >= j, exact for every decay.
//
// A query i and an earlier key j lie in the two halves of exactly one block of 2 S rows, for one
// S = 1, 2, 4, ...: that is their level. With b the last row of the lower half,
//
//   exp(G_i - G_j) = exp(G_i - G_b) exp(G_b - G_j),
//
// and both factors are at most 1. A row is either a query or a key of a level, so that one tile
// holds the decayed queries and keys of all blocks. Scores are in 16 x 16 blocks, shared out among
// the warps. Below the diagonal a block belongs to one level; one on the diagonal to the first four
// and to the pairs i = j.

#pragma once

#include "linear_chunk.cuh"

namespace attnvariants {

inline constexpr int kBlockLevels = 4;  // those inside a block

// Block `index` of the lower triangle, those on the diagonal first.
template <int kBlocks>
__device__ __forceinline__ void locate_block(int index, int& row, int& col) {
  row = col = index;
  if (index < kBlocks) return;
  col = index - kBlocks;
  for (row = 1; col >= row; ++row) col -= row;
}

// acc += a b^T of 16 rows each, over the first `depth` columns.
template <typename C, typename Tile>
__device__ __forceinline__ void multiply_rows(
    Accumulator<kBlock>& acc, const Tile& a, int a_row, const Tile& b, int b_row, int depth) {
  using T = typename C::T;
  const int lane = fresh_lane();
#pragma unroll (C::kUnroll)
  for (int i = 0; i < depth; i += kBlock) {
    multiply_block<T>(
        acc, left_block<T>(a, a_row, i, lane), right_block_transposed<T>(b, b_row, i, lane));
  }
}

template <typename C>
struct ChunkScores {
  static constexpr int kBlocks = C::kBlocks;
  static constexpr int kCount = kBlocks * (kBlocks + 1) / 2;
  static constexpr int kOwn = (kCount + 3) / 4;  // of 4 warps
  using Tile = typename ChunkMemory<C>::Keys;

  Accumulator<kBlock> acc[kOwn];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) acc[n].clear();
  }

  // A slice's part without a decay.
  __device__ __forceinline__ void add(const ChunkMemory<C>& memory, int live, int depth) {
    add_products(memory.q(), memory.k(), live, depth, [](int, int) { return true; },
                 [](int, int) { return true; });
  }

  // A slice's part with a decay per channel. Called by all threads, behind add_up_groups and a
  // barrier.
  __device__ __forceinline__ void add_decayed(
      const ChunkMemory<C>& memory, int live, int depth) {
    add_products(memory.q(), memory.k(), live, depth, [](int row, int col) { return row == col; },
                 [](int i, int j) { return i == j; });
    // Where 1 << level >= live, no query has a key so far behind.
#pragma unroll 1
    for (int level = 0; 1 << level < live; ++level) {
      const Tile rows = memory.level(level);
      write_level(memory, rows, level, depth);
      __syncthreads();  // the tile of the level before is then read by all, and written next
      add_products(
          rows, rows, live, depth,
          [level](int row, int col) {
            return level < kBlockLevels ? row == col : (row ^ col) >> (level - kBlockLevels) == 1;
          },
          [level](int i, int j) { return (i ^ j) >> level == 1; });
    }
  }

  // With a decay per token, which the products lack so far.
  __device__ __forceinline__ void decay_tokens(const ChunkMemory<C>& memory, int live) {
    const int lane = fresh_lane();
    for_own_blocks(live, [&](Accumulator<kBlock>& acc, int row, int col) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row * kBlock + row_of(e, lane);
          const int j = col * kBlock + 8 * n + col_of(e, lane);
          if (i <= j) continue;
          const float* level = memory.token_level(31 - __clz(i ^ j));
          acc.x[n][e] *= level[i] * level[j];
        }
      }
    });
  }

  // Leaves the scores in shared memory, 0 above the diagonal, for a product with the values.
  __device__ __forceinline__ void write(const ChunkMemory<C>& memory, int live) {
    const int lane = fresh_lane();
    for_own_blocks(live, [&](Accumulator<kBlock>& acc, int row, int col) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int i = row * kBlock + row_of(e, lane);
          const int j = col * kBlock + 8 * n + col_of(e, lane);
          store_pair(memory.scores().at(i, j), i >= j ? acc.x[n][e] : 0.0f,
                     i >= j + 1 ? acc.x[n][e + 1] : 0.0f);
        }
      }
    });
  }

 private:
  // Block n of this warp, and whether there is one with rows below `live`.
  static __device__ __forceinline__ bool locate_own(int n, int live, int& row, int& col) {
    const int index = threadIdx.x / 32 + n * (blockDim.x / 32);
    if (index >= kCount) return false;
    locate_block<kBlocks>(index, row, col);
    return row * kBlock < live;
  }

  // Calls f(acc, row, col) for this warp's blocks.
  template <typename F>
  __device__ __forceinline__ void for_own_blocks(int live, F f) {
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      int row, col;
      if (locate_own(n, live, row, col)) f(acc[n], row, col);
    }
  }

  // acc += a b^T for the blocks and, in blocks on the diagonal, the pairs of rows that are wanted.
  template <typename Blocks, typename Pairs>
  __device__ __forceinline__ void add_products(
      const Tile& a, const Tile& b, int live, int depth, Blocks wants_block, Pairs wants_pair) {
#pragma unroll 1
    for (int n = 0; n < kOwn; ++n) {
      int row, col;
      if (!locate_own(n, live, row, col) || !wants_block(row, col)) continue;
      Accumulator<kBlock> products;
      products.clear();
      multiply_rows<C>(products, a, row * kBlock, b, col * kBlock, depth);
      const int lane = fresh_lane();
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        if (m != n) continue;  // which of the registers
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int i = row_of(e % 4, lane), j = e / 4 * 8 + col_of(e % 4, lane);
          if (row != col || wants_pair(i, j)) acc[m].x[e / 4][e % 4] += products.x[e / 4][e % 4];
        }
      }
    }
  }

  // The rows of a level: q exp(G_i - G_b) in upper halves, k exp(G_b - G_j) in lower ones.
  static __device__ __forceinline__ void write_level(
      const ChunkMemory<C>& memory, const Tile& target, int level, int filled) {
    constexpr int kRows = C::kGroupRows;
    const int lane = fresh_lane();
    if (2 * lane >= filled) return;
    for (int group = threadIdx.x / 32; group < kGroups; group += blockDim.x / 32) {
      if (level == 0) write_halves<1>(memory, target, group, lane);
      if (level == 1) write_halves<2>(memory, target, group, lane);
      if (kRows > 4 && level == 2) write_halves<4>(memory, target, group, lane);
      if (1 << level < kRows) continue;
      const int half = (group * kRows) >> level, groups = (1 << level) / kRows;
      if (half % 2 == 1) {
        const float2 sum = group_total(memory, half * groups, group, lane);
        decay_rows<C, true, kRows>(target, memory.q(), memory.g(), group * kRows, sum, lane);
      } else {
        const float2 sum = group_total(memory, group + 1, (half + 1) * groups, lane);
        decay_rows<C, false, kRows>(target, memory.k(), memory.g(), group * kRows, sum, lane);
      }
    }
  }

  // Of halves that are shorter than a group of rows.
  template <int kHalf>
  static __device__ __forceinline__ void write_halves(
      const ChunkMemory<C>& memory, const Tile& target, int group, int lane) {
    constexpr int kRows = C::kGroupRows;
#pragma unroll
    for (int base = 0; base < kRows; base += 2 * kHalf) {
      const int row = group * kRows + base;
      decay_rows<C, false, kHalf>(target, memory.k(), memory.g(), row, {}, lane);
      decay_rows<C, true, kHalf>(target, memory.q(), memory.g(), row + kHalf, {}, lane);
    }
  }
};

}  // namespace attnvariants
