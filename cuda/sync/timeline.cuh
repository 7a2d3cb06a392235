// A timeline of each block, for development: in builds with JAX_EP_TIMELINE. Without it all of this
// is empty, and kernels have no instruction of it.
//
//   timeline::begin();                             by all threads of a block, before all else
//   timeline::mark(Role::kMessenger, Event::kP1);  by any threads of a warp, as one; marks of the
//                                                  same role and event by several warps add up
//   timeline::mark_first(Role::kSender, Event::kLoad);  likewise, where only the first time counts
//   timeline::end(g, kind);                        by all threads of a block, when its work is done
//
// Marks go to shared memory, so that they hold nobody up for long; `end` writes them to this
// device's control block, over those of the operation's call before.
#ifndef JAX_EP_CUDA_SYNC_TIMELINE_CUH_
#define JAX_EP_CUDA_SYNC_TIMELINE_CUH_

#include "cuda/launch.h"
#include "cuda/memory/timeline.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu::timeline {

#ifndef JAX_EP_TIMELINE

__device__ inline void begin() {}
__device__ inline void mark(Role, Event) {}
__device__ inline void mark_first(Role, Event) {}
template <typename Kind>
__device__ inline void end(const GroupView&, Kind) {}

#else

__device__ inline BlockTimeline& of_block() {
  __shared__ BlockTimeline block;
  return block;
}

__device__ inline void mark(Role role, Event event) {
  // One of the threads that are here.
  if (__ffs(static_cast<int>(__activemask())) - 1 != static_cast<int>(threadIdx.x) % 32) return;
  BlockTimeline& block = of_block();
  Mark& mark = block.mark[static_cast<int>(role)][static_cast<int>(event)];
  const auto now = static_cast<uint32_t>(globaltimer_ns() - block.start_ns);
  atomicMin(&mark.first, now);
  atomicMax(&mark.last, now);
  atomicAdd(&mark.total, now);
  atomicAdd(&mark.count, 1u);
}

__device__ inline void mark_first(Role role, Event event) {
  const volatile Mark& noted = of_block().mark[static_cast<int>(role)][static_cast<int>(event)];
  if (noted.count == 0) mark(role, event);
}

__device__ inline void begin() {
  BlockTimeline& block = of_block();
  Mark* marks = &block.mark[0][0];
  for (auto i = threadIdx.x; i < kNumRoles * kNumEvents; i += blockDim.x) {
    marks[i] = {UINT32_MAX, 0, 0, 0};
  }
  if (threadIdx.x == 0) block.start_ns = globaltimer_ns();
  __syncthreads();
  if (threadIdx.x == 0) mark(Role::kBlock, Event::kStart);
}

template <typename Kind>
__device__ inline void end(const GroupView& g, Kind kind) {
  __syncthreads();
  if (threadIdx.x == 0) mark(Role::kBlock, Event::kEnd);
  __syncthreads();
  const BlockTimeline& block = of_block();
  auto& call = g.control->timeline[static_cast<int>(kind)];
  BlockTimeline& to = call.block[blockIdx.x];
  for (auto i = threadIdx.x; i < kNumRoles * kNumEvents; i += blockDim.x) {
    (&to.mark[0][0])[i] = (&block.mark[0][0])[i];
  }
  if (threadIdx.x == 0) to.start_ns = block.start_ns;
  if (threadIdx.x == 0 && blockIdx.x == 0) call.num_blocks = gridDim.x;
}

#endif

}  // namespace jax_ep::gpu::timeline

#endif  // JAX_EP_CUDA_SYNC_TIMELINE_CUH_
