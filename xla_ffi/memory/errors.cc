// What kernels have recorded, in words.
#include <iterator>
#include <sstream>

#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {

std::optional<std::string> SymmetricMemory::RecordedError() {
  static constexpr const char* kKinds[] = {"jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine",
                                           "jax_ep_combine_gradient"};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Device& device : devices_) {
    const gpu::ErrorRecord* record = device.error.get();
    if (__atomic_load_n(&record->valid, __ATOMIC_ACQUIRE) == 0) continue;
    const std::string rank = "rank " + std::to_string(record->rank);
    const std::string peer = "rank " + std::to_string(record->peer);
    std::ostringstream out;
    out << kKinds[record->kind % std::size(kKinds)] << ": ";
    const uint64_t expected = record->expected_epoch, seen = record->seen_epoch;
    switch (record->phase) {
      case gpu::kOtherCall:
        out << rank << " and " << peer << " are in different calls (operation " << std::hex
            << expected << ", " << seen << ")";
        break;
      case gpu::kNotResident:
        out << "on " << rank << " only " << seen << " of " << expected
            << " blocks got a streaming multiprocessor until the timeout: other work holds the "
               "rest; pass a smaller num_sms to jax_ep.make_layout";
        break;
      case gpu::kToldByPeer:
        out << rank << " was told by " << peer << ", which has given up";
        if (seen != static_cast<uint64_t>(record->peer)) out << " on rank " << seen;
        out << " and says why";
        break;
      case gpu::kProgress:
        out << rank << " waited for " << peer << " to finish until the timeout (expected epoch "
            << gpu::epoch_of(expected) << ", seen " << gpu::epoch_of(seen) << " with "
            << gpu::units_of(seen, gpu::epoch_of(expected)) << " of "
            << gpu::units_of(expected, gpu::epoch_of(expected))
            << " steps; if several processes share that GPU, pass a smaller num_sms to "
               "jax_ep.make_layout)";
        break;
      case gpu::kTwoAtOnce:
        out << rank
            << " found another call running on its device, where calls must follow one another. A "
               "program with a compiler option xla_gpu_command_buffer_scheduling_mode of its own "
               "may run them at once: set that in XLA_FLAGS instead, before jax_ep is imported";
        break;
      default:
        out << rank << " waited for " << peer << " to "
            << (record->phase == gpu::kStart ? "come" : "finish")
            << " until the timeout (expected epoch " << expected << ", seen " << seen << ")";
    }
    out << "; the group is broken, and later calls fail at once. Once all ranks can come again, "
           "call jax_ep.finalize() and then jax_ep.initialize() in every process, or start the job "
           "again";
    return out.str();
  }
  return std::nullopt;
}

}  // namespace jax_ep
