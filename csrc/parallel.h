// torch's own thread pool: a second OpenMP runtime beside it would slow both.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace normally {

// function(begin, end) over parts of [0, tasks), one a thread; in this thread where `serial`.
template <typename Function>
inline void parallel(int64_t tasks, bool serial, const Function& function) {
  if (serial || tasks <= 1) {
    if (tasks > 0) function(int64_t{0}, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, 1, function);
  }
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace normally
