// start_end: a rank lets its peers into its memory for a call, and knows when they are out of it.
//
// Protocol: per pair of ranks p and q, e = calls finished by the pair + 1:
//           [S1] p releases its buffers' addresses, each with e, in q's start mail
//           [S2] q acquires all of that mail: p's stream has come to the call, so earlier users of
//                p's buffers are done, and the addresses are p's for this call
//           [E1] layout, where q reads p's memory: q stores e in p's end mail when it needs no more
//           [E2] p acquires it from all peers, and only then ends
// Reuse:    p sends e + 1 only after it knows that every block of q that reads mails has read that
//           of e: all of them have told their last number ([P2], progress.cuh), or q has sent [E1].
//           Flags only grow.
// Progress: [S1] and [E1] wait for nothing but resident blocks of their own kernel, so no cycle.
//           Calls of a device follow one another, in the same order on all ranks.
// Failure:  the waits end as give_up.cuh says.
#ifndef JAX_EP_CUDA_SYNC_START_END_CUH_
#define JAX_EP_CUDA_SYNC_START_END_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/address.cuh"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {

// [S1], by all threads of one block.
__device__ inline void send_start(const GroupView& g, OpKind kind,
                                  const uint64_t (&address)[kNumAddresses]) {
  if (threadIdx.x == blockDim.x - 1 && atomicExch(&g.control->local.running, 1u) != 0) {
    break_group(g, kind, g.rank, kTwoAtOnce, 0, 0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < g.num_ranks * kNumShown;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r == g.rank) continue;
    const PeerView& peer = g.peer[r];
    const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
    const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
    if (broken != 0) continue;
    const uint64_t value = what == kNumAddresses ? g.operation : shown_address(g, address[what]);
    st_release_sys_b128(&peer.control->start[peer.slot_there].shown[what], value, epoch);  // [S1]
  }
}

// [S2], by all threads of a block: fills address[r][i] (in shared memory) for every rank, this one
// included. False if the group is broken; the same on all threads. The loads that may all be needed
// are under way at once.
__device__ inline bool receive_start(const GroupView& g, OpKind kind,
                                     const uint64_t (&own)[kNumAddresses],
                                     uint64_t (*address)[kNumAddresses]) {
  const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  bool ok = true;
  for (int i = static_cast<int>(threadIdx.x); i < g.num_ranks * kNumShown;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r == g.rank) {
      if (what < kNumAddresses) address[r][what] = own[what];
      continue;
    }
    const PeerView& peer = g.peer[r];
    const Shown* mail = &g.control->start[peer.slot_here].shown[what];
    const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
    uint64_t value, seen, start = 0;
    ld_acquire_sys_b128(mail, value, seen);
    for (uint32_t n = 1; ok && seen < epoch; ++n) {
      if ((n & 255u) == 0) ok = may_wait(g, kind, r, kStart, epoch, seen, start);
      ld_acquire_sys_b128(mail, value, seen);  // [S2]
    }
    if (what < kNumAddresses) {
      address[r][what] = address_here(peer, value);
    } else if (ok && value != g.operation) {
      break_group(g, kind, r, kOtherCall, g.operation, value);
      ok = false;
    }
  }
  if (broken != 0 || given_up != 0) ok = !is_broken(g, kind) && ok;
  return __syncthreads_and(ok) != 0;
}

// [E1], by all threads of one block, when no block reads peers' memory any more: what it has read
// is there, so nothing has to be released.
__device__ inline void send_end(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  st_relaxed_sys(&peer.control->end[peer.slot_there].epoch,
                 g.control->local.epoch[peer.slot_here] + 1);  // [E1]
}

// [E2], likewise. False if the group is broken: a peer that has given up before [E1] may have left
// anything to be read.
__device__ inline bool receive_end(const GroupView& g, OpKind kind) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return true;
  const PeerView& peer = g.peer[r];
  const uint64_t* flag = &g.control->end[peer.slot_here].epoch;
  const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  uint64_t start = 0, seen = ld_acquire_sys(flag);
  for (uint32_t n = 1; seen < epoch; ++n) {
    if ((n & 255u) == 0 && !may_wait(g, kind, r, kEnd, epoch, seen, start)) return false;
    seen = ld_acquire_sys(flag);  // [E2]
  }
  return given_up == 0 || !is_broken(g, kind);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_START_END_CUH_
