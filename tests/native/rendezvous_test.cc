// The CPU backend without any framework: ranks are threads, processes are forks. Built with
// ThreadSanitizer, and with AddressSanitizer and UndefinedBehaviorSanitizer, by test_native.py.
//
//   rendezvous_test           runs all tests
//   rendezvous_test race      races on purpose: ThreadSanitizer must end the program with an error
//   rendezvous_test overflow  reads out of bounds on purpose: AddressSanitizer must
#include "xla_ffi/cpu/meet/rendezvous.h"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/cpu/meet/clock.h"
#include "xla_ffi/cpu/meet/process_group.h"
#include "xla_ffi/cpu/meet/program.h"
#include "xla_ffi/cpu/meet/worker_pool.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep::cpu {
namespace {

using std::chrono::milliseconds;

// A new call site; alone in its program, unless it follows another one there.
std::shared_ptr<const CallSite> MakeSite(const std::vector<int64_t>& rank_process,
                                         bool starts_program = true) {
  if (starts_program) Program::End();
  std::vector<int64_t> members;
  for (size_t r = 0; r < rank_process.size(); ++r) {
    members.push_back(rank_process[r] << 32 | static_cast<int64_t>(100 + r));
  }
  return MakeCallSite("test_op", /*signature=*/42, static_cast<int64_t>(members.size()), members);
}

// A rank's result of one call.
class Outcome {
 public:
  Completion completion() {
    return [this](const MaybeFailure& failure) { promise_.set_value(failure); };
  }
  MaybeFailure Wait() {
    std::future<MaybeFailure> future = promise_.get_future();
    CHECK(future.wait_for(std::chrono::seconds(60)) == std::future_status::ready);
    return future.get();
  }

 private:
  std::promise<MaybeFailure> promise_;  // set twice, it throws
};

// out[r] = sum of all ranks' inputs + r, an int64 each.
class SumOp final : public CollectiveOp {
 public:
  explicit SumOp(const Members& members) : members_(members.size()) {
    for (size_t r = 0; r < members.size(); ++r) {
      members_[r].in = members[r].in;
      members_[r].out = members[r].out;
    }
  }
  void Prepare(const PeerMemory&) override {}
  std::vector<uint64_t> Published(int64_t rank) const override {
    return {reinterpret_cast<uint64_t>(members_[rank].in[0])};
  }
  MaybeFailure Finish(const PeerMemory& peers) override {
    int64_t sum = 0;
    for (size_t r = 0; r < members_.size(); ++r) {
      int64_t value = 0;
      const auto rank = static_cast<int64_t>(r);
      if (peers.is_local(rank)) {
        std::memcpy(&value, members_[r].in[0], sizeof value);
      } else if (MaybeFailure f =
                     peers.Read(rank, peers.published(rank).at(0), &value, sizeof value)) {
        return f;
      }
      sum += value;
    }
    for (size_t r = 0; r < members_.size(); ++r) {
      if (members_[r].out.empty()) continue;
      *static_cast<int64_t*>(members_[r].out[0]) = sum + static_cast<int64_t>(r);
    }
    return std::nullopt;
  }

 private:
  std::vector<Member> members_;
};

std::unique_ptr<CollectiveOp> MakeSumOp(const Members& members) {
  return std::make_unique<SumOp>(members);
}

void ArriveWith(const std::shared_ptr<const CallSite>& site, int64_t run, int64_t rank,
                const int64_t* in, int64_t* out, Completion done) {
  Rendezvous::Get().Arrive(site, run, 0, Member{rank, {in}, {out}, std::move(done)}, MakeSumOp);
}

void RunThreads(int64_t count, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// ---------------------------------------------------------------- rendezvous

// Every rank passes several sites in an order of its own, many times, without waiting in between.
void SitesInRandomOrder() {
  constexpr int64_t kRanks = 8, kSites = 6, kRuns = 60;
  std::vector<std::shared_ptr<const CallSite>> sites;
  for (int64_t s = 0; s < kSites; ++s) sites.push_back(MakeSite(std::vector<int64_t>(kRanks)));
  RunThreads(kRanks, [&](int64_t rank) {
    std::mt19937 random(static_cast<unsigned>(rank));
    for (int64_t run = 0; run < kRuns; ++run) {
      std::vector<int64_t> in(kSites), out(kSites, -1), order(kSites);
      std::vector<Outcome> outcomes(kSites);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int64_t s : order) {
        in[s] = 1000 * s + run;
        ArriveWith(sites[s], run, rank, &in[s], &out[s], outcomes[s].completion());
      }
      for (int64_t s = 0; s < kSites; ++s) {
        CHECK(!outcomes[s].Wait());
        CHECK(out[s] == kRanks * (1000 * s + run) + rank);
      }
    }
  });
}

// A loop in a program: the same site, run and group again as soon as the own rank is done.
void LoopAtOneSite() {
  constexpr int64_t kRanks = 5, kIterations = 400;
  const auto site = MakeSite(std::vector<int64_t>(kRanks));
  RunThreads(kRanks, [&](int64_t rank) {
    for (int64_t i = 0; i < kIterations; ++i) {
      int64_t in = i * (rank + 1), out = -1;
      Outcome outcome;
      ArriveWith(site, 7, rank, &in, &out, outcome.completion());
      CHECK(!outcome.Wait());
      CHECK(out == i * kRanks * (kRanks + 1) / 2 + rank);
    }
  });
}

// Completions that return only after all the others of their call have begun.
void CompletionsThatWaitForEachOther() {
  constexpr int64_t kRanks = 24, kCalls = 10;
  const auto site = MakeSite(std::vector<int64_t>(kRanks));
  for (int64_t call = 0; call < kCalls; ++call) {
    std::mutex mutex;
    std::condition_variable changed;
    int64_t begun = 0, ended = 0;
    std::vector<int64_t> in(kRanks, 1), out(kRanks);
    RunThreads(kRanks, [&](int64_t rank) {
      ArriveWith(site, call, rank, &in[rank], &out[rank], [&, rank](const MaybeFailure& failure) {
        CHECK(!failure);
        CHECK(out[rank] == kRanks + rank);
        std::unique_lock<std::mutex> lock(mutex);
        ++begun;
        changed.notify_all();
        CHECK(changed.wait_for(lock, std::chrono::seconds(60), [&] { return begun == kRanks; }));
        ++ended;
        changed.notify_all();
      });
    });
    std::unique_lock<std::mutex> lock(mutex);
    CHECK(changed.wait_for(lock, std::chrono::seconds(60), [&] { return ended == kRanks; }));
  }
}

// One rank comes too late: all get an error that names it, and the next run is as good as ever.
void LateRank() {
  constexpr int64_t kRanks = 4;
  const auto site = MakeSite(std::vector<int64_t>(kRanks));
  Rendezvous& rendezvous = Rendezvous::Get();
  const auto before = rendezvous.timeouts();
  rendezvous.set_timeouts({milliseconds(100), milliseconds(100)});
  std::vector<int64_t> in(kRanks, 1), out(kRanks, -1);
  std::vector<Outcome> outcomes(kRanks);
  for (int64_t rank : {0, 1, 3}) {
    ArriveWith(site, 1, rank, &in[rank], &out[rank], outcomes[rank].completion());
  }
  for (int64_t rank : {0, 1, 3}) {
    const MaybeFailure failure = outcomes[rank].Wait();
    CHECK(failure && failure->code == FailureCode::kDeadlineExceeded);
    CHECK(failure->message.find("test_op: rank 2 of group 0 did not come") == 0);
    CHECK(failure->message.find("(came: 0, 1, 3)") != std::string::npos);
  }
  ArriveWith(site, 1, 2, &in[2], &out[2], outcomes[2].completion());
  const MaybeFailure failure = outcomes[2].Wait();
  CHECK(failure && failure->code == FailureCode::kDeadlineExceeded);
  CHECK(out == std::vector<int64_t>(kRanks, -1));
  rendezvous.set_timeouts(before);
  RunThreads(kRanks, [&](int64_t rank) {
    Outcome outcome;
    ArriveWith(site, 2, rank, &in[rank], &out[rank], outcome.completion());
    CHECK(!outcome.Wait());
    CHECK(out[rank] == kRanks + rank);
  });
}

// Ranks that race with the timeout: whatever happens, each completion is called exactly once.
void TimeoutsUnderLoad() {
  constexpr int64_t kRanks = 4, kRuns = 150;
  const auto site = MakeSite(std::vector<int64_t>(kRanks));
  Rendezvous& rendezvous = Rendezvous::Get();
  const auto before = rendezvous.timeouts();
  rendezvous.set_timeouts({milliseconds(2), milliseconds(2)});
  std::atomic<int64_t> num_failed{0};
  RunThreads(kRanks, [&](int64_t rank) {
    std::mt19937 random(static_cast<unsigned>(rank));
    for (int64_t run = 0; run < kRuns; ++run) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
      int64_t in = run, out = -1;
      Outcome outcome;
      ArriveWith(site, run, rank, &in, &out, outcome.completion());
      if (outcome.Wait()) {
        CHECK(out == -1);
        ++num_failed;
      } else {
        CHECK(out == kRanks * run + rank);
      }
    }
  });
  rendezvous.set_timeouts(before);
  std::printf("  %ld of %ld arrivals timed out\n", num_failed.load(), kRanks * kRuns);
}

// An operation that cannot be done: every rank hears of it.
void OperationThatThrows() {
  constexpr int64_t kRanks = 3;
  const auto site = MakeSite(std::vector<int64_t>(kRanks));
  RunThreads(kRanks, [&](int64_t rank) {
    Outcome outcome;
    Rendezvous::Get().Arrive(site, 0, 0, Member{rank, {}, {}, outcome.completion()},
                             [](const Members&) -> std::unique_ptr<CollectiveOp> {
                               throw std::runtime_error("no memory");
                             });
    const MaybeFailure failure = outcome.Wait();
    CHECK(failure && failure->code == FailureCode::kInternal);
    CHECK(failure->message == "test_op: no memory");
  });
}

// ---------------------------------------------------------------- worker pool

void ParallelForUnderLoad() {
  WorkerPool& pool = WorkerPool::Get();
  std::atomic<int64_t> num_tasks{0};
  RunThreads(6, [&](int64_t thread) {
    for (int64_t round = 0; round < 100; ++round) {
      const int64_t count = (thread * 31 + round * 7) % 90;
      std::vector<int64_t> hits(count);  // disjoint elements: no atomics needed
      pool.Run([&num_tasks] { ++num_tasks; });
      pool.ParallelFor(count, [&](int64_t i) { hits[i] += i + 1; });
      for (int64_t i = 0; i < count; ++i) CHECK(hits[i] == i + 1);
    }
  });
  while (num_tasks < 600) std::this_thread::yield();
}

// ---------------------------------------------------------------- the three operations

// R = 2, T = 3, K = 2, E = 4 (L = 2), C = 5, A = 1, H = 4: small enough to be written out.
//   rank 0: token 0 -> experts 0, 2; token 1 -> 3, 0; token 2 -> 2, invalid
//   rank 1: token 0 -> experts 0, 1; token 1 -> none, 3; token 2 -> 2, 0
// rank 0 receives expert 0: (0,0,0) (0,1,1) (1,0,0) (1,2,1), expert 1: (1,0,1)
// rank 1 receives expert 2: (0,0,1) (0,2,0) (1,2,0), expert 3: (0,1,0) (1,1,1)
void OperationsOnTinyData() {
  static constexpr int64_t kRanks = 2, kTokens = 3, kTopK = 2, kCapacity = 5, kHidden = 4;
  const std::vector<int32_t> ids[kRanks] = {{0, 2, 3, 0, 2, 9}, {0, 1, -1, 3, 2, 0}};
  const std::vector<int32_t> recv_src[kRanks] = {{0, 3, 6, 11, 7}, {1, 4, 10, 2, 9}};
  const std::vector<int32_t> recv_order[kRanks] = {{0, 1, 2, 4, 3}, {0, 3, 1, 4, 2}};
  const std::vector<int32_t> offsets[kRanks] = {{0, 1, 2, 2, 4, 4, 5}, {0, 1, 2, 3, 3, 4, 5}};
  const std::vector<int32_t> send_row[kRanks] = {{0, 0, 3, 1, 1, -1}, {2, 4, -1, 4, 2, 3}};
  const std::vector<int32_t> counts[kRanks] = {{4, 1}, {3, 2}};
  const std::vector<int32_t> counters[kRanks] = {{5, 0, 1}, {5, 0, 0}};
  const std::vector<int32_t> load{4, 1, 3, 2};

  const auto layout_site = MakeSite({0, 0}), dispatch_site = MakeSite({0, 0});
  const auto combine_site = MakeSite({0, 0});
  std::vector<float> x[kRanks], weights[kRanks];
  for (int64_t r = 0; r < kRanks; ++r) {
    for (int64_t i = 0; i < kTokens * kHidden; ++i) x[r].push_back(100.f * r + i);
    for (int64_t i = 0; i < kTokens * kTopK; ++i) weights[r].push_back(0.5f + r + i);
  }
  const auto call = [](const std::shared_ptr<const CallSite>& site, int64_t rank,
                       std::vector<const void*> in, std::vector<void*> out,
                       const OpFactory& make_op) {
    Outcome outcome;
    Rendezvous::Get().Arrive(
        site, 0, 0, Member{rank, std::move(in), std::move(out), outcome.completion()}, make_op);
    CHECK(!outcome.Wait());
  };
  RunThreads(kRanks, [&](int64_t r) {
    std::vector<int32_t> table[kNumLayoutOut] = {std::vector<int32_t>(kTokens * kTopK),
                                                 std::vector<int32_t>(kCapacity),
                                                 std::vector<int32_t>(kCapacity),
                                                 std::vector<int32_t>(kRanks * kTokens + 1),
                                                 std::vector<int32_t>(2),
                                                 std::vector<int32_t>(2),
                                                 std::vector<int32_t>(4),
                                                 std::vector<int32_t>(3)};
    std::vector<void*> tables;
    for (auto& t : table) tables.push_back(t.data());
    call(layout_site, r, {ids[r].data()}, tables, [](const Members& members) {
      return MakeLayoutOp(LayoutSizes{kRanks, kTokens, kTopK, 4, kCapacity, 1}, members);
    });
    CHECK(table[kLayoutSendRow] == send_row[r]);
    CHECK(table[kLayoutRecvSrc] == recv_src[r]);
    CHECK(table[kLayoutRecvOrder] == recv_order[r]);
    CHECK(table[kLayoutRecvOffsets] == offsets[r]);
    CHECK(table[kLayoutGroupSizes] == counts[r]);
    CHECK(table[kLayoutExpertCounts] == counts[r]);
    CHECK(table[kLayoutExpertLoad] == load);
    CHECK(table[kLayoutCounters] == counters[r]);

    std::vector<float> tokens(kCapacity * kHidden, -1), row_weights(kCapacity, -1);
    call(dispatch_site, r,
         {x[r].data(), table[kLayoutRecvSrc].data(), table[kLayoutRecvOrder].data(),
          table[kLayoutRecvOffsets].data(), table[kLayoutGroupSizes].data(), nullptr,
          weights[r].data()},
         {tokens.data(), nullptr, row_weights.data()}, [](const Members& members) {
           return MakeDispatchOp(
               DispatchSizes{kRanks, kTokens, kTopK, kCapacity, 2, kCapacity,
                             kHidden * int64_t{sizeof(float)}, kHidden, 0, QuantizationKind::kNone,
                             FloatType::kF32, false, true, true},
               members);
         });
    for (int64_t row = 0; row < kCapacity; ++row) {
      const int64_t flat = recv_src[r][row], src = flat / (kTokens * kTopK);
      const int64_t slot = flat % (kTokens * kTopK);
      CHECK(row_weights[row] == weights[src][slot]);
      for (int64_t h = 0; h < kHidden; ++h) {
        CHECK(tokens[row * kHidden + h] == x[src][slot / kTopK * kHidden + h]);
      }
    }

    std::vector<float> out(kTokens * kHidden, -1);
    call(combine_site, r,
         {tokens.data(), ids[r].data(), table[kLayoutSendRow].data(), table[kLayoutRecvSrc].data(),
          table[kLayoutRecvOrder].data(), table[kLayoutRecvOffsets].data(), row_weights.data(),
          nullptr},
         {out.data(), nullptr}, [](const Members& members) {
           return MakeCombineOp(CombineSizes{kRanks, kTokens, kTopK, kCapacity, 2, kHidden, kRanks,
                                             FloatType::kF32, true},
                                members);
         });
    for (int64_t i = 0; i < kTokens * kHidden; ++i) {
      float sum = 0;  // small integers and halves: exact in any order
      for (int64_t slot : {i / kHidden * kTopK, i / kHidden * kTopK + 1}) {
        if (send_row[r][slot] >= 0) sum += weights[r][slot] * x[r][i];
      }
      CHECK(out[i] == sum);
    }
  });
}

// ---------------------------------------------------------------- processes

// Runs `body` in two new processes that are connected, by a socket too; `other` is the other one.
// The caller must have no threads yet: a fork has only the one that forked.
void InTwoProcesses(const std::function<void(int64_t process, pid_t other, int socket)>& body) {
  int sockets[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
  std::fflush(nullptr);
  pid_t children[2];
  for (int64_t process : {0, 1}) {
    children[process] = fork();
    CHECK(children[process] >= 0);
    if (children[process] != 0) continue;
    std::vector<std::string> addresses(2);
    addresses[process] = ProcessGroup::Listen();
    const std::string line = addresses[process] + " " + std::to_string(getpid()) + "\n";
    CHECK(write(sockets[process], line.data(), line.size()) == static_cast<ssize_t>(line.size()));
    for (char c = 0; c != '\n';) {
      CHECK(read(sockets[process], &c, 1) == 1);
      addresses[1 - process] += c;
    }
    const std::string& theirs = addresses[1 - process];
    ProcessGroup::Connect(process, addresses, std::chrono::seconds(30));
    body(process, std::stoi(theirs.substr(theirs.rfind(' '))), sockets[process]);
    ProcessGroup::Disconnect();
    std::_Exit(0);
  }
  for (pid_t child : children) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  close(sockets[0]);
  close(sockets[1]);
}

void CallsAcrossProcesses() {
  InTwoProcesses([](int64_t process, pid_t, int) {
    constexpr int64_t kRuns = 100;
    // The sites of one program; ranks 0 and 2 live in process 0.
    const auto sites = {MakeSite({0, 1, 0, 1}), MakeSite({0, 1, 0, 1}, false)};
    RunThreads(2, [&](int64_t local) {
      const int64_t rank = 2 * local + process;
      for (int64_t run = 0; run < kRuns; ++run) {
        int64_t in[2], out[2] = {-1, -1};
        Outcome outcomes[2];
        // Opposite orders on the two ranks of a process.
        for (int64_t s : {local, 1 - local}) {
          in[s] = 1000 * s + run;
          ArriveWith(sites.begin()[s], run, rank, &in[s], &out[s], outcomes[s].completion());
        }
        for (int64_t s = 0; s < 2; ++s) {
          CHECK(!outcomes[s].Wait());
          CHECK(out[s] == 4 * (1000 * s + run) + rank);
        }
      }
    });
  });
}

// A process that comes long after its peer, within the time that both allow, finds it there still.
void PeerThatComesMuchLater() {
  InTwoProcesses([](int64_t process, pid_t, int) {
    Rendezvous::Get().set_timeouts({std::chrono::hours(1), std::chrono::seconds(30)});
    const auto long_site = MakeSite({0, 1}), short_site = MakeSite({0, 1}, false);
    int64_t in = 5, out = -1;
    Outcome outcome;
    if (process == 0) ArriveWith(long_site, 0, 0, &in, &out, outcome.completion());
    for (int64_t i = 0; i < 4; ++i) {
      // Messages come in order: after the first of these both know who has come to the long call.
      // The others wake the threads that look for what is overdue.
      int64_t short_in = i, short_out = -1;
      Outcome short_outcome;
      ArriveWith(short_site, 0, process, &short_in, &short_out, short_outcome.completion());
      CHECK(!short_outcome.Wait());
      if (i == 0) Clock::Skip(std::chrono::minutes(59));
    }
    if (process == 1) ArriveWith(long_site, 0, 1, &in, &out, outcome.completion());
    CHECK(!outcome.Wait());
    CHECK(out == 10 + process);
  });
}

// Fails before its peers have heard of it.
class ThrowingOp final : public CollectiveOp {
 public:
  explicit ThrowingOp(const Members& members) : sum_(members) {}
  void Prepare(const PeerMemory&) override { throw std::runtime_error("no room"); }
  std::vector<uint64_t> Published(int64_t rank) const override { return sum_.Published(rank); }
  MaybeFailure Finish(const PeerMemory& peers) override { return sum_.Finish(peers); }

 private:
  SumOp sum_;
};

// Its peer does not wait for a rank that will never come.
void PeerWhoseOperationThrows() {
  InTwoProcesses([](int64_t process, pid_t, int) {
    Rendezvous::Get().set_timeouts({std::chrono::hours(1), std::chrono::hours(1)});
    const auto site = MakeSite({0, 1});
    int64_t in = 5, out = -1;
    Outcome outcome;
    Rendezvous::Get().Arrive(site, 0, 0, Member{process, {&in}, {&out}, outcome.completion()},
                             [process](const Members& members) -> std::unique_ptr<CollectiveOp> {
                               if (process == 1) return std::make_unique<ThrowingOp>(members);
                               return MakeSumOp(members);
                             });
    const MaybeFailure failure = outcome.Wait();
    CHECK(failure && failure->message.find("no room") != std::string::npos);
  });
}

// Stops its process before it reads the peer, who gives up meanwhile and reuses its buffer.
class StoppingOp final : public CollectiveOp {
 public:
  StoppingOp(const Members& members, bool stops) : sum_(members), stops_(stops) {}
  void Prepare(const PeerMemory& peers) override { sum_.Prepare(peers); }
  std::vector<uint64_t> Published(int64_t rank) const override { return sum_.Published(rank); }
  MaybeFailure Finish(const PeerMemory& peers) override {
    if (stops_) raise(SIGSTOP);
    return sum_.Finish(peers);
  }

 private:
  SumOp sum_;
  const bool stops_;
};

// What was read from a peer that had given up is never taken for a result.
void PeerThatGivesUpWhileItIsRead() {
  InTwoProcesses([](int64_t process, pid_t other, int socket) {
    const auto timeout = process == 0 ? milliseconds(100) : milliseconds(30000);
    Rendezvous::Get().set_timeouts({timeout, timeout});
    int64_t num_during_read = 0;
    char byte = 0;
    for (int64_t run = 0; run < 20; ++run) {
      const auto site = MakeSite({0, 1});
      int64_t in = 5, out = -1;
      Outcome outcome;
      Rendezvous::Get().Arrive(site, run, 0, Member{process, {&in}, {&out}, outcome.completion()},
                               [process](const Members& members) {
                                 return std::make_unique<StoppingOp>(members, process == 1);
                               });
      const MaybeFailure failure = outcome.Wait();
      CHECK(failure);
      if (process == 0) {
        CHECK(failure->code == FailureCode::kDeadlineExceeded);
        num_during_read += failure->message.find("did not finish") != std::string::npos;
        in = 999;
        pollfd done{socket, POLLIN, 0};
        do {
          kill(other, SIGCONT);
        } while (poll(&done, 1, 5) == 0);
        CHECK(read(socket, &byte, 1) == 1);
        CHECK(write(socket, &byte, 1) == 1);
      } else {
        CHECK(failure->message.find("process 0 gave up: test_op: rank 1 (process 1, device 101)") ==
              0);
        CHECK(write(socket, &byte, 1) == 1);
        CHECK(read(socket, &byte, 1) == 1);
      }
    }
    if (process == 0) std::printf("  %ld of 20 during the read\n", num_during_read);
    std::fflush(stdout);
  });
}

// ---------------------------------------------------------------- what the sanitizers must see

void Race() {
  int64_t value = 0;
  RunThreads(2, [&](int64_t) {
    for (int i = 0; i < 1000; ++i) ++value;
  });
  std::printf("%ld\n", value);
}

void Overflow() {
  std::vector<int32_t> ids(6, 0);
  const auto site = MakeSite({0});
  std::vector<int32_t> out(64);
  Outcome outcome;
  // Says seven tokens where there are six.
  Rendezvous::Get().Arrive(
      site, 0, 0,
      Member{0, {ids.data()}, std::vector<void*>(kNumLayoutOut, out.data()), outcome.completion()},
      [](const Members& members) { return MakeLayoutOp(LayoutSizes{1, 7, 1, 1, 7, 1}, members); });
  outcome.Wait();
}

}  // namespace
}  // namespace jax_ep::cpu

int main(int argc, char** argv) {
  using namespace jax_ep::cpu;
  const std::string which = argc > 1 ? argv[1] : "";
  if (which == "race") return Race(), 0;
  if (which == "overflow") return Overflow(), 0;
  const std::pair<const char*, void (*)()> tests[] = {
      // These fork, so they come before any thread.
      {"CallsAcrossProcesses", CallsAcrossProcesses},
      {"PeerThatComesMuchLater", PeerThatComesMuchLater},
      {"PeerWhoseOperationThrows", PeerWhoseOperationThrows},
      {"PeerThatGivesUpWhileItIsRead", PeerThatGivesUpWhileItIsRead},
      {"SitesInRandomOrder", SitesInRandomOrder},
      {"LoopAtOneSite", LoopAtOneSite},
      {"CompletionsThatWaitForEachOther", CompletionsThatWaitForEachOther},
      {"LateRank", LateRank},
      {"TimeoutsUnderLoad", TimeoutsUnderLoad},
      {"OperationThatThrows", OperationThatThrows},
      {"ParallelForUnderLoad", ParallelForUnderLoad},
      {"OperationsOnTinyData", OperationsOnTinyData},
  };
  for (const auto& [name, test] : tests) {
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %.2f s\n", name, seconds.count());
    std::fflush(stdout);
  }
  return 0;
}
