// Batch norm backward, with the activation's derivative recomputed from the input.
//
//   g  = dy · act'(z)                     z = x̂ · weight + bias + residual
//   dx = weight · rstd · (g - mean(g) - x̂ · mean(g · x̂))      the means only in training
//
// First sweep: Σg and Σg·(x - mean). Second sweep, backwards through what is still cached: dx.
#include <cmath>
#include <vector>

#include "activation.h"
#include "batch_norm.h"
#include "bits.h"
#include "channel_gradient.h"
#include "pages.h"
#include "parallel.h"

namespace normally {
namespace {

inline Sums sums_of(const std::vector<Sums>& parts, int64_t segments, int64_t channels, int64_t c) {
  Sums total;
  for (int64_t s = 0; s < segments; ++s) {
    total.g += parts[s * channels + c].g;
    total.gx += parts[s * channels + c].gx;
  }
  return total;
}

// The means of g and of g·x̂ over all that was normalized together.
struct Means {
  double g, gx;
};

template <typename T>
Means means_of(const BackwardCall<T>& call, const Sums& sums, double rstd, int64_t c) {
  if (call.means) return {call.means[c], call.means[call.geometry.channels + c]};
  const double m = static_cast<double>(call.geometry.per_channel());
  return {sums.g / m, rstd * sums.gx / (m - static_cast<double>(call.correction))};
}

template <typename T>
Slope<Compute<T>> slope_of(const BackwardCall<T>& call, Sums sums, double rstd, int64_t c) {
  using F = Compute<T>;
  const double low = low_part<F>(call.mean[c]);
  sums.gx -= low * sums.g;
  if (call.dbias) call.dbias[c] = sums.g;
  if (call.dweight) call.dweight[c] = sums.gx * rstd;
  if (!call.training) return {F(0), F(0)};
  const double scale = rstd * (call.weight ? static_cast<double>(call.weight[c]) : 1.0);
  const Means means = means_of(call, sums, rstd, c);
  const double slope = scale * rstd * means.gx;
  return {static_cast<F>(scale * means.g - low * slope), static_cast<F>(slope)};
}

// A channel beyond the range of float, in double, value by value.
template <typename T>
void backward_extreme(const BackwardCall<T>& call, int64_t c) {
  const Geometry& geometry = call.geometry;
  const double mean = call.mean[c], rstd = rstd_of(call, call.var[c]);
  const double scale = rstd * (call.weight ? static_cast<double>(call.weight[c]) : 1.0);
  const double offset = call.bias ? static_cast<double>(call.bias[c]) : 0.0;
  const auto each = [&](auto&& function) {
    for (int64_t o = 0; o < geometry.outer; ++o) {
      for (int64_t i = 0; i < geometry.inner; ++i) {
        const int64_t at = (o * geometry.channels + c) * geometry.inner + i;
        const double centred = static_cast<double>(call.x[at]) - mean;
        double g = static_cast<double>(call.dy[at]);
        if (call.bits) {
          const uint8_t* row = call.bits + bits_row_begin(geometry, o, c);
          if (!read_bit(row, bits_column(geometry, c, i))) g *= call.act_param;
        } else {
          double z = centred * scale + offset;
          if (call.residual) z += static_cast<double>(call.residual[at]);
          g = activation_gradient(call.act, g, z, call.act_param);
        }
        function(at, centred, g);
      }
    }
  };
  Sums sums;
  each([&](int64_t, double centred, double g) { sums.g += g, sums.gx += g * centred; });
  if (call.dbias) call.dbias[c] = sums.g;
  if (call.dweight) call.dweight[c] = sums.gx * rstd;
  const Means means = means_of(call, sums, rstd, c);
  each([&](int64_t at, double centred, double g) {
    if (call.dresidual) call.dresidual[at] = static_cast<T>(static_cast<Compute<T>>(g));
    double dx = g;
    if (call.training) dx -= means.g + centred * rstd * means.gx;
    if (call.dx) call.dx[at] = static_cast<T>(static_cast<Compute<T>>(dx * scale));
  });
}

template <typename T>
void backward_planes(const BackwardCall<T>& call, const Sweeps<T>& sweeps) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const ChannelWalk walk(g);
  const int64_t threads = thread_count();
  const bool serial = g.numel() < kSerialElements || threads == 1;
  const int64_t block = channel_block(g, 2 * sizeof(T), threads);
  const int64_t blocks = ceil_div(g.channels, block);
  std::vector<Sums> parts(g.channels * walk.segments);
  std::vector<Slope<F>> slopes(g.channels);
  const auto affine = [&](int64_t c) {
    return affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c);
  };

  const auto sum = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    Affine<F> constants[kMaxBlock];
    for (int64_t c = begin; c < end; ++c) constants[c - begin] = affine(c);
    for (int64_t index = walk.segment_begin(segment); index < walk.segment_begin(segment + 1);
         ++index) {
      const Chunk chunk(walk, g, index);
      RowSums<F> sums[kMaxBlock];
      for (int64_t row = chunk.row; row < chunk.row_end; ++row) {
        if (end - begin > 1 && row + 1 < g.outer) {  // as in the forward
          const int64_t next = ((row + 1) * g.channels + begin) * g.inner;
          const int64_t bytes = (end - begin) * g.inner * static_cast<int64_t>(sizeof(T));
          prefetch(call.x + next, bytes);
          prefetch(call.dy + next, bytes);
        }
        sweeps.first()->sum_channels(row, begin, end, chunk.begin, chunk.count, constants, sums);
      }
      for (int64_t c = begin; c < end; ++c) {
        const Sums total = sums[c - begin].total();
        Sums& part = parts[segment * g.channels + c];
        part.g += total.g;
        part.gx += total.gx;
      }
    }
  };
  const auto merge = [&](int64_t c) {
    const double rstd = rstd_of(call, call.var[c]);
    slopes[c] = slope_of(call, sums_of(parts, walk.segments, g.channels, c), rstd, c);
  };
  const auto apply = [&](int64_t b, int64_t segment) {
    const int64_t begin = b * block, end = std::min(begin + block, g.channels);
    Affine<F> constants[kMaxBlock];
    for (int64_t c = begin; c < end; ++c) constants[c - begin] = affine(c);
    for (int64_t index = walk.segment_begin(segment + 1) - 1; index >= walk.segment_begin(segment);
         --index) {
      const Chunk chunk(walk, g, index);
      for (int64_t row = chunk.row_end - 1; row >= chunk.row; --row) {
        sweeps.second()->dx_channels(row, begin, end, chunk.begin, chunk.count, constants,
                                     &slopes[begin]);
      }
    }
  };

  if (serial || blocks >= 3 * threads || blocks % threads == 0) {
    parallel(blocks, serial, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t s = 0; sweeps.first() && s < walk.segments; ++s) sum(b, s);
        for (int64_t c = b * block; c < std::min((b + 1) * block, g.channels); ++c) merge(c);
        for (int64_t s = walk.segments - 1; call.dx && s >= 0; --s) apply(b, s);
      }
      finish_streaming();
    });
    return;
  }
  const int64_t tasks = blocks * walk.segments;
  if (sweeps.first()) {
    parallel(tasks, false, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) sum(t / walk.segments, t % walk.segments);
    });
  }
  for (int64_t c = 0; c < g.channels; ++c) merge(c);
  if (!call.dx) return;
  parallel(tasks, false, [&](int64_t begin, int64_t end) {
    for (int64_t t = end - 1; t >= begin; --t) apply(t / walk.segments, t % walk.segments);
    finish_streaming();
  });
}

template <typename T>
void backward_rows(const BackwardCall<T>& call, const Sweeps<T>& sweeps) {
  using F = Compute<T>;
  const Geometry& g = call.geometry;
  const RowWalk walk(g, kLanes<T>, 2 * sizeof(T), call.bits != nullptr);
  const bool serial = g.numel() < kSerialElements;
  RowAffine<F> affine(walk.width);
  std::vector<F> constant(walk.width + 16), slope(walk.width + 16);
  std::vector<double> parts_g(walk.segments * walk.width), parts_gx(walk.segments * walk.width);
  for_channels_of(walk, g, 0, walk.width, [&](int64_t c, const auto& columns) {
    affine.set(columns,
               affine_of(call.mean[c], rstd_of(call, call.var[c]), call.weight, call.bias, c));
  });

  const auto sum = [&](int64_t s, int64_t begin, int64_t end) {
    const int64_t at = s * walk.width;
    sweeps.first()->sum_rows(walk.width, walk.segment_begin(s), walk.segment_begin(s + 1), begin,
                             end, affine, &parts_g[at], &parts_gx[at]);
  };
  const auto merge = [&](int64_t begin, int64_t end) {
    for_channels_of(walk, g, begin, end, [&](int64_t c, const auto& columns) {
      Sums total;
      for (int64_t s = 0; s < walk.segments; ++s) {
        columns.each([&](int64_t j) {
          total.g += parts_g[s * walk.width + j];
          total.gx += parts_gx[s * walk.width + j];
        });
      }
      const Slope<F> of_channel = slope_of(call, total, rstd_of(call, call.var[c]), c);
      columns.each(
          [&](int64_t j) { constant[j] = of_channel.constant, slope[j] = of_channel.slope; });
    });
  };

  if (walk.groups() > 1) {
    parallel(walk.groups(), serial, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) {
        const int64_t begin = group * walk.group, end = std::min(begin + walk.group, walk.width);
        if (sweeps.first()) sum(0, begin, end);
        merge(begin, end);
        if (call.dx) {
          sweeps.second()->dx_rows(walk.width, 0, walk.rows, begin, end, affine, constant.data(),
                                   slope.data());
        }
      }
      finish_streaming();
    });
    return;
  }
  if (sweeps.first()) {
    parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) sum(s, 0, walk.width);
    });
  }
  merge(0, walk.width);
  if (!call.dx) return;
  parallel(walk.segments, serial, [&](int64_t first, int64_t last) {
    for (int64_t s = last - 1; s >= first; --s) {
      sweeps.second()->dx_rows(walk.width, walk.segment_begin(s), walk.segment_begin(s + 1), 0,
                               walk.width, affine, constant.data(), slope.data());
    }
    finish_streaming();
  });
}

}  // namespace

template <typename T>
void batch_norm_backward(const BackwardCall<T>& call) {
  const Sweeps<T> sweeps(call, place_in_dx(call));
  if (walks_rows(call.geometry)) {
    backward_rows(call, sweeps);
  } else {
    backward_planes(call, sweeps);
  }
  for (int64_t c = 0; c < call.geometry.channels; ++c) {
    if (is_extreme(call.mean[c], call.var[c])) backward_extreme(call, c);
  }
}

template void batch_norm_backward(const BackwardCall<double>&);
template void batch_norm_backward(const BackwardCall<float>&);
template void batch_norm_backward(const BackwardCall<BFloat16>&);
template void batch_norm_backward(const BackwardCall<Half>&);

}  // namespace normally
