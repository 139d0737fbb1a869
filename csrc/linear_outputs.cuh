// Outputs of linear attention: those of a chunk, and the norm over more than a block holds.

#pragma once

#include "linear_chunk.cuh"
#include "linear_epilogue.cuh"

namespace attnvariants {

// The outputs of a chunk's rows in a warp's 16 columns.
template <typename C>
struct ChunkOutputs {
  static constexpr int kBlocks = C::kBlocks;
  using T = typename C::T;
  Accumulator<kBlock> x[kBlocks];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) x[m].clear();
  }

  // Adds q S over a slice of the keys.
  __device__ __forceinline__ void add_state(
      const ChunkMemory<C>& memory, const Accumulator<kSlice>& state, int live, int depth) {
    const int lane = fresh_lane();
#pragma unroll
    for (int i = 0; i < kSlice / kBlock; ++i) {
      if (i * kBlock >= depth) break;
      const RightBlock<T> right = right_block_of<T>(state, i);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (m * kBlock >= live) continue;
        multiply_block<T>(x[m], left_block<T>(memory.q(), m * kBlock, i * kBlock, lane), right);
      }
    }
  }

  // Adds A v.
  template <typename Values>
  __device__ __forceinline__ void add_values(
      const ChunkMemory<C>& memory, const Values& v, int col, int live) {
    const int lane = fresh_lane();
#pragma unroll 1
    for (int i = 0; i * kBlock < live; ++i) {
      const RightBlock<T> right = right_block<T>(v, i * kBlock, col, lane);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (m < i || m * kBlock >= live) continue;
        multiply_block<T>(
            x[m], left_block<T>(memory.scores(), m * kBlock, i * kBlock, lane), right);
      }
    }
  }

  // Norm, weight and gate, and to memory; `tile` is of the values, `col` the warp's first column.
  // All threads of the block call it.
  __device__ __forceinline__ void finish(
      const LinearForward& p, const ChunkMemory<C>& memory, const ChunkPlace& place, int tile,
      int col) {
    const int warp = threadIdx.x / 32, lane = fresh_lane();
    const bool normed = p.epilogue.norm != Norm::kNone;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& o = x[i / 2].x[j / 2][i % 2 * 2 + j % 2];
        o *= p.scale;
        squares += o * o;
      }
      if (!normed) continue;
      squares = row_sum(squares);
      if (lane % 4 == 0) {
        memory.squares()[warp * C::kRows + i / 2 * kBlock + row_of(i % 2 * 2, lane)] = squares;
      }
    }
    __syncthreads();  // also: nobody needs q, k and the scores any more
    float* const staged = memory.staged(warp);
#pragma unroll 1
    for (int n = 0; n * kBlock < place.live && col < p.value_dim; ++n) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (m != n) continue;  // which of the registers
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          store_pair(staged + row_of(e % 4, lane) * kStagedRow + e / 4 * 8 + col_of(0, lane),
                     x[m].x[e / 4][e % 4], x[m].x[e / 4][e % 4 + 1]);
        }
      }
      __syncwarp();
      finish_run(p, memory, place, tile, col, n, lane);
      __syncwarp();
    }
  }

 private:
  // 8 neighbouring outputs of one row for every lane, from where they are staged.
  static __device__ __forceinline__ void finish_run(
      const LinearForward& p, const ChunkMemory<C>& memory, const ChunkPlace& place, int tile,
      int col, int block, int lane) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int block_row = lane / 2, row = block * kBlock + block_row;
    const int first = lane % 2 * kRun;
    if (row >= place.live || col + first >= p.value_dim) return;
    const int token = static_cast<int>(place.first) + row;
    const int64_t out_row =
        (place.batch * static_cast<int64_t>(p.length) + token) * p.heads + place.head;
    float factor = 1.0f;
    if (p.epilogue.norm != Norm::kNone) {
      float squares = 0.0f;
      for (int w = 0; w < warps; ++w) squares += memory.squares()[w * C::kRows + row];
      if (!p.norm_later) {
        factor = rsqrtf(squares / p.value_dim + p.epilogue.eps);
      } else {
        // Rows are left divided by their own root mean square, which fits every dtype; rows of
        // zeros as they are.
        factor = squares > 0.0f ? rsqrtf(squares / (kBlock * warps)) : 1.0f;
        if (warp == 0 && first == 0) p.squares[out_row * p.value_tiles + tile] = squares;
      }
    }
    const float* staged = memory.staged(warp) + block_row * kStagedRow + first;
    Run<T> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float o = staged[i] * factor;
      const int own = col + first + i;
      if (!p.norm_later && own < p.value_dim) {
        o = weigh_and_gate<T>(p.epilogue, place.batch, token, place.head, own, o);
      }
      run.x[i] = from_float<T>(o);
    }
    store_run(static_cast<T*>(p.out) + out_row * p.value_dim, col + first, p.value_dim,
              p.value_dim % kRun == 0, run);
  }
};

// The norm of outputs that lie in several blocks, with weight and gate. A warp has one token and
// head, and a lane 8 of its columns.
template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps)
linear_norm_kernel(const __grid_constant__ LinearForward p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.length * p.heads;
  const int64_t row = int64_t{blockIdx.x} * kMaxWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t token = row / p.heads;
  const int head = static_cast<int>(row % p.heads), lane = lane_index();
  const bool model = p.epilogue.norm == Norm::kModel;
  const int heads = model ? p.heads : 1;
  const float* squares = p.squares + (model ? token * p.heads : row) * p.value_tiles;
  float sum = 0.0f;
  for (int i = lane; i < heads * p.value_tiles; i += 32) sum += squares[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  const float rstd = rsqrtf(sum / (static_cast<float>(heads) * p.value_dim) + p.epilogue.eps);

  const int col = lane * kRun, width = p.warps * kBlock;
  if (col >= p.value_dim) return;
  const float factor = rstd * sqrtf(p.squares[row * p.value_tiles + col / width] / width);
  T* out = static_cast<T*>(p.out) + row * p.value_dim;
  const bool aligned = p.value_dim % kRun == 0;
  Run<T> run = load_run(out, col, p.value_dim, aligned);
  const int b = static_cast<int>(token / p.length), t = static_cast<int>(token % p.length);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (col + i >= p.value_dim) break;
    const float o = to_float(run.x[i]) * factor;
    run.x[i] = from_float<T>(weigh_and_gate<T>(p.epilogue, b, t, head, col + i, o));
  }
  store_run(out, col, p.value_dim, aligned, run);
}

}  // namespace attnvariants
