// How kernels in slots divide their rows, and which calls go through slots: computed by the host, the
// same on all ranks.
//
// A row is a run of 16-byte vectors, cut into pieces. A unit is a piece of a token's row, and the work
// of a team of warps: thread i has the vectors i, i + stride and i + 2 stride of the piece, and what it
// makes of them crosses as up to kMaxAtoms atoms (cuda/memory/slots.h): atom j of thread i of unit u
// lies at ((u kMaxAtoms + j) stride + i) 16 bytes.
//
// The first blocks of a grid send to the peers, the others receive: stores that wait for a link hold up
// whatever else an SM has to load. Blocks begin in order, and those that send wait for nobody.
#ifndef JAX_EP_CUDA_SLOTS_UNITS_H_
#define JAX_EP_CUDA_SLOTS_UNITS_H_

#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/core/wire_row.h"
#include "cuda/launch.h"
#include "cuda/memory/control.h"
#include "cuda/memory/slots.h"

namespace jax_ep::gpu::slots {

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
inline constexpr int kVectorsEach = 3;  // of a thread: twelve words, three to an atom
inline constexpr int kMaxAtoms = 4;
inline constexpr int32_t kMaxTeamWarps = 5;
inline constexpr int32_t kMaxPieceVectors = kMaxTeamWarps * 32 * kVectorsEach;
// Few tokens are cut further, so that more SMs have work, but not into smaller pieces: a block's
// tables cost more than what it moves.
inline constexpr int64_t kMinPieceVectors = 192;

struct Units {
  int32_t count;          // of a rank: T << piece_shift
  int32_t piece_shift;    // pieces of a row, as a power of two; the last ones may be shorter
  int32_t piece_vectors;  // of each other
  int32_t row_vectors;
  int32_t stride;      // threads of a team that have work
  int32_t team_warps;  // of a block there are kNumWarps / team_warps teams
};

// `multiple`: of the stride; threads that work on a row's neighbouring vectors together need one.
constexpr Units UnitsOf(int64_t num_tokens, int64_t row_vectors, int32_t piece_shift,
                        int32_t multiple) {
  Units units{};
  const int64_t pieces = int64_t{1} << piece_shift;
  units.piece_shift = piece_shift;
  units.count = static_cast<int32_t>(num_tokens * pieces);
  units.row_vectors = static_cast<int32_t>(row_vectors);
  units.piece_vectors =
      static_cast<int32_t>((row_vectors + pieces * multiple - 1) / (pieces * multiple)) * multiple;
  const int32_t each = (units.piece_vectors + kVectorsEach - 1) / kVectorsEach;
  units.stride = (each + multiple - 1) / multiple * multiple;
  units.team_warps = (units.stride + 31) / 32;
  return units;
}
constexpr int32_t least_piece_shift(int64_t row_vectors) {
  int32_t shift = 0;
  while ((row_vectors >> shift) >= kMaxPieceVectors) ++shift;
  return shift;
}

// For a grid of at most so many blocks.
constexpr Units DivideRows(int64_t num_tokens, int64_t row_vectors, int32_t num_sms,
                           int32_t multiple) {
  int32_t shift = least_piece_shift(row_vectors);
  while (num_tokens << (shift + 1) <= num_sms && row_vectors >> (shift + 1) >= kMinPieceVectors) {
    ++shift;
  }
  return UnitsOf(num_tokens, row_vectors, shift, multiple);
}

// Blocks [0, num_senders) send, blocks [first_receiver, count) receive.
struct Blocks {
  int32_t count, num_senders, first_receiver;
};
// `num_sent`, `num_received`: units of all ranks, at least one to receive. No more than one SM in
// `share` sends, and no more than a link can use: a quarter of a GPU's.
constexpr Blocks DivideBlocks(int64_t num_sent, int64_t num_received, int32_t num_sms,
                              int32_t share) {
  constexpr int32_t kMostSenders = 33;
  if (num_sms > kMaxBlocks) num_sms = kMaxBlocks;
  const int32_t part = num_sms / share;
  const int64_t most = part < 1 ? 1 : part < kMostSenders ? part : kMostSenders;
  Blocks blocks{};
  blocks.num_senders = static_cast<int32_t>(num_sent < most ? num_sent : most);
  blocks.first_receiver = num_sms > 1 ? blocks.num_senders : 0;
  const int64_t left = num_sms - blocks.first_receiver;
  blocks.count =
      blocks.first_receiver + static_cast<int32_t>(num_received < left ? num_received : left);
  return blocks;
}
static_assert(DivideBlocks(4, 9, 132, 4).num_senders == 4 &&
              DivideBlocks(4, 9, 132, 4).count == 13);
static_assert(DivideBlocks(512, 1025, 132, 2).first_receiver == 33 &&
              DivideBlocks(512, 1025, 132, 2).count == 132);
static_assert(DivideBlocks(512, 1025, 24, 2).num_senders == 12);
static_assert(DivideBlocks(9, 9, 1, 2).count == 1 && DivideBlocks(9, 9, 1, 2).num_senders == 1 &&
              DivideBlocks(9, 9, 1, 2).first_receiver == 0 &&
              DivideBlocks(0, 9, 1, 2).num_senders == 0);

static_assert(DivideRows(1, 896, 132, 1).count == 4 &&
              DivideRows(128, 896, 132, 1).piece_vectors == 448);
static_assert(DivideRows(16, 896, 132, 1).stride == 75 &&
              DivideRows(16, 896, 132, 1).team_warps == 3);
static_assert(UnitsOf(1, kMaxPieceVectors, 0, 1).team_warps <= kMaxTeamWarps);
static_assert(DivideRows(1, 896, 132, 16).piece_vectors == 224 &&
              DivideRows(1, 896, 132, 16).stride == 80);

}  // namespace jax_ep::gpu::slots

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

#endif  // JAX_EP_CUDA_SLOTS_UNITS_H_
