// What the operators of layer norm and RMS norm share: from tensors to samples and back.
#pragma once

#include <tuple>

#include "tensors.h"

namespace normally {

// The settings of a call that do not depend on the input's layout.
struct RowSettings {
  const char* op;
  int64_t start, end;  // the dimensions that are normalized together
  bool centred;
  double eps;
  int64_t act;
  double act_param;
  int64_t casting;
  bool zero_centered_weight;
};

// (output, sum, stats): stats are the samples' means, where they have one, and 1/√(var + eps).
std::tuple<Tensor, Tensor, Tensor> row_operator_forward(
    const RowSettings& settings, const Tensor& input, const OptionalTensor& residual,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mask);

// The gradients of input, weight and bias; what `need` does not ask for is empty.
std::tuple<Tensor, Tensor, Tensor> row_operator_backward(
    const RowSettings& settings, const Tensor& grad_output, const OptionalTensor& grad_sum,
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mask, const Tensor& stats, int64_t need);

}  // namespace normally
