// Layer norm and RMS norm of rows: each row's statistics, then its output while it is in the cache.
#include <vector>

#include "activation.h"
#include "pages.h"
#include "parallel.h"
#include "row_norm.h"

namespace normally {
namespace {

template <typename T>
class Rows {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  explicit Rows(const RowForward<T>& forward_call)
      : call(forward_call),
        streams(worth_streaming(call.numel() * static_cast<int64_t>(sizeof(T)), true) &&
                is_aligned(call.y) && call.n % kWidth == 0) {}

  void run(int64_t begin, int64_t end) const {
    std::vector<F> scratch(call.act ? call.n + kWidth : 0);
    int64_t rows[kTogether];
    int count = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (call.kept && !call.kept[row]) {
        hide(row);
        continue;
      }
      rows[count] = row;
      if (++count < kTogether) continue;
      together<kTogether>(rows, scratch.data());
      count = 0;
    }
    for (int i = 0; i < count; ++i) together<1>(rows + i, scratch.data());
    finish_streaming();
  }

 private:
  // Rows whose statistics are taken stage by stage, so that no stage waits for the sum of the one
  // before: half the time of short rows.
  static constexpr int kTogether = 4;
  const RowForward<T>& call;
  const bool streams;

  template <int kRows>
  void together(const int64_t* rows, F* scratch) const {
    const int64_t n = call.n;
    const T* x[kRows];
    double mean[kRows] = {}, rstd[kRows];
    for (int k = 0; k < kRows; ++k) {
      x[k] = call.x + rows[k] * n;
      if (call.residual) {
        add(x[k], call.residual + rows[k] * n, call.sum + rows[k] * n);
        x[k] = call.sum + rows[k] * n;
      }
    }
    statistics<kRows>(x, mean, rstd);
    for (int k = 0; k < kRows; ++k) {
      T* y = call.y + rows[k] * n;
      if (is_extreme_sample(mean[k], rstd[k])) {
        slow_statistics(call, x[k], 1, &mean[k], &rstd[k]);
        extreme(x[k], y, mean[k], rstd[k]);
      } else {
        output(x[k], y, scratch, SampleAffine<F>(mean[k], rstd[k]));
      }
      keep(rows[k], mean[k], rstd[k]);
    }
  }

  void output(const T* x, T* y, F* scratch, const SampleAffine<F>& a) const {
    if (!call.centred) {
      call.casting == kLlama ? scale<true>(x, y, a.scale) : scale<false>(x, y, a.scale);
    } else if (call.act) {
      normalize<true>(x, y, scratch, a);
      with_activation(call.act, [&](auto act) { activate<decltype(act)>(scratch, y); });
    } else {
      normalize<false>(x, y, nullptr, a);
    }
  }

  void keep(int64_t row, double mean, double rstd) const {
    if (call.mean) call.mean[row] = mean;
    call.rstd[row] = rstd;
  }

  void hide(int64_t row) const {
    std::fill(call.y + row * call.n, call.y + (row + 1) * call.n, T(0));
    if (call.sum) std::fill(call.sum + row * call.n, call.sum + (row + 1) * call.n, T(0));
    keep(row, 0, 0);
  }

  void add(const T* x, const T* residual, T* total) const {
    int64_t i = 0;
    for (; i + kWidth <= call.n; i += kWidth) store(total + i, load(x + i) + load(residual + i));
    if (i < call.n) {
      const int tail = static_cast<int>(call.n - i);
      store_first(total + i, load_first(x + i, tail) + load_first(residual + i, tail), tail);
    }
  }

  template <int kRows>
  void statistics(const T* const* x, double* mean, double* rstd) const {
    const int64_t n = call.n;
    if (!call.centred) {
      double squares[kRows];
      for (int k = 0; k < kRows; ++k) squares[k] = sum_of_squares(x[k], n);
      for (int k = 0; k < kRows; ++k) {
        // Rounded where torch rounds: the mean, the sum with eps, the root, the quotient.
        const F mean_square = static_cast<F>(squares[k] / static_cast<double>(n));
        rstd[k] = static_cast<double>(F(1) / std::sqrt(mean_square + static_cast<F>(call.eps)));
      }
      return;
    }
    Moments moments[kRows];
    if (n > kChunk) {
      for (int k = 0; k < kRows; ++k) moments[k] = moments_of(x[k], n);
    } else {
      F shift[kRows];
      for (int k = 0; k < kRows; ++k) shift[k] = shift_of(x[k], n);
      for (int k = 0; k < kRows; ++k) moments[k] = chunk_moments(x[k], n, shift[k]);
    }
    for (int k = 0; k < kRows; ++k) {
      mean[k] = moments[k].mean;
      rstd[k] = 1 / std::sqrt(moments[k].m2 / static_cast<double>(n) + call.eps);
    }
  }

  void put(T* y, Vec<F> value) const {
    if (streams) {
      store_streaming(y, value);
    } else {
      store(y, value);
    }
  }

  // y or, before an activation, z.
  template <bool kKeepsZ>
  void normalize(const T* x, T* y, F* z, const SampleAffine<F>& a) const {
    const Vec<F> hi = splat(a.hi), scale = splat(a.scale), offset = splat(a.offset);
    const F *weight = call.weight, *bias = call.bias;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kWidth <= call.n; i += kWidth) {
      const Vec<F> normalized = (load(x + i) - hi) * scale + offset;
      const Vec<F> value = normalized * load(weight + i) + load(bias + i);
      if constexpr (kKeepsZ) {
        store(z + i, value);
      } else {
        put(y + i, value);
      }
    }
    if (i < call.n) {
      const int tail = static_cast<int>(call.n - i);
      const Vec<F> normalized = (load_first(x + i, tail) - hi) * scale + offset;
      const Vec<F> value = normalized * load_first(weight + i, tail) + load_first(bias + i, tail);
      if constexpr (kKeepsZ) {
        store_first(z + i, value, tail);
      } else {
        store_first(y + i, value, tail);
      }
    }
  }

  template <typename Act>
  void activate(const F* z, T* y) const {
    const F p = static_cast<F>(call.act_param);
    int64_t i = 0;
    for (; i + kWidth <= call.n; i += kWidth) put(y + i, Act::template value<F>(load(z + i), p));
    if (i < call.n) {
      const int tail = static_cast<int>(call.n - i);
      store_first(y + i, Act::template value<F>(load_first(z + i, tail), p), tail);
    }
  }

  // RMS norm: (x * rstd) * weight, in this order.
  template <bool kRounds>
  void scale(const T* x, T* y, F rstd) const {
    const Vec<F> factor = splat(rstd);
    const auto rounded = [](Vec<F> value) {
      if constexpr (kRounds && sizeof(T) == 2) {
        return widen(narrow(value, T{}), T{});
      } else {
        return value;
      }
    };
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kWidth <= call.n; i += kWidth) {
      put(y + i, rounded(load(x + i) * factor) * load(call.weight + i));
    }
    if (i < call.n) {
      const int tail = static_cast<int>(call.n - i);
      const Vec<F> value = rounded(load_first(x + i, tail) * factor);
      store_first(y + i, value * load_first(call.weight + i, tail), tail);
    }
  }

  // A row beyond the range of float, in double, value by value.
  void extreme(const T* x, T* y, double mean, double rstd) const {
    for (int64_t i = 0; i < call.n; ++i) {
      double z = (static_cast<double>(x[i]) - mean) * rstd;
      z = z * static_cast<double>(call.weight[i]) + static_cast<double>(call.bias[i]);
      y[i] = static_cast<T>(static_cast<F>(activation_value(call.act, z, call.act_param)));
    }
  }
};

}  // namespace

template <typename T>
void row_norm_forward(const RowForward<T>& call) {
  const Rows<T> rows(call);
  parallel(call.outer, call.numel() < kSerialElements,
           [&](int64_t begin, int64_t end) { rows.run(begin, end); });
}

template void row_norm_forward(const RowForward<double>&);
template void row_norm_forward(const RowForward<float>&);
template void row_norm_forward(const RowForward<BFloat16>&);
template void row_norm_forward(const RowForward<Half>&);

}  // namespace normally
