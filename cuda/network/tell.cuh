// tell: how a rank tells the other nodes of its group that it has given up. Those of its own node are
// told over NVLink (cuda/sync/give_up.cuh).
//
// Buffers:  name     | lives on          | written by           | read by
//           given_up | hop's signals, [R]| rank r its word      | all waits of the group's calls
//           has_told | own               | this device's blocks | likewise
// Protocol: [T1] the last block of a call that has failed, before it waits for anybody, a block of one
//                that is refused, or a kernel in place of one that the host refuses, adds to this
//                rank's word at every rank of other nodes who has given up on whom. It does that once,
//                and not if a word of another rank is there: that one has told all nodes but its own,
//                and its own over NVLink. Nor to a process that is gone.
//           [T2] a wait that finds a word breaks the group as told, and so tells its own node.
// Proof:    A word is added to once, so it is what was added (hop.cuh, Signals). All hear: be r the first
//           rank, by time, to look at its words in [T1]; it finds none, so it tells all nodes but its
//           own. Who finds a word there has broken its group, or will by [T2], and needs tell nobody
//           else. What is told are slots of processes (control.h), which mean the same everywhere; a
//           device that is no rank of the group has none, and this one stands in for it.
// Reuse:    words and has_told are zero when the region is new, which is before the group may be used
//           again.
// Progress: [T1] waits for room in a queue at most, and not for long.
// Failure:  who does not hear, for the teller has died meanwhile or the network has failed, finds out
//           by its own timeout.
#ifndef JAX_EP_CUDA_NETWORK_TELL_CUH_
#define JAX_EP_CUDA_NETWORK_TELL_CUH_

#include "cuda/launch.h"
#include "cuda/network/hop.cuh"
#include "cuda/network/names.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/leave.cuh"

namespace jax_ep::gpu {

// [T1], by all threads of a block that finds the group broken, of a whole warp at least.
template <typename Hop>
__device__ __noinline__ void tell_other_nodes(const GroupView& g, const Hop& hop) {
  if (threadIdx.x >= 32) return;
  uint64_t given_up = 0;
  if (is_first_lane()) {
    const uint64_t broken = ld_relaxed_gpu_u64(&g.control->local.broken);
    // The region may be gone when the host has left.
    if (broken != 0 && broken != kHostHasLeft && told_by_other_nodes(g) == 0 &&
        atom_cas_relaxed_gpu(g.nodes.has_told, 0, 1) == 0) {
      given_up = given_up_of(slot_elsewhere(g, hop, who_gave_up(broken)),
                             slot_elsewhere(g, hop, waited_for(broken)));
    }
  }
  given_up = __shfl_sync(~0u, given_up, 0);
  if (given_up == 0) return;
  const uint64_t start = globaltimer_ns();
  const auto may_go_on = [&](uint64_t) { return globaltimer_ns() - start <= kLeaveTimeoutNs; };
  const int32_t first = first_rank_of_node(g);
  for (int32_t r = 0; r < g.nodes.num_ranks; ++r) {
    const bool is_of_node = r >= first && r < first + g.num_ranks;
    if (is_of_node || said_to_warp(is_gone(g, slot_of_rank(g, hop, r)))) continue;
    hop.add_signal(r, r, &g.nodes.given_up[g.nodes.rank], given_up, may_go_on);
  }
}

// In place of a call that the host refuses: one warp.
template <typename Hop>
__global__ __launch_bounds__(32) void tell_kernel(const __grid_constant__ GroupView g,
                                                  const __grid_constant__ Hop hop) {
  tell_other_nodes(g, hop);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_TELL_CUH_
