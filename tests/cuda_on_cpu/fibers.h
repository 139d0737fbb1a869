// Runs the threads of one CUDA block as fibers of one CPU thread.
//
// A fiber runs until it waits: at __syncthreads for the whole block, at a shuffle, a vote or
// __syncwarp for its warp. When all have run, the barriers that everyone concerned has reached
// open. A barrier that some reach and others do not, or that they reach in different lines, ends
// the process with a message.
//
// Blocks and their threads run in ascending order, one block after the other; or in an order drawn
// anew between any two barriers, with several blocks under way, of which a random one goes on
// after every atomic operation and __syncthreads. Between two __syncthreads the warps of a block
// then keep step, or one after the other runs as far as it can. Results that change betray a
// missing barrier, or a block that relies on how far others are. Only one fiber runs at any time,
// so that the same seed gives the same order. Missing memory fences cannot show here.
//
// Asynchronous copies arrive as late as they may, when their thread waits for them, and what they
// overwrite is NaN from their start on. A thread that returns before they have arrived ends the
// process.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

// Dynamic shared memory, NaN when a block starts. Kernels declare it outside of any namespace:
// extern __shared__ unsigned char dynamic_shared[];
inline constexpr size_t kDynamicSharedBytes = 227 * 1024;
alignas(128) inline thread_local unsigned char dynamic_shared[kDynamicSharedBytes];

namespace cuda_on_cpu {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStack = 64 * 1024;
inline constexpr int kBlocksUnderWay = 3;
inline constexpr size_t kOffered = 24;  // bytes that a lane shows to its warp
inline constexpr size_t kCopied = 16;   // bytes of an asynchronous copy

enum class Wait { kNone, kWarp, kBlock };

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null for zeros
  unsigned group;
};

struct Fiber {
  ucontext_t entry;   // used once, to get onto the fiber's stack
  jmp_buf registers;  // used from then on: swapcontext would be a system call each time
  bool started, done;
  Wait wait;
  const char* file;  // where it waits
  int line;
  dim3 thread;
  unsigned exchanges;                     // meetings with the warp so far
  alignas(8) char offered[2][kOffered];   // to the other lanes, by the parity of `exchanges`
  std::vector<Copy> copies;               // under way
  unsigned groups;                        // of copies, so far
  std::unique_ptr<char[]> stack;
};

struct Settings {
  unsigned seed = 0;   // 0: ascending order
  int processors = 3;  // what a launch that shares out work is told
  int shared = static_cast<int>(kDynamicSharedBytes);  // bytes per processor
  bool refuses = false;  // every launch
};

inline Settings settings;

// Whose turn it is among the CPU threads of a launch, each of which has one block under way.
class Turns {
 public:
  Turns(unsigned seed, int workers) : random_(seed), workers_(workers) {
    std::iota(workers_.begin(), workers_.end(), 0);
    holder_ = pick();
  }

  void wait_for(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return holder_ == worker; });
  }

  void pass(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    holder_ = pick();
    if (holder_ == worker) return;
    changed_.notify_all();
    changed_.wait(lock, [&] { return holder_ == worker; });
  }

  void leave(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    workers_.erase(std::find(workers_.begin(), workers_.end(), worker));
    if (!workers_.empty()) holder_ = pick();
    changed_.notify_all();
  }

  std::mt19937& random() { return random_; }  // for whose turn it is

 private:
  int pick() { return workers_[random_() % workers_.size()]; }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_;
  std::vector<int> workers_;  // that still have blocks to run
  int holder_;
};

// Operands of a product that a warp has put together.
struct WarpMatrices {
  unsigned exchange;  // for which meeting
  double a[16][16], b[8][16];
};

struct State {
  std::vector<Fiber> fibers;
  WarpMatrices matrices[kMaxThreads / kWarp];
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  Turns* turns = nullptr;
  int worker = 0;
};

inline thread_local State* own_state = nullptr;

inline State& state() { return *own_state; }

// Lets another block go on, perhaps.
inline void pass_turn() { state().turns->pass(state().worker); }

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
  if (!s.current->copies.empty()) {
    fail("a thread returns before its copies have arrived", *s.current, *s.current);
  }
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

inline bool is_under_way(const Fiber& f) { return !f.done && f.wait == Wait::kNone; }

// Lets a warp go on whose threads have met.
inline void open_warp(int first, int threads) {
  State& s = state();
  const int end = std::min(first + kWarp, threads);
  for (int i = first + 1; i < end; ++i) {
    if (!together(s.fibers[first], s.fibers[i]))
      fail("threads of a warp diverge at a barrier", s.fibers[first], s.fibers[i]);
  }
  if (s.fibers[first].done || s.fibers[first].wait != Wait::kWarp) return;
  for (int i = first; i < end; ++i) s.fibers[i].wait = Wait::kNone;
}

inline void open_block(int threads) {
  State& s = state();
  for (int i = kWarp; i < threads; i += kWarp) {
    if (!together(s.fibers[0], s.fibers[i]))
      fail("warps diverge at __syncthreads", s.fibers[0], s.fibers[i]);
  }
  for (int i = 0; i < threads; ++i) s.fibers[i].wait = Wait::kNone;
  pass_turn();
}

inline void run_block(int threads, size_t dynamic_bytes) {
  State& s = state();
  std::memset(dynamic_shared, 0xff, dynamic_bytes);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = s.fibers[i];
    f.started = f.done = false;
    f.wait = Wait::kNone;
    f.file = "";
    f.line = 0;
    f.exchanges = f.groups = 0;
    f.copies.clear();
    f.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.entry);
    f.entry.uc_stack.ss_sp = f.stack.get();
    f.entry.uc_stack.ss_size = kStack;
    f.entry.uc_link = nullptr;
    makecontext(&f.entry, enter, 0);
  }
  for (WarpMatrices& m : s.matrices) m.exchange = 0;
  std::vector<int> warps((threads + kWarp - 1) / kWarp), lanes(kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  for (;;) {  // from one __syncthreads to the next
    std::mt19937& random = s.turns->random();
    const bool in_step = !settings.seed || random() % 2 == 0;
    if (settings.seed) std::shuffle(warps.begin(), warps.end(), random);
    for (bool some = true; some;) {
      some = false;
      for (int warp : warps) {
        const int first = warp * kWarp;
        while (is_under_way(s.fibers[first])) {
          some = true;
          if (settings.seed) std::shuffle(lanes.begin(), lanes.end(), random);
          for (int lane : lanes) {
            if (first + lane < threads) resume(s.fibers[first + lane]);
          }
          open_warp(first, threads);
          if (in_step) break;
        }
      }
    }
    bool done = true;
    for (int i = 0; i < threads; ++i) done = done && s.fibers[i].done;
    if (done) return;
    open_block(threads);
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> body) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || dynamic_bytes > kDynamicSharedBytes) {
    std::fprintf(stderr, "cuda_on_cpu: a launch that no device would take\n");
    std::abort();
  }
  const size_t count = size_t{grid.x} * grid.y * grid.z;
  const int workers = settings.seed ? kBlocksUnderWay : 1;
  Turns turns(settings.seed, workers);
  std::vector<unsigned> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (settings.seed) std::shuffle(blocks.begin(), blocks.end(), turns.random());
  size_t next = 0;
  auto work = [&](int worker) {
    static std::vector<std::unique_ptr<State>> states(kBlocksUnderWay);  // keep their stacks
    turns.wait_for(worker);
    if (!states[worker]) states[worker].reset(new State);
    own_state = states[worker].get();
    own_state->turns = &turns;
    own_state->worker = worker;
    own_state->body = body;
    if (own_state->fibers.size() < threads) own_state->fibers.resize(threads);
    gridDim = grid;
    blockDim = block;
    while (next < count) {
      const unsigned i = blocks[next++];
      blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      run_block(static_cast<int>(threads), dynamic_bytes);
    }
    turns.leave(worker);
  };
  if (workers == 1) return work(0);
  std::vector<std::thread> pool;
  for (int worker = 0; worker < workers; ++worker) pool.emplace_back(work, worker);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace cuda_on_cpu
