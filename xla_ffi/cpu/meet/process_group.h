// The processes of a job on one host: how their CPU ranks meet and read each other's rows.
//
// Control messages go over one Unix socket per pair of processes, so a death is seen at once (end
// of file without a goodbye). Payload has no buffer of its own: a process reads the rows it needs
// straight from the owner's memory (process_vm_readv), between two messages of the owner.
//
// Protocol of one call, per process of the group:
//   1. all ranks of this process have come, Prepare has run
//   2. send ARRIVED with the addresses that others may read      [A1]
//   3. ARRIVED of every other process seen -> Finish (reads)      observes [A1]
//   4. send DONE: this process reads nothing any more             [D1]
//   5. DONE of every other process seen -> the call is complete,  observes [D1]
//      and only then do the buffers behind the addresses go back to their owners
// Pairing: messages carry the name of the call, see program.h. A peer that waits for this process
// in another program, or in a later launch, will not come to a call that waits for it: both end at
// once.
// Failure: a timeout, a death or a failed read ends the whole launch here with an error that names
// the process and its ranks: what follows in the program would wait in vain. FAILED tells all
// processes, who end theirs at once.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_PROCESS_GROUP_H_
#define JAX_EP_XLA_FFI_CPU_MEET_PROCESS_GROUP_H_

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cpu/meet/exchange.h"
#include "xla_ffi/cpu/meet/messages.h"
#include "xla_ffi/cpu/meet/program.h"

namespace jax_ep::cpu {

class ProcessGroup : public std::enable_shared_from_this<ProcessGroup> {
 public:
  // The group that Connect made, or null.
  static std::shared_ptr<ProcessGroup> Current();

  // Opens this process's door and returns its address, an opaque line of text that the other
  // processes need for Connect. Throws std::runtime_error if there is a group already.
  static std::string Listen();

  // Joins all processes; `addresses[i]` is what Listen returned in process i. Throws
  // std::runtime_error naming the process that is late, on another host or not readable.
  static void Connect(int64_t process_index, const std::vector<std::string>& addresses,
                      std::chrono::nanoseconds timeout);

  // Says goodbye and closes all. Calls in flight fail. Harmless without a group.
  static void Disconnect();

  ~ProcessGroup();
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int64_t process_index() const { return process_index_; }

  // What all processes call this launch. To be asked when the first rank of this process comes to
  // a call of it, so that launches count whatever becomes of them.
  LaunchKey NameLaunch(const CallSite& site, int64_t run);

  // Hands over a call whose ranks of this process have all come. Prepare, Finish and `completion`
  // run on threads of the worker pool or on this one.
  void Submit(const CallSite& site, const LaunchKey& launch, int64_t group, uint64_t sizes_hash,
              std::unique_ptr<CollectiveOp> op, const Timeouts& timeouts, Completion completion);

  // Tells all processes that this one ends the launch with a failure.
  void GiveUp(const LaunchKey& launch, const Failure& failure);

 private:
  using Exchanges = std::list<std::shared_ptr<Exchange>>;
  struct Launches {  // of programs on the same devices
    struct Launch {
      uint64_t program_id;
      int64_t run, launch;
    };
    int64_t next = 0;
    std::deque<Launch> recent;
  };

  ProcessGroup(int64_t process_index, std::vector<Connection> connections);

  void Loop();
  void Receive(int64_t process);
  void Handle(int64_t process, const Message& message);
  void MarkDead(int64_t process);
  void StartIfReady(const std::shared_ptr<Exchange>& exchange);
  void Read(const std::shared_ptr<Exchange>& exchange);
  void CompleteIfDone(const std::shared_ptr<Exchange>& exchange);
  void FailLaunch(const LaunchKey& launch, const Failure& failure);
  // The launches of those of our calls for which `why` gives a failure.
  void FailAll(const std::function<MaybeFailure(const Exchange&)>& why);
  // False if it was known.
  bool RememberFailed(const LaunchKey& launch, int64_t process, const Failure& failure);
  void GaveUp(int64_t process, const LaunchKey& launch, const Failure& failure);
  // Drops what a peer has arrived at and none of ours.
  void Forget(int64_t process, const std::function<bool(const CallKey&)>& which);
  MaybeFailure FailureBefore(const Exchange& exchange) const;
  MaybeFailure Unlike(const Exchange& exchange, const Likeness& other) const;
  // Why `process`, which waits in `theirs`, can never come to `ours`; or any who waits somewhere.
  MaybeFailure Conflict(const Exchange& ours, const Exchange& theirs, int64_t process) const;
  MaybeFailure Conflict(const Exchange& ours) const;
  void Erase(const std::shared_ptr<Exchange>& exchange);
  void ExpireOverdue();
  Clock::time_point NextDeadline() const;
  Failure Lost(const Exchange& exchange, int64_t process) const;
  void Wake();

  const int64_t process_index_;
  const UniqueFd wake_fd_;
  std::vector<Peer> peers_;  // by process; the entry of this one is unused
  std::thread thread_;

  std::mutex mutex_;
  bool closing_ = false;
  std::map<CallKey, Exchanges> exchanges_;
  std::map<uint64_t, Launches> launches_;                   // by the devices
  std::map<LaunchKey, std::map<int64_t, Failure>> failed_;  // by process; the latest launches
  std::deque<LaunchKey> failed_order_;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_PROCESS_GROUP_H_
