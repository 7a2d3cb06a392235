#include "xla_ffi/cpu/meet/rendezvous.h"

#include <algorithm>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "xla_ffi/cpu/meet/notice.h"
#include "xla_ffi/cpu/meet/process_group.h"
#include "xla_ffi/cpu/meet/worker_pool.h"

namespace jax_ep::cpu {
namespace {

constexpr size_t kNumRememberedFailures = 256;

// Everything is in this process.
class NoPeers final : public PeerMemory {
 public:
  bool is_local(int64_t) const override { return true; }
  const std::vector<uint64_t>& published(int64_t) const override {
    static const std::vector<uint64_t> none;
    return none;
  }
  MaybeFailure Read(int64_t, uint64_t, void*, size_t) const override { return Unreachable(); }
  MaybeFailure ReadRows(int64_t, const std::vector<uint64_t>&, size_t, void*) const override {
    return Unreachable();
  }

 private:
  static MaybeFailure Unreachable() {
    return Failure{FailureCode::kInternal, "jax_ep: a local rank was read as a remote one"};
  }
};

// Completions never run one after the other on a thread: each may block on the next (see
// worker_pool.h). `inline_rank`'s is safe on the caller's thread, because nobody waits on it yet.
void CompleteAll(Members& members, const MaybeFailure& failure, int64_t inline_rank) {
  for (Member& member : members) {
    if (!member.done || member.rank == inline_rank) continue;
    try {
      WorkerPool::Get().Run([done = member.done, failure] { done(failure); });
    } catch (const std::system_error&) {  // no thread is to be had: better here than never
      member.done(failure);
    }
  }
  if (inline_rank >= 0) members[inline_rank].done(failure);
}

}  // namespace

Rendezvous& Rendezvous::Get() {
  static Rendezvous* const rendezvous = new Rendezvous;
  return *rendezvous;
}

void Rendezvous::set_timeouts(const Timeouts& timeouts) {
  std::lock_guard<std::mutex> lock(mutex_);
  timeouts_ = timeouts;
}

Timeouts Rendezvous::timeouts() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return timeouts_;
}

void Rendezvous::set_advice(std::string advice) {
  std::lock_guard<std::mutex> lock(mutex_);
  advice_ = std::move(advice);
}

void Rendezvous::Arrive(std::shared_ptr<const CallSite> site, int64_t run, int64_t group,
                        Member member, const OpFactory& make_op) {
  const int64_t num_ranks = site->num_ranks;
  const int64_t rank = member.rank;
  const int64_t* processes = site->group_processes(group);
  const bool spans_processes =
      std::any_of(processes, processes + num_ranks, [&](int64_t p) { return p != processes[0]; });

  std::shared_ptr<ProcessGroup> process_group;
  std::vector<bool> expected(num_ranks, true);
  int64_t num_expected = num_ranks;
  if (spans_processes) {
    process_group = ProcessGroup::Current();
    if (process_group == nullptr) {
      member.done(Failure{FailureCode::kFailedPrecondition,
                          site->op + ": the ranks of this group live in several processes; call "
                                     "jax_ep.initialize() in each of them first"});
      return;
    }
    for (int64_t r = 0; r < num_ranks; ++r) {
      expected[r] = processes[r] == process_group->process_index();
    }
    num_expected = std::count(expected.begin(), expected.end(), true);
  }
  if (!expected[rank]) {
    member.done(Failure{FailureCode::kFailedPrecondition,
                        site->op + ": rank " + std::to_string(rank) +
                            " runs in this process, but the mesh it was compiled for places it in "
                            "process " +
                            std::to_string(processes[rank])});
    return;
  }

  const LaunchKey launch =
      process_group != nullptr ? process_group->NameLaunch(*site, run) : LaunchKey{};
  const Key key{site->id, run, group};
  Members full;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    for (const auto& [failed_run, failure] : failed_) {
      if (failed_run != Run{site->place.program->id(), run}) continue;
      const Failure copy = failure;
      lock.unlock();
      member.done(copy);
      return;
    }
    if (!watching_ && num_expected > 1) {
      std::thread([this] { Watch(); }).detach();
      watching_ = true;
    }
    std::deque<Meeting>& queue = meetings_[key];
    auto meeting = std::find_if(queue.begin(), queue.end(),
                                [&](const Meeting& m) { return !m.arrived[rank]; });
    if (meeting == queue.end()) {
      Meeting fresh;
      fresh.site = site;
      fresh.process_group = process_group;
      fresh.launch = launch;
      fresh.members.resize(num_ranks);
      fresh.arrived.resize(num_ranks);
      fresh.deadline = Clock::now() + timeouts_.arrival;
      fresh.notice = Clock::now() + NoticeAfter(timeouts_);
      queue.push_back(std::move(fresh));
      meeting = std::prev(queue.end());
    }
    meeting->members[rank] = std::move(member);
    meeting->arrived[rank] = true;
    if (++meeting->num_arrived == num_expected) {
      // Taken out before the work starts: the next iteration's ranks may already come.
      full = std::move(meeting->members);
      queue.erase(meeting);
      if (queue.empty()) meetings_.erase(key);
    } else if (std::min(meeting->deadline, meeting->notice) < next_wake_) {
      next_wake_ = std::min(meeting->deadline, meeting->notice);
      deadline_changed_.notify_one();
    }
  }
  if (full.empty()) return;

  for (int64_t r = 0; r < num_ranks; ++r) full[r].rank = r;
  std::unique_ptr<CollectiveOp> op;
  MaybeFailure failure;
  try {
    op = make_op(full);
    if (!spans_processes) {
      const NoPeers no_peers;
      op->Prepare(no_peers);
      failure = op->Finish(no_peers);
    }
  } catch (const std::exception& e) {  // the others must hear of it too
    failure = Failure{FailureCode::kInternal, site->op + ": " + e.what()};
  }
  if (failure || !spans_processes) {
    if (failure && spans_processes) process_group->GiveUp(launch, *failure);
    if (failure) FailRun(*site, run, *failure);
    CompleteAll(full, failure, rank);
    return;
  }
  const uint64_t sizes_hash = full[rank].sizes_hash;
  auto members = std::make_shared<Members>(std::move(full));
  const auto complete = [this, site, run, members](const MaybeFailure& f) {
    if (f) FailRun(*site, run, *f);
    CompleteAll(*members, f, -1);
  };
  try {
    process_group->Submit(*site, launch, group, sizes_hash, std::move(op), timeouts(), complete);
  } catch (const std::exception& e) {
    const Failure lost{FailureCode::kInternal, site->op + ": " + e.what()};
    process_group->GiveUp(launch, lost);
    complete(lost);
  }
}

void Rendezvous::FailRun(const CallSite& site, int64_t run, const Failure& failure) {
  const Run failed{site.place.program->id(), run};
  std::vector<Meeting> ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_.emplace_back(failed, failure);
    if (failed_.size() > kNumRememberedFailures) failed_.pop_front();
    for (auto it = meetings_.begin(); it != meetings_.end();) {
      if (Run{it->second.front().site->place.program->id(), std::get<1>(it->first)} != failed) {
        ++it;
        continue;
      }
      for (Meeting& meeting : it->second) ended.push_back(std::move(meeting));
      it = meetings_.erase(it);
    }
  }
  for (Meeting& meeting : ended) {
    if (meeting.process_group != nullptr) meeting.process_group->GiveUp(meeting.launch, failure);
    CompleteAll(meeting.members, failure, -1);
  }
}

std::string Rendezvous::ListRanks(const Meeting& meeting, int64_t group, bool came) {
  const CallSite& site = *meeting.site;
  const int64_t* processes = site.group_processes(group);
  int64_t mine = processes[0];  // this process: the one that those who came run in
  for (int64_t r = 0; r < site.num_ranks; ++r) {
    if (meeting.arrived[r]) mine = processes[r];
  }
  std::string list;
  for (int64_t r = 0; r < site.num_ranks; ++r) {
    if (processes[r] != mine || meeting.arrived[r] != came) continue;
    list += (list.empty() ? "" : ", ") + std::to_string(r);
  }
  return list.empty() ? "none" : list;
}

Failure Rendezvous::Overdue(const Meeting& meeting, int64_t group) const {
  return {FailureCode::kDeadlineExceeded,
          meeting.site->op + ": rank " + ListRanks(meeting, group, false) + " of group " +
              std::to_string(group) +
              " did not come within the timeout (came: " + ListRanks(meeting, group, true) +
              "); every rank of a group must call the operation. jax_ep.set_timeout and "
              "JAX_EP_TIMEOUT set how long is waited" +
              (advice_.empty() ? "" : ". " + advice_)};
}

void Rendezvous::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (next_wake_ == Clock::time_point::max()) {
      deadline_changed_.wait(lock);
    } else {
      deadline_changed_.wait_for(lock, next_wake_ - Clock::now());
    }
    const Clock::time_point now = Clock::now();
    next_wake_ = Clock::time_point::max();
    struct Late {
      std::shared_ptr<const CallSite> site;
      int64_t run;
      Failure failure;
    };
    std::vector<Late> late;
    for (auto& [key, queue] : meetings_) {
      // Only the oldest can be first: a rank missing there is missing in all that follow.
      Meeting& oldest = queue.front();
      const int64_t group = std::get<2>(key);
      if (oldest.deadline <= now) {
        late.push_back({oldest.site, std::get<1>(key), Overdue(oldest, group)});
        if (!advice_.empty()) Notice(late.back().failure.message);
        continue;
      }
      if (oldest.notice <= now) {
        oldest.notice = Clock::time_point::max();
        Notice(oldest.site->op + " waits for rank " + ListRanks(oldest, group, false) +
               " of group " + std::to_string(group) + ", of this process" +
               (advice_.empty() ? "" : ". " + advice_));
      }
      next_wake_ = std::min({next_wake_, oldest.deadline, oldest.notice});
    }
    if (late.empty()) continue;
    lock.unlock();
    for (const Late& one : late) FailRun(*one.site, one.run, one.failure);
    lock.lock();
    next_wake_ = now;  // look again: meetings may have begun meanwhile
  }
}

}  // namespace jax_ep::cpu
