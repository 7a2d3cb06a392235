// start_end: a rank lets its peers into its memory for a call, and knows when they are out of it.
//
// Protocol: per pair of ranks p and q, e = calls finished by the pair + 1:
//           [S1] p releases its buffers' addresses, each with e, in q's start mail
//           [S2] q acquires all of that mail: p's stream has come to the call, so earlier users of
//                p's buffers are done, and the addresses are p's for this call. Before that it has
//                entered p's memory, [V1] (leave.cuh).
//           [E1] layout, where q reads p's memory: q stores e in p's end mail when it needs no more
//           [E2] p acquires it from all peers, and only then ends
// Reuse:    p sends e + 1 only after it knows that every block of q that reads mails has read that
//           of e: all of them have told their last number ([P2], progress.cuh), or q has sent [E1].
//           Flags only grow.
// Progress: [S1] and [E1] wait for nothing but resident blocks of their own kernel, so no cycle.
//           Calls of a device follow one another, in the same order on all ranks.
// Failure:  the waits end as give_up.cuh says. A rank whose group is broken, or whose call is refused
//           (grid.cuh), sends no mail: it tells the peers instead, also those of a group that has
//           not heard of it yet.
#ifndef JAX_EP_CUDA_SYNC_START_END_CUH_
#define JAX_EP_CUDA_SYNC_START_END_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/address.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/leave.cuh"

namespace jax_ep::gpu {

__device__ inline uint64_t next_epoch(const GroupView& g, int rank) {
  return ld_relaxed_gpu_u64(&g.control->local.epoch[slot_of(g, rank)]) + 1;
}

// In place of [S1], by all threads of one block.
__device__ __noinline__ inline void refuse_start(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  const uint64_t given_up = ld_relaxed_gpu_u64(&g.control->local.broken);
  if (r >= g.num_ranks || r == g.rank || given_up == kHostHasLeft) return;
  tell_given_up(g, r, given_up);
  // Nothing of this device is in anybody's memory any more.
  if ((ld_relaxed_gpu_u64(&g.control->local.running) & kClosed) != 0) {
    send_left(g, r, next_epoch(g, r));  // [L1]
  }
}

// [S1], by all threads of one block. `is_claimed` is what claim_call said. That, the epochs, the
// look whether the group is broken, and the fence that makes the mails release what stands before
// the kernel on the stream, are under way at once.
__device__ inline void send_start(const GroupView& g, OpKind kind, bool is_claimed,
                                  const uint64_t (&address)[kNumAddresses]) {
  const int num_mails = g.num_ranks * kNumShown;
  auto i = static_cast<int>(threadIdx.x);
  if (i < num_mails) fence_acq_rel_sys();
  uint64_t epoch = i < num_mails ? next_epoch(g, i / kNumShown) : 0;
  bool may_start = is_claimed;
  if (threadIdx.x == kLooker) may_start = !is_broken(g, kind);
  if (__syncthreads_and(may_start) == 0) return refuse_start(g);
  if (threadIdx.x == kLooker) g.control->local.has_shown = 1;
  while (i < num_mails) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r != g.rank) {
      const PeerView& peer = g.peer[r];
      const uint64_t value = what == kNumAddresses ? g.operation : shown_address(g, address[what]);
      st_relaxed_sys_b128(&peer.control->start[peer.slot_there].shown[what], value, epoch);  // [S1]
    }
    i += static_cast<int>(blockDim.x);
    if (i < num_mails) epoch = next_epoch(g, i / kNumShown);
  }
}

// [S2], by a thread that has not found the mail of `epoch` there. Of an earlier one if the group is
// broken now.
__device__ __noinline__ inline Shown await_mail(const GroupView& g, OpKind kind, int slot,
                                                const Shown* mail, uint64_t epoch) {
  Wait wait(g, kind);
  for (uint32_t n = 1;; ++n) {
    Shown seen;
    ld_acquire_sys_b128(mail, seen.value, seen.epoch);
    if (seen.epoch >= epoch) return seen;
    if ((n & 255u) == 0 && !wait.may_go_on(slot, kStart, epoch, seen.epoch)) return seen;
  }
}

// By a thread that has found a peer's door shut: the peer has told why before.
__device__ __noinline__ inline void break_at_door(const GroupView& g, OpKind kind, int slot) {
  fence_acq_rel_sys();
  if (!is_broken(g, kind)) break_group(g, kind, slot, kToldByPeer, 0, slot);
}

// [S2], by all threads of a block: fills address[r][i] (in shared memory) for every rank, this one
// included. False if the group is broken or the call refused; the same on all threads. The loads and
// atomic operations that may all be needed are under way at once.
__device__ inline bool receive_start(const GroupView& g, OpKind kind, bool is_claimed,
                                     const uint64_t (&own)[kNumAddresses],
                                     uint64_t (*address)[kNumAddresses]) {
  const uint64_t broken = ld_relaxed_gpu_u64(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  bool ok = true;
  for (int i = static_cast<int>(threadIdx.x); i < g.num_ranks * kNumShown;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r == g.rank) {
      if (what < kNumAddresses) address[r][what] = own[what];
      continue;
    }
    const int slot = slot_of(g, r);
    const Shown* mail = &g.control->start[slot].shown[what];
    const uint64_t epoch = next_epoch(g, r);
    const uint64_t entered = what == kNumAddresses ? enter(g, r, epoch) : 0;  // [V1]
    Shown seen;
    ld_acquire_sys_b128(mail, seen.value, seen.epoch);  // [S2]
    if (ok && seen.epoch < epoch) seen = await_mail(g, kind, slot, mail, epoch);
    ok = ok && seen.epoch >= epoch;
    if (is_shut(entered)) {
      ok = false;
      break_at_door(g, kind, slot);
    }
    if (what < kNumAddresses) {
      address[r][what] = address_here(g.peer[r], seen.value);
    } else if (ok && seen.value != g.operation) {
      break_group(g, kind, slot, kOtherCall, g.operation, seen.value);
      ok = false;
    }
  }
  if ((broken | given_up) != 0) {
    ok = false;
    if (broken == 0) break_as_told(g, kind, given_up);
  }
  return __syncthreads_and(ok && is_claimed) != 0;
}

// What a thread sends with [E1]: asked for before, it need not be waited for then.
__device__ inline uint64_t end_epoch(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  return r < g.num_ranks ? next_epoch(g, r) : 0;
}

// [E1], by all threads of one block, when no block reads peers' memory any more. What has been read
// is there, and has been counted, so nothing has to be released, which would take 0.5 us.
__device__ inline void send_end(const GroupView& g, uint64_t epoch) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  st_relaxed_sys(&peer.control->end[peer.slot_there].epoch, epoch);  // [E1]
}

// [E2], by a thread that has not found the mail of `epoch` there.
__device__ __noinline__ inline bool await_end(const GroupView& g, OpKind kind, int slot,
                                              uint64_t epoch) {
  Wait wait(g, kind);
  for (uint32_t n = 1;; ++n) {
    const uint64_t seen = ld_acquire_sys(&g.control->end[slot].epoch);
    if (seen >= epoch) return true;
    if ((n & 255u) == 0 && !wait.may_go_on(slot, kEnd, epoch, seen)) return false;
  }
}

// [E2], likewise. False if the group is broken.
__device__ inline bool receive_end(const GroupView& g, OpKind kind) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return true;
  const int slot = slot_of(g, r);
  const uint64_t epoch = next_epoch(g, r);
  const uint64_t seen = ld_acquire_sys(&g.control->end[slot].epoch);  // [E2]
  return seen >= epoch || await_end(g, kind, slot, epoch);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_START_END_CUH_
