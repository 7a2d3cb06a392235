// What layouts over a network exchange, and where it lies: plain C++17, for the host too.
// cuda/network/layout.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_LAYOUT_H_
#define JAX_EP_CUDA_NETWORK_LAYOUT_H_

#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/network/hop_memory.h"
#include "cuda/network/rail/rail.h"

namespace jax_ep::gpu {

inline constexpr int kMaxNetworkRanks = kMaxRailRanks;

// A kept row, as its source tells the rank of its expert.
struct alignas(8) RowEntry {
  int32_t id;   // token * K + k at the source
  int32_t row;  // of the destination's buffer
};

// Where layouts' buffers lie in a hop's memory: the same on all ranks, and for all calls, since a
// rank may be in a call when another is still in the one before. Sizes are of the largest call.
struct NetworkLayoutMemory {
  int64_t num_ranks, max_ids, max_experts, max_capacity;

  JAX_EP_HOST_DEVICE constexpr int64_t num_signals() const { return 3 * num_ranks; }
  JAX_EP_HOST_DEVICE constexpr int64_t counts_bytes() const {
    return 2 * num_ranks * max_experts * int64_t{sizeof(int32_t)};
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes() const {
    return counts_bytes() + (max_ids + max_capacity) * int64_t{sizeof(RowEntry)};
  }
  JAX_EP_HOST_DEVICE bool fits(int64_t num_ids, int64_t num_experts, int64_t capacity) const {
    return num_ids <= max_ids && num_experts <= max_experts && capacity <= max_capacity;
  }
  JAX_EP_HOST_DEVICE int32_t* counts(const HopMemory& m, uint64_t epoch, int rank) const {
    const auto row = static_cast<int64_t>(epoch & 1) * num_ranks + rank;
    return reinterpret_cast<int32_t*>(m.bytes) + row * max_experts;
  }
  JAX_EP_HOST_DEVICE RowEntry* sent(const HopMemory& m) const {
    return reinterpret_cast<RowEntry*>(m.bytes + counts_bytes());
  }
  JAX_EP_HOST_DEVICE RowEntry* received(const HopMemory& m) const { return sent(m) + max_ids; }
  JAX_EP_HOST_DEVICE uint64_t* counted(const HopMemory& m, uint64_t epoch, int rank) const {
    return m.signals + static_cast<int64_t>(epoch & 1) * num_ranks + rank;
  }
  JAX_EP_HOST_DEVICE uint64_t* listed(const HopMemory& m, int rank) const {
    return m.signals + 2 * num_ranks + rank;
  }
};

// Beside GroupView, which says whose it is.
struct NetworkView {
  HopMemory memory;
  NetworkLayoutMemory layout;
  uint64_t* epoch;  // in this device's memory: layouts finished
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_LAYOUT_H_
