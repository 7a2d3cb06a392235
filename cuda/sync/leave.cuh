// leave: when a call has failed, peers are out of this device's memory before its kernel ends.
//
// After that XLA gives the memory to others, so nobody may write there any more (nor read, for what
// a layout reads is to be ids). A call that went well has seen all peers out, by [P2] or [E2].
//
// Protocol: p's call fails; q is any peer of it; e = calls finished by the pair + 1, as p counts:
//           [V1] a block of q enters p's memory in its call before it uses p's addresses: it raises
//                q's entry for p to the call's epoch, by one atomic operation. If that returns
//                kShut the block ends, and has touched nothing.
//           [V2] p's last block, when all blocks of p have stopped, sets kShut in q's entry, by one
//                atomic operation, which returns in which epoch q had entered last.
//           [L1] q's last block, when all blocks of q have stopped, stores e in q's end mail at p,
//                if q's call fails. If it does not, q's blocks have told all their units ([P1]) or,
//                in a layout, sent [E1].
//           [L2] if q had entered in e, p waits for one of these before it ends.
//           Of [V1] of a block and [V2] one comes first, for both are operations on one word. If it
//           is [V1], p waits for q. If it is [V2], the block stops, and all of q's that come later,
//           in this and all later calls: a rank that comes when everybody has left finds all doors
//           shut. An epoch of q above e says that q is through with e, and p shows no addresses in
//           a later one; one below e that q has not come, and needs not be waited for.
// Order:    p tells q that it has given up before it waits, so that q stops; sends [L1] before it
//           waits, so that q's wait does not depend on p's; and fills its outputs after it has
//           waited, so that they stay filled.
// Progress: a wait of q ends soon after it has been told (give_up.cuh), and nothing of q's call but
//           [L2] comes after that, which waits for no wait of p's. What q's blocks have begun they
//           bring to an end, which takes no longer than a call does.
// Failure:  [L2] ends after kLeaveTimeoutNs, which is far longer than that: then the peer stands
//           still (its blocks find no SM, its GPU is given to another process, a debugger holds
//           it), and may write when it goes on. The error record names it (`not_left`). The kernels
//           of a process that has died, or has left, have ended: it is not waited for, if the host
//           has said so (`gone`).
// Limits:   peers reach this device's memory with atomic operations, as over NVLink.
#ifndef JAX_EP_CUDA_SYNC_LEAVE_CUH_
#define JAX_EP_CUDA_SYNC_LEAVE_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {

// [V1], by one thread of each block that is to use a peer's addresses of the call `epoch`: what
// is_shut is asked of. The block uses them only if that is false.
__device__ inline uint64_t enter(const GroupView& g, int rank, uint64_t epoch) {
  return atom_max_relaxed_sys(&g.control->entry[slot_of(g, rank)].entered, epoch);
}

// [L1], when none of this device's blocks is in the peer's memory, or enters it in this epoch.
__device__ inline void send_left(const GroupView& g, int rank, uint64_t epoch) {
  const PeerView& peer = g.peer[rank];
  st_release_sys(&peer.control->end[peer.slot_there].epoch, epoch);
}

// Whether a peer that had entered in `epoch` has left. `num_units(b)` is how many units block b
// has, 1 in a layout, which tells of none.
template <typename NumUnits>
__device__ inline bool has_left(const GroupView& g, int slot, uint64_t epoch,
                                const NumUnits& num_units) {
  if (ld_acquire_sys(&g.control->end[slot].epoch) >= epoch) return true;
  for (uint32_t b = 0; b < gridDim.x; ++b) {
    const uint64_t all = progress_of(epoch, static_cast<uint64_t>(num_units(b)));
    if (num_units(b) > 0 && ld_acquire_sys(&g.control->progress[slot][b]) < all) return false;
  }
  return true;
}

// By all threads of the last block of a call that has failed, before it fills the outputs.
template <typename NumUnits>
__device__ __noinline__ inline void see_peers_out(const GroupView& g, const NumUnits& num_units) {
  const int r = static_cast<int>(threadIdx.x);
  const uint64_t given_up = ld_relaxed_gpu_u64(&g.control->local.broken);
  if (r < g.num_ranks && r != g.rank && given_up != kHostHasLeft) {
    const PeerView& peer = g.peer[r];
    const int slot = peer.slot_here;
    const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[slot]) + 1;
    tell_given_up(g, r, given_up);
    send_left(g, r, epoch);  // [L1]
    uint64_t entered = 0;
    if (ld_relaxed_gpu(&g.control->local.has_shown) != 0) {
      fence_acq_rel_sys();  // who finds kShut has been told, too
      entered = atom_or_relaxed_sys(&peer.control->entry[peer.slot_there].entered, kShut);  // [V2]
    }
    const uint64_t start = globaltimer_ns();
    while (may_be_inside(entered, epoch) && !has_left(g, slot, epoch, num_units)) {  // [L2]
      if (is_gone(g, slot)) break;
      if (globaltimer_ns() - start <= kLeaveTimeoutNs) continue;
      st_relaxed_sys(&g.error->not_left[slot], 1);
      break;
    }
  }
  __syncthreads();
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_LEAVE_CUH_
