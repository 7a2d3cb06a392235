#include "tests/native/wire/wire.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>

namespace jax_ep::wire {
namespace {

constexpr size_t kNumPinned = 32768;  // operations at once; more wait for one to be done
constexpr size_t kPinnedBytes = 64;
constexpr size_t kBounceBytes = 65536;
constexpr size_t kNumStreams = 4, kMostFlying = 16;
constexpr int kLookedAt = 1024;       // operations, the oldest, that may depart
constexpr size_t kKeptFreed = 32768;  // requests
constexpr auto kMapTimeout = std::chrono::seconds(5);

uint64_t NowUs() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

std::string Text(const char* name, const char* usual) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? text : usual;
}
uint64_t Number(const char* name, uint64_t usual) {
  return std::strtoull(Text(name, std::to_string(usual).c_str()).c_str(), nullptr, 0);
}

void MoveHostMemory(pid_t process, void* local, void* remote, size_t num_bytes, bool is_write) {
  const iovec here{local, num_bytes}, there{remote, num_bytes};
  const ssize_t moved = is_write ? process_vm_writev(process, &here, 1, &there, 1, 0)
                                 : process_vm_readv(process, &here, 1, &there, 1, 0);
  if (moved != static_cast<ssize_t>(num_bytes)) {
    Die("memory of process %d: %s", process, std::strerror(errno));
  }
}

uint64_t NewValue(const Atomic& atomic, uint64_t old) {
  switch (atomic.operation) {
    case UCP_ATOMIC_OP_ADD:
      return old + atomic.value;
    case UCP_ATOMIC_OP_SWAP:
      return atomic.value;
    case UCP_ATOMIC_OP_CSWAP:
      return old == atomic.compared ? atomic.value : old;
    case UCP_ATOMIC_OP_AND:
      return old & atomic.value;
    case UCP_ATOMIC_OP_OR:
      return old | atomic.value;
    case UCP_ATOMIC_OP_XOR:
      return old ^ atomic.value;
    default:
      Die("atomic %d", static_cast<int>(atomic.operation));
  }
}

}  // namespace

Wire& Wire::Get() {
  static Wire* const wire = new Wire;
  return *wire;
}

Wire::Wire()
    : delay_us_(Number("WIRE_DELAY_US", 0)),
      fragment_(Number("WIRE_FRAGMENT", 0)),
      is_newest_first_(Number("WIRE_NEWEST_FIRST", 0) != 0),
      only_atomics_wait_(Text("WIRE_FENCE", "all") == "atomics"),
      folder_(Text("WIRE_FOLDER", "")),
      driver_(Driver::Get()),
      random_(Number("WIRE_SEED", 1)) {
  if (folder_.empty()) Die("WIRE_FOLDER is not set");
}

// Processes -----------------------------------------------------------------------------------------

Wire::Shown* Wire::Show(pid_t process, bool is_own) const {
  const std::string path = folder_ + "/" + std::to_string(process);
  const int file = open(path.c_str(), O_RDWR | (is_own ? O_CREAT | O_TRUNC : 0), 0600);
  if (file < 0 || (is_own && ftruncate(file, sizeof(Shown)) != 0)) {
    Die("%s: %s", path.c_str(), std::strerror(errno));
  }
  void* memory = mmap(nullptr, sizeof(Shown), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) Die("mmap of %s: %s", path.c_str(), std::strerror(errno));
  auto* shown = static_cast<Shown*>(memory);
  if (is_own) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&shown->atomics, &attributes);
  }
  return shown;
}

void Wire::Start() {
  is_stopped_ = false;
  own_ = Show(getpid(), true);
  if (streams_.empty()) {
    char* memory = static_cast<char*>(std::aligned_alloc(kPinnedBytes, kNumPinned * kPinnedBytes));
    if (driver_.has_context()) {
      memory = driver_.AllocatePinned(kNumPinned * kPinnedBytes);
      bounce_ = driver_.AllocatePinned(kBounceBytes);
      for (size_t i = 0; i < kNumStreams; ++i) streams_.push_back(driver_.MakeStream());
      for (size_t i = 0; i < kMostFlying; ++i) events_.push_back(driver_.MakeEvent());
    }
    for (size_t i = 0; i < kNumPinned; ++i) {
      pinned_.push_back(reinterpret_cast<uint64_t*>(memory + i * kPinnedBytes));
    }
  }
  std::fprintf(stderr, "wire: delay %llu us, fragments of %llu bytes, fences for %s%s\n",
               static_cast<unsigned long long>(delay_us_),
               static_cast<unsigned long long>(fragment_), only_atomics_wait_ ? "atomics" : "all",
               is_newest_first_ ? ", newest first" : "");
  thread_ = std::thread([this] { Run(); });
}

void Wire::Stop() {
  is_stopped_ = true;
  thread_.join();
  unlink((folder_ + "/" + std::to_string(getpid())).c_str());
  std::lock_guard<std::mutex> lock(mutex_);
  peers_.clear();
  for (const Mapping& mapping : mappings_) driver_.Close(mapping.mapped);
  mappings_.clear();
  std::fprintf(stderr, "wire: %llu puts, %llu atomics, %llu out of order\n",
               static_cast<unsigned long long>(num_puts_),
               static_cast<unsigned long long>(num_atomics_),
               static_cast<unsigned long long>(num_out_of_order_));
}

int Wire::AddPeer(pid_t process) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(peers_.begin(), peers_.end(),
                                  [&](const Peer& peer) { return peer.process == process; });
  if (found != peers_.end()) return static_cast<int>(found - peers_.begin());
  peers_.push_back({process, Show(process, false)});
  return static_cast<int>(peers_.size()) - 1;
}

Key Wire::Publish(const void* memory, size_t num_bytes) {
  Key key{};
  key.process = getpid();
  key.begin = reinterpret_cast<uint64_t>(memory);
  key.num_bytes = num_bytes;
  key.is_device = driver_.IsDeviceMemory(memory);
  if (key.is_device) key.allocation = driver_.Export(memory, &key.handle);
  std::lock_guard<std::mutex> lock(mutex_);
  const int number = own_->num_keys.load();
  if (number == static_cast<int>(std::size(own_->keys))) Die("too many regions of memory");
  own_->keys[number] = key;
  own_->num_keys.store(number + 1, std::memory_order_release);
  return key;
}

RemoteMemory Wire::Map(const Key& key) {
  if (!key.is_device) return {key, nullptr};
  if (key.process == getpid()) return {key, reinterpret_cast<char*>(key.allocation)};
  const auto deadline = std::chrono::steady_clock::now() + kMapTimeout;
  while (std::chrono::steady_clock::now() < deadline) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const Mapping& mapping : mappings_) {
        if (mapping.process == key.process && mapping.allocation == key.allocation) {
          return {key, mapping.mapped};
        }
      }
    }
    sched_yield();
  }
  Die("the heap of process %d was not mapped", key.process);
}

// By the wire's thread: peers' keys as soon as they are there, not at the first put, which a kernel that
// waits may have made.
void Wire::MapKeys() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (size_t i = 0; i < peers_.size(); ++i) {
    while (peers_[i].num_mapped < peers_[i].shown->num_keys.load(std::memory_order_acquire)) {
      const Key key = peers_[i].shown->keys[peers_[i].num_mapped++];
      const bool is_known =
          std::any_of(mappings_.begin(), mappings_.end(), [&](const Mapping& mapping) {
            return mapping.process == key.process && mapping.allocation == key.allocation;
          });
      if (!key.is_device || key.process == getpid() || is_known) continue;
      lock.unlock();
      char* mapped = driver_.Import(key.handle);
      lock.lock();
      mappings_.push_back({key.process, key.allocation, mapped});
    }
  }
}

// Operations ----------------------------------------------------------------------------------------

Request* Wire::MakeRequest(const ucp_request_param_t* parameters) {
  Request* request;
  if (freed_.size() > kKeptFreed) {
    request = freed_.front();
    freed_.pop_front();
    request->~Request();
    new (request) Request;
  } else {
    request = new Request;
  }
  if (parameters == nullptr) return request;
  if (parameters->op_attr_mask & UCP_OP_ATTR_FIELD_CALLBACK) {
    request->callback = parameters->cb.send;
  }
  if (parameters->op_attr_mask & UCP_OP_ATTR_FIELD_USER_DATA) {
    request->user_data = parameters->user_data;
  }
  return request;
}

Wire::Operation& Wire::Add(std::unique_lock<std::mutex>& lock, Kind kind, int peer,
                           const RemoteMemory& memory, uint64_t address, size_t num_bytes) {
  const Key& key = memory.key;
  if (address < key.begin || address + num_bytes > key.begin + key.num_bytes) {
    Die("memory that is not registered");
  }
  while (pinned_.empty()) {
    lock.unlock();
    sched_yield();
    lock.lock();
  }
  Operation operation{};
  operation.kind = kind;
  operation.peer = peer;
  operation.memory = memory;
  operation.number = ++number_;
  operation.epoch = epoch_;
  operation.remote =
      key.is_device ? memory.mapped + (address - key.allocation) : reinterpret_cast<char*>(address);
  operation.num_bytes = num_bytes;
  operation.pinned = pinned_.back();
  pinned_.pop_back();
  if (delay_us_ != 0 && kind != Kind::kAtomic) {
    uint64_t delay = delay_us_ / 4 + random_() % delay_us_;
    if (random_() % 16 == 0) delay *= 4;
    operation.due_us = NowUs() + delay;
  }
  return operations_.emplace_back(operation);
}

Request* Wire::Move(Transfer transfer, int peer, const RemoteMemory& memory, uint64_t address,
                    char* local, size_t num_bytes, bool is_flag,
                    const ucp_request_param_t& parameters) {
  std::unique_lock<std::mutex> lock(mutex_);
  Request* request = MakeRequest(&parameters);
  const size_t most = fragment_ != 0 ? fragment_ : std::max<size_t>(num_bytes, 1);
  request->num_left = static_cast<int>((num_bytes + most - 1) / most);
  num_puts_ += transfer == Transfer::kPut;
  for (size_t at = 0; at < num_bytes; at += most) {
    Operation& operation = Add(lock, transfer == Transfer::kPut ? Kind::kPut : Kind::kGet, peer,
                               memory, address + at, std::min(most, num_bytes - at));
    operation.local = local + at;
    operation.request = request;
    if (is_flag && operation.num_bytes <= kPinnedBytes) {
      std::memcpy(operation.pinned, local + at, operation.num_bytes);
      operation.local = reinterpret_cast<char*>(operation.pinned);
      operation.is_flag = true;
    }
  }
  if (num_bytes == 0) Complete(request);
  return request;
}

Request* Wire::Apply(const Atomic& atomic, int peer, const RemoteMemory& memory, uint64_t address,
                     size_t num_bytes, const ucp_request_param_t* parameters) {
  std::unique_lock<std::mutex> lock(mutex_);
  Operation& operation = Add(lock, Kind::kAtomic, peer, memory, address, num_bytes);
  operation.atomic = atomic;
  ++num_atomics_;
  if (parameters != nullptr) {
    operation.request = MakeRequest(parameters);
    operation.request->num_left = 1;
  }
  return operation.request;
}

void Wire::Fence() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++epoch_;
}

Request* Wire::Flush(const ucp_request_param_t& parameters) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (operations_.empty()) return nullptr;
  Request* request = MakeRequest(&parameters);
  request->flush_to = number_;
  flushes_.push_back(request);
  return request;
}

unsigned Wire::Progress() {
  for (unsigned num_done = 0;; ++num_done) {
    Request* request = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (done_.empty()) return num_done;
      request = done_.front();
      done_.pop_front();
    }
    if (request->callback != nullptr) request->callback(request, UCS_OK, request->user_data);
  }
}

void Wire::Free(Request* request) {
  std::lock_guard<std::mutex> lock(mutex_);
  freed_.push_back(request);
}

void Wire::Complete(Request* request) {
  request->status = UCS_OK;
  done_.push_back(request);
}

void Wire::Finish(Operations::iterator operation) {
  if (Request* request = operation->request; request != nullptr && --request->num_left == 0) {
    Complete(request);
  }
  pinned_.push_back(operation->pinned);
  operations_.erase(operation);
  const auto is_waiting = [&](Request* flush) {
    return !operations_.empty() && operations_.front().number <= flush->flush_to;
  };
  const auto flushed = std::partition(flushes_.begin(), flushes_.end(), is_waiting);
  std::for_each(flushed, flushes_.end(), [&](Request* flush) { Complete(flush); });
  flushes_.erase(flushed, flushes_.end());
}

// The wire's thread ---------------------------------------------------------------------------------

void Wire::Run() {
  if (driver_.has_context()) driver_.MakeCurrent();
  while (!is_stopped_) {
    MapKeys();
    std::unique_lock<std::mutex> lock(mutex_);
    const bool has_landed = Land(), has_departed = Depart(lock);
    lock.unlock();
    if (!has_landed && !has_departed) sched_yield();
  }
}

bool Wire::Land() {
  const auto is_flying = [&](const Flight& flight) { return !driver_.IsDone(flight.event); };
  const auto landed = std::partition(flying_.begin(), flying_.end(), is_flying);
  const bool has_landed = landed != flying_.end();
  for (auto flight = landed; flight != flying_.end(); ++flight) {
    events_.push_back(flight->event);
    Finish(flight->operation);
  }
  flying_.erase(landed, flying_.end());
  return has_landed;
}

// Of those that may depart, as many as may be on their way; none after an atomic, which is executed at
// once, with the lock open.
bool Wire::Depart(std::unique_lock<std::mutex>& lock) {
  std::vector<Operations::iterator> ready;
  std::vector<uint64_t> first_epoch(peers_.size());
  std::set<int> seen;
  const uint64_t now = NowUs();
  int num_looked_at = 0;
  for (auto it = operations_.begin(); it != operations_.end() && num_looked_at < kLookedAt;
       ++it, ++num_looked_at) {
    if (seen.insert(it->peer).second) first_epoch[it->peer] = it->epoch;
    const bool waits = !only_atomics_wait_ || it->kind == Kind::kAtomic || it->is_flag;
    if (!it->is_flying && it->due_us <= now && (!waits || it->epoch == first_epoch[it->peer])) {
      ready.push_back(it);
    }
  }
  bool has_departed = false;
  while (!ready.empty() && (!events_.empty() || streams_.empty())) {
    const auto operation = Choose(ready);
    num_out_of_order_ += delay_us_ != 0 && operation != operations_.begin();
    operation->is_flying = has_departed = true;
    if (operation->kind == Kind::kAtomic) {
      lock.unlock();
      Execute(*operation);
      lock.lock();
      Finish(operation);
      return true;
    }
    const CUevent event = events_.empty() ? nullptr : events_.back();
    if (Carry(*operation, event)) {
      events_.pop_back();
      flying_.push_back({operation, event});
    } else {
      Finish(operation);
    }
  }
  return has_departed;
}

Wire::Operations::iterator Wire::Choose(std::vector<Operations::iterator>& ready) {
  auto chosen = ready.begin();
  if (delay_us_ != 0) {
    chosen = std::find_if(ready.begin(), ready.end(), [](Operations::iterator operation) {
      return operation->kind == Kind::kAtomic;
    });
    if (chosen == ready.end()) {
      chosen = is_newest_first_ ? ready.end() - 1
                                : ready.begin() + static_cast<ptrdiff_t>(random_() % ready.size());
    }
  }
  const auto operation = *chosen;
  ready.erase(chosen);
  return operation;
}

// False if it is done already.
bool Wire::Carry(const Operation& operation, CUevent event) {
  if (!operation.memory.key.is_device) {
    CarryHostMemory(operation);
    return false;
  }
  const CUstream stream = streams_[delay_us_ != 0 ? random_() % kNumStreams : 0];
  if (operation.kind == Kind::kPut) {
    driver_.Copy(operation.remote, operation.local, operation.num_bytes, stream);
  } else {
    driver_.Copy(operation.local, operation.remote, operation.num_bytes, stream);
  }
  driver_.Record(event, stream);
  return true;
}

void Wire::CarryHostMemory(const Operation& operation) {
  const bool is_put = operation.kind == Kind::kPut;
  const bool is_device = driver_.IsDeviceMemory(operation.local);
  for (size_t at = 0; at < operation.num_bytes;) {
    const size_t left = operation.num_bytes - at;
    const size_t num_bytes = is_device ? std::min(left, kBounceBytes) : left;
    char* local = operation.local + at;
    char* here = is_device ? bounce_ : local;
    if (is_put && is_device) driver_.CopyAndWait(here, local, num_bytes, streams_[0]);
    MoveHostMemory(operation.memory.key.process, here, operation.remote + at, num_bytes, is_put);
    if (!is_put && is_device) driver_.CopyAndWait(local, here, num_bytes, streams_[0]);
    at += num_bytes;
  }
}

// An atomic, as no other of the memory's process.
void Wire::Execute(const Operation& operation) {
  const Key& key = operation.memory.key;
  Shown* shown = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    shown = peers_[operation.peer].shown;
  }
  if (pthread_mutex_lock(&shown->atomics) == EOWNERDEAD) {
    pthread_mutex_consistent(&shown->atomics);
  }
  uint64_t *old = operation.pinned, *changed = operation.pinned + 1;
  const auto move = [&](uint64_t* here, bool is_write) {
    if (!key.is_device) {
      MoveHostMemory(key.process, here, operation.remote, operation.num_bytes, is_write);
    } else if (is_write) {
      driver_.CopyAndWait(operation.remote, here, operation.num_bytes, streams_[0]);
    } else {
      driver_.CopyAndWait(here, operation.remote, operation.num_bytes, streams_[0]);
    }
  };
  *old = 0;
  if (operation.atomic.needs_old) move(old, false);
  *changed = NewValue(operation.atomic, *old);
  move(changed, true);
  pthread_mutex_unlock(&shown->atomics);
  if (operation.atomic.reply != nullptr) {
    std::memcpy(operation.atomic.reply, old, operation.num_bytes);
  }
}

}  // namespace jax_ep::wire
