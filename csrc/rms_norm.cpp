// The RMS norm operators; what they share with layer norm is in row_operator.
#include "row_operator.h"

namespace normally {
namespace {

RowSettings settings(const Tensor& input, int64_t start_dim, double eps, int64_t casting,
                     bool zero_centered_weight) {
  return {"rms_norm", start_dim, input.dim(), false, eps, 0, 0.0, casting, zero_centered_weight};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor residual,
                                           OptionalTensor weight, OptionalTensor bias,
                                           OptionalTensor mask, int64_t start_dim, double eps,
                                           int64_t casting, bool zero_centered_weight) {
  STD_TORCH_CHECK(!bias, "normally::rms_norm: there is no bias");
  return row_operator_forward(settings(input, start_dim, eps, casting, zero_centered_weight), input,
                              residual, weight, bias, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_sum,
                                            const Tensor& input, OptionalTensor weight,
                                            OptionalTensor bias, OptionalTensor mask,
                                            const Tensor& stats, int64_t start_dim, double eps,
                                            int64_t casting, bool zero_centered_weight,
                                            int64_t need) {
  STD_TORCH_CHECK(!bias, "normally::rms_norm: there is no bias");
  return row_operator_backward(settings(input, start_dim, eps, casting, zero_centered_weight),
                               grad_output, grad_sum, input, weight, bias, mask, stats, need);
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&normally::forward));
  m.impl("rms_norm_backward", TORCH_BOX(&normally::backward));
}
