#include "channel_apply.h"

#include "activation.h"
#include "bits.h"
#include "pages.h"

namespace normally {
namespace {

template <typename T, typename Act, bool kBits>
struct Apply final : ForwardKernel<T> {
  using F = Compute<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  // Vectors of columns whose constants stay in registers.
  static constexpr int kTile = kVectorBytes == 64 ? 4 : 2;
  const ForwardCall<T>& call;
  explicit Apply(const ForwardCall<T>& forward_call) : call(forward_call) {}
  const F p = static_cast<F>(call.act_param);
  const bool stream =
      worth_streaming(call.numel() * static_cast<int64_t>(sizeof(T)), call.training);

  // One vector at element `i` of a row whose bits starts at `bits`; the first `count` lanes.
  template <bool kWhole>
  void vector(Vec<F> hi, Vec<F> scale, Vec<F> offset, const T* x, const T* residual, T* y,
              uint8_t* bits, int64_t i, int64_t count, bool streams) const {
    const int lanes = static_cast<int>(count);
    Vec<F> z = ((kWhole ? load(x) : load_first(x, lanes)) - hi) * scale + offset;
    if (residual) z += kWhole ? load(residual) : load_first(residual, lanes);
    if constexpr (kBits) write_bits<T>(bits, i, to_bits<F>(Act::template passes<F>(z)), count);
    z = Act::template value<F>(z, p);
    if constexpr (!kWhole) {
      store_first(y, z, lanes);
    } else if (streams) {
      store_streaming(y, z);
    } else {
      store(y, z);
    }
  }

  void channels(int64_t o, int64_t c, int64_t c_end, int64_t begin, int64_t count,
                const Affine<F>* a) const override {
    const Geometry& g = call.geometry;
    for (; c < c_end; ++c, ++a) {
      const Vec<F> hi = splat(a->hi), scale = splat(a->scale), offset = splat(a->offset);
      const int64_t row = o * g.channels + c, at = row * g.inner + begin;
      const T* x = call.x + at;
      const T* residual = call.residual ? call.residual + at : nullptr;
      T* y = call.y + at;
      uint8_t* bits = kBits ? call.bits + row * bits_row_bytes(g) + begin / 8 : nullptr;
      const bool streams = stream && is_aligned(y);
      int64_t i = 0;
#pragma GCC unroll 4
      for (; i + kWidth <= count; i += kWidth) {
        vector<true>(hi, scale, offset, x + i, residual ? residual + i : nullptr, y + i, bits, i,
                     kWidth, streams);
      }
      if (i < count) {
        vector<false>(hi, scale, offset, x + i, residual ? residual + i : nullptr, y + i, bits, i,
                      count - i, false);
      }
    }
  }

  // Whole vectors of wide rows, the constants from the first-level cache: a strip of columns would
  // touch one piece of many pages.
  void wide_rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                 const RowAffine<F>& a, bool streams) const {
    const int64_t step = call.training ? -1 : 1;
    int64_t row = call.training ? row_end - 1 : row_begin;
    for (int64_t n = row_begin; n < row_end; ++n, row += step) {
      uint8_t* bits = kBits ? call.bits + row * ((width + 7) / 8) : nullptr;
#pragma GCC unroll 4
      for (int64_t j = begin; j + kWidth <= end; j += kWidth) {
        const int64_t at = row * width + j;
        vector<true>(load(&a.hi[j]), load(&a.scale[j]), load(&a.offset[j]), call.x + at,
                     call.residual ? call.residual + at : nullptr, call.y + at, bits, j, kWidth,
                     streams);
      }
    }
  }

  // `kVectors` vectors of columns, row by row.
  template <int kVectors, bool kWhole>
  void columns(int64_t width, int64_t row_begin, int64_t row_end, int64_t column, int64_t count,
               const RowAffine<F>& a, bool streams) const {
    Vec<F> hi[kVectors], scale[kVectors], offset[kVectors];
    for (int k = 0; k < kVectors; ++k) {
      hi[k] = load(a.hi.data() + column + k * kWidth);
      scale[k] = load(a.scale.data() + column + k * kWidth);
      offset[k] = load(a.offset.data() + column + k * kWidth);
    }
    const int64_t bits_row = (width + 7) / 8;
    // After statistics backwards, since what they read last is still in the cache; in evaluation
    // forwards, as fresh pages come.
    const int64_t step = call.training ? -1 : 1;
    int64_t row = call.training ? row_end - 1 : row_begin;
    for (int64_t n = row_begin; n < row_end; ++n, row += step) {
      const int64_t at = row * width + column;
      uint8_t* bits = kBits ? call.bits + row * bits_row : nullptr;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const int64_t next = at + k * kWidth;
        vector<kWhole>(hi[k], scale[k], offset[k], call.x + next,
                       call.residual ? call.residual + next : nullptr, call.y + next, bits,
                       column + k * kWidth, kWhole ? kWidth : count, streams);
      }
    }
  }

  // Rows [row_begin, row_end), columns [begin, end), in tiles that stay in the cache.
  void rows(int64_t width, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
            const RowAffine<F>& a) const override {
    const bool streams = stream && is_aligned(call.y) && width % kWidth == 0;
    const int64_t tiles = ceil_div(row_end - row_begin, kRowTile);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t tile = row_begin + (call.training ? tiles - 1 - t : t) * kRowTile;
      const int64_t tile_end = std::min(tile + kRowTile, row_end);
      int64_t column = begin;
      if (end - begin >= kWideRow) {
        wide_rows(width, tile, tile_end, begin, end, a, streams);
        column = end - (end - begin) % kWidth;
      }
      for (; column + kTile * kWidth <= end; column += kTile * kWidth) {
        columns<kTile, true>(width, tile, tile_end, column, 0, a, streams);
      }
      for (; column + kWidth <= end; column += kWidth) {
        columns<1, true>(width, tile, tile_end, column, 0, a, streams);
      }
      if (column < end) columns<1, false>(width, tile, tile_end, column, end - column, a, false);
    }
  }
};

}  // namespace

template <typename T>
std::unique_ptr<ForwardKernel<T>> forward_kernel(const ForwardCall<T>& call) {
  std::unique_ptr<ForwardKernel<T>> kernel;
  with_activation(call.act, [&](auto act) {
    using Act = decltype(act);
    if constexpr (kPiecewiseConstant<Act>) {
      if (call.bits) {
        kernel = std::make_unique<Apply<T, Act, true>>(call);
        return;
      }
    }
    kernel = std::make_unique<Apply<T, Act, false>>(call);
  });
  return kernel;
}

template std::unique_ptr<ForwardKernel<double>> forward_kernel(const ForwardCall<double>&);
template std::unique_ptr<ForwardKernel<float>> forward_kernel(const ForwardCall<float>&);
template std::unique_ptr<ForwardKernel<BFloat16>> forward_kernel(const ForwardCall<BFloat16>&);
template std::unique_ptr<ForwardKernel<Half>> forward_kernel(const ForwardCall<Half>&);

}  // namespace normally
