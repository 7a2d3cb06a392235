// region: where lies what the ranks of a group across nodes send each other. Plain C++17.
//
// Each rank has one region, at a place that all have alike (NVSHMEM's symmetric heap), zero when the
// network starts. It is for one group until then again: from its ranks, its nodes and the region's
// size follows where everything lies, whatever the calls are, since a rank may be in a call when
// another is still in the one before. R ranks on M nodes, Q channels a pair of nodes, S slots; by offset:
//   what    | bytes                   | for
//   words   | 24 + 32 M Q             | this rank alone: layouts finished, whether it has told that it
//           |                         | has given up, calls in slots finished; chunks sent and received
//   signals | 8 (4 R + 2 M Q (S + 1)) | layouts, dispatch's rails, combine's rails; who has given up;
//           |                         | then those of slots
//   rails   | 4 M Q S slot_bytes      | staging and landing of dispatch, then of combine
//   counts  | 8 R kMaxExperts         | layouts
//   lists   | the rest                | layouts: 8 bytes for each id, and for each row of a capacity
//   slots   | a sixth, or none        | staging and landing of calls in slots (far_slots.h)
// Slots are of kMostSlotBytes, where that leaves a quarter of the region to lists, else as large as it
// does. Lists take calls of max_ids ids a rank, with the capacity by which no row is dropped.
#ifndef JAX_EP_CUDA_NETWORK_REGION_H_
#define JAX_EP_CUDA_NETWORK_REGION_H_

#include <cstddef>
#include <cstdint>

#include "cuda/core/limits.h"
#include "cuda/network/far_slots.h"
#include "cuda/network/hop_memory.h"
#include "cuda/network/layout.h"
#include "cuda/network/rail/rail.h"

namespace jax_ep::gpu {

// Blocks of a call at most, each of which needs an SM; a block has channels of its own.
inline constexpr int kRailBlocks = 24;
inline constexpr int kRailSlots = 3;
inline constexpr int64_t kMostSlotBytes = 128 * 1024;
// A region takes at least a call of T = 4096, K = 8 and rows of 14336 bytes.
inline constexpr int64_t kLeastSlotBytes = 16 * 1024;
inline constexpr int64_t kLeastIds = 4096 * 8;
static_assert(dispatch_chunks(8, 14336).num_rows(kLeastSlotBytes) == 1);

struct NetworkRegion {
  int32_t num_ranks, ranks_per_node;
  RailMemory rail;  // of each direction
  NetworkLayoutMemory layout;
  FarSlots slots;
  int64_t signals_at, dispatch_at, combine_at, layout_at,
      slots_at;  // bytes from the region's begin

  constexpr int32_t num_nodes() const { return num_ranks / ranks_per_node; }

  uint64_t* epoch(char* region) const { return reinterpret_cast<uint64_t*>(region); }
  uint64_t* has_told(char* region) const { return epoch(region) + 1; }
  uint64_t* slots_epoch(char* region) const { return epoch(region) + 2; }
  RailChunks* dispatch_chunks_of(char* region) const {
    return reinterpret_cast<RailChunks*>(epoch(region) + 3);
  }
  RailChunks* combine_chunks_of(char* region) const {
    return dispatch_chunks_of(region) + rail.num_nodes * rail.num_channels;
  }
  HopMemory layout_memory(char* region) const { return {region + layout_at, signals(region)}; }
  HopMemory dispatch_memory(char* region) const {
    return {region + dispatch_at, signals(region) + layout.num_signals()};
  }
  HopMemory combine_memory(char* region) const {
    return {region + combine_at, signals(region) + layout.num_signals() + rail.num_signals()};
  }
  uint64_t* given_up(char* region) const {
    return combine_memory(region).signals + rail.num_signals();
  }
  HopMemory slots_memory(char* region) const {
    return {region + slots_at, given_up(region) + num_ranks};
  }
  constexpr int64_t num_signals() const {
    return layout.num_signals() + 2 * rail.num_signals() + num_ranks + slots.num_signals();
  }

 private:
  uint64_t* signals(char* region) const { return reinterpret_cast<uint64_t*>(region + signals_at); }
};

constexpr RailMemory region_rail(int32_t num_nodes, int64_t slot_bytes) {
  return {num_nodes, kRailBlocks * channels_per_block(num_nodes), kRailSlots, slot_bytes};
}

constexpr int64_t network_words_bytes(const RailMemory& rail) {
  return 3 * int64_t{sizeof(uint64_t)} +
         2 * int64_t{rail.num_nodes} * rail.num_channels * static_cast<int64_t>(sizeof(RailChunks));
}

// Of a region of so many bytes. `is_enough` is whether it takes the least.
constexpr NetworkRegion MakeNetworkRegion(int64_t num_bytes, int32_t num_ranks,
                                          int32_t ranks_per_node, bool has_slots, bool* is_enough) {
  constexpr auto kLineBytes = static_cast<int64_t>(kLine);
  NetworkRegion region{};
  region.num_ranks = num_ranks;
  region.ranks_per_node = ranks_per_node;
  region.rail = region_rail(region.num_nodes(), 0);
  region.layout = {num_ranks, 0, kMaxExperts, 0};
  if (has_slots) {
    region.slots = MakeFarSlots(num_bytes / 6, num_ranks, ranks_per_node);
    num_bytes = (num_bytes - region.slots.num_bytes()) / kLineBytes * kLineBytes;
    region.slots_at = num_bytes;
  }
  region.signals_at = round_up(network_words_bytes(region.rail), kLineBytes);
  region.dispatch_at =
      round_up(region.signals_at + region.num_signals() * int64_t{sizeof(uint64_t)}, kLineBytes);

  const int64_t rest = num_bytes - region.dispatch_at - region.layout.counts_bytes();
  const int64_t num_slots = 4 * region.rail.num_all_slots();
  const int64_t slot_bytes = rest / 4 * 3 / num_slots / kLineBytes * kLineBytes;
  region.rail.slot_bytes = slot_bytes < kMostSlotBytes ? slot_bytes : kMostSlotBytes;
  region.combine_at = region.dispatch_at + region.rail.num_bytes();
  region.layout_at = region.combine_at + region.rail.num_bytes();
  const int64_t num_entries =
      (rest - num_slots * region.rail.slot_bytes) / static_cast<int64_t>(sizeof(RowEntry));
  region.layout.max_ids = num_entries / (num_ranks + 1);
  region.layout.max_capacity = num_entries - region.layout.max_ids;
  *is_enough = region.rail.slot_bytes >= kLeastSlotBytes && region.layout.max_ids >= kLeastIds;
  return region;
}

// Of a region that is enough, whatever slots take of it: lists have a quarter.
constexpr int64_t least_region_bytes(int32_t num_ranks, int32_t ranks_per_node) {
  const RailMemory rail = region_rail(num_ranks / ranks_per_node, kLeastSlotBytes);
  const NetworkLayoutMemory layout{num_ranks, kLeastIds, kMaxExperts, kLeastIds * num_ranks};
  const int64_t rails = 2 * rail.num_bytes(), lists = layout.num_bytes() - layout.counts_bytes();
  const int64_t signals = (layout.num_signals() + 2 * rail.num_signals() + num_ranks) * 8;
  const int64_t rest = 4 * (rails / 3 > lists ? rails / 3 : lists);
  // Lines: of both roundings, and of each slot's.
  return network_words_bytes(rail) + signals + layout.counts_bytes() + rest +
         static_cast<int64_t>(kLine) * (2 + 8 * rail.num_all_slots());
}
// Of the largest group.
static_assert(least_region_bytes(kMaxNetworkRanks, 1) < int64_t{512} << 20);

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_REGION_H_
