// The batch norm kernels.
#pragma once

#include "channel_norm.h"

namespace normally {

template <typename T>
void batch_norm_forward(const ForwardCall<T>& call);
template <typename T>
void batch_norm_backward(const BackwardCall<T>& call);

}  // namespace normally
