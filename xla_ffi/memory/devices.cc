// Set-up and release of this process's devices, and what a call needs to know of its group.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <sstream>
#include <thread>
#include <tuple>
#include <utility>

#include "cuda/memory/slots.h"
#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {
namespace {

int64_t MemberCode(int64_t process, int64_t id) { return process << 32 | id; }

// For the kernels that run, too.
void WriteTimeouts(const Timeouts& timeouts, gpu::ErrorRecord* record) {
  __atomic_store_n(&record->arrival_timeout_ns, timeouts.arrival.count(), __ATOMIC_RELEASE);
  __atomic_store_n(&record->progress_timeout_ns, timeouts.progress.count(), __ATOMIC_RELEASE);
}

// The driver's own kernels for copies are loaded at their first use, which may wait for the whole
// device; later a peer may be spinning there.
void WarmUpCopies(const Mapping& staging, const std::string& what) {
  const OwnStream stream(what);
  auto* begin = reinterpret_cast<char*>(staging.begin());
  for (size_t bytes : {size_t{256}, staging.bytes() / 2}) {
    Check(cudaMemcpyAsync(begin, begin + staging.bytes() / 2, bytes, cudaMemcpyDeviceToDevice,
                          stream.get()),
          what);
  }
  Check(cudaStreamSynchronize(stream.get()), what);
}

// Control memory, and slots behind it unless they have no bytes.
std::pair<std::shared_ptr<Mapping>, std::shared_ptr<Mapping>> AllocateControl(
    int ordinal, size_t slot_bytes, const std::vector<int>& ordinals) {
  constexpr size_t kBytes = sizeof(gpu::ControlBlock);
  const std::string control = "control memory" + OnDevice(ordinal);
  if (slot_bytes == 0) return {Allocate(ordinal, kBytes, ordinals, control), nullptr};
  const std::string slots = "slots of " + std::to_string(slot_bytes) + " bytes" +
                            OnDevice(ordinal) + " (jax_ep.initialize(slot_bytes=...); 0 is none)";
  const auto range = std::make_shared<AddressRange>(
      gpu::kSlotsOffset + AllocatedBytes(ordinal, slot_bytes, slots), slots);
  return {Allocate(ordinal, kBytes, ordinals, control, {range, 0}),
          Allocate(ordinal, slot_bytes, ordinals, slots, {range, gpu::kSlotsOffset})};
}

// When these devices have no work left. There is no wait for a device with a timeout, so a thread
// waits; if the wait never ends it goes with the process.
std::shared_future<void> EndOf(const std::vector<int>& ordinals) {
  const auto ended = std::make_shared<std::promise<void>>();
  std::thread([ordinals, ended] {
    for (int ordinal : ordinals) {
      // A device that has failed has no work left either.
      if (cudaSetDevice(ordinal) == cudaSuccess) cudaDeviceSynchronize();
    }
    ended->set_value();
  }).detach();
  return ended->get_future().share();
}

}  // namespace

SymmetricMemory& SymmetricMemory::Get() {
  static SymmetricMemory* const memory = new SymmetricMemory;
  return *memory;
}

SymmetricMemory::Device* SymmetricMemory::FindLocal(int ordinal) {
  for (Device& device : devices_) {
    if (device.ordinal == ordinal) return &device;
  }
  return nullptr;
}

std::vector<int> SymmetricMemory::Ordinals() const {
  std::vector<int> ordinals;
  for (const Device& device : devices_) ordinals.push_back(device.ordinal);
  return ordinals;
}

int64_t SymmetricMemory::Member(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* device = FindLocal(ordinal);
  return device == nullptr ? -1 : device->member;
}

const gpu::ControlBlock* SymmetricMemory::Control(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* device = FindLocal(ordinal);
  return device == nullptr ? nullptr : device->control_block();
}

SymmetricMemory::Device SymmetricMemory::MakeDevice(int ordinal, int64_t member,
                                                    const std::vector<int>& ordinals,
                                                    size_t slot_bytes) {
  const DeviceScope scope(ordinal);
  const std::string on = OnDevice(ordinal);
  int major = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal),
        "compute capability" + on);
  if (major != 9) {
    Throw("the CUDA kernels are built for Hopper (sm_90a); CUDA device " + std::to_string(ordinal) +
          " has compute capability " + std::to_string(major) + ".x");
  }
  for (int other : ordinals) {
    if (other == ordinal) continue;
    int possible = 0;
    Check(cudaDeviceCanAccessPeer(&possible, ordinal, other), "cudaDeviceCanAccessPeer" + on);
    if (possible == 0) {
      Throw("CUDA device " + std::to_string(ordinal) + " cannot reach the memory of device " +
            std::to_string(other));
    }
    const cudaError_t status = cudaDeviceEnablePeerAccess(other, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();  // by XLA; a later check must not report it
    } else {
      Check(status, "cudaDeviceEnablePeerAccess" + on);
    }
  }
  Device device;
  device.ordinal = ordinal;
  device.member = member;
  if (const auto last = retired_.find(member); last != retired_.end()) {
    // Its former peers have ended their calls, and this device's come one after the other.
    device.staging = last->second.staging;
    device.staging_bytes = last->second.staging_bytes;
    if (last->second.reusable && last->second.slot_bytes == slot_bytes) {
      device.control = last->second.control;
      device.slots = last->second.slots;
      device.error = last->second.error;
    }
  }
  if (device.control == nullptr) {
    std::tie(device.control, device.slots) = AllocateControl(ordinal, slot_bytes, ordinals);
    gpu::ErrorRecord* record = nullptr;
    Check(cudaHostAlloc(&record, sizeof *record, cudaHostAllocMapped), "error record" + on);
    device.error = {record, [](gpu::ErrorRecord* r) { cudaFreeHost(r); }};
  }
  device.slot_bytes = slot_bytes;
  device.shared = std::make_shared<SharedAllocations>(ordinals);
  Check(cudaHostGetDevicePointer(&device.error_on_device, device.error.get(), 0),
        "error record" + on);
  Check(gpu::PrepareKernels(), "loading the kernels" + on);
  Check(cudaDeviceSynchronize(), "set-up" + on);
  return device;
}

std::vector<SymmetricMemory::Device> SymmetricMemory::MakeDevices(int64_t process,
                                                                  const std::vector<int>& ids,
                                                                  const std::vector<int>& ordinals,
                                                                  size_t slot_bytes) {
  std::vector<Device> devices;
  for (size_t i = 0; i < ordinals.size(); ++i) {
    const int64_t member = MemberCode(process, ids.at(i));
    devices.push_back(MakeDevice(ordinals[i], member, ordinals, slot_bytes));
  }
  return devices;
}

void SymmetricMemory::Setup(int64_t process, int64_t num_processes, const std::vector<int>& ids,
                            const std::vector<int>& ordinals, size_t staging_bytes,
                            bool staged_only, size_t slot_bytes, bool requires_slots) {
  std::lock_guard<std::mutex> set_up_lock(set_up_mutex_);
  std::vector<Device> devices;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    devices = devices_;  // no others come meanwhile
  }
  const bool is_new = devices.empty();
  bool changed = is_new;
  std::set<MemberPair> without_atomics;
  std::optional<std::string> slots_problem;
  const auto are_there = [&] {
    return slot_bytes == slot_bytes_wanted_ &&
           (!requires_slots || slot_bytes == devices.front().slot_bytes);
  };
  if (!is_new && !are_there()) {
    Throw("devices are set up with slots of " + std::to_string(devices.front().slot_bytes) +
          " bytes, which cannot become " + std::to_string(slot_bytes) +
          ": call jax_ep.initialize(slot_bytes=...) before the first program is compiled, or after "
          "jax_ep.finalize()");
  }
  if (is_new) {
    CheckSlots(slot_bytes, static_cast<int>(ordinals.size()));
    try {
      devices = MakeDevices(process, ids, ordinals, slot_bytes);
    } catch (const OutOfMemory& error) {
      if (slot_bytes == 0 || requires_slots) throw;
      cudaGetLastError();  // or the next launch of this thread would report it
      devices = MakeDevices(process, ids, ordinals, 0);
      slots_problem = error.what() + sizeof kPrefix - 1;
    }
    for (const Device& a : devices) {
      for (const Device& b : devices) {
        if (a.ordinal == b.ordinal || HasAtomics(a.ordinal, b.ordinal)) continue;
        without_atomics.insert({a.member, b.member});
      }
    }
  }
  for (Device& device : devices) {
    if (device.staging_bytes >= staging_bytes) continue;
    const DeviceScope scope(device.ordinal);
    const std::string what = "a staging region of " + std::to_string(staging_bytes) + " bytes" +
                             OnDevice(device.ordinal);
    auto staging = Allocate(device.ordinal, staging_bytes, ordinals, what);
    WarmUpCopies(*staging, what);
    device.staging = std::move(staging);
    device.staging_bytes = staging_bytes;
    changed = true;
  }
  if (is_new) {
    // Nothing fails from here on for want of anything. All ranks of a process that begins anew are
    // in it and start at epoch 0: captured command buffers work again too.
    for (const Device& device : devices) {
      const DeviceScope scope(device.ordinal);
      const std::string what = "control memory" + OnDevice(device.ordinal);
      std::memset(device.error.get(), 0, sizeof(gpu::ErrorRecord));
      for (const Mapping* memory : {device.control.get(), device.slots.get()}) {
        if (memory == nullptr) continue;
        Check(cudaMemset(reinterpret_cast<void*>(memory->begin()), 0, memory->bytes()), what);
      }
      Check(cudaDeviceSynchronize(), what);
    }
  }
  std::map<int64_t, int> slots = NumberSlots(devices, remote_);
  for (const Device& device : devices) {
    kept_.insert({device.control, device.staging, device.error});
  }
  if (changed) retired_.clear();
  std::lock_guard<std::mutex> lock(mutex_);
  staged_only_ = staged_only;
  process_ = process;
  num_processes_ = num_processes;
  devices_ = std::move(devices);
  slot_ = std::move(slots);
  if (is_new) {
    without_atomics_ = std::move(without_atomics);
    slot_bytes_wanted_ = slot_bytes;
    requires_slots_ = requires_slots;
    slots_problem_ = std::move(slots_problem);
  }
  for (const Device& device : devices_) WriteTimeouts(TimeoutsInForce(), device.error.get());
}

void SymmetricMemory::CheckSlots(size_t slot_bytes, int num_devices) {
  const uint64_t least = gpu::min_slot_bytes(num_devices);
  if (slot_bytes == 0 || slot_bytes >= least) return;
  Throw("jax_ep.initialize: slot_bytes must be 0 or, for " + std::to_string(num_devices) +
        " devices, at least " + std::to_string(least) + "; got " + std::to_string(slot_bytes));
}

std::map<int64_t, int> SymmetricMemory::NumberSlots(const std::vector<Device>& devices,
                                                    const std::map<int64_t, RemoteDevice>& remote) {
  std::map<int64_t, int> slots;
  for (const Device& device : devices) slots[device.member] = 0;
  for (const auto& [member, peer] : remote) slots[member] = 0;
  int next = 0;
  for (auto& [member, slot] : slots) slot = next++;  // ascending: the same numbers everywhere
  if (next > gpu::kMaxPeers) Throw("more devices than an NVLink domain has");
  return slots;
}

bool SymmetricMemory::Synchronize(std::chrono::nanoseconds timeout) {
  std::shared_future<void> end;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (devices_.empty()) return true;
    if (!devices_end_.valid()) devices_end_ = EndOf(Ordinals());
    end = devices_end_;
  }
  if (end.wait_for(timeout) != std::future_status::ready) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  devices_end_ = {};
  return true;
}

void SymmetricMemory::Release(bool devices_have_ended) {
  std::lock_guard<std::mutex> set_up_lock(set_up_mutex_);
  std::vector<Device> devices;
  std::map<int64_t, RemoteDevice> remote;
  std::vector<Descriptor> descriptors;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    devices.swap(devices_);
    remote.swap(remote_);
    peers_.clear();
    if (presence_ != nullptr && devices_have_ended) presence_->Leave();
    presence_ = nullptr;
    descriptors.swap(descriptors_);
    slot_.clear();
    hosts_.clear();
    across_nodes_.clear();
    left_elsewhere_.clear();
    pool_problem_.clear();
    own_waits_end_ = false;
    devices_end_ = {};
  }
  for (Device& device : devices) {
    CUcontext saved = nullptr;
    Driver::Get().cuCtxGetCurrent(&saved);
    // On a device that has failed it fails, and there is nothing left to tell.
    if (devices_have_ended && cudaSetDevice(device.ordinal) == cudaSuccess) {
      static_assert(gpu::kHostHasLeft == ~uint64_t{0});
      cudaMemset(&device.control_block()->local.broken, 0xff, sizeof gpu::kHostHasLeft);
      cudaDeviceSynchronize();
    }
    cudaGetLastError();
    Driver::Get().cuCtxSetCurrent(saved);
  }
  for (Device& device : devices) {
    // A job of several processes numbers its devices anew, and maps its peers at other addresses.
    device.reusable = devices_have_ended && num_processes_ == 1;
    device.shared = nullptr;
    device.pool_begin = device.pool_end = 0;
    if (!devices_have_ended) kept_.insert(device.slots);
    if (!device.reusable) device.slots = nullptr;
    retired_[device.member] = std::move(device);
  }
  if (devices_have_ended) return;
  for (const auto& [member, peer] : remote) {
    kept_.insert({peer.control, peer.slots, peer.pool, peer.staging});
  }
}

void SymmetricMemory::SetHosts(std::vector<std::string> hosts) {
  std::lock_guard<std::mutex> lock(mutex_);
  hosts_ = std::move(hosts);
}

void SymmetricMemory::SetGroupAcrossNodes(std::vector<int64_t> members) {
  std::lock_guard<std::mutex> lock(mutex_);
  across_nodes_ = std::move(members);
}

void SymmetricMemory::SetTimeouts(const Timeouts& timeouts) {
  std::lock_guard<std::mutex> lock(mutex_);
  timeouts_ = timeouts;
  for (const Device& device : devices_) WriteTimeouts(TimeoutsInForce(), device.error.get());
}

void SymmetricMemory::EndOwnWaits() {
  std::lock_guard<std::mutex> lock(mutex_);
  was_broken_ = FirstRecord() != nullptr;
  own_waits_end_ = true;
  for (const Device& device : devices_) WriteTimeouts(TimeoutsInForce(), device.error.get());
}

Timeouts SymmetricMemory::TimeoutsInForce() const {
  constexpr std::chrono::nanoseconds kNone{0};
  return own_waits_end_ ? Timeouts{kNone, kNone} : timeouts_;
}

std::optional<std::string> SymmetricMemory::FillGroup(const int64_t* members, int num_ranks,
                                                      int ordinal, gpu::GroupView* view,
                                                      StagingRegion* staging) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* own = FindLocal(ordinal);
  if (own == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  view->control = own->control_block();
  view->error = own->error_on_device;
  *staging = {own->staging == nullptr ? 0 : own->staging->begin(), own->staging_bytes};
  // Other processes are shown offsets in the region. In this process an address is valid on every
  // device, and stays so when the region grows and a rank of the call has seen the old one.
  view->staging = remote_.empty() ? 0 : staging->begin;
  view->staging_bytes = remote_.empty() ? 0 : staging->bytes;
  view->slot_area_bytes = gpu::slot_area_bytes(SlotBytes(), static_cast<int32_t>(slot_.size()));
  view->call = ++num_calls_;
  view->num_ranks = num_ranks;
  view->rank = -1;
  view->nodes = {};
  for (int r = 0; r < num_ranks; ++r) {
    gpu::PeerView& peer = view->peer[r];
    peer = {};
    if (members[r] == own->member) view->rank = r;
    if (members[r] >> 32 == process_) {
      for (const Device& local : devices_) {
        if (local.member != members[r]) continue;
        peer.control = local.control_block();
        peer.staging = local.staging == nullptr ? 0 : local.staging->begin();
      }
    } else if (const auto it = remote_.find(members[r]); it != remote_.end()) {
      const RemoteDevice& remote = it->second;
      peer.control = reinterpret_cast<gpu::ControlBlock*>(remote.control->begin());
      peer.staging = remote.staging == nullptr ? 0 : remote.staging->begin();
      peer.shift = remote.shift;
    }
    if (peer.control == nullptr) {
      return "rank " + std::to_string(r) + " lives on device " +
             std::to_string(members[r] & 0xffffffff) + " of process " +
             std::to_string(members[r] >> 32) +
             ", which this process is not connected to; call jax_ep.initialize() in every process";
    }
    peer.slot_here = slot_.at(members[r]);
    peer.slot_there = slot_.at(own->member);
  }
  if (view->rank < 0) return "CUDA device " + std::to_string(ordinal) + " is not in this group";
  for (const auto& [a, b] : without_atomics_) {
    const auto is_member = [&](int64_t member) {
      return std::find(members, members + num_ranks, member) != members + num_ranks;
    };
    if (!is_member(a) || !is_member(b)) continue;
    return NameOfSlot(slot_.at(a)) + " reaches the memory of " + NameOfSlot(slot_.at(b)) +
           " without atomic operations, which calls of a group of both need: NVLink has them, PCIe "
           "has not. 'nvidia-smi topo -m' shows how devices are connected";
  }
  return std::nullopt;
}

std::string SymmetricMemory::Describe() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (devices_.empty()) return "CUDA: not set up";
  std::ostringstream out;
  out << "CUDA: " << devices_.size() << " device(s) of this process, " << remote_.size()
      << " of others; ";
  if (staged_only_ || !pool_problem_.empty()) {
    out << "staged path (" << (staged_only_ ? "JAX_EP_PATH=staged" : pool_problem_) << ")";
  } else {
    out << "direct path: peers read and write XLA's memory";
  }
  out << "; staging region of " << devices_.front().staging_bytes << " bytes a device; ";
  if (slots_problem_) {
    out << "no slots (" << *slots_problem_ << ")";
  } else if (SlotBytes() == 0) {
    out << "no slots";
  } else {
    out << "slots of " << SlotBytes() << " bytes a device";
  }
  return out.str();
}

std::optional<std::string> SymmetricMemory::SlotsProblem() {
  std::lock_guard<std::mutex> lock(mutex_);
  return slots_problem_;
}

uint64_t SymmetricMemory::SlotAreaBytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return gpu::slot_area_bytes(SlotBytes(), static_cast<int32_t>(slot_.size()));
}

}  // namespace jax_ep
