// Functions that the training core needs and tch lacks, as plain C functions over at::Tensor. Each
// returns 0, or 1 with a message in cpift_error().
#include "shim.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

thread_local std::string cpift_last_error;

extern "C" {

const char *cpift_error() { return cpift_last_error.c_str(); }

// Makes an AdamW step with decoupled weight decay over tensors of one dtype; increments the step
// counters first. Gradients are divided by `grad_scale`, and the step does nothing if `found_inf`
// is not 0; both are one-element f32 tensors, or null.
int cpift_fused_adamw(at::Tensor *const *params, at::Tensor *const *grads, at::Tensor *const *exp_avgs,
                      at::Tensor *const *exp_avg_sqs, at::Tensor *const *steps, int count, double lr, double beta1,
                      double beta2, double weight_decay, double eps, const at::Tensor *grad_scale,
                      const at::Tensor *found_inf) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto counters = gather(steps, count);
    at::_foreach_add_(counters, 1);
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), {}, counters, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false, maybe(grad_scale), maybe(found_inf));
  });
}

// Sums of the gradients of `outputs` by `inputs`, given a gradient of each output. Frees the graph.
int cpift_grad(at::Tensor *const *outputs, at::Tensor *const *grad_outputs, int output_count,
               at::Tensor *const *inputs, int count, at::Tensor **grads) {
  return guarded([&] {
    auto out = torch::autograd::grad(gather(outputs, output_count), gather(inputs, count),
                                     gather(grad_outputs, output_count), /*retain_graph=*/false,
                                     /*create_graph=*/false, /*allow_unused=*/false);
    for (int i = 0; i < count; i++) grads[i] = new at::Tensor(out[i]);
  });
}

// Causal flash attention over documents concatenated in one row; q, k and v are [tokens, heads,
// head width], `ends` the cumulative lengths from 0. `window`: number of tokens a query attends to;
// < 0 is full causal attention.
int cpift_flash_varlen(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v, const at::Tensor *ends,
                       int64_t longest, double scale, int64_t window, at::Tensor **out) {
  return guarded([&] {
    std::optional<c10::SymInt> left, right;
    if (window >= 0) {
      left = c10::SymInt(window - 1);
      right = c10::SymInt(0);
    }
    auto result = at::_flash_attention_forward_symint(*q, *k, *v, *ends, *ends, longest, longest, /*dropout_p=*/0.0,
                                                      /*is_causal=*/true, /*return_debug_mask=*/false, scale, left, right);
    *out = new at::Tensor(std::get<0>(result));
  });
}

// Bytes allocated to tensors on a CUDA device: current and peak.
int cpift_cuda_memory(int device, int64_t *current, int64_t *peak) {
  return guarded([&] {
    auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *current = stats.allocated_bytes[0].current;
    *peak = stats.allocated_bytes[0].peak;
  });
}

// Total memory of a CUDA device in bytes.
int cpift_cuda_total(int device, int64_t *total) {
  return guarded([&] {
    auto info = at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *total = info.second;
  });
}
}
