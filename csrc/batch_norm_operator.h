// What the operators of batch norm share: the set-up of a backward over tensors.
#pragma once

#include <optional>
#include <utility>

#include "batch_norm.h"
#include "kept.h"
#include "parameters.h"

namespace normally {

// What a mask keeps of `x`, which is dense.
inline std::optional<Kept> kept_of(const OptionalTensor& mask, const Tensor& x) {
  if (!mask) return std::nullopt;
  return Kept(bytes_of(positions_of(*mask, x, 1, 2)), geometry_of(x));
}

struct BackwardArguments {
  const Tensor& grad_output;
  const Tensor& input;
  const OptionalTensor &weight, &bias, &residual, &mask, &bits;
  const Tensor& stats;
  bool training;
  double eps;
  int64_t correction, act;
  double act_param;
  const double* means;  // see BackwardCall
};

// The gradients of input and residual that `need` asks for, empty where it does not, and the sums
// that are those of weight and bias, (channels) each or null.
std::pair<Tensor, Tensor> batch_norm_gradients(const BackwardArguments& arguments, int64_t need,
                                               double* dweight, double* dbias);

}  // namespace normally
