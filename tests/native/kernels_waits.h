// Kernels of kernels_test's own, which wait: all else of it but kernels_pairs.cu compiles without nvcc.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_WAITS_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_WAITS_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_ep::gpu::test {

// A kernel that ends when the word is not 0, or after some seconds.
void LaunchAwait(const uint64_t* word, cudaStream_t stream);

// Whether kernels of the two streams run together.
bool KernelsRunTogether(cudaStream_t first, cudaStream_t second);

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_WAITS_H_
