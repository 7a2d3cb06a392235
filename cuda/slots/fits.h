// Which calls go through slots: by sizes that are static, so that all ranks find the same.
#ifndef JAX_EP_CUDA_SLOTS_FITS_H_
#define JAX_EP_CUDA_SLOTS_FITS_H_

#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/launch.h"
#include "cuda/memory/slots.h"
#include "cuda/slots/units.h"

namespace jax_ep::gpu {

// A row, as kernels in slots see it: what they divide into units.
struct SlotRow {
  int64_t bytes;         // of x or y; if x comes with scales, with those. 0: not for slots
  int32_t multiple = 1;  // of the stride: threads that share a scale are neighbours
};
constexpr SlotRow slot_row(DispatchMode mode, FloatType type, int64_t row_bytes,
                           int64_t num_scales) {
  const int64_t scale_bytes = num_scales * int64_t{sizeof(float)};
  switch (mode) {
    case DispatchMode::kCopy:
      return {row_bytes};
    case DispatchMode::kScaled:
      return {scale_bytes % kRowAlignment == 0 ? row_bytes + scale_bytes : 0};
    case DispatchMode::kQuantize:
    case DispatchMode::kDequantize:
      return {row_bytes, kScaleBlock / (type == FloatType::kF32 ? 4 : 8)};
    case DispatchMode::kWeighted:
      return {};
  }
  return {};
}
static_assert(slot_row(DispatchMode::kQuantize, FloatType::kBF16, 14336, 56).multiple == 16);
static_assert(slot_row(DispatchMode::kScaled, FloatType::kBF16, 7168, 56).bytes == 7392);

// The sizes that decide whether a call goes through slots: static, and the same on all ranks.
struct SlotSizes {
  int64_t num_ranks, num_tokens, top_k, num_experts;
  SlotRow row;
};

// Of an area, however many SMs the call may use.
constexpr uint64_t slot_call_bytes(const SlotSizes& sizes) {
  const int64_t vectors = sizes.row.bytes / kRowAlignment;
  int64_t most = 0;
  int32_t shift = slots::least_piece_shift(vectors);
  do {
    const slots::Units units = slots::UnitsOf(sizes.num_tokens, vectors, shift, sizes.row.multiple);
    const int64_t bytes =
        int64_t{units.count} * units.stride * slots::kMaxAtoms * int64_t{sizeof(SlotAtom)};
    if (bytes > most) most = bytes;
    ++shift;
  } while (vectors >> shift >= slots::kMinPieceVectors);
  return kSlotAtomsOffset + static_cast<uint64_t>(most);
}

constexpr bool fits_slots(const SlotSizes& sizes, uint64_t area_bytes) {
  const int64_t num_ids = sizes.num_tokens * sizes.top_k;
  return sizes.num_ranks >= 1 && sizes.num_ranks <= kMaxPeers && sizes.num_tokens >= 1 &&
         sizes.num_tokens <= kMaxSlotTokens && sizes.top_k >= 1 && sizes.top_k <= kMaxTopK &&
         num_ids <= kMaxSlotIds && sizes.num_ranks * num_ids <= kMaxSlotGroupIds &&
         sizes.num_experts <= kMaxExperts && sizes.row.bytes >= kRowAlignment &&
         sizes.row.bytes % kRowAlignment == 0 &&
         sizes.row.bytes <= (int64_t{1} << 31) / kMaxSlotTokens &&
         slot_call_bytes(sizes) <= area_bytes;
}

static_assert(fits_slots({8, 128, 8, 256, {14336}}, slot_area_bytes(kDefaultSlotBytes, 8)),
              "128 tokens a rank, at the default size");
static_assert(fits_slots({2, 512, 8, 256, {14336}}, slot_area_bytes(kDefaultSlotBytes, 2)));
static_assert(!fits_slots({8, 257, 8, 256, {16}}, slot_area_bytes(kDefaultSlotBytes, 8)));
static_assert(fits_slots({1, 1, 1, 1, {16}}, slot_area_bytes(min_slot_bytes(3), 3)) &&
              !fits_slots({1, 1, 1, 1, {16}}, slot_area_bytes(min_slot_bytes(3) - 1, 3)));

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SLOTS_FITS_H_
