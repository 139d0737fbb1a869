// Decode steps of linear attention in one launch: the state is read once and written once.
//
//   S_t = diag(exp g_t) S_{t-1} + phi(k_t) v_t^T,    o_t = scale S_t^T phi(q_t)
//   out = act(gate) * norm_weight * RMSNorm(o)
//
// A block holds 32 columns of one head's state in registers, takes the tokens of the step one
// after the other, and writes the columns back. Without a norm it finishes its outputs at once.
// With one, blocks leave o and its sums of squares, and the last one of a head, or of a row for
// the norm over the model dim, finishes the outputs of all.

#include "last_block.cuh"
#include "linear_decode.h"
#include "linear_epilogue.cuh"

namespace attnvariants {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kVector = 4;                               // columns of a thread
constexpr int kColumnThreads = kStateColumns / kVector;  // 8
constexpr int kRowThreads = kThreads / kColumnThreads;   // 16
constexpr int kMaxKeyDim = 256;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Four columns of a row of the state, which holds numbers of type S.
template <typename S>
struct alignas(kVector * sizeof(S)) Columns {
  S x[kVector];
};

template <typename S>
__device__ __forceinline__ float4 load_columns(const S* row, int col, int size, bool aligned) {
  Columns<S> columns;
  if (aligned && col < size) {
    columns = *reinterpret_cast<const Columns<S>*>(row + col);
  } else {
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      columns.x[c] = col + c < size ? row[col + c] : from_float<S>(0.0f);
    }
  }
  const S* x = columns.x;
  return {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}

template <typename S>
__device__ __forceinline__ void store_columns(
    S* row, int col, int size, bool aligned, const float4& x) {
  const Columns<S> columns = {
      {from_float<S>(x.x), from_float<S>(x.y), from_float<S>(x.z), from_float<S>(x.w)}};
  if (aligned && col < size) {
    *reinterpret_cast<Columns<S>*>(row + col) = columns;
    return;
  }
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    if (col + c < size) row[col + c] = columns.x[c];
  }
}

// Calls f with a thread's rows of the state of a head and with the addresses of their first columns.
template <int kRows, typename S, typename F>
__device__ __forceinline__ void for_rows(const LinearDecode& p, S* state, int thread_row, F f) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = thread_row + i * kRowThreads;
    if (row < p.key_dim) f(i, state + row * p.state_row);
  }
}

// One element of the output, stored.
template <typename T>
__device__ __forceinline__ void finish(
    const LinearDecode& p, int b, int t, int h, int col, float o) {
  o = weigh_and_gate<T>(p.epilogue, b, t, h, col, o);
  const int64_t row = (static_cast<int64_t>(b) * p.steps + t) * p.heads + h;
  static_cast<T*>(p.out)[row * p.value_dim + col] = from_float<T>(o);
}

// The outputs of all tokens of one head, or of all heads of a row. A warp takes one row at a time.
template <typename T>
__device__ void normalise(const LinearDecode& p, int b, int head, int column_blocks) {
  const bool whole = p.epilogue.norm == Norm::kModel;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_head = whole ? 0 : head, num_heads = whole ? p.heads : 1;
  const int count = num_heads * column_blocks;
  for (int index = warp; index < p.steps * num_heads; index += kWarps) {
    const int t = index / num_heads, h = first_head + index % num_heads;
    const int64_t token = (static_cast<int64_t>(b) * p.steps + t) * p.heads;
    const float* squares = p.squares + (token + first_head) * column_blocks;
    float sum = 0.0f;
    for (int i = lane; i < count; i += 32) sum += __ldcg(squares + i);
    const float mean = warp_sum(sum) / (static_cast<float>(num_heads) * p.value_dim);
    const float rstd = rsqrtf(mean + p.epilogue.eps);
    const float* o = p.o + (token + h) * p.value_dim;
    for (int col = lane; col < p.value_dim; col += 32) {
      finish<T>(p, b, t, h, col, __ldcg(o + col) * rstd);
    }
  }
}

// phi(q) scale, phi(k) and the decay of one token and head, 0 beyond K whatever phi(0) is.
template <typename T>
__device__ __forceinline__ void load_token(
    const LinearDecode& p, int b, int t, int h, float* q, float* k, float* decay) {
  const T* q_row = static_cast<const T*>(p.q) + b * p.q_strides.batch + t * p.q_strides.time +
                   h * p.q_strides.head;
  const T* k_row = static_cast<const T*>(p.k) + b * p.k_strides.batch + t * p.k_strides.time +
                   h * p.k_strides.head;
  const LogDecay& g = p.decay;
  const int64_t g_row = b * g.strides.batch + t * g.strides.time + h * g.strides.head;
  for (int i = threadIdx.x; i < kMaxKeyDim; i += kThreads) {
    const bool live = i < p.key_dim;
    q[i] = live ? apply_map(p.feature_map, to_float(q_row[i])) * p.scale : 0.0f;
    k[i] = live ? apply_map(p.feature_map, to_float(k_row[i])) : 0.0f;
    decay[i] = 1.0f;
    if (live && g.g != nullptr) {
      decay[i] = decay_of(load_either<T>(g.g, g_row + (g.per_channel ? i : 0), g.is_float));
    }
  }
}

// kRows rows of the state per thread: thread row r has the rows r, r + 16, r + 32, ...
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 16 ? 4 : (kRows == 8 ? 5 : 8))
linear_decode_kernel(const __grid_constant__ LinearDecode p) {
  __shared__ float q[kMaxKeyDim], k[kMaxKeyDim], decay[kMaxKeyDim];
  __shared__ float warp_o[kWarps][kStateColumns];

  const int column_blocks = (p.value_dim + kStateColumns - 1) / kStateColumns;
  const int column_block = blockIdx.x % column_blocks;
  const int h = blockIdx.x / column_blocks % p.heads;
  const int b = blockIdx.x / column_blocks / p.heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int thread_row = threadIdx.x / kColumnThreads;
  const int col = column_block * kStateColumns + threadIdx.x % kColumnThreads * kVector;
  if (p.lengths != nullptr && h == 0 && column_block == 0 && threadIdx.x == 0) {
    p.lengths[b] += p.steps;
  }

  const int64_t head_state = b * p.state_batch + h * p.state_head;
  float4 s[kRows] = {};
  const auto load = [&](int i, const auto* row) {
    s[i] = load_columns(row, col, p.value_dim, p.state_aligned);
  };
  if (p.state_is_float) {
    for_rows<kRows>(p, static_cast<const float*>(p.state) + head_state, thread_row, load);
  } else {
    for_rows<kRows>(p, static_cast<const __nv_bfloat16*>(p.state) + head_state, thread_row, load);
  }
  for (int t = 0; t < p.steps; ++t) {
    load_token<T>(p, b, t, h, q, k, decay);
    const T* v_row = static_cast<const T*>(p.v) + b * p.v_strides.batch + t * p.v_strides.time +
                     h * p.v_strides.head;
    float v[kVector], o[kVector] = {};
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      v[c] = col + c < p.value_dim ? to_float(v_row[col + c]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread_row + i * kRowThreads;
      const float a = decay[row], key = k[row], query = q[row];
      s[i].x = s[i].x * a + key * v[0];
      s[i].y = s[i].y * a + key * v[1];
      s[i].z = s[i].z * a + key * v[2];
      s[i].w = s[i].w * a + key * v[3];
      o[0] += query * s[i].x;
      o[1] += query * s[i].y;
      o[2] += query * s[i].z;
      o[3] += query * s[i].w;
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
#pragma unroll
      for (int offset = kColumnThreads; offset < 32; offset *= 2) {
        o[c] += __shfl_xor_sync(kFullWarp, o[c], offset);
      }
      if (lane < kColumnThreads) warp_o[warp][lane * kVector + c] = o[c];
    }
    __syncthreads();  // also: all have read q, k and decay before the next token overwrites them
    if (warp == 0) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_o[w][lane];
      const int own = column_block * kStateColumns + lane;
      const int64_t row = (static_cast<int64_t>(b) * p.steps + t) * p.heads + h;
      if (p.epilogue.norm == Norm::kNone) {
        if (own < p.value_dim) finish<T>(p, b, t, h, own, sum);
      } else {
        if (own < p.value_dim) p.o[row * p.value_dim + own] = sum;
        const float squares = warp_sum(own < p.value_dim ? sum * sum : 0.0f);
        if (lane == 0) p.squares[row * column_blocks + column_block] = squares;
      }
    }
    // warp_o is written again only behind the next token's first barrier.
  }
  const auto store = [&](int i, auto* row) {
    store_columns(row, col, p.value_dim, p.state_aligned, s[i]);
  };
  if (p.state_is_float) {
    for_rows<kRows>(p, static_cast<float*>(p.state) + head_state, thread_row, store);
  } else {
    for_rows<kRows>(p, static_cast<__nv_bfloat16*>(p.state) + head_state, thread_row, store);
  }

  if (p.epilogue.norm == Norm::kNone) return;
  const bool whole = p.epilogue.norm == Norm::kModel;
  unsigned* arrivals = p.arrivals + b * p.heads + (whole ? 0 : h);
  if (is_last_block(arrivals, (whole ? p.heads : 1) * column_blocks)) {
    normalise<T>(p, b, h, column_blocks);
  }
}

using Kernel = void (*)(LinearDecode);

template <typename T>
Kernel choose(int key_dim) {
  if (key_dim <= 4 * kRowThreads) return linear_decode_kernel<T, 4>;
  if (key_dim <= 8 * kRowThreads) return linear_decode_kernel<T, 8>;
  return linear_decode_kernel<T, 16>;
}

Kernel choose(int key_dim, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return choose<float>(key_dim);
  if (dtype == Dtype::kFloat16) return choose<__half>(key_dim);
  return choose<__nv_bfloat16>(key_dim);
}

}  // namespace

cudaError_t launch_linear_decode(const LinearDecode& call, Dtype dtype, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.batch) * call.heads * blocks_of_a_head(call));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, choose(call.key_dim, dtype), call);
}

}  // namespace attnvariants
