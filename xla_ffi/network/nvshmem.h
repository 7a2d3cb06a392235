// NVSHMEM in this process: the only host code that calls it.
//
// NVSHMEM's own start and end are collective, have no timeout, and end the process where they are
// used otherwise than it expects. So every call here first looks whether NVSHMEM would do that, and
// throws instead; and Start, CheckLinks and Finalize are called on threads that can be left behind
// (module.cc), after all processes have agreed to (jax_ep/nvshmem.py).
//
// Life:     Idle -> Start -> Running -> Finalize -> Idle. A Start or Finalize that fails, or that
//           has not come to an end, leaves NVSHMEM half way: from there it cannot be started again
//           in this process (Spent). What it holds then, the end of the process releases. NVSHMEM
//           3.4.5 keeps the connections of its first start when it ends (later versions do not), so a
//           second start is of the same processes.
// Order:    Finalize waits for the device, frees what was allocated here, then lets NVSHMEM meet its
//           peers, stop its proxy thread, and unregister and free the heap. The addresses of the heap
//           mean nothing after that, so no program that knows them may run.
// Device:   NVSHMEM has one device in a process. Its start sets CU_CTX_SYNC_MEMOPS on the primary
//           context, which XLA shares.
#ifndef JAX_EP_XLA_FFI_NETWORK_NVSHMEM_H_
#define JAX_EP_XLA_FFI_NETWORK_NVSHMEM_H_

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/network/network.h"

namespace jax_ep {

class Nvshmem {
 public:
  // Never destroyed.
  static Nvshmem& Get();

  // "3.4.5": of the headers and the device part that this was built with, and of the library that
  // has been loaded.
  static std::string BuiltVersion();
  static std::string LoadedVersion();

  // By which processes find each other: one process makes it, all start with it.
  static std::string UniqueId();

  // That a device has left, which a heap has to fit into.
  static size_t FreeBytes(int ordinal);
  // By which a device is known on its host.
  static std::string BusId(int ordinal);

  // Collective. This process is the rank-th of `num_ranks`, with this CUDA device. `region_bytes`: of
  // the region for calls (cuda/network/region.h), zero when all have come out of this; 0 for none.
  void Start(const std::string& unique_id, int rank, int num_ranks, int ordinal,
             int64_t region_bytes = 0, bool has_slots = false);

  // What handlers need of it, good until Finalize.
  gpu::NetworkPart Part();

  // Collective: sends a row to every rank and looks at what arrives, for so long. By rank.
  std::vector<gpu::LinkResult> CheckLinks(std::chrono::nanoseconds timeout);

  // Whether each rank's heap is mapped here, so that it is reached by stores.
  std::vector<bool> MappedPeers();

  // Collective. Does nothing if it is not running.
  void Finalize();

 private:
  enum class State { kIdle, kRunning, kSpent };

  void Allocate(int64_t region_bytes);
  void Free();
  void RequireRunning() const;

  std::mutex mutex_;
  State state_ = State::kIdle;
  int rank_ = 0, num_ranks_ = 0, ordinal_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t checked_ = nullptr;
  uint64_t round_ = 0;                  // of CheckLinks
  char* link_bytes_ = nullptr;          // in the symmetric heap
  uint64_t* link_signals_ = nullptr;    // likewise
  gpu::LinkResult* results_ = nullptr;  // host-mapped
  char* region_ = nullptr;              // in the symmetric heap; null without
  int64_t region_bytes_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_NETWORK_NVSHMEM_H_
