// A copy by a warp, in this device's memory or to a peer's that is mapped here.
#ifndef JAX_EP_CUDA_NETWORK_WARP_COPY_CUH_
#define JAX_EP_CUDA_NETWORK_WARP_COPY_CUH_

#include <cstdint>

namespace jax_ep::gpu {

// Bytes and addresses are multiples of 16.
__device__ inline void copy_by_warp(char* to, const char* from, int64_t num_bytes) {
  constexpr int kAtOnce = 8;
  auto* out = reinterpret_cast<uint4*>(to);
  const auto* in = reinterpret_cast<const uint4*>(from);
  const int64_t size = num_bytes / 16;
  for (int64_t i = threadIdx.x % 32; i < size; i += kAtOnce * 32) {
    uint4 vector[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j * 32 < size) vector[j] = in[i + j * 32];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j * 32 < size) out[i + j * 32] = vector[j];
    }
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_WARP_COPY_CUH_
