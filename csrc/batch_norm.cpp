// The batch norm operators: check, allocate, dispatch, register.
#include "batch_norm.h"

#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "running_stats.h"

namespace normally {
namespace {

enum Need : int64_t { kNeedInput = 1, kNeedParameters = 2, kNeedResidual = 4 };

// A parameter: one element a channel, of the input's dtype or float32 for a half input. The texts
// are short because functional.batch_norm says it again at length.
void check_parameter(const OptionalTensor& t, const Tensor& input, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == input.size(1), "normally::batch_norm: ", name,
                  " must have one element a channel");
  const ScalarType dtype = t->scalar_type(), own = input.scalar_type();
  const bool half = own == ScalarType::Half || own == ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == own || (half && dtype == ScalarType::Float),
                  "normally::batch_norm: ", name, " has a dtype that does not go with the input's");
}

void check_like(const OptionalTensor& t, const Tensor& input, const char* name) {
  if (!t) return;
  bool same = t->dim() == input.dim() && t->scalar_type() == input.scalar_type();
  for (int64_t d = 0; same && d < input.dim(); ++d) same = t->size(d) == input.size(d);
  STD_TORCH_CHECK(same, "normally::batch_norm: ", name, " must have the input's shape and dtype");
}

// A parameter's values, and null where there is none.
template <typename F>
struct Values {
  std::vector<F> values;
  bool present;
  explicit Values(const OptionalTensor& t) : present(t.has_value()) {
    if (t) values = values_of<F>(*t);
  }
  const F* data() const { return present ? values.data() : nullptr; }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor weight,
                                           OptionalTensor bias, OptionalTensor residual,
                                           OptionalTensor mean, OptionalTensor var, double eps,
                                           int64_t correction, int64_t act, double act_param,
                                           bool save_mask) {
  STD_TORCH_CHECK(input.dim() >= 2, "normally::batch_norm: input must have 2 dimensions or more");
  check_parameter(weight, input, "weight");
  check_parameter(bias, input, "bias");
  check_buffers(mean, var, std::nullopt, input.size(1));
  check_like(residual, input, "residual");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(),
                  "normally::batch_norm: mean and var come together");

  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  Tensor output = fresh_like(x);
  const Geometry geometry = geometry_of(output);
  Tensor stats = empty({2, geometry.channels}, {geometry.channels, 1}, ScalarType::Double);
  const int64_t mask_row = mask_row_bytes(geometry);
  const int64_t mask_rows =
      walks_rows(geometry) ? geometry.outer : geometry.outer * geometry.channels;
  Tensor mask = save_mask ? empty({mask_rows, mask_row}, {mask_row, 1}, ScalarType::Byte)
                          : empty({0, 0}, {1, 1}, ScalarType::Byte);
  double* saved = static_cast<double*>(stats.mutable_data_ptr());
  if (mean) {
    const auto means = values_of<double>(*mean), vars = values_of<double>(*var);
    std::copy(means.begin(), means.end(), saved);
    std::copy(vars.begin(), vars.end(), saved + geometry.channels);
  } else if (geometry.numel() == 0) {
    std::fill(saved, saved + 2 * geometry.channels, 0.0);
  }
  if (geometry.numel() == 0) return {output, stats, mask};

  const OptionalTensor r = residual ? OptionalTensor(laid_out_as(*residual, x)) : residual;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Values<Compute<T>> weights(weight), biases(bias);
    ForwardCall<T> call;
    call.geometry = geometry;
    call.training = !mean;
    call.eps = eps;
    call.correction = correction;
    call.act = act;
    call.act_param = act_param;
    call.x = static_cast<const T*>(x.const_data_ptr());
    call.residual = r ? static_cast<const T*>(r->const_data_ptr()) : nullptr;
    call.weight = weights.data();
    call.bias = biases.data();
    call.y = static_cast<T*>(output.mutable_data_ptr());
    call.mask = save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    call.mean = saved;
    call.var = saved + geometry.channels;
    batch_norm_forward(call);
  });
  return {output, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor> forward_and_update(
    const Tensor& input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
    OptionalTensor skipped_updates, std::optional<double> momentum, bool unbiased, double eps,
    int64_t correction, int64_t act, double act_param, bool save_mask) {
  STD_TORCH_CHECK(input.dim() >= 2, "normally::batch_norm: input must have 2 dimensions or more");
  const int64_t channels = input.size(1);
  const int64_t count = channels ? input.numel() / channels : 0;
  STD_TORCH_CHECK(count == 0 || count > std::max<int64_t>(1, correction),
                  "normally::batch_norm: too few values per channel");
  STD_TORCH_CHECK(eps > 0, "normally::batch_norm: eps must be positive in training");
  check_buffers(running_mean, running_var, skipped_updates, channels);
  auto result = forward(input, weight, bias, residual, std::nullopt, std::nullopt, eps, correction,
                        act, act_param, save_mask);
  update_running_stats(running_mean, running_var, num_batches_tracked, skipped_updates,
                       std::get<1>(result), count, momentum, unbiased);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    OptionalTensor residual, OptionalTensor mask,
                                                    const Tensor& stats, bool training, double eps,
                                                    int64_t correction, int64_t act,
                                                    double act_param, int64_t need) {
  check_parameter(weight, input, "weight");
  check_parameter(bias, input, "bias");
  check_like(grad_output, input, "grad_output");
  check_like(residual, input, "residual");
  STD_TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == ScalarType::Double &&
                      stats.numel() == 2 * input.size(1) && (!mask || mask->is_contiguous()),
                  "normally::batch_norm_backward: stats and mask must be those of the forward");

  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  const Geometry geometry = geometry_of(x);
  Tensor dx = need & kNeedInput ? fresh_like(x) : nothing_like(input);
  Tensor dresidual = need & kNeedResidual ? fresh_like(x) : nothing_like(input);
  const bool wants_dweight = weight && need & kNeedParameters;
  const bool wants_dbias = bias && need & kNeedParameters;
  Tensor dweight =
      wants_dweight ? empty({geometry.channels}, {1}, weight->scalar_type()) : nothing_like(input);
  Tensor dbias =
      wants_dbias ? empty({geometry.channels}, {1}, bias->scalar_type()) : nothing_like(input);
  std::vector<double> dweights(wants_dweight ? geometry.channels : 0);
  std::vector<double> dbiases(wants_dbias ? geometry.channels : 0);

  if (geometry.numel() > 0) {
    const Tensor dy = laid_out_as(grad_output, x);
    const OptionalTensor r = residual ? OptionalTensor(laid_out_as(*residual, x)) : residual;
    const double* saved = static_cast<const double*>(stats.const_data_ptr());
    with_type(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const Values<Compute<T>> weights(weight), biases(bias);
      BackwardCall<T> call;
      call.geometry = geometry;
      call.training = training;
      call.eps = eps;
      call.correction = correction;
      call.act = act;
      call.act_param = act_param;
      call.dy = static_cast<const T*>(dy.const_data_ptr());
      call.x = static_cast<const T*>(x.const_data_ptr());
      call.residual = r ? static_cast<const T*>(r->const_data_ptr()) : nullptr;
      call.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
      call.weight = weights.data();
      call.bias = biases.data();
      call.mean = saved;
      call.var = saved + geometry.channels;
      call.dx = need & kNeedInput ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
      call.dresidual =
          need & kNeedResidual ? static_cast<T*>(dresidual.mutable_data_ptr()) : nullptr;
      call.dweight = wants_dweight ? dweights.data() : nullptr;
      call.dbias = wants_dbias ? dbiases.data() : nullptr;
      batch_norm_backward(call);
    });
  }
  if (wants_dweight) write_values(dweights, dweight);
  if (wants_dbias) write_values(dbiases, dbias);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&normally::forward));
  m.impl("batch_norm_and_update_", TORCH_BOX(&normally::forward_and_update));
  m.impl("batch_norm_backward", TORCH_BOX(&normally::backward));
}
