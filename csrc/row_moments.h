// Moments of the columns of a matrix, and constants a column: the walk across channels.
#pragma once

#include <vector>

#include "channel_norm.h"
#include "moments.h"

namespace normally {

// Rows that are walked down while a tile of columns stays in registers, and whose float sums are
// then added to double ones: few, so that an outlier's square does not swallow what comes after it.
inline constexpr int64_t kRowTile = 32;
// Columns from which on a row is walked by itself.
inline constexpr int64_t kWideRow = 512;
// Rows that share one shift.
inline constexpr int64_t kRowMerge = 512;

// The columns of one channel in a row walk: `inner` neighbours, again every `stride` columns.
struct ChannelColumns {
  int64_t first, inner, stride, width;

  template <typename Function>
  void each(Function&& function) const {
    for (int64_t j = first; j < width; j += stride) {
      for (int64_t i = 0; i < inner; ++i) function(j + i);
    }
  }
};

// function(channel, columns) for the channels whose columns start in [begin, end) of the first row.
template <typename Function>
inline void for_channels_of(const RowWalk& walk, const Geometry& g, int64_t begin, int64_t end,
                            Function&& function) {
  const int64_t stride = g.channels * g.inner;
  // A group is a part of an unfolded row, made of whole channels, or all of a folded one.
  for (int64_t c = begin / g.inner; c < std::min(end, stride) / g.inner; ++c) {
    function(c, ChannelColumns{c * g.inner, g.inner, stride, walk.width});
  }
}

// The three constants of every column, padded to whole vectors.
template <typename F>
struct RowAffine {
  std::vector<F> hi, scale, offset;

  explicit RowAffine(int64_t width) : hi(width + 16), scale(width + 16), offset(width + 16) {}

  void set(const ChannelColumns& columns, const Affine<F>& a) {
    columns.each([&](int64_t j) { hi[j] = a.hi, scale[j] = a.scale, offset[j] = a.offset; });
  }
};

// Shift and shifted sums of a group of columns, reused from chunk to chunk.
template <typename F>
struct RowScratch {
  std::vector<F> shift;
  std::vector<double> s1, s2;
  explicit RowScratch(int64_t columns) : shift(columns + 16), s1(columns), s2(columns) {}
};

// Mean and m2 of every column in every segment of rows.
struct RowMoments {
  int64_t width;
  std::vector<double> mean, m2;

  RowMoments(int64_t segments, int64_t columns)
      : width(columns), mean(segments * columns), m2(segments * columns) {}

  // Columns [begin, end) of segment `s`.
  template <typename T>
  void take(const T* x, const RowWalk& walk, int64_t s, int64_t begin, int64_t end,
            RowScratch<Compute<T>>& scratch) {
    const int64_t row_begin = walk.segment_begin(s), row_end = walk.segment_begin(s + 1);
    double* segment_mean = mean.data() + s * width + begin;
    double* segment_m2 = m2.data() + s * width + begin;
    const int64_t columns = end - begin;
    double count = 0;
    for (int64_t row = row_begin, next; row < row_end; row = next) {
      next = std::min(row + kRowMerge, row_end);
      choose_shift(x, walk, row, next, begin, end, count > 0 ? segment_mean : nullptr, scratch);
      add_rows(x, walk.width, row, next, begin, end, scratch);
      const double rows = static_cast<double>(next - row), share = rows / (count + rows);
      for (int64_t j = 0; j < columns; ++j) {
        const double offset = scratch.s1[j] / rows;
        const double chunk_m2 = scratch.s2[j] - scratch.s1[j] * offset;
        const double delta = static_cast<double>(scratch.shift[j]) + offset - segment_mean[j];
        segment_mean[j] += delta * share;
        segment_m2[j] += (chunk_m2 < 0 ? 0 : chunk_m2) + delta * delta * count * share;
      }
      count += rows;
    }
  }

  Moments merged(const RowWalk& walk, const ChannelColumns& columns) const {
    Moments total;
    for (int64_t s = 0; s < walk.segments; ++s) {
      const double rows = static_cast<double>(walk.segment_begin(s + 1) - walk.segment_begin(s));
      columns.each([&](int64_t j) { total.merge({rows, mean[s * width + j], m2[s * width + j]}); });
    }
    return total;
  }

 private:
  // The mean so far, or else of the first eighth of these rows, 16 to 64: taken relative to the
  // first, so that equal values give exactly themselves, and of so many that an outlier among them
  // cannot spoil it.
  template <typename T>
  static void choose_shift(const T* x, const RowWalk& walk, int64_t row, int64_t row_end,
                           int64_t begin, int64_t end, const double* mean_so_far,
                           RowScratch<Compute<T>>& scratch) {
    using F = Compute<T>;
    const int64_t columns = end - begin;
    if (mean_so_far) {
      for (int64_t j = 0; j < columns; ++j) scratch.shift[j] = static_cast<F>(mean_so_far[j]);
      return;
    }
    const T* first = x + row * walk.width + begin;
    for (int64_t j = 0; j < columns; ++j) scratch.shift[j] = static_cast<F>(first[j]);
    const int64_t rows = row_end - row;
    const int64_t sample = std::min(rows, std::clamp<int64_t>(rows / 8, 16, 64));
    add_rows(x, walk.width, row, row + sample, begin, end, scratch);
    for (int64_t j = 0; j < columns; ++j) {
      scratch.shift[j] += static_cast<F>(scratch.s1[j] / static_cast<double>(sample));
    }
  }

  template <int kVectors, bool kWhole, typename T, typename F = Compute<T>>
  static void add_columns(const T* x, int64_t width, int64_t rows, int64_t count, const F* shift,
                          double* s1, double* s2) {
    constexpr int64_t kWidth = kLanes<T>;
    Vec<F> centre[kVectors], a[kVectors], b[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      centre[k] = load(shift + k * kWidth);
      a[k] = b[k] = Vec<F>{};
    }
    for (int64_t row = 0; row < rows; ++row, x += width) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        const Vec<F> value = kWhole ? load(x + k * kWidth) : load_first(x, static_cast<int>(count));
        const Vec<F> d = value - centre[k];
        a[k] += d;
        b[k] += d * d;
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      add_wide<F>(s1 + k * kWidth, a[k], kWhole ? kWidth : count);
      add_wide<F>(s2 + k * kWidth, b[k], kWhole ? kWidth : count);
    }
  }

  // Shifted sums of columns [begin, end) over rows [row_begin, row_end).
  template <typename T, typename F = Compute<T>>
  static void add_rows(const T* x, int64_t width, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end, RowScratch<F>& scratch) {
    constexpr int64_t kWidth = kLanes<T>;
    constexpr int kTile = kVectorBytes == 64 ? 8 : 4;
    std::fill(scratch.s1.begin(), scratch.s1.end(), 0.0);
    std::fill(scratch.s2.begin(), scratch.s2.end(), 0.0);
    for (int64_t row = row_begin; row < row_end; row += kRowTile) {
      const int64_t rows = std::min(kRowTile, row_end - row);
      const T* start = x + row * width + begin;
      const F* shift = scratch.shift.data();
      double *s1 = scratch.s1.data(), *s2 = scratch.s2.data();
      const int64_t columns = end - begin;
      int64_t j = 0;
      for (; j + kTile * kWidth <= columns; j += kTile * kWidth) {
        add_columns<kTile, true>(start + j, width, rows, 0, shift + j, s1 + j, s2 + j);
      }
      for (; j + kWidth <= columns; j += kWidth) {
        add_columns<1, true>(start + j, width, rows, 0, shift + j, s1 + j, s2 + j);
      }
      if (j < columns) {
        add_columns<1, false>(start + j, width, rows, columns - j, shift + j, s1 + j, s2 + j);
      }
    }
  }
};

}  // namespace normally
