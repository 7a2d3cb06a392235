// One call of a collective operation by one group, as this process sees it.
#ifndef JAX_EP_XLA_FFI_CPU_OPS_COLLECTIVE_OP_H_
#define JAX_EP_XLA_FFI_CPU_OPS_COLLECTIVE_OP_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/cpu/meet/failure.h"

namespace jax_ep::cpu {

// A call site of a compiled program. Two calls in one program that share every attribute are two
// call sites, told apart by `id` inside a process and by `ordinal` between processes.
struct CallSite {
  std::string op;                     // the target's name, for messages
  uint64_t id = 0;                    // unique in this process, never reused
  uint64_t signature = 0;             // hash of the operation and its attributes
  uint64_t ordinal = 0;               // among the sites of this signature in its program
  int64_t num_ranks = 0;              // R
  std::vector<int64_t> rank_process;  // process of each rank, [num_groups * R], group by group

  const int64_t* group_processes(int64_t group) const {
    return rank_process.data() + group * num_ranks;
  }
};

// One rank's part in a call: its buffers, valid until `done` has been called.
struct Member {
  int64_t rank = 0;
  std::vector<const void*> in;
  std::vector<void*> out;
  Completion done;
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
