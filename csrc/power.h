// d^-beta over vectors of one register.
//
// Each is a struct with
//   operator()(d)    d^-beta
// By square roots where beta has them. A NaN stays a NaN. The float versions are within 4 units in
// the last place for a normal d > 0 whose result is in (1e-35, 1e35); the double ones take any d.
#pragma once

#include <cmath>
#include <cstring>

#include "activation.h"

namespace normally {

inline Vec<float> sqrt(Vec<float> z) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec<float>>(_mm512_sqrt_ps(std::bit_cast<__m512>(z)));
#elif defined(__AVX2__)
  return std::bit_cast<Vec<float>>(_mm256_sqrt_ps(std::bit_cast<__m256>(z)));
#elif defined(__x86_64__)
  return std::bit_cast<Vec<float>>(_mm_sqrt_ps(std::bit_cast<__m128>(z)));
#else
  for (int i = 0; i < kLanes<float>; ++i) z[i] = std::sqrt(z[i]);
  return z;
#endif
}

inline Vec<double> sqrt(Vec<double> z) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec<double>>(_mm512_sqrt_pd(std::bit_cast<__m512d>(z)));
#elif defined(__AVX2__)
  return std::bit_cast<Vec<double>>(_mm256_sqrt_pd(std::bit_cast<__m256d>(z)));
#elif defined(__x86_64__)
  return std::bit_cast<Vec<double>>(_mm_sqrt_pd(std::bit_cast<__m128d>(z)));
#else
  return each_lane(z, [](double v) { return std::sqrt(v); });
#endif
}

// As many lanes of F as `wide` holds doubles: what add_wide adds to, rounded.
template <typename F>
inline Vec<F> rounded(const Vec<double>* wide) {
  if constexpr (sizeof(F) == sizeof(double)) {
    return wide[0];
  } else {
    typedef float HalfOfFloats __attribute__((vector_size(kVectorBytes / 2)));
    const HalfOfFloats halves[2] = {__builtin_convertvector(wide[0], HalfOfFloats),
                                    __builtin_convertvector(wide[1], HalfOfFloats)};
    Vec<F> result;
    std::memcpy(&result, halves, sizeof(result));
    return result;
  }
}

// ln m for √½ <= m <= √2: 2 artanh(s), s = (m - 1) / (m + 1), the series up to s^11. The rest is
// 5e-11 of the result.
inline Vec<double> log_reduced(Vec<double> m) {
  const Vec<double> s = (m - 1.0) / (m + 1.0), q = s * s;
  Vec<double> p = splat(1.0 / 11);
  p = p * q + 1.0 / 9;
  p = p * q + 1.0 / 7;
  p = p * q + 1.0 / 5;
  p = p * q + 1.0 / 3;
  return (s + s) * (p * q + 1.0);
}

// 1 / √d. With AVX-512 by an estimate of 14 bits and a Newton step, which is within 2 units in the
// last place and several times faster than a root and a division.
inline Vec<float> rsqrt(Vec<float> d) {
#if defined(__AVX512F__)
  const auto r = std::bit_cast<Vec<float>>(_mm512_rsqrt14_ps(std::bit_cast<__m512>(d)));
  return r + (r * 0.5f) * (1.0f - (d * r) * r);
#else
  return 1.0f / sqrt(d);
#endif
}

inline Vec<double> rsqrt(Vec<double> d) { return 1.0 / sqrt(d); }

struct PowerHalf {
  template <typename V>
  V operator()(V d) const {
    return rsqrt(d);
  }
};

struct PowerThreeQuarters {
  template <typename V>
  V operator()(V d) const {
    const V root = rsqrt(d);
    return root * sqrt(root);
  }
};

struct PowerOne {
  template <typename V>
  V operator()(V d) const {
    return 1 / d;
  }
};

struct PowerAny {
  double beta;

  // exp(-beta · ln d). The exponent needs more digits than a float has, since its absolute error
  // is the result's relative one: in double, then split into a float and what that lacks.
  Vec<float> operator()(Vec<float> d) const {
    const auto bits = std::bit_cast<Vec<int32_t>>(d);
    const Vec<int32_t> n = (bits - 0x3f3504f3) >> 23;  // d = m · 2^n, √½ <= m < √2
    Vec<double> power[2] = {}, exponent[2] = {}, high[2] = {};
    add_wide(power, __builtin_convertvector(n, Vec<float>));
    add_wide(exponent, std::bit_cast<Vec<float>>(bits - (n << 23)));
    for (int i = 0; i < 2; ++i) {
      exponent[i] = (power[i] * 0.69314718055994530942 + log_reduced(exponent[i])) * -beta;
    }
    const Vec<float> hi = rounded<float>(exponent);
    add_wide(high, hi);
    for (int i = 0; i < 2; ++i) exponent[i] -= high[i];
    const Vec<float> e = exp(hi);
    return select<float>(d == d, e + e * rounded<float>(exponent), d);
  }

  Vec<double> operator()(Vec<double> d) const {
    return each_lane(d, [this](double v) { return std::pow(v, -beta); });
  }
};

// Call `function` with the power of a beta.
template <typename Function>
inline void with_power(double beta, Function&& function) {
  if (beta == 0.5) return function(PowerHalf{});
  if (beta == 0.75) return function(PowerThreeQuarters{});
  if (beta == 1) return function(PowerOne{});
  return function(PowerAny{beta});
}

}  // namespace normally
