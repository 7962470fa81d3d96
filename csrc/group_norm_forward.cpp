// Group norm forward: a group's statistics, then its output while it is in the cache.
#include "activation.h"
#include "channel_apply.h"
#include "group_norm.h"
#include "pages.h"
#include "parallel.h"

namespace normally {
namespace {

// Values that are worth a segment of their own, where several threads share a group.
constexpr int64_t kSegmentValues = 16 * kChunk;

template <typename T>
class GroupNormForward {
  using F = Compute<T>;

 public:
  explicit GroupNormForward(const GroupForward<T>& forward_call)
      : call(forward_call),
        g(call.sample.geometry),
        groups(call.sample, call.groups),
        serial(call.sample.numel() < kSerialElements),
        rstds(groups.all()) {}

  void run() {
    if (g.outer == 1 && walks_rows(g)) {
      short_runs();
    } else if (g.outer == 1) {
      runs();
    } else {
      rows();
    }
    for (int64_t i = 0; i < groups.all(); ++i) {
      if (is_extreme_sample(call.mean[i], rstds[i])) extreme(i);
    }
  }

 private:
  const GroupForward<T>& call;
  const Geometry& g;
  const Groups groups;
  const bool serial;
  std::vector<double> rstds;  // (samples, groups)

  // Where float sums overflowed, the statistics are still to come.
  void keep(int64_t i, const Moments& moments) {
    call.mean[i] = moments.mean;
    call.var[i] = moments.m2 / moments.count;
    rstds[i] = 1 / std::sqrt(call.var[i] + call.sample.eps);
  }

  Affine<F> affine(int64_t sample, int64_t c) const {
    const int64_t i = sample * groups.groups + c / groups.channels;
    return affine_of(call.mean[i], rstds[i], call.sample.weight, call.sample.bias, c);
  }

  // --- a group is one run of memory ---------------------------------------------------------

  void runs() {
    const int64_t segments = std::clamp<int64_t>(groups.run / kSegmentValues, 1, kMaxSegments);
    if (segments == 1 || groups.all() >= 2 * thread_count()) {
      parallel(groups.all(), serial, [&](int64_t begin, int64_t end) {
        groups.each_sample(begin, end, [&](int64_t sample, int64_t first, int64_t last) {
          const ForwardCall<T> one = sample_of(call.sample, sample);
          const auto kernel = forward_kernel(one);
          for (int64_t i = first; i < last; ++i) {
            Moments total;
            for (int64_t s = 0; s < segments; ++s) total.merge(segment(i, s, segments));
            keep(i, total);
            const int64_t c = i % groups.groups * groups.channels;
            apply(*kernel, sample, c, c + groups.channels);
          }
        });
        finish_streaming();
      });
      return;
    }
    std::vector<Moments> parts(groups.all() * segments);
    parallel(groups.all() * segments, serial, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        parts[p] = segment(p / segments, p % segments, segments);
      }
    });
    for (int64_t i = 0; i < groups.all(); ++i) {
      Moments total;
      for (int64_t s = 0; s < segments; ++s) total.merge(parts[i * segments + s]);
      keep(i, total);
    }
    parallel(groups.samples * g.channels, serial, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ForwardCall<T> one = sample_of(call.sample, i / g.channels);
        apply(*forward_kernel(one), i / g.channels, i % g.channels, i % g.channels + 1);
      }
      finish_streaming();
    });
  }

  Moments segment(int64_t i, int64_t s, int64_t segments) const {
    const int64_t begin = s * groups.run / segments, end = (s + 1) * groups.run / segments;
    return moments_of(call.sample.x + i * groups.run + begin, end - begin);
  }

  void apply(const ForwardKernel<T>& kernel, int64_t sample, int64_t c, int64_t c_end) const {
    for (; c < c_end; ++c) {
      const Affine<F> a = affine(sample, c);
      kernel.channels(0, c, c + 1, 0, g.inner, &a);
    }
  }

  // Short rows: all constants of a sample side by side, as in a row across channels.
  void short_runs() {
    const int64_t width = g.channels * g.inner;
    parallel(groups.samples, serial, [&](int64_t begin, int64_t end) {
      RowAffine<F> constants(width);
      for (int64_t sample = begin; sample < end; ++sample) {
        for (int64_t k = 0; k < groups.groups; ++k) {
          const int64_t i = sample * groups.groups + k;
          keep(i, segment(i, 0, 1));
        }
        for (int64_t c = 0; c < g.channels; ++c) {
          constants.set(ChannelColumns{c * g.inner, g.inner, width, width}, affine(sample, c));
        }
        const ForwardCall<T> one = sample_of(call.sample, sample);
        forward_kernel(one)->rows(width, 0, 1, 0, width, constants);
      }
      finish_streaming();
    });
  }

  // --- rows across the channels -------------------------------------------------------------

  void rows() {
    const RowWalk walk = sample_walk(g, kLanes<T>, sizeof(T));
    if (shares_samples(call.sample, walk, thread_count()) && !serial) {
      for (int64_t sample = 0; sample < groups.samples; ++sample) {
        one_sample(sample, walk, false);
      }
      return;
    }
    parallel(groups.samples, serial, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) one_sample(sample, walk, true);
    });
  }

  void one_sample(int64_t sample, const RowWalk& walk, bool alone) {
    const ForwardCall<T> one = sample_of(call.sample, sample);
    RowMoments moments(walk.segments, walk.width);
    parallel(walk.segments, alone, [&](int64_t first, int64_t last) {
      RowScratch<F> scratch(walk.width);
      for (int64_t s = first; s < last; ++s) moments.take(one.x, walk, s, 0, walk.width, scratch);
    });
    std::vector<Moments> of_group(groups.groups);
    for_channels_of(walk, g, 0, walk.width, [&](int64_t c, const ChannelColumns& columns) {
      of_group[c / groups.channels].merge(moments.merged(walk, columns));
    });
    for (int64_t k = 0; k < groups.groups; ++k) keep(sample * groups.groups + k, of_group[k]);
    RowAffine<F> constants(walk.width);
    for_channels_of(walk, g, 0, walk.width, [&](int64_t c, const ChannelColumns& columns) {
      constants.set(columns, affine(sample, c));
    });
    const auto kernel = forward_kernel(one);
    // The same rows in the same thread.
    parallel(walk.segments, alone, [&](int64_t first, int64_t last) {
      kernel->rows(walk.width, walk.segment_begin(first), walk.segment_begin(last), 0, walk.width,
                   constants);
      finish_streaming();
    });
  }

  // A group beyond the range of float: once more, in double, value by value.
  void extreme(int64_t i) {
    const int64_t sample = i / groups.groups, first = i % groups.groups * groups.channels;
    const ForwardCall<T> one = sample_of(call.sample, sample);
    const auto each = [&](auto&& function) {
      for (int64_t c = first; c < first + groups.channels; ++c) {
        for (int64_t o = 0; o < g.outer; ++o) {
          const int64_t at = (o * g.channels + c) * g.inner;
          for (int64_t k = 0; k < g.inner; ++k) function(c, at + k);
        }
      }
    };
    const double m = static_cast<double>(groups.run);
    double mean = 0, squares = 0;
    each([&](int64_t, int64_t at) { mean += static_cast<double>(one.x[at]) / m; });
    // Again from near the mean: equal values give exactly that value.
    double rest = 0;
    each([&](int64_t, int64_t at) { rest += (static_cast<double>(one.x[at]) - mean) / m; });
    mean += rest;
    each([&](int64_t, int64_t at) {
      const double d = static_cast<double>(one.x[at]) - mean;
      squares += d * d;
    });
    call.mean[i] = mean;
    call.var[i] = squares / m;
    rstds[i] = 1 / std::sqrt(call.var[i] + call.sample.eps);
    each([&](int64_t c, int64_t at) {
      double z = (static_cast<double>(one.x[at]) - mean) * rstds[i];
      if (one.weight) z *= static_cast<double>(one.weight[c]);
      if (one.bias) z += static_cast<double>(one.bias[c]);
      one.y[at] = static_cast<T>(static_cast<F>(activation_value(one.act, z, one.act_param)));
    });
  }
};

}  // namespace

template <typename T>
void group_norm_forward(const GroupForward<T>& call) {
  GroupNormForward<T>(call).run();
}

template void group_norm_forward(const GroupForward<double>&);
template void group_norm_forward(const GroupForward<float>&);
template void group_norm_forward(const GroupForward<BFloat16>&);
template void group_norm_forward(const GroupForward<Half>&);

}  // namespace normally
