#include "row_operator.h"

#include "kept.h"
#include "parameters.h"
#include "row_norm.h"

namespace normally {
namespace {

// How the samples of a dense tensor lie: (outer, n, inner).
struct Samples {
  int64_t outer, n, inner;
};

// The dimensions [start, end) as one in memory, in their own order; none if they are not.
std::optional<Samples> samples_of(const Tensor& x, int64_t start, int64_t end) {
  int64_t n = 1, inner = 0, others = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d < start || d >= end) others *= x.size(d);
  }
  if (x.numel() == 0) return Samples{others, 0, 1};
  for (int64_t d = end - 1; d >= start; --d) {
    if (x.size(d) == 1) continue;
    if (inner == 0) inner = x.stride(d);
    if (x.stride(d) != inner * n) return std::nullopt;
    n *= x.size(d);
  }
  if (inner == 0) inner = 1;
  return Samples{others / inner, n, inner};
}

// A copy whose samples are rows.
Tensor in_rows(const Tensor& x, int64_t start, int64_t end) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (const bool normalized : {true, false}) {
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      if ((d >= start && d < end) != normalized) continue;
      strides[d] = stride;
      stride *= sizes[d];
    }
  }
  Tensor copy = empty_strided(sizes, strides, x.scalar_type());
  prefer_huge_pages(copy.mutable_data_ptr(), copy.numel() * copy.element_size());
  torch::stable::copy_(copy, x);
  return copy;
}

// The input as the kernels take it: dense, and in samples.
struct Laid {
  Tensor dense, x;
  Samples samples;
  bool copied;

  Laid(const RowSettings& s, const Tensor& input, bool must_be_rows)
      : dense(is_dense(input) ? input : torch::stable::clone(input)), x(dense), copied(false) {
    std::optional<Samples> found = samples_of(dense, s.start, s.end);
    if (!found || (found->inner > 1 && (must_be_rows || !s.centred))) {
      x = in_rows(dense, s.start, s.end);
      copied = true;
      found = samples_of(x, s.start, s.end);
    }
    samples = *found;
  }

  // `t`, which has the layout of x, in that of the input.
  Tensor back(const Tensor& t) const {
    if (!copied) return t;
    Tensor result = fresh_like(dense);
    torch::stable::copy_(result, t);
    return result;
  }
};

std::vector<int64_t> normalized_shape(const RowSettings& s, const Tensor& input) {
  STD_TORCH_CHECK(0 <= s.start && s.start < s.end && s.end <= input.dim(), "normally::", s.op,
                  ": the input has no such dimensions");
  const auto sizes = input.sizes();
  return {sizes.begin() + s.start, sizes.begin() + s.end};
}

template <typename Call>
void describe(Call& call, const RowSettings& s, const Samples& samples) {
  call.outer = samples.outer;
  call.n = samples.n;
  call.inner = samples.inner;
  call.centred = s.centred;
  call.eps = s.eps;
  call.act = s.act;
  call.act_param = s.act_param;
  call.casting = s.casting;
}

// The weights as they multiply: 1 where there is none, and 1 + weight where that is stored.
template <typename F>
Values<F> weights_of(const RowSettings& s, const OptionalTensor& weight, int64_t n) {
  Values<F> weights(weight, n, F(1));
  return weight && s.zero_centered_weight ? std::move(weights).plus_one(n) : std::move(weights);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> row_operator_forward(const RowSettings& s, const Tensor& input,
                                                        const OptionalTensor& residual,
                                                        const OptionalTensor& weight,
                                                        const OptionalTensor& bias,
                                                        const OptionalTensor& mask) {
  const std::vector<int64_t> shape = normalized_shape(s, input);
  check_parameter(s.op, "weight", weight, input, shape);
  check_parameter(s.op, "bias", bias, input, shape);
  check_like(s.op, "residual", residual, input);
  check_mask(s.op, mask, input, s.start, s.end);

  const Laid laid(s, input, mask || residual);
  const Samples& samples = laid.samples;
  const int64_t count = samples.outer * samples.inner;
  Tensor output = fresh_like(laid.x);
  Tensor sum = residual ? fresh_like(laid.x) : nothing_like(input);
  Tensor stats = s.centred ? empty({2, count}, {count, 1}, ScalarType::Double)
                           : empty({count}, {1}, ScalarType::Double);
  if (input.numel() == 0) return {output, sum, stats};

  double* saved = static_cast<double*>(stats.mutable_data_ptr());
  const OptionalTensor r = residual ? OptionalTensor(laid_out_as(*residual, laid.x)) : residual;
  OptionalTensor kept;
  if (mask) kept = positions_of(*mask, laid.x, s.start, s.end);
  with_type(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = Compute<T>;
    const Values<F> weights = weights_of<F>(s, weight, samples.n), biases(bias, samples.n, F(0));
    RowForward<T> call;
    describe(call, s, samples);
    call.x = static_cast<const T*>(laid.x.const_data_ptr());
    call.residual = read<T>(r);
    call.kept = read<uint8_t>(kept);
    call.weight = weights.data();
    call.bias = biases.data();
    call.sum = residual ? static_cast<T*>(sum.mutable_data_ptr()) : nullptr;
    call.y = static_cast<T*>(output.mutable_data_ptr());
    call.mean = s.centred ? saved : nullptr;
    call.rstd = s.centred ? saved + count : saved;
    samples.inner == 1 ? row_norm_forward(call) : column_norm_forward(call);
  });
  return {laid.back(output), residual ? laid.back(sum) : sum, stats};
}

std::tuple<Tensor, Tensor, Tensor> row_operator_backward(
    const RowSettings& s, const Tensor& grad_output, const OptionalTensor& grad_sum,
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mask, const Tensor& stats, int64_t need) {
  const std::vector<int64_t> shape = normalized_shape(s, input);
  check_parameter(s.op, "weight", weight, input, shape);
  check_parameter(s.op, "bias", bias, input, shape);
  check_like(s.op, "grad_output", grad_output, input);
  check_like(s.op, "grad_sum", grad_sum, input);
  check_mask(s.op, mask, input, s.start, s.end);

  const Laid laid(s, input, mask || grad_sum);
  const Samples& samples = laid.samples;
  const int64_t count = samples.outer * samples.inner;
  STD_TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == ScalarType::Double &&
                      stats.numel() == (s.centred ? 2 : 1) * count,
                  "normally::", s.op, ": stats must be those of the forward");
  Tensor dx = need & kNeedInput ? fresh_like(laid.x) : nothing_like(input);
  ParameterGradient dweight(weight, input, need), dbias(bias, input, need);

  if (input.numel() > 0) {
    const double* saved = static_cast<const double*>(stats.const_data_ptr());
    const Tensor dy = laid_out_as(grad_output, laid.x);
    const OptionalTensor ds = grad_sum ? OptionalTensor(laid_out_as(*grad_sum, laid.x)) : grad_sum;
    OptionalTensor kept;
    if (mask) kept = positions_of(*mask, laid.x, s.start, s.end);
    with_type(input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      using F = Compute<T>;
      const Values<F> weights = weights_of<F>(s, weight, samples.n), biases(bias, samples.n, F(0));
      RowBackward<T> call;
      describe(call, s, samples);
      call.dy = static_cast<const T*>(dy.const_data_ptr());
      call.dsum = read<T>(ds);
      call.x = static_cast<const T*>(laid.x.const_data_ptr());
      call.kept = read<uint8_t>(kept);
      call.weight = weights.data();
      call.bias = biases.data();
      call.mean = s.centred ? saved : nullptr;
      call.rstd = s.centred ? saved + count : saved;
      call.dx = need & kNeedInput ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
      call.dweight = dweight.sums();
      call.dbias = dbias.sums();
      samples.inner == 1 ? row_norm_backward(call) : column_norm_backward(call);
    });
  }
  return {need & kNeedInput ? laid.back(dx) : dx, dweight.tensor(), dbias.tensor()};
}

}  // namespace normally
