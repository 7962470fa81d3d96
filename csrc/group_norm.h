// Group norm as the kernels see it: samples of (outer, C, inner), each with statistics of its own,
// one pair a group of neighbouring channels. Instance norm has a group a channel.
//
// The inner loops are those of batch norm, called for one sample at a time.
#pragma once

#include <vector>

#include "channel_norm.h"
#include "moments.h"
#include "row_moments.h"
#include "row_norm.h"

namespace normally {

// The groups of a call, whose `sample` describes the first sample.
struct Groups {
  int64_t samples, groups;  // in all, and a sample
  int64_t channels;         // a group
  int64_t run;              // values of a group, one beside the other where outer is 1

  Groups(const Normalization& sample, int64_t num_groups)
      : samples(sample.samples),
        groups(num_groups),
        channels(sample.geometry.channels / num_groups),
        run(sample.geometry.per_channel() * channels) {}

  int64_t all() const { return samples * groups; }

  // function(sample, first, last) for the groups [begin, end) of all, sample by sample.
  template <typename Function>
  void each_sample(int64_t begin, int64_t end, const Function& function) const {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / groups, last = std::min(end, (sample + 1) * groups);
      function(sample, i, last);
      i = last;
    }
  }
};

template <typename T>
struct GroupForward {
  ForwardCall<T> sample;  // the first one's pointers; no residual, no bits, no mean and var
  int64_t groups;
  double* mean;  // (samples, groups)
  double* var;   // (samples, groups)
};

template <typename T>
struct GroupBackward {
  BackwardCall<T> sample;  // likewise
  int64_t groups;
  const double* mean;
  const double* var;
};

template <typename T>
void group_norm_forward(const GroupForward<T>& call);
template <typename T>
void group_norm_backward(const GroupBackward<T>& call);

template <typename T>
ForwardCall<T> sample_of(const ForwardCall<T>& first, int64_t index) {
  ForwardCall<T> call = first;
  const int64_t at = index * call.geometry.numel();
  call.x += at;
  call.y += at;
  return call;
}

template <typename T>
BackwardCall<T> sample_of(const BackwardCall<T>& first, int64_t index) {
  BackwardCall<T> call = first;
  const int64_t at = index * call.geometry.numel();
  call.x += at;
  call.dy += at;
  if (call.dx) call.dx += at;
  return call;
}

// How a sample is walked across its channels: all columns, rows cut into segments by its shape
// alone, so that a sample has the same bits in any batch.
inline RowWalk sample_walk(const Geometry& g, int64_t lanes, int64_t item) {
  RowWalk walk(g, lanes, item, false);
  walk.group = walk.width;
  walk.segments = std::clamp<int64_t>(walk.rows / kRowMerge, 1, kMaxSegments);
  return walk;
}

// Threads share a sample, one after the other, where it is large; else each takes whole samples.
inline bool shares_samples(const Normalization& sample, const RowWalk& walk, int64_t threads) {
  return walk.segments >= 2 * threads || sample.samples < threads;
}

}  // namespace normally
