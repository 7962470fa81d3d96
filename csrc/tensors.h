// What the operators need of tensors, on the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "geometry.h"
#include "pages.h"

namespace normally {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t scalar_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Whether the elements fill memory without gaps or overlaps, in any order of the dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  }
  return true;
}

// `t` itself where its elements lie as those of `like`, else a copy that does.
inline Tensor laid_out_as(const Tensor& t, const Tensor& like) {
  if (same_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// (outer, channels, inner) of a dense tensor with the channel at dimension 1.
inline Geometry geometry_of(const Tensor& t) {
  const int64_t channels = t.size(1);
  const int64_t inner = channels > 1 ? t.stride(1) : t.numel();
  const int64_t plane = channels * inner;
  return {plane ? t.numel() / plane : 0, channels, inner};
}

// An uninitialized CPU tensor, straight from the allocator: 1 µs less than through the dispatcher.
template <typename Sizes>
inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), std::data(sizes), std::data(strides), scalar_code(dtype),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                    ScalarType dtype) {
  return empty_strided(sizes, strides, dtype);
}

// Shape, strides and dtype of `t`, which is dense.
inline Tensor fresh_like(const Tensor& t) {
  Tensor result = empty_strided(t.sizes(), t.strides(), t.scalar_type());
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * t.element_size());
  return result;
}

inline Tensor nothing_like(const Tensor& t) { return empty({0}, {1}, t.scalar_type()); }

// Call `function` with a value of the element type of `dtype`.
template <typename Function>
inline void with_type(ScalarType dtype, Function&& function) {
  switch (dtype) {
    case ScalarType::Double: return function(double{});
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(BFloat16{});
    case ScalarType::Half: return function(Half{});
    default:
      STD_TORCH_CHECK(false, "normally: expected float64, float32, bfloat16 or float16, got ",
                      dtype);
  }
}

// A tensor of any floating dtype as a vector of F; of one dimension, or contiguous.
template <typename F>
inline std::vector<F> values_of(const Tensor& t) {
  std::vector<F> result(t.numel());
  const int64_t stride = t.dim() == 1 ? t.stride(0) : 1;
  with_type(t.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* p = static_cast<const T*>(t.const_data_ptr());
    for (size_t i = 0; i < result.size(); ++i) {
      result[i] = static_cast<F>(p[static_cast<int64_t>(i) * stride]);
    }
  });
  return result;
}

template <typename F>
inline void write_values(const std::vector<F>& values, Tensor& t) {
  const int64_t stride = t.dim() == 1 ? t.stride(0) : 1;
  with_type(t.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* p = static_cast<T*>(t.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) {
      p[static_cast<int64_t>(i) * stride] = static_cast<T>(values[i]);
    }
  });
}

// The elements of a tensor, and null where there is none.
template <typename T>
inline const T* read(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
inline T* write(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace normally
