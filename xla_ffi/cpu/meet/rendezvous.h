// Where the ranks of a group meet. Nobody blocks: a rank leaves its buffers and goes; the last one
// to come does the work, and each rank's completion is called on a thread of its own.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_RENDEZVOUS_H_
#define JAX_EP_XLA_FFI_CPU_MEET_RENDEZVOUS_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "xla_ffi/cpu/meet/clock.h"
#include "xla_ffi/cpu/meet/messages.h"
#include "xla_ffi/cpu/meet/process_group.h"
#include "xla_ffi/cpu/meet/program.h"
#include "xla_ffi/cpu/ops/collective_op.h"
#include "xla_ffi/timeouts.h"

namespace jax_ep::cpu {

// How calls are paired. A device arrives at one call site once per iteration of the loop around
// it, in order, so within (site, run, group) a rank's arrival belongs to the oldest meeting that
// still lacks it. Sites are objects of the compiled program, runs are numbered by XLA: no counter
// survives a run, and independent calls never mix whatever order the devices take them in.
// A run fails as a whole: where one of its calls has failed, those that follow would wait in vain.
class Rendezvous {
 public:
  // The process's rendezvous. Never destroyed: the watchdog may outlive main().
  static Rendezvous& Get();

  // Adds one rank to its call. `member.done` is called exactly once: with no failure after the
  // whole group's work is done, or with one that names the operation and the ranks that are
  // missing. It may be called before Arrive returns, but then only if this rank came last.
  void Arrive(std::shared_ptr<const CallSite> site, int64_t run, int64_t group, Member member,
              const OpFactory& make_op);

  // How long a call waits for its last rank. Calls that wait already keep their deadline.
  void set_timeouts(const Timeouts& timeouts);
  Timeouts timeouts() const;

  // What may keep this process's ranks from coming, for the error that says so. It goes to stderr
  // as well then: a client without a free thread may never raise it. Empty: nothing is known.
  void set_advice(std::string advice);

 private:
  using Key = std::tuple<uint64_t, int64_t, int64_t>;  // site id, run, group
  using Run = std::pair<uint64_t, int64_t>;            // program id, run

  struct Meeting {
    std::shared_ptr<const CallSite> site;
    std::shared_ptr<ProcessGroup> process_group;  // null if all ranks live in this process
    LaunchKey launch;                             // in the process group
    Members members;
    std::vector<bool> arrived;
    int64_t num_arrived = 0;
    Clock::time_point deadline;
    Clock::time_point notice;  // when to say who is waited for
  };

  // The ranks of this process that have come to a meeting, or have not.
  static std::string ListRanks(const Meeting& meeting, int64_t group, bool came);
  Failure Overdue(const Meeting& meeting, int64_t group) const;
  void Watch();
  // Ends what waits of a run, and what comes to it from now on.
  void FailRun(const CallSite& site, int64_t run, const Failure& failure);

  mutable std::mutex mutex_;
  std::condition_variable deadline_changed_;
  Timeouts timeouts_;
  std::string advice_;
  std::map<Key, std::deque<Meeting>> meetings_;
  std::deque<std::pair<Run, Failure>> failed_;  // the latest ones
  Clock::time_point next_wake_ = Clock::time_point::max();
  bool watching_ = false;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_RENDEZVOUS_H_
