// Runs the threads of one CUDA block as fibers of one CPU thread, block after block.
//
// A fiber runs until it waits: at __syncthreads for the whole block, at a shuffle, a vote or
// __syncwarp for its warp. When all have run, the barriers that everyone concerned has reached
// open. A barrier that some reach and others do not, or that they reach in different lines, ends
// the process with a message.
//
// Threads run in ascending order, or in an order drawn anew between any two barriers, and blocks
// likewise: results that then change betray a missing barrier, or a dependence between blocks.
// What this cannot show: missing memory fences, and blocks that overlap in time.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

// Dynamic shared memory, NaN when a block starts. Kernels declare it outside of any namespace:
// extern __shared__ unsigned char dynamic_shared[];
inline constexpr size_t kDynamicSharedBytes = 227 * 1024;
alignas(128) inline thread_local unsigned char dynamic_shared[kDynamicSharedBytes];

namespace cuda_on_cpu {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStack = 128 * 1024;

enum class Wait { kNone, kWarp, kBlock };

struct Fiber {
  ucontext_t entry;   // used once, to get onto the fiber's stack
  jmp_buf registers;  // used from then on: swapcontext would be a system call each time
  bool started, done;
  Wait wait;
  const char* file;  // where it waits
  int line;
  dim3 thread;
  unsigned exchanges;             // shuffles and votes so far
  unsigned long long offered[2];  // to the other lanes, by the parity of `exchanges`
  std::unique_ptr<char[]> stack;
};

struct State {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned seed = 0;   // 0: ascending order
  int processors = 3;  // what a launch that shares out work is told
  std::mt19937 random;
};

inline State& state() {
  static State* instance = new State;
  return *instance;
}

[[noreturn]] inline void fail(const char* what, const Fiber& a, const Fiber& b) {
  auto describe = [](const Fiber& f) {
    std::fprintf(stderr, "  thread (%u, %u, %u) ", f.thread.x, f.thread.y, f.thread.z);
    if (f.done) std::fprintf(stderr, "has returned\n");
    else std::fprintf(stderr, "waits at %s:%d\n", f.file, f.line);
  };
  std::fprintf(stderr, "cuda_on_cpu: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
               blockIdx.z);
  describe(a);
  describe(b);
  std::abort();
}

inline void enter() {
  State& s = state();
  s.body();
  s.current->done = true;
  _longjmp(s.scheduler, 1);
}

inline void wait(Wait kind, const char* file, int line) {
  State& s = state();
  Fiber* self = s.current;
  self->wait = kind;
  self->file = file;
  self->line = line;
  if (!_setjmp(self->registers)) _longjmp(s.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  State& s = state();
  s.current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(s.scheduler)) return;
  if (fiber.started) _longjmp(fiber.registers, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

// Every fiber has returned or waits for the same kind of barrier in the same line.
inline bool together(const Fiber& a, const Fiber& b) {
  return a.done == b.done && a.wait == b.wait && a.line == b.line && !std::strcmp(a.file, b.file);
}

inline void open_barriers(int threads) {
  State& s = state();
  bool opened = false;
  for (int first = 0; first < threads; first += kWarp) {
    const int end = std::min(first + kWarp, threads);
    for (int i = first + 1; i < end; ++i) {
      if (!together(s.fibers[first], s.fibers[i]))
        fail("threads of a warp diverge at a barrier", s.fibers[first], s.fibers[i]);
    }
    if (s.fibers[first].done || s.fibers[first].wait != Wait::kWarp) continue;
    for (int i = first; i < end; ++i) s.fibers[i].wait = Wait::kNone;
    opened = true;
  }
  if (opened) return;
  for (int i = kWarp; i < threads; i += kWarp) {
    if (!together(s.fibers[0], s.fibers[i]))
      fail("warps diverge at __syncthreads", s.fibers[0], s.fibers[i]);
  }
  for (int i = 0; i < threads; ++i) s.fibers[i].wait = Wait::kNone;
}

inline void run_block(int threads) {
  State& s = state();
  std::memset(dynamic_shared, 0xff, sizeof dynamic_shared);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = s.fibers[i];
    f.started = f.done = false;
    f.wait = Wait::kNone;
    f.file = "";
    f.line = 0;
    f.exchanges = 0;
    f.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.entry);
    f.entry.uc_stack.ss_sp = f.stack.get();
    f.entry.uc_stack.ss_size = kStack;
    f.entry.uc_link = nullptr;
    makecontext(&f.entry, enter, 0);
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (s.seed) std::shuffle(order.begin(), order.end(), s.random);
    bool done = true;
    for (int i : order) {
      Fiber& f = s.fibers[i];
      if (!f.done && f.wait == Wait::kNone) resume(f);
      done = done && f.done;
    }
    if (done) return;
    open_barriers(threads);
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body) {
  State& s = state();
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || dynamic_bytes > kDynamicSharedBytes) {
    std::fprintf(stderr, "cuda_on_cpu: a launch that no device would take\n");
    std::abort();
  }
  if (s.fibers.size() < threads) s.fibers.resize(threads);
  gridDim = grid;
  blockDim = block;
  s.body = std::move(body);
  s.random.seed(s.seed);
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (s.seed) std::shuffle(blocks.begin(), blocks.end(), s.random);
  for (unsigned i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(static_cast<int>(threads));
  }
}

// Offers a value to the warp, waits for it, and returns what lane `source(lane)` offered. The two
// buffers make one barrier enough: whoever writes one again has met all who still had to read it.
template <typename T, typename Source>
T exchange(unsigned mask, T value, Source source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(unsigned long long));
  State& s = state();
  Fiber* self = s.current;
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "cuda_on_cpu: %s:%d: only full warps are supported\n", file, line);
    std::abort();
  }
  const unsigned parity = self->exchanges++ & 1;
  std::memcpy(&self->offered[parity], &value, sizeof(T));
  wait(Wait::kWarp, file, line);
  const long index = self - s.fibers.data(), lane = index % kWarp;
  const long threads = static_cast<long>(blockDim.x) * blockDim.y * blockDim.z;
  const long other = index - lane + source(static_cast<int>(lane));
  const Fiber& from = other < threads ? s.fibers[other] : *self;
  T result;
  std::memcpy(&result, &from.offered[parity], sizeof(T));
  return result;
}

// Lanes without a partner keep their own value.
inline int shifted(int lane, int by) {
  return lane + by >= 0 && lane + by < kWarp ? lane + by : lane;
}

inline unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  unsigned votes = 0;
  State& s = state();
  const long first = (s.current - s.fibers.data()) / kWarp * kWarp;
  const unsigned parity = s.current->exchanges & 1;
  exchange(mask, static_cast<int>(vote), [](int lane) { return lane; }, file, line);
  const long threads = static_cast<long>(blockDim.x) * blockDim.y * blockDim.z;
  for (long i = first; i < std::min(first + kWarp, threads); ++i) {
    int other;
    std::memcpy(&other, &s.fibers[i].offered[parity], sizeof other);
    votes |= static_cast<unsigned>(other != 0) << (i - first);
  }
  return votes;
}

}  // namespace cuda_on_cpu
