// Batch norm backward, with the activation's derivative recomputed from the input.
//
//   g  = dy · act'(z)                     z = x̂ · weight + bias + residual
//   dx = weight · rstd · (g - mean(g) - x̂ · mean(g · x̂))      the means only in training
//
// First sweep: Σg and Σg·(x - mean). Second sweep, backwards through what is still cached: dx.
#include <cmath>
#include <vector>

#include "activation.h"
#include "batch_norm.h"
#include "mask.h"
#include "pages.h"
#include "parallel.h"
#include "row_moments.h"

namespace normally {
namespace {

struct Sums {
  double g = 0, gx = 0;  // Σg and Σg·(x - mean)
};

// dx = g · scale - (constant + (x - mean) · slope)
template <typename F>
struct Slope {
  F constant, slope;
};

inline Sums sums_of(const std::vector<Sums>& parts, int64_t segments, int64_t channels, int64_t c) {
  Sums total;
  for (int64_t s = 0; s < segments; ++s) {
    total.g += parts[s * channels + c].g;
    total.gx += parts[s * channels + c].gx;
  }
  return total;
}

template <typename T>
Slope<Compute<T>> slope_of(const BackwardCall<T>& call, const Sums& sums, double rstd, int64_t c) {
  using F = Compute<T>;
  if (call.dbias) call.dbias[c] = sums.g;
  if (call.dweight) call.dweight[c] = sums.gx * rstd;
  if (!call.training) return {F(0), F(0)};
  const double m = static_cast<double>(call.geometry.per_channel());
  const double scale = rstd * (call.weight ? static_cast<double>(call.weight[c]) : 1.0);
  return {static_cast<F>(scale * sums.g / m),
          static_cast<F>(scale * rstd * rstd * sums.gx / (m - static_cast<double>(call.correction)))};
}

// Float sums of one channel, kept over the rows of a chunk.
template <typename F>
struct RowSums {
  static constexpr int kChains = 2;
  Vec<F> g[kChains] = {}, gx[kChains] = {};
  Sums total() const { return {sum<F>(g[0] + g[1]), sum<F>(gx[0] + gx[1])}; }
};

// What differs between activations; the walks below are compiled once a type.
template <typename T>
struct BackwardKernel {
  using F = Compute<T>;
  virtual void sum_chunk_row(int64_t row, int64_t begin, int64_t count, const Affine<F>& a,
                             RowSums<F>& sums) const = 0;
  virtual void dx_chunk_row(int64_t row, int64_t begin, int64_t count, const Affine<F>& a,
                            const Slope<F>& s) const = 0;
  virtual void sum_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin,
                        int64_t end, const RowAffine<F>& a, RowScratch<F>& scratch) const = 0;
  virtual void dx_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end, const RowAffine<F>& a, const F* constant,
                       const F* slope) const = 0;

 protected:
  ~BackwardKernel() = default;
};

template <typename T, typename Act, bool kMask>
struct Gradient final : BackwardKernel<T> {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  const BackwardCall<T>& call;
  const F p = static_cast<F>(call.act_param);
  const bool stream = worth_streaming(call.geometry.numel() * static_cast<int64_t>(sizeof(T)));

  explicit Gradient(const BackwardCall<T>& backward_call) : call(backward_call) {}

  template <bool kWhole>
  static Vec<F> get(const T* at, int count) {
    return kWhole ? load(at) : load_first(at, count);
  }

  // g at element `at` of memory, bit `i` of the mask's row.
  template <bool kWhole>
  Vec<F> g(Vec<F> centred, Vec<F> scale, Vec<F> offset, int64_t at, const uint8_t* mask, int64_t i,
           int count) const {
    const Vec<F> dy = get<kWhole>(call.dy + at, count);
    if constexpr (kMask) {
      const Bits<F> passes = from_bits<F>(read_bits<T>(mask, i, count));
      if constexpr (std::is_same_v<Act, LeakyRelu>) return select<F>(passes, dy, dy * p);
      return select<F>(passes, dy, Vec<F>{});
    } else if constexpr (std::is_same_v<Act, Identity>) {
      return dy;
    } else {
      Vec<F> z = centred * scale + offset;
      if (call.residual) z += get<kWhole>(call.residual + at, count);
      return Act::template gradient<F>(dy, z, p);
    }
  }

  template <bool kWhole>
  void put(T* at, Vec<F> value, int count) const {
    if constexpr (kWhole) {
      store(at, value);
    } else {
      store_first(at, value, count);
    }
  }

  // One vector of the first sweep.
  template <bool kWhole>
  void sum_vector(const Vec<F>& hi, const Vec<F>& lo, const Vec<F>& scale, const Vec<F>& offset,
                  int64_t at, const uint8_t* mask, int64_t i, int count, Vec<F>& sg,
                  Vec<F>& sgx) const {
    Vec<F> centred = get<kWhole>(call.x + at, count) - hi - lo;
    Vec<F> value = g<kWhole>(centred, scale, offset, at, mask, i, count);
    if constexpr (!kWhole) {
      const Bits<F> inside = lane_numbers<F>() < count;
      value = select<F>(inside, value, Vec<F>{});
      centred = select<F>(inside, centred, Vec<F>{});
    }
    sg += value;
    sgx += value * centred;
    if (call.g) put<kWhole>(call.g + at, value, count);
  }

  // One vector of the second sweep.
  template <bool kWhole>
  void dx_vector(const Vec<F>& hi, const Vec<F>& lo, const Vec<F>& scale, const Vec<F>& offset,
                 const Vec<F>& constant, const Vec<F>& slope, int64_t at, const uint8_t* mask,
                 int64_t i, int count, bool streams) const {
    const Vec<F> centred = get<kWhole>(call.x + at, count) - hi - lo;
    Vec<F> value = g<kWhole>(centred, scale, offset, at, mask, i, count);
    value = value * scale - (centred * slope + constant);
    if constexpr (!kWhole) {
      store_first(call.dx + at, value, count);
    } else if (streams) {
      store_streaming(call.dx + at, value);
    } else {
      store(call.dx + at, value);
    }
  }

  // --- a row of one channel ---------------------------------------------------------------

  void sum_row(int64_t at, const uint8_t* mask, int64_t count, const Affine<F>& a,
               RowSums<F>& sums) const {
    const Vec<F> hi = splat(a.hi), lo = splat(a.lo), scale = splat(a.scale), offset = splat(a.offset);
    RowSums<F> local = sums;
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int64_t j = i + k * kWidth;
        sum_vector<true>(hi, lo, scale, offset, at + j, mask, j, kWidth, local.g[k], local.gx[k]);
      }
    }
    if (i + kWidth <= count) {
      sum_vector<true>(hi, lo, scale, offset, at + i, mask, i, kWidth, local.g[0], local.gx[0]);
      i += kWidth;
    }
    if (i < count) {
      sum_vector<false>(hi, lo, scale, offset, at + i, mask, i, static_cast<int>(count - i),
                        local.g[1], local.gx[1]);
    }
    sums = local;
  }

  const uint8_t* mask_at(int64_t row, int64_t begin) const {
    return kMask ? call.mask + row * mask_row_bytes(call.geometry) + begin / 8
                                    : nullptr;
  }

  void sum_chunk_row(int64_t row, int64_t begin, int64_t count, const Affine<F>& a,
                     RowSums<F>& sums) const override {
    sum_row(row * call.geometry.inner + begin, mask_at(row, begin), count, a, sums);
  }

  void dx_chunk_row(int64_t row, int64_t begin, int64_t count, const Affine<F>& a,
                    const Slope<F>& s) const override {
    const Vec<F> hi = splat(a.hi), lo = splat(a.lo), scale = splat(a.scale), offset = splat(a.offset);
    const Vec<F> constant = splat(s.constant), slope = splat(s.slope);
    const int64_t at = row * call.geometry.inner + begin;
    const uint8_t* mask = mask_at(row, begin);
    const bool streams = stream && call.dy != call.dx && is_aligned(call.dx + at);
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + kWidth <= count; i += kWidth) {
      dx_vector<true>(hi, lo, scale, offset, constant, slope, at + i, mask, i, kWidth, streams);
    }
    if (i < count) {
      dx_vector<false>(hi, lo, scale, offset, constant, slope, at + i, mask, i,
                       static_cast<int>(count - i), false);
    }
  }

  // --- rows across channels -----------------------------------------------------------------

  struct ColumnConstants {
    Vec<F> hi, lo, scale, offset;
    ColumnConstants() = default;
    ColumnConstants(const RowAffine<F>& a, int64_t column)
        : hi(load(a.hi.data() + column)), lo(load(a.lo.data() + column)),
          scale(load(a.scale.data() + column)), offset(load(a.offset.data() + column)) {}
  };

  template <int kVectors, bool kWhole>
  void sum_columns(int64_t width, int64_t row_begin, int64_t row_end, int64_t column, int count,
                   const RowAffine<F>& a, F* sg, F* sgx) const {
    ColumnConstants constants[kVectors];
    Vec<F> g_sum[kVectors], gx_sum[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      constants[k] = ColumnConstants(a, column + k * kWidth);
      g_sum[k] = load(sg + k * kWidth);
      gx_sum[k] = load(sgx + k * kWidth);
    }
    const int64_t mask_row = (width + 7) / 8;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint8_t* mask = kMask ? call.mask + row * mask_row : nullptr;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const int64_t j = column + k * kWidth;
        const ColumnConstants& c = constants[k];
        sum_vector<kWhole>(c.hi, c.lo, c.scale, c.offset, row * width + j, mask, j,
                           kWhole ? kWidth : count, g_sum[k], gx_sum[k]);
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      store(sg + k * kWidth, g_sum[k]);
      store(sgx + k * kWidth, gx_sum[k]);
    }
  }

  template <int kVectors, bool kWhole>
  void dx_columns(int64_t width, int64_t row_begin, int64_t row_end, int64_t column, int count,
                  const RowAffine<F>& a, const F* constant, const F* slope, bool streams) const {
    ColumnConstants constants[kVectors];
    Vec<F> constant_of[kVectors], slope_of[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      constants[k] = ColumnConstants(a, column + k * kWidth);
      constant_of[k] = load(constant + column + k * kWidth);
      slope_of[k] = load(slope + column + k * kWidth);
    }
    const int64_t mask_row = (width + 7) / 8;
    for (int64_t row = row_end - 1; row >= row_begin; --row) {
      const uint8_t* mask = kMask ? call.mask + row * mask_row : nullptr;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const int64_t j = column + k * kWidth;
        const ColumnConstants& c = constants[k];
        dx_vector<kWhole>(c.hi, c.lo, c.scale, c.offset, constant_of[k], slope_of[k],
                          row * width + j, mask, j, kWhole ? kWidth : count, streams);
      }
    }
  }

  static constexpr int kTile = kVectorBytes == 64 ? 4 : 2;

  // Rows [row_begin, row_end), at most kRowChunk: adds to the float sums of columns [begin, end).
  void sum_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                const RowAffine<F>& a, RowScratch<F>& scratch) const override {
    std::fill(scratch.s1.begin(), scratch.s1.end(), F(0));
    std::fill(scratch.s2.begin(), scratch.s2.end(), F(0));
    for (int64_t row = row_begin; row < row_end; row += kRowTile) {
      const int64_t next = std::min(row + kRowTile, row_end);
      F *sg = scratch.s1.data() - begin, *sgx = scratch.s2.data() - begin;
      int64_t j = begin;
      for (; j + kTile * kWidth <= end; j += kTile * kWidth) {
        sum_columns<kTile, true>(width, row, next, j, 0, a, sg + j, sgx + j);
      }
      for (; j + kWidth <= end; j += kWidth) {
        sum_columns<1, true>(width, row, next, j, 0, a, sg + j, sgx + j);
      }
      if (j < end) {
        sum_columns<1, false>(width, row, next, j, static_cast<int>(end - j), a, sg + j, sgx + j);
      }
    }
  }

  void dx_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
               const RowAffine<F>& a, const F* constant, const F* slope) const override {
    const bool streams =
        stream && call.dy != call.dx && is_aligned(call.dx) && width % kWidth == 0;
    for (int64_t tile_end = row_end; tile_end > row_begin; tile_end -= kRowTile) {
      const int64_t tile = std::max(tile_end - kRowTile, row_begin);
      int64_t j = begin;
      for (; j + kTile * kWidth <= end; j += kTile * kWidth) {
        dx_columns<kTile, true>(width, tile, tile_end, j, 0, a, constant, slope, streams);
      }
      for (; j + kWidth <= end; j += kWidth) {
        dx_columns<1, true>(width, tile, tile_end, j, 0, a, constant, slope, streams);
      }
      if (j < end) {
        dx_columns<1, false>(width, tile, tile_end, j, static_cast<int>(end - j), a, constant, slope,
                             false);
      }
    }
  }
};

// A channel beyond the range of float, in double, value by value.
template <typename T>
void backward_extreme(const BackwardCall<T>& call, int64_t c) {
  const Geometry& geometry = call.geometry;
  const double mean = call.mean[c], rstd = rstd_of(call, call.var[c]);
  const double scale = rstd * (call.weight ? static_cast<double>(call.weight[c]) : 1.0);
  const double offset = call.bias ? static_cast<double>(call.bias[c]) : 0.0;
  const auto each = [&](auto&& function) {
    for (int64_t o = 0; o < geometry.outer; ++o) {
      for (int64_t i = 0; i < geometry.inner; ++i) {
        const int64_t at = (o * geometry.channels + c) * geometry.inner + i;
        const double centred = static_cast<double>(call.x[at]) - mean;
        double g = static_cast<double>(call.dy[at]);
        if (call.mask) {
          const uint8_t* row = call.mask + mask_row_begin(geometry, o, c);
          if (!read_bit(row, mask_column(geometry, c, i))) g *= call.act_param;
        } else {
          double z = centred * scale + offset;
          if (call.residual) z += static_cast<double>(call.residual[at]);
          g = activation_gradient(call.act, g, z, call.act_param);
        }
        function(at, centred, g);
      }
    }
  };
  Sums sums;
  each([&](int64_t, double centred, double g) { sums.g += g, sums.gx += g * centred; });
  const double m = static_cast<double>(geometry.per_channel());
  if (call.dbias) call.dbias[c] = sums.g;
  if (call.dweight) call.dweight[c] = sums.gx * rstd;
  each([&](int64_t at, double centred, double g) {
    if (call.dresidual) call.dresidual[at] = static_cast<T>(static_cast<Compute<T>>(g));
    double dx = g;
    if (call.training) {
      dx -= sums.g / m +
            centred * rstd * (rstd * sums.gx / (m - static_cast<double>(call.correction)));
    }
    if (call.dx) call.dx[at] = static_cast<T>(static_cast<Compute<T>>(dx * scale));
  });
}

// The kernels of the two sweeps; the first is null where nothing needs it.
template <typename T>
struct Sweeps {
  const BackwardKernel<T>* first;
  const BackwardKernel<T>* second;
};

template <typename T>
void backward_planes(const BackwardCall<T>& call, const Sweeps<T>& sweeps) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const ChannelWalk walk(g);
  const int64_t threads = thread_count();
  const bool serial = g.numel() < kSerialElements || threads == 1;
  const int64_t block = channel_block(g, 2 * sizeof(T), threads);
  const int64_t blocks = ceil_div(g.channels, block);
  std::vector<Sums> parts(g.channels * walk.segments);
  std::vector<Slope<F>> slopes(g.channels);
  const auto affine = [&](int64_t c) {
    return affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c);
  };

  const auto sum = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    Affine<F> constants[16];
    for (int64_t c = begin; c < end; ++c) constants[c - begin] = affine(c);
    for (int64_t index = walk.segment_begin(segment); index < walk.segment_begin(segment + 1);
         ++index) {
      const Chunk chunk(walk, g, index);
      RowSums<F> sums[16];
      for (int64_t row = chunk.row; row < chunk.row_end; ++row) {
        for (int64_t c = begin; c < end; ++c) {
          sweeps.first->sum_chunk_row(row * g.channels + c, chunk.begin, chunk.count,
                               constants[c - begin], sums[c - begin]);
        }
      }
      for (int64_t c = begin; c < end; ++c) {
        const Sums total = sums[c - begin].total();
        Sums& part = parts[segment * g.channels + c];
        part.g += total.g;
        part.gx += total.gx;
      }
    }
  };
  const auto merge = [&](int64_t c) {
    const double rstd = rstd_of(call, call.var[c]);
    slopes[c] = slope_of(call, sums_of(parts, walk.segments, g.channels, c), rstd, c);
  };
  const auto apply = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    Affine<F> constants[16];
    for (int64_t c = begin; c < end; ++c) constants[c - begin] = affine(c);
    for (int64_t index = walk.segment_begin(segment + 1) - 1;
         index >= walk.segment_begin(segment); --index) {
      const Chunk chunk(walk, g, index);
      for (int64_t row = chunk.row_end - 1; row >= chunk.row; --row) {
        for (int64_t c = begin; c < end; ++c) {
          sweeps.second->dx_chunk_row(row * g.channels + c, chunk.begin, chunk.count,
                              constants[c - begin], slopes[c]);
        }
      }
    }
  };

  if (serial || blocks >= 3 * threads || blocks % threads == 0) {
    parallel(blocks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t s = 0; sweeps.first && s < walk.segments; ++s) sum(b, s);
        for (int64_t c = b * block; c < std::min((b + 1) * block, g.channels); ++c) merge(c);
        for (int64_t s = walk.segments - 1; call.dx && s >= 0; --s) apply(b, s);
      }
      finish_streaming();
    });
    return;
  }
  const int64_t tasks = blocks * walk.segments;
  if (sweeps.first) {
    parallel(tasks, false, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sum(t / walk.segments, t % walk.segments);
    });
  }
  for (int64_t c = 0; c < g.channels; ++c) merge(c);
  if (!call.dx) return;
  parallel(tasks, false, [&](int64_t begin, int64_t end) {
    for (int64_t t = end - 1; t >= begin; --t) apply(t / walk.segments, t % walk.segments);
    finish_streaming();
  });
}

template <typename T>
void backward_rows(const BackwardCall<T>& call, const Sweeps<T>& sweeps) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const RowWalk walk(g, kLanes<T>, 2 * sizeof(T), call.mask != nullptr);
  const bool serial = g.numel() < kSerialElements;
  RowAffine<F> affine(walk.width);
  std::vector<F> constant(walk.width + 16), slope(walk.width + 16);
  std::vector<Sums> parts(walk.segments * walk.width);
  for_channels_of(walk, g, 0, walk.width, [&](int64_t c, const auto& columns) {
    affine.set(columns, affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias,
                                  c));
  });

  const auto sum = [&](int64_t s, int64_t begin, int64_t end, RowScratch<F>& scratch) {
    for (int64_t row = walk.segment_begin(s); row < walk.segment_begin(s + 1); row += kRowChunk) {
      const int64_t next = std::min(row + kRowChunk, walk.segment_begin(s + 1));
      sweeps.first->sum_rows(walk.width, row, next, begin, end, affine, scratch);
      Sums* part = parts.data() + s * walk.width + begin;
      for (int64_t j = 0; j < end - begin; ++j) {
        part[j].g += static_cast<double>(scratch.s1[j]);
        part[j].gx += static_cast<double>(scratch.s2[j]);
      }
    }
  };
  const auto merge = [&](int64_t begin, int64_t end) {
    for_channels_of(walk, g, begin, end, [&](int64_t c, const auto& columns) {
      Sums total;
      for (int64_t s = 0; s < walk.segments; ++s) {
        columns.each([&](int64_t j) {
          total.g += parts[s * walk.width + j].g;
          total.gx += parts[s * walk.width + j].gx;
        });
      }
      const Slope<F> of_channel = slope_of(call, total, rstd_of(call, call.var[c]), c);
      columns.each([&](int64_t j) {
        constant[j] = of_channel.constant, slope[j] = of_channel.slope;
      });
    });
  };

  if (walk.groups() > 1) {
    parallel(walk.groups(), serial, [&](int64_t first, int64_t last) {
      RowScratch<F> scratch(walk.group);
      for (int64_t group = first; group < last; ++group) {
        const int64_t begin = group * walk.group, end = std::min(begin + walk.group, walk.width);
        if (sweeps.first) sum(0, begin, end, scratch);
        merge(begin, end);
        if (call.dx) {
          sweeps.second->dx_rows(walk.width, 0, walk.rows, begin, end, affine, constant.data(),
                         slope.data());
        }
      }
      finish_streaming();
    });
    return;
  }
  if (sweeps.first) {
    parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
      RowScratch<F> scratch(walk.width);
      for (int64_t s = first; s < last; ++s) sum(s, 0, walk.width, scratch);
    });
  }
  merge(0, walk.width);
  if (!call.dx) return;
  parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
    for (int64_t s = last - 1; s >= first; --s) {
      sweeps.second->dx_rows(walk.width, walk.segment_begin(s), walk.segment_begin(s + 1), 0, walk.width,
                     affine, constant.data(), slope.data());
    }
    finish_streaming();
  });
}

}  // namespace

template <typename T>
void batch_norm_backward(const BackwardCall<T>& call) {
  // g once computed is kept for the second sweep where it has a place and T holds it exactly: in
  // the residual's gradient, which it is, or in dx when computing it again costs more.
  const bool sums = call.dweight || call.dbias || (call.training && call.dx);
  const bool first_sweep = sums || call.dresidual;
  constexpr bool kExact = sizeof(T) == sizeof(Compute<T>);
  BackwardCall<T> first = call, second = call;
  first.g = call.dresidual;
  if (kExact && sums && !first.g && is_costly(call.act)) first.g = call.dx;
  if (kExact && first.g) second.dy = first.g;
  const Gradient<T, Identity, false> from_g(second);

  const auto run = [&](const BackwardKernel<T>& kernel) {
    const bool reuses_g = second.dy != call.dy;
    const Sweeps<T> sweeps{
        first_sweep ? &kernel : nullptr,
        reuses_g ? static_cast<const BackwardKernel<T>*>(&from_g) : &kernel,
    };
    if (walks_rows(call.geometry)) {
      backward_rows(call, sweeps);
    } else {
      backward_planes(call, sweeps);
    }
    for (int64_t c = 0; c < call.geometry.channels; ++c) {
      if (is_extreme(call.mean[c], call.var[c])) backward_extreme(call, c);
    }
  };
  with_activation(call.act, [&](auto act) {
    using Act = decltype(act);
    if constexpr (kPiecewiseConstant<Act>) {
      if (call.mask) return run(Gradient<T, Act, true>(first));
    }
    run(Gradient<T, Act, false>(first));
  });
}

template void batch_norm_backward(const BackwardCall<double>&);
template void batch_norm_backward(const BackwardCall<float>&);
template void batch_norm_backward(const BackwardCall<BFloat16>&);
template void batch_norm_backward(const BackwardCall<Half>&);

}  // namespace normally
