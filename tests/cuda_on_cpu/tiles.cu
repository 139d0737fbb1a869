// Kernels that use csrc/tiles.cuh and csrc/tensor_core.cuh, for tests/test_tiles_cuda.py.

#include "../../csrc/tiles.cuh"

extern __shared__ unsigned char dynamic_shared[];

namespace attnvariants {
namespace {

template <typename T>
__global__ void product_of_fragments(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t left[4], right[2];
  float acc[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * threadIdx.x + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * threadIdx.x + i];
  for (int i = 0; i < 4; ++i) acc[i] = c[4 * threadIdx.x + i];
  if constexpr (sizeof(T) == 4) mma_tf32(acc, left, right);
  else
    mma<T>(acc, left, right);
  for (int i = 0; i < 4; ++i) c[4 * threadIdx.x + i] = acc[i];
}

// x [32, 8] of 16-bit numbers; four registers per lane.
__global__ void matrices(const uint4* x, uint32_t* out, bool transposed) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  uint32_t found[4];
  if (transposed) load_matrices_transposed(found, shared + threadIdx.x);
  else
    load_matrices(found, shared + threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = found[i];
}

// Three groups of one copy each, of which the oldest two have arrived.
__global__ void copies(const uint4* x, uint4* out) {
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared) + 3 * threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    shared[i] = {1, 1, 1, 1};
    copy_async(shared + i, x + 3 * threadIdx.x + i, i != 1);
    commit_copies();
  }
  wait_for_copies<1>();
  for (int i = 0; i < 3; ++i) out[3 * threadIdx.x + i] = shared[i];
  wait_for_copies<0>();
}

// Warps that meet often before one of them reads what another wrote first.
__global__ void skewed(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared);
  const int warp = threadIdx.x / 32;
  for (int i = 0; i < 8; ++i) __syncwarp();
  if (warp == 1) shared[threadIdx.x % 32] = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) __syncwarp();
  if (barrier) __syncthreads();
  if (warp == 0) out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void copy_under_way(const uint4* x) {
  copy_async(dynamic_shared, x, true);
  commit_copies();
}

template <typename T, int kCols>
__global__ void offsets(int* out) {
  const SharedTile<T, 16, kCols> tile(dynamic_shared);
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < kCols; ++col) {
      out[row * kCols + col] = static_cast<int>(tile.at(row, col) - tile.data) * sizeof(T);
    }
  }
}

struct Products {
  const void *a, *b, *c;  // [rows, depth], [rows, depth], [rows, cols]
  float *scores;          // a b^T, [32, 32]
  float *chained;         // (a b^T, rounded) c, [32, kN]
  float *outer;           // a^T c, [kK, kN]
  void *copy;             // c again, [rows, cols]
  int rows, depth, cols;
  int64_t a_stride, b_stride, c_stride;
  bool aligned, in_registers;
};

// A warp's 16 rows of a transposed tile.
template <typename Tile>
struct TransposedRows;
template <typename T, int kRows, int kCols_, bool kPadded>
struct TransposedRows<SharedTile<T, kRows, kCols_, kPadded>> {
  static constexpr int kCols = kRows, kUnroll = sizeof(T) == 4 ? 2 : 4;
  SharedTile<T, kRows, kCols_, kPadded> tile;
  int col;

  __device__ __forceinline__ Left<T> step(int i) const {
    return load_left_transposed(tile, i * kStep<T>, col);
  }
};

template <typename T, int kK, int kN>
__global__ void products(const Products p) {
  constexpr int kRows = 32, kThreads = 64;
  using Keys = SharedTile<T, kRows, kK>;
  using Values = SharedTile<T, kRows, kN>;
  const Keys a(dynamic_shared), b(dynamic_shared + Keys::kBytes);
  const Values c(dynamic_shared + 2 * Keys::kBytes), out(dynamic_shared + 2 * Keys::kBytes + Values::kBytes);
  load_rows<kThreads>(
      a, GlobalRows<const T>{static_cast<const T*>(p.a), p.a_stride, p.rows, p.depth, p.aligned}, 0);
  load_rows<kThreads>(
      b, GlobalRows<const T>{static_cast<const T*>(p.b), p.b_stride, p.rows, p.depth, p.aligned}, 0);
  load_rows<kThreads>(
      c, GlobalRows<const T>{static_cast<const T*>(p.c), p.c_stride, p.rows, p.cols, p.aligned}, 0);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  const int row = threadIdx.x / 32 * 16;
  Accumulator<kRows> scores;
  scores.clear();
  if (p.in_registers) {
    RegisterRows<T, kK> rows;
    for (int i = 0; i < kK / kStep<T>; ++i) rows.x[i] = load_left(a, row, i * kStep<T>);
    multiply_transposed(scores, rows, b, p.depth);
  } else {
    multiply_transposed(scores, SharedRows<Keys>{a, row}, b, p.depth);
  }
  for (int j = 0; j < kRows / 8; ++j) {
    for (int e = 0; e < 4; ++e) {
      p.scores[(row + row_of(e)) * kRows + 8 * j + col_of(e)] = scores.x[j][e];
    }
  }
  Accumulator<kN> chained;
  chained.clear();
  multiply(chained, scores.template as_rows<T>(), c, p.cols);
  for (int j = 0; j < kN / 8; ++j) {
    for (int e = 0; e < 4; ++e) {
      p.chained[(row + row_of(e)) * kN + 8 * j + col_of(e)] = chained.x[j][e];
    }
  }
  for (int first = row; first < kK; first += 32) {
    Accumulator<kN> outer;
    outer.clear();
    multiply(outer, TransposedRows<Keys>{a, first}, c);
    for (int j = 0; j < kN / 8; ++j) {
      for (int e = 0; e < 4; ++e) {
        p.outer[(first + row_of(e)) * kN + 8 * j + col_of(e)] = outer.x[j][e];
      }
    }
  }
  Accumulator<kN> same;
  for (int j = 0; j < kN / 8; ++j) {
    for (int e = 0; e < 4; ++e) same.x[j][e] = to_float(*c.at(row + row_of(e), 8 * j + col_of(e)));
  }
  same.template write<T>(out, row);
  __syncwarp();
  for (int r = row + lane_index(); r < min(row + 16, p.rows); r += 32) {
    for (int col = 0; col < p.cols; ++col) {
      static_cast<T*>(p.copy)[r * p.cols + col] = *out.at(r, col);
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(int threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 128 * 1024;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 128 * 1024);
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T>
void run(int kind, const Products& p) {
  if (kind == 0) launch(64, products<T, 64, 64>, p);
  if (kind == 1) launch(64, products<T, 96, 32>, p);
  if (kind == 2) launch(64, products<T, 16, 128>, p);
}

template <typename T>
void layout(int cols, int* out) {
  if (cols == 32) launch(1, offsets<T, 32>, out);
  if (cols == 64) launch(1, offsets<T, 64>, out);
  if (cols == 96) launch(1, offsets<T, 96>, out);
  if (cols == 256) launch(1, offsets<T, 256>, out);
}

}  // namespace
}  // namespace attnvariants

using namespace attnvariants;

extern "C" void run_fragments(int dtype, const uint32_t* a, const uint32_t* b, float* c) {
  if (dtype == 0) launch(32, product_of_fragments<float>, a, b, c);
  if (dtype == 1) launch(32, product_of_fragments<__half>, a, b, c);
  if (dtype == 2) launch(32, product_of_fragments<__nv_bfloat16>, a, b, c);
}

extern "C" void run_matrices(const void* x, uint32_t* out, bool transposed) {
  launch(32, matrices, static_cast<const uint4*>(x), out, transposed);
}

extern "C" void run_copies(const void* x, void* out) {
  launch(32, copies, static_cast<const uint4*>(x), static_cast<uint4*>(out));
}

extern "C" void run_skewed(int* out, bool barrier) { launch(64, skewed, out, barrier); }

extern "C" void run_copy_under_way(const void* x) {
  launch(1, copy_under_way, static_cast<const uint4*>(x));
}

extern "C" void run_offsets(int dtype, int cols, int* out) {
  if (dtype == 0) layout<float>(cols, out);
  else
    layout<__half>(cols, out);
}

extern "C" void run_products(int dtype, int kind, const Products* p) {
  if (dtype == 0) run<float>(kind, *p);
  if (dtype == 1) run<__half>(kind, *p);
  if (dtype == 2) run<__nv_bfloat16>(kind, *p);
}
