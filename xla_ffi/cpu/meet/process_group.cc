#include "xla_ffi/cpu/meet/process_group.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "xla_ffi/cpu/meet/process_io.h"
#include "xla_ffi/cpu/meet/worker_pool.h"

namespace jax_ep::cpu {
namespace {

constexpr uint64_t kProbeValue = 0x6a61785f65700001;  // "jax_ep", protocol version 1
constexpr size_t kMaxIov = 512;                       // rows per system call, below IOV_MAX

// Read by every peer while connecting, to show that it may read this process.
const volatile uint64_t g_probe = kProbeValue;

std::mutex g_mutex;
// Never destroyed: a process that exits without Disconnect leaves its thread running.
std::shared_ptr<ProcessGroup>& g_current = *new std::shared_ptr<ProcessGroup>;
int g_listen_fd = -1;
std::string g_nonce;

struct Hello {
  uint64_t version;
  int64_t process;
  uint64_t probe_address;
  char nonce[32];  // of the one who is called
};

struct Header {
  uint32_t type;
  uint32_t payload_bytes;
  uint64_t signature, ordinal;
  int64_t run, group;
};

[[noreturn]] void Throw(const std::string& what) { throw std::runtime_error("jax_ep: " + what); }
[[noreturn]] void ThrowErrno(const std::string& what) { Throw(what + ": " + strerror(errno)); }

}  // namespace

struct ProcessGroup::Exchange {
  Key key;
  Clock::time_point deadline;
  Timeouts timeouts;

  // From this process; absent while only others have come.
  std::string op_name;
  std::vector<int64_t> rank_process;
  std::set<int64_t> others;
  std::unique_ptr<CollectiveOp> op;
  Completion completion;
  bool started = false;     // Finish is running or has run
  bool local_done = false;  // Finish has returned

  std::map<int64_t, std::map<int64_t, std::vector<uint64_t>>> arrived;  // process -> rank -> words
  std::set<int64_t> done;
  MaybeFailure failure;
};

class ProcessGroup::PeerView final : public PeerMemory {
 public:
  PeerView(const ProcessGroup& group, const Exchange& exchange)
      : group_(group), exchange_(exchange) {}

  bool is_local(int64_t rank) const override {
    return exchange_.rank_process[rank] == group_.process_index_;
  }

  const std::vector<uint64_t>& published(int64_t rank) const override {
    return exchange_.arrived.at(exchange_.rank_process[rank]).at(rank);
  }

  MaybeFailure Read(int64_t rank, uint64_t address, void* dst, size_t bytes) const override {
    if (bytes == 0 || ReadProcess(pid(rank), address, dst, bytes)) return std::nullopt;
    return ReadFailed(rank);
  }

  MaybeFailure ReadRows(int64_t rank, const std::vector<uint64_t>& addresses, size_t row_bytes,
                        void* dst) const override {
    std::vector<iovec> remote;
    for (size_t first = 0; first < addresses.size(); first += kMaxIov) {
      const size_t count = std::min(kMaxIov, addresses.size() - first);
      remote.clear();
      for (size_t i = 0; i < count; ++i) {
        remote.push_back({reinterpret_cast<void*>(addresses[first + i]), row_bytes});
      }
      iovec local{static_cast<char*>(dst) + first * row_bytes, count * row_bytes};
      if (!ReadProcess(pid(rank), &local, 1, remote.data(), count, count * row_bytes)) {
        return ReadFailed(rank);
      }
    }
    return std::nullopt;
  }

 private:
  pid_t pid(int64_t rank) const { return group_.peers_[exchange_.rank_process[rank]].pid; }

  MaybeFailure ReadFailed(int64_t rank) const {
    return Failure{FailureCode::kUnavailable, exchange_.op_name + ": reading the rows of rank " +
                                                  std::to_string(rank) + " in process " +
                                                  std::to_string(exchange_.rank_process[rank]) +
                                                  " failed: " + strerror(errno)};
  }

  const ProcessGroup& group_;
  const Exchange& exchange_;
};

// ---------------------------------------------------------------- set-up and tear-down

std::shared_ptr<ProcessGroup> ProcessGroup::Current() {
  std::lock_guard<std::mutex> lock(g_mutex);
  return g_current;
}

std::string ProcessGroup::Listen() {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_current != nullptr) Throw("this process is connected already; call finalize() first");
  if (g_listen_fd >= 0) close(g_listen_fd);

  unsigned char random[16];
  if (getrandom(random, sizeof random, 0) != sizeof random) ThrowErrno("getrandom");
  g_nonce.clear();
  for (unsigned char byte : random) {
    g_nonce += "0123456789abcdef"[byte >> 4];
    g_nonce += "0123456789abcdef"[byte & 15];
  }
  g_listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (g_listen_fd < 0) ThrowErrno("socket");
  socklen_t length = 0;
  const std::string name = "jax_ep/" + g_nonce.substr(0, 16);
  const sockaddr_un address = AbstractAddress(name, &length);
  if (bind(g_listen_fd, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    ThrowErrno("bind " + name);
  }
  if (listen(g_listen_fd, SOMAXCONN) != 0) ThrowErrno("listen " + name);
  // Where the Yama module restricts it, peers may read this process only if it says so.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  return HostIdentity() + " " + name + " " + g_nonce;
}

void ProcessGroup::Connect(int64_t process_index, const std::vector<std::string>& addresses,
                           std::chrono::nanoseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_current != nullptr) Throw("this process is connected already; call finalize() first");
  if (g_listen_fd < 0) Throw("Connect without Listen");
  const auto num_processes = static_cast<int64_t>(addresses.size());
  std::shared_ptr<ProcessGroup> group(new ProcessGroup(process_index, num_processes));

  const auto left = [&](const std::string& waiting_for) {
    const auto time = deadline - Clock::now();
    if (time <= time.zero()) Throw("timeout while waiting for " + waiting_for);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time);
  };
  std::vector<uint64_t> probe_addresses(num_processes);
  const auto adopt = [&](int fd, int64_t process, uint64_t probe_address) {
    Peer& peer = group->peers_[process];
    peer.fd = fd;
    probe_addresses[process] = probe_address;
    ucred credentials{};
    socklen_t length = sizeof credentials;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
      ThrowErrno("SO_PEERCRED of process " + std::to_string(process));
    }
    peer.pid = credentials.pid;
    peer.alive = true;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  };
  const auto hello = [&](const std::string& nonce) {
    Hello h{kProbeValue, process_index, reinterpret_cast<uint64_t>(&g_probe), {}};
    std::memcpy(h.nonce, nonce.data(), std::min(nonce.size(), sizeof h.nonce));
    return h;
  };

  const std::string host = HostIdentity();
  // Each calls those before it and is called by those after it.
  for (int64_t p = 0; p < num_processes; ++p) {
    if (p == process_index) continue;
    std::istringstream in(addresses[p]);
    std::string peer_host, name, nonce;
    in >> peer_host >> name >> nonce;
    const std::string who = "process " + std::to_string(p);
    if (peer_host != host) {
      Throw(who +
            " runs on another host, in another container or as another user; the CPU backend "
            "joins processes of one host only");
    }
    if (p > process_index) continue;
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) ThrowErrno("socket");
    group->peers_[p].fd = fd;
    SetTimeouts(fd, left(who));
    socklen_t length = 0;
    const sockaddr_un address = AbstractAddress(name, &length);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      ThrowErrno("connecting to " + who);
    }
    const Hello mine = hello(nonce);
    Hello theirs{};
    if (!SendAll(fd, &mine, sizeof mine) || !ReceiveAll(fd, &theirs, sizeof theirs) ||
        theirs.version != kProbeValue || theirs.process != p) {
      Throw(who + " did not answer as a jax_ep process of this version");
    }
    adopt(fd, p, theirs.probe_address);
  }
  for (int64_t missing = num_processes - process_index - 1; missing > 0;) {
    std::string who = "process";
    for (int64_t p = process_index + 1; p < num_processes; ++p) {
      if (!group->peers_[p].alive) who += " " + std::to_string(p);
    }
    pollfd poll_fd{g_listen_fd, POLLIN, 0};
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left(who)).count();
    if (poll(&poll_fd, 1, static_cast<int>(std::min<int64_t>(ms + 1, 1000))) <= 0) continue;
    const int fd = accept4(g_listen_fd, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) continue;
    SetTimeouts(fd, left(who));
    Hello theirs{};
    const bool known = ReceiveAll(fd, &theirs, sizeof theirs) && theirs.version == kProbeValue &&
                       std::string_view(theirs.nonce, sizeof theirs.nonce) == g_nonce &&
                       theirs.process > process_index && theirs.process < num_processes &&
                       group->peers_[theirs.process].fd < 0;
    if (!known) {  // a stranger: anybody on the host can knock
      close(fd);
      continue;
    }
    const Hello mine = hello("");
    if (!SendAll(fd, &mine, sizeof mine)) ThrowErrno("answering process");
    adopt(fd, theirs.process, theirs.probe_address);
    --missing;
  }
  // Not before all are connected: the others would wait for this process until their timeout.
  for (int64_t p = 0; p < num_processes; ++p) {
    if (p == process_index) continue;
    uint64_t value = 0;
    if (!ReadProcess(group->peers_[p].pid, probe_addresses[p], &value, sizeof value) ||
        value != kProbeValue) {
      Throw("process " + std::to_string(process_index) + " may not read the memory of process " +
            std::to_string(p) + " (process_vm_readv: " + strerror(errno) +
            "), which the CPU backend needs between processes; run them as one user, and in a "
            "container allow the system call (for example --cap-add=SYS_PTRACE)");
    }
  }

  close(g_listen_fd);
  g_listen_fd = -1;
  group->wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (group->wake_fd_ < 0) ThrowErrno("eventfd");
  group->thread_ = std::thread([raw = group.get()] { raw->Loop(); });
  g_current = std::move(group);
}

void ProcessGroup::Disconnect() {
  std::shared_ptr<ProcessGroup> group;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    group = std::move(g_current);
    g_current = nullptr;
    if (g_listen_fd >= 0) close(g_listen_fd);
    g_listen_fd = -1;
  }
  if (group == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(group->mutex_);
    group->closing_ = true;
    for (size_t p = 0; p < group->peers_.size(); ++p) {
      if (group->peers_[p].alive) {
        group->Send(static_cast<int64_t>(p), MessageType::kGoodbye, Key{}, {});
      }
    }
  }
  group->Wake();
  group->thread_.join();
}

ProcessGroup::ProcessGroup(int64_t process_index, int64_t num_processes)
    : process_index_(process_index), peers_(num_processes) {}

ProcessGroup::~ProcessGroup() {
  for (Peer& peer : peers_) {
    if (peer.fd >= 0) close(peer.fd);
  }
  if (wake_fd_ >= 0) close(wake_fd_);
}

// ---------------------------------------------------------------- a call

void ProcessGroup::Submit(const CallSite& site, int64_t run, int64_t group,
                          std::unique_ptr<CollectiveOp> op, const Timeouts& timeouts,
                          Completion completion) {
  const int64_t* processes = site.group_processes(group);
  Exchange local;
  local.key = Key{site.signature, site.ordinal, run, group};
  local.op_name = site.op;
  local.rank_process.assign(processes, processes + site.num_ranks);
  for (int64_t process : local.rank_process) {
    if (process != process_index_) local.others.insert(process);
  }
  if (*local.others.rbegin() >= static_cast<int64_t>(peers_.size()) || *local.others.begin() < 0) {
    completion(Failure{FailureCode::kFailedPrecondition,
                       site.op + ": the mesh names a process that this job does not have"});
    return;
  }
  try {
    op->Prepare(PeerView(*this, local));
  } catch (const std::exception& e) {
    completion(Failure{FailureCode::kInternal, site.op + ": " + e.what()});
    return;
  }
  std::string payload;
  const auto append = [&payload](uint64_t word) {
    payload.append(reinterpret_cast<const char*>(&word), sizeof word);
  };
  for (int64_t r = 0; r < site.num_ranks; ++r) {
    if (processes[r] != process_index_) continue;
    const std::vector<uint64_t> words = op->Published(r);
    append(static_cast<uint64_t>(r));
    append(words.size());
    for (uint64_t word : words) append(word);
  }

  std::lock_guard<std::mutex> lock(mutex_);
  Exchanges& queue = exchanges_[local.key];
  auto it = std::find_if(queue.begin(), queue.end(), [](const auto& e) { return !e->op; });
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
    if (!peers_[p].alive && !exchange->failure) exchange->failure = Lost(*exchange, p);
  }
  if (exchange->failure) {
    Fail(exchange, *exchange->failure, /*tell_peers=*/true);
    return;
  }
  for (int64_t p : exchange->others)
    Send(p, MessageType::kArrived, exchange->key, payload);  // [A1]
  StartIfReady(exchange);
  Wake();  // the new deadline
}

void ProcessGroup::StartIfReady(const std::shared_ptr<Exchange>& exchange) {
  if (exchange->op == nullptr || exchange->started || exchange->failure) return;
  for (int64_t p : exchange->others) {
    if (exchange->arrived.count(p) == 0) return;  // observes [A1]
  }
  exchange->started = true;
  WorkerPool::Get().Run([self = shared_from_this(), exchange] {
    MaybeFailure failure;
    try {
      failure = exchange->op->Finish(PeerView(*self, *exchange));
    } catch (const std::exception& e) {
      failure = Failure{FailureCode::kInternal, exchange->op_name + ": " + e.what()};
    }
    std::lock_guard<std::mutex> lock(self->mutex_);
    // A peer that gave up meanwhile has said so before it let go of its buffers: what was read from
    // them counts only if nothing of that kind has come.
    for (int64_t p : exchange->others) {
      if (self->peers_[p].alive) self->Receive(p);
    }
    exchange->local_done = true;
    // The others have their own work to end.
    exchange->deadline = Clock::now() + exchange->timeouts.progress;
    if (exchange->failure) failure = exchange->failure;
    if (failure) {
      self->Fail(exchange, *failure, /*tell_peers=*/true);
      return;
    }
    for (int64_t p : exchange->others)
      self->Send(p, MessageType::kDone, exchange->key, {});  // [D1]
    self->CompleteIfDone(exchange);
    self->Wake();  // while Finish ran, the deadline was not watched
  });
}

void ProcessGroup::CompleteIfDone(const std::shared_ptr<Exchange>& exchange) {
  if (!exchange->local_done) return;
  for (int64_t p : exchange->others) {
    if (exchange->done.count(p) == 0) return;  // observes [D1]
  }
  Erase(exchange);
  WorkerPool::Get().Run([exchange] {
    exchange->op = nullptr;
    exchange->completion(std::nullopt);
  });
}

void ProcessGroup::Fail(const std::shared_ptr<Exchange>& exchange, Failure failure,
                        bool tell_peers) {
  exchange->failure = failure;
  if (exchange->op == nullptr) return;  // waits for this process's ranks, to fail them
  if (exchange->started && !exchange->local_done)
    return;  // Finish still writes; it comes back here
  if (tell_peers) {
    for (int64_t p : exchange->others) {
      Send(p, MessageType::kFailed, exchange->key, failure.message);
    }
  }
  Erase(exchange);
  WorkerPool::Get().Run([exchange, failure = std::move(failure)] {
    exchange->op = nullptr;
    exchange->completion(failure);
  });
}

void ProcessGroup::Erase(const std::shared_ptr<Exchange>& exchange) {
  auto it = exchanges_.find(exchange->key);
  it->second.remove(exchange);
  if (it->second.empty()) exchanges_.erase(it);
}

Failure ProcessGroup::Lost(const Exchange& exchange, int64_t process) const {
  std::string ranks;
  for (size_t r = 0; r < exchange.rank_process.size(); ++r) {
    if (exchange.rank_process[r] == process) {
      ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
    }
  }
  const Peer& peer = peers_[process];
  return Failure{FailureCode::kUnavailable,
                 exchange.op_name + ": rank " + ranks + " of group " +
                     std::to_string(std::get<3>(exchange.key)) + " cannot come: process " +
                     std::to_string(process) + " (pid " + std::to_string(peer.pid) + ") has " +
                     (peer.said_goodbye ? "called jax_ep.finalize()" : "died")};
}

std::string ProcessGroup::OtherProgram(const Exchange& exchange) const {
  for (const auto& [key, queue] : exchanges_) {
    const bool alike = std::get<0>(key) == std::get<0>(exchange.key) &&
                       std::get<3>(key) == std::get<3>(exchange.key) && key != exchange.key;
    if (!alike || queue.front()->failure || queue.front()->op != nullptr ||
        queue.front()->arrived.empty())
      continue;
    return ". Process " + std::to_string(queue.front()->arrived.begin()->first) +
           " waits at the same operation of a program that XLA numbers otherwise: it was compiled "
           "with other options, a different number of times, or traced from other lines of code "
           "(JAX puts them into the program, for example when one process alone calls lower())";
  }
  return {};
}

void ProcessGroup::ExpireOverdue(Clock::time_point now) {
  std::vector<std::shared_ptr<Exchange>> overdue;
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& exchange : queue) {
      if (exchange->deadline <= now && !(exchange->started && !exchange->local_done)) {
        overdue.push_back(exchange);
      }
    }
  }
  for (const auto& exchange : overdue) {
    if (exchange->op == nullptr) {  // this process's ranks never came: their own timeout says so
      Erase(exchange);
      continue;
    }
    std::string missing;
    for (size_t r = 0; r < exchange->rank_process.size(); ++r) {
      const int64_t p = exchange->rank_process[r];
      const bool came = p == process_index_ || (exchange->started ? exchange->done.count(p) > 0
                                                                  : exchange->arrived.count(p) > 0);
      if (came) continue;
      missing += (missing.empty() ? "" : ", ") + std::to_string(r) + " (process " +
                 std::to_string(p) + ")";
    }
    Fail(exchange,
         Failure{FailureCode::kDeadlineExceeded,
                 exchange->op_name + ": rank " + missing + " of group " +
                     std::to_string(std::get<3>(exchange->key)) + " did not " +
                     (exchange->started ? "finish" : "come") +
                     " within the timeout; every rank of a group must call the operation, and all "
                     "processes must compile the same programs in the same order" +
                     OtherProgram(*exchange)},
         /*tell_peers=*/true);
  }
}

// ---------------------------------------------------------------- messages

void ProcessGroup::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof one);
}

void ProcessGroup::Send(int64_t process, MessageType type, const Key& key,
                        std::string_view payload) {
  Peer& peer = peers_[process];
  if (!peer.alive) return;
  const Header header{static_cast<uint32_t>(type),
                      static_cast<uint32_t>(payload.size()),
                      std::get<0>(key),
                      std::get<1>(key),
                      std::get<2>(key),
                      std::get<3>(key)};
  peer.outbox.append(reinterpret_cast<const char*>(&header), sizeof header);
  peer.outbox.append(payload);
  Flush(process);
}

void ProcessGroup::Flush(int64_t process) {
  Peer& peer = peers_[process];
  while (!peer.outbox.empty()) {
    const ssize_t n = send(peer.fd, peer.outbox.data(), peer.outbox.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) peer.outbox.clear();  // Receive sees the end
      return;
    }
    peer.outbox.erase(0, static_cast<size_t>(n));
  }
}

void ProcessGroup::Receive(int64_t process) {
  Peer& peer = peers_[process];
  char buffer[65536];
  for (;;) {
    const ssize_t n = recv(peer.fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (n <= 0) {
      MarkDead(process);
      return;
    }
    peer.inbox.append(buffer, static_cast<size_t>(n));
    size_t at = 0;
    Header header;
    while (peer.inbox.size() - at >= sizeof header) {
      std::memcpy(&header, peer.inbox.data() + at, sizeof header);
      if (peer.inbox.size() - at < sizeof header + header.payload_bytes) break;
      const std::string payload = peer.inbox.substr(at + sizeof header, header.payload_bytes);
      at += sizeof header + header.payload_bytes;
      Handle(process, static_cast<MessageType>(header.type),
             Key{header.signature, header.ordinal, header.run, header.group}, payload);
    }
    peer.inbox.erase(0, at);
  }
}

void ProcessGroup::Handle(int64_t process, MessageType type, const Key& key,
                          std::string_view payload) {
  if (type == MessageType::kGoodbye) {
    peers_[process].said_goodbye = true;
    return;
  }
  Exchanges& queue = exchanges_[key];
  // The oldest call of this key in which the peer has not taken this step yet. It can give up at
  // any step, after DONE too, but only in the latest call that it has come to.
  auto it = std::find_if(queue.begin(), queue.end(), [&](const auto& e) {
    if (type == MessageType::kDone) return e->done.count(process) == 0;
    return e->arrived.count(process) == 0;
  });
  if (type == MessageType::kFailed && it != queue.begin()) --it;
  std::shared_ptr<Exchange> exchange;
  if (it != queue.end()) {
    exchange = *it;
  } else {
    exchange = std::make_shared<Exchange>();
    exchange->key = key;
    exchange->deadline = Clock::now() + std::chrono::minutes(10);  // forgotten if nobody comes
    queue.push_back(exchange);
  }
  switch (type) {
    case MessageType::kArrived: {
      auto& ranks = exchange->arrived[process];
      std::vector<uint64_t> words(payload.size() / sizeof(uint64_t));
      std::memcpy(words.data(), payload.data(), words.size() * sizeof(uint64_t));
      for (size_t i = 0; i + 1 < words.size();) {
        const auto rank = static_cast<int64_t>(words[i]);
        const size_t count = words[i + 1];
        ranks[rank].assign(words.begin() + i + 2, words.begin() + i + 2 + count);
        i += 2 + count;
      }
      StartIfReady(exchange);
      return;
    }
    case MessageType::kDone:
      exchange->done.insert(process);
      CompleteIfDone(exchange);
      return;
    case MessageType::kFailed:
      Fail(exchange,
           Failure{FailureCode::kUnavailable,
                   "process " + std::to_string(process) + " gave up: " + std::string(payload)},
           /*tell_peers=*/false);
      return;
    case MessageType::kGoodbye:
      return;
  }
}

void ProcessGroup::MarkDead(int64_t process) {
  peers_[process].alive = false;
  std::vector<std::shared_ptr<Exchange>> lost;
  for (const auto& [key, queue] : exchanges_) {
    for (const auto& exchange : queue) {
      if (exchange->others.count(process) > 0 && exchange->done.count(process) == 0) {
        lost.push_back(exchange);
      }
    }
  }
  for (const auto& exchange : lost) Fail(exchange, Lost(*exchange, process), /*tell_peers=*/true);
}

void ProcessGroup::Loop() {
  std::vector<pollfd> fds;
  std::vector<int64_t> owner;
  for (;;) {
    Clock::time_point next = Clock::time_point::max();
    fds.assign(1, pollfd{wake_fd_, POLLIN, 0});
    owner.assign(1, -1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closing_) {
        std::vector<std::shared_ptr<Exchange>> open;
        for (const auto& [key, queue] : exchanges_)
          open.insert(open.end(), queue.begin(), queue.end());
        for (const auto& exchange : open) {
          Fail(exchange,
               Failure{FailureCode::kUnavailable,
                       exchange->op_name + ": jax_ep.finalize() was called during the call"},
               /*tell_peers=*/true);
        }
        return;
      }
      for (const auto& [key, queue] : exchanges_) {
        for (const auto& e : queue) {
          if (!(e->started && !e->local_done)) next = std::min(next, e->deadline);
        }
      }
      for (size_t p = 0; p < peers_.size(); ++p) {
        if (!peers_[p].alive) continue;
        const short events = peers_[p].outbox.empty() ? POLLIN : POLLIN | POLLOUT;
        fds.push_back({peers_[p].fd, events, 0});
        owner.push_back(static_cast<int64_t>(p));
      }
    }
    int timeout_ms = -1;
    if (next != Clock::time_point::max()) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count();
      timeout_ms = static_cast<int>(std::clamp<int64_t>(left + 1, 0, 60000));
    }
    poll(fds.data(), fds.size(), timeout_ms);
    if (fds[0].revents != 0) {
      uint64_t count;
      [[maybe_unused]] const ssize_t n = read(wake_fd_, &count, sizeof count);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 1; i < fds.size(); ++i) {
      if ((fds[i].revents & POLLOUT) != 0) Flush(owner[i]);
      if ((fds[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) Receive(owner[i]);
    }
    ExpireOverdue(Clock::now());
  }
}

}  // namespace jax_ep::cpu
