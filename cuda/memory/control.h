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

// "I am done with your memory for epoch." Written by the slot's device.
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

// "I, rank `rank`, have waited for rank `peer` in vain": never 0.
JAX_EP_HOST_DEVICE constexpr uint64_t given_up_of(int32_t rank, int32_t peer) {
  return (static_cast<uint64_t>(rank) + 1) | (static_cast<uint64_t>(peer) << 32);
}
JAX_EP_HOST_DEVICE constexpr int32_t who_gave_up(uint64_t given_up) {
  return static_cast<int32_t>(given_up & 0xffffffff) - 1;
}
JAX_EP_HOST_DEVICE constexpr int32_t waited_for(uint64_t given_up) {
  return static_cast<int32_t>(given_up >> 32);
}
static_assert(who_gave_up(given_up_of(0, 71)) == 0 && waited_for(given_up_of(0, 71)) == 71);

// Written by this device's kernels only.
struct alignas(kLine) Local {
  uint64_t epoch[kMaxPeers];  // calls finished with each slot, its own included
  uint32_t num_blocks_done;   // of the running kernel; 0 between kernels
  uint32_t barrier;           // arrivals at the grid barrier of the running kernel; 0 between
  uint32_t running;           // 1 while a kernel runs
  uint32_t num_taken;         // of the running dispatch's shared units; 0 between
  uint32_t broken;            // 1 after a timeout: later calls end at once
};

struct ControlBlock {
  uint64_t given_up;  // 0, or given_up_of(..): written by a peer whose wait has timed out
  StartMail start[kMaxPeers];
  EndMail end[kMaxPeers];
  uint64_t progress[kMaxPeers][kMaxBlocks];  // by the peer's block, which writes it
  Local local;
  // Of the running layout: per block of ids its rows to each expert, then its invalid ids.
  alignas(16) int32_t layout_counts[kMaxLayoutBlocks][kMaxExperts + 4];
#ifdef JAX_EP_TIMELINE
  CallTimeline<kMaxBlocks> timeline[kNumTimelines];
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
  kPeerDied,     // the peer's process has died: the host's abort in place of the epoch seen
};

// What a device and its host tell each other: lies in host-mapped memory. The device writes a
// timeout, once; the host writes how long to wait, and that a wait has to end, which holds for
// replayed command buffers too.
struct ErrorRecord {
  uint64_t valid;  // written last
  uint64_t operation;
  uint32_t kind;   // 0 layout, 1 dispatch, 2 combine, 3 its gradient
  int32_t rank;    // that waited
  int32_t peer;    // that was waited for
  uint32_t phase;  // a Phase
  uint64_t expected_epoch;
  uint64_t seen_epoch;
  // Written by the host.
  uint64_t arrival_timeout_ns;   // for a peer to come
  uint64_t progress_timeout_ns;  // for a peer to go on, once it has come
  uint64_t abort;                // 0, or 1 + the slot of a device whose process has died
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_MEMORY_CONTROL_H_
