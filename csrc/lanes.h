// Vectors of one machine register, for any element type: load, store, select, reduce.
//
// Compute<T> is what arithmetic on T is done in: float for float, bfloat16 and float16, double for
// double. A Vec<F> is a compiler vector of F that fills one register of the instruction set this
// file is compiled for. Nothing here knows torch.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace normally {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

template <typename E>
struct VecOf {
  typedef E type __attribute__((vector_size(kVectorBytes)));
};
template <typename F>
using Vec = typename VecOf<F>::type;

// The number of lanes: of elements T that become one vector of Compute<T>.
template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute<T>));

template <typename F>
struct BitsOf {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <typename F>
using Bits = Vec<typename BitsOf<F>::type>;

template <typename F>
inline Vec<F> splat(F value) {
  return value - Vec<F>{};  // value - 0 keeps every bit, -0.0 and NaN too
}

// 0, 1, 2, … as lane numbers.
template <typename F>
inline Bits<F> lane_numbers() {
  Bits<F> result{};
  for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(F)); ++i) result[i] = i;
  return result;
}

template <typename F>
inline Vec<F> select(Bits<F> condition, Vec<F> yes, Vec<F> no) {
  return condition ? yes : no;
}

// The unsigned integers as wide as T, as many as there are lanes.
template <typename T>
struct HalfVec {
  typedef uint16_t type __attribute__((vector_size(kVectorBytes / 2)));
};

inline Vec<float> widen(HalfVec<BFloat16>::type raw, BFloat16) {
  // The instructions by name: the compiler makes five of __builtin_convertvector's one.
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(raw));
  return std::bit_cast<Vec<float>>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(std::bit_cast<__m128i>(raw));
  return std::bit_cast<Vec<float>>(_mm256_slli_epi32(wide, 16));
#else
  using Wide = Vec<uint32_t>;
  return std::bit_cast<Vec<float>>(__builtin_convertvector(raw, Wide) << 16);
#endif
}

// Rounds to nearest, ties to even, on the upper 16 bits. A NaN is cut: arithmetic makes only quiet
// ones, whose mark is the highest bit of the mantissa.
inline HalfVec<BFloat16>::type narrow(Vec<float> value, BFloat16) {
#if defined(__AVX512F__)
  const __m512 v = std::bit_cast<__m512>(value);
  const __m512i bits = std::bit_cast<__m512i>(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits,
                                                _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return std::bit_cast<HalfVec<BFloat16>::type>(
      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
  using Wide = Vec<uint32_t>;
  const Wide bits = std::bit_cast<Wide>(value);
  const Wide rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  using Narrow = HalfVec<BFloat16>::type;
  return __builtin_convertvector((value != value ? bits : rounded) >> 16, Narrow);
#endif
}

inline Vec<float> widen(HalfVec<Half>::type raw, Half) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec<float>>(_mm512_cvtph_ps(std::bit_cast<__m256i>(raw)));
#elif defined(__F16C__)
  return std::bit_cast<Vec<float>>(_mm256_cvtph_ps(std::bit_cast<__m128i>(raw)));
#else
  Vec<float> result;
  for (int i = 0; i < kLanes<Half>; ++i) {
    result[i] = static_cast<float>(Half(raw[i], Half::from_bits()));
  }
  return result;
#endif
}

inline HalfVec<Half>::type narrow(Vec<float> value, Half) {
#if defined(__AVX512F__)
  return std::bit_cast<HalfVec<Half>::type>(
      _mm512_cvtps_ph(std::bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return std::bit_cast<HalfVec<Half>::type>(
      _mm256_cvtps_ph(std::bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  HalfVec<Half>::type result;
  for (int i = 0; i < kLanes<Half>; ++i) result[i] = Half(value[i]).x;
  return result;
#endif
}

template <typename T>
inline Vec<Compute<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    typename HalfVec<T>::type raw;
    std::memcpy(&raw, p, sizeof(raw));
    return widen(raw, T{});
  } else {
    Vec<T> result;
    std::memcpy(&result, p, sizeof(result));
    return result;
  }
}

template <typename T>
inline void store(T* p, Vec<Compute<T>> value) {
  if constexpr (sizeof(T) == 2) {
    const auto raw = narrow(value, T{});
    std::memcpy(p, &raw, sizeof(raw));
  } else {
    std::memcpy(p, &value, sizeof(value));
  }
}

// The first `count` elements, 0 <= count <= kLanes<T>; the other lanes are 0.
template <typename T>
inline Vec<Compute<T>> load_first(const T* p, int count) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
    return widen(std::bit_cast<typename HalfVec<T>::type>(raw), T{});
  }
#else
  T buffer[kLanes<T>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}

template <typename T>
inline void store_first(T* p, Vec<Compute<T>> value, int count) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), std::bit_cast<__m512d>(value));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), std::bit_cast<__m512>(value));
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask),
                             std::bit_cast<__m256i>(narrow(value, T{})));
  }
#else
  T buffer[kLanes<T>];
  store(buffer, value);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
#endif
}

template <typename T>
inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (static_cast<uintptr_t>(kLanes<T>) * sizeof(T)) == 0;
}

// A store that does not read the line it overwrites first; `p` is aligned to the vector's size.
template <typename T>
inline void store_streaming(T* p, Vec<Compute<T>> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    _mm512_stream_pd(reinterpret_cast<double*>(p), std::bit_cast<__m512d>(value));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(reinterpret_cast<float*>(p), std::bit_cast<__m512>(value));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), std::bit_cast<__m256i>(narrow(value, T{})));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) {
    _mm256_stream_pd(reinterpret_cast<double*>(p), std::bit_cast<__m256d>(value));
  } else if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(reinterpret_cast<float*>(p), std::bit_cast<__m256>(value));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), std::bit_cast<__m128i>(narrow(value, T{})));
  }
#else
  store(p, value);
#endif
}

// One bit a lane, lane 0 lowest, where the condition (all ones or all zeros a lane) holds.
template <typename F>
inline uint32_t to_bits(Bits<F> condition) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 8) {
    return _mm512_movepi64_mask(std::bit_cast<__m512i>(condition));
  } else {
    return _mm512_movepi32_mask(std::bit_cast<__m512i>(condition));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 8) {
    return static_cast<uint32_t>(_mm256_movemask_pd(std::bit_cast<__m256d>(condition)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_ps(std::bit_cast<__m256>(condition)));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(F)); ++i) {
    bits |= static_cast<uint32_t>(condition[i] & 1) << i;
  }
  return bits;
#endif
}

template <typename F>
inline Bits<F> from_bits(uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 8) {
    return std::bit_cast<Bits<F>>(_mm512_movm_epi64(static_cast<__mmask8>(bits)));
  } else {
    return std::bit_cast<Bits<F>>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
  }
#else
  using Int = typename BitsOf<F>::type;
  const Bits<F> lane_bit = (Bits<F>{} + Int{1}) << lane_numbers<F>();
  return (lane_bit & static_cast<Int>(bits)) != 0;
#endif
}

// Adds the lanes of `value`, as double, to as many lanes of `total`.
inline void add_wide(Vec<double>* total, Vec<double> value) { total[0] += value; }

inline void add_wide(Vec<double>* total, Vec<float> value) {
  typedef float HalfOfFloats __attribute__((vector_size(kVectorBytes / 2)));
  HalfOfFloats halves[2];
  std::memcpy(halves, &value, sizeof(value));
  total[0] += __builtin_convertvector(halves[0], Vec<double>);
  total[1] += __builtin_convertvector(halves[1], Vec<double>);
}

// Adds the first `count` lanes of `value` to as many doubles.
template <typename F>
inline void add_wide(double* total, Vec<F> value, int64_t count) {
  constexpr int64_t kCount = kVectorBytes / static_cast<int64_t>(sizeof(F));
  if (count < kCount) {
    for (int64_t i = 0; i < count; ++i) total[i] += static_cast<double>(value[i]);
    return;
  }
  Vec<double> wide[sizeof(double) / sizeof(F)];
  std::memcpy(wide, total, sizeof(wide));
  add_wide(wide, value);
  std::memcpy(total, wide, sizeof(wide));
}

// Σ over the lanes in double: halves onto halves, an order that depends on the lanes' number alone.
inline double sum(Vec<double> value) {
#if defined(__AVX512F__)
  const auto four = __builtin_shufflevector(value, value, 0, 1, 2, 3) +
                    __builtin_shufflevector(value, value, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const auto four = value;
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  const auto two =
      __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
#else
  const auto two = value;
#endif
  return two[0] + two[1];
}

inline double sum(Vec<float> value) {
  Vec<double> wide[2] = {};
  add_wide(wide, value);
  return sum(wide[0] + wide[1]);
}

}  // namespace normally
