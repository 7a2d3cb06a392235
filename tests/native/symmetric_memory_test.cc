// The host side of the CUDA backend against fake_cuda.h, without a GPU: how processes come to each
// other's memory, what staging does to a call, and that nothing is freed too early or never.
#include "xla_ffi/memory/symmetric_memory.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <iterator>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda.h"
#include "xla_ffi/cuda/call_site.h"

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (false)

namespace jax_ep::gpu {
cudaError_t PrepareKernels() { return cudaSuccess; }
}  // namespace jax_ep::gpu

namespace {

using jax_ep::EnterGroup;
using jax_ep::GroupCall;
using jax_ep::StagingRegion;
using jax_ep::SymmetricMemory;
using jax_ep::Use;
using jax_ep::gpu::ControlBlock;
using jax_ep::gpu::GroupView;
using std::chrono::nanoseconds;

constexpr size_t kPoolBytes = fake_cuda::kGranularity;

SymmetricMemory& Memory() { return SymmetricMemory::Get(); }

// Maps new VMM memory that device 0 may use.
void MapNew(CUdeviceptr at) {
  CUmemGenericAllocationHandle handle;
  CUmemAccessDesc own{};
  CHECK(fake_cuda::MemCreate(&handle, kPoolBytes, nullptr, 0) == CUDA_SUCCESS);
  CHECK(fake_cuda::MemMap(at, kPoolBytes, 0, handle, 0) == CUDA_SUCCESS);
  CHECK(fake_cuda::MemSetAccess(at, kPoolBytes, &own, 1) == CUDA_SUCCESS);
  fake_cuda::MemRelease(handle);
}

// XLA's memory pool on device 0: a reservation of addresses, made of several mappings.
char* MakePool(int num_mappings = 1) {
  CUdeviceptr at;
  CHECK(fake_cuda::MemAddressReserve(&at, kPoolBytes * num_mappings, 0, 0, 0) == CUDA_SUCCESS);
  for (int i = 0; i < num_mappings; ++i) MapNew(at + kPoolBytes * i);
  return reinterpret_cast<char*>(at);
}

uint64_t Address(const void* p) { return reinterpret_cast<uint64_t>(p); }

jax_ep::CudaSiteState Site(std::vector<int64_t> members, int num_ranks) {
  jax_ep::CudaSiteState site;
  site.op = "jax_ep_test";
  site.groups = jax_ep::Groups(std::move(members), {}, {}, num_ranks);
  site.operation = 7;
  return site;
}

struct View : GroupView {
  View(const std::vector<int64_t>& members, int ordinal) : GroupView{} {
    const auto error = Memory().FillGroup(members.data(), static_cast<int>(members.size()), ordinal,
                                          this, &region);
    if (error) std::fprintf(stderr, "%s\n", error->c_str());
    CHECK(!error);
  }
  StagingRegion region;
};

std::string Thrown(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool Contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "'%s' is not in '%s'\n", part.c_str(), text.c_str());
  return false;
}

int NumDescriptors() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// One process, two devices -------------------------------------------------------------------

void OneProcess() {
  char* const pool = MakePool();
  Memory().SetTimeouts({nanoseconds(5), nanoseconds(3)});
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  const View first({0, 1}, 0), second({0, 1}, 1);
  CHECK(first.rank == 0 && second.rank == 1);
  CHECK(first.peer[1].control == second.control && second.peer[0].control == first.control);
  CHECK(first.peer[1].slot_there == 0 && first.peer[1].slot_here == 1);
  CHECK(first.error->arrival_timeout_ns == 5 && first.error->progress_timeout_ns == 3);
  Memory().SetTimeouts({nanoseconds(6), nanoseconds(4)});
  for (const View& view : {first, second}) {
    CHECK(view.error->arrival_timeout_ns == 6 && view.error->progress_timeout_ns == 4);
  }
  CHECK(!Memory().Share(0, pool, 100, false));

  // Direct: the call sees the buffers themselves.
  const auto site = Site({0, 1}, 2);
  {
    GroupCall call;
    CHECK(EnterGroup(site, 0, nullptr,
                     {{"x", pool, 100}, {"rows", pool + 128, 100, Use::kLanding, 200}}, &call)
              .success());
    CHECK(call.LandingOf(pool + 128) == nullptr);
    CHECK(call.At(pool) == pool && call.operation == 7u + jax_ep::NumSms(0, 0) &&
          call.num_ranks == 2);
  }
  // A recorded error ends later calls, until a new beginning.
  second.error->kind = 1;
  second.error->slot = 1;
  second.error->expected_epoch = 3;
  second.error->seen_epoch = 2;
  second.error->valid = 1;
  const std::string recorded = Memory().RecordedError().value_or("");
  CHECK(Contains(recorded,
                 "jax_ep_dispatch: device 1 waited for device 0 to come until the timeout "
                 "(expected epoch 3, seen 2)"));
  {
    GroupCall call;
    const auto error = EnterGroup(site, 0, nullptr, {}, &call);
    CHECK(error.errc() == xla::ffi::ErrorCode::kDeadlineExceeded && error.message() == recorded);
    // The other rank is told, for no kernel will; this one's own word is its peers' to write.
    using jax_ep::gpu::given_up_of;
    CHECK(second.control->given_up == given_up_of(0, 0) && first.control->given_up == 0);
    CHECK(!EnterGroup(site, 1, nullptr, {}, &call).success());
    CHECK(first.control->given_up == given_up_of(1, 0));
    CHECK(second.control->given_up == given_up_of(0, 0));
  }
  const auto text_of = [&](jax_ep::gpu::Phase phase, uint64_t expected, uint64_t seen) {
    second.error->phase = phase;
    second.error->expected_epoch = expected;
    second.error->seen_epoch = seen;
    return Memory().RecordedError().value_or("");
  };
  using jax_ep::gpu::progress_of;
  CHECK(Contains(text_of(jax_ep::gpu::kProgress, progress_of(3, 9), progress_of(3, 4)),
                 "to finish until the timeout (expected epoch 3, seen 3 with 4 of 9 steps"));
  CHECK(Contains(text_of(jax_ep::gpu::kProgress, progress_of(3, 9), progress_of(2, 7)),
                 "(expected epoch 3, seen 2 with 0 of 9 steps"));
  CHECK(Contains(text_of(jax_ep::gpu::kNotResident, 128, 96), "on device 1 only 96 of 128 blocks"));
  CHECK(Contains(text_of(jax_ep::gpu::kToldByPeer, 0, 5),
                 "device 1 was told by device 0, which has given up on slot 5 and says why;"));
  CHECK(Contains(text_of(jax_ep::gpu::kToldByPeer, 0, 0),
                 "device 1 was told by device 0, which has given up and says why;"));
  CHECK(Contains(text_of(jax_ep::gpu::kTwoAtOnce, 0, 0),
                 "device 1 found another call running, where"));
  CHECK(Contains(text_of(jax_ep::gpu::kOtherCall, 10, 11),
                 "device 1 and device 0 are in different calls (operation a, b)"));
  CHECK(Contains(text_of(jax_ep::gpu::kEnd, 3, 2), "device 1 waited for device 0 to finish until"));
  CHECK(
      Contains(text_of(jax_ep::gpu::kPeerDied, 3, 1),
               "the process of device 0 has died, so device 1 waits for it no longer; the group"));
  second.error->not_left[0] = 1;
  CHECK(Contains(text_of(jax_ep::gpu::kEnd, 3, 2),
                 "; device 0 stood still when told, and may yet write to arrays on device 1; "));
  // Also if another device's record comes first.
  first.error->peer_slot = 1;
  first.error->not_left[1] = 1;
  first.error->valid = 1;
  CHECK(
      Contains(Memory().RecordedError().value_or(""),
               "jax_ep_layout: device 0 waited for device 1 to come until the timeout (expected "
               "epoch 0, seen 0); device 1 stood still when told, and may yet write to arrays on "
               "device 0; device 0 stood still when told, and may yet write to arrays on device 1; "
               "the group is broken"));
  CHECK(Memory().Synchronize(std::chrono::seconds(10)));
  Memory().Release(true);
  Memory().Release(true);
  CHECK(!Memory().RecordedError());
  // What a replayed command buffer finds.
  CHECK(first.control->local.broken != 0 && second.control->local.broken != 0);
  {
    GroupCall call;
    const auto error = EnterGroup(site, 0, nullptr, {}, &call);
    CHECK(error.errc() == xla::ffi::ErrorCode::kFailedPrecondition);
    CHECK(Contains(error.message(), "jax_ep.finalize() has been called. Call jax_ep.initialize()"));
  }
  // In one process everything begins again at the same addresses.
  first.control->local.epoch[1] = 9;
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 1 << 12, false);
  const View again({0, 1}, 0);
  CHECK(again.control == first.control && again.error == first.error);
  CHECK(again.control->local.broken == 0 && again.control->local.epoch[1] == 0);
  CHECK(!Memory().RecordedError() && again.error->arrival_timeout_ns == 6);
  CHECK(again.error->progress_timeout_ns == 4);
  CHECK(again.region.begin != 0 && again.region.bytes == 1 << 12);

  // A larger region replaces the smaller, which stays; it survives Release.
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 1 << 13, false);
  const View larger({0, 1}, 0);
  CHECK(larger.region.begin != again.region.begin && larger.region.bytes == 1 << 13);
  *reinterpret_cast<volatile char*>(again.region.begin) = 1;
  Memory().Release(true);
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  CHECK(View({0, 1}, 0).region.begin == larger.region.begin);

  // A device that does not come to an end.
  fake_cuda::SetBusy(true);
  CHECK(!Memory().Synchronize(std::chrono::milliseconds(50)));
  Memory().Release(false);
  fake_cuda::SetBusy(false);
  CHECK(again.control->local.broken == 0);  // its kernel has not been disturbed
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  CHECK(View({0, 1}, 0).control != again.control);

  // A device that has failed: Release goes on, Setup says what failed and changes nothing.
  fake_cuda::broken = true;
  CHECK(Memory().Synchronize(std::chrono::seconds(10)));
  Memory().Release(true);
  CHECK(Contains(Thrown([] { Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false); }),
                 "on CUDA device 0: a fake error"));
  CHECK(Memory().Member(0) == -1);
  fake_cuda::broken = false;
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  Memory().Release(true);
}

// What peers reach goes by the allocation, not by its address.
void Sharing() {
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  const auto share = [](const char* at, size_t bytes) {
    const int before = fake_cuda::num_driver_calls;
    const auto problem = Memory().Share(0, at, bytes, false);
    if (problem) std::fprintf(stderr, "%s\n", problem->c_str());
    CHECK(!problem && fake_cuda::Reaches(1, Address(at), bytes));
    return fake_cuda::num_driver_calls - before;
  };
  // An array that is its own allocation is freed, and another one comes to lie there.
  char* const array = MakePool();
  share(array, 100);
  CHECK(share(array, 100) == 1 && share(array + 512, 1000) == 1);
  for (int i = 0; i < 3; ++i) {
    CHECK(fake_cuda::MemUnmap(Address(array), kPoolBytes) == CUDA_SUCCESS);
    MapNew(Address(array));
    CHECK(!fake_cuda::Reaches(1, Address(array), 100));
    share(array, 100);
    CHECK(share(array, 100) == 1);
  }
  // A buffer that lies in several mappings of a pool that has grown.
  char* const pool = MakePool(3);
  share(pool + kPoolBytes - 64, kPoolBytes + 128);
  CHECK(share(pool + kPoolBytes - 64, kPoolBytes + 128) == 3);
  CHECK(share(pool + kPoolBytes - 64, 64) == 1);
  // Of these the one in the middle is given back, and replaced.
  CHECK(fake_cuda::MemUnmap(Address(pool) + kPoolBytes, kPoolBytes) == CUDA_SUCCESS);
  MapNew(Address(pool) + kPoolBytes);
  share(pool, 3 * kPoolBytes);
  Memory().Release(true);
}

// A call gets through while set-up waits for a device: its kernel may wait for that call's.
void GrowthWhileDevicesWork() {
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 1024, true);
  const auto site = Site({0, 1}, 2);
  const std::vector<int> data(10);
  GroupCall first, second;
  CHECK(EnterGroup(site, 0, nullptr, {{"x", data.data(), 40}}, &first).success());
  fake_cuda::SetBusy(true);
  std::thread growth([] { Memory().Setup(0, 1, {0, 1}, {0, 1}, 4096, true); });
  CHECK(fake_cuda::AwaitWaiting());
  auto entered = std::async(std::launch::async, [&] {
    return EnterGroup(site, 1, nullptr, {{"x", data.data(), 40}}, &second).success();
  });
  CHECK(entered.wait_for(std::chrono::seconds(10)) == std::future_status::ready && entered.get());
  fake_cuda::SetBusy(false);
  growth.join();
  CHECK(Contains(Memory().Describe(), "staging region of 4096 bytes"));
  // A rank that entered before the growth meets one that entered after it: an address, unlike an
  // offset in the region, means the same to both.
  GroupCall third;
  CHECK(EnterGroup(site, 1, nullptr, {{"x", data.data(), 40}}, &third).success());
  CHECK(third.At(data.data()) != second.At(data.data()));
  for (const GroupCall* call : {&first, &second, &third}) {
    CHECK(Address(call->At(data.data())) - call->staging >= call->staging_bytes);
  }
  Memory().Release(true);
}

void Staging() {
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 1024, true);
  CHECK(Contains(Memory().Describe(), "staged path (JAX_EP_PATH=staged)"));
  const View view({0, 1}, 0);
  const auto site = Site({0, 1}, 2);
  std::vector<int> in(50, 3), scratch(64, 4), out(20, 5), rows(1000, 6);
  GroupCall call;
  CHECK(EnterGroup(site, 0, nullptr,
                   {{"in", in.data(), 200},
                    {"absent", nullptr, 0},
                    {"scratch", scratch.data(), 256, Use::kScratch},
                    {"rows", rows.data(), 4000, Use::kLanding, 200},
                    {"out", out.data(), 80, Use::kOutput}},
                   &call)
            .success());
  CHECK(Address(call.At(in.data())) == view.region.begin);
  CHECK(Address(call.At(scratch.data())) == view.region.begin + 256);
  CHECK(Address(call.LandingOf(rows.data())) ==
        view.region.begin + 512);  // of less than 4000 bytes
  CHECK(Address(call.At(out.data())) == view.region.begin + 768);
  CHECK(call.At(rows.data()) == rows.data());
  CHECK(call.LandingOf(out.data()) == nullptr && call.LandingOf(nullptr) == nullptr);
  CHECK(call.At(static_cast<int*>(nullptr)) == nullptr);
  CHECK(std::memcmp(call.At(in.data()), in.data(), 200) == 0);
  CHECK(call.At(scratch.data())[0] == 0);  // not copied
  CHECK(*static_cast<int*>(call.LandingOf(rows.data())) == 0);
  std::memset(call.At(out.data()), 1, 80);
  std::memset(call.At(scratch.data()), 1, 256);
  std::memset(call.LandingOf(rows.data()), 1, 200);
  CHECK(call.CopyOut(cudaErrorInvalidValue, nullptr) == cudaErrorInvalidValue && out[0] == 5);
  CHECK(call.CopyOut(cudaSuccess, nullptr) == cudaSuccess);
  CHECK(out[19] == 0x01010101 && scratch[0] == 4 && in[0] == 3);
  CHECK(rows[0] == 6);  // what has landed is the kernel's to move

  GroupCall large;
  const auto error = EnterGroup(site, 0, nullptr,
                                {{"a", in.data(), 200, Use::kLanding, 600},
                                 {"b", out.data(), 80, Use::kOutput},
                                 {"c", scratch.data(), 200, Use::kScratch}},
                                &large);
  CHECK(error.errc() == xla::ffi::ErrorCode::kFailedPrecondition);
  CHECK(Contains(error.message(),
                 "jax_ep_test: the other ranks cannot reach the memory of a, b, c "
                 "(JAX_EP_PATH=staged), so the call needs 1280 bytes of staging "
                 "region, but device 0 has 1024"));
  CHECK(view.peer[1].control->given_up == 0);  // this call failed, not the group

  GroupCall single;  // a group of one shows its buffers to nobody
  CHECK(EnterGroup(Site({0, 1}, 1), 1, nullptr, {{"in", in.data(), 1 << 20}}, &single).success());
  CHECK(single.At(in.data()) == in.data());
  Memory().Release(true);
}

// Two processes ------------------------------------------------------------------------------

struct Link {
  int process;
  int fd;

  std::string Exchange(const std::string& mine) const {
    const uint64_t bytes = mine.size();
    CHECK(write(fd, &bytes, 8) == 8 && write(fd, mine.data(), bytes) == ssize_t(bytes));
    uint64_t theirs = 0;
    CHECK(recv(fd, &theirs, 8, MSG_WAITALL) == 8);
    std::string text(theirs, '\0');
    CHECK(recv(fd, text.data(), theirs, MSG_WAITALL) == ssize_t(theirs));
    return text;
  }
  void Meet() const { CHECK(Exchange("here") == "here"); }
};

// Runs `f` in two processes that can talk; both must return.
void InTwoProcesses(const std::function<void(const Link&)>& f) {
  int fds[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
  pid_t pids[2];
  for (int p = 0; p < 2; ++p) {
    pids[p] = fork();
    CHECK(pids[p] >= 0);
    if (pids[p] != 0) continue;
    alarm(60);
    close(fds[1 - p]);
    f({p, fds[p]});
    std::_Exit(0);
  }
  close(fds[0]);
  close(fds[1]);
  for (pid_t pid : pids) {
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

const std::vector<int64_t> kMembers = {0, 1, int64_t{1} << 32, int64_t{1} << 32 | 1};

// Two devices a process. `mine` and `theirs` are 64-bit words in each process's pool.
void Connect(const Link& link, char* pool, size_t staging_bytes, bool staged_only) {
  Memory().Setup(link.process, 2, {0, 1}, {0, 1}, staging_bytes, staged_only);
  std::vector<uint64_t> pointers;
  if (!staged_only) pointers = {Address(pool), Address(pool) + 4096};
  const std::string mine = Memory().Export(pointers);
  const std::string theirs = link.Exchange(mine);
  Memory().Import(link.process == 0 ? std::vector{mine, theirs} : std::vector{theirs, mine});
  link.Meet();
  const int num_open = NumDescriptors();
  Memory().CloseDescriptors();
  CHECK(NumDescriptors() < num_open);
}

void TwoProcesses(const Link& link) {
  char* const pool = MakePool();
  const int num_descriptors = NumDescriptors();
  const size_t num_mappings = fake_cuda::mappings.size();
  std::vector<ControlBlock*> controls;
  for (int generation = 0; generation < 3; ++generation) {
    // Nobody has initialised before, or something of this process alone has run.
    if (generation == 1) Memory().Setup(link.process, 2, {0, 1}, {0, 1}, 0, false);
    Memory().Release(true);
    Connect(link, pool, 1 << 16, generation == 2 && link.process == 1);

    const int ordinal = 1, rank = 2 * link.process + ordinal;
    const int other = 2 * (1 - link.process) + ordinal;
    const View view(kMembers, ordinal);
    CHECK(view.rank == rank && view.peer[other].slot_here == other);
    CHECK(view.peer[other].slot_there == rank);
    for (ControlBlock* old : controls) CHECK(view.control != old);
    controls.push_back(view.control);

    // Control memory, staging and XLA's memory of the other process, at the addresses it shows.
    view.peer[other].control->local.epoch[70] = 100 + link.process;
    reinterpret_cast<uint64_t*>(view.peer[other].staging)[3] = 200 + link.process;
    auto* word = reinterpret_cast<uint64_t*>(pool + 512);
    *word = 300 + link.process;
    const std::string shown = link.Exchange(std::to_string(Address(word)));
    CHECK(view.control->local.epoch[70] == uint64_t(100 + 1 - link.process));
    CHECK(reinterpret_cast<uint64_t*>(view.staging)[3] == uint64_t(200 + 1 - link.process));
    if (generation < 2 || link.process == 1) {
      const uint64_t here = std::stoull(shown) + static_cast<uint64_t>(view.peer[other].shift);
      CHECK(*reinterpret_cast<uint64_t*>(here) == uint64_t(300 + 1 - link.process));
    }

    // Which buffers are reached directly is the owner's affair.
    const bool direct = generation < 2 || link.process == 0;
    char* const elsewhere = MakePool();
    const auto site = Site(kMembers, 4);
    GroupCall inside, outside, local;
    CHECK(EnterGroup(site, ordinal, nullptr, {{"x", pool, 64}}, &inside).success());
    CHECK((inside.At(pool) == pool) == direct);
    CHECK(EnterGroup(site, ordinal, nullptr, {{"x", elsewhere, 64}}, &outside).success());
    CHECK(Address(outside.At(elsewhere)) == view.staging);
    // A group inside the process reaches all of it.
    CHECK(
        EnterGroup(Site(kMembers, 2), ordinal, nullptr, {{"x", elsewhere, 64}}, &local).success());
    CHECK((local.At(elsewhere) == elsewhere) == direct);

    // One leaves first; the other still writes to it, and neither fails.
    link.Meet();
    if (link.process == 0) Memory().Release(true);
    link.Meet();
    if (link.process == 1) {
      view.peer[other].control->local.epoch[70] = 400;
      reinterpret_cast<uint64_t*>(view.peer[other].staging)[3] = 400;
      Memory().Release(true);
    }
    link.Meet();
    CHECK(view.control->local.broken != 0);
    // In a job of several processes old control memory stays broken, whoever begins again.
  }
  for (ControlBlock* old : controls) CHECK(old->local.broken != 0);
  // Left: control memory of each generation and device (and of the set-up alone), a staging region
  // a device, the pools of this test.
  CHECK(fake_cuda::mappings.size() == num_mappings + 2 * 4 + 2 + 3);
  CHECK(NumDescriptors() == num_descriptors + int(fake_cuda::allocations.size()) - 1);
}

void NoExport(const Link& link) {
  std::vector<char> memory(1 << 20);  // made by no cuMemMap
  Memory().Setup(link.process, 2, {0, 1}, {0, 1}, 0, false);
  const std::string error =
      Thrown([&] { Memory().Export({Address(memory.data()), Address(memory.data())}); });
  CHECK(Contains(error,
                 "other processes cannot map XLA's memory (exporting XLA's memory on CUDA "
                 "device 0: a fake error)"));
  CHECK(Contains(error, "jax_ep.initialize(staging_bytes=...)"));
  Memory().Release(true);
  Connect(link, memory.data(), 4096, false);
  CHECK(Contains(Memory().Describe(), "staged path (exporting XLA's memory"));
  GroupCall call;
  CHECK(EnterGroup(Site(kMembers, 4), 0, nullptr, {{"x", memory.data(), 64}}, &call).success());
  CHECK(Address(call.At(memory.data())) == call.staging);
  link.Meet();
  Memory().Release(true);
}

// The other process dies: its memory is still there for kernels that write to it.
void Death(const Link& link) {
  char* const pool = MakePool();
  Connect(link, pool, 4096, false);
  link.Meet();
  if (link.process == 1) raise(SIGKILL);
  char byte;
  CHECK(read(link.fd, &byte, 1) == 0);
  const View view(kMembers, 0);
  view.peer[2].control->start[0].shown[0].epoch = 1;
  *reinterpret_cast<uint64_t*>(view.peer[2].staging) = 1;
  *reinterpret_cast<uint64_t*>(Address(pool) + static_cast<uint64_t>(view.peer[2].shift)) = 1;
  Memory().Release(true);
}

// Whether the device is told that these ranks, and no others, have gone.
bool AreGone(const View& view, const std::set<int>& ranks) {
  uint64_t expected[jax_ep::gpu::kSlotWords] = {};
  for (int r : ranks) {
    const int slot = view.peer[r].slot_here;
    expected[jax_ep::gpu::word_of(slot)] |= jax_ep::gpu::bit_of(slot);
  }
  return std::equal(std::begin(expected), std::end(expected), view.error->gone);
}

// A process that stops its devices in vain does not say that it has left: they may still write.
void ReleaseOfABusyDevice(const Link& link) {
  char* const pool = MakePool();
  Connect(link, pool, 4096, false);
  const View view(kMembers, 0);
  link.Meet();
  if (link.process == 1) Memory().Release(false);
  link.Meet();
  if (link.process == 0) {
    view.error->waiting.peer_slot = view.peer[2].slot_here;
    view.error->waiting.since = 1;
    CHECK(Memory().Watch().empty() && AreGone(view, {}));
    Memory().Release(true);
  }
  link.Meet();
}

// How another process is seen to have gone, which `last` is the last to do.
void Departure(const Link& link, const std::function<void()>& last, bool is_death) {
  char* const pool = MakePool();
  Connect(link, pool, 4096, false);
  const int num_descriptors = NumDescriptors();
  CHECK(Memory().Watch().empty());
  const int64_t other = std::stoll(link.Exchange(std::to_string(getpid())));
  if (link.process == 1) {
    last();
    std::_Exit(0);
  }
  const jax_ep::Descriptor pidfd = jax_ep::OpenProcess(other);
  pollfd ended{pidfd.get(), POLLIN, 0};
  CHECK(poll(&ended, 1, 30000) == 1);
  const std::vector<std::string> news = Memory().Watch();
  const View first(kMembers, 0), second(kMembers, 1);
  if (is_death) {
    CHECK(news.size() == 1 && Contains(news[0], "process 1 (pid " + std::to_string(other) +
                                                    ") has died; calls that wait"));
    CHECK(AreGone(first, {2, 3}) && AreGone(second, {2, 3}));
  } else {
    CHECK(news.empty() && AreGone(first, {}) && AreGone(second, {}));
    // A wait for it, which has gone for good, ends.
    first.error->waiting.peer_slot = first.peer[3].slot_here;
    first.error->waiting.since = 1;
    CHECK(Memory().Watch().empty());
    CHECK(AreGone(first, {2, 3}) && AreGone(second, {2, 3}));
  }
  CHECK(!Memory().RecordedError());  // that is the kernels' to do
  CHECK(Memory().Watch().empty());   // said already
  Memory().Release(true);
  CHECK(Memory().Watch().empty());
  // The peer's pidfd and its page, and this one's page, are closed; the pidfd above is open.
  CHECK(NumDescriptors() <= num_descriptors - 3 + 1);
  Memory().Setup(0, 2, {0, 1}, {0, 1}, 0, false);
  CHECK(AreGone(View({0, 1}, 0), {}));
  Memory().Release(true);
}

// Each wait is told of once, when it has lasted for 30 s.
void LongWait() {
  Memory().SetTimeouts({std::chrono::minutes(10), std::chrono::minutes(1)});
  Memory().Setup(0, 1, {4, 5}, {0, 1}, 0, false);
  auto& waiting = View({4, 5}, 1).error->waiting;
  const auto begin = std::chrono::steady_clock::now();
  const auto after = [&](int seconds) { return begin + std::chrono::seconds(seconds); };
  CHECK(Memory().Watch(after(0)).empty());
  waiting.kind = 1;
  waiting.phase = jax_ep::gpu::kStart;
  waiting.peer_slot = 0;
  waiting.since = 17;
  CHECK(Memory().Watch(after(100)).empty() && Memory().Watch(after(128)).empty());
  const auto news = Memory().Watch(after(130));
  CHECK(news.size() == 1 &&
        news[0] ==
            "jax_ep_dispatch: device 5 has waited for 30 s for device 4 to come; it gives up "
            "after 600 s (jax_ep.set_timeout)");
  CHECK(Memory().Watch(after(200)).empty());
  waiting.since = 18;  // another one
  waiting.phase = jax_ep::gpu::kProgress;
  CHECK(Memory().Watch(after(201)).empty());
  const auto more = Memory().Watch(after(231));
  CHECK(more.size() == 1 && Contains(more[0], "for device 4 to go on; it gives up after 60 s"));
  waiting.since = 0;
  CHECK(Memory().Watch(after(300)).empty());
  Memory().Release(true);
}

void Import() {
  char* const pool = MakePool();
  Memory().Setup(0, 2, {0, 1}, {0, 1}, 0, false);
  const std::string mine = Memory().Export({Address(pool), Address(pool)});
  CHECK(Thrown([&] { Memory().Import({mine, ""}); }).empty());  // one without devices
  CHECK(Contains(Thrown([&] { Memory().Import({mine, "1 17 "}); }), "another version"));
  CHECK(Contains(Thrown([&] {
                   Memory().Import({mine, "1 " + std::to_string(sizeof(ControlBlock)) + " 999"});
                 }),
                 "pidfd_getfd from process 1"));
  // A process with a page to show: this one.
  const jax_ep::Presence page;
  const std::string begin = std::to_string(getpid()) + " " + std::to_string(sizeof(ControlBlock)) +
                            " " + std::to_string(page.fd());
  CHECK(Contains(Thrown([&] { Memory().Import({mine, begin + " 4294967296 5"}); }),
                 "an incomplete message of process 1, device 0"));
  CHECK(Contains(Thrown([&] { Memory().Import({mine, begin + " 4294967296 999 0 2097152"}); }),
                 "pidfd_getfd from process " + std::to_string(getpid())));
  GroupView view{};
  StagingRegion staging;
  const auto error = Memory().FillGroup(kMembers.data(), 4, 0, &view, &staging);
  CHECK(error && Contains(*error,
                          "rank 2 lives on device 0 of process 1, which this process is "
                          "not connected to"));
  Memory().Release(true);
}

// Runs `f` in this process and in one that is killed.
void WithOneThatDies(const std::function<void(const Link&)>& f) {
  int fds[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
  const pid_t pid = fork();
  CHECK(pid >= 0);
  close(fds[pid == 0 ? 0 : 1]);
  f({pid == 0 ? 1 : 0, fds[pid == 0 ? 1 : 0]});
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
}

void Run(const char* name, const std::function<void()>& test) {
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    alarm(120);
    test();
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    std::fprintf(stderr, "%s failed\n", name);
    std::_Exit(1);
  }
  std::printf("%s: right\n", name);
  std::fflush(stdout);
}

}  // namespace

int main() {
  Run("one process", OneProcess);
  Run("sharing", Sharing);
  Run("growth", GrowthWhileDevicesWork);
  Run("long wait", LongWait);
  Run("staging", Staging);
  Run("import", Import);
  Run("two processes", [] { InTwoProcesses(TwoProcesses); });
  Run("no export", [] { InTwoProcesses(NoExport); });
  Run("death", [] { WithOneThatDies(Death); });
  Run("a process dies", [] {
    WithOneThatDies([](const Link& link) { Departure(link, [] { raise(SIGKILL); }, true); });
  });
  Run("a process ends without leaving",
      [] { InTwoProcesses([](const Link& link) { Departure(link, [] {}, true); }); });
  Run("a busy device is released", [] { InTwoProcesses(ReleaseOfABusyDevice); });
  Run("a process leaves", [] {
    InTwoProcesses(
        [](const Link& link) { Departure(link, [] { Memory().Release(true); }, false); });
  });
  return 0;
}
