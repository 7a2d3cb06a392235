// What combine over rails keeps on the way, and how its blocks are divided: plain C++17, computed by
// the host too. cuda/network/rail/combine.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_COMBINE_H_
#define JAX_EP_CUDA_NETWORK_RAIL_COMBINE_H_

#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/memory/control.h"

namespace jax_ep::gpu::rail {

constexpr int kMaxCombineNodes = 16;
constexpr int kMaxCombineSlots = 16;
constexpr int kMaxRanksOfNode = 32;
constexpr int kTokensAtOnce = 32;  // that a warp looks at
// Warps of a block: the messenger, those that sum a rank's rows, those that add up a token's nodes,
// then one for each other node, which sums this node's part.
constexpr int kRankSummers = 4;
constexpr int kTokenSummers = 4;
constexpr int kFirstTokenSummer = 1 + kRankSummers;
constexpr int kFirstNodeSummer = kFirstTokenSummer + kTokenSummers;
constexpr int kMaxCombineThreads = (kFirstNodeSummer + kMaxCombineNodes - 1) * 32;

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
