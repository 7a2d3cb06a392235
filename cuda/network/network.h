// The seam of the part that knows NVSHMEM: what its host code passes to its kernels.
#ifndef JAX_EP_CUDA_NETWORK_NETWORK_H_
#define JAX_EP_CUDA_NETWORK_NETWORK_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace jax_ep::gpu {

// Whether rows arrive (cuda/network/link_check.cuh).
inline constexpr int kLinkRowBytes = 1024;
inline constexpr int kLinkThreads = 512;
constexpr size_t link_check_bytes(int num_ranks) {
  return size_t{2} * static_cast<size_t>(num_ranks) * kLinkRowBytes;
}

enum LinkResult : uint32_t {
  kLinkUnknown,  // the kernel has not come to it
  kLinkGood,
  kLinkSilent,  // no row came
  kLinkWrong,   // the signal came before its row, or the row is another
};

struct LinkCheck {
  char* bytes;          // link_check_bytes(num_ranks), of the hop's memory
  uint64_t* signals;    // [num_ranks], of the hop's memory
  LinkResult* results;  // [num_ranks], by rank
  uint64_t round;
  uint64_t timeout_ns;
  int32_t rank, num_ranks;
};

// Over NVSHMEM.
cudaError_t LaunchLinkCheck(const LinkCheck& check, cudaStream_t stream);

// Loads the kernels on the current device: their first launch must not be while a peer waits.
cudaError_t PrepareNetworkKernels();

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_NETWORK_H_
