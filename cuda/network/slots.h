// What calls in slots send ranks of other nodes, and which of them may: for the host too.
// cuda/network/slots.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_SLOTS_H_
#define JAX_EP_CUDA_NETWORK_SLOTS_H_

#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/network/far_slots.h"
#include "cuda/network/hop_memory.h"
#include "cuda/slots/fits.h"
#include "cuda/slots/units.h"

namespace jax_ep::gpu {

// What a rank tells each rank of another node in every call; its entries follow.
struct alignas(16) FarHead {
  uint64_t operation;  // GroupView::operation
};
struct alignas(8) FarEntry {
  int32_t id;
  float weight;  // 0 without weights
};

// What lies where in the slots of one call: its head, its entries, and then of each unit its values,
// if the call has any (combine's: K of the unit's token), and its words (row_forms.cuh), which in no
// form are more than a piece of the row is.
struct FarUnits {
  int32_t begin;         // of the first one, in a slot
  int32_t bytes;         // of each
  int32_t values_bytes;  // before its words

  JAX_EP_HOST_DEVICE constexpr int64_t at(int32_t unit) const {
    return begin + int64_t{unit} * bytes;
  }
};
constexpr FarUnits FarUnitsOf(int64_t num_entries, int64_t num_values, const slots::Units& units) {
  constexpr auto kLineBytes = static_cast<int64_t>(kLine);
  constexpr int64_t kFloat = sizeof(float);
  FarUnits far{};
  const int64_t head = sizeof(FarHead) + num_entries * int64_t{sizeof(FarEntry)};
  far.begin = static_cast<int32_t>(round_up(head, kLineBytes));
  far.values_bytes = static_cast<int32_t>(round_up(num_values * kFloat, int64_t{kRowAlignment}));
  far.bytes = far.values_bytes + units.piece_vectors * kRowAlignment;
  return far;
}

// Whether slots between nodes take a call that those of a node take (fits_slots), however many SMs it
// may use.
constexpr bool fits_far_slots(const FarSlots& at, const SlotSizes& sizes) {
  const int64_t vectors = sizes.row.bytes / kRowAlignment, num_ids = sizes.num_tokens * sizes.top_k;
  int32_t shift = slots::least_piece_shift(vectors);
  if (sizes.num_tokens << shift > at.max_units) return false;
  do {
    const slots::Units units = slots::UnitsOf(sizes.num_tokens, vectors, shift, sizes.row.multiple);
    const FarUnits far = FarUnitsOf(num_ids, sizes.top_k, units);
    if (far.at(units.count) > at.slot_bytes) return false;
    ++shift;
  } while (sizes.num_tokens << shift <= kMaxBlocks && vectors >> shift >= slots::kMinPieceVectors);
  return true;
}
static_assert(fits_far_slots(MakeFarSlots(int64_t{128} << 20, 16, 8), {16, 128, 8, 256, {14336}}),
              "128 tokens a rank, of two nodes and, with more memory, of more of them");
static_assert(fits_far_slots(MakeFarSlots(int64_t{128} << 20, 16, 1), {16, 128, 8, 256, {14336}}));
static_assert(!fits_far_slots(MakeFarSlots(int64_t{64} << 20, 16, 1), {16, 128, 8, 256, {14336}}));

// Beside GroupView, in calls in slots.
struct FarView {
  FarSlots at;
  HopMemory memory;
  uint64_t* epoch;  // in this device's memory: calls in slots that the group has finished
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_SLOTS_H_
