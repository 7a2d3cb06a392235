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

// The room that the experts of a rank have.
struct Room {
  int64_t capacity;          // C, of all of them
  int64_t expert_alignment;  // A
  int64_t expert_capacity;   // M, of each; 0 where they share C

  // p[e]: rows that an expert with `num_rows` rows occupies.
  JAX_EP_HOST_DEVICE constexpr int64_t occupied_rows(int64_t num_rows) const {
    if (expert_capacity > 0) return expert_capacity;
    if (expert_alignment == 1) return num_rows;  // kernels are spared a division of 64 bits
    return (num_rows + expert_alignment - 1) / expert_alignment * expert_alignment;
  }

  // Rows that an expert may keep whose first row is `offset`: those with i below this.
  JAX_EP_HOST_DEVICE constexpr int64_t most_rows(int64_t offset) const {
    if (expert_capacity > 0) return expert_capacity;
    return offset < capacity ? capacity - offset : 0;
  }

  // Rows of its group, padding included.
  JAX_EP_HOST_DEVICE constexpr int64_t group_size(int64_t offset, int64_t num_rows) const {
    const int64_t occupied = occupied_rows(num_rows), most = most_rows(offset);
    return occupied < most ? occupied : most;
  }
};

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
static_assert(rows_below(4, 3, 8) == 3 && rows_below(6, 3, 8) == 2 && rows_below(9, 3, 8) == 0);
static_assert(is_invalid(-2, 4) && is_invalid(4, 4) && !is_invalid(-1, 4) && !is_invalid(3, 4));

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_PLACEMENT_H_
