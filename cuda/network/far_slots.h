// The memory by which calls in slots reach ranks of other nodes: plain C++17, for the host too.
// cuda/network/slots.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_FAR_SLOTS_H_
#define JAX_EP_CUDA_NETWORK_FAR_SLOTS_H_

#include <cstdint>

#include "cuda/memory/control.h"
#include "cuda/network/hop_memory.h"

namespace jax_ep::gpu {

// Where what calls in slots send ranks of other nodes lies in a hop's memory: the same on all ranks,
// and for all calls, since a rank may be in a call when another is still in the one before. A far rank
// is one of another node; they are counted in their order. Twice, for even epochs and for odd ones:
//   bytes   | staging, landing [far ranks][slot_bytes]
//   signals | told [far ranks], arrived [far ranks][max_units]
struct FarSlots {
  int32_t num_far, ranks_per_node, max_units;
  int64_t slot_bytes;    // a multiple of kLine
  int64_t parity_bytes;  // from what even epochs have to what odd ones have

  // The number that rank `who` has among those that are far from rank `from`; and back.
  JAX_EP_HOST_DEVICE constexpr int32_t far_index(int32_t from, int32_t who) const {
    return who < first_of_node(from) ? who : who - ranks_per_node;
  }
  JAX_EP_HOST_DEVICE constexpr int32_t far_rank(int32_t from, int32_t index) const {
    return index < first_of_node(from) ? index : index + ranks_per_node;
  }
  JAX_EP_HOST_DEVICE constexpr int32_t first_of_node(int32_t rank) const {
    return rank / ranks_per_node * ranks_per_node;
  }

  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes() const { return 2 * parity_bytes; }
  JAX_EP_HOST_DEVICE constexpr int64_t num_signals() const {
    return 2 * int64_t{num_far} * (1 + max_units);
  }
  JAX_EP_HOST_DEVICE char* staging(const HopMemory& m, uint64_t epoch, int far) const {
    return m.bytes + static_cast<int64_t>(epoch & 1) * parity_bytes + far * slot_bytes;
  }
  JAX_EP_HOST_DEVICE char* landing(const HopMemory& m, uint64_t epoch, int far) const {
    return staging(m, epoch, num_far + far);
  }
  JAX_EP_HOST_DEVICE uint64_t* told(const HopMemory& m, uint64_t epoch, int far) const {
    return m.signals + (static_cast<int64_t>(epoch & 1) * num_far + far) * (1 + max_units);
  }
  JAX_EP_HOST_DEVICE uint64_t* arrived(const HopMemory& m, uint64_t epoch, int far,
                                       int32_t unit) const {
    return told(m, epoch, far) + 1 + unit;
  }
};

// Each rank has the units of a call; the more ranks there are, the fewer tokens each may have
// (kMaxSlotGroupIds).
constexpr int32_t most_far_units(int32_t num_ranks) {
  constexpr int32_t kLeast = 256;
  static_assert(kLeast >= kMaxBlocks, "few tokens are cut into units for all SMs");
  return num_ranks < 32 ? 8192 / num_ranks : kLeast;
}
// Of so many bytes of memory, at most.
constexpr FarSlots MakeFarSlots(int64_t num_bytes, int32_t num_ranks, int32_t ranks_per_node) {
  constexpr auto kLineBytes = static_cast<int64_t>(kLine);
  FarSlots slots{};
  slots.num_far = num_ranks - ranks_per_node;
  slots.ranks_per_node = ranks_per_node;
  slots.max_units = most_far_units(num_ranks);
  slots.slot_bytes = num_bytes / (4 * slots.num_far) / kLineBytes * kLineBytes;
  slots.parity_bytes = 2 * slots.num_far * slots.slot_bytes;
  return slots;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_FAR_SLOTS_H_
