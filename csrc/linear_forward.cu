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

#include "linear_outputs.cuh"
#include "linear_scores.cuh"
#include "linear_state.cuh"
#include "split_plan.h"

extern __shared__ __align__(128) unsigned char dynamic_shared[];

namespace attnvariants {
namespace {

constexpr int kShortest = 256;  // tokens of a segment: fewer are not worth a pass of their own

// What a launch does: update and store states, compute outputs, or both.
struct Pass {
  const float* start;  // [slots, H, K, V], or [N, H, K, V] if not causal; null for zeros
  float* finish;       // [slots, H, K, V]; null
  float* totals;       // [slots, H, decay_width]; null
  bool updates, outputs;
};

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
          decay_slice(memory, per_channel, outputs, depth);
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
  if (pass.totals != nullptr && tile == 0) {  // complete since the last barrier
    float* totals = pass.totals + (static_cast<int64_t>(slot) * p.heads + head) * p.decay_width;
    for (int i = threadIdx.x; i < p.decay_width; i += blockDim.x) {
      totals[i] = memory.segment()[i].value();
    }
  }
}

template <typename T, int kSlices>
cudaError_t launch_pass(const LinearForward& call, const Pass& pass, cudaStream_t stream) {
  const auto kernel = linear_forward_kernel<T, kSlices>;
  using Memory = ChunkMemory<ChunkOf<T, kSlices>>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.slots) * call.heads * call.value_tiles);
  config.blockDim = dim3(32 * call.warps);
  config.dynamicSmemBytes = Memory::bytes(call.warps);
  config.stream = stream;
  // The most that any call takes: less would stop what another thread of the host is launching.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Memory::bytes(kMaxWarps));
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
