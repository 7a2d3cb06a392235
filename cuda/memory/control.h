// The control memory of a device: what its peers write to it, and what its kernels keep.
//
// One block a device, a fixed size whatever the sizes of the calls. Peers are numbered by slot:
// their place among all devices of the NVLink domain that this job uses. Two devices take part in
// the same calls in the same order, so an epoch per pair tells the calls apart, whatever groups
// they form.
#ifndef JAX_EP_CUDA_MEMORY_CONTROL_H_
#define JAX_EP_CUDA_MEMORY_CONTROL_H_

#include <cstddef>
#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/core/operations.h"
#include "cuda/core/placement.h"
#include "cuda/memory/timeline.h"

namespace jax_ep::gpu {

inline constexpr int kMaxLayoutBlocks = 128;
inline constexpr int kMaxBlocks = 160;   // of a grid: more than any Hopper has SMs
inline constexpr int kNumAddresses = 4;  // buffers a call shows its peers
inline constexpr size_t kLine = 128;     // bytes; no two writers share one

// In an address of a start mail: the other bits are an offset in the sender's staging region.
inline constexpr uint64_t kStagedAddress = uint64_t{1} << 63;

// Sixteen bytes that are written and read as one, so that a value comes with its epoch.
struct alignas(16) Shown {
  uint64_t value;
  uint64_t epoch;
};
inline constexpr int kNumShown = kNumAddresses + 1;

// "From epoch on you may use my buffers at these addresses": the sender's own, or kStagedAddress |
// offset; then the operation, a hash of call and sizes that is the same on both sides. Written by
// the slot's device.
struct alignas(kLine) StartMail {
  Shown shown[kNumShown];
};

// "I have left your memory in epoch, and touch it no more." Written by the slot's device.
struct alignas(kLine) EndMail {
  uint64_t epoch;
};

// "In the call epoch, a block of mine has done so many units for you", as one number that only
// grows for 2^40 calls.
JAX_EP_HOST_DEVICE constexpr uint64_t progress_of(uint64_t epoch, uint64_t num_units) {
  return (epoch << 24) | num_units;
}
JAX_EP_HOST_DEVICE constexpr uint64_t epoch_of(uint64_t progress) { return progress >> 24; }
// The units that `progress` tells of in the call epoch: none if it is still about an earlier one.
JAX_EP_HOST_DEVICE constexpr int32_t units_of(uint64_t progress, uint64_t epoch) {
  return progress >> 24 == epoch ? static_cast<int32_t>(progress & 0xffffff) : 0;
}
static_assert(units_of(progress_of(1, kMaxUnitsPerBlock), 1) == kMaxUnitsPerBlock);

// "The device of slot `who` has given up on that of slot `peer`": never 0.
JAX_EP_HOST_DEVICE constexpr uint64_t given_up_of(int32_t who, int32_t peer) {
  return (static_cast<uint64_t>(who) + 1) | (static_cast<uint64_t>(peer) << 32);
}
JAX_EP_HOST_DEVICE constexpr int32_t who_gave_up(uint64_t given_up) {
  return static_cast<int32_t>(given_up & 0xffffffff) - 1;
}
JAX_EP_HOST_DEVICE constexpr int32_t waited_for(uint64_t given_up) {
  return static_cast<int32_t>(given_up >> 32);
}
static_assert(who_gave_up(given_up_of(0, 71)) == 0 && waited_for(given_up_of(0, 71)) == 71);
// In Local::broken in place of that: the host has left the group, peers are no longer mapped.
inline constexpr uint64_t kHostHasLeft = ~uint64_t{0};

// "I have come to the call epoch", with the operation, as in a start mail. Written by the slot's
// device in calls in slots (cuda/sync/slots.cuh).
struct alignas(kLine) SlotFlag {
  uint64_t operation;
  uint64_t epoch;
};

// A device's kernels in the memory of one peer: the last epoch in which they may have entered it,
// and kShut once the peer lets them in no more. The device's blocks raise the epoch and the peer
// sets kShut, each by one atomic operation (cuda/sync/leave.cuh).
struct alignas(kLine) Entry {
  uint64_t entered;
};
inline constexpr uint64_t kShut = uint64_t{1} << 63;
JAX_EP_HOST_DEVICE constexpr bool is_shut(uint64_t entered) { return (entered & kShut) != 0; }
// By the peer, in its call `epoch`: whether they may be inside. In an epoch before they cannot any
// more, and an epoch later begins when they are through with this one.
JAX_EP_HOST_DEVICE constexpr bool may_be_inside(uint64_t entered, uint64_t epoch) {
  return (entered & ~kShut) == epoch;
}
static_assert(may_be_inside(kShut | 3, 3) && !may_be_inside(2, 3) && !may_be_inside(4, 3));

// Whose call a device is in, and how many of its blocks are through, as one number: 0 between calls
// (cuda/sync/grid.cuh). From bit 0: blocks that are done, as many bits for those of them that have
// failed, two flags, the call.
inline constexpr int kBlockCountBits = 8;
static_assert(kMaxBlocks < 1 << kBlockCountBits);
inline constexpr uint64_t kOneDone = 1;
inline constexpr uint64_t kOneFailed = kOneDone << kBlockCountBits;
inline constexpr uint64_t kContested = kOneFailed << kBlockCountBits;  // another call has come
inline constexpr uint64_t kClosed = kContested << 1;  // it has failed, and its peers have left
JAX_EP_HOST_DEVICE constexpr uint64_t running_of(uint64_t call) { return call * kClosed * 2; }
JAX_EP_HOST_DEVICE constexpr uint32_t num_done(uint64_t running) {
  return static_cast<uint32_t>(running & (kOneFailed - 1));
}
JAX_EP_HOST_DEVICE constexpr bool has_failed(uint64_t running) {
  return (running & (kContested | kClosed | (kContested - kOneFailed))) != 0;
}
// Whether a block that has yet to be done, of a grid of `num_blocks`, belongs to the call. (A graph
// replays a call under its old number: that one has failed if all its blocks are done.)
JAX_EP_HOST_DEVICE constexpr bool is_running(uint64_t running, uint64_t call, uint32_t num_blocks) {
  return running / (kClosed * 2) == call && (running & kClosed) == 0 &&
         num_done(running) < num_blocks;
}
static_assert(is_running(running_of(7) + kContested + 2 * kOneDone, 7, 3));
static_assert(!is_running(running_of(7) + 3 * kOneDone, 7, 3) && !is_running(0, 7, 3) &&
              !is_running(running_of(7) + kClosed, 7, 3) && !is_running(running_of(8), 7, 3));
static_assert(has_failed(running_of(7) + kOneFailed) && !has_failed(running_of(7) + kOneDone));

// Written by this device's kernels only; `broken` also by its host, between them.
struct alignas(kLine) Local {
  uint64_t epoch[kMaxPeers];     // calls finished with each slot, its own included
  uint32_t swept[2][kMaxPeers];  // pieces of each area, of even and of odd epochs (memory/slots.h)
  uint64_t running;              // see running_of
  uint64_t broken;      // 0, or the given_up that this device tells others: later calls end at once
  uint32_t barrier;     // arrivals at the grid barrier of the running kernel; 0 between
  uint32_t num_taken;   // of the running dispatch's shared units; 0 between
  uint32_t has_shown;   // 1 if the running kernel has shown peers its addresses; 0 between
  uint32_t is_waiting;  // 1 while ErrorRecord::waiting tells of a wait
};

struct ControlBlock {
  uint64_t given_up;  // 0, or given_up_of(..): written by a peer that has given up
  StartMail start[kMaxPeers];
  Entry entry[kMaxPeers];
  EndMail end[kMaxPeers];
  uint64_t progress[kMaxPeers][kMaxBlocks];  // by the peer's block, which writes it
  SlotFlag slot_flag[kMaxPeers];
  Local local;
  // Of the running layout: per block of ids its rows to each expert, then its invalid ids.
  alignas(16) int32_t layout_counts[kMaxLayoutBlocks][kMaxExperts + 4];
#ifdef JAX_EP_TIMELINE
  CallTimeline<kMaxBlocks> timeline[kNumOps];  // by OpKind
#endif
};
#ifndef JAX_EP_TIMELINE
static_assert(sizeof(ControlBlock) < 1 << 20, "control memory is at most 1 MB a device");
#endif

// What a record is about.
enum Phase : uint32_t {
  kStart,        // the peer did not come
  kEnd,          // the peer did not finish
  kOtherCall,    // the peer is in another call: operations in place of epochs
  kProgress,     // the peer did not finish: progress in place of epochs
  kNotResident,  // own blocks found no SM: their numbers in place of epochs
  kToldByPeer,   // the peer has given up: whom it has waited for in place of the epoch seen
  kTwoAtOnce,    // another call was running on this device
  kPeerDied,     // the peer's process has died, or has left
};

// A wait that has lasted for kLongWaitNs and goes on, for the host to tell of.
struct Waiting {
  uint64_t since;  // by the device's clock, in ns; 0: there is none. Written last, cleared first
  uint64_t operation;
  uint32_t kind;  // an OpKind
  uint32_t phase;
  int32_t peer_slot;  // that is waited for; this device's own while its blocks find no SM
};
inline constexpr uint64_t kLongWaitNs = uint64_t{1000} * 1000 * 1000;

// How long a failed call waits for peers to leave this device's memory (cuda/sync/leave.cuh).
inline constexpr uint64_t kLeaveTimeoutNs = uint64_t{1000} * 1000 * 1000;

// "The ids of this rank have held so many that are without an expert, of so many": never 0.
JAX_EP_HOST_DEVICE constexpr uint64_t invalid_ids_of(int32_t rank, int32_t num_experts,
                                                     int32_t num_invalid) {
  return static_cast<uint64_t>(rank) << 48 | static_cast<uint64_t>(num_experts) << 32 |
         static_cast<uint64_t>(num_invalid);
}
JAX_EP_HOST_DEVICE constexpr int32_t rank_of_invalid_ids(uint64_t word) {
  return static_cast<int32_t>(word >> 48);
}
JAX_EP_HOST_DEVICE constexpr int32_t num_experts_of_invalid_ids(uint64_t word) {
  return static_cast<int32_t>(word >> 32 & 0xffff);
}
JAX_EP_HOST_DEVICE constexpr int32_t num_invalid_of(uint64_t word) {
  return static_cast<int32_t>(word & 0xffffffff);
}
static_assert(rank_of_invalid_ids(invalid_ids_of(71, kMaxExperts, INT32_MAX)) == 71 &&
              num_experts_of_invalid_ids(invalid_ids_of(71, kMaxExperts, INT32_MAX)) ==
                  kMaxExperts &&
              num_invalid_of(invalid_ids_of(71, kMaxExperts, INT32_MAX)) == INT32_MAX);

// Devices of other nodes have no slot in the domain. Of a job with a network, where each process has one
// device, records and waits name them by these, which are the same on all nodes.
inline constexpr int kMaxProcesses = 8192 - kMaxPeers;
JAX_EP_HOST_DEVICE constexpr int slot_of_process(int process) { return kMaxPeers + process; }

// A bit for each slot.
inline constexpr int kSlotWords = (slot_of_process(kMaxProcesses) + 63) / 64;
JAX_EP_HOST_DEVICE constexpr int word_of(int slot) { return slot / 64; }
JAX_EP_HOST_DEVICE constexpr uint64_t bit_of(int slot) { return uint64_t{1} << (slot % 64); }
static_assert(word_of(slot_of_process(kMaxProcesses - 1)) == kSlotWords - 1);

// What a device and its host tell each other: lies in host-mapped memory. The device writes why it
// has given up, once, and what is no error; the host writes how long to wait, and that a wait has to
// end, which holds for replayed command buffers too. Devices are named by slot: an error may come
// from another group. A word has one writer, who stores it: a device's atomic operations on host
// memory are none over PCIe.
struct ErrorRecord {
  uint64_t valid;  // written last, but for not_left
  uint64_t operation;
  uint32_t kind;      // an OpKind
  int32_t slot;       // of this device
  int32_t peer_slot;  // that was waited for
  uint32_t phase;     // a Phase
  uint64_t expected_epoch;
  uint64_t seen_epoch;
  uint64_t not_left[kMaxPeers];  // by slot: 1 if it may still write to this device's arrays
  Waiting waiting;
  uint64_t invalid_ids;  // 0, or invalid_ids_of(..) the last layout that had any: no error
  // Written by the host.
  uint64_t arrival_timeout_ns;   // for a peer to come
  uint64_t progress_timeout_ns;  // for a peer to go on, once it has come
  uint64_t gone[kSlotWords];     // by slot, one bit each: its process has died, or has left
  uint64_t given_up;             // what peers are told in place of calls that the host refuses
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_MEMORY_CONTROL_H_
