// The running statistics' update: in place, per channel, refused where a batch is not finite.
#include "running_stats.h"

#include <algorithm>
#include <cmath>

namespace normally {
namespace {

// One buffer that moves towards a batch statistic, in the buffer's own dtype.
struct Running {
  void* data = nullptr;
  int64_t stride = 1;
  ScalarType dtype = ScalarType::Float;

  explicit Running(const OptionalTensor& t) {
    if (!t) return;
    data = t->mutable_data_ptr();
    stride = t->stride(0);
    dtype = t->scalar_type();
  }

  bool holds(double value) const {
    bool finite = true;
    if (data) {
      with_type(dtype, [&](auto type) {
        finite = std::isfinite(static_cast<double>(static_cast<decltype(type)>(value)));
      });
    }
    return finite;
  }

  void move(int64_t c, double value, double factor) const {
    if (!data) return;
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      T& running = static_cast<T*>(data)[c * stride];
      running = static_cast<T>(static_cast<double>(running) * (1 - factor) + value * factor);
    });
  }
};

}  // namespace

void check_buffers(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& skipped_updates, int64_t channels) {
  for (const OptionalTensor* t : {&running_mean, &running_var, &skipped_updates}) {
    STD_TORCH_CHECK(!*t || ((*t)->dim() == 1 && (*t)->size(0) == channels),
                    "normally: running statistics must have one element a channel");
  }
  for (const OptionalTensor* t : {&running_mean, &running_var}) {
    if (*t) with_type((*t)->scalar_type(), [](auto) {});  // refuses other dtypes
  }
  STD_TORCH_CHECK(!skipped_updates || skipped_updates->is_contiguous(),
                  "normally: skipped_updates must be contiguous");
}

void update_running_stats(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& skipped_updates, const Tensor& stats,
                          std::optional<double> momentum, bool unbiased) {
  const int64_t channels = stats.size(1);
  check_buffers(running_mean, running_var, skipped_updates, channels);
  const Running mean(running_mean), var(running_var);
  const double* means = static_cast<const double*>(stats.const_data_ptr());
  const double* vars = means + channels;
  const double* counts = vars + channels;
  if (std::none_of(counts, counts + channels, [](double m) { return m > 0; })) return;

  int64_t batches = 1;
  if (num_batches_tracked) {
    batches = ++*static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  int64_t* skipped =
      skipped_updates ? static_cast<int64_t*>(skipped_updates->mutable_data_ptr()) : nullptr;
  for (int64_t c = 0; c < channels; ++c) {
    const double m = counts[c];
    if (m == 0) continue;
    const double batch_var = unbiased ? vars[c] * (m / (m - 1)) : vars[c];
    if (!mean.holds(means[c]) || !var.holds(batch_var)) {
      if (skipped) ++skipped[c];
      continue;
    }
    // The cumulative average counts the batches that entered this channel.
    const double entered =
        static_cast<double>(std::max<int64_t>(1, batches - (skipped ? skipped[c] : 0)));
    const double factor = momentum ? *momentum : 1 / entered;
    mean.move(c, means[c], factor);
    var.move(c, batch_var, factor);
  }
}

namespace {

void update(OptionalTensor running_mean, OptionalTensor running_var,
            OptionalTensor num_batches_tracked, OptionalTensor skipped_updates, const Tensor& stats,
            std::optional<double> momentum, bool unbiased) {
  update_running_stats(running_mean, running_var, num_batches_tracked, skipped_updates, stats,
                       momentum, unbiased);
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("update_running_stats_", TORCH_BOX(&normally::update));
}
