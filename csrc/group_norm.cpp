// The group norm operators: check, allocate, dispatch, register.
#include "group_norm.h"

#include <tuple>

#include "kept.h"
#include "parameters.h"

namespace normally {
namespace {

// The input with its samples one after the other in memory, and the geometry of each.
struct Samples {
  Tensor dense, x;
  Geometry geometry;

  explicit Samples(const Tensor& input)
      : dense(is_dense(input) ? input : torch::stable::clone(input)), x(dense) {
    const int64_t size = x.numel() / x.size(0), channels = x.size(1);
    if (x.size(0) > 1 && x.stride(0) != size) x = torch::stable::contiguous(x);
    const int64_t inner = channels > 1 ? x.stride(1) : size;
    geometry = {size / (channels * inner), channels, inner};
  }

  // `t`, which has the layout of x, in that of the input.
  Tensor back(const Tensor& t) const {
    if (same_strides(dense, x)) return t;
    Tensor result = fresh_like(dense);
    torch::stable::copy_(result, t);
    return result;
  }
};

struct Settings {
  int64_t num_groups;
  double eps;
  int64_t act;
  double act_param;
};

void check(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
           const OptionalTensor& mask, int64_t num_groups) {
  STD_TORCH_CHECK(input.dim() >= 2, "normally::group_norm: input must have 2 dimensions or more");
  STD_TORCH_CHECK(num_groups > 0 && input.size(1) % num_groups == 0,
                  "normally::group_norm: num_groups must divide the channels");
  check_parameter("group_norm", "weight", weight, input, {input.size(1)});
  check_parameter("group_norm", "bias", bias, input, {input.size(1)});
  check_mask("group_norm", mask, input, 1, 2);
}

void describe(Normalization& sample, const Settings& s, const Samples& samples) {
  sample.geometry = samples.geometry;
  sample.samples = samples.x.size(0);
  sample.training = true;
  sample.eps = s.eps;
  sample.correction = 0;
  sample.act = s.act;
  sample.act_param = s.act_param;
}

// What a mask keeps of each sample.
std::vector<Kept> kept_of(const Tensor& mask, const Samples& samples) {
  const Tensor positions = positions_of(mask, samples.x, 1, 2);
  const Geometry& g = samples.geometry;
  std::vector<Kept> result;
  for (int64_t n = 0; n < samples.x.size(0); ++n) {
    result.emplace_back(bytes_of(positions) + n * g.outer * g.inner, g);
  }
  return result;
}

// One sample after the other, without what the mask hides.
template <typename T>
void forward_kept(const GroupForward<T>& all, const std::vector<Kept>& kept, double* count) {
  const int64_t groups = all.groups;
  for (size_t n = 0; n < kept.size(); ++n) {
    GroupForward<T> call = all;
    call.sample = sample_of(all.sample, n);
    call.sample.samples = 1;
    call.mean += n * groups;
    call.var += n * groups;
    const Geometry geometry = kept[n].geometry();
    std::fill_n(count + n * groups, groups, static_cast<double>(geometry.numel() / groups));
    std::fill_n(call.mean, groups, 0.0);
    std::fill_n(call.var, groups, 1.0);
    const KeptInput<T> x(&kept[n], call.sample.x);
    KeptOutput<T> y(&kept[n], call.sample.y);
    call.sample.geometry = geometry;
    call.sample.x = x.data();
    call.sample.y = y.data();
    if (geometry.numel() > 0) group_norm_forward(call);
    y.finish();
  }
}

template <typename T>
void backward_kept(const GroupBackward<T>& all, const std::vector<Kept>& kept) {
  const int64_t groups = all.groups, channels = all.sample.geometry.channels;
  std::vector<double> dweight(channels), dbias(channels);
  double *const dweight_total = all.sample.dweight, *const dbias_total = all.sample.dbias;
  for (size_t n = 0; n < kept.size(); ++n) {
    GroupBackward<T> call = all;
    call.sample = sample_of(all.sample, n);
    call.sample.samples = 1;
    call.mean += n * groups;
    call.var += n * groups;
    const Geometry geometry = kept[n].geometry();
    const KeptInput<T> x(&kept[n], call.sample.x), dy(&kept[n], call.sample.dy);
    KeptOutput<T> dx(&kept[n], call.sample.dx);
    call.sample.geometry = geometry;
    call.sample.x = x.data();
    call.sample.dy = dy.data();
    call.sample.dx = dx.data();
    call.sample.dweight = dweight_total ? dweight.data() : nullptr;
    call.sample.dbias = dbias_total ? dbias.data() : nullptr;
    if (geometry.numel() > 0) {
      group_norm_backward(call);
      for (int64_t c = 0; c < channels; ++c) {
        if (dweight_total) dweight_total[c] += dweight[c];
        if (dbias_total) dbias_total[c] += dbias[c];
      }
    }
    dx.finish();
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor residual,
                                           OptionalTensor weight, OptionalTensor bias,
                                           OptionalTensor mask, int64_t num_groups, double eps,
                                           int64_t act, double act_param) {
  STD_TORCH_CHECK(!residual, "normally::group_norm: there is no residual");
  check(input, weight, bias, mask, num_groups);
  const int64_t count = input.size(0) * num_groups;
  Tensor stats = empty({3, input.size(0), num_groups}, {count, num_groups, 1}, ScalarType::Double);
  double* saved = static_cast<double*>(stats.mutable_data_ptr());
  if (input.numel() == 0) {
    std::fill_n(saved, 3 * count, 0.0);
    return {fresh_like(is_dense(input) ? input : torch::stable::clone(input)), nothing_like(input),
            stats};
  }
  const Samples samples(input);
  Tensor output = fresh_like(samples.x);
  std::fill_n(saved + 2 * count, count, static_cast<double>(input.numel() / count));
  with_type(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Values<Compute<T>> weights(weight), biases(bias);
    GroupForward<T> call;
    describe(call.sample, {num_groups, eps, act, act_param}, samples);
    call.groups = num_groups;
    call.sample.x = static_cast<const T*>(samples.x.const_data_ptr());
    call.sample.residual = nullptr;
    call.sample.weight = weights.data();
    call.sample.bias = biases.data();
    call.sample.y = static_cast<T*>(output.mutable_data_ptr());
    call.sample.bits = nullptr;
    call.sample.mean = call.sample.var = nullptr;
    call.mean = saved;
    call.var = saved + count;
    if (mask) {
      forward_kept(call, kept_of(*mask, samples), saved + 2 * count);
    } else {
      group_norm_forward(call);
    }
  });
  return {samples.back(output), nothing_like(input), stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_sum,
                                            const Tensor& input, OptionalTensor weight,
                                            OptionalTensor bias, OptionalTensor mask,
                                            const Tensor& stats, int64_t num_groups, double eps,
                                            int64_t act, double act_param, int64_t need) {
  STD_TORCH_CHECK(!grad_sum, "normally::group_norm: there is no residual");
  check(input, weight, bias, mask, num_groups);
  check_like("group_norm", "grad_output", grad_output, input);
  const int64_t count = input.size(0) * num_groups;
  STD_TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == ScalarType::Double &&
                      stats.numel() == 3 * count,
                  "normally::group_norm_backward: stats must be those of the forward");
  const bool wants_dx = need & kNeedInput;
  Tensor dx = nothing_like(input);
  ParameterGradient dweight(weight, input, need), dbias(bias, input, need);
  if (input.numel() == 0) {
    if (wants_dx) dx = fresh_like(is_dense(input) ? input : torch::stable::clone(input));
  } else if (wants_dx || dweight.sums() || dbias.sums()) {
    const Samples samples(input);
    if (wants_dx) dx = fresh_like(samples.x);
    const Tensor dy = laid_out_as(grad_output, samples.x);
    const double* saved = static_cast<const double*>(stats.const_data_ptr());
    with_type(input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const Values<Compute<T>> weights(weight), biases(bias);
      GroupBackward<T> call;
      describe(call.sample, {num_groups, eps, act, act_param}, samples);
      call.groups = num_groups;
      call.sample.dy = static_cast<const T*>(dy.const_data_ptr());
      call.sample.x = static_cast<const T*>(samples.x.const_data_ptr());
      call.sample.residual = nullptr;
      call.sample.bits = nullptr;
      call.sample.weight = weights.data();
      call.sample.bias = biases.data();
      call.sample.mean = call.sample.var = nullptr;
      call.sample.dx = wants_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
      call.sample.dresidual = nullptr;
      call.sample.dweight = dweight.sums();
      call.sample.dbias = dbias.sums();
      call.mean = saved;
      call.var = saved + count;
      if (mask) {
        backward_kept(call, kept_of(*mask, samples));
      } else {
        group_norm_backward(call);
      }
    });
    if (wants_dx) dx = samples.back(dx);
  }
  return {dx, dweight.tensor(), dbias.tensor()};
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&normally::forward));
  m.impl("group_norm_backward", TORCH_BOX(&normally::backward));
}
