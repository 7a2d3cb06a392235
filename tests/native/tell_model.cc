// A model of how ranks of several nodes hear that one has given up (cuda/network/tell.cuh,
// cuda/sync/give_up.cuh), in which every order of its steps is tried: one rank alone has a timeout,
// and yet every call ends that somebody is in, and no rank adds to a word twice.
//
//   tell_model [VARIANT]
//
// Ranks begin a call when they like, or never, and no call ends well. One of them may give up
// whenever it waits, or a break of another group of its devices may reach it. Whose call has ended may
// make another one, which is refused. Control variants leave something out.
//
// Exit codes: 0 right; 3 a word is added to twice; 4 a call that does not end; 1 anything else.
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

#include "tests/native/search.h"

namespace {

enum class Variant {
  kRight,
  kNotTold,   // ranks of other nodes are not told
  kRail,      // of each other node one rank is told
  kOwnOnly,   // who has been told over NVLink tells no other node
  kNoRecord,  // without has_told
};
constexpr const char* kNames[] = {"right", "not-told", "rail", "own-only", "no-record"};

constexpr int kMaxRanks = 4, kMaxCalls = 2;
struct Sizes {
  int ranks, ranks_per_node;
  bool is_from_outside;  // a break of another group, in place of a timeout
};

// What a rank does next: in a call, or between calls. The last three for one rank after the other.
enum Step : uint8_t { kBetween, kWait, kTellNode, kLook, kTellOthers };

struct Rank {
  uint8_t call, step, to;                       // calls begun; what is next, and to whom
  uint8_t broken, given_up, has_told, is_told;  // the last: by its node
  uint8_t word[kMaxRanks];                      // what has been added to it, by rank
};
struct State {
  std::array<Rank, kMaxRanks> rank;
  uint8_t has_happened;  // the timeout, or the break from outside
};

class Model {
 public:
  Model(const Sizes& sizes, Variant variant) : sizes_(sizes), variant_(variant) {}

  int Check() {
    search_.Visit({});
    verdict_ = search_.Run([&](const State& state) { return Expand(state); });
    std::printf("%d ranks, %d a node, %s: %zu states, %s\n", sizes_.ranks, sizes_.ranks_per_node,
                sizes_.is_from_outside ? "another group's break" : "a timeout",
                search_.num_states(),
                verdict_ == 0   ? "right"
                : verdict_ == 3 ? "a word is added to twice"
                                : "a call does not end");
    return verdict_;
  }

 private:
  int Expand(const State& state) {
    bool is_in_call = false, is_broken = false, moves = false;
    for (int r = 0; r < sizes_.ranks; ++r) {
      const Rank& rank = state.rank[r];
      State next = state;
      is_broken |= rank.broken != 0;
      if (rank.step == kBetween) {
        if (rank.call < kMaxCalls) {  // or it never does
          ++next.rank[r].call;
          next.rank[r].step = rank.broken != 0 ? kLook : kWait;
          search_.Visit(next);
        }
      } else {
        is_in_call = true;
        if (Work(next, r)) {
          moves = true;
          search_.Visit(next);
        }
      }
      if (state.has_happened == 0) Happen(state, r);
    }
    return is_in_call && is_broken && !moves ? 4 : verdict_;
  }

  // The first rank gives up, or one whose device is in a group that has.
  void Happen(const State& state, int r) {
    State next = state;
    next.has_happened = 1;
    if (sizes_.is_from_outside) {
      next.rank[r].given_up = 1;
    } else if (r != 0 || state.rank[r].step != kWait) {
      return;
    } else {
      Break(next.rank[r]);
    }
    search_.Visit(next);
  }

  static void Break(Rank& rank) {
    rank.broken = 1;
    rank.step = kTellNode;
    rank.to = 0;
  }
  int NodeOf(int r) const { return r / sizes_.ranks_per_node; }

  bool IsTold(const Rank& rank) const {
    bool is_told = false;
    for (int q = 0; q < sizes_.ranks; ++q) is_told |= rank.word[q] != 0;
    return is_told;
  }

  // One step; false if it cannot move.
  bool Work(State& s, int r) {
    Rank& rank = s.rank[r];
    switch (rank.step) {
      case kWait:  // [T2], and give_up.cuh's
        if (rank.given_up == 0 && !IsTold(rank)) return false;
        rank.is_told = rank.given_up;
        Break(rank);
        return true;
      case kTellNode:
        if (rank.to != r && NodeOf(rank.to) == NodeOf(r)) s.rank[rank.to].given_up = 1;
        if (++rank.to == sizes_.ranks) rank.step = kLook;
        return true;
      case kLook:  // [T1]
        rank.to = 0;
        rank.step = kBetween;
        if (IsTold(rank) || rank.has_told != 0) return true;
        if (variant_ == Variant::kNotTold) return true;
        if (variant_ == Variant::kOwnOnly && rank.is_told != 0) return true;
        rank.has_told = variant_ != Variant::kNoRecord;
        rank.step = kTellOthers;
        return true;
      case kTellOthers: {
        const bool is_rail = rank.to % sizes_.ranks_per_node == r % sizes_.ranks_per_node;
        if (NodeOf(rank.to) != NodeOf(r) && (variant_ != Variant::kRail || is_rail)) {
          if (++s.rank[rank.to].word[r] > 1) verdict_ = 3;
        }
        if (++rank.to == sizes_.ranks) rank.step = kBetween;
        return true;
      }
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
    for (const Sizes& sizes :
         {Sizes{3, 1, false}, Sizes{4, 2, false}, Sizes{3, 1, true}, Sizes{4, 2, true}}) {
      if (const int verdict = Model(sizes, static_cast<Variant>(v)).Check()) return verdict;
    }
    return 0;
  }
  std::printf("unknown variant %s\n", name.c_str());
  return 1;
}
