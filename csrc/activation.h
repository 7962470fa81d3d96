// The activations a norm can be fused with: value and derivative over vectors of one register.
//
// Each is a struct with
//   value(z, p)          act(z)
//   gradient(g, z, p)    g * act'(z)
// p is leaky_relu's slope or elu's alpha. Comparisons are written so that a NaN stays a NaN, and at
// a kink the derivative is torch's. Codes are those of _ops/activation.py.
#pragma once

#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace normally {

// e^z. Cody-Waite reduction z = n·ln2 + r and the Taylor polynomial of degree 7 in |r| <= ln2/2,
// whose remainder is 5e-9; below 2 units in the last place.
inline Vec<float> expm1_reduced(Vec<float> z, Vec<float>& n) {
  const Vec<float> magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  n = (z * 1.44269504f + magic) - magic;
  const Vec<float> r = (z - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec<float> p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * r * r + r;
}

// min(max(z, low), high), and NaN for NaN.
inline Vec<float> clamp(Vec<float> z, float low, float high) {
#if defined(__AVX512F__)
  // Either instruction gives its second operand where one is NaN.
  const __m512 raised = _mm512_max_ps(_mm512_set1_ps(low), std::bit_cast<__m512>(z));
  return std::bit_cast<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(high), raised));
#elif defined(__AVX2__)
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(low), std::bit_cast<__m256>(z));
  return std::bit_cast<Vec<float>>(_mm256_min_ps(_mm256_set1_ps(high), raised));
#else
  z = select<float>(z < low, splat(low), z);
  return select<float>(z > high, splat(high), z);
#endif
}

// 2^n for integral -126 <= n <= 127.
inline Vec<float> power_of_two(Vec<float> n) {
  const auto exponent = __builtin_convertvector(n, Vec<int32_t>);
  return std::bit_cast<Vec<float>>((exponent + 127) << 23);
}

// p · 2^n for integral n, to infinity and to 0 where float ends.
inline Vec<float> scale_by_power_of_two(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec<float>>(
      _mm512_scalef_ps(std::bit_cast<__m512>(p), std::bit_cast<__m512>(n)));
#else
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> half = (n * 0.5f + magic) - magic;  // in two steps: 2^128 is no float
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

inline Vec<float> exp(Vec<float> z) {
  Vec<float> n;
  const Vec<float> p = expm1_reduced(clamp(z, -104.0f, 89.0f), n);
  return scale_by_power_of_two(p + 1.0f, n);
}

// e^z - 1 for z <= 0, without cancellation near 0.
inline Vec<float> expm1_nonpositive(Vec<float> z) {
  z = select<float>(z < -80.0f, splat(-80.0f), z);
  Vec<float> n;
  const Vec<float> p = expm1_reduced(z, n);
  const Vec<float> scale = power_of_two(n);
  return p * scale + (scale - 1.0f);
}

template <typename Function>
inline Vec<double> each_lane(Vec<double> z, Function function) {
  for (int i = 0; i < kLanes<double>; ++i) z[i] = function(z[i]);
  return z;
}

inline Vec<double> exp(Vec<double> z) {
  return each_lane(z, [](double v) { return std::exp(v); });
}

inline Vec<double> expm1_nonpositive(Vec<double> z) {
  return each_lane(z, [](double v) { return std::expm1(v); });
}

template <typename F>
inline Vec<F> abs(Vec<F> z) {
  return select<F>(z < F(0), -z, z);
}

template <typename F>
inline Vec<F> sigmoid(Vec<F> z) {
  return F(1) / (F(1) + exp(-z));
}

template <typename F>
inline Vec<F> tanh(Vec<F> z) {
  const Vec<F> e = expm1_nonpositive(abs<F>(z) * F(-2));
  const Vec<F> t = -e / (e + F(2));
  return select<F>(z < F(0), -t, t);
}

// Φ(z), the normal distribution's integral, and gaussian = e^(-z²/2).
//
// float: the tail Q(t) = gaussian · u·P(u), u = 1 / (1 + 0.3 t), P fitted by us to a relative error
// of 3.5e-9 over 0 <= t <= 13.5; the result is within 2e-7.
inline Vec<float> normal_cdf(Vec<float> z, Vec<float>& gaussian) {
  gaussian = exp(z * z * -0.5f);
  const Vec<float> u = 1.0f / (abs<float>(z) * 0.3f + 1.0f);
  Vec<float> p = splat(-0.0205946398f);
  p = p * u + 0.112273378f;
  p = p * u - 0.227817207f;
  p = p * u + 0.191233665f;
  p = p * u - 0.0789446181f;
  p = p * u + 0.0958873708f;
  p = p * u + 0.0784875784f;
  p = p * u + 0.110213309f;
  p = p * u + 0.119574624f;
  p = p * u + 0.119686537f;
  const Vec<float> tail = p * u * gaussian;
  return select<float>(z < 0.0f, tail, 1.0f - tail);
}

inline Vec<double> normal_cdf(Vec<double> z, Vec<double>& gaussian) {
  gaussian = exp(z * z * -0.5);
  return each_lane(z, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752440); });
}

struct Identity {
  static constexpr bool kCostly = false;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return z;
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F>, F) {
    return g;
  }
};

struct Relu {
  static constexpr bool kCostly = false;
  template <typename F>
  static Bits<F> passes(Vec<F> z) {
    return ~(z <= F(0));
  }
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return select<F>(z <= F(0), splat(F(0)), z);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    return select<F>(z <= F(0), splat(F(0)), g);
  }
};

struct Relu6 {
  static constexpr bool kCostly = false;
  template <typename F>
  static Bits<F> passes(Vec<F> z) {
    return (z > F(0)) & (z < F(6));
  }
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return select<F>(z <= F(0), splat(F(0)), select<F>(z >= F(6), splat(F(6)), z));
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    return select<F>(passes<F>(z), g, splat(F(0)));
  }
};

struct LeakyRelu {
  static constexpr bool kCostly = false;
  template <typename F>
  static Bits<F> passes(Vec<F> z) {
    return z > F(0);
  }
  template <typename F>
  static Vec<F> value(Vec<F> z, F slope) {
    return select<F>(z > F(0), z, z * slope);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F slope) {
    return select<F>(z > F(0), g, g * slope);
  }
};

struct Elu {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> value(Vec<F> z, F alpha) {
    const Bits<F> negative = z <= F(0);
    return select<F>(negative, expm1_nonpositive(select<F>(negative, z, splat(F(0)))) * alpha, z);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F alpha) {
    const Bits<F> negative = z <= F(0);
    return select<F>(negative, g * exp(select<F>(negative, z, splat(F(0)))) * alpha, g);
  }
};

struct Silu {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return z / (F(1) + exp(-z));
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Vec<F> s = sigmoid<F>(z);
    return g * (s * (F(1) + z * (F(1) - s)));
  }
};

struct Gelu {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    Vec<F> gaussian;
    return z * normal_cdf(z, gaussian);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    Vec<F> gaussian;
    const Vec<F> cdf = normal_cdf(z, gaussian);
    return g * (cdf + z * gaussian * F(0.39894228040143267794));
  }
};

// z · (1 + tanh(u)) / 2 = z · sigmoid(2u), u = √(2/π) (z + 0.044715 z³).
struct GeluTanh {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> twice_u(Vec<F> z) {
    return z * (F(1) + z * z * F(0.044715)) * F(1.59576912160573071176);
  }
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return z / (F(1) + exp(-twice_u<F>(z)));
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Vec<F> s = sigmoid<F>(twice_u<F>(z));
    const Vec<F> slope = (F(1) + z * z * F(3 * 0.044715)) * F(1.59576912160573071176);
    // For huge |z| the slope is infinite where s (1 - s) is 0.
    const Vec<F> bend = select<F>(abs<F>(z) > F(20), splat(F(0)), z * (s * (F(1) - s)) * slope);
    return g * (s + bend);
  }
};

template <typename F>
inline Vec<F> clamped_ramp(Vec<F> z) {  // clamp(z + 3, 0, 6)
  const Vec<F> t = z + F(3);
  return select<F>(t <= F(0), splat(F(0)), select<F>(t >= F(6), splat(F(6)), t));
}

struct Hardswish {
  static constexpr bool kCostly = false;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return z * clamped_ramp<F>(z) * (F(1) / F(6));
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Vec<F> middle = g * (z * (F(1) / F(3)) + F(0.5));
    return select<F>(z <= F(-3), splat(F(0)), select<F>(z < F(3), middle, g));
  }
};

struct Hardsigmoid {
  static constexpr bool kCostly = false;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return clamped_ramp<F>(z) * (F(1) / F(6));
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Bits<F> inside = (z > F(-3)) & (z < F(3));
    return select<F>(inside, g * (F(1) / F(6)), splat(F(0)));
  }
};

struct Sigmoid {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return sigmoid<F>(z);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Vec<F> s = sigmoid<F>(z);
    return g * (s * (F(1) - s));
  }
};

struct Tanh {
  static constexpr bool kCostly = true;
  template <typename F>
  static Vec<F> value(Vec<F> z, F) {
    return tanh<F>(z);
  }
  template <typename F>
  static Vec<F> gradient(Vec<F> g, Vec<F> z, F) {
    const Vec<F> t = tanh<F>(z);
    return g * (F(1) - t * t);
  }
};

// Those whose derivative is constant on each side of a threshold: one saved bit replaces z.
template <typename Act>
inline constexpr bool kPiecewiseConstant =
    std::is_same_v<Act, Relu> || std::is_same_v<Act, Relu6> || std::is_same_v<Act, LeakyRelu>;

// Call `function` with the activation of a code.
template <typename Function>
inline void with_activation(int64_t code, Function&& function) {
  switch (code) {
    case 0: return function(Identity{});
    case 1: return function(Relu{});
    case 2: return function(Relu6{});
    case 3: return function(LeakyRelu{});
    case 4: return function(Elu{});
    case 5: return function(Silu{});
    case 6: return function(Gelu{});
    case 7: return function(GeluTanh{});
    case 8: return function(Hardswish{});
    case 9: return function(Hardsigmoid{});
    case 10: return function(Sigmoid{});
    case 11: return function(Tanh{});
    default: __builtin_unreachable();  // _ops/activation.py made the code
  }
}

// Whether the derivative is dearer to compute again than to store and load.
inline bool is_costly(int64_t code) {
  bool costly = false;
  with_activation(code, [&](auto act) { costly = decltype(act)::kCostly; });
  return costly;
}

// act(z) and g · act'(z) of one double, by the activation's code: for values beyond float.
inline double activation_value(int64_t code, double z, double p) {
  with_activation(code,
                  [&](auto act) { z = decltype(act)::template value<double>(splat(z), p)[0]; });
  return z;
}

inline double activation_gradient(int64_t code, double g, double z, double p) {
  with_activation(code, [&](auto act) {
    g = decltype(act)::template gradient<double>(splat(g), splat(z), p)[0];
  });
  return g;
}

}  // namespace normally
