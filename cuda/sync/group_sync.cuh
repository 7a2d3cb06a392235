// How the kernels of a group's ranks meet: the only place that spins, and the only one that times
// out.
//
// Protocol of a call, per pair of ranks (epoch e = calls finished by the pair + 1):
//   [S1] rank p writes its buffers' addresses to q's start mail, then releases e in it
//   [S2] q acquires e from that mail: p's stream has come to the call, so earlier users of p's
//        buffers are done, and the addresses are p's for this call
//   [E1] q releases e in p's end mail: q neither reads nor writes p's memory for this call any more
//   [E2] p acquires it from all peers, and only then ends
// Reuse: p sends e + 1 only after [E2] of e, so q has read the mail of e before it changes; flags
// only grow. Progress: [S1] and [E1] wait for nothing but resident blocks of their own kernel, so
// no cycle. Failure: a wait that exceeds the timeout sets `broken` in this device's control block
// and writes the error record; every other wait of this device then ends at once, in this and all
// later calls. Peers run into their own timeouts.
#ifndef JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
#define JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

enum class OpKind : uint32_t { kLayout, kDispatch, kCombine };

__device__ inline bool is_broken(const GroupView& g) {
  return ld_acquire_gpu(&g.control->local.broken) != 0;
}

__device__ inline void report_timeout(const GroupView& g, OpKind kind, int peer, uint32_t phase,
                                      uint64_t expected, uint64_t seen) {
  if (atomicExch(&g.control->local.broken, 1u) != 0) return;
  g.error->operation = g.operation;
  g.error->kind = static_cast<uint32_t>(kind);
  g.error->rank = g.rank;
  g.error->peer = peer;
  g.error->phase = phase;
  g.error->expected_epoch = expected;
  g.error->seen_epoch = seen;
  st_release_sys(&g.error->valid, 1);
}

// Spins until *flag >= expected, then acquires. False after a timeout, or if the group is broken.
// The spin itself is relaxed: an acquiring load empties the SM's cache each time, which starves the
// warps that work beside it.
__device__ inline bool wait_flag(const GroupView& g, OpKind kind, const uint64_t* flag,
                                 uint64_t expected, int peer, uint32_t phase) {
  uint64_t start = 0;
#ifdef JAX_EP_BREAK_ORDER
  // Negative control of the race test: after a first call, which told addresses, do not wait.
  if (phase == JAX_EP_BREAK_ORDER && ld_relaxed_sys(flag) > 0) expected = 0;
#endif
  for (uint32_t i = 0;; ++i) {
    const uint64_t seen = ld_relaxed_sys(flag);
    if (seen >= expected) {
      ld_acquire_sys(flag);
      return true;
    }
    if (i > 32) __nanosleep(32);
    if ((i & 255u) != 255u) continue;
    if (is_broken(g)) return false;
    const uint64_t now = globaltimer_ns();
    if (start == 0) start = now;
    if (now - start > g.timeout_ns) {
      report_timeout(g, kind, peer, phase, expected, seen);
      return false;
    }
  }
}

// [S1], by threads 0 .. num_ranks - 1 of one block.
__device__ inline void send_start(const GroupView& g, const uint64_t (&address)[kNumAddresses]) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  StartMail* mail = &peer.control->start[peer.slot_there];
  st_relaxed_sys(&mail->operation, g.operation);
  for (int i = 0; i < kNumAddresses; ++i) st_relaxed_sys(&mail->address[i], address[i]);
  st_release_sys(&mail->epoch, g.control->local.epoch[peer.slot_here] + 1);  // [S1]
}

// [S2], by all threads of a block: fills address[r][i] (in shared memory) for every rank, this one
// included. False if the group is broken; the same on all threads.
__device__ inline bool receive_start(const GroupView& g, OpKind kind,
                                     const uint64_t (&own)[kNumAddresses],
                                     uint64_t (*address)[kNumAddresses]) {
  bool ok = true;
  for (int r = static_cast<int>(threadIdx.x); r < g.num_ranks; r += static_cast<int>(blockDim.x)) {
    if (r == g.rank) {
      for (int i = 0; i < kNumAddresses; ++i) address[r][i] = own[i];
      continue;
    }
    const PeerView& peer = g.peer[r];
    const StartMail* mail = &g.control->start[peer.slot_here];
    const uint64_t epoch = g.control->local.epoch[peer.slot_here] + 1;
    ok = wait_flag(g, kind, &mail->epoch, epoch, r, 0) && ok;  // [S2]
    if (ok && ld_relaxed_sys(&mail->operation) != g.operation) {
      report_timeout(g, kind, r, 2, g.operation, mail->operation);
      ok = false;
    }
    for (int i = 0; i < kNumAddresses; ++i) {
      const uint64_t there = ld_relaxed_sys(&mail->address[i]);
      address[r][i] = there == 0 ? 0 : there + static_cast<uint64_t>(peer.shift);
    }
  }
  return __syncthreads_and(ok) != 0;
}

// By one thread of each block, after the block's work and __syncthreads: true in the last block.
__device__ inline bool is_last_block(const GroupView& g) {
  return atom_add_acq_rel_gpu(&g.control->local.num_blocks_done, 1) == gridDim.x - 1;
}

// [E1], by threads 0 .. num_ranks - 1 of the last block.
__device__ inline void send_end(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  __threadfence_system();
  st_release_sys(&peer.control->end[peer.slot_there].epoch,
                 g.control->local.epoch[peer.slot_here] + 1);  // [E1]
}

// [E2], likewise. False if the group is broken.
__device__ inline bool receive_end(const GroupView& g, OpKind kind) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return true;
  const PeerView& peer = g.peer[r];
  return wait_flag(g, kind, &g.control->end[peer.slot_here].epoch,
                   g.control->local.epoch[peer.slot_here] + 1, r, 1);  // [E2]
}

// The call is over for this device: by the threads that called receive_end, after it.
__device__ inline void advance_epochs(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < g.num_ranks && r != g.rank) ++g.control->local.epoch[g.peer[r].slot_here];
}

// All blocks of the grid, which must all be resident. False if the group is broken meanwhile.
__device__ inline bool grid_barrier(const GroupView& g) {
  __syncthreads();
  bool ok = true;
  if (threadIdx.x == 0) {
    atom_add_acq_rel_gpu(&g.control->local.barrier, 1);
    uint64_t start = globaltimer_ns();
    for (uint32_t i = 0; ld_relaxed_gpu(&g.control->local.barrier) < gridDim.x; ++i) {
      // Another block may have left on a broken group; it never comes here then.
      if ((i & 255u) == 255u && (is_broken(g) || globaltimer_ns() - start > 2 * g.timeout_ns)) {
        ok = false;
        break;
      }
    }
    ld_acquire_gpu(&g.control->local.barrier);
  }
  return __syncthreads_and(ok) != 0;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
