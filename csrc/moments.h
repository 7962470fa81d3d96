// Mean and sum of squared deviations over raw pointers, shifted and merged.
//
// Sums of x - K and (x - K)² are taken over chunks in the compute type, K being near the mean: the
// difference is then exact or nearly so, and the sums are small. Chunks merge in double by the
// formula of Chan, Golub & LeVeque 1983. The error does not grow with |mean| / std.
#pragma once

#include <cmath>

#include "geometry.h"
#include "lanes.h"

namespace normally {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    const double share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }

  // `count` values whose shifted sums are s1 = Σ(x - shift) and s2 = Σ(x - shift)².
  static Moments of_shifted(double count, double shift, double s1, double s2) {
    const double offset = s1 / count;
    const double m2 = s2 - s1 * offset;
    return {count, shift + offset, m2 < 0 ? 0 : m2};
  }
};

// Shifted sums of one channel, kept over several rows. Each float lane takes some 16 rounds of
// values before it is added to a double one: an outlier's square would otherwise swallow the low
// bits of all that come after it.
template <typename F>
class ShiftedSums {
 public:
  void reset(F shift) {
    *this = ShiftedSums();
    shift_ = shift;
  }

  template <typename T>
  void add(const T* x, int64_t count) {
    constexpr int64_t kBlock = 16 * kChains * kLanes<T>;
    for (; count > kBlock; x += kBlock, count -= kBlock) {
      add_block(x, kBlock, splat(shift_), s1_, s2_);
      flush();
    }
    add_block(x, count, splat(shift_), s1_, s2_);
    pending_ += count;
    if (pending_ >= kBlock) flush();
  }

  Moments moments(int64_t count) {
    flush();
    return Moments::of_shifted(static_cast<double>(count), static_cast<double>(shift_),
                               sum(total1_[0] + total1_[1]), sum(total2_[0] + total2_[1]));
  }

  static constexpr int kChains = 4;

  // Four independent chains, so that no addition waits for the one before.
  template <typename T>
  static void add_block(const T* x, int64_t count, Vec<F> centre, Vec<F>& s1, Vec<F>& s2) {
    constexpr int64_t kWidth = kLanes<T>;
    Vec<F> a[kChains] = {}, b[kChains] = {};
    const auto add_vector = [&](int k, Vec<F> d) {
      a[k] += d;
      b[k] += d * d;
    };
    int64_t i = 0;
    for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) add_vector(k, load(x + i + k * kWidth) - centre);
    }
#pragma GCC unroll 3
    for (int k = 0; k < kChains - 1; ++k) {
      if (i + kWidth > count) break;
      add_vector(k, load(x + i) - centre);
      i += kWidth;
    }
    if (i < count) {
      const int tail = static_cast<int>(count - i);
      const Bits<F> inside = lane_numbers<F>() < tail;
      add_vector(3, select<F>(inside, load_first(x + i, tail) - centre, Vec<F>{}));
    }
    s1 += (a[0] + a[1]) + (a[2] + a[3]);
    s2 += (b[0] + b[1]) + (b[2] + b[3]);
  }

 private:
  Vec<F> s1_ = {}, s2_ = {};
  Vec<double> total1_[2] = {}, total2_[2] = {};
  int64_t pending_ = 0;
  F shift_ = 0;

  void flush() {
    add_wide(total1_, s1_);
    add_wide(total2_, s2_);
    s1_ = s2_ = Vec<F>{};
    pending_ = 0;
  }
};

// A shift for the first chunk, whose rows of `count` values are `stride` apart: the mean of its
// first 512 values or so, enough that one outlier among them cannot spoil it. Taken relative to the
// very first, so that equal values give exactly themselves.
template <typename T>
inline Compute<T> first_shift(const T* x, int64_t rows, int64_t stride, int64_t count) {
  using F = Compute<T>;
  constexpr int64_t kSample = 512;
  count = std::min(count, kSample);
  rows = std::min(rows, ceil_div(kSample, count));
  ShiftedSums<F> sums;
  sums.reset(static_cast<F>(x[0]));
  for (int64_t row = 0; row < rows; ++row) sums.add(x + row * stride, count);
  return static_cast<F>(sums.moments(rows * count).mean);
}

// The mean of the first eighth of the values, or of 64, as a shift: relative to the very first, so
// that equal values give exactly themselves, and of so many that neither an outlier among them nor
// a step behind them takes more than a digit from the sums.
template <typename T>
inline Compute<T> shift_of(const T* x, int64_t count) {
  using F = Compute<T>;
  constexpr int64_t kWidth = kLanes<T>;
  count = std::min(count, std::clamp<int64_t>(count / 8, 64, 512));
  const F first = static_cast<F>(x[0]);
  Vec<F> s[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    s[0] += load(x + i) - first;
    s[1] += load(x + i + kWidth) - first;
  }
  for (; i < count; i += kWidth) {
    const int tail = static_cast<int>(std::min(kWidth, count - i));
    const Bits<F> inside = lane_numbers<F>() < tail;
    s[0] += select<F>(inside, load_first(x + i, tail) - first, Vec<F>{});
  }
  return first + static_cast<F>(sum(s[0] + s[1]) / static_cast<double>(count));
}

// Moments of up to kChunk values that lie one beside the other, by a shift near their mean.
template <typename T, typename F = Compute<T>>
inline Moments chunk_moments(const T* x, int64_t count, F shift) {
  constexpr int64_t kBlock = 16 * ShiftedSums<F>::kChains * kLanes<T>;
  Vec<double> total1[2] = {}, total2[2] = {};
  for (int64_t i = 0; i < count; i += kBlock) {
    Vec<F> s1 = {}, s2 = {};
    ShiftedSums<F>::add_block(x + i, std::min(kBlock, count - i), splat(shift), s1, s2);
    add_wide(total1, s1);
    add_wide(total2, s2);
  }
  return Moments::of_shifted(static_cast<double>(count), static_cast<double>(shift),
                             sum(total1[0] + total1[1]), sum(total2[0] + total2[1]));
}

// Moments of any number of values that lie one beside the other.
template <typename T>
inline Moments moments_of(const T* x, int64_t count) {
  Moments total = chunk_moments(x, std::min(kChunk, count), shift_of(x, count));
  for (int64_t i = kChunk; i < count; i += kChunk) {
    const Compute<T> shift = static_cast<Compute<T>>(total.mean);
    total.merge(chunk_moments(x + i, std::min(kChunk, count - i), shift));
  }
  return total;
}

// Σx², float lanes added to double ones as in ShiftedSums.
template <typename T>
inline double sum_of_squares(const T* x, int64_t count) {
  using F = Compute<T>;
  constexpr int64_t kWidth = kLanes<T>, kChains = 4, kBlock = 16 * kChains * kWidth;
  Vec<double> total[2] = {};
  int64_t i = 0;
  while (i < count) {
    const int64_t end = std::min(i + kBlock, count);
    Vec<F> s[kChains] = {};
    for (; i + kChains * kWidth <= end; i += kChains * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) {
        const Vec<F> v = load(x + i + k * kWidth);
        s[k] += v * v;
      }
    }
    for (; i + kWidth <= end; i += kWidth) {
      const Vec<F> v = load(x + i);
      s[0] += v * v;
    }
    if (i < end) {
      const Vec<F> v = load_first(x + i, static_cast<int>(end - i));
      s[1] += v * v;
      i = end;
    }
    add_wide(total, (s[0] + s[1]) + (s[2] + s[3]));
  }
  return sum(total[0] + total[1]);
}

}  // namespace normally
