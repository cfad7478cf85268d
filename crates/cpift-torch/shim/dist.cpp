// c10d as plain C functions: a store, a process group of one backend, and its collectives.
//
// Gloo is part of libtorch_cpu and is linked. NCCL's process group is part of libtorch_cuda, which is
// loaded at run time: its two constructors are looked up by their mangled names, which spell out
// their parameters, and all else goes through the virtual functions of c10d::Backend. So no headers
// of CUDA or NCCL are needed, and one binary runs with and without them.
#include "shim.h"

#include <algorithm>
#include <cstring>
#include <unistd.h>

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Logging.h>
#include <dlfcn.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

C10_DECLARE_int(caffe2_log_level);

using c10::intrusive_ptr;
using c10d::Store;
using std::chrono::milliseconds;
using Group = intrusive_ptr<c10d::Backend>;
using Work = intrusive_ptr<c10d::Work>;

namespace {

// The constructors Options(bool is_high_priority_stream) and ProcessGroupNCCL(intrusive_ptr<Store>,
// int rank, int size, intrusive_ptr<Options>) in libtorch 2.11.0, and the sizes of the objects.
constexpr auto OPTIONS_NEW = "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb";
constexpr auto GROUP_NEW =
    "_ZN4c10d16ProcessGroupNCCLC1EN3c1013intrusive_ptrINS_5StoreENS1_6detail34intrusive_target_default_null_type"
    "IS3_EEEEiiNS2_INS0_7OptionsENS5_IS8_EEEE";
constexpr size_t OPTIONS_SIZE = 248, GROUP_SIZE = 1112;

constexpr auto OTHER_LIBTORCH = "; hint: `make setup CUDA=1` lays out libtorch 2.11.0 with CUDA";

template <typename F>
F symbol(const char *name) {
  auto found = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  TORCH_CHECK(found, "the loaded libtorch has no NCCL process group as in version 2.11.0: the symbol ", name,
              " is missing", OTHER_LIBTORCH);
  return found;
}

// Memory for an object of `size` bytes, with room behind it in which a constructor of another
// libtorch may write without harm until `check` has found it out. Never freed.
class Room {
 public:
  explicit Room(size_t size) : size_(size), bytes_(static_cast<unsigned char *>(::operator new(size + SPARE))) {
    std::memset(bytes_, FILL, size_ + SPARE);
  }

  void *memory() { return bytes_; }

  void check(const char *what) const {
    auto end = bytes_ + size_ + SPARE;
    while (end > bytes_ && end[-1] == FILL) end--;
    size_t written = end - bytes_;
    TORCH_CHECK(written <= size_ && written + 128 > size_, "the loaded libtorch is not version 2.11.0: ", what, " takes ",
                written, " bytes, expected ", size_, OTHER_LIBTORCH);
  }

 private:
  static constexpr size_t SPARE = 16384;
  static constexpr unsigned char FILL = 0xA5;
  size_t size_;
  unsigned char *bytes_;
};

Group gloo_group(const intrusive_ptr<Store> &store, int rank, int world, milliseconds timeout, const char *host) {
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(host));
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, options);
}

Group nccl_group(intrusive_ptr<Store> store, int rank, int world, milliseconds timeout, int device) {
  using Options = c10d::Backend::Options;
  auto new_options = symbol<void (*)(void *, bool)>(OPTIONS_NEW);
  // A parameter with a destructor is passed by reference to a temporary (Itanium ABI), so the type
  // that an intrusive_ptr points to does not matter.
  auto new_group = symbol<void (*)(void *, intrusive_ptr<Store>, int, int, intrusive_ptr<Options>)>(GROUP_NEW);
  // The rank's device is the current one, so that nothing opens a context on device 0.
  c10::Device own(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
  c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).setDevice(own);
  Room options_room(OPTIONS_SIZE), group_room(GROUP_SIZE);
  new_options(options_room.memory(), false);
  options_room.check("ProcessGroupNCCL::Options");
  // Both classes derive from classes of c10d alone, which lie at their start.
  auto options = intrusive_ptr<Options>::unsafe_steal_from_new(static_cast<Options *>(options_room.memory()));
  options->timeout = timeout;
  new_group(group_room.memory(), std::move(store), rank, world, options);
  group_room.check("ProcessGroupNCCL");
  auto group = Group::unsafe_steal_from_new(static_cast<c10d::Backend *>(group_room.memory()));
  group->setBoundDeviceId(own);
  return group;
}

}  // namespace

extern "C" {

// Connects to the store at host:port, which this process also serves if `serve`. All keys begin with
// `prefix`. `timeout_ms` bounds the wait for a key that is not set yet.
int cpift_store_new(const char *host, int port, int serve, const char *prefix, int world, int64_t connect_ms,
                    int64_t timeout_ms, intrusive_ptr<Store> **out) {
  return guarded([&] {
    // c10d logs a C++ stack for every connection of a rank that is gone; the errors are reported.
    FLAGS_caffe2_log_level = std::max(FLAGS_caffe2_log_level, 3);
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(port);
    options.isServer = serve != 0;
    options.waitWorkers = false;
    options.numWorkers = world;
    options.timeout = milliseconds(connect_ms);
    intrusive_ptr<Store> tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    tcp->setTimeout(milliseconds(timeout_ms));
    *out = new intrusive_ptr<Store>(c10::make_intrusive<c10d::PrefixStore>(prefix, tcp));
  });
}

void cpift_store_free(intrusive_ptr<Store> *store) { delete store; }

int cpift_store_set(intrusive_ptr<Store> *store, const char *key, const char *value, int64_t length) {
  return guarded([&] { (*store)->set(key, std::string(value, length)); });
}

// The value of a key, null if it is not set; valid until the thread's next call. Asks before it gets:
// a wait that times out blocks in its cancellation if the store hangs.
int cpift_store_get(intrusive_ptr<Store> *store, const char *key, const char **value, int64_t *length) {
  thread_local std::vector<uint8_t> answer;
  return guarded([&] {
    *value = nullptr;
    if (!(*store)->check({key})) return;
    answer = (*store)->get(key);
    *length = answer.size();
    answer.push_back(0);
    *value = reinterpret_cast<const char *>(answer.data());
  });
}

// Adds to a counter, which starts at 0, and returns the sum.
int cpift_store_add(intrusive_ptr<Store> *store, const char *key, int64_t amount, int64_t *sum) {
  return guarded([&] { *sum = (*store)->add(key, amount); });
}

// `device` < 0: a Gloo group that listens on the address `own_host`. Otherwise an NCCL group on that
// CUDA device. Never freed: its threads may still be at work when the process ends.
int cpift_group_new(intrusive_ptr<Store> *store, int device, const char *own_host, int rank, int world,
                    int64_t timeout_ms, Group **out) {
  return guarded([&] {
    milliseconds timeout(timeout_ms);
    *out = new Group(device < 0 ? gloo_group(*store, rank, world, timeout, own_host)
                                : nccl_group(*store, rank, world, timeout, device));
  });
}

int cpift_all_gather(Group *group, at::Tensor *out, at::Tensor *in, Work **work) {
  return guarded([&] { *work = new Work((*group)->_allgather_base(*out, *in)); });
}

int cpift_reduce_scatter(Group *group, at::Tensor *out, at::Tensor *in, Work **work) {
  return guarded([&] { *work = new Work((*group)->_reduce_scatter_base(*out, *in)); });
}

int cpift_all_to_all(Group *group, at::Tensor *out, at::Tensor *in, Work **work) {
  return guarded([&] {
    std::vector<int64_t> equal;
    *work = new Work((*group)->alltoall_base(*out, *in, equal, equal));
  });
}

int cpift_all_reduce(Group *group, at::Tensor *tensor, Work **work) {
  return guarded([&] {
    std::vector<at::Tensor> one{*tensor};
    *work = new Work((*group)->allreduce(one));
  });
}

int cpift_broadcast(Group *group, at::Tensor *tensor, int root, Work **work) {
  return guarded([&] {
    std::vector<at::Tensor> one{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *work = new Work((*group)->broadcast(one, options));
  });
}

int cpift_barrier(Group *group, Work **work) {
  return guarded([&] { *work = new Work((*group)->barrier()); });
}

// On CUDA, the current stream waits and not the host, except for a barrier.
int cpift_wait(Work *work) {
  return guarded([&] { (*work)->wait(); });
}

void cpift_work_free(Work *work) { delete work; }

int cpift_abort(Group *group) {
  return guarded([&] { (*group)->abort(); });
}

int cpift_shutdown(Group *group) {
  return guarded([&] { (*group)->shutdown(); });
}

// From now on exit() ends the process without running the destructors of libraries, which threads of
// a process group may still need.
int cpift_exit_at_once() {
  return on_exit([](int status, void *) { _exit(status); }, nullptr);
}

// Replaces the memory of a tensor's storage by `bytes` new bytes, or by none. Tensors that share the
// storage stay valid.
int cpift_set_storage(at::Tensor *tensor, int64_t bytes) {
  return guarded([&] {
    c10::DeviceGuard guard(tensor->device());
    auto *storage = tensor->storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(c10::GetAllocator(tensor->device().type())->allocate(bytes));
    storage->set_nbytes(bytes);
  });
}
}
