// What the warps of a block of dispatch share. dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_SHARED_CUH_
#define JAX_EP_CUDA_DIRECT_DISPATCH_SHARED_CUH_

#include "cuda/direct/dispatch/plan.h"
#include "cuda/rows/row_format.h"
#include "cuda/sync/progress.cuh"

namespace jax_ep::gpu::dispatch {

// Warps of a block: rings with their helpers, then the one that sends weights, then the messenger.
template <typename Rows>
constexpr int kWarpsOfRing = 1 + Rows::kFormat.num_helpers;
template <typename Rows>
constexpr int kWeightSender = Rows::kFormat.max_rings * kWarpsOfRing<Rows>;
template <typename Rows>
constexpr int kMessenger = kWeightSender<Rows> + 1;
template <typename Rows>
constexpr int kNumThreads = (kMessenger<Rows> + 1) * 32;

// The addresses that a rank shows its peers.
enum Address { kTokens, kWeights, kScales, kLanding };

// What a stage is for.
struct Unit {
  int32_t bytes;      // to store; 0: nothing more comes
  int32_t num_own;    // the ring's units up to this one
  uint32_t crosses;   // lanes that store the row to a peer
  uint32_t verbatim;  // those that store it as it crosses, not as tokens are
};

template <typename Rows>
struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  // By stage, the rings' one after the other.
  uint64_t full[kMaxStages];  // [L]
  Unit unit[kMaxStages];
  uint64_t to[kMaxStages][kMaxTopK];                 // where each lane stores the row; 0: nowhere
  typename Rows::Extra extra[kMaxStages][kMaxTopK];  // of each lane's row
  uint64_t computed[kMaxStages];                     // [M], with helpers
  uint32_t num_batches;                              // of rows that have been looked at for zeroing
  Mailbox box;
};

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_SHARED_CUH_
