// Linear attention over whole sequences: one pass over the inputs, with the state in registers.
//
//   o_i = scale (S^T (exp(G_i) phi(q_i)) + sum_{j <= i} A_ij v_j)           in chunks of tokens
//   S   = exp(G_C) S + sum_j (exp(G_C - G_j) phi(k_j)) v_j^T
//   out = act(gate) * norm_weight * RMSNorm(o)
//
// A block walks over a segment of one head with a tile of the values, chunk by chunk. Each of its
// warps holds 16 columns of the state, transposed: as it adds it up, that is the right operand of
// the outputs of these columns. Without causality a block first adds up all keys and then looks at
// the queries.
//
// Sequences are cut into segments only where heads and sequences leave processors idle. A first
// pass of the same kernel then finds the state of every segment alone, and a scan joins them.

#include <algorithm>
#include <climits>

#include "linear_epilogue.cuh"
#include "linear_forward.h"
#include "linear_scores.cuh"
#include "split_plan.h"

extern __shared__ unsigned char dynamic_shared[];

namespace attnvariants {
namespace {

constexpr int kScanThreads = 256;
constexpr int kShortest = 256;  // tokens of a segment: fewer are not worth a pass of their own

// What a launch does: update and store states, compute outputs, or both.
struct Pass {
  const float* start;  // [slots, H, K, V], or [N, H, K, V] if not causal; null for zeros
  float* finish;       // [slots, H, K, V]; null
  float* totals;       // [slots, H, decay_width]; null
  bool updates, outputs;
};

struct Segment {
  int sequence, batch;
  int64_t begin, end;
  bool used;
};

__device__ __forceinline__ Segment find_segment(const LinearForward& p, int slot) {
  int n, place, first = 0, last = p.length;
  if (p.cu_seqlens == nullptr) {
    const int slots = p.slots / p.sequences;
    n = slot / slots;
    place = slot % slots;
  } else {
    // Sequence n has the slots from cu_seqlens[n] / span + n on, which is always enough.
    int high = p.sequences;
    n = 0;
    while (high - n > 1) {
      const int middle = (n + high) / 2;
      if (p.cu_seqlens[middle] / p.span + middle <= slot) n = middle;
      else high = middle;
    }
    first = p.cu_seqlens[n];
    last = p.cu_seqlens[n + 1];
    place = slot - (first / p.span + n);
  }
  const int64_t begin = first + static_cast<int64_t>(place) * p.span;
  const int64_t end = min(begin + p.span, static_cast<int64_t>(last));
  return {n, p.cu_seqlens == nullptr ? n : 0, begin, end, place == 0 || begin < last};
}

// A warp's 16 columns of the state of a head, transposed: [16, K].
template <int kSlices>
struct WarpState {
  Accumulator<kSlice> x[kSlices];

  // Calls f(element, entry) for the entries of a state [K, V] in memory.
  template <typename F>
  __device__ __forceinline__ void for_entries(const LinearForward& p, int col, F f) {
    const int lane = fresh_lane();
    int key = col_of(0, lane);
#pragma unroll
    for (int j = 0; j < kSlices * kSlice / 8; ++j, key += 8) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int value = col + row_of(e, lane);
        if (key + e % 2 < p.key_dim && value < p.value_dim) {
          f(x[j / (kSlice / 8)].x[j % (kSlice / 8)][e], (key + e % 2) * p.value_dim + value);
        }
      }
    }
  }

  __device__ __forceinline__ void load(const LinearForward& p, const float* from, int col) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) x[slice].clear();
    if (from != nullptr) {
      for_entries(p, col, [&](float& element, int entry) { element = from[entry]; });
    }
  }

  __device__ __forceinline__ void store(const LinearForward& p, float* to, int col) {
    for_entries(p, col, [&](float& element, int entry) { to[entry] = element; });
  }
};

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
    const int64_t token = place.first + row;
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

// S = exp(G_C) S + k^T v for a slice of the keys and a warp's 16 values.
template <typename C, typename Values>
__device__ __forceinline__ void update_state(
    const ChunkMemory<C>& memory, Accumulator<kSlice>& state, const Values& v, int col,
    int live, int depth, bool decays) {
  using T = typename C::T;
  const int lane = fresh_lane();
#pragma unroll
  for (int n = 0; n < kSlice / kBlock; ++n) {
    if (n * kBlock >= depth) break;
    Accumulator<kBlock> write;
    write.clear();
#pragma unroll (C::kUnroll)
    for (int i = 0; i < live; i += kBlock) {
      multiply_block<T>(write, left_block_transposed<T>(v, i, col, lane),
                        right_block<T>(memory.k(), i, n * kBlock, lane));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& s = state.x[2 * n + i][e];
        if (decays) s = memory.aging()[n * kBlock + 8 * i + col_of(e, lane)](s, write.x[i][e]);
        else s += write.x[i][e];
      }
    }
  }
}

// A wide state leaves fewer registers to the rows of a chunk.
template <typename T, int kSlices>
using ChunkOf = Chunk<T, sizeof(Element<T>) == 2 && kSlices < kMaxSlices ? 64 : 32>;

template <typename T, int kSlices>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
linear_forward_kernel(const __grid_constant__ LinearForward p, const Pass pass) {
  using C = ChunkOf<T, kSlices>;
  const ChunkMemory<C> memory(dynamic_shared);
  const int warp = threadIdx.x / 32;
  const int tile = blockIdx.x % p.value_tiles;
  const int head = blockIdx.x / p.value_tiles % p.heads;
  const int slot = blockIdx.x / p.value_tiles / p.heads;
  const Segment segment = find_segment(p, slot);
  if (!segment.used) return;

  const int warps = blockDim.x / 32;
  const int first_value = tile * warps * kBlock, col = first_value + warp * kBlock;
  const auto v = memory.v(warp / 4);
  const int v_col = warp % 4 * kBlock;
  const bool busy = col < p.value_dim;  // the last warps of the last tile may have no columns
  const bool decays = p.decay.g != nullptr, per_channel = decays && p.decay.per_channel;
  const int64_t head_state = static_cast<int64_t>(p.key_dim) * p.value_dim;

  WarpState<kSlices> state;
  {
    const int from = p.causal ? slot : segment.sequence;
    const float* start = pass.start;
    if (start != nullptr) start += (static_cast<int64_t>(from) * p.heads + head) * head_state;
    state.load(p, start, col);
  }
  for (int i = threadIdx.x; i < kSlices * kSlice; i += blockDim.x) memory.segment()[i] = Sum();

  // Without causality the outputs see all keys.
  const bool twice = !p.causal && pass.updates && pass.outputs;
#pragma unroll 1
  for (int turn = 0; turn < (twice ? 2 : 1); ++turn) {
    const bool updates = pass.updates && !(twice && turn == 1);
    const bool outputs = pass.outputs && !(twice && turn == 0);
    const bool scores = outputs && p.causal;
#pragma unroll 1
    for (int64_t t = segment.begin; t < segment.end; t += C::kRows) {
      const int live = static_cast<int>(min(segment.end - t, int64_t{C::kRows}));
      const ChunkPlace place = {segment.batch, head, t, live};
      ChunkOutputs<C> o;
      ChunkScores<C> a;
      o.clear();
      a.clear();
      if (decays && !per_channel) prepare_token_decay(memory, p.decay, place, scores);
#pragma unroll 1
      for (int slice = 0; slice * kSlice < p.key_dim; ++slice) {
        const int first = slice * kSlice;
        const int depth = min(kSlice, (p.key_dim - first + kBlock - 1) / kBlock * kBlock);
        __syncthreads();  // all are done with the slice before
        if (slice == 0 && (updates || scores)) {
          for (int part = 0; part < warps / 4; ++part) {
            load_features<T>(memory.v(part), p.v, p.v_strides, place,
                             first_value + part * kValues, kValues, p.value_dim, p.v_aligned,
                             Map::kIdentity);
          }
        }
        if (outputs) {
          load_features<T>(memory.q(), p.q, p.q_strides, place, first, depth, p.key_dim,
                           p.q_aligned, p.feature_map);
        }
        if (updates || scores) {
          load_features<T>(memory.k(), p.k, p.k_strides, place, first, depth, p.key_dim,
                           p.k_aligned, p.feature_map);
        }
        if (per_channel) {
          load_log_decay<T>(memory.g(), C::kRows, p.decay, place, first, depth, p.key_dim);
        }
        __syncthreads();
        if (per_channel) {
          add_up_groups(memory, depth);
          __syncthreads();
          prepare_aging(memory, slice, depth);
          if (scores) a.add_decayed(memory, live, depth);
        } else if (scores) {
          a.add(memory, live, depth);
        }
        if (decays) {
          __syncthreads();  // the scores have read q and k
          decay_slice(memory, per_channel, depth);
          __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          if (i != slice || !busy) continue;
          if (outputs) o.add_state(memory, state.x[i], live, depth);
          if (updates) update_state<C>(memory, state.x[i], v, v_col, live, depth, decays);
        }
      }
      if (scores) {
        if (decays && !per_channel) a.decay_tokens(memory, live);
        a.write(memory, live);
        __syncthreads();
        if (busy) o.add_values(memory, v, v_col, live);
      }
      if (outputs) o.finish(p, memory, place, tile, col);
    }
  }

  if (pass.finish != nullptr) {
    const int64_t index = static_cast<int64_t>(slot) * p.heads + head;
    state.store(p, pass.finish + index * head_state, col);
  }
  if (pass.totals != nullptr && tile == 0) {
    __syncthreads();
    float* totals = pass.totals + (static_cast<int64_t>(slot) * p.heads + head) * p.decay_width;
    for (int i = threadIdx.x; i < p.decay_width; i += blockDim.x) {
      totals[i] = memory.segment()[i].value();
    }
  }
}

// Joins the segments of every sequence: S = exp(total) S + own. Of a causal call, `own` is replaced
// by the state that the segment starts from. A thread has one entry of the state of a head.
__global__ void __launch_bounds__(kScanThreads)
linear_scan_kernel(const __grid_constant__ LinearForward p) {
  const int64_t entries = static_cast<int64_t>(p.key_dim) * p.value_dim;
  const int blocks = static_cast<int>((entries + kScanThreads - 1) / kScanThreads);
  const int64_t entry = int64_t{blockIdx.x % blocks} * kScanThreads + threadIdx.x;
  const int head = blockIdx.x / blocks % p.heads, n = blockIdx.x / blocks / p.heads;
  if (entry >= entries) return;
  int first_slot = p.slots / p.sequences * n, length = p.length;
  if (p.cu_seqlens != nullptr) {
    const int first = p.cu_seqlens[n];
    first_slot = first / p.span + n;
    length = p.cu_seqlens[n + 1] - first;
  }
  const int channel = p.decay_width == 1 ? 0 : static_cast<int>(entry / p.value_dim);
  const int64_t whole = (static_cast<int64_t>(n) * p.heads + head) * entries + entry;
  float state = p.initial != nullptr ? p.initial[whole] : 0.0f;
  for (int place = 0; static_cast<int64_t>(place) * p.span < length; ++place) {
    const int64_t segment = static_cast<int64_t>(first_slot + place) * p.heads + head;
    float* const own = p.own + segment * entries + entry;
    const float write = *own;
    if (p.causal) *own = state;
    if (p.decay_width == 0) state += write;
    else state = aging_of(p.totals[segment * p.decay_width + channel])(state, write);
  }
  p.state[whole] = state;
}

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
  const int b = static_cast<int>(token / p.length);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (col + i >= p.value_dim) break;
    run.x[i] = from_float<T>(weigh_and_gate<T>(
        p.epilogue, b, token % p.length, head, col + i, to_float(run.x[i]) * factor));
  }
  store_run(out, col, p.value_dim, aligned, run);
}

template <typename T, int kSlices>
cudaError_t launch_pass(const LinearForward& call, const Pass& pass, cudaStream_t stream) {
  const auto kernel = linear_forward_kernel<T, kSlices>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.slots) * call.heads * call.value_tiles);
  config.blockDim = dim3(32 * call.warps);
  config.dynamicSmemBytes = ChunkMemory<ChunkOf<T, kSlices>>::bytes(call.warps);
  config.stream = stream;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, call, pass);
}

template <typename T>
cudaError_t launch_pass(const LinearForward& call, const Pass& pass, cudaStream_t stream) {
  if (call.key_dim <= kSlice) return launch_pass<T, 1>(call, pass, stream);
  if (call.key_dim <= 2 * kSlice) return launch_pass<T, 2>(call, pass, stream);
  return launch_pass<T, kMaxSlices>(call, pass, stream);
}

cudaError_t launch_scan(const LinearForward& call, cudaStream_t stream) {
  const int64_t blocks = ceil_div(int64_t{call.key_dim} * call.value_dim, kScanThreads);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks * call.heads * call.sequences));
  config.blockDim = dim3(kScanThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, linear_scan_kernel, call);
}

template <typename T>
cudaError_t launch_norm(const LinearForward& call, cudaStream_t stream) {
  const int64_t rows = int64_t{call.batch} * call.length * call.heads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(rows, kMaxWarps)));
  config.blockDim = dim3(32 * kMaxWarps);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, linear_norm_kernel<T>, call);
}

template <typename T>
cudaError_t launch(const LinearForward& call, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  Pass pass = {call.initial, call.state, nullptr, true, true};
  if (!call.whole) {
    error = launch_pass<T>(call, {nullptr, call.own, call.totals, true, false}, stream);
    if (error == cudaSuccess) error = launch_scan(call, stream);
    // Without causality every token sees the state behind its sequence, which stays as it is.
    pass = {call.causal ? call.own : call.state, nullptr, nullptr, call.causal, true};
  }
  if (error == cudaSuccess) error = launch_pass<T>(call, pass, stream);
  if (error == cudaSuccess && call.norm_later) error = launch_norm<T>(call, stream);
  return error;
}

}  // namespace

cudaError_t plan_linear_forward(LinearForward& call, int processors) {
  if (processors == 0) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
  }
  call.warps = call.value_dim <= kValues ? 4 : kMaxWarps;
  call.value_tiles = static_cast<int>(ceil_div(call.value_dim, call.warps * kBlock));
  const Norm norm = call.epilogue.norm;
  call.norm_later = norm == Norm::kModel || (norm == Norm::kHead && call.value_tiles > 1);
  call.decay_width = call.decay.g == nullptr ? 0 : (call.decay.per_channel ? call.key_dim : 1);

  const int64_t parallel = int64_t{call.heads} * call.value_tiles;
  call.span = INT_MAX;
  if (2 * parallel * call.sequences <= processors && call.length >= 2 * kShortest) {
    const int64_t tokens = int64_t{call.batch} * call.length;
    const int64_t even = ceil_div(tokens * parallel, processors);
    const int64_t span = std::max<int64_t>(ceil_div(even, kShortest), 1) * kShortest;
    if (span < call.length) call.span = static_cast<int>(span);
  }
  call.whole = call.span == INT_MAX;
  call.slots = call.cu_seqlens != nullptr
                   ? call.length / call.span + call.sequences
                   : static_cast<int>(call.sequences * ceil_div(call.length, call.span));
  return int64_t{call.slots} * parallel <= INT_MAX ? cudaSuccess : cudaErrorInvalidConfiguration;
}

cudaError_t launch_linear_forward(const LinearForward& call, Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kFloat32) return launch<float>(call, stream);
  if (dtype == Dtype::kFloat16) return launch<__half>(call, stream);
  return launch<__nv_bfloat16>(call, stream);
}

}  // namespace attnvariants
