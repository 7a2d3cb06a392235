// How processes come to each other's memory: a text that each one exports, and all import.
#include <cuda.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <sstream>
#include <stdexcept>
#include <utility>

#include "cuda/memory/slots.h"
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
  out << getpid() << " " << sizeof(gpu::ControlBlock) << " " << presence_->fd() << " "
      << slot_bytes_wanted_ << " " << SlotBytes() << " " << requires_slots_;
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
    if (device.slots == nullptr) {
      show_none();
    } else {
      show(device.slots->begin(), device.slots->bytes(), "exporting slots" + on);
    }
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

std::optional<std::string> SymmetricMemory::AgreeOnSlots(
    const std::map<int64_t, ExportHeader>& headers) const {
  const std::string bytes = std::to_string(slot_bytes_wanted_);
  std::optional<int64_t> lacks_memory, requires_them;
  for (const auto& [process, header] : headers) {
    if (header.slot_bytes_wanted != slot_bytes_wanted_) {
      Throw("process " + std::to_string(process) + " has slots of " +
            std::to_string(header.slot_bytes_wanted) + " bytes a device, process " +
            std::to_string(process_) + " of " + bytes +
            ": pass the same jax_ep.initialize(slot_bytes=...) in every process, or, where it is "
            "left out, set the same JAX_EP_SLOTS");
    }
    if (header.slot_bytes < header.slot_bytes_wanted) lacks_memory = process;
    if (header.requires_slots) requires_them = process;
  }
  if (!lacks_memory) return std::nullopt;
  const std::string problem = "process " + std::to_string(*lacks_memory) +
                              " has no memory for slots of " + bytes + " bytes a device";
  if (!requires_them) return problem;
  Throw(problem + ", which process " + std::to_string(*requires_them) +
        " asks for: pass a smaller jax_ep.initialize(slot_bytes=...) in every process; 0 is none");
}

void SymmetricMemory::Import(const std::vector<std::string>& exports) {
  std::lock_guard<std::mutex> set_up_lock(set_up_mutex_);
  const std::vector<int> ordinals = Ordinals();
  std::map<int64_t, std::istringstream> texts;  // behind their headers
  std::map<int64_t, ExportHeader> headers;
  for (size_t process = 0; process < exports.size(); ++process) {
    std::istringstream in(exports[process]);
    ExportHeader header;
    size_t control_bytes = 0;
    if (!(in >> header.pid >> control_bytes)) continue;
    if (control_bytes != sizeof(gpu::ControlBlock)) {
      Throw("process " + std::to_string(process) + " runs another version of jax_ep");
    }
    if (!(in >> header.presence_fd >> header.slot_bytes_wanted >> header.slot_bytes >>
          header.requires_slots)) {
      Throw("an incomplete message of process " + std::to_string(process));
    }
    headers[static_cast<int64_t>(process)] = header;
    texts[static_cast<int64_t>(process)] = std::move(in);
  }
  const std::optional<std::string> slots_problem = AgreeOnSlots(headers);
  std::map<int64_t, RemoteDevice> all;
  std::map<int64_t, std::unique_ptr<PeerProcess>> peers;
  std::set<MemberPair> without_atomics;
  for (auto& [process, in] : texts) {
    if (process == process_) continue;
    const int64_t pid = headers[process].pid;
    peers[process] = std::make_unique<PeerProcess>(pid, headers[process].presence_fd);
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
      struct Shown {
        int fd = -1;
        uint64_t begin = 0;
        size_t bytes = 0;
      };
      const auto read = [&] {
        Shown shown;
        if (!(in >> shown.fd >> shown.begin >> shown.bytes)) Throw("an incomplete message" + whose);
        return shown;
      };
      const Shown control = read(), slots = read(), pool = read(), staging = read();
      const auto map = [&](const Shown& shown, const std::string& what, const Place& place = {}) {
        return shown.fd < 0 ? nullptr
                            : MapPeer(pid, shown.fd, shown.bytes, ordinals, what + whose, place);
      };
      RemoteDevice remote;
      if (slots.fd < 0 || slots_problem) {
        remote.control = map(control, "control memory");
      } else {
        const auto range = std::make_shared<AddressRange>(gpu::kSlotsOffset + slots.bytes,
                                                          "control memory and slots" + whose);
        remote.control = map(control, "control memory", {range, 0});
        remote.slots = map(slots, "slots", {range, gpu::kSlotsOffset});
      }
      remote.pool = map(pool, "XLA's memory");
      if (remote.pool != nullptr) {
        remote.shift = static_cast<int64_t>(remote.pool->begin() - pool.begin);
      }
      remote.staging = map(staging, "the staging region");
      all[member] = std::move(remote);
    }
  }
  std::map<int64_t, int> slots = NumberSlots(devices_, all);
  // All processes read the same texts, so they agree on how many devices share the slots.
  CheckSlots(slot_bytes_wanted_, static_cast<int>(slots.size()));
  std::lock_guard<std::mutex> lock(mutex_);
  if (slots_problem) {
    for (Device& device : devices_) {
      device.slots = nullptr;
      device.slot_bytes = 0;
    }
    if (!slots_problem_) slots_problem_ = slots_problem;
  }
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
