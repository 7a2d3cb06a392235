// Where a row goes: the arithmetic of the receive layout, one home for host and device.
//
// Vocabulary: T tokens, K experts per token, E experts, R ranks, L = E / R experts per rank,
// C capacity (rows), A expert alignment. Local expert e of a rank receives n[e] rows, takes
// p[e] = n[e] rounded up to A, and starts at o[e] = p[0] + .. + p[e - 1]. Row i of expert e sits at
// o[e] + i and is kept if that is below C. Where each expert has room of its own, M rows,
// p[e] = M whatever n[e] is, C = L * M, and row i is kept if i < M.
// All quantities are rows and fit 64 bits.
#ifndef JAX_EP_CUDA_CORE_PLACEMENT_H_
#define JAX_EP_CUDA_CORE_PLACEMENT_H_

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_EP_HOST_DEVICE __host__ __device__
#else
#define JAX_EP_HOST_DEVICE
#endif

namespace jax_ep {

inline constexpr int32_t kNotRouted = -1;  // an id that sends no row, on purpose
inline constexpr int32_t kNoRow = -1;      // in send_row: dropped or not routed
inline constexpr int32_t kNoSource = -1;   // in recv_src and recv_order: padding or tail

// An id in [0, E) makes a row.
JAX_EP_HOST_DEVICE constexpr bool is_routed(int32_t expert, int64_t num_experts) {
  return expert >= 0 && expert < num_experts;
}

// Neither routed nor the agreed "not routed": counted in num_invalid.
JAX_EP_HOST_DEVICE constexpr bool is_invalid(int32_t expert, int64_t num_experts) {
  return !is_routed(expert, num_experts) && expert != kNotRouted;
}

// n rounded up to a multiple; also for Divider (divider.h).
JAX_EP_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The room that the experts of a rank have: Room, or, in kernels, with rows in int32, where they are
// known to fit, and a Divider.
template <typename Rows, typename Alignment>
struct RoomOf {
  Rows capacity;               // C, of all of them
  Alignment expert_alignment;  // A
  Rows expert_capacity;        // M, of each; 0 where they share C

  // p[e]: rows that an expert with `num_rows` rows occupies.
  JAX_EP_HOST_DEVICE constexpr Rows occupied_rows(Rows num_rows) const {
    return expert_capacity > 0 ? expert_capacity : round_up(num_rows, expert_alignment);
  }

  // Rows that an expert may keep whose first row is `offset`: those with i below this.
  JAX_EP_HOST_DEVICE constexpr Rows most_rows(Rows offset) const {
    if (expert_capacity > 0) return expert_capacity;
    const Rows left = capacity - offset;
    return left > 0 ? left : 0;
  }

  // Rows that it keeps.
  JAX_EP_HOST_DEVICE constexpr Rows rows_kept(Rows offset, Rows num_rows) const {
    const Rows most = most_rows(offset);
    return num_rows < most ? num_rows : most;
  }

  // Rows of its group, padding included.
  JAX_EP_HOST_DEVICE constexpr Rows group_size(Rows offset, Rows num_rows) const {
    if (expert_capacity > 0) return expert_capacity;
    return rows_kept(offset, occupied_rows(num_rows));
  }
};
using Room = RoomOf<int64_t, int64_t>;

// Of the rows [first_row, first_row + num_rows), how many lie below the end.
JAX_EP_HOST_DEVICE constexpr int64_t rows_below(int64_t first_row, int64_t num_rows, int64_t end) {
  const int64_t rows_end = first_row + num_rows < end ? first_row + num_rows : end;
  return rows_end > first_row ? rows_end - first_row : 0;
}

// The source of a receive row as one number, ordered by (source rank, token, k).
JAX_EP_HOST_DEVICE constexpr int64_t flat_source(int64_t src_rank, int64_t token_idx, int64_t k_idx,
                                                 int64_t num_tokens, int64_t top_k) {
  return (src_rank * num_tokens + token_idx) * top_k + k_idx;
}

inline constexpr Room kSharedRoom{48, 16, 0}, kOwnRoom{48, 8, 24};
static_assert(kSharedRoom.occupied_rows(0) == 0 && kSharedRoom.occupied_rows(17) == 32);
static_assert(Room{48, 1, 0}.occupied_rows(17) == 17 && Room{48, 1, 24}.occupied_rows(17) == 24);
static_assert(kSharedRoom.most_rows(32) == 16 && kSharedRoom.most_rows(64) == 0);
static_assert(kSharedRoom.group_size(32, 17) == 16 && kSharedRoom.group_size(0, 17) == 32);
static_assert(kOwnRoom.occupied_rows(0) == 24 && kOwnRoom.occupied_rows(25) == 24);
static_assert(kOwnRoom.most_rows(24) == 24 && kOwnRoom.group_size(0, 1) == 24);
static_assert(kSharedRoom.rows_kept(32, 17) == 16 && kOwnRoom.rows_kept(24, 17) == 17);
static_assert(rows_below(4, 3, 8) == 3 && rows_below(6, 3, 8) == 2 && rows_below(9, 3, 8) == 0);
static_assert(is_invalid(-2, 4) && is_invalid(4, 4) && !is_invalid(-1, 4) && !is_invalid(3, 4));

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_PLACEMENT_H_
