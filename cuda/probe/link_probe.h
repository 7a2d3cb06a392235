// What the benchmark measures its bounds with: copies whose rate is the link's or the memory's, and
// the time a flag takes from one GPU to another. Not part of any operation.
#ifndef JAX_EP_CUDA_PROBE_LINK_PROBE_H_
#define JAX_EP_CUDA_PROBE_LINK_PROBE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_ep::gpu {

// Set to 1 in a probe's status by a kernel whose wait timed out.
inline constexpr uint32_t kProbeTimedOut = 1;

struct ProbeCopy {
  const void* src;      // [num_rows, row_bytes], on this device or a peer
  void* dst;            // [num_copies, num_rows, row_bytes], likewise
  int64_t num_rows;     // at least 1
  int32_t row_bytes;    // a multiple of 16, at most kMaxProbeRowBytes
  int32_t num_copies;   // F: each row is loaded once and stored this many times, maybe 0
  int32_t num_rounds;   // the whole is copied this often in one launch
  uint32_t* status;     // of this device
  uint64_t timeout_ns;  // of each wait
};
inline constexpr int32_t kMaxProbeRowBytes = 16384;

struct ProbeFlagHop {
  uint64_t* own_flag;       // on this device, 0 before the launch
  uint64_t* peer_flag;      // on the peer, likewise
  uint64_t* nanoseconds;    // on this device: what num_round_trips took
  int32_t num_round_trips;  // the same on both devices
  bool begins;              // true on exactly one of the two
  uint32_t* status;         // of this device
  uint64_t timeout_ns;      // of each wait
};

// On the current device, with `num_sms` blocks of one SM each.
cudaError_t LaunchProbeCopy(const ProbeCopy& arguments, int num_sms, cudaStream_t stream);
// On both devices, each with the other's flag; they wait for each other.
cudaError_t LaunchProbeFlagHop(const ProbeFlagHop& arguments, cudaStream_t stream);

// Loads both kernels on the current device.
cudaError_t PrepareProbes();

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_PROBE_LINK_PROBE_H_
