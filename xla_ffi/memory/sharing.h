// How buffers in XLA's memory become reachable for the other devices of the process.
#ifndef JAX_EP_XLA_FFI_MEMORY_SHARING_H_
#define JAX_EP_XLA_FFI_MEMORY_SHARING_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace jax_ep {

// What is shared of one device's memory. That goes by allocation: XLA may free one, and an address
// then comes to lie in another one, which peers do not reach yet.
class SharedAllocations {
 public:
  // `ordinals`: the process's devices.
  explicit SharedAllocations(std::vector<int> ordinals) : ordinals_(std::move(ordinals)) {}

  // Makes all of [address, address + bytes) reachable for them; why they cannot reach it otherwise.
  // Costs a call into the driver for each allocation that the buffer lies in, and some more for one
  // that is new.
  std::optional<std::string> Share(uint64_t address, size_t bytes);

 private:
  struct Allocation {
    uint64_t end;
    uint64_t id;  // the driver's; never used again
  };
  std::optional<std::string> GiveAccess(uint64_t begin, size_t bytes) const;
  void Remember(uint64_t begin, const Allocation& allocation);

  const std::vector<int> ordinals_;
  std::mutex mutex_;
  std::map<uint64_t, Allocation> shared_;  // by the first address; no two overlap
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_SHARING_H_
