// grid: whose call a device is in, how the blocks of its grid meet, and how the last one ends it.
//
// Protocol: calls of a device follow one another on its stream, and share its counters. So that two
//           at once, which a program may only make by mistake, spoil nothing, each block takes part
//           in one word, `running`, by atomic operations:
//           [C1] a block whose call is not the running one makes it that, if there is none. If
//                there is another it marks that one (kContested), breaks the group, and its own call
//                is refused: it shows no peer anything, touches no counter, and each of its blocks
//                fills its share of the outputs. All blocks of a grid get the same answer: a call
//                that is marked never makes room for another.
//           [B]  grid barrier: all blocks are here, by one counter; a grid of one block has none.
//                A kernel may have several, which count on.
//           [C2] a block that is done counts itself, and whether it has failed. Who is the last
//                knows what all have written, and that the call has failed if a block has, if it is
//                marked, or if the group is broken by now. A block alone counts itself while some
//                of its threads still wait for the peers: nobody learns anything from that.
//           [C3] the last block of a call that went well sets the counters to 0, the epochs one
//                further, and then `running` to 0. One of a call that has failed sees the peers out
//                (leave.cuh), fills the outputs, and closes the device: the calls after it are
//                refused, until the host sets the device up anew.
// Reuse:    as calls follow one another, nothing of an earlier one is under way at [C1]. A call that
//           is replayed has the number it had before: it is taken for the running one only if not
//           all blocks of that are done.
// Progress: [C1] and [C2] wait for nothing; who uses the barrier has all its blocks resident.
// Failure:  a block that does not come to the barrier: as give_up.cuh says.
// Limits:   a refused call still raises its entries at peers ([V1], leave.cuh): one of another group
//           whose call fails then may wait out [L2]'s bound for it, and name it, for nothing.
#ifndef JAX_EP_CUDA_SYNC_GRID_CUH_
#define JAX_EP_CUDA_SYNC_GRID_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/leave.cuh"

namespace jax_ep::gpu {

// [C1], where another call has been seen to be the running one. False if this one is refused.
__device__ __noinline__ inline bool contest_call(const GroupView& g, OpKind kind, uint64_t seen) {
  uint64_t* running = &g.control->local.running;
  while ((seen & (kContested | kClosed)) == 0 &&
         atom_cas_relaxed_gpu(running, seen, seen | kContested) != seen) {
    seen = atom_cas_relaxed_gpu(running, 0, running_of(g.call));
    if (seen == 0 || is_running(seen, g.call, gridDim.x)) return true;
  }
  break_group(g, kind, slot_of(g, g.rank), kTwoAtOnce, 0, 0);
  return false;
}

// [C1], by all threads of each block, at the start. False on one of them if the call is refused: the
// others need not wait for the answer.
__device__ inline bool claim_call(const GroupView& g, OpKind kind) {
  if (threadIdx.x != kClaimer) return true;
  const uint64_t seen = atom_cas_relaxed_gpu(&g.control->local.running, 0, running_of(g.call));
  return seen == 0 || is_running(seen, g.call, gridDim.x) || contest_call(g, kind, seen);
}

// [B], by the thread of a block that has arrived, until so many have.
__device__ __noinline__ inline bool await_blocks(const GroupView& g, OpKind kind,
                                                 uint32_t expected) {
  Wait wait(g, kind);
  for (uint32_t n = 1;; ++n) {
    const uint32_t arrived = ld_acquire_gpu(&g.control->local.barrier);
    if (arrived >= expected) return true;
    if ((n & 255u) != 0) continue;
    if (!wait.may_go_on(slot_of(g, g.rank), kNotResident, expected, arrived)) return false;
  }
}

// [B], the nth of the kernel, by all blocks of the grid, which must all be resident. False if the
// group is broken meanwhile, or if a block does not come: it leaves when the group is broken, or finds
// no SM.
__device__ inline bool grid_barrier(const GroupView& g, OpKind kind, uint32_t nth = 1) {
  __syncthreads();
  if (gridDim.x == 1) return true;
  bool ok = true;
  if (threadIdx.x == 0) {
    const uint32_t arrived = atom_add_acq_rel_gpu(&g.control->local.barrier, 1) + 1;
    ok = arrived >= nth * gridDim.x || await_blocks(g, kind, nth * gridDim.x);
  }
  return __syncthreads_and(ok) != 0;
}

// What a block has to do when its work is done.
enum class Finish {
  kNotLast,  // nothing
  kEnd,      // end_call
  kFail,     // fail_call, and to fill the outputs
  kRefused,  // likewise
};

// [C2], by all threads of each block, after the block's work, which has gone well if `ok` on all of
// them. `is_claimed` is what claim_call said. In a grid of one block it is under way while threads
// still come.
__device__ inline Finish finish_block(const GroupView& g, OpKind kind, bool is_claimed, bool ok) {
  __shared__ Finish finish;
  const bool is_alone = gridDim.x == 1;
  if (!is_alone && __syncthreads_and(ok) == 0) {
    ok = false;
    fence_acq_rel_sys();  // [L1] releases what has been written at peers; else [P1] has done so
    __syncthreads();
  }
  if (threadIdx.x == kClaimer && !is_claimed) {
    finish = Finish::kRefused;
  } else if (threadIdx.x == kClaimer) {
    const uint64_t one = kOneDone + (ok ? 0 : kOneFailed);
    uint64_t* word = &g.control->local.running;
    // A block alone has nobody's writes to learn of, and no one who learns of its.
    const uint64_t running =
        one + (is_alone ? atom_add_relaxed_gpu(word, one) : atom_add_acq_rel_gpu(word, one));
    finish = num_done(running) != gridDim.x ? Finish::kNotLast
             : has_failed(running)          ? Finish::kFail
                                            : Finish::kEnd;
    if ((running & kContested) != 0) {
      break_group(g, kind, slot_of(g, g.rank), kTwoAtOnce, 0, 0);
    }
  } else if (threadIdx.x == kLooker) {
    ok = ok && !is_broken(g, kind);  // meanwhile
  }
  const bool is_good = __syncthreads_and(ok) != 0;
  if (is_alone && !is_good) {
    fence_acq_rel_sys();  // likewise
    __syncthreads();
  }
  return finish == Finish::kEnd && !is_good ? Finish::kFail : finish;
}

// [C3] of a call that went well: by all threads of the last block, after all else.
__device__ inline void end_call(const GroupView& g) {
  Local& local = g.control->local;
  const int r = static_cast<int>(threadIdx.x);
  if (r < g.num_ranks) red_add_relaxed_gpu(&local.epoch[slot_of(g, r)], 1);  // waits for no load
  if (r == 0) {
    local.barrier = 0;
    local.num_taken = 0;
    local.has_shown = 0;
  }
  __syncthreads();
  // Not if it has been marked by now. No release: who follows on the stream sees it all.
  const uint64_t all_done = running_of(g.call) + gridDim.x * kOneDone;
  if (r == 0) atom_cas_relaxed_gpu(&local.running, all_done, 0);
}

// The part of the outputs that a block fills.
struct Share {
  uint32_t index, count;
};

// [C3] of one that has failed or was refused, but for filling the outputs, which comes next: by all
// threads of the block. `num_units` as in leave.cuh.
template <typename NumUnits>
__device__ inline Share fail_call(const GroupView& g, Finish finish, const NumUnits& num_units) {
  if (finish == Finish::kRefused) return {blockIdx.x, gridDim.x};
  see_peers_out(g, num_units);
  if (threadIdx.x == 0) atom_or_relaxed_sys(&g.control->local.running, kClosed);
  return {0, 1};
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GRID_CUH_
