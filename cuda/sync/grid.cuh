// grid: the blocks of one kernel meet, and its last one ends the call.
//
// Protocol: a barrier that all blocks of a grid reach, by one counter; and a counter of blocks that
//           have done their work: who adds the last one knows what all have written, and whether all
//           went well.
// Reuse:    end_call, by the last block, sets the counters to 0 and the epochs one further; calls of
//           a device follow one another.
// Progress: who uses the barrier has all its blocks resident.
// Failure:  a block that does not come to the barrier: as give_up.cuh says.
#ifndef JAX_EP_CUDA_SYNC_GRID_CUH_
#define JAX_EP_CUDA_SYNC_GRID_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {

// All blocks of the grid, which must all be resident. False if the group is broken meanwhile, or if
// a block does not come: it leaves when the group is broken, or finds no SM.
__device__ inline bool grid_barrier(const GroupView& g, OpKind kind) {
  __syncthreads();
  bool ok = true;
  if (threadIdx.x == 0) {
    uint32_t* barrier = &g.control->local.barrier;
    uint32_t come = atom_add_acq_rel_gpu(barrier, 1) + 1;
    uint64_t start = 0;
    for (uint32_t n = 1; ok && come < gridDim.x; ++n) {
      come = ld_acquire_gpu(barrier);
      if ((n & 255u) == 0) {
        ok = may_wait(g, kind, g.rank, kNotResident, gridDim.x, come, start);
      }
    }
  }
  return __syncthreads_and(ok) != 0;
}

// What the last block of a grid has to do.
enum class Finish { kNotLast, kEnd, kFail };

// By all threads of each block, after the block's work, which has gone well if `ok` on all of them.
__device__ inline Finish finish_block(const GroupView& g, bool ok) {
  constexpr uint32_t kFailed = 1u << 16;
  __shared__ Finish finish;
  const bool all_ok = __syncthreads_and(ok) != 0;
  if (threadIdx.x == 0) {
    const uint32_t one = all_ok ? 1 : 1 + kFailed;
    const uint32_t sum = atom_add_acq_rel_gpu(&g.control->local.num_blocks_done, one) + one;
    finish = sum % kFailed != gridDim.x ? Finish::kNotLast
             : sum < kFailed            ? Finish::kEnd
                                        : Finish::kFail;
  }
  __syncthreads();
  return finish;
}

// The call is over for this device: by all threads of the last block, after all else. The next
// kernel finds the counters at 0.
__device__ inline void end_call(const GroupView& g) {
  __syncthreads();
  Local& local = g.control->local;
  const int r = static_cast<int>(threadIdx.x);
  if (r < g.num_ranks) ++local.epoch[g.peer[r].slot_here];
  if (r == 0) {
    local.num_blocks_done = 0;
    local.barrier = 0;
    local.num_taken = 0;
    local.running = 0;
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GRID_CUH_
