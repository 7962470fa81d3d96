// The backward of layer norm and RMS norm over rows: a few rows at a time, first the two sums of
// each, then dx together with the parameters' gradients while the rows are in the cache.
#include <vector>

#include "activation.h"
#include "pages.h"
#include "parallel.h"
#include "row_norm.h"

namespace normally {
namespace {

// Rows whose constants fit the registers beside the sums of a column.
inline constexpr int kTogether = kVectorBytes == 64 ? 4 : 2;
// Rows after which the columns' float sums are added to double ones.
inline constexpr int kFlush = 32;

template <typename T>
struct RowGradient {
  using F = Compute<T>;
  const T* x;
  const F* z;   // g where it was computed, else null
  const T* dy;  // g where there is no activation
  const T* dsum;
  T* dx;
  SampleAffine<F> a;
  SampleSlope<F> s;
};

// Float sums of the columns of a segment, and the double ones that they flow into.
template <typename F>
struct ColumnSums {
  std::vector<F> dweight, dbias;
  double *weight_total, *bias_total;
  int rows = 0;

  ColumnSums(int64_t n, double* weights, double* biases)
      : dweight(n + 16), dbias(n + 16), weight_total(weights), bias_total(biases) {}

  void flush(int64_t n) {
    constexpr int64_t kCount = kVectorBytes / static_cast<int64_t>(sizeof(F));
    for (int64_t i = 0; i < n; i += kCount) {
      const int64_t count = std::min(kCount, n - i);
      if (weight_total) add_wide<F>(weight_total + i, load(&dweight[i]), count);
      if (bias_total) add_wide<F>(bias_total + i, load(&dbias[i]), count);
    }
    std::fill(dweight.begin(), dweight.end(), F(0));
    std::fill(dbias.begin(), dbias.end(), F(0));
    rows = 0;
  }
};

template <typename T>
class Rows {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  explicit Rows(const RowBackward<T>& backward_call)
      : call(backward_call),
        streams(call.dx && is_aligned(call.dx) && call.n % kWidth == 0 &&
                worth_streaming(call.numel() * static_cast<int64_t>(sizeof(T)), true)) {}

  void run(int64_t begin, int64_t end, double* dweight, double* dbias) const {
    const int64_t padded = call.n + kWidth;
    std::vector<F> scratch(call.act ? kTogether * padded : 0);
    ColumnSums<F> sums(call.n, dweight, dbias);
    RowGradient<T> rows[kTogether];
    int count = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (call.kept && !call.kept[row]) {
        if (call.dx) std::fill(call.dx + row * call.n, call.dx + (row + 1) * call.n, T(0));
        continue;
      }
      if (is_extreme_sample(call.centred ? call.mean[row] : 0.0, call.rstd[row])) {
        extreme(row, dweight, dbias);
        continue;
      }
      rows[count] = prepare(row, call.act ? &scratch[count * padded] : nullptr);
      if (++count == kTogether) {
        finish<kTogether>(rows, sums);
        count = 0;
      }
    }
    for (int i = 0; i < count; ++i) finish<1>(rows + i, sums);
    sums.flush(call.n);
    finish_streaming();
  }

 private:
  const RowBackward<T>& call;
  const bool streams;

  // The row's two sums, and g where an activation makes it.
  RowGradient<T> prepare(int64_t row, F* z) const {
    const int64_t at = row * call.n;
    const double mean = call.centred ? call.mean[row] : 0.0, rstd = call.rstd[row];
    RowGradient<T> r;
    r.x = call.x + at;
    r.dy = call.dy + at;
    r.dsum = call.dsum ? call.dsum + at : nullptr;
    r.dx = call.dx ? call.dx + at : nullptr;
    r.z = z;
    r.a = SampleAffine<F>(mean, rstd);
    if (call.act) {
      with_activation(call.act, [&](auto act) { gradient<decltype(act)>(r, z); });
    }
    if (!call.dx) return r;
    double s1 = 0, s2 = 0;
    call.act ? add_up(r, z, &s1, &s2) : add_up(r, r.dy, &s1, &s2);
    r.s = SampleSlope<F>(call, mean, rstd, s1, s2);
    // The terms of a value that is its own mean cancel; rounded, they would not quite.
    if (call.centred && call.n == 1) r.a.scale = 0, r.s = {};
    return r;
  }

  template <typename Act>
  void gradient(const RowGradient<T>& r, F* g) const {
    const Vec<F> hi = splat(r.a.hi), scale = splat(r.a.scale), offset = splat(r.a.offset);
    const F p = static_cast<F>(call.act_param);
    for (int64_t i = 0; i < call.n; i += kWidth) {
      const int tail = static_cast<int>(std::min(kWidth, call.n - i));
      const Vec<F> normalized = (load_first(r.x + i, tail) - hi) * scale + offset;
      const Vec<F> z =
          normalized * load_first(call.weight + i, tail) + load_first(call.bias + i, tail);
      store(g + i, Act::template gradient<F>(load_first(r.dy + i, tail), z, p));
    }
  }

  // Σ g·weight and Σ g·weight·(x - hi), a few float terms a lane at a time.
  template <typename G>
  void add_up(const RowGradient<T>& r, const G* g, double* s1, double* s2) const {
    constexpr int64_t kBlock = 32 * kWidth;
    const Vec<F> hi = splat(r.a.hi);
    const F* weight = call.weight;
    Vec<double> total1[2] = {}, total2[2] = {};
    int64_t i = 0;
    while (i < call.n) {
      const int64_t end = std::min(i + kBlock, call.n);
      Vec<F> a[2] = {}, b[2] = {};
      for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int64_t j = i + k * kWidth;
          const Vec<F> value = load(g + j) * load(weight + j);
          a[k] += value;
          b[k] += value * (load(r.x + j) - hi);
        }
      }
      if (i + kWidth <= end) {
        const Vec<F> value = load(g + i) * load(weight + i);
        a[0] += value;
        b[0] += value * (load(r.x + i) - hi);
        i += kWidth;
      }
      if (i < end) {
        const int tail = static_cast<int>(end - i);
        const Vec<F> value = load_first(g + i, tail) * load_first(weight + i, tail);
        a[1] += value;  // the other lanes of value are 0
        b[1] +=
            value * select<F>(lane_numbers<F>() < tail, load_first(r.x + i, tail) - hi, Vec<F>{});
        i = end;
      }
      add_wide(total1, a[0] + a[1]);
      add_wide(total2, b[0] + b[1]);
    }
    *s1 = sum(total1[0] + total1[1]);
    *s2 = sum(total2[0] + total2[1]);
  }

  template <int kRows>
  void finish(const RowGradient<T>* rows, ColumnSums<F>& sums) const {
    const bool parameters = sums.weight_total || sums.bias_total;
    if (parameters) {
      call.act ? columns<kRows, true, true>(rows, sums) : columns<kRows, true, false>(rows, sums);
      sums.rows += kRows;
      if (sums.rows >= kFlush) sums.flush(call.n);
    } else {
      call.act ? columns<kRows, false, true>(rows, sums) : columns<kRows, false, false>(rows, sums);
    }
  }

  // What a few rows have in common down the columns, in registers: a store of dx might else be
  // taken for a change of it.
  template <int kRows>
  struct Together {
    const T *x[kRows], *dy[kRows], *dsum[kRows];
    const F* z[kRows];
    T* dx[kRows];
    F hi[kRows], scale[kRows], offset[kRows], slope[kRows], constant[kRows];

    explicit Together(const RowGradient<T>* rows) {
      for (int k = 0; k < kRows; ++k) {
        const RowGradient<T>& r = rows[k];
        x[k] = r.x, dy[k] = r.dy, dsum[k] = r.dsum, z[k] = r.z, dx[k] = r.dx;
        hi[k] = r.a.hi, scale[k] = r.a.scale, offset[k] = r.a.offset;
        slope[k] = r.s.slope, constant[k] = r.s.constant;
      }
    }
  };

  template <int kRows, bool kParameters, bool kAct>
  void columns(const RowGradient<T>* rows, ColumnSums<F>& sums) const {
    const Together<kRows> r(rows);
    const bool wants_dx = call.dx, adds = call.dsum, around = streams;
    const F* weight = call.weight;
    F *dweight = sums.dweight.data(), *dbias = sums.dbias.data();
    const int64_t n = call.n;

    // One vector of columns, down the rows.
    const auto vector = [&]<bool kWhole>(int64_t i, int count) {
      const Vec<F> w = get<kWhole>(weight + i, count);
      Vec<F> dw{}, db{};
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        Vec<F> g;
        if constexpr (kAct) {
          g = get<kWhole>(r.z[k] + i, count);
        } else {
          g = get<kWhole>(r.dy[k] + i, count);
        }
        const Vec<F> centred = get<kWhole>(r.x[k] + i, count) - r.hi[k];
        if constexpr (kParameters) {
          dw += g * (centred * r.scale[k] + r.offset[k]);
          db += g;
        }
        if (!wants_dx) continue;
        Vec<F> dx = g * w * r.scale[k] - (centred * r.slope[k] + r.constant[k]);
        if (adds) dx += get<kWhole>(r.dsum[k] + i, count);
        if constexpr (!kWhole) {
          store_first(r.dx[k] + i, dx, count);
        } else if (around) {
          store_streaming(r.dx[k] + i, dx);
        } else {
          store(r.dx[k] + i, dx);
        }
      }
      if constexpr (kParameters) {
        // Whole vectors: the arrays are padded, and what lies beyond n is never read.
        store(dweight + i, load(dweight + i) + dw);
        store(dbias + i, load(dbias + i) + db);
      }
    };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) vector.template operator()<true>(i, kWidth);
    if (i < n) vector.template operator()<false>(i, static_cast<int>(n - i));
  }

  template <bool kWhole, typename E>
  static Vec<Compute<E>> get(const E* p, int count) {
    return kWhole ? load(p) : load_first(p, count);
  }

  // A row beyond the range of float, in double, value by value.
  void extreme(int64_t row, double* dweight, double* dbias) const {
    const int64_t n = call.n, at = row * n;
    const double mean = call.centred ? call.mean[row] : 0.0, rstd = call.rstd[row];
    std::vector<double> g(n), normalized(n);
    double s1 = 0, s2 = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double w = static_cast<double>(call.weight[i]);
      normalized[i] = (static_cast<double>(call.x[at + i]) - mean) * rstd;
      const double z = normalized[i] * w + static_cast<double>(call.bias[i]);
      g[i] = activation_gradient(call.act, static_cast<double>(call.dy[at + i]), z, call.act_param);
      if (call.centred) s1 += g[i] * w / static_cast<double>(n);
      s2 += g[i] * w * normalized[i] / static_cast<double>(n);
      if (dweight) dweight[i] += g[i] * normalized[i];
      if (dbias) dbias[i] += g[i];
    }
    for (int64_t i = 0; call.dx && i < n; ++i) {
      const double w = static_cast<double>(call.weight[i]);
      double dx = rstd * (g[i] * w - s1 - normalized[i] * s2);
      if (call.dsum) dx += static_cast<double>(call.dsum[at + i]);
      call.dx[at + i] = static_cast<T>(static_cast<F>(dx));
    }
  }
};

}  // namespace

template <typename T>
void row_norm_backward(const RowBackward<T>& call) {
  const Rows<T> rows(call);
  const int64_t segments = sample_segments(call.outer);
  SegmentSums dweight(call.dweight, segments, call.n), dbias(call.dbias, segments, call.n);
  parallel(segments, call.numel() < kSerialElements, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      rows.run(s * call.outer / segments, (s + 1) * call.outer / segments, dweight.of(s),
               dbias.of(s));
    }
  });
  dweight.merge();
  dbias.merge();
}

template void row_norm_backward(const RowBackward<double>&);
template void row_norm_backward(const RowBackward<float>&);
template void row_norm_backward(const RowBackward<BFloat16>&);
template void row_norm_backward(const RowBackward<Half>&);

}  // namespace normally
