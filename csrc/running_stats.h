// The running statistics' update, for the operator of that name and for batch norm in one call.
#pragma once

#include "tensors.h"

namespace normally {

// Moves the buffers that are there towards stats (3, channels), per channel, in place; a channel
// whose statistics its buffer cannot hold stays as it was and is counted. Nothing for no values.
void update_running_stats(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& skipped_updates, const Tensor& stats,
                          std::optional<double> momentum, bool unbiased);

// Refuses buffers that the update cannot write to, before anything is computed.
void check_buffers(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                   const OptionalTensor& skipped_updates, int64_t channels);

}  // namespace normally
