// wire: a network in software for NVSHMEM's own UCX plugin, for tests where there is no NIC.
//
// The plugin links libucp.so.0. This is one, with just what the plugin calls (ucp.cc), so that NVSHMEM
// runs unmodified, device code, proxy channel, proxy thread and plugin, over a network that is as bad as
// it may be:
//   - a put travels in fragments, each with a random delay, on any of several streams
//   - its source is read when a fragment leaves
//   - nothing is ordered but by a fence or a flush; atomics, by which signals come, overtake puts
// GPU memory of other processes is written through CUDA IPC by the copy engine, so the heap must be one
// allocation (NVSHMEM_DISABLE_CUDA_VMM=1); host memory through process_vm_writev. All that CUDA might let
// wait for a kernel is made when the wire starts, for kernels wait for what it brings.
//
// Environment:
//   WIRE_FOLDER       where processes find each other's keys: an empty folder, the same for all
//   WIRE_DELAY_US     of a fragment: a quarter to five quarters of it, one in 16 four times that; atomics
//                     have none. 0 (the default): all leave in order
//   WIRE_FRAGMENT     bytes; 0 (the default): a put travels whole
//   WIRE_FENCE        all (the default): what follows a fence waits for all before it, as UCX says
//                     atomics: only atomics and flags do: a put with signal keeps its promise, two puts
//                     are in no order
//   WIRE_NEWEST_FIRST 1: of the fragments that may leave, the newest does
//   WIRE_SEED
#ifndef JAX_EP_TESTS_NATIVE_WIRE_WIRE_H_
#define JAX_EP_TESTS_NATIVE_WIRE_WIRE_H_

#include <pthread.h>
#include <sys/types.h>
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/wire/driver.h"

namespace jax_ep::wire {

// Memory that a process has registered, as it is sent to the others.
struct Key {
  pid_t process;
  bool is_device;
  uint64_t begin, num_bytes;
  uint64_t allocation;  // that has it, and its handle, if it is a device's
  CUipcMemHandle handle;
};

// What the plugin holds while something is on its way.
struct Request {
  std::atomic<ucs_status_t> status{UCS_INPROGRESS};
  int num_left = 0;       // of its operations
  uint64_t flush_to = 0;  // of a flush: done when no operation of at most this number is left
  ucp_send_nbx_callback_t callback = nullptr;
  void* user_data = nullptr;
};

// A key as one of this process's peers uses it.
struct RemoteMemory {
  Key key;
  char* mapped;  // where the allocation is here, if it is a device's
};

enum class Transfer { kPut, kGet };

struct Atomic {
  ucp_atomic_op_t operation;
  uint64_t value, compared;
  void* reply;     // where the old value goes, if anywhere
  bool needs_old;  // for the reply, or for the new one
};

class Wire {
 public:
  // Of this process. Never destroyed.
  static Wire& Get();

  void Start();
  void Stop();
  int AddPeer(pid_t process);
  // Registers memory, and lets peers map it before they use it.
  Key Publish(const void* memory, size_t num_bytes);
  // Waits until it is mapped.
  RemoteMemory Map(const Key& key);

  // `local` is read or written until the request is done, but for a flag: a small value in host memory
  // that is taken at once, which NVSHMEM's barriers wait for.
  Request* Move(Transfer transfer, int peer, const RemoteMemory& memory, uint64_t address,
                char* local, size_t num_bytes, bool is_flag, const ucp_request_param_t& parameters);
  // Without parameters nobody holds it.
  Request* Apply(const Atomic& atomic, int peer, const RemoteMemory& memory, uint64_t address,
                 size_t num_bytes, const ucp_request_param_t* parameters);
  void Fence();
  // None if nothing is on its way.
  Request* Flush(const ucp_request_param_t& parameters);
  // Calls back for all that is done; how many.
  unsigned Progress();
  // It stays readable for long: the plugin looks at requests that its callback has freed.
  void Free(Request* request);

 private:
  enum class Kind { kPut, kGet, kAtomic };
  struct Operation {
    Kind kind;
    bool is_flying, is_flag;
    int peer;
    RemoteMemory memory;
    uint64_t number, epoch, due_us;
    char *local, *remote;
    size_t num_bytes;
    Atomic atomic;
    Request* request;
    uint64_t* pinned;  // 64 bytes of its own
  };
  using Operations = std::list<Operation>;
  struct Flight {
    Operations::iterator operation;
    CUevent event;
  };
  // What a process shows the others, in a file.
  struct Shown {
    pthread_mutex_t atomics;  // of its memory
    std::atomic<int> num_keys;
    Key keys[64];
  };
  struct Mapping {
    pid_t process;
    uint64_t allocation;
    char* mapped;
  };
  struct Peer {
    pid_t process;
    Shown* shown;
    int num_mapped = 0;  // of its keys
  };

  Wire();
  Shown* Show(pid_t process, bool is_own) const;
  Request* MakeRequest(const ucp_request_param_t* parameters);
  Operation& Add(std::unique_lock<std::mutex>& lock, Kind kind, int peer,
                 const RemoteMemory& memory, uint64_t address, size_t num_bytes);
  void Finish(Operations::iterator operation);
  void Complete(Request* request);
  void Run();
  void MapKeys();
  bool Land();
  bool Depart(std::unique_lock<std::mutex>& lock);
  Operations::iterator Choose(std::vector<Operations::iterator>& ready);
  bool Carry(const Operation& operation, CUevent event);
  void CarryHostMemory(const Operation& operation);
  void Execute(const Operation& operation);

  const uint64_t delay_us_, fragment_;
  const bool is_newest_first_, only_atomics_wait_;
  const std::string folder_;
  Driver& driver_;
  std::mt19937_64 random_;
  std::thread thread_;
  std::atomic<bool> is_stopped_{false};
  Shown* own_ = nullptr;
  std::vector<CUstream> streams_;
  char* bounce_ = nullptr;  // pinned
  std::vector<CUevent> events_;

  std::mutex mutex_;  // of all that follows
  std::vector<Peer> peers_;
  std::vector<Mapping> mappings_;
  Operations operations_;  // not done, in order
  std::vector<Flight> flying_;
  std::vector<uint64_t*> pinned_;  // that no operation has
  std::vector<Request*> flushes_;
  std::deque<Request*> done_, freed_;
  uint64_t number_ = 0, epoch_ = 0;
  uint64_t num_puts_ = 0, num_atomics_ = 0, num_out_of_order_ = 0;
};

}  // namespace jax_ep::wire

#endif  // JAX_EP_TESTS_NATIVE_WIRE_WIRE_H_
