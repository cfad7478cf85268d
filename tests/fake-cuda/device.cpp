// A CUDA runtime whose device computes nothing, for LD_PRELOAD before libtorch_cuda.so. Device memory
// is host memory that is mapped and, until something is copied into it, never touched. A stream is a
// thread that works off a queue; copies, memsets, events and waits are real. A kernel launch checks
// its grid and does nothing.
//
//   FAKE_CUDA_DEVICES=N   devices, 8 if not given
//   FAKE_CUDA_MEMORY=N    bytes of each device's memory, 80 GiB if not given; beyond it cudaMalloc fails
//   FAKE_CUDA_COPIES=N    copies of more bytes to device memory and to pinned memory are not made
//                         (their ends are still looked at): with 0 all results are zero, and the memory
//                         of a model can be measured that is larger than this machine's: large areas
//                         that are pinned then share a few pages
//   FAKE_CUDA_STATS=FILE  counts as 64-bit integers, see enum Count
//   FAKE_CUDA_TRACE=1     a backtrace of each time the host waits for the device
#include "device.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace {

uint64_t setting(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

const int DEVICES = static_cast<int>(setting("FAKE_CUDA_DEVICES", 8));
const uint64_t MEMORY = setting("FAKE_CUDA_MEMORY", 80ull << 30);
const uint64_t COPIES = setting("FAKE_CUDA_COPIES", ~0ull);
const bool TRACE = setting("FAKE_CUDA_TRACE", 0) != 0;
constexpr int MOST_DEVICES = 64;
constexpr size_t LARGE_PINNED = 32 << 20;

// Counts of this process, in the file FAKE_CUDA_STATS as 64-bit integers: the process may end by
// _exit, so they are kept there all the time.
enum Count { LAUNCHES, WAITS, TO_DEVICE, TO_HOST, PAGEABLE, DEVICE_NOW, DEVICE_PEAK, PINNED_NOW, PINNED_PEAK, COUNTS };

std::atomic<uint64_t> *counts() {
  static auto *all = [] {
    constexpr size_t bytes = COUNTS * sizeof(uint64_t);
    int fd = -1;
    if (const char *path = getenv("FAKE_CUDA_STATS")) {
      fd = open(path, O_RDWR | O_CREAT, 0600);
      if (fd < 0 || ftruncate(fd, bytes)) abort();
    }
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    return static_cast<std::atomic<uint64_t> *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0));
  }();
  return all;
}

void count(Count what, uint64_t n = 1) { counts()[what] += n; }

void count_memory(Count now, Count peak, int64_t n) {
  uint64_t sum = counts()[now] += n;
  if (sum > counts()[peak]) counts()[peak] = sum;
}

void host_waits(const char *why) {
  count(WAITS);
  if (!TRACE) return;
  void *frames[48];
  fprintf(stderr, "fake-cuda: the host waits: %s\n", why);
  backtrace_symbols_fd(frames, backtrace(frames, 48), 2);
}

struct Stream {
  std::mutex m;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  uint64_t put_in = 0, done = 0;

  Stream() {
    std::thread([this] { work(); }).detach();
  }

  void work() {
    for (;;) {
      std::function<void()> next;
      {
        std::unique_lock<std::mutex> lock(m);
        changed.wait(lock, [&] { return !queue.empty(); });
        next = std::move(queue.front());
        queue.pop_front();
      }
      next();
      {
        std::lock_guard<std::mutex> lock(m);
        done++;
      }
      changed.notify_all();
    }
  }

  void put(std::function<void()> f) {
    std::lock_guard<std::mutex> lock(m);
    queue.push_back(std::move(f));
    put_in++;
    changed.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(m);
    auto n = put_in;
    changed.wait(lock, [&] { return done >= n; });
  }

  bool idle() {
    std::lock_guard<std::mutex> lock(m);
    return done >= put_in;
  }
};

struct Event {
  std::mutex m;
  std::condition_variable changed;
  uint64_t recorded = 0, reached = 0;

  uint64_t record() {
    std::lock_guard<std::mutex> lock(m);
    return ++recorded;
  }

  void reach(uint64_t n) {
    {
      std::lock_guard<std::mutex> lock(m);
      reached = n;
    }
    changed.notify_all();
  }

  uint64_t last() {
    std::lock_guard<std::mutex> lock(m);
    return recorded;
  }

  void wait(uint64_t n) {
    std::unique_lock<std::mutex> lock(m);
    changed.wait(lock, [&] { return reached >= n; });
  }

  bool done() {
    std::lock_guard<std::mutex> lock(m);
    return reached >= recorded;
  }
};

struct Range {
  size_t bytes;
  cudaMemoryType type;
  int device;
};

std::mutex all_m;
std::set<Stream *> all_streams;
std::map<uintptr_t, Range> ranges;
uint64_t used[MOST_DEVICES];
thread_local int device = 0;

Stream *new_stream() {
  auto *stream = new Stream;
  std::lock_guard<std::mutex> lock(all_m);
  all_streams.insert(stream);
  return stream;
}

Stream *of(cudaStream_t stream) {
  static Stream *defaults[MOST_DEVICES];
  static std::mutex m;
  // 1 and 2 are the names of the default stream with and without per-thread semantics.
  if (reinterpret_cast<uintptr_t>(stream) > 2) return reinterpret_cast<Stream *>(stream);
  std::lock_guard<std::mutex> lock(m);
  if (!defaults[device]) defaults[device] = new_stream();
  return defaults[device];
}

Event *of(cudaEvent_t event) { return reinterpret_cast<Event *>(event); }

void wait_for_all() {
  std::set<Stream *> copy;
  {
    std::lock_guard<std::mutex> lock(all_m);
    copy = all_streams;
  }
  for (auto *stream : copy) stream->wait();
}

// The range that holds `p`, of type cudaMemoryTypeUnregistered if none does.
Range find(const void *p) {
  auto at = reinterpret_cast<uintptr_t>(p);
  std::lock_guard<std::mutex> lock(all_m);
  auto next = ranges.upper_bound(at);
  if (next != ranges.begin()) {
    auto &[start, range] = *std::prev(next);
    if (at < start + range.bytes) return range;
  }
  return {0, cudaMemoryTypeUnregistered, 0};
}

void *map(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// Maps an area onto the same few pages over and over.
bool share_pages(void *p, size_t n) {
  constexpr size_t bytes = 64 << 20;
  static int fd = [] {
    int made = memfd_create("fake-cuda", 0);
    return made >= 0 && ftruncate(made, bytes) == 0 ? made : -1;
  }();
  for (size_t at = 0; at < n; at += bytes) {
    void *part = static_cast<char *>(p) + at;
    size_t size = std::min(bytes, n - at);
    if (mmap(part, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return false;
  }
  return true;
}

void add(void *p, Range range) {
  std::lock_guard<std::mutex> lock(all_m);
  ranges[reinterpret_cast<uintptr_t>(p)] = range;
}

// Forgets a range, which must begin at `p`.
bool remove(void *p, Range *found) {
  std::lock_guard<std::mutex> lock(all_m);
  auto at = ranges.find(reinterpret_cast<uintptr_t>(p));
  if (at == ranges.end()) return false;
  *found = at->second;
  ranges.erase(at);
  if (found->type == cudaMemoryTypeDevice) used[found->device] -= found->bytes;
  return true;
}

// As the runtime checks before a launch.
cudaError_t check_grid(dim3 grid, dim3 block, size_t shared) {
  bool good = grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 2147483647u && grid.y <= 65535 &&
              grid.z <= 65535 && block.z <= 64 && size_t(block.x) * block.y * block.z <= 1024 && shared <= 232448;
  count(LAUNCHES);
  if (good) return cudaSuccess;
  fprintf(stderr, "fake-cuda: a launch of %u x %u x %u blocks of %u x %u x %u threads with %zu bytes\n", grid.x, grid.y,
          grid.z, block.x, block.y, block.z, shared);
  return cudaErrorInvalidConfiguration;
}

void copy(void *to, const void *from, size_t n, bool can_be_left_out) {
  if (!n) return;
  if (!can_be_left_out || n <= COPIES) {
    memcpy(to, from, n);
    return;
  }
  // Memory that is gone is an error all the same.
  auto look = [](const void *p) { return *static_cast<const volatile char *>(p); };
  look(from), look(to), look(static_cast<const char *>(from) + n - 1), look(static_cast<char *>(to) + n - 1);
}

// Copies that may be left out: not those that end in ordinary memory, which would keep what it had.
bool may_stay_away(cudaMemoryType to) { return to != cudaMemoryTypeUnregistered; }

thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;

}  // namespace

uint64_t largest_copy() { return COPIES; }

void on_stream(cudaStream_t stream, std::function<void()> f) { of(stream)->put(std::move(f)); }

extern "C" {

// Devices

cudaError_t cudaGetDeviceCount(int *n) { return *n = DEVICES, cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { return *d = device, cudaSuccess; }
cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= DEVICES) return cudaErrorInvalidDevice;
  return device = d, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { return *v = 13000, cudaSuccess; }

// The figures of an H100.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "a device that computes nothing");
  p->totalGlobalMem = MEMORY;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->canMapHostMemory = p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 50 << 20;
  p->persistingL2CacheMaxSize = 32 << 20;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerMultiprocessor = 233472;
  p->sharedMemPerBlockOptin = 232448;
  p->reservedSharedMemPerBlock = 1024;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr attribute, int d) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, d);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *v = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *v = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *v = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *v = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *v = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *v = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *v = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *v = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *v = p.regsPerBlock; break;
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = p.regsPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *v = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrUnifiedAddressing: *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { return *low = 0, *high = -5, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *v, int, int) { return *v = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { return snprintf(s, n, "0000:%02x:00.0", d), cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  host_waits("cudaDeviceSynchronize");
  return wait_for_all(), cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// Memory

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  std::lock_guard<std::mutex> lock(all_m);
  return *total = MEMORY, *free = MEMORY - used[device], cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n) {
  *p = nullptr;
  {
    std::lock_guard<std::mutex> lock(all_m);
    if (used[device] + n > MEMORY) return cudaErrorMemoryAllocation;
    used[device] += n;
  }
  if (n && !(*p = map(n))) return cudaErrorMemoryAllocation;
  add(*p, {n, cudaMemoryTypeDevice, device});
  count_memory(DEVICE_NOW, DEVICE_PEAK, n);
  return cudaSuccess;
}

// The real one waits for the device too.
cudaError_t cudaFree(void *p) {
  Range range;
  if (!p) return cudaSuccess;
  wait_for_all();
  if (!remove(p, &range)) return cudaErrorInvalidValue;
  munmap(p, range.bytes);
  count_memory(DEVICE_NOW, DEVICE_PEAK, -static_cast<int64_t>(range.bytes));
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
  if (!(*p = map(n))) return cudaErrorMemoryAllocation;
  add(*p, {n, cudaMemoryTypeHost, device});
  count_memory(PINNED_NOW, PINNED_PEAK, n);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
  Range range;
  wait_for_all();
  if (!remove(p, &range)) return cudaErrorInvalidValue;
  munmap(p, range.bytes);
  count_memory(PINNED_NOW, PINNED_PEAK, -static_cast<int64_t>(range.bytes));
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *p, size_t n, unsigned) {
  if (find(p).type != cudaMemoryTypeUnregistered) return cudaErrorHostMemoryAlreadyRegistered;
  bool whole_pages = reinterpret_cast<uintptr_t>(p) % 4096 == 0;
  if (COPIES == 0 && n > LARGE_PINNED && whole_pages && !share_pages(p, n)) return cudaErrorMemoryAllocation;
  add(p, {n, cudaMemoryTypeHost, device});
  count_memory(PINNED_NOW, PINNED_PEAK, n);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *p) {
  Range range;
  if (!remove(p, &range)) return cudaErrorHostMemoryNotRegistered;
  count_memory(PINNED_NOW, PINNED_PEAK, -static_cast<int64_t>(range.bytes));
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  auto range = find(p);
  a->type = range.type;
  a->device = range.type == cudaMemoryTypeUnregistered ? -2 : range.device;
  if (range.type != cudaMemoryTypeUnregistered) a->devicePointer = const_cast<void *>(p);
  if (range.type == cudaMemoryTypeHost) a->hostPointer = const_cast<void *>(p);
  return cudaSuccess;
}

// The host waits if one side is memory that is not pinned, as the runtime does.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
  auto type = find(to).type, from_type = find(from).type;
  bool between = type != from_type;
  if (type == cudaMemoryTypeDevice && between) count(TO_DEVICE, n);
  if (from_type == cudaMemoryTypeDevice && between) count(TO_HOST, n);
  of(stream)->put([=] { copy(to, from, n, may_stay_away(type)); });
  if (type == cudaMemoryTypeUnregistered || from_type == cudaMemoryTypeUnregistered) {
    count(PAGEABLE);
    host_waits("a copy from or to memory that is not pinned");
    of(stream)->wait();
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind) {
  host_waits("cudaMemcpy");
  wait_for_all();
  return copy(to, from, n, may_stay_away(find(to).type)), cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaMemcpyAsync(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width,
                    kind, stream);
  }
  return cudaSuccess;
}

// Large areas hold zero already if large copies are not made.
cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t stream) {
  if (n <= COPIES) of(stream)->put([=] { memset(p, v, n); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int v, size_t n) {
  wait_for_all();
  if (n <= COPIES) memset(p, v, n);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **p, const void *) {
  static void *area = map(1 << 20);
  return *p = area, cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// Streams and events

cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = reinterpret_cast<cudaStream_t>(new_stream()), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return of(s)->idle() ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  host_waits("cudaStreamSynchronize");
  return of(s)->wait(), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  auto *event = of(e);
  auto n = event->last();
  of(s)->put([=] { event->wait(n); });
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *s) {
  return *s = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *s, unsigned long long *id, cudaGraph_t *,
                                     const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
  if (id) *id = 0;
  return *s = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
// Streams may still have it in their queues.
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  auto *event = of(e);
  auto n = event->record();
  of(s)->put([=] { event->reach(n); });
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return of(e)->done() ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  host_waits("cudaEventSynchronize");
  return of(e)->wait(of(e)->last()), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { return *ms = 0, cudaSuccess; }

// Kernels

cudaError_t cudaLaunchKernel(const void *, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t) {
  return check_grid(grid, block, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t) {
  return check_grid(grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *, void **) {
  return check_grid(c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *) { return *k = nullptr, cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<cudaStream_t *>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  memset(a, 0, sizeof *a);
  a->binaryVersion = a->ptxVersion = 90;
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) { return *n = 1, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int, size_t, unsigned) {
  return *n = 1, cudaSuccess;
}

// The driver's functions, which libtorch looks up one by one.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
