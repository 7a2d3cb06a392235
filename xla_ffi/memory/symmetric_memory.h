// The only part that knows how one GPU's memory becomes another's: peer access and VMM handles.
//
// A device has allocations of its own, which every peer maps: control memory, and, where they are asked
// for, slots, at the addresses behind it (cuda/memory/slots.h), and a staging region. Payload needs
// no copy where peers reach XLA's buffers: in one process an address is valid on every device once
// access is set for its allocation; between processes each exports XLA's pool and the others map it,
// and an address of the owner is then valid here after adding a constant. A buffer that peers cannot
// reach is staged: its owner's call uses the staging region in its place (xla_ffi/cuda/call_site.cc)
// and shows that to the peers.
//
// Lifetimes: memory that is shared between processes lives until the last of them has unmapped it,
// so nobody who leaves, or dies, pulls it from under another's kernels. Of a device's own allocations
// control memory and the staging region are kept until the process ends: a captured command buffer
// holds their addresses, and may be replayed after Release without a call of ours on the host. Such
// a call finds in control memory that it may not touch slots; they are kept only where calls may
// use them again, for the next Setup of a process that is alone.
#ifndef JAX_EP_XLA_FFI_MEMORY_SYMMETRIC_MEMORY_H_
#define JAX_EP_XLA_FFI_MEMORY_SYMMETRIC_MEMORY_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "xla_ffi/memory/mapping.h"
#include "xla_ffi/memory/peer_process.h"
#include "xla_ffi/memory/sharing.h"
#include "xla_ffi/timeouts.h"

namespace jax_ep {

struct StagingRegion {
  uint64_t begin = 0;
  size_t bytes = 0;
};

class SymmetricMemory {
 public:
  // The process's devices. Never destroyed.
  static SymmetricMemory& Get();

  // Allocates control memory and slots on these CUDA devices, enables access between them and loads
  // all kernels. `process` is this process's number of `num_processes`, `ids` are JAX's numbers of
  // the devices. If they are set up already only the staging regions grow to `staging_bytes`, where
  // they are smaller; calls may be on their way to the devices. With `staged_only` all buffers that
  // peers touch are staged. `slot_bytes`: of the slots of each device; 0 for none. If a device has not
  // so much memory left no device gets slots, unless `requires_slots`. Throws std::runtime_error
  // naming the device and the call that failed, or if slots of another size are there already;
  // nothing has changed then.
  void Setup(int64_t process, int64_t num_processes, const std::vector<int>& ids,
             const std::vector<int>& ordinals, size_t staging_bytes, bool staged_only,
             size_t slot_bytes = 0, bool requires_slots = true);

  // What other processes need to reach this one's devices: a text, good until CloseDescriptors.
  // `pool_pointers[i]` is an address inside XLA's memory pool on the i-th device of Setup, and has
  // to stay allocated until Release. Where peers could not map the pool, the device needs a staging
  // region: without one std::runtime_error says what to do.
  std::string Export(const std::vector<uint64_t>& pool_pointers);

  // Maps the devices of all other processes; `exports` by process, empty from one without devices. If
  // one of them has no memory for slots none has slots afterwards, unless one requires them.
  void Import(const std::vector<std::string>& exports);

  // Everybody has imported.
  void CloseDescriptors();

  // Until Release, of a job with a network: how errors name other nodes' devices. The hosts by process;
  // of the group across nodes the members, by rank.
  void SetHosts(std::vector<std::string> hosts);
  void SetGroupAcrossNodes(std::vector<int64_t> members);

  // Until Release this process's kernels, those that wait already too, wait for others no longer.
  void EndOwnWaits();

  // Waits until the devices have no work left; false if that takes longer, and the next call goes
  // on with the same wait.
  bool Synchronize(std::chrono::nanoseconds timeout);

  // Leaves the group: a call that comes later fails, on the host or, replayed, on the device. No
  // call may be on its way to a device. In this order: tells the devices, unmaps the peers, closes
  // the descriptors. If the devices have not come to an end the peers stay mapped, and are not told
  // that this process has left: its kernels may still write to them.
  void Release(bool devices_have_ended);

  // Holds for calls that wait already, too.
  void SetTimeouts(const Timeouts& timeouts);

  // Fills what a kernel on `ordinal` needs to know of the members (process << 32 | id), by
  // rank, and where that device's staging region is. An error text if a member cannot be reached.
  std::optional<std::string> FillGroup(const int64_t* members, int num_ranks, int ordinal,
                                       gpu::GroupView* view, StagingRegion* staging);

  // Makes a buffer of device `ordinal` reachable for the devices of this process, and of the others
  // if there are any in the group; why they cannot reach it otherwise. Cheap after the first call
  // for an allocation (see SharedAllocations).
  std::optional<std::string> Share(int ordinal, const void* pointer, size_t bytes,
                                   bool with_other_processes);

  // process << 32 | id of a device of this process, or -1 if it is not set up.
  int64_t Member(int ordinal);

  // Of a device of this process, or null if it is not set up.
  const gpu::ControlBlock* Control(int ordinal);

  // To be called now and then. Looks after the other processes: when one of them has died, kernels
  // that wait end at once; when one has left, those that wait for it. Returns what the user should
  // hear of, in words, each once: a death, who has waited for whom for 30 s, and that a layout has
  // had ids without an expert.
  std::vector<std::string> Watch(
      std::chrono::steady_clock::time_point now = std::chrono::steady_clock::now());

  // Of processes of other nodes this one sees nothing. For which of them devices have waited for a second;
  // and that one has left, as it has told: waits for it end.
  std::vector<int64_t> AwaitedElsewhere();
  void TellLeft(int64_t process);

  // The first error that a kernel has recorded since Setup, if any, in words, with all devices that
  // may yet write to one of this process.
  std::optional<std::string> RecordedError();

  // If there is one, what `ordinal` tells the other ranks of a call that is refused for it, since
  // no kernel will: the word for their ControlBlock::given_up, in host-mapped memory that stays.
  const uint64_t* GivenUp(int ordinal);

  // How peers reach this process's buffers, in words.
  std::string Describe();

  // Why there are no slots, in words, where they were asked for.
  std::optional<std::string> SlotsProblem();

  // GroupView::slot_area_bytes of all groups.
  uint64_t SlotAreaBytes();

 private:
  struct Device {
    int ordinal = -1;
    int64_t member = -1;  // process << 32 | id
    std::shared_ptr<Mapping> control;
    std::shared_ptr<Mapping> slots;  // null without
    size_t slot_bytes = 0;
    std::shared_ptr<Mapping> staging;  // null without
    size_t staging_bytes = 0;
    std::shared_ptr<gpu::ErrorRecord> error;  // host address
    gpu::ErrorRecord* error_on_device = nullptr;
    bool reusable = false;                  // after Release: the control memory may start again
    uint64_t pool_begin = 0, pool_end = 0;  // the part of XLA's memory that they map
    std::shared_ptr<SharedAllocations> shared;
    struct {
      uint64_t since = 0;  // as the device shows it
      std::chrono::steady_clock::time_point seen;
      bool is_told = false;
    } wait;  // the last one that Watch has seen

    gpu::ControlBlock* control_block() const {
      return reinterpret_cast<gpu::ControlBlock*>(control->begin());
    }
  };
  using MemberPair = std::pair<int64_t, int64_t>;
  struct RemoteDevice {
    std::shared_ptr<Mapping> control, slots, pool, staging;  // null: there is none
    int64_t shift = 0;  // from its pool's address there to ours
  };

  // A process's export, from its begin to its first device.
  struct ExportHeader {
    int64_t pid = 0;
    int presence_fd = -1;
    size_t slot_bytes_wanted = 0, slot_bytes = 0;  // as of this class's members
    bool requires_slots = false;
  };

  Device* FindLocal(int ordinal);
  Device MakeDevice(int ordinal, int64_t member, const std::vector<int>& ordinals,
                    size_t slot_bytes);
  std::vector<Device> MakeDevices(int64_t process, const std::vector<int>& ids,
                                  const std::vector<int>& ordinals, size_t slot_bytes);
  // Throws unless the processes agree on slots. Why none may have them, or nothing.
  std::optional<std::string> AgreeOnSlots(const std::map<int64_t, ExportHeader>& headers) const;
  Timeouts TimeoutsInForce() const;
  // Throws unless there are none, or some call fits.
  static void CheckSlots(size_t slot_bytes, int num_devices);
  static std::map<int64_t, int> NumberSlots(const std::vector<Device>& devices,
                                            const std::map<int64_t, RemoteDevice>& remote);
  std::vector<int> Ordinals() const;
  // Of each device of this process; 0 without slots.
  size_t SlotBytes() const { return devices_.empty() ? 0 : devices_.front().slot_bytes; }
  std::string NameOfSlot(int slot) const;
  std::string NameOfProcess(int64_t process) const;  // of its device, which is on another node
  static std::optional<gpu::Waiting> ShownWait(const Device& device);
  std::optional<std::string> LookAtWait(Device* device, std::chrono::steady_clock::time_point now);
  std::optional<std::string> LookAtIds(const Device& device);
  const gpu::ErrorRecord* FirstRecord() const;
  bool HasLeft(int slot) const;
  int64_t ProcessOfSlot(int slot) const;
  void EndWaits(int64_t process);

  // Setup, Export, Import and Release come one after the other, and may take long. What calls need
  // is guarded by `mutex_`, which is never held while a device is waited for: the device may wait
  // for a call of another one. Taken in this order.
  std::mutex set_up_mutex_;
  std::map<int64_t, Device> retired_;     // what Release has taken away last, by member
  std::set<std::shared_ptr<void>> kept_;  // see Lifetimes
  std::mutex mutex_;
  int64_t process_ = 0;
  int64_t num_processes_ = 1;
  bool staged_only_ = false;
  std::string pool_problem_;      // why other processes cannot map XLA's memory; empty if they do
  size_t slot_bytes_wanted_ = 0;  // of Setup; the devices have these slots or none
  bool requires_slots_ = false;   // of Setup
  std::optional<std::string> slots_problem_;  // why they have none in spite of that
  Timeouts timeouts_;
  bool own_waits_end_ = false;
  bool was_broken_ = false;               // before that
  std::shared_future<void> devices_end_;  // what Synchronize has begun to wait for
  std::vector<Device> devices_;
  std::map<int64_t, RemoteDevice> remote_;                 // by member
  std::unique_ptr<Presence> presence_;                     // of this process; shown by Export
  std::map<int64_t, std::unique_ptr<PeerProcess>> peers_;  // by process, those with devices
  std::set<int64_t> left_elsewhere_;                       // processes: see TellLeft
  std::set<int64_t> told_dead_;                            // processes that Watch has told of
  bool told_invalid_ids_ = false;                          // by Watch; once in a process
  std::set<MemberPair> without_atomics_;  // the first cannot use them on the second's memory
  std::map<int64_t, int> slot_;           // of every device, by member
  std::vector<std::string> hosts_;        // see SetHosts
  std::vector<int64_t> across_nodes_;     // see SetGroupAcrossNodes
  uint64_t num_calls_ = 0;                // that FillGroup has numbered
  std::vector<Descriptor> descriptors_;   // of what is exported
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_SYMMETRIC_MEMORY_H_
