// The order in which heads are worked on, decided by the host.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "softmax_forward.h"
#include "split_plan.h"

namespace attnvariants {

// The number of bands that `windows` take, one per KV head.
inline int count_bands(const int64_t* windows, int kv_heads) {
  int count = 1;
  for (int head = 1; head < kv_heads; ++head) count += windows[head] != windows[head - 1];
  return count;
}

// Heads in bands of one window, those that see most first.
inline void fill_bands(SoftmaxForward& call, const int64_t* windows) {
  std::vector<Band> bands;
  std::vector<int> counts, order;
  for (int head = 0; head < call.kv_heads; ++head) {
    if (head > 0 && windows[head] == windows[head - 1]) {
      ++counts.back();
      continue;
    }
    const bool limited = windows[head] != kUnlimited;
    const int left = static_cast<int>(limited ? std::min<int64_t>(windows[head], kFar) : kFar);
    // A head with a window is causal, whatever the others are.
    bands.push_back({0, head, left, call.causal || limited ? 0 : kFar});
    counts.push_back(1);
  }
  order.resize(bands.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return bands[a].left > bands[b].left; });
  int first = 0;
  call.num_bands = 0;
  for (int i : order) {
    call.bands[call.num_bands] = bands[i];
    call.bands[call.num_bands++].first = first;
    first += counts[i];
  }
  call.bands[call.num_bands] = {first, 0, 0, 0};
}

// Heads that go through their tiles together: as many as the L2 cache has room for the keys and
// values of. With several windows it is one KV head, so that the heads that see most come first,
// and those that see little fill the gaps that they leave on the device.
inline int heads_of_a_section(const SoftmaxForward& call, Dtype dtype) {
  const int64_t heads = int64_t{call.batch} * call.heads, group = call.heads / call.kv_heads;
  if (call.num_bands > 1) return static_cast<int>(heads / call.kv_heads);
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t bytes = ceil_div(call.keys, group) * size * (call.key_dim + call.value_dim);
  return static_cast<int>(std::clamp<int64_t>((32 << 20) / bytes, 1, heads));
}

}  // namespace attnvariants
