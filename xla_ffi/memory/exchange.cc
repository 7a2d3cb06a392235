// How processes come to each other's memory: a text that each one exports, and all import.
#include <cuda.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <sstream>
#include <stdexcept>
#include <utility>

#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {
namespace {

// Of a device of another process; -1 if this one does not see it (CUDA_VISIBLE_DEVICES).
int OrdinalOn(const std::string& bus_id) {
  int ordinal = -1;
  if (cudaDeviceGetByPCIBusId(&ordinal, bus_id.c_str()) == cudaSuccess) return ordinal;
  cudaGetLastError();  // a later check must not report it
  return -1;
}

}  // namespace

std::string SymmetricMemory::Export(const std::vector<uint64_t>& pool_pointers) {
  std::lock_guard<std::mutex> set_up_lock(set_up_mutex_);
  std::lock_guard<std::mutex> lock(mutex_);
  const Driver& driver = Driver::Get();
  if (!staged_only_ && pool_pointers.size() != devices_.size()) {
    Throw("one pool pointer a device is needed");
  }
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // peers take descriptors from here
  std::ostringstream out;
  presence_ = std::make_unique<Presence>();
  out << getpid() << " " << sizeof(gpu::ControlBlock) << " " << SlotBytes() << " "
      << presence_->fd();
  const auto show = [&](uint64_t begin, size_t bytes, const std::string& what) {
    descriptors_.push_back(ExportAllocation(begin, what));
    out << " " << descriptors_.back().get() << " " << begin << " " << bytes;
  };
  const auto show_none = [&] { out << " -1 0 0"; };
  pool_problem_ = staged_only_ ? "JAX_EP_PATH=staged" : "";
  for (size_t i = 0; i < devices_.size(); ++i) {
    Device& device = devices_[i];
    const DeviceScope scope(device.ordinal);
    const std::string on = OnDevice(device.ordinal);
    char bus_id[32];
    Check(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device.ordinal), "PCI bus" + on);
    out << " " << device.member << " " << bus_id;
    show(device.control->begin(), device.control->bytes(), "exporting control memory" + on);
    if (staged_only_) {
      show_none();
    } else {
      CUdeviceptr begin = 0;
      size_t bytes = 0;
      Check(driver.cuMemGetAddressRange(&begin, &bytes, pool_pointers[i]), "XLA's memory" + on);
      try {
        show(begin, bytes, "exporting XLA's memory" + on);
        device.pool_begin = begin;
        device.pool_end = begin + bytes;
      } catch (const std::runtime_error& error) {  // thrown before anything was shown
        pool_problem_ = error.what() + sizeof kPrefix - 1;
        show_none();
      }
    }
    if (device.staging == nullptr && !pool_problem_.empty()) {
      Throw("other processes cannot map XLA's memory (" + pool_problem_ +
            "), so rows have to go through a staging region. Pass "
            "jax_ep.initialize(staging_bytes=...) in every process: a call needs about num_ranks * "
            "tokens * row bytes, and says how much if that is too little. Or let XLA use its "
            "default allocator (unset XLA_PYTHON_CLIENT_ALLOCATOR)");
    }
    if (device.staging == nullptr) {
      show_none();
    } else {
      show(device.staging->begin(), device.staging->bytes(), "exporting the staging region" + on);
    }
  }
  return out.str();
}

void SymmetricMemory::Import(const std::vector<std::string>& exports) {
  std::lock_guard<std::mutex> set_up_lock(set_up_mutex_);
  const std::vector<int> ordinals = Ordinals();
  std::map<int64_t, RemoteDevice> all;
  std::map<int64_t, std::unique_ptr<PeerProcess>> peers;
  std::set<MemberPair> without_atomics;
  for (size_t process = 0; process < exports.size(); ++process) {
    if (static_cast<int64_t>(process) == process_) continue;
    std::istringstream in(exports[process]);
    int64_t pid = 0;
    size_t control_bytes = 0;
    if (!(in >> pid >> control_bytes)) continue;
    if (control_bytes != sizeof(gpu::ControlBlock)) {
      Throw("process " + std::to_string(process) + " runs another version of jax_ep");
    }
    size_t slot_bytes = 0;
    int presence_fd = -1;
    if (!(in >> slot_bytes >> presence_fd)) {
      Throw("an incomplete message of process " + std::to_string(process));
    }
    if (slot_bytes != SlotBytes()) {
      Throw("process " + std::to_string(process) + " has slots of " + std::to_string(slot_bytes) +
            " bytes a device, process " + std::to_string(process_) + " of " +
            std::to_string(SlotBytes()) +
            ": pass the same jax_ep.initialize(slot_bytes=...) in every process, or, where it is "
            "left out, set the same JAX_EP_SLOTS");
    }
    peers[process] = std::make_unique<PeerProcess>(pid, presence_fd);
    for (int64_t member = 0; in >> member;) {
      const std::string whose = " of process " + std::to_string(process) + ", device " +
                                std::to_string(member & 0xffffffff);
      std::string bus_id;
      if (!(in >> bus_id)) Throw("an incomplete message" + whose);
      const int ordinal = OrdinalOn(bus_id);
      for (const Device& device : devices_) {
        if (ordinal < 0 || ordinal == device.ordinal) continue;  // unknown; ranks share a device
        if (!HasAtomics(device.ordinal, ordinal)) without_atomics.insert({device.member, member});
      }
      uint64_t begin = 0;
      const auto map = [&](const std::string& what) -> std::shared_ptr<Mapping> {
        int fd = -1;
        size_t bytes = 0;
        if (!(in >> fd >> begin >> bytes)) Throw("an incomplete message" + whose);
        return fd < 0 ? nullptr : MapPeer(pid, fd, bytes, ordinals, what + whose);
      };
      RemoteDevice remote;
      remote.control = map("control memory");
      remote.pool = map("XLA's memory");
      if (remote.pool != nullptr) remote.shift = static_cast<int64_t>(remote.pool->begin() - begin);
      remote.staging = map("the staging region");
      all[member] = std::move(remote);
    }
  }
  std::map<int64_t, int> slots = NumberSlots(devices_, all);
  // All processes read the same texts, so they agree on how many devices share the slots.
  CheckSlots(SlotBytes(), static_cast<int>(slots.size()));
  std::lock_guard<std::mutex> lock(mutex_);
  remote_ = std::move(all);
  peers_ = std::move(peers);
  told_dead_.clear();
  slot_ = std::move(slots);
  without_atomics_.merge(without_atomics);
}

void SymmetricMemory::CloseDescriptors() {
  std::lock_guard<std::mutex> lock(mutex_);
  descriptors_.clear();
}

}  // namespace jax_ep
