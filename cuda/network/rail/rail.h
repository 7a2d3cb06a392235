// rail: the ranks of the same index on their nodes, one a node, and the memory through which they
// send each other chunks of rows. cuda/network/rail/dispatch.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_RAIL_H_
#define JAX_EP_CUDA_NETWORK_RAIL_RAIL_H_

#include <cstddef>
#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/direct/pieces.h"
#include "cuda/memory/control.h"
#include "cuda/network/hop_memory.h"

namespace jax_ep::gpu {

// Channels of a block. Where there are few other nodes a block has several to each, or too few of its
// warps would send.
JAX_EP_HOST_DEVICE constexpr int32_t channels_per_block(int32_t num_nodes) {
  return num_nodes <= 2 ? 4 : num_nodes == 3 ? 2 : 1;
}

// Where a rail's buffers lie in a hop's memory: the same on all ranks, and for all calls, since a
// rank may be in a call when another is still in the one before.
//   bytes   | staging, landing [nodes][channels][slots][slot_bytes], by the peer's node
//   signals | filled [nodes][channels][slots], credit [nodes][channels], likewise
// A call has as many blocks as it has SMs, at most max_blocks(); block b has the channels
// b * channels_per_block(num_nodes) and following.
struct RailMemory {
  int32_t num_nodes, num_channels, num_slots;
  int64_t slot_bytes;  // a multiple of 16

  JAX_EP_HOST_DEVICE constexpr int32_t max_blocks() const {
    return num_channels / channels_per_block(num_nodes);
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_all_slots() const {
    return int64_t{num_nodes} * num_channels * num_slots;
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes() const {
    return 2 * num_all_slots() * slot_bytes;
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_signals() const {
    return num_all_slots() + int64_t{num_nodes} * num_channels;
  }
  // Chunks of a pair of ranks and a channel are numbered from 0 on, through all calls.
  JAX_EP_HOST_DEVICE constexpr int64_t slot_of(int node, int channel, uint64_t chunk) const {
    return (int64_t{node} * num_channels + channel) * num_slots +
           static_cast<int64_t>(chunk % static_cast<uint64_t>(num_slots));
  }
  // How often a chunk's slot has been filled, with it.
  JAX_EP_HOST_DEVICE constexpr uint64_t use_of(uint64_t chunk) const {
    return chunk / static_cast<uint64_t>(num_slots) + 1;
  }
  JAX_EP_HOST_DEVICE char* staging(const HopMemory& m, int node, int channel,
                                   uint64_t chunk) const {
    return m.bytes + slot_of(node, channel, chunk) * slot_bytes;
  }
  JAX_EP_HOST_DEVICE char* landing(const HopMemory& m, int node, int channel,
                                   uint64_t chunk) const {
    return staging(m, node, channel, chunk) + num_all_slots() * slot_bytes;
  }
  JAX_EP_HOST_DEVICE uint64_t* filled(const HopMemory& m, int node, int channel,
                                      uint64_t chunk) const {
    return m.signals + slot_of(node, channel, chunk);
  }
  JAX_EP_HOST_DEVICE uint64_t* credit(const HopMemory& m, int node, int channel) const {
    return m.signals + num_all_slots() + int64_t{node} * num_channels + channel;
  }
};

// Chunks that a rank has sent to one peer over one channel, and has received from it.
struct RailChunks {
  uint64_t sent, received;
};

// The group's nodes, as one of its ranks sees them: beside GroupView, which is of its own node.
struct RailView {
  RailMemory at;
  HopMemory memory;
  RailChunks* chunks;  // [nodes][channels], in this device's memory: at the end of the last call
  int32_t node;        // this rank's
  int32_t ranks_per_node;

  // The rank of the whole group that is this one's peer on a node. `index` is GroupView::rank.
  JAX_EP_HOST_DEVICE constexpr int32_t rank_of(int32_t of_node, int32_t index) const {
    return of_node * ranks_per_node + index;
  }
  JAX_EP_HOST_DEVICE RailChunks& chunks_of(int32_t of_node, int32_t channel) const {
    return chunks[of_node * at.num_channels + channel];
  }
};

// Of a group: so many that NVSHMEM's default heap is enough with one rank a node (region.h asserts it).
inline constexpr int kMaxRailRanks = 56;

// What a chunk begins with.
struct alignas(16) ChunkHead {
  uint64_t operation;  // GroupView::operation
  uint64_t number;
  uint32_t num_rows;
  uint32_t is_last;  // of the call
  uint64_t unused;
};

// A chunk: its head, then rows, each behind its own head.
struct ChunkFormat {
  int64_t row_head_bytes, row_bytes;  // multiples of 16

  JAX_EP_HOST_DEVICE constexpr int64_t stride() const { return row_head_bytes + row_bytes; }
  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes(int64_t num_rows) const {
    return int64_t{sizeof(ChunkHead)} + num_rows * stride();
  }
  // That fit so many bytes.
  JAX_EP_HOST_DEVICE constexpr int64_t num_rows(int64_t bytes) const {
    return bytes < num_bytes(0) ? 0 : (bytes - num_bytes(0)) / stride();
  }
  JAX_EP_HOST_DEVICE char* row_head(char* chunk, int64_t i) const { return chunk + num_bytes(i); }
  JAX_EP_HOST_DEVICE char* row(char* chunk, int64_t i) const {
    return row_head(chunk, i) + row_head_bytes;
  }
};

// Of dispatch. A row is as it crosses (wire_row.h), and its head
//   row    [K] int32 | of the expert's buffer, kNoRow if not on this node
//   weight [K] float | topk_weights, if the call has any
//   token  int32     | at its source
//   index  [K] uint8 | of the rank on its node
struct RowHead {
  int32_t top_k;

  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes() const {
    return (int64_t{top_k} * 9 + 4 + 15) / 16 * 16;
  }
  JAX_EP_HOST_DEVICE int32_t* row(char* head) const { return reinterpret_cast<int32_t*>(head); }
  JAX_EP_HOST_DEVICE float* weight(char* head) const {
    return reinterpret_cast<float*>(head) + top_k;
  }
  JAX_EP_HOST_DEVICE int32_t* token(char* head) const { return row(head) + 2 * top_k; }
  JAX_EP_HOST_DEVICE uint8_t* index(char* head) const {
    return reinterpret_cast<uint8_t*>(token(head) + 1);
  }
};
JAX_EP_HOST_DEVICE constexpr ChunkFormat dispatch_chunks(int64_t top_k, int64_t wire_row_bytes) {
  return {RowHead{static_cast<int32_t>(top_k)}.num_bytes(), wire_row_bytes};
}
static_assert(dispatch_chunks(8, 14336).stride() == 14416);
static_assert(dispatch_chunks(8, 14336).num_rows(131072) == 9);

// Of combine. A row's head is its values [K] float, if the call has any.
JAX_EP_HOST_DEVICE constexpr ChunkFormat combine_chunks(int64_t top_k, int64_t row_bytes,
                                                        bool has_values) {
  return {has_values ? (top_k * 4 + 15) / 16 * 16 : 0, row_bytes};
}

namespace rail {

constexpr int64_t kStageBytes = 204 * 1024;  // of shared memory, for all stages of a block
constexpr int kMaxStages = 32;               // of a block
constexpr int kMinStages = 3;                // of a mover
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int kMaxPairs = 8;  // channels that a block serves at once
constexpr int kMinOwn = 2;    // warps that move rows of the own node
constexpr int kMaxOwn = channels_per_block(2);
constexpr int kMaxThreads = (2 * kMaxPairs + kMaxOwn) * 32;
constexpr int kRowsAtOnce = 32;  // that a warp looks at, for those to be zeroed

// How a block shares its warps and its memory.
struct Plan {
  int32_t channels;            // to each node
  int32_t num_pairs, num_own;  // senders, as many forwarders; movers of own rows
  int32_t num_pieces, piece_bytes;
  int32_t num_stages;  // of a mover
  int32_t rows_per_chunk;
  ChunkFormat format;

  JAX_EP_HOST_DEVICE constexpr int32_t num_warps() const { return 2 * num_pairs + num_own; }
  JAX_EP_HOST_DEVICE constexpr int32_t num_movers() const { return num_pairs + num_own; }
};

// Of one mover.
JAX_EP_HOST_DEVICE constexpr int64_t bytes_of_mover(int64_t num_movers) {
  return kStageBytes / num_movers / 128 * 128;
}

static_assert(2 * channels_per_block(3) <= kMaxPairs && channels_per_block(2) <= kMaxPairs);

// Of rows of so many bytes, as tokens hold them; max_nodes that a block serves at once. False if a slot
// does not hold a row as it crosses.
constexpr bool MakePlan(const RailMemory& at, const ChunkFormat& format, int64_t row_bytes,
                        int32_t max_nodes, Plan* plan) {
  if (at.num_nodes < 2 || row_bytes <= 0 || max_nodes < 1 || max_nodes > kMaxPairs) return false;
  plan->format = format;
  plan->channels = channels_per_block(at.num_nodes);
  plan->num_pairs = plan->channels * (at.num_nodes - 1 < max_nodes ? at.num_nodes - 1 : max_nodes);
  plan->num_own = plan->channels < kMinOwn ? kMinOwn : plan->channels;
  const int64_t bytes = bytes_of_mover(plan->num_movers());
  const int64_t third = bytes / kMinStages / 16 * 16;
  const int64_t most = third < kMaxPieceBytes ? third : kMaxPieceBytes;
  const Pieces pieces = CutRow(row_bytes, (row_bytes + most - 1) / most);
  plan->num_pieces = pieces.count;
  plan->piece_bytes = pieces.bytes;
  const int64_t num_stages = bytes / pieces.bytes, most_stages = kMaxStages / plan->num_movers();
  plan->num_stages = static_cast<int32_t>(num_stages < most_stages ? num_stages : most_stages);
  const int64_t num_rows = format.num_rows(at.slot_bytes);
  plan->rows_per_chunk = static_cast<int32_t>(num_rows < INT32_MAX ? num_rows : INT32_MAX);
  return plan->rows_per_chunk > 0 && plan->num_stages >= kMinStages;
}

}  // namespace rail
}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_RAIL_RAIL_H_
