#include "tests/native/check_cuda.h"
#include "tests/native/kernels_waits.h"

namespace jax_ep::gpu::test {
namespace {

__global__ void Await(const volatile uint64_t* word) {
  const long long start = clock64();
  while (*word == 0 && clock64() - start < (1ll << 34)) {
  }
}

__global__ void AwaitAndTell(const volatile int* flag, int* seen) {
  const long long start = clock64();
  while (*flag == 0 && clock64() - start < (1ll << 32)) {
  }
  *seen = *flag;
}

__global__ void Set(volatile int* flag) { *flag = 1; }

}  // namespace

void LaunchAwait(const uint64_t* word, cudaStream_t stream) {
  Await<<<1, 1, 0, stream>>>(word);
  CHECK_CUDA(cudaGetLastError());
}

bool KernelsRunTogether(cudaStream_t first, cudaStream_t second) {
  int* flag_and_seen;
  CHECK_CUDA(cudaMalloc(&flag_and_seen, 2 * sizeof(int)));
  CHECK_CUDA(cudaMemset(flag_and_seen, 0, 2 * sizeof(int)));
  CHECK_CUDA(cudaDeviceSynchronize());
  cudaFuncAttributes attributes;  // loads them: no launch waits for that
  CHECK_CUDA(cudaFuncGetAttributes(&attributes, AwaitAndTell));
  CHECK_CUDA(cudaFuncGetAttributes(&attributes, Set));
  AwaitAndTell<<<1, 1, 0, first>>>(flag_and_seen, flag_and_seen + 1);
  Set<<<1, 1, 0, second>>>(flag_and_seen);
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaDeviceSynchronize());
  int seen;
  CHECK_CUDA(cudaMemcpy(&seen, flag_and_seen + 1, sizeof seen, cudaMemcpyDeviceToHost));
  CHECK_CUDA(cudaFree(flag_and_seen));
  return seen == 1;
}

}  // namespace jax_ep::gpu::test
