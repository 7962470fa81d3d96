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

// Shifted sums of one channel in four independent chains, kept over several rows.
template <typename F>
struct ShiftedSums {
  static constexpr int kChains = 4;
  Vec<F> s1[kChains], s2[kChains];
  F shift;

  void reset(F new_shift) {
    for (int k = 0; k < kChains; ++k) s1[k] = s2[k] = Vec<F>{};
    shift = new_shift;
  }

  template <typename T>
  void add(const T* x, int64_t count) {
    constexpr int64_t kWidth = kLanes<T>;
    Vec<F> a[kChains], b[kChains];
    for (int k = 0; k < kChains; ++k) a[k] = s1[k], b[k] = s2[k];
    const Vec<F> centre = splat(shift);
    int64_t i = 0;
    for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k) {
        const Vec<F> d = load(x + i + k * kWidth) - centre;
        a[k] += d;
        b[k] += d * d;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) {
      const int64_t left = count - i;
      if (left <= 0) break;
      Vec<F> d;
      if (left >= kWidth) {
        d = load(x + i) - centre;
      } else {
        const Bits<F> inside = lane_numbers<F>() < static_cast<int>(left);
        d = select<F>(inside, load_first(x + i, static_cast<int>(left)) - centre, Vec<F>{});
      }
      a[k] += d;
      b[k] += d * d;
      i += kWidth;
    }
    for (int k = 0; k < kChains; ++k) s1[k] = a[k], s2[k] = b[k];
  }

  Moments moments(int64_t count) const {
    return Moments::of_shifted(
        static_cast<double>(count), static_cast<double>(shift),
        sum<F>((s1[0] + s1[1]) + (s1[2] + s1[3])), sum<F>((s2[0] + s2[1]) + (s2[2] + s2[3])));
  }
};

// A shift for the first chunk: the mean of its first values, taken relative to the very first so
// that equal values give exactly themselves.
template <typename T>
inline Compute<T> first_shift(const T* x, int64_t count) {
  using F = Compute<T>;
  count = std::min<int64_t>(count, 256);
  ShiftedSums<F> sums;
  sums.reset(static_cast<F>(x[0]));
  sums.add(x, count);
  return static_cast<F>(sums.moments(count).mean);
}

}  // namespace normally
