// Layer norm of samples whose values are `inner` apart: channels-first inputs, without a copy.
//
// The lanes of a vector are neighbouring samples. A tile of samples is walked down its n rows twice
// while it stays in the second-level cache.
#include <vector>

#include "activation.h"
#include "pages.h"
#include "parallel.h"
#include "row_moments.h"
#include "row_norm.h"

namespace normally {
namespace {

// Samples of one outer index that are taken together: whole vectors, `tensors` slabs in the cache.
int64_t tile_width(const RowNorm& norm, int64_t item, int64_t tensors) {
  const int64_t fits = (int64_t{384} << 10) / (norm.n * item * tensors) / 64 * 64;
  return std::min(norm.inner, std::max<int64_t>(fits, 64));
}

// The tiles of a call, and one after the other the samples that they hold.
struct Tiles {
  int64_t width, per_outer;

  Tiles(const RowNorm& norm, int64_t item, int64_t tensors)
      : width(tile_width(norm, item, tensors)), per_outer(ceil_div(norm.inner, width)) {}
};

template <typename F>
struct TileConstants {
  std::vector<F> hi, scale, offset, slope, constant;
  explicit TileConstants(int64_t width)
      : hi(width + 16),
        scale(width + 16),
        offset(width + 16),
        slope(width + 16),
        constant(width + 16) {}

  void set(int64_t j, const SampleAffine<F>& a) {
    hi[j] = a.hi, scale[j] = a.scale, offset[j] = a.offset;
  }
  void set(int64_t j, const SampleSlope<F>& s) { slope[j] = s.slope, constant[j] = s.constant; }
};

template <typename T>
class Forward {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  Forward(const RowForward<T>& forward_call, const Tiles& tiles)
      : call(forward_call),
        tiles_(tiles),
        constants_(tiles.width),
        scratch_(tiles.width),
        moments_(1, call.inner),
        z_(tiles.width + kWidth),
        streams_(worth_streaming(call.numel() * static_cast<int64_t>(sizeof(T)), true) &&
                 is_aligned(call.y) && call.inner % kWidth == 0) {}

  void tile(int64_t index) {
    const int64_t outer = index / tiles_.per_outer;
    const int64_t begin = index % tiles_.per_outer * tiles_.width;
    const int64_t end = std::min(begin + tiles_.width, call.inner), width = end - begin;
    const int64_t first = outer * call.n * call.inner;
    double* mean = call.mean + outer * call.inner + begin;
    double* rstd = call.rstd + outer * call.inner + begin;

    const RowWalk walk(call.n, call.inner);
    std::fill_n(moments_.mean.begin() + begin, width, 0.0);
    std::fill_n(moments_.m2.begin() + begin, width, 0.0);
    moments_.take(call.x + first, walk, 0, begin, end, scratch_);
    bool extreme = false;
    for (int64_t j = 0; j < width; ++j) {
      mean[j] = moments_.mean[begin + j];
      rstd[j] = 1 / std::sqrt(moments_.m2[begin + j] / static_cast<double>(call.n) + call.eps);
      extreme = extreme || is_extreme_sample(mean[j], rstd[j]);
      constants_.set(j, SampleAffine<F>(mean[j], rstd[j]));
    }
    // Upwards: what the statistics read last is still in the cache.
    for (int64_t r = call.n - 1; r >= 0; --r) row(r, first + r * call.inner + begin, width);
    for (int64_t j = 0; extreme && j < width; ++j) {
      if (is_extreme_sample(mean[j], rstd[j])) one(first + begin + j, &mean[j], &rstd[j]);
    }
  }

 private:
  const RowForward<T>& call;
  const Tiles tiles_;
  TileConstants<F> constants_;
  RowScratch<F> scratch_;
  RowMoments moments_;
  std::vector<F> z_;
  const bool streams_;

  void row(int64_t r, int64_t at, int64_t width) {
    if (!call.act) return normalize(r, call.x + at, call.y + at, width);
    normalize(r, call.x + at, z_.data(), width);
    with_activation(call.act, [&](auto act) {
      const F p = static_cast<F>(call.act_param);
      for (int64_t j = 0; j < width; j += kWidth) {
        const Vec<F> value = decltype(act)::template value<F>(load(&z_[j]), p);
        store_first(call.y + at + j, value, static_cast<int>(std::min(kWidth, width - j)));
      }
    });
  }

  // y, or z in the type of the arithmetic.
  template <typename Y>
  void normalize(int64_t r, const T* x, Y* y, int64_t width) const {
    const Vec<F> weight = splat(call.weight[r]), bias = splat(call.bias[r]);
    const F *hi = constants_.hi.data(), *scale = constants_.scale.data();
    const F* offset = constants_.offset.data();
    const bool streams = streams_ && std::is_same_v<T, Y>;
    const auto value = [&](int64_t j, Vec<F> v) {
      return ((v - load(hi + j)) * load(scale + j) + load(offset + j)) * weight + bias;
    };
    int64_t j = 0;
#pragma GCC unroll 4
    for (; j + kWidth <= width; j += kWidth) {
      const Vec<F> v = value(j, load(x + j));
      if (streams && !call.act) {
        store_streaming(y + j, v);
      } else {
        store(y + j, v);
      }
    }
    if (j < width) {
      const int tail = static_cast<int>(width - j);
      store_first(y + j, value(j, load_first(x + j, tail)), tail);
    }
  }

  // A sample beyond the range of float, in double, value by value.
  void one(int64_t at, double* mean, double* rstd) const {
    slow_statistics(call, call.x + at, call.inner, mean, rstd);
    for (int64_t r = 0; r < call.n; ++r, at += call.inner) {
      double z = (static_cast<double>(call.x[at]) - *mean) * *rstd;
      z = z * static_cast<double>(call.weight[r]) + static_cast<double>(call.bias[r]);
      call.y[at] = static_cast<T>(static_cast<F>(activation_value(call.act, z, call.act_param)));
    }
  }
};

template <typename T>
class Backward {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  Backward(const RowBackward<T>& backward_call, const Tiles& tiles)
      : call(backward_call),
        tiles_(tiles),
        constants_(tiles.width),
        g_(tiles.width + kWidth),
        s1_(tiles.width + kWidth),
        s2_(tiles.width + kWidth),
        total1_(tiles.width),
        total2_(tiles.width) {}

  // dweight and dbias are n sums, or null.
  void tile(int64_t index, double* dweight, double* dbias) {
    const int64_t outer = index / tiles_.per_outer;
    const int64_t begin = index % tiles_.per_outer * tiles_.width;
    const int64_t width = std::min(tiles_.width, call.inner - begin);
    const int64_t first = outer * call.n * call.inner + begin;
    const double* mean = call.mean + outer * call.inner + begin;
    const double* rstd = call.rstd + outer * call.inner + begin;
    bool extreme = false;
    for (int64_t j = 0; j < width; ++j) {
      extreme = extreme || is_extreme_sample(mean[j], rstd[j]);
      constants_.set(j, SampleAffine<F>(mean[j], rstd[j]));
    }
    if (extreme) {
      for (int64_t j = 0; j < width; ++j) one(first + j, mean[j], rstd[j], dweight, dbias);
      return;
    }
    std::fill_n(total1_.begin(), width, 0.0);
    std::fill_n(total2_.begin(), width, 0.0);
    for (int64_t r = 0; r < call.n; ++r) {
      add_up(r, first + r * call.inner, width, dweight, dbias);
      if ((r + 1) % kRowTile == 0 || r + 1 == call.n) flush(width);
    }
    if (!call.dx) return;
    for (int64_t j = 0; j < width; ++j) {
      constants_.set(j, SampleSlope<F>(call, mean[j], rstd[j], total1_[j], total2_[j]));
    }
    for (int64_t r = call.n - 1; r >= 0; --r) differentiate(r, first + r * call.inner, width);
  }

 private:
  const RowBackward<T>& call;
  const Tiles tiles_;
  TileConstants<F> constants_;
  std::vector<F> g_, s1_, s2_;
  std::vector<double> total1_, total2_;

  void flush(int64_t width) {
    for (int64_t j = 0; j < width; j += kWidth) {
      const int64_t count = std::min(kWidth, width - j);
      add_wide<F>(&total1_[j], load(&s1_[j]), count);
      add_wide<F>(&total2_[j], load(&s2_[j]), count);
      store(&s1_[j], Vec<F>{});
      store(&s2_[j], Vec<F>{});
    }
  }

  Vec<F> normalized(Vec<F> centred, int64_t j) const {
    return centred * load(&constants_.scale[j]) + load(&constants_.offset[j]);
  }

  // g of a row, dy · act'(z), in g_; the lanes beyond the row are 0.
  void take_gradient(int64_t r, int64_t at, int64_t width) {
    with_activation(call.act, [&](auto act) {
      const F p = static_cast<F>(call.act_param), weight = call.weight[r], bias = call.bias[r];
      for (int64_t j = 0; j < width; j += kWidth) {
        const int count = static_cast<int>(std::min(kWidth, width - j));
        const Vec<F> centred = load_first(call.x + at + j, count) - load(&constants_.hi[j]);
        const Vec<F> z = normalized(centred, j) * weight + bias;
        const Vec<F> dy = load_first(call.dy + at + j, count);
        store(&g_[j], decltype(act)::template gradient<F>(dy, z, p));
      }
    });
  }

  void add_up(int64_t r, int64_t at, int64_t width, double* dweight, double* dbias) {
    if (call.act) take_gradient(r, at, width);
    const F weight = call.weight[r];
    Vec<F> weight_sum{}, bias_sum{};
    const auto add = [&](int64_t j, Vec<F> centred, Vec<F> g) {
      const Vec<F> gw = g * weight;
      store(&s1_[j], load(&s1_[j]) + gw);
      store(&s2_[j], load(&s2_[j]) + gw * centred);
      weight_sum += g * normalized(centred, j);
      bias_sum += g;
    };
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth) {
      const Vec<F> centred = load(call.x + at + j) - load(&constants_.hi[j]);
      add(j, centred, call.act ? load(&g_[j]) : load(call.dy + at + j));
    }
    if (j < width) {
      const int tail = static_cast<int>(width - j);
      const Vec<F> centred = load_first(call.x + at + j, tail) - load(&constants_.hi[j]);
      const Vec<F> g = call.act ? load(&g_[j]) : load_first(call.dy + at + j, tail);
      add(j, centred, select<F>(lane_numbers<F>() < tail, g, Vec<F>{}));
    }
    if (dweight) dweight[r] += sum(weight_sum);
    if (dbias) dbias[r] += sum(bias_sum);
  }

  void differentiate(int64_t r, int64_t at, int64_t width) {
    if (call.act) take_gradient(r, at, width);
    const F weight = call.weight[r];
    const auto dx = [&](int64_t j, Vec<F> x, Vec<F> g) {
      const Vec<F> centred = x - load(&constants_.hi[j]);
      return g * weight * load(&constants_.scale[j]) -
             (centred * load(&constants_.slope[j]) + load(&constants_.constant[j]));
    };
    int64_t j = 0;
    for (; j + kWidth <= width; j += kWidth) {
      const Vec<F> g = call.act ? load(&g_[j]) : load(call.dy + at + j);
      store(call.dx + at + j, dx(j, load(call.x + at + j), g));
    }
    if (j < width) {
      const int tail = static_cast<int>(width - j);
      const Vec<F> g = call.act ? load(&g_[j]) : load_first(call.dy + at + j, tail);
      store_first(call.dx + at + j, dx(j, load_first(call.x + at + j, tail), g), tail);
    }
  }

  // A sample in double, value by value.
  void one(int64_t first, double mean, double rstd, double* dweight, double* dbias) const {
    const double n = static_cast<double>(call.n);
    double s1 = 0, s2 = 0;
    const auto each = [&](auto&& function) {
      for (int64_t r = 0; r < call.n; ++r) {
        const int64_t at = first + r * call.inner;
        const double w = static_cast<double>(call.weight[r]);
        const double centred = (static_cast<double>(call.x[at]) - mean) * rstd;
        const double z = centred * w + static_cast<double>(call.bias[r]);
        const double dy = static_cast<double>(call.dy[at]);
        function(r, at, w, centred, activation_gradient(call.act, dy, z, call.act_param));
      }
    };
    each([&](int64_t r, int64_t, double w, double centred, double g) {
      s1 += g * w / n;
      s2 += g * w * centred / n;
      if (dweight) dweight[r] += g * centred;
      if (dbias) dbias[r] += g;
    });
    if (!call.dx) return;
    each([&](int64_t, int64_t at, double w, double centred, double g) {
      call.dx[at] = static_cast<T>(static_cast<F>(rstd * (g * w - s1 - centred * s2)));
    });
  }
};

}  // namespace

template <typename T>
void column_norm_forward(const RowForward<T>& call) {
  const Tiles tiles(call, sizeof(T), 1);
  parallel(call.outer * tiles.per_outer, call.numel() < kSerialElements,
           [&](int64_t begin, int64_t end) {
             Forward<T> forward(call, tiles);
             for (int64_t t = begin; t < end; ++t) forward.tile(t);
             finish_streaming();
           });
}

template <typename T>
void column_norm_backward(const RowBackward<T>& call) {
  const Tiles tiles(call, sizeof(T), 2);
  const int64_t n = call.n, count = call.outer * tiles.per_outer;
  const int64_t segments = std::min(count, kMaxSegments);
  SegmentSums dweight(call.dweight, segments, n), dbias(call.dbias, segments, n);
  parallel(segments, call.numel() < kSerialElements, [&](int64_t first, int64_t last) {
    Backward<T> backward(call, tiles);
    for (int64_t s = first; s < last; ++s) {
      for (int64_t t = s * count / segments; t < (s + 1) * count / segments; ++t) {
        backward.tile(t, dweight.of(s), dbias.of(s));
      }
    }
  });
  dweight.merge();
  dbias.merge();
}

template void column_norm_forward(const RowForward<double>&);
template void column_norm_forward(const RowForward<float>&);
template void column_norm_forward(const RowForward<BFloat16>&);
template void column_norm_forward(const RowForward<Half>&);
template void column_norm_backward(const RowBackward<double>&);
template void column_norm_backward(const RowBackward<float>&);
template void column_norm_backward(const RowBackward<BFloat16>&);
template void column_norm_backward(const RowBackward<Half>&);

}  // namespace normally
