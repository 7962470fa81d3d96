// Group norm backward: first the sums of every channel of a sample, then dx.
//
//   g  = dy · act'(z)                     z = x̂ · weight + bias
//   dx = rstd · (g · weight - mean(g · weight) - x̂ · mean(g · weight · x̂))   means over a group
#include <optional>

#include "activation.h"
#include "channel_gradient.h"
#include "group_norm.h"
#include "pages.h"
#include "parallel.h"

namespace normally {
namespace {

// Up to so many values of a group are kept in float between the two sweeps: half a megabyte.
constexpr int64_t kKeptValues = int64_t{128} << 10;

template <typename T>
class GroupNormBackward {
  using F = Compute<T>;

 public:
  explicit GroupNormBackward(const GroupBackward<T>& backward_call)
      : call(backward_call),
        g(call.sample.geometry),
        groups(call.sample, call.groups),
        serial(call.sample.numel() < kSerialElements),
        sums(groups.samples * g.channels),
        slopes(groups.all()),
        rstds(groups.all()) {
    for (int64_t i = 0; i < groups.all(); ++i) {
      rstds[i] = 1 / std::sqrt(call.var[i] + call.sample.eps);
    }
  }

  void run() {
    if (g.outer == 1 && !walks_rows(g)) {
      runs();
    } else {
      rows();
    }
    for (int64_t i = 0; i < groups.all(); ++i) {
      if (is_extreme_sample(call.mean[i], rstds[i])) extreme(i);
    }
    for (int64_t c = 0; c < g.channels; ++c) {
      Sums total;
      for (int64_t n = 0; n < groups.samples; ++n) {
        total.g += sums[n * g.channels + c].g;
        total.gx += sums[n * g.channels + c].gx * rstds[n * groups.groups + c / groups.channels];
      }
      if (call.sample.dbias) call.sample.dbias[c] = total.g;
      if (call.sample.dweight) call.sample.dweight[c] = total.gx;
    }
  }

 private:
  const GroupBackward<T>& call;
  const Geometry& g;
  const Groups groups;
  const bool serial;
  std::vector<Sums> sums;        // (samples, channels): Σg and Σg·(x - mean)
  std::vector<Slope<F>> slopes;  // (samples, groups)
  std::vector<double> rstds;     // (samples, groups)

  Affine<F> affine(int64_t sample, int64_t c) const {
    const int64_t i = sample * groups.groups + c / groups.channels;
    Affine<F> a = affine_of(call.mean[i], rstds[i], call.sample.weight, call.sample.bias, c);
    // The terms of a value that is its own mean cancel; rounded, they would not quite.
    if (groups.run == 1) a.scale = 0;
    return a;
  }

  // The sums of a channel, given with x - hi.
  void keep(int64_t sample, int64_t c, Sums total) {
    const double mean = call.mean[sample * groups.groups + c / groups.channels];
    total.gx -= low_part<F>(mean) * total.g;
    sums[sample * g.channels + c] = total;
  }

  // From the sums of a group's channels to what is taken from each g.
  void merge(int64_t i) {
    slopes[i] = {F(0), F(0)};
    if (groups.run == 1) return;
    const int64_t first = i % groups.groups * groups.channels;
    const Sums* of_channel = &sums[i / groups.groups * g.channels];
    double s1 = 0, s2 = 0;
    for (int64_t c = first; c < first + groups.channels; ++c) {
      const double w = call.sample.weight ? static_cast<double>(call.sample.weight[c]) : 1.0;
      s1 += w * of_channel[c].g;
      s2 += w * of_channel[c].gx;
    }
    const double m = static_cast<double>(groups.run), r = rstds[i];
    const double slope = r * r * r * s2 / m;
    slopes[i] = {static_cast<F>(r * s1 / m - low_part<F>(call.mean[i]) * slope),
                 static_cast<F>(slope)};
  }

  // --- a channel of a sample is one run of memory -------------------------------------------

  void runs() {
    if (groups.all() >= 2 * thread_count() || serial) {
      // What T cannot hold of g is kept beside, where it stays in the cache.
      const bool keeps =
          sizeof(T) < sizeof(F) && groups.run <= kKeptValues && is_costly(call.sample.act);
      parallel(groups.all(), serial, [&](int64_t begin, int64_t end) {
        std::vector<F> kept(keeps ? groups.run : 0);
        groups.each_sample(begin, end, [&](int64_t sample, int64_t first, int64_t last) {
          const BackwardCall<T> one = sample_of(call.sample, sample);
          std::optional<Sweeps<T>> shared;
          if (!keeps) shared.emplace(one, place_in_dx(one));
          for (int64_t i = first; i < last; ++i) {
            const int64_t c = i % groups.groups * groups.channels;
            if (keeps) shared.emplace(one, kept.data(), c * g.inner);
            for (int64_t k = c; k < c + groups.channels; ++k) add_up(*shared, sample, k);
            merge(i);
            for (int64_t k = c + groups.channels - 1; k >= c; --k) {
              differentiate(*shared, sample, k);
            }
          }
        });
        finish_streaming();
      });
      return;
    }
    const int64_t all = groups.samples * g.channels;
    parallel(all, false, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const BackwardCall<T> one = sample_of(call.sample, k / g.channels);
        const Sweeps<T> sweeps(one, place_in_dx(one));
        add_up(sweeps, k / g.channels, k % g.channels);
      }
    });
    for (int64_t i = 0; i < groups.all(); ++i) merge(i);
    parallel(all, false, [&](int64_t begin, int64_t end) {
      for (int64_t k = end - 1; k >= begin; --k) {
        const BackwardCall<T> one = sample_of(call.sample, k / g.channels);
        const Sweeps<T> sweeps(one, place_in_dx(one));
        differentiate(sweeps, k / g.channels, k % g.channels);
      }
      finish_streaming();
    });
  }

  void add_up(const Sweeps<T>& sweeps, int64_t sample, int64_t c) {
    const Affine<F> a = affine(sample, c);
    Sums total;
    for (int64_t begin = 0; begin < g.inner; begin += kChunk) {
      RowSums<F> chunk;
      const int64_t count = std::min(kChunk, g.inner - begin);
      sweeps.first()->sum_channels(0, c, c + 1, begin, count, &a, &chunk);
      total.g += chunk.total().g;
      total.gx += chunk.total().gx;
    }
    keep(sample, c, total);
  }

  void differentiate(const Sweeps<T>& sweeps, int64_t sample, int64_t c) const {
    if (!call.sample.dx) return;
    const Affine<F> a = affine(sample, c);
    const Slope<F>& slope = slopes[sample * groups.groups + c / groups.channels];
    sweeps.second()->dx_channels(0, c, c + 1, 0, g.inner, &a, &slope);
  }

  // --- rows across the channels -------------------------------------------------------------

  void rows() {
    const RowWalk walk = sample_walk(g, kLanes<T>, sizeof(T));
    if (shares_samples(call.sample, walk, thread_count()) && !serial) {
      for (int64_t sample = 0; sample < groups.samples; ++sample) one_sample(sample, walk, false);
      return;
    }
    parallel(groups.samples, serial, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) one_sample(sample, walk, true);
    });
  }

  void one_sample(int64_t sample, const RowWalk& walk, bool alone) {
    const BackwardCall<T> one = sample_of(call.sample, sample);
    const Sweeps<T> sweeps(one, place_in_dx(one));
    const int64_t width = walk.width;
    RowAffine<F> constants(width);
    std::vector<F> constant(width + 16), slope(width + 16);
    std::vector<double> parts_g(walk.segments * width), parts_gx(walk.segments * width);
    for_channels_of(walk, g, 0, width, [&](int64_t c, const ChannelColumns& columns) {
      constants.set(columns, affine(sample, c));
    });
    parallel(walk.segments, alone, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        sweeps.first()->sum_rows(width, walk.segment_begin(s), walk.segment_begin(s + 1), 0, width,
                                 constants, &parts_g[s * width], &parts_gx[s * width]);
      }
    });
    for_channels_of(walk, g, 0, width, [&](int64_t c, const ChannelColumns& columns) {
      Sums total;
      for (int64_t s = 0; s < walk.segments; ++s) {
        columns.each([&](int64_t j) {
          total.g += parts_g[s * width + j];
          total.gx += parts_gx[s * width + j];
        });
      }
      keep(sample, c, total);
    });
    for (int64_t k = 0; k < groups.groups; ++k) merge(sample * groups.groups + k);
    if (!call.sample.dx) return;
    for_channels_of(walk, g, 0, width, [&](int64_t c, const ChannelColumns& columns) {
      const Slope<F>& of_group = slopes[sample * groups.groups + c / groups.channels];
      columns.each([&](int64_t j) { constant[j] = of_group.constant, slope[j] = of_group.slope; });
    });
    parallel(walk.segments, alone, [&](int64_t first, int64_t last) {
      for (int64_t s = last - 1; s >= first; --s) {
        sweeps.second()->dx_rows(width, walk.segment_begin(s), walk.segment_begin(s + 1), 0, width,
                                 constants, constant.data(), slope.data());
      }
      finish_streaming();
    });
  }

  // A group beyond the range of float: once more, in double, value by value.
  void extreme(int64_t i) {
    const int64_t sample = i / groups.groups, first = i % groups.groups * groups.channels;
    const BackwardCall<T> one = sample_of(call.sample, sample);
    const double mean = call.mean[i], r = rstds[i], m = static_cast<double>(groups.run);
    const auto each = [&](auto&& function) {
      for (int64_t c = first; c < first + groups.channels; ++c) {
        const double w = one.weight ? static_cast<double>(one.weight[c]) : 1.0;
        const double b = one.bias ? static_cast<double>(one.bias[c]) : 0.0;
        for (int64_t o = 0; o < g.outer; ++o) {
          for (int64_t k = 0; k < g.inner; ++k) {
            const int64_t at = (o * g.channels + c) * g.inner + k;
            const double normalized = (static_cast<double>(one.x[at]) - mean) * r;
            const double dy = static_cast<double>(one.dy[at]);
            function(c, at, w, normalized,
                     activation_gradient(one.act, dy, normalized * w + b, one.act_param));
          }
        }
      }
    };
    for (int64_t c = first; c < first + groups.channels; ++c) sums[sample * g.channels + c] = {};
    double s1 = 0, s2 = 0;
    each([&](int64_t c, int64_t, double w, double normalized, double value) {
      Sums& total = sums[sample * g.channels + c];
      total.g += value;
      total.gx += value * normalized / r;
      s1 += w * value / m;
      s2 += w * value * normalized / m;
    });
    if (!one.dx) return;
    each([&](int64_t, int64_t at, double w, double normalized, double value) {
      one.dx[at] = static_cast<T>(static_cast<F>(r * (w * value - s1 - normalized * s2)));
    });
  }
};

}  // namespace

template <typename T>
void group_norm_backward(const GroupBackward<T>& call) {
  GroupNormBackward<T>(call).run();
}

template void group_norm_backward(const GroupBackward<double>&);
template void group_norm_backward(const GroupBackward<float>&);
template void group_norm_backward(const GroupBackward<BFloat16>&);
template void group_norm_backward(const GroupBackward<Half>&);

}  // namespace normally
