// How kernels in slots divide their rows: plain C++17, computed by the host, the same on all ranks.
//
// A unit is a piece of a token's row. Block b of B has the units b, b + B, .. of every rank, so it
// only ever meets the blocks b of the peers. A unit is the work of a team of threads, each of which
// has one 16-byte vector of it in a step.
#ifndef JAX_EP_CUDA_SLOTS_UNITS_H_
#define JAX_EP_CUDA_SLOTS_UNITS_H_

#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/direct/pieces.h"
#include "cuda/memory/control.h"

namespace jax_ep::gpu::slots {

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
// Few tokens are cut, so that more SMs have work, but not into smaller pieces: a block's flags and
// tables cost more than what it moves.
inline constexpr int64_t kMinPieceBytes = 3072;

struct Units {
  int32_t num_blocks;
  int32_t count;        // of the grid
  int32_t num_pieces;   // of a row
  int32_t piece_bytes;  // of each but the last, which may be shorter
  int32_t team_shift;   // a team has 1 << team_shift threads, at least a warp
  int32_t steps_each;   // of a unit
};

constexpr Units DivideRows(int64_t num_tokens, int64_t row_bytes, int32_t num_sms) {
  if (num_sms > kMaxBlocks) num_sms = kMaxBlocks;
  const int64_t most = row_bytes < kMinPieceBytes ? 1 : row_bytes / kMinPieceBytes;
  int64_t num_pieces = num_sms / num_tokens;
  if (num_pieces > most) num_pieces = most;
  if (num_pieces < 1) num_pieces = 1;
  const Pieces pieces = CutRow(row_bytes, num_pieces);
  Units units{};
  units.num_pieces = pieces.count;
  units.piece_bytes = pieces.bytes;
  units.count = static_cast<int32_t>(num_tokens * pieces.count);
  units.num_blocks = units.count < num_sms ? units.count : num_sms;
  const int32_t vectors = pieces.bytes / kRowAlignment;
  units.team_shift = 5;
  while (1 << units.team_shift < vectors && 1 << units.team_shift < kNumThreads) ++units.team_shift;
  units.steps_each = (vectors + (1 << units.team_shift) - 1) >> units.team_shift;
  return units;
}

static_assert(DivideRows(1, 14336, 132).num_blocks == 4 &&
              DivideRows(128, 14336, 132).num_pieces == 1);
static_assert(DivideRows(16, 14336, 132).piece_bytes == 3584);

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_UNITS_H_
