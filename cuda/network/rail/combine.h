// What combine over rails keeps on the way, and how its blocks are divided: plain C++17, computed by
// the host too. cuda/network/rail/combine.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_COMBINE_H_
#define JAX_EP_CUDA_NETWORK_RAIL_COMBINE_H_

#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/memory/control.h"
#include "cuda/network/rail/rail.h"

namespace jax_ep::gpu::rail {

constexpr int kMaxCombineNodes = 16;
constexpr int kMaxCombineSlots = 16;
constexpr int kMaxRanksOfNode = 32;
constexpr int kTokensAtOnce = 8;   // in a unit
constexpr int kCombineWarps = 24;  // of a block
constexpr int kCombineThreads = kCombineWarps * 32;
constexpr int kSumPieceBytes = 2048;  // of a row, in a stage
constexpr int kSummerStages = 104;    // of a block
constexpr int kMaxSummerStages = 8;   // of a warp
constexpr int kMaxSummers = 20;       // of ranks and of nodes
constexpr int64_t kCombineStageBytes = int64_t{kSummerStages} * kSumPieceBytes;

// How a block shares its warps: the messenger, those that sum a rank's rows, those that add up a
// token's nodes, as many for each of the block's channels, then one for each channel to another node,
// which sums this node's part.
struct CombineWarps {
  int32_t channels;  // to each node
  int32_t rank_summers, token_summers, node_summers;
  int32_t stages;  // of a rank summer, and of a node summer

  JAX_EP_HOST_DEVICE constexpr int32_t first_token_summer() const { return 1 + rank_summers; }
  JAX_EP_HOST_DEVICE constexpr int32_t first_node_summer() const {
    return first_token_summer() + token_summers;
  }
};
JAX_EP_HOST_DEVICE constexpr CombineWarps combine_warps(int32_t num_nodes) {
  CombineWarps warps{};
  warps.channels = channels_per_block(num_nodes);
  warps.node_summers = (num_nodes - 1) * warps.channels;
  warps.token_summers = warps.node_summers <= 4 ? 8 : 4;
  warps.rank_summers = kCombineWarps - 1 - warps.token_summers - warps.node_summers;
  const int32_t stages = kSummerStages / (warps.rank_summers + warps.node_summers);
  warps.stages = stages < kMaxSummerStages ? stages : kMaxSummerStages;
  return warps;
}
static_assert(combine_warps(2).rank_summers == 11 && combine_warps(2).stages == 6);
static_assert(combine_warps(6).rank_summers == 14 && combine_warps(6).stages == 5);
static_assert(combine_warps(kMaxCombineNodes).rank_summers == 4);
static_assert(kCombineWarps - 1 - 4 < kMaxSummers);

// The sums of a node's ranks for the tokens of one rank of each node, on that rank or its peer here:
// scratch of a call, which the ranks of the node write.
//   partial [nodes][ranks of the node][T, row]
//   values  [nodes][T, K] float, if the call has any
//   has     [nodes][ranks of the node][T] uint8: whether there is a sum
struct CombineScratch {
  int64_t num_nodes, ranks_per_node, num_tokens, top_k, row_bytes;
  bool has_values;

  JAX_EP_HOST_DEVICE constexpr int64_t place(int64_t node, int64_t index, int64_t token) const {
    return (node * ranks_per_node + index) * num_tokens + token;
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_places() const {
    return num_nodes * ranks_per_node * num_tokens;
  }
  JAX_EP_HOST_DEVICE constexpr int64_t values_bytes() const {
    return has_values ? num_nodes * num_tokens * top_k * int64_t{sizeof(float)} : 0;
  }
  JAX_EP_HOST_DEVICE constexpr int64_t num_bytes() const {
    return num_places() * row_bytes + values_bytes() + num_places();
  }
  JAX_EP_HOST_DEVICE char* partial(uint64_t scratch, int64_t node, int64_t index,
                                   int64_t token) const {
    return reinterpret_cast<char*>(scratch) + place(node, index, token) * row_bytes;
  }
  JAX_EP_HOST_DEVICE float* values(uint64_t scratch, int64_t node, int64_t token) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(scratch) + num_places() * row_bytes) +
           (node * num_tokens + token) * top_k;
  }
  JAX_EP_HOST_DEVICE uint8_t* has(uint64_t scratch, int64_t node, int64_t index,
                                  int64_t token) const {
    return reinterpret_cast<uint8_t*>(scratch) + num_places() * row_bytes + values_bytes() +
           place(node, index, token);
  }
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_COMBINE_H_
