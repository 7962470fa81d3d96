// Masks: the positions that are kept, and tensors of these alone.
//
// The statistics of masked data are those of the data without the rest, so the kernels are given
// just that: whatever the padding holds, NaN included, is never read.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace normally {

// A mask, which is broadcastable to the dense `x` and of size 1 at dimensions [start, end), as one
// byte a position in the order of x's memory. The dimensions [start, end) are neighbours there.
inline Tensor positions_of(const Tensor& mask, const Tensor& x, int64_t start, int64_t end) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  std::vector<int64_t> strides(x.strides().begin(), x.strides().end());
  int64_t together = 1, inner = 0;
  for (int64_t d = start; d < end; ++d) {
    if (sizes[d] > 1) inner = together == 1 ? strides[d] : std::min(inner, strides[d]);
    together *= sizes[d];
    sizes[d] = 1;
  }
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (together > 1 && strides[d] > inner)
      strides[d] = std::max<int64_t>(1, strides[d] / together);
  }
  Tensor positions = empty_strided(sizes, strides, ScalarType::Bool);
  torch::stable::copy_(positions, mask);
  return positions;
}

inline const uint8_t* bytes_of(const Tensor& positions) {
  return static_cast<const uint8_t*>(positions.const_data_ptr());
}

// What a mask keeps of tensors of one geometry (outer, C, inner).
class Kept {
 public:
  // `positions` has outer · inner bytes.
  Kept(const uint8_t* positions, const Geometry& g) : full_(g) {
    for (int64_t o = 0; o < g.outer; ++o) {
      for (int64_t i = 0; i < g.inner;) {
        const int64_t begin = i;
        while (i < g.inner && positions[o * g.inner + i]) ++i;
        if (i > begin) runs_.push_back({o, begin, i - begin});
        count_ += i - begin;
        ++i;
      }
    }
  }

  int64_t count() const { return count_; }

  // The kept positions side by side: rows of channels where rows are walked, else channels of rows.
  Geometry geometry() const {
    return walks_rows(full_) ? Geometry{count_, full_.channels, 1}
                             : Geometry{1, full_.channels, count_};
  }

  template <typename T>
  void gather(const T* full, T* compact) const {
    each(full, compact,
         [](const T* from, T* to, int64_t n) { std::memcpy(to, from, n * sizeof(T)); });
  }

  // The rest of `full` becomes 0.
  template <typename T>
  void scatter(const T* compact, T* full) const {
    std::memset(static_cast<void*>(full), 0, full_.numel() * sizeof(T));
    each(full, compact,
         [](T* to, const T* from, int64_t n) { std::memcpy(to, from, n * sizeof(T)); });
  }

 private:
  struct Run {
    int64_t outer, begin, count;
  };
  Geometry full_;
  std::vector<Run> runs_;
  int64_t count_ = 0;

  // copy(at full, at compact, elements) for all pieces that are contiguous in both.
  template <typename Full, typename Compact, typename Copy>
  void each(Full full, Compact compact, const Copy& copy) const {
    const Geometry& g = full_;
    if (!walks_rows(g)) {
      parallel(g.channels, g.numel() < kSerialElements, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          auto at = compact + c * count_;
          for (const Run& run : runs_) {
            copy(full + (run.outer * g.channels + c) * g.inner + run.begin, at, run.count);
            at += run.count;
          }
        }
      });
      return;
    }
    for (const Run& run : runs_) {
      for (int64_t i = run.begin; i < run.begin + run.count; ++i, compact += g.channels) {
        const auto row = full + run.outer * g.channels * g.inner + i;
        if (g.inner == 1) {
          copy(row, compact, g.channels);
        } else {
          for (int64_t c = 0; c < g.channels; ++c) copy(row + c * g.inner, compact + c, 1);
        }
      }
    }
  }
};

// What the kernels read of a tensor: all of it, or what a mask keeps.
template <typename T>
class KeptInput {
 public:
  KeptInput(const Kept* kept, const T* full) : pointer_(full) {
    if (!kept || !full) return;
    compact_ = std::make_unique_for_overwrite<T[]>(kept->geometry().numel());
    kept->gather(full, compact_.get());
    pointer_ = compact_.get();
  }
  const T* data() const { return pointer_; }

 private:
  const T* pointer_;
  std::unique_ptr<T[]> compact_;
};

// Where they write one, likewise; `finish` brings what is kept to its positions.
template <typename T>
class KeptOutput {
 public:
  KeptOutput(const Kept* kept, T* full) : kept_(kept), full_(full) {
    if (kept && full) compact_ = std::make_unique_for_overwrite<T[]>(kept->geometry().numel());
  }
  T* data() { return compact_ ? compact_.get() : full_; }
  void finish() const {
    if (compact_) kept_->scatter(compact_.get(), full_);
  }

 private:
  const Kept* kept_;
  T* full_;
  std::unique_ptr<T[]> compact_;
};

}  // namespace normally
