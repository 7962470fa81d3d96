// How a dense tensor lies in memory around its channel dimension, and how the kernels walk it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace normally {

// A dense tensor is (outer, channels, inner) in memory whatever the order of its other dimensions:
// contiguous is (N, C, H·W), channels_last is (N·H·W, C, 1).
struct Geometry {
  int64_t outer, channels, inner;

  int64_t numel() const { return outer * channels * inner; }
  int64_t per_channel() const { return outer * inner; }
};

// Up to this many elements a channel's rows are too short for vectors of their own, and the tensor
// is walked as rows across all channels. _ops/bits.py has the same number.
inline constexpr int64_t kMaxShortRow = 8;

inline bool walks_rows(const Geometry& g) { return g.inner <= kMaxShortRow; }

// Values that enter one float sum before it is merged in double.
inline constexpr int64_t kChunk = 4096;

// Statistics of one channel are cut into this many segments at most, for threads to share. The cut
// depends on the shape alone, so the sums have the same bits for any number of threads.
inline constexpr int64_t kMaxSegments = 64;

// Rows across channels that are worth a segment of their own, each with its own shift.
inline constexpr int64_t kMinSegmentRows = 128;

// Below this many elements a second thread costs more than it saves.
inline constexpr int64_t kSerialElements = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The walk of one channel, `outer` rows of `inner` values: chunks of whole rows, or of pieces of
// one row, and segments of chunks.
struct ChannelWalk {
  int64_t rows_per_chunk, pieces, piece, chunks, segments;

  explicit ChannelWalk(const Geometry& g) {
    pieces = ceil_div(g.inner, kChunk);
    piece = ceil_div(ceil_div(g.inner, pieces), 64) * 64;
    pieces = ceil_div(g.inner, piece);
    rows_per_chunk = pieces > 1 ? 1 : std::max<int64_t>(1, kChunk / g.inner);
    chunks = ceil_div(g.outer, rows_per_chunk) * pieces;
    segments = std::clamp<int64_t>(kMaxSegments / g.channels, 1, chunks);
  }

  int64_t segment_begin(int64_t segment) const { return segment * chunks / segments; }
};

// A chunk: rows [row, row_end) and in each the values [begin, begin + count).
struct Chunk {
  int64_t row, row_end, begin, count;

  Chunk(const ChannelWalk& walk, const Geometry& g, int64_t index) {
    row = index / walk.pieces * walk.rows_per_chunk;
    row_end = std::min(row + walk.rows_per_chunk, g.outer);
    begin = index % walk.pieces * walk.piece;
    count = std::min(walk.piece, g.inner - begin);
  }
  int64_t values() const { return (row_end - row) * count; }
};

// How many neighbouring channels to walk together: enough that what lies side by side in memory is
// a few KB, few enough that their slabs stay in the second-level cache.
inline constexpr int64_t kMaxBlock = 16;

inline int64_t channel_block(const Geometry& g, int64_t item, int64_t threads) {
  const int64_t run = g.inner * item;
  int64_t block = std::clamp<int64_t>(4096 / run, 1, kMaxBlock);
  while (block > 1 && (block * run * g.outer > (int64_t{512} << 10) ||
                       ceil_div(g.channels, block) < 4 * threads)) {
    --block;
  }
  return block;
}

// The walk across channels, as a matrix of `rows` by `width` whose column j belongs to channel
// j / inner % channels. Several short rows are taken as one wide row when that fills the vectors.
struct RowWalk {
  int64_t rows, width, group, segments;

  RowWalk(const Geometry& g, int64_t lanes, int64_t item, bool whole_bytes) {
    int64_t fold = 1;
    width = g.channels * g.inner;
    rows = g.outer;
    const bool foldable = !whole_bytes || width % 8 == 0;
    while (foldable && rows % 2 == 0 && fold < 64 && width % (4 * lanes) != 0 && width < 512) {
      fold *= 2, width *= 2, rows /= 2;
    }
    // Columns in groups whose slab stays in the second-level cache between the two sweeps; where
    // that is impossible, leaves too few groups or would part the copies of a folded channel, one
    // group, and rows cut into segments.
    const int64_t unit = 64 * g.inner;  // whole channels, whole vectors
    group = ((int64_t{384} << 10) / std::max<int64_t>(1, rows * item)) / unit * unit;
    if (fold > 1 || group < unit || ceil_div(width, group) < 8) group = width;
    segments = group < width ? 1 : std::clamp<int64_t>(rows / kMinSegmentRows, 1, kMaxSegments);
  }

  // All columns, all rows, one after the other.
  RowWalk(int64_t all_rows, int64_t columns)
      : rows(all_rows), width(columns), group(columns), segments(1) {}

  int64_t groups() const { return width == 0 ? 0 : ceil_div(width, group); }
  int64_t segment_begin(int64_t segment) const { return segment * rows / segments; }
};

}  // namespace normally
