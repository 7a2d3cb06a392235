// The slots of a device: memory of its own that its peers write to, behind its control block in the
// same allocation, so that who has mapped the one has the other.
//
// Each device of the domain has two areas in it, one for calls of an even epoch of the pair, one for
// odd ones (cuda/sync/slots.cuh says why two are enough). An area begins with entries, each of an id
// of the call in the order of topk_idx. No other bytes are ever written there, so that an entry's
// epoch can be trusted; to begin with all are 0. What lies behind them is of no use before a flag
// says so:
//   rows    [T, row]  row t at t * row_bytes, where there is one: gaps stay
//   values  [T, K]    combine's, behind the rows
#ifndef JAX_EP_CUDA_MEMORY_SLOTS_H_
#define JAX_EP_CUDA_MEMORY_SLOTS_H_

#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/memory/control.h"

namespace jax_ep::gpu {

inline constexpr uint64_t kDefaultSlotBytes = uint64_t{64} << 20;  // of a device, where they are on

// What one call in slots may be.
inline constexpr int64_t kMaxSlotTokens = 512;      // T
inline constexpr int64_t kMaxSlotIds = 4096;        // T * K
inline constexpr int64_t kMaxSlotGroupIds = 16384;  // R * T * K: a block keeps them all

// Written and read as one, so that an id comes with its epoch.
struct alignas(16) SlotEntry {
  int32_t id;
  float weight;  // 0 without weights
  uint64_t epoch;
};

// From the control block on.
inline constexpr uint64_t kSlotsOffset = (sizeof(ControlBlock) + kLine - 1) / kLine * kLine;

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
inline constexpr uint64_t kSlotRowsOffset = kMaxSlotIds * sizeof(SlotEntry);
JAX_EP_HOST_DEVICE constexpr uint64_t slot_values_offset(int64_t num_tokens, int64_t row_bytes) {
  return kSlotRowsOffset + static_cast<uint64_t>(num_tokens * row_bytes);
}

// The sizes that decide whether a call goes through slots: static, and the same on all ranks.
struct SlotSizes {
  int64_t num_ranks, num_tokens, top_k, num_experts;
  int64_t row_bytes;  // as a row crosses
};

constexpr bool fits_slots(const SlotSizes& sizes, uint64_t area_bytes) {
  const int64_t num_ids = sizes.num_tokens * sizes.top_k;
  return sizes.num_ranks >= 1 && sizes.num_ranks <= kMaxPeers && sizes.num_tokens >= 1 &&
         sizes.num_tokens <= kMaxSlotTokens && sizes.top_k >= 1 && sizes.top_k <= kMaxTopK &&
         num_ids <= kMaxSlotIds && sizes.num_ranks * num_ids <= kMaxSlotGroupIds &&
         sizes.num_experts <= kMaxExperts && sizes.row_bytes >= kRowAlignment &&
         sizes.row_bytes % kRowAlignment == 0 &&
         sizes.row_bytes <= (int64_t{1} << 31) / kMaxSlotTokens &&
         slot_values_offset(sizes.num_tokens, sizes.row_bytes) +
                 static_cast<uint64_t>(num_ids) * sizeof(float) <=
             area_bytes;
}

static_assert(fits_slots({8, 256, 8, 256, 14336}, slot_area_bytes(kDefaultSlotBytes, 8)),
              "256 tokens a rank, at the default size");
static_assert(!fits_slots({8, 257, 8, 256, 16}, slot_area_bytes(kDefaultSlotBytes, 8)));

// With less no call fits, of however few devices.
constexpr uint64_t min_slot_bytes(int32_t num_devices) {
  const uint64_t area = slot_values_offset(1, kRowAlignment) + sizeof(float);
  return 2 * static_cast<uint64_t>(num_devices) * ((area + kLine - 1) / kLine * kLine);
}
static_assert(fits_slots({1, 1, 1, 1, 16}, slot_area_bytes(min_slot_bytes(3), 3)) &&
              !fits_slots({1, 1, 1, 1, 16}, slot_area_bytes(min_slot_bytes(3) - 1, 3)));

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_MEMORY_SLOTS_H_
