// Batch norm forward: statistics, then normalize + residual + activation while the slab is cached.
#include <cmath>
#include <vector>

#include "activation.h"
#include "batch_norm.h"
#include "bits.h"
#include "channel_apply.h"
#include "moments.h"
#include "pages.h"
#include "parallel.h"

namespace normally {
namespace {

// Mean and variance of a channel in double, value by value: where float sums overflowed.
template <typename T>
Moments slow_moments(const ForwardCall<T>& call, int64_t c) {
  const Geometry& g = call.geometry;
  Moments result;
  result.count = static_cast<double>(g.per_channel());
  for (int pass = 0; pass < 2; ++pass) {
    double total = 0;
    for (int64_t o = 0; o < g.outer; ++o) {
      const T* x = call.x + (o * g.channels + c) * g.inner;
      for (int64_t i = 0; i < g.inner; ++i) {
        const double d = static_cast<double>(x[i]) - result.mean;
        total += pass == 0 ? d : d * d;
      }
    }
    (pass == 0 ? result.mean : result.m2) = pass == 0 ? total / result.count : total;
  }
  return result;
}

// A channel whose values or squares leave the range of float: one by one, in double.
template <typename T>
void forward_extreme(const ForwardCall<T>& call, int64_t c) {
  const Geometry& g = call.geometry;
  const double mean = call.mean[c], rstd = rstd_of(call, call.var[c]);
  const double scale = rstd * (call.weight ? static_cast<double>(call.weight[c]) : 1.0);
  const double offset = call.bias ? static_cast<double>(call.bias[c]) : 0.0;
  for (int64_t o = 0; o < g.outer; ++o) {
    for (int64_t i = 0; i < g.inner; ++i) {
      const int64_t at = (o * g.channels + c) * g.inner + i;
      double z = (static_cast<double>(call.x[at]) - mean) * scale + offset;
      if (call.residual) z += static_cast<double>(call.residual[at]);
      if (call.bits) {
        const bool passes = activation_gradient(call.act, 1, z, 0) == 1;
        write_bit(call.bits + bits_row_begin(g, o, c), bits_column(g, c, i), passes);
      }
      call.y[at] =
          static_cast<T>(static_cast<Compute<T>>(activation_value(call.act, z, call.act_param)));
    }
  }
}

template <typename T>
void keep(const ForwardCall<T>& call, int64_t c, Moments moments) {
  if (!std::isfinite(moments.mean) || !std::isfinite(moments.m2)) moments = slow_moments(call, c);
  call.mean[c] = moments.mean;
  call.var[c] = moments.m2 / moments.count;
}

// Channels [begin, end), one segment of their chunks.
template <typename T>
void segment_moments(const ForwardCall<T>& call, const ChannelWalk& walk, int64_t segment,
                     int64_t begin, int64_t end, Moments* moments) {
  const Geometry& g = call.geometry;
  const int64_t stride = g.channels * g.inner;
  ShiftedSums<Compute<T>> sums[kMaxBlock];
  const int64_t first = walk.segment_begin(segment), last = walk.segment_begin(segment + 1);
  for (int64_t index = first; index < last; ++index) {
    const Chunk chunk(walk, g, index);
    for (int64_t c = begin; c < end; ++c) {
      const T* x = call.x + (chunk.row * g.channels + c) * g.inner + chunk.begin;
      sums[c - begin].reset(index == first
                                ? first_shift(x, chunk.row_end - chunk.row, stride, chunk.count)
                                : static_cast<Compute<T>>(moments[c - begin].mean));
    }
    for (int64_t row = chunk.row; row < chunk.row_end; ++row) {
      const T* x = call.x + row * stride + begin * g.inner + chunk.begin;
      // The next row begins where no hardware foresees it, unless rows are long.
      if (end - begin > 1 && row + 1 < g.outer) {
        prefetch(x + stride, (end - begin) * g.inner * static_cast<int64_t>(sizeof(T)));
      }
      for (int64_t c = begin; c < end; ++c, x += g.inner) sums[c - begin].add(x, chunk.count);
    }
    for (int64_t c = begin; c < end; ++c) {
      moments[c - begin].merge(sums[c - begin].moments(chunk.values()));
    }
  }
}

template <typename T>
void forward_planes(const ForwardCall<T>& call, const ForwardKernel<T>& kernel) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const ChannelWalk walk(g);
  const int64_t threads = thread_count();
  const bool serial = g.numel() < kSerialElements || threads == 1;
  const int64_t block = channel_block(g, sizeof(T), threads);
  const int64_t blocks = ceil_div(g.channels, block);
  std::vector<Moments> moments(g.channels * walk.segments);

  const auto statistics = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    segment_moments(call, walk, segment, begin, end, &moments[segment * g.channels + begin]);
  };
  const auto merge = [&](int64_t c) {
    Moments total;
    for (int64_t s = 0; s < walk.segments; ++s) total.merge(moments[s * g.channels + c]);
    keep(call, c, total);
  };
  const auto apply = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    Affine<F> affine[kMaxBlock];
    for (int64_t c = begin; c < end; ++c) {
      affine[c - begin] =
          affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c);
    }
    // Backwards: what the statistics read last is still in the cache.
    for (int64_t index = walk.segment_begin(segment + 1) - 1; index >= walk.segment_begin(segment);
         --index) {
      const Chunk chunk(walk, g, index);
      for (int64_t row = chunk.row_end - 1; row >= chunk.row; --row) {
        kernel.channels(row, begin, end, chunk.begin, chunk.count, affine);
      }
    }
  };

  if (serial || blocks >= 3 * threads || blocks % threads == 0) {
    parallel(blocks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t s = 0; s < walk.segments; ++s) statistics(b, s);
        for (int64_t c = b * block; c < std::min((b + 1) * block, g.channels); ++c) merge(c);
        for (int64_t s = walk.segments - 1; call.y && s >= 0; --s) apply(b, s);
      }
      finish_streaming();
    });
    return;
  }
  const int64_t tasks = blocks * walk.segments;
  parallel(tasks, false, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) statistics(t / walk.segments, t % walk.segments);
  });
  for (int64_t c = 0; c < g.channels; ++c) merge(c);
  if (!call.y) return;
  parallel(tasks, false, [&](int64_t begin, int64_t end) {
    for (int64_t t = end - 1; t >= begin; --t) apply(t / walk.segments, t % walk.segments);
    finish_streaming();
  });
}

// Evaluation: nothing to wait for, so in the order of memory, where fresh pages are filled while
// the system's zeros are still in the cache (a third of the time of a large output).
template <typename T>
void evaluate_planes(const ForwardCall<T>& call, const ForwardKernel<T>& kernel) {
  const Geometry& g = call.geometry;
  std::vector<Affine<Compute<T>>> affine;
  for (int64_t c = 0; c < g.channels; ++c) {
    affine.push_back(
        affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c));
  }
  parallel(g.outer * g.channels, g.numel() < kSerialElements, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t o = row / g.channels, c = row % g.channels;
      const int64_t c_end = std::min(g.channels, c + end - row);
      kernel.channels(o, c, c_end, 0, g.inner, &affine[c]);
      row += c_end - c;
    }
    finish_streaming();
  });
}

template <typename T>
void forward_rows(const ForwardCall<T>& call, const ForwardKernel<T>& kernel) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const RowWalk walk(g, kLanes<T>, sizeof(T), call.bits != nullptr);
  const bool serial = g.numel() < kSerialElements;
  RowAffine<F> affine(walk.width);
  RowMoments moments(call.training ? walk.segments : 0, walk.width);

  // Statistics of the channels that own columns [begin, end), then their constants.
  const auto prepare = [&](int64_t begin, int64_t end) {
    for_channels_of(walk, g, begin, end, [&](int64_t c, const auto& columns) {
      if (call.training) keep(call, c, moments.merged(walk, columns));
      affine.set(columns,
                 affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c));
    });
  };

  if (walk.groups() > 1) {
    parallel(walk.groups(), serial, [&](int64_t first, int64_t last) {
      RowScratch<F> scratch(walk.group);
      for (int64_t group = first; group < last; ++group) {
        const int64_t begin = group * walk.group, end = std::min(begin + walk.group, walk.width);
        if (call.training) moments.take(call.x, walk, 0, begin, end, scratch);
        prepare(begin, end);
        if (call.y) kernel.rows(walk.width, 0, walk.rows, begin, end, affine);
      }
      finish_streaming();
    });
  } else {
    if (call.training) {
      parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
        RowScratch<F> scratch(walk.width);
        for (int64_t s = first; s < last; ++s)
          moments.take(call.x, walk, s, 0, walk.width, scratch);
      });
    }
    prepare(0, walk.width);
    if (!call.y) return;
    // The same rows in the same thread.
    parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
      kernel.rows(walk.width, walk.segment_begin(first), walk.segment_begin(last), 0, walk.width,
                  affine);
      finish_streaming();
    });
  }
}

}  // namespace

template <typename T>
void batch_norm_forward(const ForwardCall<T>& call) {
  const std::unique_ptr<ForwardKernel<T>> kernel = forward_kernel(call);
  if (walks_rows(call.geometry)) {
    forward_rows(call, *kernel);
  } else if (call.training) {
    forward_planes(call, *kernel);
  } else {
    evaluate_planes(call, *kernel);
  }
  for (int64_t c = 0; call.y && c < call.geometry.channels; ++c) {
    if (is_extreme(call.mean[c], call.var[c])) forward_extreme(call, c);
  }
}

template void batch_norm_forward(const ForwardCall<double>&);
template void batch_norm_forward(const ForwardCall<float>&);
template void batch_norm_forward(const ForwardCall<BFloat16>&);
template void batch_norm_forward(const ForwardCall<Half>&);

}  // namespace normally
