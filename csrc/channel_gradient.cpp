#include "channel_gradient.h"

#include "activation.h"
#include "bits.h"
#include "pages.h"

namespace normally {
namespace {

// kKept: g is read where the first sweep kept it, there is no activation any more.
template <typename T, typename Act, bool kBits, bool kKept = false>
struct Gradient final : BackwardKernel<T> {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  const BackwardCall<T>& call;
  const F p = static_cast<F>(call.act_param);
  const bool stream =
      worth_streaming(call.numel() * static_cast<int64_t>(sizeof(T)), call.training);

  explicit Gradient(const BackwardCall<T>& backward_call) : call(backward_call) {}

  template <bool kWhole>
  static Vec<F> get(const T* at, int count) {
    return kWhole ? load(at) : load_first(at, count);
  }

  template <bool kWhole>
  Vec<F> kept(int64_t at, int count) const {
    const F* g = call.g + (at - call.g_begin);
    return kWhole ? load(g) : load_first(g, count);
  }

  // g at element `at` of memory, bit `i` of their row.
  template <bool kWhole>
  Vec<F> g(Vec<F> centred, Vec<F> scale, Vec<F> offset, int64_t at, const uint8_t* bits, int64_t i,
           int count) const {
    if constexpr (kKept) return kept<kWhole>(at, count);
    const Vec<F> dy = get<kWhole>(call.dy + at, count);
    if constexpr (kBits) {
      const Bits<F> passes = from_bits<F>(read_bits<T>(bits, i, count));
      if constexpr (std::is_same_v<Act, LeakyRelu>) return select<F>(passes, dy, dy * p);
      return select<F>(passes, dy, Vec<F>{});
    } else if constexpr (std::is_same_v<Act, Identity>) {
      return dy;
    } else {
      Vec<F> z = centred * scale + offset;
      if (call.residual) z += get<kWhole>(call.residual + at, count);
      return Act::template gradient<F>(dy, z, p);
    }
  }

  template <bool kWhole, typename E>
  static void put(E* at, Vec<F> value, int count) {
    if constexpr (kWhole) {
      store(at, value);
    } else {
      store_first(at, value, count);
    }
  }

  // dx may lie where g is kept: then it is in the cache, and written as usual.
  bool streams(const T* dx) const {
    return stream && static_cast<const void*>(call.g) != call.dx && is_aligned(dx);
  }

  // One vector of the first sweep.
  template <bool kWhole>
  void sum_vector(const Vec<F>& hi, const Vec<F>& scale, const Vec<F>& offset, int64_t at,
                  const uint8_t* bits, int64_t i, int count, Vec<F>& sg, Vec<F>& sgx) const {
    Vec<F> centred = get<kWhole>(call.x + at, count) - hi;
    Vec<F> value = g<kWhole>(centred, scale, offset, at, bits, i, count);
    if constexpr (!kWhole) {
      const Bits<F> inside = lane_numbers<F>() < count;
      value = select<F>(inside, value, Vec<F>{});
      centred = select<F>(inside, centred, Vec<F>{});
    }
    sg += value;
    sgx += value * centred;
    if (call.g) put<kWhole>(call.g + (at - call.g_begin), value, count);
    if (call.dresidual) put<kWhole>(call.dresidual + at, value, count);
  }

  // One vector of the second sweep.
  template <bool kWhole>
  void dx_vector(const Vec<F>& hi, const Vec<F>& scale, const Vec<F>& offset,
                 const Vec<F>& constant, const Vec<F>& slope, int64_t at, const uint8_t* bits,
                 int64_t i, int count, bool streams) const {
    const Vec<F> centred = get<kWhole>(call.x + at, count) - hi;
    Vec<F> value = g<kWhole>(centred, scale, offset, at, bits, i, count);
    value *= scale;
    if (call.training) value -= centred * slope + constant;
    if constexpr (!kWhole) {
      store_first(call.dx + at, value, count);
    } else if (streams) {
      store_streaming(call.dx + at, value);
    } else {
      store(call.dx + at, value);
    }
  }

  // --- a row of one channel ---------------------------------------------------------------

  int64_t row_at(int64_t o, int64_t c) const { return o * call.geometry.channels + c; }

  const uint8_t* bits_at(int64_t row, int64_t begin) const {
    return kBits ? call.bits + row * bits_row_bytes(call.geometry) + begin / 8 : nullptr;
  }

  void sum_channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                    const Affine<F>* a, RowSums<F>* sums) const override {
    for (; c < c_end; ++c, ++a, ++sums) {
      const Vec<F> hi = splat(a->hi), scale = splat(a->scale), offset = splat(a->offset);
      const int64_t row = row_at(o, c), at = row * call.geometry.inner + begin;
      const uint8_t* bits = bits_at(row, begin);
      Vec<F> g_sum[2] = {}, gx_sum[2] = {};
      int64_t i = 0;
      for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int64_t j = i + k * kWidth;
          sum_vector<true>(hi, scale, offset, at + j, bits, j, kWidth, g_sum[k], gx_sum[k]);
        }
      }
      if (i + kWidth <= count) {
        sum_vector<true>(hi, scale, offset, at + i, bits, i, kWidth, g_sum[0], gx_sum[0]);
        i += kWidth;
      }
      if (i < count) {
        sum_vector<false>(hi, scale, offset, at + i, bits, i, static_cast<int>(count - i), g_sum[1],
                          gx_sum[1]);
      }
      sums->g += g_sum[0] + g_sum[1];
      sums->gx += gx_sum[0] + gx_sum[1];
    }
  }

  void dx_channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                   const Affine<F>* a, const Slope<F>* s) const override {
    for (; c < c_end; ++c, ++a, ++s) {
      const Vec<F> hi = splat(a->hi), scale = splat(a->scale), offset = splat(a->offset);
      const Vec<F> constant = splat(s->constant), slope = splat(s->slope);
      const int64_t row = row_at(o, c), at = row * call.geometry.inner + begin;
      const uint8_t* bits = bits_at(row, begin);
      const bool around = streams(call.dx + at);
      int64_t i = 0;
#pragma GCC unroll 2
      for (; i + kWidth <= count; i += kWidth) {
        dx_vector<true>(hi, scale, offset, constant, slope, at + i, bits, i, kWidth, around);
      }
      if (i < count) {
        dx_vector<false>(hi, scale, offset, constant, slope, at + i, bits, i,
                         static_cast<int>(count - i), false);
      }
    }
  }

  // --- rows across channels -----------------------------------------------------------------

  struct ColumnConstants {
    Vec<F> hi, scale, offset;
    ColumnConstants() = default;
    ColumnConstants(const RowAffine<F>& a, int64_t column)
        : hi(load(a.hi.data() + column)),
          scale(load(a.scale.data() + column)),
          offset(load(a.offset.data() + column)) {}
  };

  template <int kVectors, bool kWhole>
  void sum_columns(int64_t width, int64_t row_begin, int64_t row_end, int64_t column, int count,
                   const RowAffine<F>& a, double* sg, double* sgx) const {
    ColumnConstants constants[kVectors];
    Vec<F> g_sum[kVectors], gx_sum[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      constants[k] = ColumnConstants(a, column + k * kWidth);
      g_sum[k] = gx_sum[k] = Vec<F>{};
    }
    const int64_t bits_row = (width + 7) / 8;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint8_t* bits = kBits ? call.bits + row * bits_row : nullptr;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const int64_t j = column + k * kWidth;
        const ColumnConstants& c = constants[k];
        sum_vector<kWhole>(c.hi, c.scale, c.offset, row * width + j, bits, j,
                           kWhole ? kWidth : count, g_sum[k], gx_sum[k]);
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      add_wide<F>(sg + k * kWidth, g_sum[k], kWhole ? kWidth : count);
      add_wide<F>(sgx + k * kWidth, gx_sum[k], kWhole ? kWidth : count);
    }
  }

  template <int kVectors, bool kWhole>
  void dx_columns(int64_t width, int64_t row_begin, int64_t row_end, int64_t column, int count,
                  const RowAffine<F>& a, const F* constant, const F* slope, bool streams) const {
    ColumnConstants constants[kVectors];
    Vec<F> constant_of[kVectors], slope_of[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      constants[k] = ColumnConstants(a, column + k * kWidth);
      constant_of[k] = load(constant + column + k * kWidth);
      slope_of[k] = load(slope + column + k * kWidth);
    }
    const int64_t bits_row = (width + 7) / 8;
    for (int64_t row = row_end - 1; row >= row_begin; --row) {
      const uint8_t* bits = kBits ? call.bits + row * bits_row : nullptr;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const int64_t j = column + k * kWidth;
        const ColumnConstants& c = constants[k];
        dx_vector<kWhole>(c.hi, c.scale, c.offset, constant_of[k], slope_of[k], row * width + j,
                          bits, j, kWhole ? kWidth : count, streams);
      }
    }
  }

  static constexpr int kTile = kVectorBytes == 64 ? 4 : 2;

  // Adds rows [row_begin, row_end) to the sums of columns [begin, end), which start at sg and sgx
  // for column 0.
  void sum_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                const RowAffine<F>& a, double* sg, double* sgx) const override {
    for (int64_t row = row_begin; row < row_end; row += kRowTile) {
      const int64_t next = std::min(row + kRowTile, row_end);
      int64_t j = begin;
      for (; j + kTile * kWidth <= end; j += kTile * kWidth) {
        sum_columns<kTile, true>(width, row, next, j, 0, a, sg + j, sgx + j);
      }
      for (; j + kWidth <= end; j += kWidth) {
        sum_columns<1, true>(width, row, next, j, 0, a, sg + j, sgx + j);
      }
      if (j < end) {
        sum_columns<1, false>(width, row, next, j, static_cast<int>(end - j), a, sg + j, sgx + j);
      }
    }
  }

  void dx_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
               const RowAffine<F>& a, const F* constant, const F* slope) const override {
    const bool around = streams(call.dx) && width % kWidth == 0;
    for (int64_t tile_end = row_end; tile_end > row_begin; tile_end -= kRowTile) {
      const int64_t tile = std::max(tile_end - kRowTile, row_begin);
      int64_t j = begin;
      for (; j + kTile * kWidth <= end; j += kTile * kWidth) {
        dx_columns<kTile, true>(width, tile, tile_end, j, 0, a, constant, slope, around);
      }
      for (; j + kWidth <= end; j += kWidth) {
        dx_columns<1, true>(width, tile, tile_end, j, 0, a, constant, slope, around);
      }
      if (j < end) {
        dx_columns<1, false>(width, tile, tile_end, j, static_cast<int>(end - j), a, constant,
                             slope, false);
      }
    }
  }
};

template <typename T>
std::unique_ptr<BackwardKernel<T>> backward_kernel(const BackwardCall<T>& call) {
  std::unique_ptr<BackwardKernel<T>> kernel;
  with_activation(call.act, [&](auto act) {
    using Act = decltype(act);
    if constexpr (kPiecewiseConstant<Act>) {
      if (call.bits) {
        kernel = std::make_unique<Gradient<T, Act, true>>(call);
        return;
      }
    }
    kernel = std::make_unique<Gradient<T, Act, false>>(call);
  });
  return kernel;
}

}  // namespace

template <typename T>
Sweeps<T>::Sweeps(const BackwardCall<T>& call, Compute<T>* place, int64_t begin) : call_(call) {
  const bool sums = call.dweight || call.dbias || (call.training && call.dx && !call.means);
  if (sums && is_costly(call.act)) {
    call_.g = place;
    call_.g_begin = begin;
  }
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    if (call.dresidual) {  // which is g
      call_.g = call.dresidual;
      call_.g_begin = 0;
      call_.dresidual = nullptr;
    }
  }
  if (sums || call.dresidual) first_ = backward_kernel(call_);
  if (call_.g) {
    second_ = std::make_unique<Gradient<T, Identity, false, true>>(call_);
  } else if (!first_) {
    second_ = backward_kernel(call_);
  }
}

template class Sweeps<double>;
template class Sweeps<float>;
template class Sweeps<BFloat16>;
template class Sweeps<Half>;

}  // namespace normally
