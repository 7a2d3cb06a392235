#include "xla_ffi/cpu/meet/process_group.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

#include "xla_ffi/cpu/meet/join.h"
#include "xla_ffi/cpu/meet/notice.h"
#include "xla_ffi/cpu/meet/worker_pool.h"

namespace jax_ep::cpu {
namespace {

std::mutex g_mutex;
// Never destroyed: a process that exits without Disconnect leaves its thread running.
std::shared_ptr<ProcessGroup>& g_current = *new std::shared_ptr<ProcessGroup>;
constexpr size_t kNumRememberedLaunches = 256;

std::unique_ptr<Door>& g_door = *new std::unique_ptr<Door>;

UniqueFd MakeEventFd() {
  UniqueFd fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) Throw(std::string("eventfd: ") + strerror(errno));
  return fd;
}

}  // namespace

// ---------------------------------------------------------------- set-up and tear-down

std::shared_ptr<ProcessGroup> ProcessGroup::Current() {
  std::lock_guard<std::mutex> lock(g_mutex);
  return g_current;
}

std::string ProcessGroup::Listen() {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_current != nullptr) Throw("this process is connected already; call finalize() first");
  g_door = std::make_unique<Door>();
  return g_door->address();
}

void ProcessGroup::Connect(int64_t process_index, const std::vector<std::string>& addresses,
                           std::chrono::nanoseconds timeout) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_current != nullptr) Throw("this process is connected already; call finalize() first");
  if (g_door == nullptr) Throw("Connect without Listen");
  std::shared_ptr<ProcessGroup> group(
      new ProcessGroup(process_index, g_door->Connect(process_index, addresses, timeout)));
  g_door = nullptr;
  group->thread_ = std::thread([raw = group.get()] { raw->Loop(); });
  g_current = std::move(group);
}

void ProcessGroup::Disconnect() {
  std::shared_ptr<ProcessGroup> group;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    group = std::move(g_current);
    g_current = nullptr;
    g_door = nullptr;
  }
  if (group == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(group->mutex_);
    group->closing_ = true;
    for (Peer& peer : group->peers_) peer.Send(MessageType::kGoodbye, CallKey{}, {});
  }
  group->Wake();
  group->thread_.join();
}

ProcessGroup::ProcessGroup(int64_t process_index, std::vector<Connection> connections)
    : process_index_(process_index), wake_fd_(MakeEventFd()) {
  for (Connection& connection : connections) {
    peers_.push_back(connection.socket ? Peer(std::move(connection)) : Peer());
  }
}

ProcessGroup::~ProcessGroup() = default;

// ---------------------------------------------------------------- a call

LaunchKey ProcessGroup::NameLaunch(const CallSite& site, int64_t run) {
  Program& program = *site.place.program;
  LaunchKey key{site.devices_hash, 0, program.Close().hash};
  std::lock_guard<std::mutex> lock(mutex_);
  Launches& launches = launches_[key.devices];
  for (auto it = launches.recent.rbegin(); it != launches.recent.rend(); ++it) {
    if (it->program_id != program.id() || it->run != run) continue;
    key.launch = it->launch;
    return key;
  }
  // A launch of another program that a peer has given up is one that this process has left out. One
  // of this program may be this one, which comes late: it takes that name, and fails.
  const auto left_out = [&] {
    bool is_left_out = false;
    for (auto it = failed_.lower_bound({key.devices, launches.next, 0});
         it != failed_.end() && it->first.devices == key.devices &&
         it->first.launch == launches.next;
         ++it) {
      if (it->first.program == key.program) return false;
      is_left_out = true;
    }
    return is_left_out;
  };
  while (left_out()) ++launches.next;
  key.launch = launches.next++;
  launches.recent.push_back({program.id(), run, key.launch});
  if (launches.recent.size() > kNumRememberedLaunches) launches.recent.pop_front();
  return key;
}

void ProcessGroup::Submit(const CallSite& site, const LaunchKey& launch, int64_t group,
                          uint64_t sizes_hash, std::unique_ptr<CollectiveOp> op,
                          const Timeouts& timeouts, Completion completion) {
  const int64_t* processes = site.group_processes(group);
  const int64_t* devices = site.group_devices(group);
  Exchange local;
  local.key = CallKey{launch, site.place.index, group};
  local.likeness = {sizes_hash, site.place.program->Close().num_sites};
  local.op_name = site.op;
  local.rank_process.assign(processes, processes + site.num_ranks);
  local.rank_device.assign(devices, devices + site.num_ranks);
  std::vector<int64_t> own_ranks;
  for (int64_t r = 0; r < site.num_ranks; ++r) {
    if (processes[r] == process_index_) {
      own_ranks.push_back(r);
    } else {
      local.others.insert(processes[r]);
    }
  }
  const auto fail = [&](const Failure& failure) {  // the others must hear of it too
    GiveUp(launch, failure);
    completion(failure);
  };
  if (*local.others.rbegin() >= static_cast<int64_t>(peers_.size()) || *local.others.begin() < 0) {
    return fail(Failure{FailureCode::kFailedPrecondition,
                        site.op + ": the mesh names a process that this job does not have"});
  }
  try {
    op->Prepare(PeerView(local, peers_));
  } catch (const std::exception& e) {
    return fail(Failure{FailureCode::kInternal, site.op + ": " + e.what()});
  }
  const std::string published = Exchange::Publish(local.likeness, *op, own_ranks);

  std::lock_guard<std::mutex> lock(mutex_);
  Exchanges& queue = exchanges_[local.key];
  auto it = std::find_if(queue.begin(), queue.end(), [](const auto& e) { return !e->is_ours(); });
  if (it == queue.end()) it = queue.insert(queue.end(), std::make_shared<Exchange>());
  const std::shared_ptr<Exchange> exchange = *it;
  exchange->key = local.key;
  exchange->op_name = local.op_name;
  exchange->rank_process = std::move(local.rank_process);
  exchange->rank_device = std::move(local.rank_device);
  exchange->others = std::move(local.others);
  exchange->op = std::move(op);
  exchange->completion = std::move(completion);
  exchange->timeouts = timeouts;
  exchange->deadline = Clock::now() + timeouts.arrival;
  exchange->notice = Clock::now() + NoticeAfter(timeouts);
  MaybeFailure failure = FailureBefore(*exchange);
  if (!failure && !exchange->arrived.empty()) failure = Unlike(*exchange, local.likeness);
  exchange->likeness = local.likeness;
  if (!failure) {
    for (int64_t p : exchange->others) {
      peers_[p].Send(MessageType::kArrived, exchange->key, published);  // [A1]
    }
    failure = Conflict(*exchange);
  }
  if (failure) {
    FailLaunch(launch, *failure);
    return;
  }
  StartIfReady(exchange);
  Wake();  // the new deadline
}

void ProcessGroup::GiveUp(const LaunchKey& launch, const Failure& failure) {
  std::lock_guard<std::mutex> lock(mutex_);
  FailLaunch(launch, failure);
}

MaybeFailure ProcessGroup::FailureBefore(const Exchange& exchange) const {
  if (closing_) {
    return Failure{FailureCode::kUnavailable,
                   exchange.op_name + ": jax_ep.finalize() has been called"};
  }
  const auto failed = failed_.find(exchange.key.launch);
  if (failed != failed_.end()) {
    for (const auto& [process, failure] : failed->second) {
      if (process == process_index_ || exchange.others.count(process) > 0) return failure;
    }
  }
  for (int64_t p : exchange.others) {
    if (!peers_[p].alive()) return Lost(exchange, p);
  }
  return std::nullopt;
}

void ProcessGroup::StartIfReady(const std::shared_ptr<Exchange>& exchange) {
  if (!exchange->is_ours() || exchange->started || exchange->failure) return;
  if (!exchange->all_arrived()) return;  // observes [A1]
  exchange->started = true;
  WorkerPool::Get().Run([self = shared_from_this(), exchange] { self->Read(exchange); });
}

void ProcessGroup::Read(const std::shared_ptr<Exchange>& exchange) {
  MaybeFailure failure;
  try {
    failure = exchange->op->Finish(PeerView(*exchange, peers_));
  } catch (const std::exception& e) {
    failure = Failure{FailureCode::kInternal, exchange->op_name + ": " + e.what()};
  }
  std::lock_guard<std::mutex> lock(mutex_);
  // A peer that gave up meanwhile has said so before it let go of its buffers: what was read from
  // them counts only if nothing of that kind has come.
  for (int64_t p : exchange->others) Receive(p);
  exchange->local_done = true;
  // The others have their own work to end.
  exchange->deadline = Clock::now() + exchange->timeouts.progress;
  if (exchange->failure) failure = exchange->failure;
  if (failure) {
    FailLaunch(exchange->key.launch, *failure);
    return;
  }
  for (int64_t p : exchange->others) {
    peers_[p].Send(MessageType::kDone, exchange->key, {});  // [D1]
  }
  CompleteIfDone(exchange);
  Wake();  // while Finish ran, the deadline was not watched
}

void ProcessGroup::CompleteIfDone(const std::shared_ptr<Exchange>& exchange) {
  if (!exchange->local_done || !exchange->all_done()) return;  // observes [D1]
  Erase(exchange);
  WorkerPool::Get().Run([exchange] {
    exchange->op = nullptr;
    exchange->completion(std::nullopt);
  });
}

void ProcessGroup::FailLaunch(const LaunchKey& launch, const Failure& failure) {
  const bool is_new = RememberFailed(launch, process_index_, failure);
  // Before anything that they may read is let go.
  if (is_new) {
    for (Peer& peer : peers_)
      peer.Send(MessageType::kFailed, CallKey{launch, 0, 0}, failure.message);
  }
  std::vector<std::shared_ptr<Exchange>> ended;
  for (const auto& [key, queue] : exchanges_) {
    if (!(key.launch == launch)) continue;
    for (const auto& exchange : queue) {
      if (!exchange->is_ours()) continue;
      if (!exchange->failure) exchange->failure = failure;
      if (!exchange->reads()) ended.push_back(exchange);  // else Finish still writes: see Read
    }
  }
  for (const auto& exchange : ended) {
    Erase(exchange);
    WorkerPool::Get().Run([exchange] {
      exchange->op = nullptr;
      exchange->completion(exchange->failure);
    });
  }
}

bool ProcessGroup::RememberFailed(const LaunchKey& launch, int64_t process,
                                  const Failure& failure) {
  const auto [it, is_first] = failed_.try_emplace(launch);
  if (is_first) {
    failed_order_.push_back(launch);
    if (failed_order_.size() > kNumRememberedLaunches) {
      failed_.erase(failed_order_.front());
      failed_order_.pop_front();
    }
  }
  return it->second.emplace(process, failure).second;
}

void ProcessGroup::FailAll(const std::function<MaybeFailure(const Exchange&)>& why) {
  std::map<LaunchKey, Failure> found;  // FailLaunch takes exchanges out of exchanges_
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& exchange : queue) {
      if (!exchange->is_ours()) continue;
      if (const MaybeFailure failure = why(*exchange)) found.emplace(key.launch, *failure);
    }
  }
  for (const auto& [launch, failure] : found) FailLaunch(launch, failure);
}

void ProcessGroup::Erase(const std::shared_ptr<Exchange>& exchange) {
  auto it = exchanges_.find(exchange->key);
  it->second.remove(exchange);
  if (it->second.empty()) exchanges_.erase(it);
}

Failure ProcessGroup::Lost(const Exchange& exchange, int64_t process) const {
  const Peer& peer = peers_[process];
  return Failure{FailureCode::kUnavailable,
                 exchange.op_name + ": rank " + exchange.ranks_of(process) + " of group " +
                     std::to_string(exchange.key.group) + " cannot come: process " +
                     std::to_string(process) + " (pid " + std::to_string(peer.pid()) + ") has " +
                     (peer.said_goodbye() ? "called jax_ep.finalize()" : "died")};
}

MaybeFailure ProcessGroup::Unlike(const Exchange& exchange, const Likeness& other) const {
  if (exchange.likeness.sizes_hash == other.sizes_hash) return std::nullopt;
  return Failure{FailureCode::kFailedPrecondition,
                 (exchange.op_name.empty() ? "jax_ep" : exchange.op_name) +
                     ": processes call the operation with rows of other sizes or types; all "
                     "processes must run the same program"};
}

MaybeFailure ProcessGroup::Conflict(const Exchange& ours, const Exchange& theirs,
                                    int64_t process) const {
  const LaunchKey &here = ours.key.launch, &there = theirs.key.launch;
  if (!ours.waits_for(process) || theirs.arrived.count(process) == 0 ||
      here.devices != there.devices) {
    return std::nullopt;
  }
  std::string what;
  if (there.launch > here.launch) {
    what = "has gone on to a later launch";
  } else if (there.launch == here.launch && there.program != here.program) {
    what = "waits in another program: one with " + std::to_string(theirs.likeness.num_sites) +
           " calls of jax_ep, here it has " + std::to_string(ours.likeness.num_sites);
  } else {
    return std::nullopt;
  }
  what +=
      ". All processes must launch the programs that they share in the same order and equally "
      "often, and compile or load them alike: with the same versions, options and flags, and not "
      "several serialized ones in a row in one process that another runs one by one";
  return Failure{FailureCode::kFailedPrecondition,
                 ours.op_name + ": rank " + ours.ranks_of(process) + " of group " +
                     std::to_string(ours.key.group) + " cannot come: process " +
                     std::to_string(process) + " " + what};
}

MaybeFailure ProcessGroup::Conflict(const Exchange& ours) const {
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& theirs : queue) {
      if (theirs->is_ours()) continue;
      for (const auto& [process, ranks] : theirs->arrived) {
        if (MaybeFailure failure = Conflict(ours, *theirs, process)) return failure;
      }
    }
  }
  return std::nullopt;
}

void ProcessGroup::ExpireOverdue() {
  const Clock::time_point now = Clock::now();
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& e : queue) {
      if (!e->expires() || e->started || e->notice > now || e->deadline <= now) continue;
      e->notice = Clock::time_point::max();
      Notice(e->op_name + " waits for rank " + e->missing() + " of group " +
             std::to_string(key.group));
    }
  }
  FailAll([&](const Exchange& e) -> MaybeFailure {
    if (!e.expires() || e.deadline > now) return std::nullopt;
    return Failure{FailureCode::kDeadlineExceeded,
                   e.op_name + ": rank " + e.missing() + " of group " +
                       std::to_string(e.key.group) + " did not " + (e.started ? "finish" : "come") +
                       " within the timeout; every rank of a group must call the operation. "
                       "jax_ep.set_timeout sets how long is waited"};
  });
}

Clock::time_point ProcessGroup::NextDeadline() const {
  Clock::time_point next = Clock::time_point::max();
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& e : queue) {
      if (!e->expires()) continue;
      next = std::min(next, e->deadline);
      if (!e->started) next = std::min(next, e->notice);
    }
  }
  return next;
}

// ---------------------------------------------------------------- what the peers say

void ProcessGroup::Receive(int64_t process) {
  Peer& peer = peers_[process];
  if (!peer.alive()) return;
  if (!peer.Receive([&](const Message& message) { Handle(process, message); })) MarkDead(process);
}

void ProcessGroup::Handle(int64_t process, const Message& message) {
  if (message.type == MessageType::kFailed) {
    GaveUp(process, message.key.launch,
           Failure{FailureCode::kUnavailable, "process " + std::to_string(process) +
                                                  " gave up: " + std::string(message.payload)});
    return;
  }
  Exchanges& queue = exchanges_[message.key];
  // The oldest call of this key in which the peer has not taken this step yet.
  auto it = std::find_if(queue.begin(), queue.end(), [&](const auto& e) {
    return message.type == MessageType::kDone ? e->done.count(process) == 0
                                              : e->arrived.count(process) == 0;
  });
  if (it == queue.end()) {
    it = queue.insert(it, std::make_shared<Exchange>());
    (*it)->key = message.key;
  }
  const std::shared_ptr<Exchange> exchange = *it;
  if (message.type == MessageType::kDone) {
    exchange->done.insert(process);
    CompleteIfDone(exchange);
    return;
  }
  const bool is_first = !exchange->is_ours() && exchange->arrived.empty();
  const Likeness theirs = exchange->TakePublished(process, message.payload);
  if (is_first) exchange->likeness = theirs;
  if (const MaybeFailure failure = Unlike(*exchange, theirs)) {
    FailLaunch(message.key.launch, *failure);
    return;
  }
  StartIfReady(exchange);
  FailAll([&](const Exchange& ours) { return Conflict(ours, *exchange, process); });
}

void ProcessGroup::GaveUp(int64_t process, const LaunchKey& launch, const Failure& failure) {
  RememberFailed(launch, process, failure);
  Forget(process, [&](const CallKey& key) { return key.launch == launch; });
  FailAll([&](const Exchange& e) -> MaybeFailure {
    if (!(e.key.launch == launch) || e.others.count(process) == 0) return std::nullopt;
    return failure;
  });
}

void ProcessGroup::MarkDead(int64_t process) {
  Forget(process, [](const CallKey&) { return true; });
  FailAll([&](const Exchange& e) -> MaybeFailure {
    if (e.others.count(process) == 0 || e.done.count(process) > 0) return std::nullopt;
    return Lost(e, process);
  });
}

void ProcessGroup::Forget(int64_t process, const std::function<bool(const CallKey&)>& which) {
  for (auto it = exchanges_.begin(); it != exchanges_.end();) {
    Exchanges& queue = it->second;
    if (which(it->first)) {
      for (const auto& exchange : queue) {
        if (!exchange->is_ours()) exchange->arrived.erase(process);
      }
      queue.remove_if([](const auto& e) { return !e->is_ours() && e->arrived.empty(); });
    }
    it = queue.empty() ? exchanges_.erase(it) : std::next(it);
  }
}

// ---------------------------------------------------------------- the group's thread

void ProcessGroup::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_.get(), &one, sizeof one);
}

void ProcessGroup::Loop() {
  std::vector<pollfd> fds;
  std::vector<int64_t> owner;
  for (;;) {
    int timeout_ms = -1;
    fds.assign(1, pollfd{wake_fd_.get(), POLLIN, 0});
    owner.assign(1, -1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closing_) {
        FailAll([](const Exchange& e) -> MaybeFailure {
          return Failure{FailureCode::kUnavailable,
                         e.op_name + ": jax_ep.finalize() was called during the call"};
        });
        return;
      }
      const Clock::time_point next = NextDeadline();
      if (next != Clock::time_point::max()) {
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count();
        timeout_ms = static_cast<int>(std::clamp<int64_t>(left + 1, 0, 60000));
      }
      for (size_t p = 0; p < peers_.size(); ++p) {
        if (!peers_[p].alive()) continue;
        const short events = peers_[p].has_unsent() ? POLLIN | POLLOUT : POLLIN;
        fds.push_back({peers_[p].fd(), events, 0});
        owner.push_back(static_cast<int64_t>(p));
      }
    }
    poll(fds.data(), fds.size(), timeout_ms);
    if (fds[0].revents != 0) {
      uint64_t count;
      [[maybe_unused]] const ssize_t n = read(wake_fd_.get(), &count, sizeof count);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 1; i < fds.size(); ++i) {
      if ((fds[i].revents & POLLOUT) != 0) peers_[owner[i]].Flush();
      if ((fds[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) Receive(owner[i]);
    }
    ExpireOverdue();
  }
}

}  // namespace jax_ep::cpu
