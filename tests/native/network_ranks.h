// A rank that knows its peers by a network alone: what kernels need of a group, of which it is the
// only member, so that its waits end as those of any call (cuda/sync/give_up.cuh).
#ifndef JAX_EP_TESTS_NATIVE_NETWORK_RANKS_H_
#define JAX_EP_TESTS_NATIVE_NETWORK_RANKS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/launch.h"
#include "tests/native/check_cuda.h"

namespace jax_ep::gpu::test {

class LoneRank {
 public:
  explicit LoneRank(uint64_t timeout_ns) : timeout_ns_(timeout_ns) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK_CUDA(cudaMalloc(&control_, sizeof(ControlBlock)));
    CHECK_CUDA(cudaMalloc(&epoch_, sizeof *epoch_));
    CHECK_CUDA(cudaMemset(epoch_, 0, sizeof *epoch_));
    CHECK_CUDA(cudaMalloc(&has_told_, sizeof *has_told_));
    CHECK_CUDA(cudaMemset(has_told_, 0, sizeof *has_told_));
    CHECK_CUDA(cudaHostAlloc(&error_, sizeof(ErrorRecord), cudaHostAllocMapped));
    Clear();
  }
  ~LoneRank() {
    cudaStreamDestroy(stream_);
    cudaFree(control_);
    cudaFree(epoch_);
    cudaFree(has_told_);
    cudaFreeHost(error_);
  }
  LoneRank(const LoneRank&) = delete;
  LoneRank& operator=(const LoneRank&) = delete;

  // Between calls: as after a new beginning, but for the epoch.
  void Clear() {
    CHECK_CUDA(cudaMemset(control_, 0, sizeof(ControlBlock)));
    std::memset(static_cast<void*>(error_), 0, sizeof(ErrorRecord));
    error_->arrival_timeout_ns = error_->progress_timeout_ns = timeout_ns_;
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  // For the next call, of a group of the network's ranks, whose words for failures are given.
  GroupView View(const NodesView& nodes = {}) {
    GroupView view{};
    view.nodes = nodes;
    view.nodes.has_told = has_told_;
    view.control = control_;
    CHECK_CUDA(cudaHostGetDevicePointer(&view.error, error_, 0));
    view.call = ++num_calls_;
    view.num_ranks = 1;
    view.peer[0].control = control_;
    return view;
  }
  cudaStream_t stream() const { return stream_; }
  uint64_t* epoch() const { return epoch_; }  // of NetworkView
  const ErrorRecord& error() const { return *error_; }

 private:
  const uint64_t timeout_ns_;
  cudaStream_t stream_ = nullptr;
  ControlBlock* control_ = nullptr;
  uint64_t* epoch_ = nullptr;
  uint64_t* has_told_ = nullptr;
  ErrorRecord* error_ = nullptr;
  uint64_t num_calls_ = 0;
};

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_NETWORK_RANKS_H_
