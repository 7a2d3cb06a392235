// One call of a group that spans processes, as this process sees it.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_EXCHANGE_H_
#define JAX_EP_XLA_FFI_CPU_MEET_EXCHANGE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "xla_ffi/cpu/meet/clock.h"
#include "xla_ffi/cpu/meet/failure.h"
#include "xla_ffi/cpu/meet/messages.h"
#include "xla_ffi/cpu/ops/collective_op.h"
#include "xla_ffi/timeouts.h"

namespace jax_ep::cpu {

// What must be alike in all processes of a call, beside its key.
struct Likeness {
  uint64_t sizes_hash = 0;
  int64_t num_sites = 0;  // of the program
};

struct Exchange {
  CallKey key;
  Likeness likeness;  // of those who came first

  // From this process; absent while only others have come.
  std::string op_name;
  std::vector<int64_t> rank_process, rank_device;
  std::set<int64_t> others;  // the processes of the group, without this one
  std::unique_ptr<CollectiveOp> op;
  Completion completion;
  Timeouts timeouts;
  Clock::time_point deadline = Clock::time_point::max();  // no call waits for ever, see `expires`
  Clock::time_point notice = Clock::time_point::max();    // when to say who is waited for
  bool started = false;                                   // Finish is running or has run
  bool local_done = false;                                // Finish has returned

  // From the others.
  std::map<int64_t, std::map<int64_t, std::vector<uint64_t>>> arrived;  // process -> rank -> words
  std::set<int64_t> done;

  MaybeFailure failure;

  bool is_ours() const { return op != nullptr; }
  bool reads() const { return started && !local_done; }
  // While only others have come there is no deadline: they have one, and say so when it is over.
  // While rows are read there is none either: that ends by itself.
  bool expires() const { return is_ours() && !reads(); }
  bool waits_for(int64_t process) const {
    return is_ours() && !started && others.count(process) > 0 && arrived.count(process) == 0;
  }
  bool all_arrived() const { return all_of_others(arrived); }
  bool all_done() const { return all_of_others(done); }

  // What ARRIVED carries: the likeness, and what a process publishes of its ranks.
  static std::string Publish(const Likeness& likeness, const CollectiveOp& op,
                             const std::vector<int64_t>& ranks);
  // Returns the likeness.
  Likeness TakePublished(int64_t process, std::string_view payload);

  // The ranks of a process, as "2, 3".
  std::string ranks_of(int64_t process) const;
  // Who is waited for: "2 (process 1, device 2048), 3 (process 1, device 2049)".
  std::string missing() const;

 private:
  template <typename Processes>
  bool all_of_others(const Processes& processes) const {
    for (int64_t p : others) {
      if (processes.count(p) == 0) return false;
    }
    return true;
  }
};

// The other processes' memory in an exchange, for its operation. Both must outlive it.
class PeerView final : public PeerMemory {
 public:
  PeerView(const Exchange& exchange, const std::vector<Peer>& peers)
      : exchange_(exchange), peers_(peers) {}

  bool is_local(int64_t rank) const override;
  const std::vector<uint64_t>& published(int64_t rank) const override;
  MaybeFailure Read(int64_t rank, uint64_t address, void* dst, size_t bytes) const override;
  MaybeFailure ReadRows(int64_t rank, const std::vector<uint64_t>& addresses, size_t row_bytes,
                        void* dst) const override;

 private:
  pid_t pid(int64_t rank) const { return peers_[exchange_.rank_process[rank]].pid(); }
  MaybeFailure ReadFailed(int64_t rank) const;

  const Exchange& exchange_;
  const std::vector<Peer>& peers_;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_EXCHANGE_H_
