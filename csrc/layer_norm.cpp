// The layer norm operators; what they share with RMS norm is in row_operator.
#include "row_operator.h"

namespace normally {
namespace {

RowSettings settings(int64_t start_dim, int64_t num_dims, double eps, int64_t act,
                     double act_param) {
  return {"layer_norm", start_dim, start_dim + num_dims, true, eps, act, act_param, 0, false};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor residual,
                                           OptionalTensor weight, OptionalTensor bias,
                                           OptionalTensor mask, int64_t start_dim, int64_t num_dims,
                                           double eps, int64_t act, double act_param) {
  return row_operator_forward(settings(start_dim, num_dims, eps, act, act_param), input, residual,
                              weight, bias, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_sum,
                                            const Tensor& input, OptionalTensor weight,
                                            OptionalTensor bias, OptionalTensor mask,
                                            const Tensor& stats, int64_t start_dim,
                                            int64_t num_dims, double eps, int64_t act,
                                            double act_param, int64_t need) {
  return row_operator_backward(settings(start_dim, num_dims, eps, act, act_param), grad_output,
                               grad_sum, input, weight, bias, mask, stats, need);
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&normally::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&normally::backward));
}
