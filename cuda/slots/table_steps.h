// How the blocks of a kernel in slots divide the ids among them, and the memory that their tables take
// (tables.cuh): computed by the host, the same on all ranks.
#ifndef JAX_EP_CUDA_SLOTS_TABLE_STEPS_H_
#define JAX_EP_CUDA_SLOTS_TABLE_STEPS_H_

#include <cstdint>

#include "cuda/core/divider.h"
#include "cuda/core/placement.h"
#include "cuda/slots/units.h"

namespace jax_ep::gpu::slots {

// Of R * T * K ids: each warp has a run of them, whole steps of 32.
JAX_EP_HOST_DEVICE constexpr int32_t ids_per_warp(int64_t num_ids) {
  return static_cast<int32_t>((num_ids + kNumThreads - 1) / kNumThreads * 32);
}
JAX_EP_HOST_DEVICE constexpr int32_t num_counting_warps(int64_t num_ids) {
  return static_cast<int32_t>((num_ids + ids_per_warp(num_ids) - 1) / ids_per_warp(num_ids));
}

// What the host works out for the tables.
struct TableSteps {
  int32_t ids_per_warp, num_warps;  // that count
  int32_t ids_per_sender;           // of this rank's
  Divider ids_per_rank, experts_per_rank, top_k, expert_alignment;
};
constexpr TableSteps TableStepsOf(int64_t num_ranks, int64_t num_tokens, int64_t top_k,
                                  int64_t num_experts, const Room& room, int32_t num_senders) {
  const int64_t num_ids = num_ranks * num_tokens * top_k;
  const int64_t senders = num_senders > 0 ? num_senders : 1;
  return {ids_per_warp(num_ids),
          num_counting_warps(num_ids),
          static_cast<int32_t>((num_tokens * top_k + senders - 1) / senders),
          Divider(static_cast<int32_t>(num_tokens * top_k)),
          Divider(static_cast<int32_t>(num_experts / num_ranks)),
          Divider(static_cast<int32_t>(top_k)),
          Divider(room.expert_alignment)};
}
// Of shared memory.
constexpr int64_t tables_bytes(int64_t num_ids, int64_t num_experts) {
  return (2 * num_ids + (num_counting_warps(num_ids) + 2) * num_experts) * int64_t{4};
}

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_TABLE_STEPS_H_
