// What the kernel files share besides the protocol.
#ifndef JAX_EP_CUDA_DIRECT_KERNELS_CUH_
#define JAX_EP_CUDA_DIRECT_KERNELS_CUH_

#include <cstdint>

#include "cuda/core/placement.h"
#include "cuda/launch.h"
#include "cuda/sync/grid.cuh"

namespace jax_ep::gpu {

cudaError_t PrepareLayout();
cudaError_t PrepareDispatch();
cudaError_t PrepareCombine();
cudaError_t PrepareLayoutAndDispatchInSlots();
cudaError_t PrepareCombineInSlots();

// Loads a kernel on the current device and allows it `shared_bytes` of dynamic shared memory.
template <typename Kernel>
cudaError_t PrepareKernel(Kernel kernel, int64_t shared_bytes) {
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// Of the units i, i + n, i + 2 n, .. below num_units: how many there are.
__device__ inline int32_t num_steps(int32_t num_units, uint32_t i, uint32_t n) {
  const auto first = static_cast<int32_t>(i), stride = static_cast<int32_t>(n);
  return num_units <= first ? 0 : (num_units - first + stride - 1) / stride;
}

// Blocks have equal shares of the units, in order: neighbours share metadata.
__device__ inline int32_t first_unit(int64_t num_units, uint32_t block) {
  return static_cast<int32_t>(num_units * block / gridDim.x);
}

inline constexpr uint32_t kNan = ~0u;  // in every float type

// Sets a share of the words, in a call that has failed: by all threads of a block. `num_bytes` is a
// multiple of 4.
__device__ __noinline__ inline void fill(void* buffer, int64_t num_bytes, uint32_t word,
                                         const Share& share) {
  auto* words = static_cast<uint32_t*>(buffer);
  const int64_t stride = int64_t{share.count} * blockDim.x;
#pragma unroll 1
  for (int64_t i = int64_t{share.index} * blockDim.x + threadIdx.x; i < num_bytes / 4;
       i += stride) {
    words[i] = word;
  }
}

// A block's share of tables of no rows.
__device__ __noinline__ inline void fill_without_rows(const LayoutArguments& a, int num_ranks,
                                                      const Share& share) {
  const auto fill_all = [&](int32_t* table, int64_t size, int32_t value) {
    fill(table, size * int64_t{sizeof value}, static_cast<uint32_t>(value), share);
  };
  fill_all(a.send_row, a.num_tokens * a.top_k, kNoRow);
  fill_all(a.recv_src, a.room.capacity, kNoSource);
  fill_all(a.recv_order, a.room.capacity, kNoSource);
  fill_all(a.recv_offsets, num_ranks * a.num_tokens + 1, 0);
  const int num_local = static_cast<int>(a.num_experts) / num_ranks;
  fill_all(a.group_sizes, num_local, 0);
  fill_all(a.expert_counts, num_local, 0);
  fill_all(a.expert_load, a.num_experts, 0);
  fill_all(a.counters, 3, 0);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_DIRECT_KERNELS_CUH_
