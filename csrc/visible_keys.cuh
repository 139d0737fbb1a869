// Which query rows a block works on, and which keys they see.

#pragma once

#include "softmax_forward.h"

namespace attnvariants {

// [low, high).
struct Range {
  int low, high;
};

// A tile of queries of one head and sequence.
struct QueryTile {
  int tile, batch, head, kv_head;
  int left, right;    // of the head's band
  int start;          // first token of the sequence
  int queries, keys;  // its lengths
  int first, count;   // rows of the tile in it; none where count <= 0
};

// The keys that row `row` of a tile sees. Both ends grow with the row. Rows beyond the last one see
// what that one sees.
__device__ __forceinline__ Range visible_keys(
    const SoftmaxForward& p, const QueryTile& t, int row) {
  // The last query is at the last key.
  const int position = t.first + min(row, t.count - 1) + t.keys - t.queries;
  int low = max(position - t.left + 1, 0), end = t.keys;
  if (p.block > 0) {
    low = position / p.block * p.block;
    end = min(low + p.block, end);
  }
  return {low, min(position + t.right + 1, end)};
}

// Blocks start in the order of their number: section by section, in each the last tiles first,
// which see most keys where queries see those before them.
__device__ __forceinline__ void find_head(const SoftmaxForward& p, unsigned block, QueryTile& t) {
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
  t.tile = static_cast<int>(tiles - 1 - rest / width);
  t.batch = static_cast<int>(index / group % p.batch);
  t.kv_head = p.bands[low].head + rank - p.bands[low].first;
  t.head = t.kv_head * group + static_cast<int>(index % group);
  t.left = p.bands[low].left;
  t.right = p.bands[low].right;
}

// Sequence n has room for its tiles from tile cu_seqlens[n] / kRows + n on. It never takes more,
// so that a tile's sequence is found without counting the tiles of those before it. Tiles that no
// sequence takes start beyond the end of one.
template <int kRows>
__device__ __forceinline__ void find_rows(const SoftmaxForward& p, QueryTile& t) {
  t.start = 0;
  t.queries = p.queries;
  t.keys = p.keys;
  int tile = t.tile;
  if (p.cu_seqlens != nullptr) {
    int low = 0, high = p.sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (p.cu_seqlens[middle] / kRows + middle <= tile) low = middle;
      else high = middle;
    }
    t.start = p.cu_seqlens[low];
    t.queries = min(p.cu_seqlens[low + 1], p.queries) - t.start;
    t.keys = t.queries;
    tile -= t.start / kRows + low;
    if (t.start < 0 || tile < 0) tile = t.queries = 0;  // no bounds of sequences: touch nothing
  }
  t.first = tile * kRows;
  t.count = min(t.queries - t.first, kRows);
}

}  // namespace attnvariants
