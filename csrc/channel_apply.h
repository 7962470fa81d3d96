// The forward's inner loops once the statistics are known: normalize, add, activate, store.
#pragma once

#include <memory>

#include "channel_norm.h"
#include "row_moments.h"

namespace normally {

// What differs between activations; the walks that call it are compiled once a type.
template <typename T>
struct ForwardKernel {
  using F = Compute<T>;
  // Values [begin, begin + count) of channels [c, c_end) in outer row `o`; `a` starts at channel c.
  virtual void channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                        const Affine<F>* a) const = 0;
  virtual void rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                    const RowAffine<F>& a) const = 0;

  virtual ~ForwardKernel() = default;
};

// The kernel of the call's activation; the call outlives it.
template <typename T>
std::unique_ptr<ForwardKernel<T>> forward_kernel(const ForwardCall<T>& call);

}  // namespace normally
