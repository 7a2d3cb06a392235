// How kernels in slots divide their rows: computed by the host, the same on all ranks.
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

#include "cuda/memory/control.h"

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
static_assert(DivideRows(1, 1540, 132, 32).count == 8 &&
                  7 * DivideRows(1, 1540, 132, 32).piece_vectors > 1540,
              "the last pieces of a row may have nothing");
static_assert(DivideRows(1, 896, 132, 16).piece_vectors == 224 &&
              DivideRows(1, 896, 132, 16).stride == 80);

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_UNITS_H_
