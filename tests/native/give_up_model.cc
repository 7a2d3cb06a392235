// A model of how calls fail (cuda/sync/give_up.cuh, leave.cuh), in which every order of its steps
// is tried: no rank writes to another's memory once that one's call has ended, and every rank's
// call ends. Without a GPU; memory is sequentially consistent here, which the kernels' atomic
// operations, releases and acquires provide where it matters.
//
//   give_up_model [VARIANT]
//
// A rank is an opener, which shows the peers its addresses, and workers, which use theirs, as
// blocks of a kernel do; when all are through, the last of them closes the call. Ranks start when
// they like, or never, and a timeout may strike whenever a rank waits. Control variants leave
// something out; the model has to find what that does.
//
// Exit codes: 0 right; 3 written after the end; 4 a call that does not end; 1 anything else.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/memory/control.h"
#include "tests/native/search.h"

namespace {

enum class Variant {
  kRight,
  kNoWait,      // who has failed tells the peers and ends
  kLook,        // a worker looks once more at given_up; only peers that have come are waited for
  kTwoSteps,    // the entry is read, and shut afterwards
  kEarlyLeft,   // a worker that has failed says that the rank has left
  kLeftLast,    // a rank says that it has left when it knows that of its peers
  kNoProgress,  // who has ended well is not taken to have left
};
constexpr const char* kNames[] = {"right",      "no-wait",   "look",       "two-steps",
                                  "early-left", "left-last", "no-progress"};

constexpr int kMaxRanks = 3, kMaxWorkers = 2;
struct Sizes {
  int ranks, workers, calls;
};

// What a thread does next, and what closing a call does next: to one peer after the other.
enum Step : uint8_t { kLook, kShow, kEnter, kWaitStart, kWrite, kPublish, kWaitAll, kBreak, kDone };
enum Close : uint8_t { kOpen, kTell, kLeave, kRead, kShutDoor, kWaitLeft, kClosed };

struct Thread {
  uint8_t step, peer, failed;
};
struct Rank {
  uint8_t call;  // 0: not started
  Thread opener, worker[kMaxWorkers];
  uint8_t close, peer;  // of closing
  uint8_t broken, given_up, has_shown;
  uint8_t inside[kMaxRanks];  // what [V2] has returned
  // By peer, in this rank's control block: as epochs, entered with 0x80 for kShut.
  uint8_t entered[kMaxRanks], mail[kMaxRanks], end[kMaxRanks];
  uint8_t progress[kMaxRanks][kMaxWorkers];
};
using State = std::array<Rank, kMaxRanks>;

uint64_t AsEntry(uint8_t v) { return (v & 0x7f) | ((v & 0x80) != 0 ? jax_ep::gpu::kShut : 0); }

class Model {
 public:
  Model(const Sizes& sizes, Variant variant) : sizes_(sizes), variant_(variant) {}

  int Check() {
    search_.Visit({});
    verdict_ = search_.Run([&](const State& state) { return Expand(state); });
    std::printf("%d ranks, %d workers, %d calls: %zu states, %s\n", sizes_.ranks, sizes_.workers,
                sizes_.calls, search_.num_states(),
                verdict_ == 0   ? "right"
                : verdict_ == 3 ? "written after the end"
                                : "a call does not end");
    return verdict_;
  }

 private:
  int Expand(const State& state) {
    bool moves = false, is_running = false;
    for (int r = 0; r < sizes_.ranks; ++r) {
      const Rank& rank = state[r];
      if (rank.call == 0) {
        State next = state;
        Begin(next[r], 1);
        search_.Visit(next);
        continue;  // it may also never come
      }
      if (rank.close == kClosed) continue;
      is_running = true;
      const auto step = [&](auto&& move) {
        State next = state;
        if (move(next)) {
          moves = true;
          search_.Visit(next);
        }
      };
      bool all_done = true;
      for (int t = -1; t < sizes_.workers; ++t) {
        const Thread& thread = t < 0 ? rank.opener : rank.worker[t];
        if (thread.step == kDone) continue;
        all_done = false;
        step([&](State& next) { return Work(next, r, t); });
        if (thread.step == kWaitStart || thread.step == kWaitAll) {
          step([&](State& next) { return EndWait(next, r, t); });
        }
      }
      if (all_done) step([&](State& next) { return CloseCall(next, r); });
    }
    return is_running && !moves ? 4 : verdict_;
  }

  static void Begin(Rank& rank, uint8_t call) {
    rank.call = call;
    rank.opener = {kLook, 0, 0};
    for (Thread& worker : rank.worker) worker = {kEnter, 0, 0};
    rank.close = kOpen;
    rank.has_shown = 0;
  }

  // The next peer after `peer`, of rank r; `ranks` if there is none.
  int NextPeer(int r, int peer) const { return peer == r ? peer + 1 : peer; }
  // Moves a thread on to its next peer, or to `then` after the last.
  void NextOr(int r, Thread& thread, Step then) const {
    thread.peer = static_cast<uint8_t>(NextPeer(r, thread.peer + 1));
    if (thread.peer >= sizes_.ranks) thread = {then, 0, thread.failed};
  }
  void Fail(State& s, int r, Thread& thread, Step then) const {
    thread = {static_cast<uint8_t>(then), 0, 1};
    s[r].broken = 1;
    if (variant_ != Variant::kEarlyLeft) return;
    for (int q = 0; q < sizes_.ranks; ++q) s[q].end[r] = s[r].call;
  }

  // A worker's wait ends for the group is broken, which it need not see at once, or for it has
  // taken too long, and breaks the group.
  bool EndWait(State& s, int r, int t) const {
    const bool is_broken = s[r].broken != 0 || s[r].given_up != 0;
    Fail(s, r, s[r].worker[t], is_broken ? kDone : kBreak);
    return true;
  }

  // One step of the opener (t = -1) or of a worker; false if it cannot move.
  bool Work(State& s, int r, int t) {
    Rank& rank = s[r];
    Thread& thread = t < 0 ? rank.opener : rank.worker[t];
    const uint8_t epoch = rank.call;
    const int peer = NextPeer(r, thread.peer);
    thread.peer = static_cast<uint8_t>(peer);
    Rank& other = s[peer < sizes_.ranks ? peer : r];
    const bool is_broken = rank.broken != 0 || rank.given_up != 0;
    switch (thread.step) {
      case kLook:
        if (is_broken) return Fail(s, r, thread, kBreak), true;
        rank.has_shown = 1;
        thread = {kShow, 0, 0};
        return true;
      case kShow:  // [S1]
        other.mail[r] = epoch;
        NextOr(r, thread, kDone);
        return true;
      case kEnter: {  // [V1]
        const uint8_t old = rank.entered[peer];
        if (UsesEntries() && jax_ep::gpu::is_shut(AsEntry(old))) {
          return Fail(s, r, thread, kDone), true;
        }
        if ((old & 0x7f) < epoch) rank.entered[peer] = (old & 0x80) | epoch;
        NextOr(r, thread, kWaitStart);
        return true;
      }
      case kWaitStart: {  // [S2]
        if (variant_ == Variant::kLook && is_broken) return false;
        for (int q = 0; q < sizes_.ranks; ++q) {
          if (q != r && rank.mail[q] < epoch) return false;
        }
        thread = {kWrite, 0, 0};
        return true;
      }
      case kWrite:
        if (other.call != epoch || other.close == kClosed) verdict_ = 3;
        NextOr(r, thread, kPublish);
        return true;
      case kPublish:  // [P1]
        other.progress[r][t] = epoch;
        NextOr(r, thread, kWaitAll);
        return true;
      case kWaitAll:  // [P2]
        for (int q = 0; q < sizes_.ranks; ++q) {
          if (q != r && rank.progress[q][t] < epoch) return false;
        }
        thread.step = kDone;
        return true;
      case kBreak:
        other.given_up = 1;
        NextOr(r, thread, kDone);
        return true;
      default:
        return false;
    }
  }

  bool UsesEntries() const { return variant_ != Variant::kNoWait && variant_ != Variant::kLook; }

  bool HasLeft(const Rank& rank, int peer) const {
    if (rank.end[peer] >= rank.call) return true;
    if (variant_ == Variant::kNoProgress) return false;
    for (int t = 0; t < sizes_.workers; ++t) {
      if (rank.progress[peer][t] < rank.call) return false;
    }
    return true;
  }

  // One step of closing a call; false if it cannot move.
  bool CloseCall(State& s, int r) {
    Rank& rank = s[r];
    const auto go_to = [&](Close close) {
      rank.close = close;
      rank.peer = static_cast<uint8_t>(NextPeer(r, 0));
      return true;
    };
    const auto next_or = [&](Close close) {
      rank.peer = static_cast<uint8_t>(NextPeer(r, rank.peer + 1));
      return rank.peer < sizes_.ranks ? true : go_to(close);
    };
    const bool leaves_last = variant_ == Variant::kLeftLast;
    const Close shuts = rank.has_shown == 0              ? kWaitLeft
                        : variant_ == Variant::kTwoSteps ? kRead
                                                         : kShutDoor;
    Rank& other = s[rank.peer];
    switch (rank.close) {
      case kOpen: {
        bool failed = rank.broken != 0 || rank.given_up != 0 || rank.opener.failed != 0;
        for (int t = 0; t < sizes_.workers; ++t) failed |= rank.worker[t].failed != 0;
        std::memset(rank.inside, 0, sizeof rank.inside);
        if (failed) return go_to(kTell);
        if (rank.call < sizes_.calls) {
          Begin(rank, rank.call + 1);
        } else {
          go_to(kClosed);
        }
        return true;
      }
      case kTell:
        rank.broken = 1;
        other.given_up = 1;
        return next_or(variant_ == Variant::kNoWait ? kClosed : leaves_last ? shuts : kLeave);
      case kLeave:  // [L1]
        other.end[r] = rank.call;
        return next_or(leaves_last ? kClosed : shuts);
      case kRead:
        rank.inside[rank.peer] = other.entered[r];
        return next_or(kShutDoor);
      case kShutDoor:  // [V2]
        if (variant_ == Variant::kLook) {
          rank.inside[rank.peer] = rank.mail[rank.peer];  // it has come
        } else if (variant_ != Variant::kTwoSteps) {
          rank.inside[rank.peer] = other.entered[r];
        }
        other.entered[r] |= 0x80;
        return next_or(kWaitLeft);
      case kWaitLeft:  // [L2]
        if (jax_ep::gpu::may_be_inside(AsEntry(rank.inside[rank.peer]), rank.call) &&
            !HasLeft(rank, rank.peer)) {
          return false;
        }
        return next_or(leaves_last ? kLeave : kClosed);
      default:
        return false;
    }
  }

  const Sizes sizes_;
  const Variant variant_;
  int verdict_ = 0;
  jax_ep::test::Search<State> search_;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : kNames[0];
  for (size_t v = 0; v < std::size(kNames); ++v) {
    if (name != kNames[v]) continue;
    for (const Sizes& sizes : {Sizes{2, 2, 2}, Sizes{3, 1, 1}}) {
      if (const int verdict = Model(sizes, static_cast<Variant>(v)).Check()) return verdict;
    }
    return 0;
  }
  std::printf("unknown variant %s\n", name.c_str());
  return 1;
}
