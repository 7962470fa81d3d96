// What the norms with constants a channel take, batch norm and group norm: raw pointers of dense
// tensors that share one geometry.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.h"
#include "lanes.h"

namespace normally {

struct Normalization {
  Geometry geometry;    // of all that is normalized together: the batch, or one sample of it
  int64_t samples = 1;  // so many of these there are in the tensor
  bool training;        // normalize with the batch's statistics
  double eps;
  int64_t correction;
  int64_t act;  // a code of activation.h
  double act_param;

  int64_t numel() const { return samples * geometry.numel(); }
};

template <typename T>
struct ForwardCall : Normalization {
  const T* x;
  const T* residual;         // or null
  const Compute<T>* weight;  // (channels), or null
  const Compute<T>* bias;    // (channels), or null
  T* y;                      // or null: the statistics alone
  uint8_t* bits;             // one bit an element, rows padded to bytes; or null
  double* mean;              // (channels): written in training, else read
  double* var;               // (channels): likewise
};

template <typename T>
struct BackwardCall : Normalization {
  const T* dy;
  const T* x;
  const T* residual;         // or null
  const uint8_t* bits;       // or null; then there is no residual
  const Compute<T>* weight;  // (channels), or null
  const Compute<T>* bias;    // (channels), or null
  const double* mean;        // (channels)
  const double* var;         // (channels)
  T* dx;                     // or null
  T* dresidual;              // or null
  // Where the first sweep keeps dy · act'(z) for the second, or null: that of element `at` of
  // memory at g[at - g_begin].
  Compute<T>* g = nullptr;
  int64_t g_begin = 0;
  double* dweight;  // (channels), or null
  double* dbias;    // (channels), or null
  // (2, channels): Σg and Σg·x̂ divided by the number of values, where this tensor is but a part of
  // what was normalized together; or null. `var` is then what was divided by.
  const double* means = nullptr;
};

// y = act((x - hi) * scale + offset). hi is the mean as F, so that x - hi is exact near it; what
// the mean has beyond F, the low part, is in the offset: bias - low * scale.
template <typename F>
struct Affine {
  F hi, scale, offset;
};

// The mean less what F holds of it.
template <typename F>
inline double low_part(double mean) {
  return mean - static_cast<double>(static_cast<F>(mean));
}

inline double rstd_of(const Normalization& n, double var) {
  const double m = static_cast<double>(n.geometry.per_channel());
  if (n.training && n.correction) var *= m / (m - static_cast<double>(n.correction));
  return 1 / std::sqrt(var + n.eps);
}

template <typename F>
inline Affine<F> affine_of(double mean, double rstd, const F* weight, const F* bias, int64_t c) {
  const double scale = rstd * (weight ? static_cast<double>(weight[c]) : 1.0);
  const double offset = bias ? static_cast<double>(bias[c]) : 0.0;
  const double low = low_part<F>(mean);
  // Without a low part the product is left out: scale may be infinite.
  return {static_cast<F>(mean), static_cast<F>(scale),
          static_cast<F>(low == 0 ? offset : offset - low * scale)};
}

// Channels whose x - mean, or rstd² in the backward, leaves the range of float.
inline bool is_extreme(double mean, double var) { return std::abs(mean) > 1e37 || var > 1e30; }

// The bits: bytes a row, where the row of a value begins, and the value's bit in it.
inline int64_t bits_row_bytes(const Geometry& g) {
  return ((walks_rows(g) ? g.channels * g.inner : g.inner) + 7) / 8;
}

inline int64_t bits_row_begin(const Geometry& g, int64_t outer, int64_t c) {
  return (walks_rows(g) ? outer : outer * g.channels + c) * bits_row_bytes(g);
}
inline int64_t bits_column(const Geometry& g, int64_t c, int64_t i) {
  return walks_rows(g) ? c * g.inner + i : i;
}

}  // namespace normally
