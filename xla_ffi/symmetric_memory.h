// The only part that knows how one GPU's memory becomes another's: peer access, IPC and VMM
// handles.
//
// Control memory: one block a device, allocated once, before any program runs. Payload has no
// buffer of its own: kernels read and write XLA's buffers in the peers. In one process an address
// is valid on every device once access is set for its allocation. Between processes each process
// exports XLA's pool (VMM handles as file descriptors) and the others map it; an address of the
// owner is then valid here after adding a constant.
#ifndef JAX_EP_XLA_FFI_SYMMETRIC_MEMORY_H_
#define JAX_EP_XLA_FFI_SYMMETRIC_MEMORY_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace jax_ep {

class SymmetricMemory {
 public:
  // The process's devices. Never destroyed; Release frees what it holds.
  static SymmetricMemory& Get();

  // Allocates control memory on these CUDA devices, enables access between them and loads all
  // kernels. `process` is this process's number, `ids` are JAX's numbers of the devices. Repeating
  // it does nothing. Throws std::runtime_error naming the device and the call that failed.
  void Setup(int64_t process, const std::vector<int>& ids, const std::vector<int>& ordinals);

  // What other processes need to reach this one's devices: a text. `pool_pointers[i]` is an address
  // inside XLA's memory pool on the i-th device of Setup.
  std::string Export(const std::vector<uint64_t>& pool_pointers);

  // Maps the devices of all other processes; `exports` by process.
  void Import(const std::vector<std::string>& exports);

  // Unmaps and frees all. No program of ours may be running.
  void Release();

  // Fills what a kernel on `ordinal` needs to know of the members (process << 32 | id), by
  // rank. An error text if a member cannot be reached.
  std::optional<std::string> FillGroup(const int64_t* members, int num_ranks, int ordinal,
                                       gpu::GroupView* view);

  // Makes a buffer of device `ordinal` reachable for the other devices; an error text if they
  // cannot. Cheap after the first call for an allocation.
  std::optional<std::string> Share(int ordinal, const void* pointer, size_t bytes);

  // process << 32 | id of a device of this process, or -1.
  int64_t Member(int ordinal);

  // The first error that a kernel has recorded, if any, in words.
  std::optional<std::string> RecordedError();

 private:
  struct Device {
    int ordinal = -1;
    int64_t member = -1;  // process << 32 | id
    gpu::ControlBlock* control = nullptr;
    gpu::ErrorRecord* error = nullptr;  // host address
    gpu::ErrorRecord* error_on_device = nullptr;
    std::map<uint64_t, uint64_t> shared;  // allocations that peers reach: begin -> end
  };
  struct RemoteDevice {
    std::map<int, gpu::ControlBlock*> control;  // by local ordinal
    int64_t shift = 0;
    void* mapped = nullptr;
    size_t mapped_bytes = 0;
  };

  Device* FindLocal(int ordinal);
  void AssignSlots();

  std::mutex mutex_;
  int64_t process_ = 0;
  std::vector<Device> devices_;
  std::map<int64_t, RemoteDevice> remote_;  // by member
  std::map<int64_t, int> slot_;             // of every device, by member
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_SYMMETRIC_MEMORY_H_
