// The local response norm operators: check, allocate, cut into blocks, register.
#include "local_response_norm.h"

#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <tuple>

#include "kept.h"
#include "parameters.h"

namespace normally {
namespace {

constexpr const char* kName = "local_response_norm";

// One array of the scratch: what the second-level cache holds beside the operands, and for planes
// that are taken together, the first-level cache.
constexpr int64_t kBlockBytes = int64_t{128} << 10;
constexpr int64_t kGroupBytes = int64_t{16} << 10;
// The fewest bytes of a row: a line or two are not worth a visit to another page.
constexpr int64_t kMinRowBytes = 256;
// Planes of fewer values are transposed, so that vectors lie across planes.
constexpr int64_t kShortPlane = 48;

// How a tensor is cut. It depends on the shape alone.
struct Plan {
  Geometry geometry;
  bool transposed;
  int64_t planes, width;  // of a block; if transposed, its planes are one of this width
  int64_t per_plane;      // blocks
  Layout tensor, compact, scratch;

  Plan(const Geometry& g, const LocalResponse& norm, int64_t item) : geometry(g) {
    constexpr int64_t kUnit = 16;
    const int64_t plane = g.channels * g.inner, padded = g.channels + norm.taps() - 1;
    const int64_t fits = std::max(kMinRowBytes, kBlockBytes / g.channels) / item;
    const int64_t pieces = ceil_div(g.inner, fits);
    width = pieces == 1 ? g.inner : ceil_div(ceil_div(g.inner, pieces), kUnit) * kUnit;
    per_plane = ceil_div(g.inner, width);
    planes = std::clamp<int64_t>(kGroupBytes / (padded * width * item), 1, g.outer);
    transposed = plane < kShortPlane && planes > 1;
    if (transposed) width *= planes;
    tensor = {plane, g.inner};
    compact = {g.channels * width, width};
    scratch = {padded * width, width};
  }

  int64_t count() const { return ceil_div(geometry.outer, planes) * per_plane; }

  Block operator[](int64_t index) const {
    const int64_t columns = std::min(width, geometry.inner - column(index));
    return {std::min(planes, geometry.outer - plane(index)), geometry.channels, columns, tensor,
            scratch};
  }
  int64_t offset(int64_t index) const { return plane(index) * tensor.plane + column(index); }
  int64_t position(int64_t index) const { return plane(index) * geometry.inner + column(index); }

  // How a block is copied where it cannot be computed in place, and what it is then.
  Layout staging() const { return transposed ? Layout{geometry.inner, width} : compact; }
  Block staged(const Block& block) const {
    if (transposed) return {1, block.channels, block.planes * block.columns, compact, scratch};
    return {block.planes, block.channels, block.columns, compact, scratch};
  }

 private:
  int64_t plane(int64_t index) const { return index / per_plane * planes; }
  int64_t column(int64_t index) const { return index % per_plane * width; }
};

// to[…] = from[…] for every element of a block.
template <typename From, typename To>
void copy(const Block& block, const From* from, const Layout& source, To* to,
          const Layout& target) {
  for (int64_t p = 0; p < block.planes; ++p) {
    for (int64_t c = 0; c < block.channels; ++c) {
      const From* row = from + p * source.plane + c * source.channel;
      To* copied = to + p * target.plane + c * target.channel;
      for (int64_t i = 0; i < block.columns; ++i) copied[i] = static_cast<To>(row[i]);
    }
  }
}

// 0 in the columns that are not kept.
template <typename T>
void hide(const Block& block, const uint8_t* kept, T* values, const Layout& layout) {
  for (int64_t p = 0; p < block.planes; ++p) {
    for (int64_t i = 0; i < block.columns; ++i, ++kept) {
      if (*kept) continue;
      T* column = values + p * layout.plane + i;
      for (int64_t c = 0; c < block.channels; ++c)
        column[c * layout.channel] = static_cast<T>(0.0f);
    }
  }
}

// Copies of a block's operands where they cannot be used in place.
template <typename T>
struct Staging {
  std::unique_ptr<T[]> x, dy, out;

  Staging(const Block& largest, bool backward) {
    const int64_t size = largest.planes * largest.memory.plane;
    x = std::make_unique_for_overwrite<T[]>(size);
    if (backward) dy = std::make_unique_for_overwrite<T[]>(size);
    out = std::make_unique_for_overwrite<T[]>(size);
  }

  template <typename From>
  Operands<T> take(const Block& block, const Operands<From>& at, const Layout& layout) const {
    copy(block, at.x, block.memory, x.get(), layout);
    if (dy) copy(block, at.dy, block.memory, dy.get(), layout);
    return {x.get(), dy.get(), out.get()};
  }
};

// One thread's blocks: in float and in place, or by the detour that they need.
template <typename T, typename Power>
class Worker {
 public:
  Worker(const Plan& plan, const LocalResponse& norm, const Power& power, bool backward)
      : plan_(plan),
        norm_(norm),
        power_(power),
        backward_(backward),
        kernel_(norm, power, plan.staged(plan[0]), backward) {}

  // `kept` has a byte a position, or is null.
  void run(const Block& block, const Operands<T>& at, const uint8_t* kept) {
    const bool hides = kept && std::memchr(kept, 0, block.planes * block.columns);
    if (!hides && !plan_.transposed) return compute(block, at);
    if (!visible_) visible_.emplace(plan_.staged(plan_[0]), backward_);
    const Layout layout = plan_.staging();
    const Operands<T> staged = visible_->take(block, at, layout);
    if (hides) {
      hide(block, kept, visible_->x.get(), layout);
      if (backward_) hide(block, kept, visible_->dy.get(), layout);
    }
    compute(plan_.staged(block), staged);
    if (hides) hide(block, kept, staged.out, layout);
    copy(block, staged.out, layout, at.out, block.memory);
  }

 private:
  struct Wide {
    Staging<double> staging;
    BlockKernel<double, Power> kernel;
  };

  const Plan& plan_;
  LocalResponse norm_;
  Power power_;
  bool backward_;
  BlockKernel<T, Power> kernel_;
  std::optional<Staging<T>> visible_;
  std::unique_ptr<Wide> wide_;

  void compute(const Block& block, const Operands<T>& at) {
    if (!kernel_.run(block, at)) complete(block, at);
  }

  // Fills in from double what float could not give. The rest keeps its bits, so that no result
  // depends on what lies outside of its window.
  void complete(const Block& block, const Operands<T>& at) {
    if (!wide_) {
      const Block largest = plan_.staged(plan_[0]);
      wide_.reset(new Wide{{largest, backward_}, {norm_, power_, largest, backward_}});
    }
    Block compact = block;
    compact.memory = plan_.compact;
    const Operands<double> wide = wide_->staging.take(block, at, compact.memory);
    wide_->kernel.run(compact, wide);
    for (int64_t p = 0; p < block.planes; ++p) {
      for (int64_t c = 0; c < block.channels; ++c) {
        T* out = at.out + p * block.memory.plane + c * block.memory.channel;
        const double* exact = wide.out + p * compact.memory.plane + c * compact.memory.channel;
        for (int64_t i = 0; i < block.columns; ++i) {
          if (out[i] != out[i]) out[i] = static_cast<T>(exact[i]);
        }
      }
    }
  }
};

template <typename T>
void run_blocks(const Geometry& geometry, const LocalResponse& norm, const Operands<T>& at,
                const uint8_t* kept) {
  const Plan plan(geometry, norm, sizeof(Compute<T>));
  with_power(norm.beta, [&](auto power) {
    parallel(plan.count(), geometry.numel() < kSerialElements, [&](int64_t begin, int64_t end) {
      Worker<T, decltype(power)> worker(plan, norm, power, at.dy != nullptr);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t offset = plan.offset(index);
        worker.run(plan[index], {at.x + offset, at.dy ? at.dy + offset : nullptr, at.out + offset},
                   kept ? kept + plan.position(index) : nullptr);
      }
    });
  });
}

// The result for a dense x, of x's shape and strides.
Tensor compute(const Tensor& x, const OptionalTensor& dy, const OptionalTensor& mask, int64_t size,
               double alpha, double beta, double k) {
  Tensor result = fresh_like(x);
  if (x.numel() == 0) return result;
  const Geometry geometry = geometry_of(x);
  const int64_t beyond = geometry.channels - 1;
  const LocalResponse norm = {std::min(size / 2, beyond), std::min((size - 1) / 2, beyond),
                              alpha / static_cast<double>(size), beta, k};
  const OptionalTensor positions =
      mask ? OptionalTensor(positions_of(*mask, x, 1, 2)) : std::nullopt;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    run_blocks<T>(geometry, norm,
                  {static_cast<const T*>(x.const_data_ptr()),
                   dy ? static_cast<const T*>(dy->const_data_ptr()) : nullptr,
                   static_cast<T*>(result.mutable_data_ptr())},
                  positions ? bytes_of(*positions) : nullptr);
  });
  return result;
}

void check(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
           const OptionalTensor& mask, int64_t size) {
  STD_TORCH_CHECK(input.dim() >= 2,
                  "normally::local_response_norm: input must have 2 dimensions or more");
  STD_TORCH_CHECK(!weight && !bias, "normally::local_response_norm: there are no parameters");
  STD_TORCH_CHECK(size >= 1, "normally::local_response_norm: size must be positive");
  check_mask(kName, mask, input, 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, OptionalTensor residual,
                                           OptionalTensor weight, OptionalTensor bias,
                                           OptionalTensor mask, int64_t size, double alpha,
                                           double beta, double k) {
  check(input, weight, bias, mask, size);
  STD_TORCH_CHECK(!residual, "normally::local_response_norm: there is no residual");
  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  return {compute(x, std::nullopt, mask, size, alpha, beta, k), nothing_like(input),
          empty({0}, {1}, ScalarType::Double)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_sum,
                                            const Tensor& input, OptionalTensor weight,
                                            OptionalTensor bias, OptionalTensor mask, const Tensor&,
                                            int64_t size, double alpha, double beta, double k,
                                            int64_t need) {
  check(input, weight, bias, mask, size);
  check_like(kName, "grad_output", grad_output, input);
  STD_TORCH_CHECK(!grad_sum, "normally::local_response_norm_backward: there is no sum");
  Tensor none = nothing_like(input);
  if (!(need & kNeedInput)) return {none, nothing_like(input), nothing_like(input)};
  const Tensor x = is_dense(input) ? input : torch::stable::clone(input);
  const Tensor dx = compute(x, laid_out_as(grad_output, x), mask, size, alpha, beta, k);
  return {dx, none, nothing_like(input)};
}

}  // namespace
}  // namespace normally

STABLE_TORCH_LIBRARY_IMPL(normally, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&normally::forward));
  m.impl("local_response_norm_backward", TORCH_BOX(&normally::backward));
}
