// What tch lacks and the training core needs, as plain C functions over at::Tensor. Each returns 0, or 1 with a
// message in cpift_error().
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <string>
#include <vector>

namespace {
thread_local std::string last_error;

std::vector<at::Tensor> gather(at::Tensor *const *tensors, int count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (int i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}
}  // namespace

extern "C" {

const char *cpift_error() { return last_error.c_str(); }

// One AdamW step with decoupled weight decay over tensors of one dtype; increments the step counters first.
int cpift_fused_adamw(at::Tensor *const *params, at::Tensor *const *grads, at::Tensor *const *exp_avgs,
                      at::Tensor *const *exp_avg_sqs, at::Tensor *const *steps, int count, double lr, double beta1,
                      double beta2, double weight_decay, double eps) {
  try {
    at::NoGradGuard no_grad;
    auto counters = gather(steps, count);
    at::_foreach_add_(counters, 1);
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), {}, counters, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
    return 0;
  } catch (const std::exception &error) {
    last_error = error.what();
    return 1;
  }
}
}
