// Helpers shared by the C++ sources.
#pragma once

#include <ATen/ATen.h>
#include <optional>
#include <string>
#include <vector>

extern thread_local std::string cpift_last_error;

inline std::vector<at::Tensor> gather(at::Tensor *const *tensors, int count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (int i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}

inline std::optional<at::Tensor> maybe(const at::Tensor *tensor) {
  return tensor ? std::optional<at::Tensor>(*tensor) : std::nullopt;
}

// Runs `body`; returns 0, or 1 with a message in cpift_error().
template <typename F>
int guarded(F body) {
  try {
    body();
    return 0;
  } catch (const c10::Error &error) {
    cpift_last_error = error.what_without_backtrace();
    return 1;
  } catch (const std::exception &error) {
    cpift_last_error = error.what();
    return 1;
  }
}
