// The batch norm operators: check, allocate, dispatch, register.
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "batch_norm_operator.h"
#include "kept.h"
#include "parameters.h"
#include "running_stats.h"

namespace normally {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor weight,
                                           OptionalTensor bias, OptionalTensor residual,
                                           OptionalTensor mask, OptionalTensor mean,
                                           OptionalTensor var, double eps, int64_t correction,
                                           int64_t act, double act_param, bool save_bits) {
  STD_TORCH_CHECK(input.dim() >= 2, "normally::batch_norm: input must have 2 dimensions or more");
  check_parameter("batch_norm", "weight", weight, input, {input.size(1)});
  check_parameter("batch_norm", "bias", bias, input, {input.size(1)});
  check_buffers(mean, var, std::nullopt, input.size(1));
  check_like("batch_norm", "residual", residual, input);
  check_mask("batch_norm", mask, input, 1, 2);
  STD_TORCH_CHECK(!mask || !save_bits,
                  "normally::batch_norm: a mask and saved bits exclude each other");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(),
                  "normally::batch_norm: mean and var come together");

  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  Tensor output = fresh_like(x);
  const std::optional<Kept> kept = kept_of(mask, x);
  const Geometry geometry = kept ? kept->geometry() : geometry_of(output);
  const int64_t channels = input.size(1);
  Tensor stats = empty({3, channels}, {channels, 1}, ScalarType::Double);
  const int64_t bits_row = bits_row_bytes(geometry);
  const int64_t bits_rows =
      walks_rows(geometry) ? geometry.outer : geometry.outer * geometry.channels;
  Tensor bits = save_bits ? empty({bits_rows, bits_row}, {bits_row, 1}, ScalarType::Byte)
                          : empty({0, 0}, {1, 1}, ScalarType::Byte);
  double* saved = static_cast<double*>(stats.mutable_data_ptr());
  const double count = channels ? static_cast<double>(geometry.numel() / channels) : 0.0;
  STD_TORCH_CHECK(mean || count == 0 || count > std::max<double>(1, correction),
                  "normally::batch_norm: Expected more than 1 value per channel when training");
  std::fill(saved + 2 * channels, saved + 3 * channels, mean ? 0.0 : count);
  if (mean) {
    const auto means = values_of<double>(*mean), vars = values_of<double>(*var);
    std::copy(means.begin(), means.end(), saved);
    std::copy(vars.begin(), vars.end(), saved + channels);
  } else if (geometry.numel() == 0) {
    std::fill(saved, saved + channels, 0.0);
    std::fill(saved + channels, saved + 2 * channels, 1.0);
  }
  if (input.numel() == 0) return {output, stats, bits};

  const OptionalTensor r = residual ? OptionalTensor(laid_out_as(*residual, x)) : residual;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Values<Compute<T>> weights(weight), biases(bias);
    const Kept* keeps = kept ? &*kept : nullptr;
    const KeptInput<T> xs(keeps, read<T>(x)), residuals(keeps, read<T>(r));
    KeptOutput<T> ys(keeps, write<T>(output));
    ForwardCall<T> call;
    call.geometry = geometry;
    call.training = !mean;
    call.eps = eps;
    call.correction = correction;
    call.act = act;
    call.act_param = act_param;
    call.x = xs.data();
    call.residual = residuals.data();
    call.weight = weights.data();
    call.bias = biases.data();
    call.y = ys.data();
    call.bits = save_bits ? static_cast<uint8_t*>(bits.mutable_data_ptr()) : nullptr;
    call.mean = saved;
    call.var = saved + channels;
    if (geometry.numel() > 0) batch_norm_forward(call);
    ys.finish();
  });
  return {output, stats, bits};
}

std::tuple<Tensor, Tensor, Tensor> forward_and_update(
    const Tensor& input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor mask, OptionalTensor running_mean, OptionalTensor running_var,
    OptionalTensor num_batches_tracked, OptionalTensor skipped_updates,
    std::optional<double> momentum, bool unbiased, double eps, int64_t correction, int64_t act,
    double act_param, bool save_bits) {
  STD_TORCH_CHECK(input.dim() >= 2, "normally::batch_norm: input must have 2 dimensions or more");
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(eps > 0, "normally::batch_norm: eps must be positive in training");
  check_buffers(running_mean, running_var, skipped_updates, channels);
  auto result = forward(input, weight, bias, residual, mask, std::nullopt, std::nullopt, eps,
                        correction, act, act_param, save_bits);
  update_running_stats(running_mean, running_var, num_batches_tracked, skipped_updates,
                       std::get<1>(result), momentum, unbiased);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    OptionalTensor residual, OptionalTensor mask,
                                                    OptionalTensor bits, const Tensor& stats,
                                                    bool training, double eps, int64_t correction,
                                                    int64_t act, double act_param, int64_t need) {
  ParameterGradient dweight(weight, input, need), dbias(bias, input, need);
  auto [dx, dresidual] =
      batch_norm_gradients({grad_output, input, weight, bias, residual, mask, bits, stats, training,
                            eps, correction, act, act_param, nullptr},
                           need, dweight.sums(), dbias.sums());
  return {dx, dresidual, dweight.tensor(), dbias.tensor()};
}

}  // namespace

std::pair<Tensor, Tensor> batch_norm_gradients(const BackwardArguments& a, int64_t need,
                                               double* dweight, double* dbias) {
  const Tensor& input = a.input;
  check_parameter("batch_norm", "weight", a.weight, input, {input.size(1)});
  check_parameter("batch_norm", "bias", a.bias, input, {input.size(1)});
  check_like("batch_norm", "grad_output", a.grad_output, input);
  check_like("batch_norm", "residual", a.residual, input);
  check_mask("batch_norm", a.mask, input, 1, 2);
  STD_TORCH_CHECK(a.stats.is_contiguous() && a.stats.scalar_type() == ScalarType::Double &&
                      a.stats.numel() == 3 * input.size(1) && (!a.bits || a.bits->is_contiguous()),
                  "normally::batch_norm_backward: stats and bits must be those of the forward");

  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  const std::optional<Kept> kept = kept_of(a.mask, x);
  const Geometry geometry = kept ? kept->geometry() : geometry_of(x);
  const int64_t channels = input.size(1);
  Tensor dx = need & kNeedInput ? fresh_like(x) : nothing_like(input);
  Tensor dresidual = need & kNeedResidual ? fresh_like(x) : nothing_like(input);
  if (input.numel() == 0) return {dx, dresidual};

  const Tensor dy = laid_out_as(a.grad_output, x);
  const OptionalTensor r = a.residual ? OptionalTensor(laid_out_as(*a.residual, x)) : a.residual;
  const double* saved = static_cast<const double*>(a.stats.const_data_ptr());
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Values<Compute<T>> weights(a.weight), biases(a.bias);
    const Kept* keeps = kept ? &*kept : nullptr;
    const KeptInput<T> xs(keeps, read<T>(x)), dys(keeps, read<T>(dy));
    const KeptInput<T> residuals(keeps, read<T>(r));
    KeptOutput<T> dxs(keeps, need & kNeedInput ? write<T>(dx) : nullptr);
    KeptOutput<T> drs(keeps, need & kNeedResidual ? write<T>(dresidual) : nullptr);
    BackwardCall<T> call;
    call.geometry = geometry;
    call.training = a.training;
    call.eps = a.eps;
    call.correction = a.correction;
    call.act = a.act;
    call.act_param = a.act_param;
    call.dy = dys.data();
    call.x = xs.data();
    call.residual = residuals.data();
    call.bits = a.bits ? static_cast<const uint8_t*>(a.bits->const_data_ptr()) : nullptr;
    call.weight = weights.data();
    call.bias = biases.data();
    call.mean = saved;
    call.var = saved + channels;
    call.dx = dxs.data();
    call.dresidual = drs.data();
    call.dweight = dweight;
    call.dbias = dbias;
    call.means = a.means;
    if (geometry.numel() > 0) batch_norm_backward(call);
    dxs.finish();
    drs.finish();
  });
  return {dx, dresidual};
}

}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&normally::forward));
  m.impl("batch_norm_and_update_", TORCH_BOX(&normally::forward_and_update));
  m.impl("batch_norm_backward", TORCH_BOX(&normally::backward));
}
