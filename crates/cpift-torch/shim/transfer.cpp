// Pinned host memory, and copies between it and a device. Only interfaces of c10 that every device
// has, so that no headers of CUDA are needed.
#include "shim.h"

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace {

c10::impl::VirtualGuardImpl cuda() { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA); }

c10::Device cuda_device(int device) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
}

// The stream of `device` for copies that run beside its other work.
c10::Stream copies_of(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(device.index());
  if (found == streams.end()) {
    found = streams.emplace(device.index(), cuda().getStreamFromGlobalPool(device, false)).first;
  }
  return found->second;
}

// A function of the CUDA runtime, which libtorch's CUDA library has loaded.
template <typename F>
F runtime(const char *name) {
  auto found = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  TORCH_CHECK(found, "the CUDA runtime has no ", name);
  return found;
}

}  // namespace

extern "C" {

// A copy in pinned memory; the tensor itself if it is pinned.
int cpift_pinned(const at::Tensor *tensor, at::Tensor **out) {
  return guarded([&] { *out = new at::Tensor(tensor->pin_memory()); });
}

// Pinned zeros of the dtype of `like`, for a long time. Not from libtorch's allocator, which takes the next power of two.
int cpift_pinned_zeros(int device, const int64_t *shape, int dimensions, const at::Tensor *like, at::Tensor **out) {
  return guarded([&] {
    at::IntArrayRef sizes(shape, dimensions);
    auto options = like->options();
    size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
    if (bytes == 0) {
      *out = new at::Tensor(at::zeros(sizes, options));
      return;
    }
    auto pin = runtime<int (*)(void *, size_t, unsigned)>("cudaHostRegister");
    auto unpin = runtime<int (*)(void *)>("cudaHostUnregister");
    cuda().setDevice(cuda_device(device));
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no room for ", bytes, " bytes of host memory");
    if (int code = pin(memory, bytes, /*portable*/ 1)) {
      munmap(memory, bytes);
      TORCH_CHECK(false, bytes, " bytes of host memory cannot be pinned: CUDA error ", code);
    }
    auto release = [=](void *p) {
      unpin(p);
      munmap(p, bytes);
    };
    *out = new at::Tensor(at::from_blob(memory, sizes, release, options));
  });
}

// Neither side waits if the host's memory is pinned.
int cpift_copy(at::Tensor *to, const at::Tensor *from) {
  return guarded([&] { to->copy_(*from, /*non_blocking=*/true); });
}

// The host waits for the current stream of a device.
int cpift_synchronize(int device) {
  return guarded([&] { cuda().synchronizeStream(cuda().getStream(cuda_device(device))); });
}

// Makes the stream for copies the current one, behind all that the current one has been given.
int cpift_fork(int device, c10::Stream **before) {
  return guarded([&] {
    auto own = cuda_device(device);
    auto current = cuda().getStream(own), side = copies_of(own);
    c10::Event reached(c10::DeviceType::CUDA);
    reached.record(current);
    reached.block(side);
    cuda().exchangeStream(side);
    *before = new c10::Stream(current);
  });
}

// Makes `before` the current stream again; `done` is reached when the copies are made.
int cpift_join(c10::Stream *before, c10::Event **done) {
  return guarded([&] {
    auto side = cuda().exchangeStream(*before);
    delete before;
    auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
    event->record(side);
    *done = event.release();
  });
}

// The current stream waits for `done`, which is freed.
int cpift_arrive(int device, c10::Event *done) {
  return guarded([&] {
    std::unique_ptr<c10::Event> event(done);
    event->block(cuda().getStream(cuda_device(device)));
  });
}
}
