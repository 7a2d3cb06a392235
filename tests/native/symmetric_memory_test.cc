// The host side of the CUDA backend against fake_cuda.h, without a GPU, in one process: what calls
// get of set-up, sharing and staging, and what is said of errors and waits. Runs the tests of
// several processes too.
#include <chrono>
#include <cstring>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "cuda/memory/slots.h"
#include "tests/native/symmetric_memory_support.h"

namespace jax_ep::gpu {
cudaError_t PrepareKernels() { return cudaSuccess; }
}  // namespace jax_ep::gpu

namespace jax_ep::test {
namespace {

using gpu::ControlBlock;
using std::chrono::nanoseconds;

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
    CHECK(call.At(pool) == pool && call.operation == 7u + NumSms(0, 0) && call.num_ranks == 2);
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
    using gpu::given_up_of;
    CHECK(second.control->given_up == given_up_of(0, 0) && first.control->given_up == 0);
    CHECK(!EnterGroup(site, 1, nullptr, {}, &call).success());
    CHECK(first.control->given_up == given_up_of(1, 0));
    CHECK(second.control->given_up == given_up_of(0, 0));
  }
  const auto text_of = [&](gpu::Phase phase, uint64_t expected, uint64_t seen) {
    second.error->phase = phase;
    second.error->expected_epoch = expected;
    second.error->seen_epoch = seen;
    return Memory().RecordedError().value_or("");
  };
  using gpu::progress_of;
  CHECK(Contains(text_of(gpu::kProgress, progress_of(3, 9), progress_of(3, 4)),
                 "to finish until the timeout (expected epoch 3, seen 3 with 4 of 9 steps"));
  CHECK(Contains(text_of(gpu::kProgress, progress_of(3, 9), progress_of(2, 7)),
                 "(expected epoch 3, seen 2 with 0 of 9 steps"));
  CHECK(Contains(text_of(gpu::kNotResident, 128, 96), "on device 1 only 96 of 128 blocks"));
  CHECK(Contains(text_of(gpu::kToldByPeer, 0, 5),
                 "device 1 was told by device 0, which has given up on slot 5 and says why;"));
  CHECK(Contains(text_of(gpu::kToldByPeer, 0, 0),
                 "device 1 was told by device 0, which has given up and says why;"));
  CHECK(Contains(text_of(gpu::kTwoAtOnce, 0, 0), "device 1 found another call running, where"));
  CHECK(Contains(text_of(gpu::kOtherCall, 10, 11),
                 "device 1 and device 0 are in different calls (operation a, b)"));
  CHECK(Contains(text_of(gpu::kEnd, 3, 2), "device 1 waited for device 0 to finish until"));
  CHECK(
      Contains(text_of(gpu::kPeerDied, 3, 1),
               "the process of device 0 has died, so device 1 waits for it no longer; the group"));
  second.error->not_left[0] = 1;
  CHECK(Contains(text_of(gpu::kEnd, 3, 2),
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

// A call that is refused while XLA records its stream tells the other ranks at once: what stands on
// that stream is never executed.
void RefusalWhileRecorded() {
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  const View first({0, 1}, 0), second({0, 1}, 1);
  first.error->peer_slot = 1;
  first.error->valid = 1;
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, 0) == cudaSuccess);
  fake_cuda::recorded = stream;
  GroupCall call;
  CHECK(EnterGroup(Site({0, 1}, 2), 0, stream, {}, &call).failure());
  CHECK(second.control->given_up == gpu::given_up_of(0, 1) && first.control->given_up == 0);
  CHECK(fake_cuda::capture_mode == cudaStreamCaptureModeThreadLocal);
  CHECK(fake_cuda::last_copied_on != stream);
  // Otherwise it tells them behind the calls that are under way.
  fake_cuda::recorded = nullptr;
  CHECK(EnterGroup(Site({0, 1}, 2), 0, stream, {}, &call).failure());
  CHECK(fake_cuda::last_copied_on == stream);
  Memory().Release(true);
}

// A process that is interrupted while it leaves ends the waits of its kernels, and says so; other
// work it leaves alone.
void Leaving() {
  using std::chrono::seconds;
  const Timeouts timeouts{std::chrono::minutes(10), seconds(30)};
  Memory().SetTimeouts(timeouts);
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  const View first({0, 1}, 0), second({0, 1}, 1);
  const auto waits_are = [&](nanoseconds arrival, nanoseconds progress) {
    for (const View* view : {&first, &second}) {
      if (view->error->arrival_timeout_ns != static_cast<uint64_t>(arrival.count())) return false;
      if (view->error->progress_timeout_ns != static_cast<uint64_t>(progress.count())) return false;
    }
    return true;
  };
  fake_cuda::SetBusy(true);
  CHECK(waits_are(timeouts.arrival, timeouts.progress));
  Memory().EndOwnWaits();
  CHECK(waits_are(seconds(0), seconds(0)));
  Memory().SetTimeouts({seconds(50), seconds(20)});  // no longer meanwhile
  CHECK(waits_are(seconds(0), seconds(0)));
  first.error->peer_slot = 1;
  first.error->valid = 1;
  CHECK(Contains(Memory().RecordedError().value_or(""),
                 "device 0 waited for device 1 to come until this process was interrupted while "
                 "it left (expected epoch 0, seen 0)"));
  // One wait for the devices, however often it is asked for.
  for (int i = 0; i < 3; ++i) CHECK(!Memory().Synchronize(std::chrono::milliseconds(1)));
  CHECK(fake_cuda::AwaitWaiting() && fake_cuda::num_waiting == 1);
  fake_cuda::SetBusy(false);
  CHECK(Memory().Synchronize(seconds(30)));
  Memory().Release(true);

  // It is over then. An error from before is not the leaving's.
  Memory().SetTimeouts(timeouts);
  Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false);
  CHECK(waits_are(timeouts.arrival, timeouts.progress));
  first.error->peer_slot = 1;
  first.error->valid = 1;
  Memory().EndOwnWaits();
  CHECK(Contains(Memory().RecordedError().value_or(""), "to come until the timeout (expected"));
  Memory().Release(true);
}

// Slots lie behind control memory, of both devices for both, and are zeroed at each set-up.
void Slots() {
  constexpr size_t kBytes = 4 << 20;
  const auto set_up = [](size_t slot_bytes) {
    Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false, slot_bytes);
  };
  constexpr size_t kControlBytes = fake_cuda::kGranularity;
  CHECK(sizeof(ControlBlock) <= kControlBytes);
  set_up(0);
  CHECK(View({0, 1}, 0).slot_area_bytes == 0 && Contains(Memory().Describe(), "; no slots"));
  Memory().Release(true);

  set_up(kBytes);
  const View first({0, 1}, 0), second({0, 1}, 1);
  const uint64_t area_bytes = gpu::slot_area_bytes(kBytes, 2);
  CHECK(area_bytes > 0 && first.slot_area_bytes == area_bytes);
  CHECK(second.slot_area_bytes == area_bytes && View({0}, 0).slot_area_bytes == area_bytes);
  CHECK(Contains(Memory().Describe(), "; slots of 4194304 bytes a device"));
  const auto at = [](const View& view, int slot, uint64_t epoch) {
    return reinterpret_cast<char*>(view.control) +
           gpu::slot_area_offset(view.slot_area_bytes, slot, epoch);
  };
  for (const View* view : {&first, &second}) {
    for (int ordinal : {0, 1}) {
      CHECK(fake_cuda::Reaches(ordinal, Address(view->control), sizeof(ControlBlock)));
      CHECK(fake_cuda::Reaches(ordinal, Address(view->control) + gpu::kSlotsOffset, kBytes));
    }
    CHECK(at(*view, 0, 0) >= reinterpret_cast<char*>(view->control + 1));
    CHECK(at(*view, 1, 1) + area_bytes <=
          reinterpret_cast<char*>(view->control) + gpu::kSlotsOffset + kBytes);
    for (int slot : {0, 1}) {
      for (int epoch : {0, 1}) std::memset(at(*view, slot, epoch), 1 + slot, area_bytes);
    }
  }
  for (char* area : {at(first, 0, 1), at(second, 1, 0)}) {
    CHECK(area[0] != 0 && area[area_bytes - 1] != 0);
  }
  // Lowering sets up again and again; what kernels have written stays. Another size is refused.
  set_up(kBytes);
  CHECK(Contains(Thrown([&] { set_up(0); }),
                 "devices are set up with slots of 4194304 bytes, which cannot become 0: call "
                 "jax_ep.initialize(slot_bytes=...) before the first program is compiled"));
  CHECK(at(first, 1, 1)[area_bytes - 1] == 2 && View({0, 1}, 0).slot_area_bytes == area_bytes);

  // Everything begins again at the same addresses: an entry of before would pass for a new one.
  Memory().Release(true);
  set_up(kBytes);
  CHECK(View({0, 1}, 0).control == first.control && View({0, 1}, 1).control == second.control);
  for (const View* view : {&first, &second}) {
    for (int slot : {0, 1}) {
      for (int epoch : {0, 1}) {
        const char* area = at(*view, slot, epoch);
        for (uint64_t i = 0; i < area_bytes; ++i) CHECK(area[i] == 0);
      }
    }
  }

  // Slots of another size take new memory; what is replayed finds that the old one has been left, and
  // touches no slots, so those are given back.
  Memory().Release(true);
  const size_t held = fake_cuda::HeldBytes();
  set_up(2 * kBytes);
  const View larger({0, 1}, 0);
  CHECK(larger.control != first.control && first.control->local.broken == gpu::kHostHasLeft);
  CHECK(larger.slot_area_bytes == gpu::slot_area_bytes(2 * kBytes, 2));
  CHECK(fake_cuda::HeldBytes() == held + 2 * (kControlBytes + kBytes));
  Memory().Release(true);

  const uint64_t least = gpu::min_slot_bytes(2);
  CHECK(Contains(Thrown([&] { set_up(least - 1); }),
                 "slot_bytes must be 0 or, for 2 devices, at least 262656; got 262655"));
  CHECK(Memory().Member(0) == -1);
  set_up(least);
  Memory().Release(true);

  // Kernels that have not ended may still use their slots, whatever comes after.
  set_up(kBytes);
  const View busy({0, 1}, 0);
  fake_cuda::SetBusy(true);
  Memory().Release(false);
  fake_cuda::SetBusy(false);
  set_up(kBytes);
  CHECK(View({0, 1}, 0).control != busy.control);
  at(busy, 1, 1)[area_bytes - 1] = 1;
  Memory().Release(true);
}

// A device that has no memory left for slots, which the second one has not.
void NoMemoryForSlots() {
  constexpr size_t kBytes = 4 << 20;
  const auto set_up = [](bool requires_slots) {
    Memory().Setup(0, 1, {0, 1}, {0, 1}, 0, false, kBytes, requires_slots);
  };
  const std::string problem =
      "slots of 4194304 bytes on CUDA device 1 (jax_ep.initialize(slot_bytes=...); 0 is none): a "
      "fake error";
  fake_cuda::most_bytes = kBytes - 1;
  fake_cuda::first_small_device = 1;
  CHECK(Contains(Thrown([&] { set_up(true); }), problem));
  CHECK(Memory().Member(0) == -1);
  const size_t held = fake_cuda::HeldBytes();

  // Where nobody has asked for them no device gets any.
  set_up(false);
  const View view({0, 1}, 0);
  CHECK(view.slot_area_bytes == 0 && View({0, 1}, 1).slot_area_bytes == 0);
  CHECK(fake_cuda::HeldBytes() == held + 2 * fake_cuda::kGranularity);  // control memory
  CHECK(Memory().SlotsProblem() == problem);
  CHECK(Contains(Memory().Describe(), "; no slots (" + problem + ")"));
  set_up(false);  // at each lowering
  CHECK(Contains(Thrown([&] { set_up(true); }),
                 "devices are set up with slots of 0 bytes, which cannot become 4194304"));
  // A new beginning tries again; and is at the same addresses if that fails again.
  Memory().Release(true);
  set_up(false);
  CHECK(View({0, 1}, 0).control == view.control && Memory().SlotsProblem() == problem);
  Memory().Release(true);
  fake_cuda::most_bytes = ~size_t{0};
  set_up(false);
  CHECK(View({0, 1}, 0).slot_area_bytes == gpu::slot_area_bytes(kBytes, 2));
  CHECK(!Memory().SlotsProblem());
  set_up(true);
  Memory().Release(true);

  // A device that has failed is no device without memory.
  fake_cuda::broken = true;
  CHECK(Contains(Thrown([&] { set_up(false); }), "on CUDA device 0"));
  fake_cuda::broken = false;
}

// A group of two devices that have none is refused, on all of its devices; others are not.
void NoAtomics() {
  fake_cuda::without_atomics = {{1, 2}};
  Memory().Setup(0, 1, {0, 1, 2}, {0, 1, 2}, 0, false);
  View({0, 1}, 0);
  View({2, 0}, 2);
  for (int ordinal : {0, 1, 2}) {
    const int64_t members[] = {0, 1, 2};
    gpu::GroupView view{};
    StagingRegion region;
    CHECK(Contains(Memory().FillGroup(members, 3, ordinal, &view, &region).value_or(""),
                   "device 1 reaches the memory of device 2 without atomic operations, which calls "
                   "of a group of both need: NVLink has them, PCIe has not"));
  }
  Memory().Release(true);
  fake_cuda::without_atomics = {};
  Memory().Setup(0, 1, {0, 1, 2}, {0, 1, 2}, 0, false);
  View({0, 1, 2}, 0);
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

// Each wait is told of once, when it has lasted for 30 s.
void LongWait() {
  Memory().SetTimeouts({std::chrono::minutes(10), std::chrono::minutes(1)});
  Memory().Setup(0, 1, {4, 5}, {0, 1}, 0, false);
  auto& waiting = View({4, 5}, 1).error->waiting;
  const auto begin = std::chrono::steady_clock::now();
  const auto after = [&](int seconds) { return begin + std::chrono::seconds(seconds); };
  CHECK(Memory().Watch(after(0)).empty());
  waiting.kind = 1;
  waiting.phase = gpu::kStart;
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
  waiting.phase = gpu::kProgress;
  CHECK(Memory().Watch(after(201)).empty());
  const auto more = Memory().Watch(after(231));
  CHECK(more.size() == 1 && Contains(more[0], "for device 4 to go on; it gives up after 60 s"));
  waiting.since = 0;
  CHECK(Memory().Watch(after(300)).empty());
  Memory().Release(true);
}

// Ids without an expert are told of once in a process, whichever device's layouts have them.
void InvalidIds() {
  Memory().Setup(0, 1, {4, 5}, {0, 1}, 0, false);
  CHECK(Memory().Watch().empty());
  View({4, 5}, 0).error->invalid_ids = gpu::invalid_ids_of(1, 256, 3);
  const auto news = Memory().Watch();
  CHECK(news.size() == 1 &&
        news[0] ==
            "topk_idx of rank 1 has 3 ids that are neither -1 nor in [0, num_experts = 256): they "
            "are not routed. layout.num_invalid counts them, check_ids=True makes them an error. "
            "This is said once.");
  CHECK(!Memory().RecordedError());
  View({4, 5}, 1).error->invalid_ids = gpu::invalid_ids_of(0, 8, 1);
  CHECK(Memory().Watch().empty());
  Memory().Release(true);
  Memory().Setup(0, 1, {4, 5}, {0, 1}, 0, false);
  CHECK(View({4, 5}, 0).error->invalid_ids == 0);
  View({4, 5}, 0).error->invalid_ids = gpu::invalid_ids_of(1, 256, 3);
  CHECK(Memory().Watch().empty());
  Memory().Release(true);
}

}  // namespace
}  // namespace jax_ep::test

int main() {
  using namespace jax_ep::test;
  Run("one process", OneProcess);
  Run("refusal while recorded", RefusalWhileRecorded);
  Run("leaving", Leaving);
  Run("slots", Slots);
  Run("no memory for slots", NoMemoryForSlots);
  Run("no atomics", NoAtomics);
  Run("sharing", Sharing);
  Run("growth", GrowthWhileDevicesWork);
  Run("long wait", LongWait);
  Run("invalid ids", InvalidIds);
  Run("staging", Staging);
  RunTestsOfTwoProcesses();
  RunTestsOfNetworkGroups();
  return 0;
}
