// y = x·wᵀ + b. On the CPU libtorch computes f32 products with MKL, which does not use AVX-512 on
// processors of other makers than Intel; oneDNN, also part of libtorch, checks the features of the
// processor. All other products are at::linear.
#include "shim.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::optional<c10::OperatorHandle> one_dnn_linear() {
  static const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle;
}

bool takes_one_dnn(const at::Tensor &x, const at::Tensor &w) {
  return x.is_cpu() && w.is_cpu() && x.scalar_type() == at::kFloat && w.scalar_type() == at::kFloat && x.numel() > 0 &&
         one_dnn_linear().has_value();
}

// [n, i] by [o, i] to [n, o]; without a graph.
at::Tensor product(const at::Tensor &x, const at::Tensor &w) {
  static const c10::List<std::optional<at::Scalar>> no_scalars;
  torch::jit::Stack stack;
  torch::jit::push(stack, x, w, c10::IValue(), std::string("none"), no_scalars, std::string());
  one_dnn_linear()->callBoxed(stack);
  return stack.at(0).toTensor();
}

struct Linear : public torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext *ctx, const at::Tensor &x, const at::Tensor &w) {
    // Only the weight's gradient needs x.
    ctx->save_for_backward({w.requires_grad() ? x : at::Tensor(), w});
    auto sizes = x.sizes().vec();
    sizes.back() = w.size(0);
    return product(x.reshape({-1, w.size(1)}), w).view(sizes);
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &w = saved[1];
    auto grad = grads[0].reshape({-1, w.size(0)});
    at::Tensor by_x, by_w;
    if (ctx->needs_input_grad(0)) {
      auto sizes = grads[0].sizes().vec();
      sizes.back() = w.size(1);
      by_x = product(grad, w.t()).view(sizes);
    }
    if (ctx->needs_input_grad(1)) by_w = product(grad.t(), x.reshape({-1, w.size(1)}).t());
    return {by_x, by_w};
  }
};
}  // namespace

extern "C" int cpift_linear(const at::Tensor *x, const at::Tensor *w, const at::Tensor *bias, at::Tensor **out) {
  return guarded([&] {
    if (!takes_one_dnn(*x, *w)) {
      *out = new at::Tensor(at::linear(*x, *w, maybe(bias)));
      return;
    }
    auto y = Linear::apply(*x, *w);
    *out = new at::Tensor(bias ? y + *bias : y);
  });
}
