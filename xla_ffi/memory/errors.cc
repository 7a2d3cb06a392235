// What kernels have recorded, in words.
#include <sstream>

#include "xla_ffi/groups.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {

std::string SymmetricMemory::NameOfSlot(int slot) const {
  for (const auto& [member, its_slot] : slot_) {
    if (its_slot != slot) continue;
    const std::string name = "device " + std::to_string(member & 0xffffffff);
    return num_processes_ == 1 ? name : name + " (process " + std::to_string(member >> 32) + ")";
  }
  if (slot >= gpu::kMaxPeers) return NameOfProcess(slot - gpu::kMaxPeers);
  return "slot " + std::to_string(slot);
}

std::string SymmetricMemory::NameOfProcess(int64_t process) const {
  std::string name = "process " + std::to_string(process);
  if (process < static_cast<int64_t>(hosts_.size())) name += " on " + hosts_[process];
  for (size_t r = 0; r < across_nodes_.size(); ++r) {
    if (process_of(across_nodes_[r]) != process) continue;
    return "rank " + std::to_string(r) + " of the group across nodes (" + name + ")";
  }
  return "the device of " + name;
}

const gpu::ErrorRecord* SymmetricMemory::FirstRecord() const {
  for (const Device& device : devices_) {
    const gpu::ErrorRecord* record = device.error.get();
    if (__atomic_load_n(&record->valid, __ATOMIC_ACQUIRE) != 0) return record;
  }
  return nullptr;
}

const uint64_t* SymmetricMemory::GivenUp(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  const gpu::ErrorRecord* record = FirstRecord();
  const Device* own = FindLocal(ordinal);
  if (record == nullptr || own == nullptr) return nullptr;
  uint64_t* word = &own->error->given_up;
  const uint64_t given_up = gpu::given_up_of(slot_.at(own->member), record->peer_slot);
  __atomic_store_n(word, given_up, __ATOMIC_RELAXED);  // an earlier call's copy may read it
  return word;
}

std::optional<std::string> SymmetricMemory::RecordedError() {
  std::lock_guard<std::mutex> lock(mutex_);
  const gpu::ErrorRecord* record = FirstRecord();
  if (record == nullptr) return std::nullopt;
  const std::string own = NameOfSlot(record->slot), peer = NameOfSlot(record->peer_slot);
  std::ostringstream out;
  out << kOpNames[record->kind % kNumOps] << ": ";
  const uint64_t expected = record->expected_epoch, seen = record->seen_epoch;
  const char* const until = own_waits_end_ && !was_broken_
                                ? " until this process was interrupted while it left"
                                : " until the timeout";
  switch (record->phase) {
    case gpu::kOtherCall:
      out << own << " and " << peer << " are in different calls (operation " << std::hex << expected
          << ", " << seen << ")";
      break;
    case gpu::kNotResident:
      out << "on " << own << " only " << seen << " of " << expected
          << " blocks got a streaming multiprocessor" << until
          << ": other work holds the rest; pass a smaller num_sms to jax_ep.make_layout";
      break;
    case gpu::kToldByPeer:
      out << own << " was told by " << peer << ", which has given up";
      if (seen != static_cast<uint64_t>(record->peer_slot)) {
        out << " on " << NameOfSlot(static_cast<int>(seen));
      }
      out << " and says why";
      break;
    case gpu::kProgress:
      out << own << " waited for " << peer << " to finish" << until;
      if (record->peer_slot >= gpu::kMaxPeers) {
        out << " (expected " << expected << " in its signal, seen " << seen << ")";
        break;
      }
      out << " (expected epoch " << gpu::epoch_of(expected) << ", seen " << gpu::epoch_of(seen)
          << " with " << gpu::units_of(seen, gpu::epoch_of(expected)) << " of "
          << gpu::units_of(expected, gpu::epoch_of(expected))
          << " steps; if several processes share that GPU, pass a smaller num_sms to "
             "jax_ep.make_layout)";
      break;
    case gpu::kTwoAtOnce:
      out << own
          << " found another call running, where calls of a device must follow one another. A "
             "program with a compiler option xla_gpu_command_buffer_scheduling_mode of its own "
             "may run them at once: set that in XLA_FLAGS instead, before jax_ep is imported";
      break;
    case gpu::kPeerDied:
      out << "the process of " << peer << (HasLeft(record->peer_slot) ? " has left" : " has died")
          << ", so " << own << " waits for it no longer";
      break;
    default:
      out << own << " waited for " << peer << " to "
          << (record->phase == gpu::kStart ? "come" : "finish") << until << " (expected epoch "
          << expected << ", seen " << seen << ")";
  }
  for (const Device& device : devices_) {
    for (int slot = 0; slot < gpu::kMaxPeers; ++slot) {
      if (__atomic_load_n(&device.error->not_left[slot], __ATOMIC_ACQUIRE) == 0) continue;
      out << "; " << NameOfSlot(slot) << " stood still when told, and may yet write to arrays on "
          << NameOfSlot(slot_.at(device.member));
    }
  }
  out << "; the group is broken, and later calls fail at once. Once all ranks can come again, "
         "call jax_ep.finalize() and then jax_ep.initialize() in every process, or start the job "
         "again";
  return out.str();
}

}  // namespace jax_ep
