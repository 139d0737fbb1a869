// What the threads of a warp exchange, and their asynchronous copies: on top of fibers.h.

#pragma once

#include "fibers.h"

namespace cuda_on_cpu {

[[noreturn]] inline void abort_with(const char* what, const char* file, int line) {
  std::fprintf(stderr, "cuda_on_cpu: %s at %s:%d\n", what, file, line);
  std::abort();
}

// A warp that has met: what its lanes have offered.
class Meeting {
 public:
  Meeting(Fiber* self, unsigned count)
      : self_(self), first_(self - (self - state().fibers.data()) % kWarp), count_(count) {}

  int lane() const { return static_cast<int>(self_ - first_); }
  int lanes() const {
    const long threads = static_cast<long>(blockDim.x) * blockDim.y * blockDim.z;
    return static_cast<int>(std::min<long>(kWarp, threads - (first_ - state().fibers.data())));
  }

  template <typename T>
  T offered(int lane) const {
    T result;
    std::memcpy(&result, first_[lane].offered[count_ & 1], sizeof(T));
    return result;
  }

  WarpMatrices& matrices() const {
    return state().matrices[(first_ - state().fibers.data()) / kWarp];
  }

  // True once per meeting, for the lane that goes on first.
  bool is_first(WarpMatrices& m) const {
    const bool first = m.exchange != count_;
    m.exchange = count_;
    return first;
  }

 private:
  Fiber *self_, *first_;
  unsigned count_;
};

// Offers a value to the warp and waits for it. The two buffers make one barrier enough: whoever
// writes one again has met all who still had to read it.
template <typename T>
Meeting meet(const T& value, const char* file, int line) {
  static_assert(sizeof(T) <= kOffered);
  Fiber* self = state().current;
  const unsigned count = ++self->exchanges;
  std::memcpy(self->offered[count & 1], &value, sizeof(T));
  wait(Wait::kWarp, file, line);
  return {self, count};
}

inline void check_mask(unsigned mask, const char* file, int line) {
  if (mask != 0xffffffffu) abort_with("only full warps are supported", file, line);
}

// What lane `source(lane)` offers.
template <typename T, typename Source>
T exchange(unsigned mask, T value, Source source, const char* file, int line) {
  check_mask(mask, file, line);
  const Meeting warp = meet(value, file, line);
  const int other = source(warp.lane());
  return other < warp.lanes() ? warp.template offered<T>(other) : value;
}

// Lanes without a partner keep their own value.
inline int shifted(int lane, int by) {
  return lane + by >= 0 && lane + by < kWarp ? lane + by : lane;
}

inline unsigned ballot(unsigned mask, bool vote, const char* file, int line) {
  check_mask(mask, file, line);
  const Meeting warp = meet(static_cast<int>(vote), file, line);
  unsigned votes = 0;
  for (int lane = 0; lane < warp.lanes(); ++lane) {
    votes |= static_cast<unsigned>(warp.offered<int>(lane) != 0) << lane;
  }
  return votes;
}

inline void start_copy(void* to, const void* from) {
  Fiber* self = state().current;
  for (const void* pointer : {static_cast<const void*>(to), from}) {
    if (reinterpret_cast<uintptr_t>(pointer) % kCopied) abort_with("cp.async off 16 bytes", "", 0);
  }
  std::memset(to, 0xff, kCopied);
  self->copies.push_back({static_cast<unsigned char*>(to),
                          static_cast<const unsigned char*>(from), self->groups});
}

inline void commit_copies() { ++state().current->groups; }

inline void finish_copies(unsigned pending) {
  Fiber* self = state().current;
  std::vector<Copy> later;
  for (const Copy& copy : self->copies) {
    if (copy.group + pending >= self->groups) {
      later.push_back(copy);
    } else if (copy.from == nullptr) {
      std::memset(copy.to, 0, kCopied);
    } else {
      std::memcpy(copy.to, copy.from, kCopied);
    }
  }
  self->copies.swap(later);
}

}  // namespace cuda_on_cpu
