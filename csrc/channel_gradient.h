// The backward's inner loops: over a row of one channel, and over rows across channels.
#pragma once

#include <memory>

#include "channel_norm.h"
#include "row_moments.h"

namespace normally {

struct Sums {
  double g = 0, gx = 0;  // Σg and Σg·(x - hi), later Σg·(x - mean)
};

// dx = g · scale - (constant + (x - mean) · slope)
template <typename F>
struct Slope {
  F constant, slope;
};

// Float sums of one channel, kept over the rows of a chunk.
template <typename F>
struct RowSums {
  Vec<F> g = {}, gx = {};
  Sums total() const { return {sum(g), sum(gx)}; }
};

// What differs between activations; the walks that call it are compiled once a type.
template <typename T>
struct BackwardKernel {
  using F = Compute<T>;
  // Values [begin, begin + count) of channels [c, c_end) in outer row `o`; the arrays start at
  // channel c.
  virtual void sum_channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                            const Affine<F>* a, RowSums<F>* sums) const = 0;
  virtual void dx_channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                           const Affine<F>* a, const Slope<F>* s) const = 0;
  virtual void sum_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin,
                        int64_t end, const RowAffine<F>& a, double* sg, double* sgx) const = 0;
  virtual void dx_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin,
                       int64_t end, const RowAffine<F>& a, const F* constant,
                       const F* slope) const = 0;

  virtual ~BackwardKernel() = default;
};

// dx as a place for g, where its type holds g exactly.
template <typename T>
Compute<T>* place_in_dx(const BackwardCall<T>& call) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return call.dx;
  } else {
    return nullptr;
  }
}

// The kernels of the two sweeps; the first is null where nothing needs it.
template <typename T>
class Sweeps {
 public:
  using Kernel = BackwardKernel<T>;
  // g, where it is dear to compute again, is kept at `place` for the second sweep: `place` holds as
  // many values from element `begin` of memory on as the caller sweeps. Or it is null.
  explicit Sweeps(const BackwardCall<T>& call, Compute<T>* place = nullptr, int64_t begin = 0);
  Sweeps(const Sweeps&) = delete;  // the kernels point into it

  const Kernel* first() const { return first_.get(); }
  const Kernel* second() const { return second_ ? second_.get() : first_.get(); }

 private:
  BackwardCall<T> call_;
  std::unique_ptr<Kernel> first_, second_;
};

}  // namespace normally
