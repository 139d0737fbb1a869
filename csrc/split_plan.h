// How many parts the keys of every head are cut into.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace attnvariants {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles per part, the same for all heads, so that heads have parts in proportion to their tiles.
// It makes the shortest schedule of `parallel` blocks per part on a device that runs `resident`
// blocks at once, where a part costs one tile more than it has.
inline int64_t tiles_per_part(
    const std::vector<int64_t>& tiles, int64_t parallel, int64_t resident) {
  // Neighbouring heads are often alike, and sizes that give as many parts are not worth a look.
  const int64_t largest = *std::max_element(tiles.begin(), tiles.end());
  std::vector<std::pair<int64_t, int64_t>> kinds;  // tiles, heads
  for (int64_t n : tiles) {
    auto same =
        std::find_if(kinds.begin(), kinds.end(), [n](auto& kind) { return kind.first == n; });
    if (same == kinds.end()) kinds.emplace_back(n, 1);
    else ++same->second;
  }
  int64_t best = largest, best_cost = INT64_MAX;
  for (int64_t parts = 1; parts <= largest; ++parts) {
    const int64_t size = ceil_div(largest, parts);
    if (parts > 1 && size == ceil_div(largest, parts - 1)) continue;
    int64_t blocks = 0;
    for (auto& [n, heads] : kinds) blocks += parallel * heads * ceil_div(n, size);
    const int64_t cost = ceil_div(blocks, resident) * (size + 1);
    if (cost < best_cost) {
      best = size;
      best_cost = cost;
    }
    if (blocks > 4 * resident && parts > 1) break;  // smaller ones only add to the overhead
  }
  return best;
}

// Heads in the order in which their parts should start: the longest first.
inline std::vector<int> longest_first(
    const std::vector<int64_t>& tiles, const std::vector<int64_t>& parts) {
  std::vector<int> order(tiles.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return tiles[a] * parts[b] > tiles[b] * parts[a];
  });
  return order;
}

}  // namespace attnvariants
