// Local response norm of one block, all channels of some columns, that stays in the cache.
//
//   d_c = k + alpha / size · Σ x²    over channels [c - below, c + above]
//   y_c = x_c · d_c^-beta
//   dx_c = dy_c · d_c^-beta - 2 alpha beta / size · x_c · Σ dy_j x_j d_j^(-beta-1)
//                                    over channels [c - above, c + below], whose windows have c
//
// The squares lie in a scratch with margins of zeros for the channels that do not exist, every
// channel as far behind the one before, so a window's sum is that many loads at this step, wherever
// a vector begins: with one column (channels_last) these are the unaligned loads of a row. Sums are
// taken anew at each channel; to slide one by adding and subtracting would lose digits and keep a
// NaN.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "geometry.h"
#include "power.h"

namespace normally {

struct LocalResponse {
  int64_t below, above;  // channels of the window that can exist on either side
  double scale;          // alpha / size
  double beta, k;

  int64_t taps() const { return below + 1 + above; }
};

// Where value i of channel c in plane p lies: p · plane + c · channel + i.
struct Layout {
  int64_t plane, channel;
};

// What is computed at a time: `columns` neighbouring values of every channel, in some planes.
struct Block {
  int64_t planes, channels, columns;
  Layout memory, scratch;

  // In the scratch the channels of a plane always follow each other; where they do in memory, too,
  // and no columns are left out in either, a plane is one row of a vector walk, else a channel is.
  bool has_wide_rows() const { return memory.channel == columns && scratch.channel == columns; }

  // function(offset in memory, offset in the scratch, count, whether a whole vector).
  template <int64_t kWidth, typename Function>
  void each_vector(const Function& function) const {
    const bool wide = has_wide_rows();
    const int64_t rows = wide ? 1 : channels, length = wide ? channels * columns : columns;
    for (int64_t p = 0; p < planes; ++p) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t m = p * memory.plane + row * memory.channel;
        const int64_t s = p * scratch.plane + row * scratch.channel;
        int64_t i = 0;
        for (; i + kWidth <= length; i += kWidth) {
          function(m + i, s + i, kWidth, std::true_type{});
        }
        if (i < length) function(m + i, s + i, length - i, std::false_type{});
      }
    }
  }
};

// Where the operands of a block begin; without dy the block is normalized, with it differentiated.
template <typename T>
struct Operands {
  const T* x;
  const T* dy;
  T* out;
};

template <bool kWhole, typename T>
inline Vec<Compute<T>> load_part(const T* p, int64_t count) {
  if constexpr (kWhole) return load(p);
  return load_first(p, static_cast<int>(count));
}

template <bool kWhole, typename T>
inline void store_part(T* p, Vec<Compute<T>> value, int64_t count) {
  if constexpr (kWhole) return store(p, value);
  store_first(p, value, static_cast<int>(count));
}

// Squares whose float sum is then added to a double one: a long window would lose digits.
inline constexpr int64_t kFloatTaps = 16;

template <typename F>
inline Vec<F> short_sum(const F* p, int64_t taps, int64_t step) {
  Vec<F> total = load(p);
  for (int64_t k = 1; k < taps; ++k) total += load(p + k * step);
  return total;
}

template <typename F>
inline Vec<F> window_sum(const F* p, int64_t taps, int64_t step) {
  if (taps <= kFloatTaps) return short_sum(p, taps, step);
  Vec<double> wide[sizeof(double) / sizeof(F)] = {};
  for (int64_t k = 0; k < taps; k += kFloatTaps) {
    add_wide(wide, short_sum(p + k * step, std::min(kFloatTaps, taps - k), step));
  }
  return rounded<F>(wide);
}

// The d between which float serves: nothing that is computed from it overflows, or underflows
// where that would show. Elsewhere, and for settings that themselves are too large or too small,
// the result is computed in double.
struct Range {
  float least, most;

  Range(const LocalResponse& n, double exponent) {
    const auto ordinary = [](double v) { return v == 0 || (v > 1e-15 && v < 1e15); };
    const double alpha = n.scale * static_cast<double>(n.taps());
    const double reach = exponent == 0 ? HUGE_VAL : std::pow(1e30, 1 / exponent);
    least = static_cast<float>(std::max({1e-30, 1e-30 * alpha, 1 / reach}));
    most = static_cast<float>(std::min(1e37, reach));
    if (!ordinary(n.scale) || !ordinary(n.k)) least = HUGE_VALF;
  }
};

// One thread's scratch and loops for blocks of one step.
template <typename T, typename Power>
class BlockKernel {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr bool kIsWide = std::is_same_v<F, double>;

 public:
  // For blocks no larger than this one.
  BlockKernel(const LocalResponse& norm, const Power& power, const Block& block, bool backward)
      : norm_(norm),
        power_(power),
        range_(norm, backward ? std::max(std::abs(norm.beta), std::abs(norm.beta + 1))
                              : std::abs(norm.beta)),
        square_(block.planes * block.scratch.plane + kWidth),
        slope_(backward ? square_.size() : 0),
        gain_(slope_.size()) {}

  // False where results of float are beyond it: those are NaN then.
  bool run(const Block& block, const Operands<T>& at) {
    F* square = square_.data() + norm_.below * block.scratch.channel;
    block.each_vector<kWidth>([&](int64_t m, int64_t s, int64_t count, auto whole) {
      const Vec<F> x = load_part<whole.value>(at.x + m, count);
      store_part<whole.value>(square + s, x * x, count);
    });
    return at.dy ? differentiate(block, at) : normalize(block, at);
  }

 private:
  LocalResponse norm_;
  Power power_;
  Range range_;
  std::vector<F> square_;  // (planes, below + channels + above, columns): x²
  std::vector<F> slope_;   // (planes, above + channels + below, columns): dy x d^(-beta-1)
  std::vector<F> gain_;    // (planes, channels, columns): dy d^-beta

  // d of the vector whose lowest channel's square is at `first`; NaN where float does not serve.
  Vec<F> denominator(const F* first, int64_t step) const {
    const Vec<F> sum = window_sum(first, norm_.taps(), step);
    const Vec<F> d = sum * static_cast<F>(norm_.scale) + static_cast<F>(norm_.k);
    if constexpr (kIsWide) {
      return d;
    } else {
      const Bits<F> serves = (d >= range_.least) & (d <= range_.most);
      return select<F>(serves, d, splat(std::numeric_limits<F>::quiet_NaN()));
    }
  }

  // `value`, and NaN where it is infinite; adds to `lost` the lanes that are not finite.
  static Vec<F> checked(Vec<F> value, int64_t count, Bits<F>& lost) {
    if constexpr (kIsWide) return value;
    const Bits<F> finite = abs<F>(value) <= std::numeric_limits<F>::max();
    lost |= ~finite & (lane_numbers<F>() < static_cast<typename BitsOf<F>::type>(count));
    return select<F>(finite, value, splat(std::numeric_limits<F>::quiet_NaN()));
  }

  bool normalize(const Block& block, const Operands<T>& at) {
    Bits<F> lost{};
    block.each_vector<kWidth>([&](int64_t m, int64_t s, int64_t count, auto whole) {
      const Vec<F> x = load_part<whole.value>(at.x + m, count);
      const Vec<F> d = denominator(square_.data() + s, block.scratch.channel);
      store_part<whole.value>(at.out + m, checked(x * power_(d), count, lost), count);
    });
    return to_bits<F>(lost) == 0;
  }

  bool differentiate(const Block& block, const Operands<T>& at) {
    F* slope = slope_.data() + norm_.above * block.scratch.channel;
    block.each_vector<kWidth>([&](int64_t m, int64_t s, int64_t count, auto whole) {
      const Vec<F> x = load_part<whole.value>(at.x + m, count);
      const Vec<F> dy = load_part<whole.value>(at.dy + m, count);
      const Vec<F> d = denominator(square_.data() + s, block.scratch.channel);
      const Vec<F> gain = dy * power_(d);
      store_part<whole.value>(gain_.data() + s, gain, count);
      store_part<whole.value>(slope + s, gain * (x / d), count);
    });
    const F factor = static_cast<F>(2 * norm_.beta * norm_.scale);
    Bits<F> lost{};
    block.each_vector<kWidth>([&](int64_t m, int64_t s, int64_t count, auto whole) {
      const Vec<F> x = load_part<whole.value>(at.x + m, count);
      const Vec<F> sum = window_sum(slope_.data() + s, norm_.taps(), block.scratch.channel);
      const Vec<F> dx = load(gain_.data() + s) - x * (sum * factor);
      store_part<whole.value>(at.out + m, checked(dx, count, lost), count);
    });
    return to_bits<F>(lost) == 0;
  }
};

}  // namespace normally
