// Which query rows a block works on, and which keys they see.

#pragma once

#include "softmax_forward.h"
#include "softmax_rows.cuh"

namespace attnvariants {

// A tile of one head of one batch entry.
struct Place {
  int tile, batch, head, kv_head;
  int left, right;  // of the head's band
};

// Blocks start in the order of their number: section by section, in each the last tiles first,
// which see most keys where queries see those before them.
__device__ __forceinline__ Place find_place(const SoftmaxForward& p, unsigned block) {
  const int group = p.heads / p.kv_heads;
  const unsigned heads = static_cast<unsigned>(p.batch) * p.heads;
  const unsigned tiles = p.tiles, section = p.section;
  const unsigned first = block / (section * tiles) * section;
  const unsigned width = min(section, heads - first), rest = block % (section * tiles);
  const unsigned index = first + rest % width;
  const int rank = static_cast<int>(index / group / p.batch);
  int low = 0, high = p.num_bands;  // first of low <= rank < first of high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.bands[middle].first <= rank) low = middle;
    else high = middle;
  }
  Place place;
  place.tile = static_cast<int>(tiles - 1 - rest / width);
  place.batch = static_cast<int>(index / group % p.batch);
  place.kv_head = p.bands[low].head + rank - p.bands[low].first;
  place.head = place.kv_head * group + static_cast<int>(index % group);
  place.left = p.bands[low].left;
  place.right = p.bands[low].right;
  return place;
}

// The sequence of a tile: its first token, its lengths, and the tile's first row in it.
struct Rows {
  int start, queries, keys, first;
};

// Sequence n has room for its tiles from tile cu_seqlens[n] / kRows + n on. It never takes more,
// so that a tile's sequence is found without counting the tiles of those before it. Tiles that no
// sequence takes start beyond the end of one.
template <int kRows>
__device__ __forceinline__ Rows find_rows(const SoftmaxForward& p, int tile) {
  if (p.cu_seqlens == nullptr) return {0, p.queries, p.keys, tile * kRows};
  int low = 0, high = p.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.cu_seqlens[middle] / kRows + middle <= tile) low = middle;
    else high = middle;
  }
  const int start = p.cu_seqlens[low], end = min(p.cu_seqlens[low + 1], p.queries);
  tile -= start / kRows + low;
  if (start < 0 || tile < 0) return {0, 0, 0, 0};  // no bounds of sequences: touch nothing
  return {start, end - start, end - start, tile * kRows};
}

// The keys that a query sees; see Range. Both ends grow with the query's row.
__device__ __forceinline__ Range visible_keys(
    const SoftmaxForward& p, const Place& place, const Rows& rows, int row) {
  const int position = row + rows.keys - rows.queries;  // the last query is at the last key
  int low = max(position - place.left + 1, 0), end = rows.keys;
  if (p.block > 0) {
    low = position / p.block * p.block;
    end = min(low + p.block, end);
  }
  return {low, min(position + place.right + 1, end)};
}

}  // namespace attnvariants
