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
#include "xla_ffi/cpu/meet/worker_pool.h"

namespace jax_ep::cpu {
namespace {

std::mutex g_mutex;
// Never destroyed: a process that exits without Disconnect leaves its thread running.
std::shared_ptr<ProcessGroup>& g_current = *new std::shared_ptr<ProcessGroup>;
std::unique_ptr<Door>& g_door = *new std::unique_ptr<Door>;

[[noreturn]] void Throw(const std::string& what) { throw std::runtime_error("jax_ep: " + what); }

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

void ProcessGroup::Submit(const CallSite& site, int64_t run, int64_t group,
                          std::unique_ptr<CollectiveOp> op, const Timeouts& timeouts,
                          Completion completion) {
  const int64_t* processes = site.group_processes(group);
  Exchange local;
  local.key = CallKey{site.signature, site.ordinal, run, group};
  local.op_name = site.op;
  local.rank_process.assign(processes, processes + site.num_ranks);
  std::vector<int64_t> own_ranks;
  for (int64_t r = 0; r < site.num_ranks; ++r) {
    if (processes[r] == process_index_) {
      own_ranks.push_back(r);
    } else {
      local.others.insert(processes[r]);
    }
  }
  if (*local.others.rbegin() >= static_cast<int64_t>(peers_.size()) || *local.others.begin() < 0) {
    completion(Failure{FailureCode::kFailedPrecondition,
                       site.op + ": the mesh names a process that this job does not have"});
    return;
  }
  try {
    op->Prepare(PeerView(local, peers_));
  } catch (const std::exception& e) {
    completion(Failure{FailureCode::kInternal, site.op + ": " + e.what()});
    return;
  }
  const std::string published = Exchange::Publish(*op, own_ranks);

  std::lock_guard<std::mutex> lock(mutex_);
  Exchanges& queue = exchanges_[local.key];
  auto it = std::find_if(queue.begin(), queue.end(), [](const auto& e) { return !e->is_ours(); });
  if (it == queue.end()) it = queue.insert(queue.end(), std::make_shared<Exchange>());
  const std::shared_ptr<Exchange> exchange = *it;
  exchange->key = local.key;
  exchange->op_name = local.op_name;
  exchange->rank_process = std::move(local.rank_process);
  exchange->others = std::move(local.others);
  exchange->op = std::move(op);
  exchange->completion = std::move(completion);
  exchange->timeouts = timeouts;
  exchange->deadline = Clock::now() + timeouts.arrival;
  if (closing_ && !exchange->failure) {
    exchange->failure = Failure{FailureCode::kUnavailable,
                                exchange->op_name + ": jax_ep.finalize() has been called"};
  }
  for (int64_t p : exchange->others) {
    if (!peers_[p].alive() && !exchange->failure) exchange->failure = Lost(*exchange, p);
  }
  if (exchange->failure) {
    Fail(exchange, *exchange->failure, /*tell_peers=*/true);
    return;
  }
  for (int64_t p : exchange->others) {
    peers_[p].Send(MessageType::kArrived, exchange->key, published);  // [A1]
  }
  StartIfReady(exchange);
  Wake();  // the new deadline
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
    Fail(exchange, *failure, /*tell_peers=*/true);
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

void ProcessGroup::Fail(const std::shared_ptr<Exchange>& exchange, Failure failure,
                        bool tell_peers) {
  exchange->failure = failure;
  if (!exchange->is_ours()) return;  // waits for this process's ranks, to fail them
  if (exchange->reads()) return;     // Finish still writes; it comes back here
  if (tell_peers) {
    for (int64_t p : exchange->others) {
      peers_[p].Send(MessageType::kFailed, exchange->key, failure.message);
    }
  }
  Erase(exchange);
  WorkerPool::Get().Run([exchange, failure = std::move(failure)] {
    exchange->op = nullptr;
    exchange->completion(failure);
  });
}

void ProcessGroup::FailAll(const std::function<bool(const Exchange&)>& which,
                           const std::function<Failure(const Exchange&)>& why) {
  std::vector<std::shared_ptr<Exchange>> found;  // Fail takes them out of exchanges_
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& exchange : queue) {
      if (which(*exchange)) found.push_back(exchange);
    }
  }
  for (const auto& exchange : found) Fail(exchange, why(*exchange), /*tell_peers=*/true);
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

std::string ProcessGroup::OtherProgram(const Exchange& exchange) const {
  for (const auto& [key, queue] : exchanges_) {
    const Exchange& first = *queue.front();
    const bool alike = key.signature == exchange.key.signature && key.group == exchange.key.group &&
                       !(key == exchange.key);
    if (!alike || first.failure || first.is_ours() || first.arrived.empty()) continue;
    return ". Process " + std::to_string(first.arrived.begin()->first) +
           " waits at the same operation of a program that XLA numbers otherwise: it was compiled "
           "with other options, a different number of times, or traced from other lines of code "
           "(JAX puts them into the program, for example when one process alone calls lower())";
  }
  return {};
}

void ProcessGroup::ExpireOverdue() {
  const Clock::time_point now = Clock::now();
  FailAll([&](const Exchange& e) { return e.expires() && e.deadline <= now; },
          [&](const Exchange& e) {
            return Failure{
                FailureCode::kDeadlineExceeded,
                e.op_name + ": rank " + e.missing() + " of group " + std::to_string(e.key.group) +
                    " did not " + (e.started ? "finish" : "come") +
                    " within the timeout; every rank of a group must call the operation, and all "
                    "processes must compile the same programs in the same order" +
                    OtherProgram(e)};
          });
}

Clock::time_point ProcessGroup::NextDeadline() const {
  Clock::time_point next = Clock::time_point::max();
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& e : queue) {
      if (e->expires()) next = std::min(next, e->deadline);
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
  Exchanges& queue = exchanges_[message.key];
  // The oldest call of this key in which the peer has not taken this step yet. It can give up at
  // any step, after DONE too, but only in the latest call that it has come to.
  auto it = std::find_if(queue.begin(), queue.end(), [&](const auto& e) {
    if (message.type == MessageType::kDone) return e->done.count(process) == 0;
    return e->arrived.count(process) == 0;
  });
  if (message.type == MessageType::kFailed && it != queue.begin()) --it;
  std::shared_ptr<Exchange> exchange;
  if (it != queue.end()) {
    exchange = *it;
  } else {
    exchange = std::make_shared<Exchange>();
    exchange->key = message.key;
    queue.push_back(exchange);
  }
  switch (message.type) {
    case MessageType::kArrived:
      exchange->TakePublished(process, message.payload);
      StartIfReady(exchange);
      return;
    case MessageType::kDone:
      exchange->done.insert(process);
      CompleteIfDone(exchange);
      return;
    case MessageType::kFailed:
      Fail(exchange,
           Failure{FailureCode::kUnavailable, "process " + std::to_string(process) +
                                                  " gave up: " + std::string(message.payload)},
           /*tell_peers=*/false);
      return;
    case MessageType::kGoodbye:
      return;
  }
}

void ProcessGroup::MarkDead(int64_t process) {
  // What it has arrived at alone is forgotten; a rank of ours that comes there finds it dead.
  for (auto it = exchanges_.begin(); it != exchanges_.end();) {
    Exchanges& queue = it->second;
    for (const auto& exchange : queue) {
      if (!exchange->is_ours()) exchange->arrived.erase(process);
    }
    queue.remove_if([](const auto& e) { return !e->is_ours() && e->arrived.empty(); });
    it = queue.empty() ? exchanges_.erase(it) : std::next(it);
  }
  FailAll(
      [&](const Exchange& e) { return e.others.count(process) > 0 && e.done.count(process) == 0; },
      [&](const Exchange& e) { return Lost(e, process); });
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
        FailAll([](const Exchange&) { return true; },
                [](const Exchange& e) {
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
