// What the host does for kernels that wait, beside them.
#include <sstream>

#include "xla_ffi/groups.h"
#include "xla_ffi/invalid_ids.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {
namespace {

constexpr std::chrono::seconds kTellAfter{30};  // of a wait

}  // namespace

std::vector<std::string> SymmetricMemory::Watch(std::chrono::steady_clock::time_point now) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> news;
  for (const auto& [process, peer] : peers_) {
    if (peer->Look() != PeerProcess::State::kDied) continue;
    EndWaits(process);
    if (told_dead_.insert(process).second) {
      news.push_back("process " + std::to_string(process) + " (pid " + std::to_string(peer->pid()) +
                     ") has died; calls that wait for its devices end now");
    }
  }
  for (Device& device : devices_) {
    if (auto text = LookAtWait(&device, now)) news.push_back(std::move(*text));
    if (auto text = LookAtIds(device)) news.push_back(std::move(*text));
  }
  return news;
}

std::optional<std::string> SymmetricMemory::LookAtIds(const Device& device) {
  const uint64_t word = __atomic_load_n(&device.error->invalid_ids, __ATOMIC_RELAXED);
  if (word == 0 || told_invalid_ids_) return std::nullopt;
  told_invalid_ids_ = true;
  return InvalidIdsText(gpu::rank_of_invalid_ids(word), gpu::num_invalid_of(word),
                        gpu::num_experts_of_invalid_ids(word));
}

std::optional<gpu::Waiting> SymmetricMemory::ShownWait(const Device& device) {
  const gpu::Waiting& shown = device.error->waiting;
  const uint64_t since = __atomic_load_n(&shown.since, __ATOMIC_ACQUIRE);
  if (since == 0) return std::nullopt;
  const gpu::Waiting waiting = shown;
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  if (__atomic_load_n(&shown.since, __ATOMIC_RELAXED) != since) return std::nullopt;  // it is over
  return waiting;
}

std::optional<std::string> SymmetricMemory::LookAtWait(Device* device,
                                                       std::chrono::steady_clock::time_point now) {
  const auto shown = ShownWait(*device);
  const uint64_t since = shown ? shown->since : 0;
  if (since != device->wait.since) device->wait = {since, now, false};
  if (!shown) return std::nullopt;
  const gpu::Waiting& waiting = *shown;
  if (HasLeft(waiting.peer_slot)) EndWaits(ProcessOfSlot(waiting.peer_slot));  // it never comes
  const auto unseen = std::chrono::nanoseconds(gpu::kLongWaitNs);  // before the device showed it
  if (device->wait.is_told || now - device->wait.seen + unseen < kTellAfter) return std::nullopt;
  device->wait.is_told = true;
  const bool has_come = waiting.phase != gpu::kStart;
  const auto limit = has_come ? TimeoutsInForce().progress : TimeoutsInForce().arrival;
  const int own_slot = slot_.at(device->member);
  std::ostringstream out;
  out << kOpNames[waiting.kind % kNumOps] << ": " << NameOfSlot(own_slot) << " has waited for "
      << kTellAfter.count() << " s for "
      << (waiting.peer_slot == own_slot
              ? "streaming multiprocessors that other work holds"
              : NameOfSlot(waiting.peer_slot) + (has_come ? " to go on" : " to come"))
      << "; it gives up after " << std::chrono::duration<double>(limit).count()
      << " s (jax_ep.set_timeout)";
  return out.str();
}

std::vector<int64_t> SymmetricMemory::AwaitedElsewhere() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> processes;
  for (const Device& device : devices_) {
    if (const auto waiting = ShownWait(device); waiting && waiting->peer_slot >= gpu::kMaxPeers) {
      processes.push_back(ProcessOfSlot(waiting->peer_slot));
    }
  }
  return processes;
}

void SymmetricMemory::TellLeft(int64_t process) {
  std::lock_guard<std::mutex> lock(mutex_);
  left_elsewhere_.insert(process);
  EndWaits(process);
}

bool SymmetricMemory::HasLeft(int slot) const {
  if (left_elsewhere_.count(ProcessOfSlot(slot)) != 0) return true;
  const auto peer = peers_.find(ProcessOfSlot(slot));
  return peer != peers_.end() && peer->second->Look() == PeerProcess::State::kLeft;
}

int64_t SymmetricMemory::ProcessOfSlot(int slot) const {
  if (slot >= gpu::kMaxPeers) return slot - gpu::kMaxPeers;
  for (const auto& [member, its_slot] : slot_) {
    if (its_slot == slot) return process_of(member);
  }
  return -1;
}

void SymmetricMemory::EndWaits(int64_t process) {
  const auto end = [&](int slot) {
    for (const Device& device : devices_) {
      uint64_t* word = &device.error->gone[gpu::word_of(slot)];
      __atomic_store_n(word, *word | gpu::bit_of(slot), __ATOMIC_RELEASE);
    }
  };
  for (const auto& [member, slot] : slot_) {
    if (process_of(member) == process) end(slot);
  }
  // Nodes may be smaller than a host.
  if (process < gpu::kMaxProcesses) end(gpu::slot_of_process(static_cast<int>(process)));
}

}  // namespace jax_ep
