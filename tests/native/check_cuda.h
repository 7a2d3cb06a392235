// CHECK_CUDA, for programs: ends them, exit code 1, if a call of the CUDA runtime fails.
#ifndef JAX_EP_TESTS_NATIVE_CHECK_CUDA_H_
#define JAX_EP_TESTS_NATIVE_CHECK_CUDA_H_

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK_CUDA(call)                                        \
  do {                                                          \
    const cudaError_t status_of_call = (call);                  \
    if (status_of_call != cudaSuccess) {                        \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                  cudaGetErrorString(status_of_call));          \
      std::exit(1);                                             \
    }                                                           \
  } while (0)

#endif  // JAX_EP_TESTS_NATIVE_CHECK_CUDA_H_
