// Likewise between two processes: how they come to each other's memory, that nothing is freed too
// early or never, and how one is seen to have gone.
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "cuda/memory/slots.h"
#include "tests/native/symmetric_memory_support.h"

namespace jax_ep::test {
namespace {

using gpu::ControlBlock;
using gpu::GroupView;

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
void Connect(const Link& link, char* pool, size_t staging_bytes, bool staged_only,
             size_t slot_bytes = 0, bool requires_slots = true) {
  Memory().Setup(link.process, 2, {0, 1}, {0, 1}, staging_bytes, staged_only, slot_bytes,
                 requires_slots);
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

// What one device writes where its slots at a peer are, the peer finds where it looks for it.
void SlotsOfTwoProcesses(const Link& link) {
  char* const pool = MakePool();
  constexpr size_t kBytes = 2 << 20;
  const size_t held = fake_cuda::HeldBytes();
  for (int generation = 0; generation < 2; ++generation) {
    Connect(link, pool, 0, false, kBytes);
    const View view(kMembers, 0);
    CHECK(view.slot_area_bytes == gpu::slot_area_bytes(kBytes, 4));
    const auto word = [&](ControlBlock* control, int slot) {
      char* area = reinterpret_cast<char*>(control) +
                   gpu::slot_area_offset(view.slot_area_bytes, slot, generation);
      return reinterpret_cast<uint64_t*>(area + view.slot_area_bytes) - 1;
    };
    const gpu::PeerView& peer = view.peer[2 - 2 * link.process];
    CHECK(*word(view.control, peer.slot_here) == 0);
    link.Meet();
    *word(peer.control, peer.slot_there) = 100 + link.process;
    link.Meet();
    CHECK(*word(view.control, peer.slot_here) == uint64_t(100 + 1 - link.process));
    link.Meet();
    if (link.process == 0) Memory().Release(true);
    link.Meet();
    if (link.process == 1) {
      *word(peer.control, peer.slot_there) = 200;  // there as long as anybody has it mapped
      Memory().Release(true);
    }
    link.Meet();
    // For calls that are replayed control memory is kept, but not slots.
    CHECK(fake_cuda::HeldBytes() == held + (generation + 1) * 2 * fake_cuda::kGranularity);
  }

  // Processes that disagree: each names the other, and may try again.
  const auto refusal = [&](size_t slot_bytes) {
    const std::string thrown = Thrown([&] { Connect(link, pool, 0, false, slot_bytes); });
    link.Meet();
    Memory().Release(true);
    return thrown;
  };
  CHECK(Contains(refusal((1 + link.process) * kBytes),
                 link.process == 0 ? "process 1 has slots of 4194304 bytes a device, process 0 of "
                                     "2097152: pass the same jax_ep.initialize(slot_bytes=...)"
                                   : "process 0 has slots of 2097152 bytes a device, process 1 of "
                                     "4194304: pass the same jax_ep.initialize(slot_bytes=...)"));
  CHECK(Contains(refusal(link.process == 0 ? 0 : kBytes), "has slots of "));
  // Enough for the devices of a process, not for those of both.
  CHECK(Contains(refusal(gpu::min_slot_bytes(2)),
                 "slot_bytes must be 0 or, for 4 devices, at least 525312; got 262656"));
  Connect(link, pool, 0, false, gpu::min_slot_bytes(4));
  link.Meet();
  Memory().Release(true);
}

// One process has no memory for slots: if nobody has asked for them none has slots, and they are given
// back where they were.
void OneWithoutMemoryForSlots(const Link& link) {
  char* const pool = MakePool();
  constexpr size_t kBytes = 4 << 20;
  if (link.process == 1) fake_cuda::most_bytes = kBytes - 1;
  const size_t held = fake_cuda::HeldBytes();
  Connect(link, pool, 0, false, kBytes, /*requires_slots=*/false);
  for (int ordinal : {0, 1}) {
    const View view(kMembers, ordinal);
    CHECK(view.slot_area_bytes == 0);
    view.peer[2 - 2 * link.process].control->local.epoch[70] = 1;
  }
  const std::string problem = Memory().SlotsProblem().value_or("");
  CHECK(Contains(problem, link.process == 0
                              ? "process 1 has no memory for slots of 4194304 bytes a device"
                              : "slots of 4194304 bytes on CUDA device 0 "));
  CHECK(Contains(Memory().Describe(), "; no slots (" + problem + ")"));
  // Two devices here and two there have control memory; and this process has mapped the pool there.
  CHECK(fake_cuda::HeldBytes() == held + 4 * fake_cuda::kGranularity + 2 * kPoolBytes);
  Memory().Setup(link.process, 2, {0, 1}, {0, 1}, 0, false, kBytes, false);  // lowering
  link.Meet();
  Memory().Release(true);
  CHECK(Contains(
      Thrown([&] { Connect(link, pool, 0, false, kBytes, /*requires_slots=*/link.process == 0); }),
      "process 1 has no memory for slots of 4194304 bytes a device, which process 0 asks for: pass "
      "a smaller jax_ep.initialize(slot_bytes=...) in every process"));
  link.Meet();
  Memory().Release(true);
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

// Devices of two processes, on buses 0 and 1, 2 and 3. The process that sees those of both refuses
// a group of a pair without atomic operations; the other one cannot ask.
void NoAtomicsBetweenProcesses(const Link& link) {
  fake_cuda::first_bus = 2 * link.process;
  fake_cuda::without_atomics = {{1, 2}};
  char* const pool = MakePool();
  Connect(link, pool, 4096, false);
  const int64_t theirs = int64_t{1} << 32;
  View({0, 0 + theirs}, 0);
  const int64_t members[] = {0, 1, theirs};
  gpu::GroupView view{};
  StagingRegion region;
  const auto refusal = Memory().FillGroup(members, 3, 0, &view, &region);
  if (link.process == 0) {
    CHECK(Contains(refusal.value_or(""),
                   "device 1 (process 0) reaches the memory of device 0 (process 1) without atomic "
                   "operations"));
  } else {
    CHECK(!refusal);
  }
  link.Meet();
  Memory().Release(true);
}

// Whether the device is told that these ranks, and no others, have gone.
bool AreGone(const View& view, const std::set<int>& ranks) {
  uint64_t expected[gpu::kSlotWords] = {};
  for (int r : ranks) {
    const auto process = static_cast<int>(kMembers[r] >> 32);
    for (int slot : {view.peer[r].slot_here, gpu::slot_of_process(process)}) {
      expected[gpu::word_of(slot)] |= gpu::bit_of(slot);
    }
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
  const Descriptor pidfd = OpenProcess(other);
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

void Import() {
  char* const pool = MakePool();
  Memory().Setup(0, 2, {0, 1}, {0, 1}, 0, false);
  const std::string mine = Memory().Export({Address(pool), Address(pool)});
  CHECK(Thrown([&] { Memory().Import({mine, ""}); }).empty());  // one without devices
  CHECK(Contains(Thrown([&] { Memory().Import({mine, "1 17 "}); }), "another version"));
  CHECK(Contains(Thrown([&] {
                   Memory().Import(
                       {mine, "1 " + std::to_string(sizeof(ControlBlock)) + " 999 0 0 0"});
                 }),
                 "pidfd_getfd from process 1"));
  const std::string none = " -1 0 0 -1 0 0 -1 0 0";  // slots, a pool and staging
  // A process with a page to show: this one.
  const Presence page;
  const std::string begin = std::to_string(getpid()) + " " + std::to_string(sizeof(ControlBlock)) +
                            " " + std::to_string(page.fd());
  CHECK(Contains(Thrown([&] { Memory().Import({mine, begin + " 0 0"}); }),
                 "an incomplete message of process 1"));
  CHECK(
      Contains(Thrown([&] { Memory().Import({mine, begin + " 0 0 0 4294967296 0000:09:00.0 5"}); }),
               "an incomplete message of process 1, device 0"));
  CHECK(Contains(Thrown([&] {
                   Memory().Import(
                       {mine, begin + " 0 0 0 4294967296 0000:09:00.0 999 0 2097152" + none});
                 }),
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

}  // namespace

void RunTestsOfTwoProcesses() {
  Run("import", Import);
  Run("two processes", [] { InTwoProcesses(TwoProcesses); });
  Run("no atomics between processes", [] { InTwoProcesses(NoAtomicsBetweenProcesses); });
  Run("slots of two processes", [] { InTwoProcesses(SlotsOfTwoProcesses); });
  Run("no memory for slots of one process", [] { InTwoProcesses(OneWithoutMemoryForSlots); });
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
}

}  // namespace jax_ep::test
