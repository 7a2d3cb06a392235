// One call of a collective operation by one group, as this process sees it.
#ifndef JAX_EP_XLA_FFI_CPU_OPS_COLLECTIVE_OP_H_
#define JAX_EP_XLA_FFI_CPU_OPS_COLLECTIVE_OP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "xla_ffi/cpu/meet/failure.h"

namespace jax_ep::cpu {

// One rank's part in a call: its buffers, valid until `done` has been called.
struct Member {
  int64_t rank = 0;
  std::vector<const void*> in;
  std::vector<void*> out;
  Completion done;
  uint64_t sizes_hash = 0;  // of the buffers' sizes, as far as no attribute shows them
};

// The other processes' side of a call. Reads fail when the process has died.
class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  virtual bool is_local(int64_t rank) const = 0;
  // What CollectiveOp::Published returned for that rank in its own process.
  virtual const std::vector<uint64_t>& published(int64_t rank) const = 0;
  // Copies `bytes` bytes at `address` in the process of `rank`.
  virtual MaybeFailure Read(int64_t rank, uint64_t address, void* dst, size_t bytes) const = 0;
  // Copies the rows at `addresses`, one after the other, to `dst`.
  virtual MaybeFailure ReadRows(int64_t rank, const std::vector<uint64_t>& addresses,
                                size_t row_bytes, void* dst) const = 0;
};

// Steps, in this order, each on one thread: Prepare when all ranks of this process have come,
// Published for each of them if the group spans processes, Finish when all ranks have come
// everywhere. Buffers of every rank stay valid until every process has left Finish.
class CollectiveOp {
 public:
  virtual ~CollectiveOp() = default;
  virtual void Prepare(const PeerMemory& peers) = 0;
  virtual std::vector<uint64_t> Published(int64_t rank) const = 0;
  virtual MaybeFailure Finish(const PeerMemory& peers) = 0;
};

// The members of this process by rank; a rank of another process has an empty `in` and `out`.
using Members = std::vector<Member>;
using OpFactory = std::function<std::unique_ptr<CollectiveOp>(const Members&)>;

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_OPS_COLLECTIVE_OP_H_
