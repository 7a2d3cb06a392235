// The slots of a device: memory of its own that its peers write to. It is mapped behind the control
// block, by everybody, so that who knows where the one is knows where the other is.
//
// Each device of the domain has two areas in it, one for calls of an even epoch of the pair, one for
// odd ones (cuda/sync/slots.cuh says why two are enough). What is in an area says by itself which
// call it is of; to begin with all is 0, which is of none:
//   entries  [kMaxSlotIds] SlotEntry  a number for each (token, k) of the writer, in that order: ids
//                                     with their weights, or combine's values
//   atoms    SlotAtom                 rows, taken apart (cuda/slots/units.h says which goes where)
// Nothing else is ever written to either part, so that an epoch or a tag that is read there can be
// trusted.
#ifndef JAX_EP_CUDA_MEMORY_SLOTS_H_
#define JAX_EP_CUDA_MEMORY_SLOTS_H_

#include <cstdint>

#include "cuda/memory/control.h"

namespace jax_ep::gpu {

inline constexpr uint64_t kDefaultSlotBytes = uint64_t{64} << 20;  // of a device, where they are on

// What one call in slots may be.
inline constexpr int64_t kMaxSlotTokens = 512;      // T
inline constexpr int64_t kMaxSlotIds = 4096;        // T * K
inline constexpr int64_t kMaxSlotGroupIds = 16384;  // R * T * K: a block keeps them all

// Both are written and read as one, sixteen bytes at a time, so that what is in them comes with the
// call's number.
struct alignas(16) SlotEntry {
  int32_t id;
  float weight;  // 0 without weights
  uint64_t epoch;
};
struct alignas(16) SlotAtom {
  uint32_t word[3];
  uint32_t tag;
};

// Never 0. It comes again after 2^31 epochs; by then an atom has lost it, for calls in slots sweep
// (kSweptBytes): unless nearly all of the pair's calls have been general ones, so that fewer of one
// parity than an area has pieces were in slots.
JAX_EP_HOST_DEVICE constexpr uint32_t slot_tag(uint64_t epoch) {
  return static_cast<uint32_t>(epoch) | 0x80000000u;
}
static_assert(slot_tag(1) != slot_tag(2) && slot_tag(uint64_t{1} << 32) != 0);

// Each call in slots clears so many bytes of each of its areas when it is done with them, one piece
// after the other.
inline constexpr uint64_t kSweptBytes = 64;

// From the control block on. The two are allocations of their own, which begin at multiples of this.
inline constexpr uint64_t kMappingAlignment = uint64_t{2} << 20;
inline constexpr uint64_t kSlotsOffset =
    (sizeof(ControlBlock) + kMappingAlignment - 1) / kMappingAlignment * kMappingAlignment;

// Of slots of so many bytes, of a domain of so many devices. All devices of a job agree on both.
constexpr uint64_t slot_area_bytes(uint64_t slot_bytes, int32_t num_devices) {
  return slot_bytes / (2 * static_cast<uint64_t>(num_devices)) / kLine * kLine;
}
// From the control block on: where the device of that slot writes in calls of that epoch.
JAX_EP_HOST_DEVICE constexpr uint64_t slot_area_offset(uint64_t area_bytes, int32_t slot,
                                                       uint64_t epoch) {
  return kSlotsOffset + (2 * static_cast<uint64_t>(slot) + (epoch & 1)) * area_bytes;
}

// In an area.
inline constexpr uint64_t kSlotAtomsOffset = kMaxSlotIds * sizeof(SlotEntry);

// With less no call fits, of however few devices.
constexpr uint64_t min_slot_bytes(int32_t num_devices) {
  constexpr uint64_t kArea = (kSlotAtomsOffset + 4 * sizeof(SlotAtom) + kLine - 1) / kLine * kLine;
  return 2 * static_cast<uint64_t>(num_devices) * kArea;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_MEMORY_SLOTS_H_
