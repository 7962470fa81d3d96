// What every norm operator asks of its arguments, and the parameters' values.
//
// The texts are short because the functions in Python say it again at length.
#pragma once

#include <span>
#include <vector>

#include "tensors.h"

namespace normally {

// What a backward is asked for: the bits of `need`, as in _ops.
enum Need : int64_t { kNeedInput = 1, kNeedParameters = 2, kNeedResidual = 4 };

// A parameter has `sizes`, and the input's dtype or float32 for a half input.
inline void check_parameter(const char* op, const char* name, const OptionalTensor& t,
                            const Tensor& input, std::vector<int64_t> sizes) {
  if (!t) return;
  const auto own = t->sizes();
  STD_TORCH_CHECK(std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()), "normally::", op,
                  ": ", name, " has a shape that does not go with the input's");
  const ScalarType dtype = t->scalar_type(), inputs = input.scalar_type();
  const bool half = inputs == ScalarType::Half || inputs == ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == inputs || (half && dtype == ScalarType::Float), "normally::", op, ": ",
                  name, " has a dtype that does not go with the input's");
}

inline void check_like(const char* op, const char* name, const OptionalTensor& t,
                       const Tensor& input) {
  if (!t) return;
  const auto own = t->sizes(), wanted = input.sizes();
  STD_TORCH_CHECK(t->scalar_type() == input.scalar_type() &&
                      std::equal(own.begin(), own.end(), wanted.begin(), wanted.end()),
                  "normally::", op, ": ", name, " must have the input's shape and dtype");
}

// A mask is broadcastable to the input and of size 1 at the dimensions [start, end).
inline void check_mask(const char* op, const OptionalTensor& mask, const Tensor& input,
                       int64_t start, int64_t end) {
  if (!mask) return;
  bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == input.dim();
  for (int64_t d = 0; fits && d < input.dim(); ++d) {
    const bool normalized = d >= start && d < end;
    fits = mask->size(d) == 1 || (!normalized && mask->size(d) == input.size(d));
  }
  STD_TORCH_CHECK(fits, "normally::", op,
                  ": mask must be bool, of the input's shape without what "
                  "is normalized");
}

// A parameter's values, and null where there is none: the tensor's own where they are F's, one
// beside the other, else a copy.
template <typename F>
class Values {
 public:
  explicit Values(const OptionalTensor& t) {
    if (!t) return;
    if (t->is_contiguous() && static_cast<int64_t>(sizeof(F)) == t->element_size()) {
      data_ = static_cast<const F*>(t->const_data_ptr());
    } else {
      values_ = values_of<F>(t->dim() > 1 ? torch::stable::contiguous(*t) : *t);
      data_ = values_.data();
    }
  }

  // A parameter that is always there, `otherwise` in all of its n values where it is not given.
  Values(const OptionalTensor& t, int64_t n, F otherwise) : Values(t) {
    if (data_) return;
    values_.assign(n, otherwise);
    data_ = values_.data();
  }

  Values(Values&&) = default;  // a moved vector keeps its memory
  Values(const Values&) = delete;

  // The same values and 1 more.
  Values plus_one(int64_t n) && {
    values_.assign(data_, data_ + n);
    for (F& value : values_) value += F(1);
    data_ = values_.data();
    return std::move(*this);
  }

  const F* data() const { return data_; }

 private:
  const F* data_ = nullptr;
  std::vector<F> values_;
};

// The gradient of a parameter: sums in double, then a tensor like it; an empty one where there is
// no parameter or nobody asks.
class ParameterGradient {
 public:
  ParameterGradient(const OptionalTensor& parameter, const Tensor& input, int64_t need)
      : wanted_(parameter && need & kNeedParameters), result_(nothing_like(input)) {
    if (!wanted_) return;
    const std::vector<int64_t> sizes(parameter->sizes().begin(), parameter->sizes().end());
    std::vector<int64_t> strides(sizes.size());
    int64_t elements = 1;
    for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d]) strides[d] = elements;
    result_ = empty_strided(sizes, strides, parameter->scalar_type());
    sums_.resize(elements);
  }

  double* sums() { return wanted_ ? sums_.data() : nullptr; }

  Tensor tensor() {
    if (wanted_) write_values(sums_, result_);
    return result_;
  }

 private:
  bool wanted_;
  Tensor result_;
  std::vector<double> sums_;
};

}  // namespace normally
