// Batch norm cut where processes exchange numbers: a process's statistics, its sums, its gradients.
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "batch_norm_operator.h"

namespace normally {
namespace {

// (3, C): mean, biased variance and number of values; 0, 1 and 0 without values.
Tensor statistics(const Tensor& input, OptionalTensor mask) {
  STD_TORCH_CHECK(input.dim() >= 2,
                  "normally::channel_statistics: input must have 2 dimensions or more");
  check_mask("channel_statistics", mask, input, 1, 2);
  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  const std::optional<Kept> kept = kept_of(mask, x);
  const Geometry geometry = kept ? kept->geometry() : geometry_of(x);
  const int64_t channels = input.size(1);
  Tensor stats = empty({3, channels}, {channels, 1}, ScalarType::Double);
  double* saved = static_cast<double*>(stats.mutable_data_ptr());
  const bool is_empty = geometry.numel() == 0;
  std::fill(saved, saved + channels, 0.0);
  std::fill(saved + channels, saved + 2 * channels, 1.0);
  std::fill(saved + 2 * channels, saved + 3 * channels,
            is_empty ? 0.0 : static_cast<double>(geometry.per_channel()));
  if (is_empty) return stats;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const KeptInput<T> xs(kept ? &*kept : nullptr, read<T>(x));
    ForwardCall<T> call{};
    call.geometry = geometry;
    call.training = true;
    call.x = xs.data();
    call.mean = saved;
    call.var = saved + channels;
    batch_norm_forward(call);
  });
  return stats;
}

// (3, C) of all processes from (W, 2C + 2) messages, each the means, the variances, the count and
// the call's fingerprint; NaN if the fingerprints differ. As `distributed.merge`, in the ranks'
// order.
Tensor merge_statistics(const Tensor& messages) {
  STD_TORCH_CHECK(messages.dim() == 2 && messages.is_contiguous() && messages.size(0) > 0 &&
                      messages.scalar_type() == ScalarType::Double && messages.size(1) >= 2,
                  "normally::merge_statistics: messages must be (W, 2C + 2), contiguous, float64");
  const int64_t parts = messages.size(0), numbers = messages.size(1), channels = numbers / 2 - 1;
  const double* first = static_cast<const double*>(messages.const_data_ptr());
  Tensor stats = empty({3, channels}, {channels, 1}, ScalarType::Double);
  double* mean = static_cast<double*>(stats.mutable_data_ptr());
  double *var = mean + channels, *counts = var + channels;
  double total = 0;
  for (int64_t w = 0; w < parts; ++w) {
    const double* message = first + w * numbers;
    if (message[numbers - 1] != first[numbers - 1]) {
      std::fill(mean, mean + 3 * channels, std::numeric_limits<double>::quiet_NaN());
      return stats;
    }
    total += message[2 * channels];
  }
  const double m = std::max(total, 1.0);
  for (int64_t c = 0; c < channels; ++c) {
    // Relative to the largest mean: the others are then small, and equal ones exactly 0.
    double near = -std::numeric_limits<double>::infinity();
    for (int64_t w = 0; w < parts; ++w) {
      const double* message = first + w * numbers;
      if (message[2 * channels] > 0 && !(message[c] <= near)) near = message[c];
    }
    if (!std::isfinite(near)) near = 0;
    double apart = 0, spread = 0;
    for (int64_t w = 0; w < parts; ++w) {
      const double* message = first + w * numbers;
      if (message[2 * channels] > 0) apart += (message[c] - near) * message[2 * channels];
    }
    mean[c] = near + apart / m;
    for (int64_t w = 0; w < parts; ++w) {
      const double* message = first + w * numbers;
      const double distance = message[c] - mean[c];
      if (message[2 * channels] > 0) {
        spread += (message[channels + c] + distance * distance) * message[2 * channels];
      }
    }
    var[c] = total > 0 ? spread / m : 1;
    counts[c] = total;
  }
  return stats;
}

// A copy of (3, C) statistics whose variance is the one that was divided by.
Tensor normalizing(const Tensor& stats, int64_t correction) {
  const int64_t channels = stats.size(1);
  Tensor result = torch::stable::clone(stats);
  double* var = static_cast<double*>(result.mutable_data_ptr()) + channels;
  const double* count = var + channels;
  for (int64_t c = 0; correction && c < channels; ++c) {
    var[c] *= count[c] / std::max(1.0, count[c] - static_cast<double>(correction));
  }
  return result;
}

// (2, C): Σg and Σg·x̂.
Tensor gradient_sums(const Tensor& grad_output, const Tensor& input, OptionalTensor weight,
                     OptionalTensor bias, OptionalTensor residual, OptionalTensor mask,
                     OptionalTensor bits, const Tensor& stats, double eps, int64_t correction,
                     int64_t act, double act_param) {
  const int64_t channels = input.size(1);
  Tensor sums = empty({2, channels}, {channels, 1}, ScalarType::Double);
  double* values = static_cast<double*>(sums.mutable_data_ptr());
  std::fill(values, values + 2 * channels, 0.0);
  batch_norm_gradients({grad_output, input, weight, bias, residual, mask, bits,
                        normalizing(stats, correction), false, eps, 0, act, act_param, nullptr},
                       0, values + channels, values);
  return sums;
}

std::tuple<Tensor, Tensor> gradient(const Tensor& grad_output, const Tensor& input,
                                    OptionalTensor weight, OptionalTensor bias,
                                    OptionalTensor residual, OptionalTensor mask,
                                    OptionalTensor bits, const Tensor& stats, const Tensor& means,
                                    double eps, int64_t correction, int64_t act, double act_param,
                                    int64_t need) {
  STD_TORCH_CHECK(means.is_contiguous() && means.scalar_type() == ScalarType::Double &&
                      means.numel() == 2 * input.size(1),
                  "normally::batch_norm_gradient: means must be (2, C), contiguous and float64");
  return batch_norm_gradients(
      {grad_output, input, weight, bias, residual, mask, bits, normalizing(stats, correction), true,
       eps, 0, act, act_param, static_cast<const double*>(means.const_data_ptr())},
      need, nullptr, nullptr);
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&normally::statistics));
  m.impl("merge_statistics", TORCH_BOX(&normally::merge_statistics));
  m.impl("batch_norm_gradient_sums", TORCH_BOX(&normally::gradient_sums));
  m.impl("batch_norm_gradient", TORCH_BOX(&normally::gradient));
}
