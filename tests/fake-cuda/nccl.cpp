// NCCL between processes of one machine, for LD_PRELOAD under libtorch's ProcessGroupNCCL: bytes move
// through a file in shared memory, a chunk at a time. Only the functions that c10d's collectives on
// equal parts call.
#include "device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace {
struct Comm;
}
using ncclComm_t = Comm *;
using ncclResult_t = int;
using cudaStream_t = CUstream_st *;
struct ncclUniqueId {
  char internal[128];
};
// Numbers of NCCL 2.28.
enum ncclDataType_t { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum ncclRedOp_t { SUM, PROD, MAX, MIN, AVG };

namespace {

constexpr int SUCCESS = 0, VERSION = 22809;
constexpr size_t PAGE = 4096, SLOT = 4 << 20;

struct Comm {
  int rank, world;
  std::atomic<uint64_t> *arrived;
  char *slots;
  uint64_t round = 0;
  std::atomic<bool> aborted{false};

  char *slot(int r) const { return slots + r * SLOT; }

  // Waits for all ranks. False after an abort.
  bool meet() {
    round++;
    ++*arrived;
    while (!aborted && *arrived < round * world) usleep(20);
    return !aborted;
  }
};

[[noreturn]] void refuse(const char *what) {
  fprintf(stderr, "fake-cuda: NCCL: %s is not there\n", what);
  abort();
}

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case INT8: case UINT8: return 1;
    case FLOAT16: case BFLOAT16: return 2;
    case INT32: case UINT32: case FLOAT32: return 4;
    default: return 8;
  }
}

struct Bf16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float f;
    return memcpy(&f, &wide, 4), f;
  }
  Bf16() = default;
  Bf16(float f) {
    uint32_t wide;
    memcpy(&wide, &f, 4);
    // To nearest, ties to even.
    bits = std::isnan(f) ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
};

// In rank order, and rounded after each term: as a chain of ranks does.
template <typename T>
void reduce(ncclRedOp_t op, const Comm &c, void *out, size_t offset, size_t n) {
  auto *to = static_cast<T *>(out);
  for (size_t i = 0; i < n; i++) {
    auto of = [&](int r) { return reinterpret_cast<const T *>(c.slot(r) + offset)[i]; };
    T all = of(0);
    for (int r = 1; r < c.world; r++) {
      T next = of(r);
      all = op == SUM ? T(all + next) : op == MAX ? std::max(all, next) : std::min(all, next);
    }
    to[i] = all;
  }
}

void reduce(ncclDataType_t type, ncclRedOp_t op, const Comm &c, void *out, size_t offset, size_t n) {
  if (op != SUM && op != MAX && op != MIN) refuse("this reduction");
  switch (type) {
    case FLOAT32: return reduce<float>(op, c, out, offset, n);
    case FLOAT64: return reduce<double>(op, c, out, offset, n);
    case BFLOAT16: return reduce<Bf16>(op, c, out, offset, n);
    case INT32: return reduce<int32_t>(op, c, out, offset, n);
    case INT64: return reduce<int64_t>(op, c, out, offset, n);
    case UINT8: return reduce<uint8_t>(op, c, out, offset, n);
    default: refuse("a sum of this type");
  }
}

// Chunks of at most `room` bytes that hold whole elements of `count` elements: every rank lays down
// its own with `give`, then looks at all slots with `take`. Both get the first element and the number
// of elements.
ncclResult_t in_chunks(Comm *c, cudaStream_t stream, size_t count, size_t size, size_t room,
                       std::function<void(size_t, size_t)> give, std::function<void(size_t, size_t)> take) {
  // Device memory of a size that is not copied is not touched here either.
  if (count * size > std::max<uint64_t>(largest_copy(), 16 << 20)) return on_stream(stream, [=] { c->meet(); }), SUCCESS;
  on_stream(stream, [=] {
    size_t most = std::max<size_t>(room / size, 1);
    for (size_t from = 0; from < count; from += most) {
      size_t n = std::min(most, count - from);
      give(from, n);
      if (!c->meet()) return;
      take(from, n);
      if (!c->meet()) return;
    }
  });
  return SUCCESS;
}

char *at(void *p, size_t bytes) { return static_cast<char *>(p) + bytes; }
const char *at(const void *p, size_t bytes) { return static_cast<const char *>(p) + bytes; }

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *v) { return *v = VERSION, SUCCESS; }
const char *ncclGetErrorString(ncclResult_t) { return "an error of the NCCL that is not there"; }
const char *ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  static std::atomic<int> next{0};
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/dev/shm/fake-nccl-%d-%d", getpid(), next++);
  return SUCCESS;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int world, ncclUniqueId id, int rank, void *) {
  int fd = open(id.internal, O_RDWR | O_CREAT, 0600);
  size_t bytes = PAGE + world * SLOT;
  if (fd < 0 || ftruncate(fd, bytes)) refuse("shared memory");
  auto *memory = static_cast<char *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  close(fd);
  auto *c = new Comm{rank, world, reinterpret_cast<std::atomic<uint64_t> *>(memory), memory + PAGE};
  c->meet();
  unlink(id.internal);
  return *comm = c, SUCCESS;
}
ncclResult_t ncclCommInitRank(ncclComm_t *c, int world, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(c, world, id, rank, nullptr);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *r) { return *r = SUCCESS, SUCCESS; }
ncclResult_t ncclCommAbort(ncclComm_t c) { return c->aborted = true, SUCCESS; }
ncclResult_t ncclCommFinalize(ncclComm_t) { return SUCCESS; }
ncclResult_t ncclCommDestroy(ncclComm_t) { return SUCCESS; }
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) { return *n = c->world, SUCCESS; }
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *r) { return *r = c->rank, SUCCESS; }
ncclResult_t ncclGroupStart() { return SUCCESS; }
ncclResult_t ncclGroupEnd() { return SUCCESS; }
ncclResult_t ncclCommRegister(const ncclComm_t, void *, size_t, void **h) { return *h = nullptr, SUCCESS; }
ncclResult_t ncclCommDeregister(const ncclComm_t, void *) { return SUCCESS; }

ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  size_t size = size_of(t);
  return in_chunks(
      c, s, n, size, SLOT, [=](size_t from, size_t k) { memcpy(c->slot(c->rank), at(in, from * size), k * size); },
      [=](size_t from, size_t k) {
        for (int r = 0; r < c->world; r++) memcpy(at(out, (r * n + from) * size), c->slot(r), k * size);
      });
}

// Part r of the slot is for rank r.
ncclResult_t ncclAlltoAll(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  size_t size = size_of(t), room = SLOT / c->world / 64 * 64;
  return in_chunks(
      c, s, n, size, room,
      [=](size_t from, size_t k) {
        for (int r = 0; r < c->world; r++) memcpy(c->slot(c->rank) + r * room, at(in, (r * n + from) * size), k * size);
      },
      [=](size_t from, size_t k) {
        for (int r = 0; r < c->world; r++) memcpy(at(out, (r * n + from) * size), c->slot(r) + c->rank * room, k * size);
      });
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                               cudaStream_t s) {
  size_t size = size_of(t), room = SLOT / c->world / 64 * 64;
  return in_chunks(
      c, s, n, size, room,
      [=](size_t from, size_t k) {
        for (int r = 0; r < c->world; r++) memcpy(c->slot(c->rank) + r * room, at(in, (r * n + from) * size), k * size);
      },
      [=](size_t from, size_t k) { reduce(t, op, *c, at(out, from * size), c->rank * room, k); });
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                           cudaStream_t s) {
  size_t size = size_of(t);
  return in_chunks(
      c, s, n, size, SLOT, [=](size_t from, size_t k) { memcpy(c->slot(c->rank), at(in, from * size), k * size); },
      [=](size_t from, size_t k) { reduce(t, op, *c, at(out, from * size), 0, k); });
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                           cudaStream_t s) {
  size_t size = size_of(t);
  return in_chunks(
      c, s, n, size, SLOT,
      [=](size_t from, size_t k) {
        if (c->rank == root) memcpy(c->slot(root), at(in, from * size), k * size);
      },
      [=](size_t from, size_t k) { memcpy(at(out, from * size), c->slot(root), k * size); });
}
ncclResult_t ncclBcast(void *p, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  return ncclBroadcast(p, p, n, t, root, c, s);
}
}
