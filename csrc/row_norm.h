// Layer norm and RMS norm as the kernels see them: samples of n values, one beside the other
// (rows), or n values `inner` apart (columns).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "geometry.h"
#include "lanes.h"
#include "moments.h"

namespace normally {

// When a half-precision result is rounded: the codes of _ops/rms_norm.py.
inline constexpr int64_t kLlama = 1;  // before the weight, too

struct RowNorm {
  int64_t outer, n, inner;
  bool centred;  // layer norm; else RMS norm, whose mean is 0
  double eps;
  int64_t act;  // a code of activation.h
  double act_param;
  int64_t casting;

  int64_t samples() const { return outer * inner; }
  int64_t numel() const { return outer * n * inner; }
};

template <typename T>
struct RowForward : RowNorm {
  const T* x;
  const T* residual;         // or null
  const uint8_t* kept;       // (samples), or null
  const Compute<T>* weight;  // (n)
  const Compute<T>* bias;    // (n)
  T* sum;                    // x + residual, or null
  T* y;
  double* mean;  // (samples), or null where it is 0
  double* rstd;  // (samples)
};

template <typename T>
struct RowBackward : RowNorm {
  const T* dy;
  const T* dsum;  // or null
  const T* x;     // what was normalized
  const uint8_t* kept;
  const Compute<T>* weight;
  const Compute<T>* bias;
  const double* mean;
  const double* rstd;
  T* dx;            // or null
  double* dweight;  // (n), or null
  double* dbias;    // (n), or null
};

// inner is 1.
template <typename T>
void row_norm_forward(const RowForward<T>& call);
template <typename T>
void row_norm_backward(const RowBackward<T>& call);

// inner is more; there is neither a residual nor a mask, and the mean is not 0.
template <typename T>
void column_norm_forward(const RowForward<T>& call);
template <typename T>
void column_norm_backward(const RowBackward<T>& call);

// z = ((x - hi) * scale + offset) * weight + bias. hi is the mean as F; what the mean has beyond F
// is in the offset.
template <typename F>
struct SampleAffine {
  F hi, scale, offset;

  SampleAffine() = default;
  SampleAffine(double mean, double rstd) {
    hi = static_cast<F>(mean);
    const double low = mean - static_cast<double>(hi);
    scale = static_cast<F>(rstd);
    offset = static_cast<F>(low == 0 ? 0.0 : -low * rstd);
  }
};

// dx = g · weight · scale - (constant + (x - hi) · slope), from s1 = Σ g·weight and
// s2 = Σ g·weight·(x - hi).
template <typename F>
struct SampleSlope {
  F slope = 0, constant = 0;

  SampleSlope() = default;
  SampleSlope(const RowNorm& norm, double mean, double rstd, double s1, double s2) {
    const double n = static_cast<double>(norm.n);
    const double low = norm.centred ? mean - static_cast<double>(static_cast<F>(mean)) : 0.0;
    const double steep = rstd * rstd * rstd * (s2 - low * s1) / n;
    slope = static_cast<F>(steep);
    constant = static_cast<F>(norm.centred ? rstd * s1 / n - low * steep : 0.0);
  }
};

// Samples whose differences from the mean, their squares or rstd² leave the range of float.
inline bool is_extreme_sample(double mean, double rstd) {
  return !(std::abs(mean) < 1e37 && rstd > 1e-15 && rstd < 1e15);
}

// Segments of samples that keep sums for the parameters' gradients: enough for threads to share,
// cut by the shape alone.
inline int64_t sample_segments(int64_t samples) {
  return std::clamp<int64_t>(samples / 16, 1, kMaxSegments);
}

// The sums of a parameter's gradient, a row of them a segment; nothing where it is not wanted.
class SegmentSums {
 public:
  SegmentSums(double* total, int64_t segments, int64_t n)
      : total_(total),
        segments_(segments),
        n_(n),
        parts_(total && segments > 1 ? segments * n : 0) {
    if (total) std::fill(total, total + n, 0.0);
  }

  double* of(int64_t segment) { return total_ && segments_ > 1 ? &parts_[segment * n_] : total_; }

  void merge() const {
    if (!total_ || segments_ == 1) return;
    for (int64_t s = 0; s < segments_; ++s) {
      for (int64_t i = 0; i < n_; ++i) total_[i] += parts_[s * n_ + i];
    }
  }

 private:
  double* total_;
  int64_t segments_, n_;
  std::vector<double> parts_;
};

// The statistics of one sample in double, value by value.
template <typename T>
inline void slow_statistics(const RowNorm& norm, const T* x, int64_t stride, double* mean,
                            double* rstd) {
  const double n = static_cast<double>(norm.n);
  double centre = 0;
  if (norm.centred) {
    // Relative to the first value, so that equal values give exactly that value.
    const double first = static_cast<double>(x[0]);
    for (int64_t i = 0; i < norm.n; ++i) centre += (static_cast<double>(x[i * stride]) - first) / n;
    centre += first;
  }
  double squares = 0;
  for (int64_t i = 0; i < norm.n; ++i) {
    const double d = static_cast<double>(x[i * stride]) - centre;
    squares += d * d;
  }
  if (norm.centred) *mean = centre;
  *rstd = 1 / std::sqrt(squares / n + norm.eps);
}

}  // namespace normally
