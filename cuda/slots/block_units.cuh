// A block's units, and which vector of which a thread has in a step (units.h).
#ifndef JAX_EP_CUDA_SLOTS_BLOCK_UNITS_CUH_
#define JAX_EP_CUDA_SLOTS_BLOCK_UNITS_CUH_

#include "cuda/direct/kernels.cuh"
#include "cuda/slots/units.h"

namespace jax_ep::gpu::slots {

inline constexpr int kAtOnce = 4;  // vectors of a thread in flight

// Warps take what there is to look up from the last one on: the first ones ask for the call's leave.
__device__ inline int32_t lookup_turn() {
  return kNumWarps - 1 - static_cast<int32_t>(threadIdx.x) / 32;
}

struct Place {
  int32_t unit;  // of the block's; -1: the thread has nothing to do in this step
  int32_t token;
  int32_t offset;  // in a row, bytes
};

class BlockUnits {
 public:
  __device__ BlockUnits(const Units& units, int64_t row_bytes)
      : units_(units),
        row_bytes_(static_cast<int32_t>(row_bytes)),
        count_(num_steps(units.count, blockIdx.x, gridDim.x)) {}

  __device__ int32_t count() const { return count_; }
  __device__ int32_t token_of(int32_t unit) const { return number(unit) / units_.num_pieces; }
  // Whether it begins its token: what there is once for a token is done with this unit.
  __device__ bool begins_token(int32_t unit) const { return number(unit) % units_.num_pieces == 0; }

  // Of all units from `first` on, up to `end`.
  __device__ int32_t num_steps_of(int32_t first, int32_t end) const {
    const int32_t teams = kNumThreads >> units_.team_shift;
    return (end - first + teams - 1) / teams * units_.steps_each;
  }
  // In a step from the unit `first` on, up to `end`.
  __device__ Place place(int32_t step, int32_t first, int32_t end) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t teams_shift = 9 - units_.team_shift;
    const int32_t round = step / units_.steps_each;
    const int32_t unit = first + (round << teams_shift) + (thread >> units_.team_shift);
    const int32_t vector = ((step - round * units_.steps_each) << units_.team_shift) +
                           (thread & ((1 << units_.team_shift) - 1));
    const int32_t n = number(unit), token = n / units_.num_pieces;
    const int32_t in_piece = vector * 16;
    const int32_t offset = (n - token * units_.num_pieces) * units_.piece_bytes + in_piece;
    const bool is_any = unit < end && in_piece < units_.piece_bytes && offset < row_bytes_;
    return {is_any ? unit : -1, token, offset};
  }
  static_assert(kNumThreads == 1 << 9);

 private:
  __device__ int32_t number(int32_t unit) const {
    return static_cast<int32_t>(blockIdx.x + static_cast<uint32_t>(unit) * gridDim.x);
  }

  const Units& units_;
  const int32_t row_bytes_, count_;
};

// A set of ranks.
struct Ranks {
  uint32_t word[(kMaxPeers + 31) / 32];
  __device__ bool has(int rank) const { return (word[rank / 32] >> rank % 32 & 1) != 0; }
};

// Of all lanes' ranks, -1 for none; by a warp, on all lanes.
__device__ inline Ranks ranks_of_warp(int32_t rank) {
  Ranks ranks;
#pragma unroll
  for (int w = 0; w < (kMaxPeers + 31) / 32; ++w) {
    const bool is_here = rank >= 32 * w && rank < 32 * (w + 1);
    ranks.word[w] = __reduce_or_sync(0xffffffffu, is_here ? 1u << rank % 32 : 0u);
  }
  return ranks;
}

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_BLOCK_UNITS_CUH_
