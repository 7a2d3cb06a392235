// A model of how rows cross a rail (cuda/network/rail/dispatch.cuh), in which every order of its steps
// and of the network's is tried: a chunk that is forwarded is whole and the right one, every rank has
// all its rows when its call ends and nobody writes there afterwards, and every call ends. Without a
// GPU; memory is sequentially consistent here, and a put_signal's signal comes after its own bytes, as
// hop.cuh promises, but in no order with any other call's.
//
//   rail_model [VARIANT]
//
// There are two nodes. A rank is a sender and a forwarder for its peer on the other node, as a block
// of the kernel has them; when both are through it tells the ranks of its node, and waits for them. A
// chunk is words, which the network brings one by one, reading staging when it does. Ranks start when
// they like. Control variants leave something out; the model has to find what that does.
//
// Exit codes: 0 right; 3 a chunk that is not whole, or another one; 4 a call that does not end; 5 a
// row that is missing, or is written after the end; 1 anything else.
#include <array>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <string>

#include "tests/native/search.h"

namespace {

enum class Variant {
  kRight,
  kNoCredit,     // [R1] is left out
  kEarlyCredit,  // [R4] before the chunk is read
  kHeadFirst,    // the signal comes with the first word
  kCounter,      // one flag a channel, which counts what has come
  kRestart,      // chunks are numbered from 0 in each call
  kOneWarp,      // who forwards is who sends, and does that first
  kNoStart,      // [S2] is left out
  kNoPeers,      // [P2] is left out
};
constexpr const char* kNames[] = {"right",   "no-credit", "early-credit", "head-first", "counter",
                                  "restart", "one-warp",  "no-start",     "no-peers"};

constexpr int kMaxRanks = 4, kMaxSlots = 2, kMaxWords = 2, kMaxPuts = 3;
struct Sizes {
  int ranks_per_node, slots, words, chunks, calls;  // chunks of a call, to each peer
};

// What sender, forwarder and the rank itself do next.
enum Send : uint8_t { kAwaitCredit, kFill, kPost, kSent };
enum Forward : uint8_t { kAwaitFilled, kReadWord, kWriteRow, kGiveCredit, kForwarded };
enum Step : uint8_t { kShow, kAwaitStart, kWork, kPublish, kAwaitPeers, kEnded };

struct Put {
  uint8_t is_there, slot, use, words;  // words: those that have been brought, a bit each
};
// Of one rank: also what its peer on the rail has written here, or is about to.
struct Rank {
  uint8_t step, call, peer;  // call: from 1 on
  uint8_t mail, told;        // calls it has shown the others, and has told them the end of
  uint8_t rows;              // that have come in this call
  uint8_t send, sent, sent_before;
  uint8_t forward, word, to, received, received_before;
  uint8_t staging[kMaxSlots][kMaxWords],
      landing[kMaxSlots][kMaxWords];  // numbers of chunks, from 1 on
  uint8_t filled[kMaxSlots], credit, credits_under_way;
  Put puts[kMaxPuts];  // this rank's, under way
};
using State = std::array<Rank, kMaxRanks>;

class Model {
 public:
  Model(const Sizes& sizes, Variant variant) : sizes_(sizes), variant_(variant) {}

  int Check() {
    State first{};
    for (int r = 0; r < num_ranks(); ++r) Begin(first[r], 1);
    search_.Visit(first);
    verdict_ = search_.Run([&](const State& state) { return Expand(state); });
    std::printf("2 nodes of %d ranks, %d slots, %d words, %d chunks, %d calls: %zu states, %s\n",
                sizes_.ranks_per_node, sizes_.slots, sizes_.words, sizes_.chunks, sizes_.calls,
                search_.num_states(),
                verdict_ == 0   ? "right"
                : verdict_ == 3 ? "a wrong chunk"
                : verdict_ == 4 ? "a call does not end"
                                : "a row is missing, or late");
    return verdict_;
  }

 private:
  int num_ranks() const { return 2 * sizes_.ranks_per_node; }
  int PeerOf(int r) const { return (r + sizes_.ranks_per_node) % num_ranks(); }
  int FirstOfNode(int r) const { return r / sizes_.ranks_per_node * sizes_.ranks_per_node; }

  int Expand(const State& state) {
    bool moves = false, is_running = false;
    const auto step = [&](auto&& move) {
      State next = state;
      if (!move(next)) return;
      moves = true;
      search_.Visit(next);
    };
    for (int r = 0; r < num_ranks(); ++r) {
      const Rank& rank = state[r];
      is_running |= rank.step != kEnded;
      if (rank.step == kWork) {
        step([&](State& next) { return DoSend(next, r); });
        step([&](State& next) { return DoForward(next, r); });
      }
      step([&](State& next) { return DoCall(next, r); });
      for (int p = 0; p < kMaxPuts; ++p) {
        for (int w = 0; w < sizes_.words; ++w) {
          step([&](State& next) { return BringWord(next, r, p, w); });
        }
        step([&](State& next) { return BringSignal(next, r, p); });
      }
      step([&](State& next) { return BringCredit(next, r); });
    }
    return is_running && !moves ? 4 : verdict_;
  }

  void Begin(Rank& rank, uint8_t call) const {
    rank.call = call;
    rank.step = kShow;
    rank.peer = 0;
    rank.send = kAwaitCredit;
    rank.forward = kAwaitFilled;
    rank.sent_before = variant_ == Variant::kRestart ? rank.sent = 0 : rank.sent;
    rank.received_before = variant_ == Variant::kRestart ? rank.received = 0 : rank.received;
  }

  uint8_t SlotOf(int chunk) const { return static_cast<uint8_t>(chunk % sizes_.slots); }
  uint8_t UseOf(int chunk) const { return static_cast<uint8_t>(chunk / sizes_.slots + 1); }

  // The rank itself: false if it cannot move.
  bool DoCall(State& s, int r) {
    Rank& rank = s[r];
    const int first = FirstOfNode(r);
    switch (rank.step) {
      case kShow:  // [S1]
        rank.mail = rank.call;
        rank.step = kAwaitStart;
        return true;
      case kAwaitStart:  // [S2]
        for (int q = first; q < first + sizes_.ranks_per_node; ++q) {
          if (s[q].mail < rank.call && variant_ != Variant::kNoStart) return false;
        }
        rank.step = kWork;
        return true;
      case kWork:
        if (rank.send != kSent || rank.forward != kForwarded) return false;
        rank.step = kPublish;
        return true;
      case kPublish:  // [P1]
        rank.told = rank.call;
        rank.step = kAwaitPeers;
        return true;
      case kAwaitPeers:  // [P2]
        for (int q = first; q < first + sizes_.ranks_per_node; ++q) {
          if (s[q].told < rank.call && variant_ != Variant::kNoPeers) return false;
        }
        if (rank.rows != sizes_.ranks_per_node * sizes_.chunks) verdict_ = 5;
        rank.rows = 0;
        if (rank.call < sizes_.calls) {
          Begin(rank, static_cast<uint8_t>(rank.call + 1));
        } else {
          rank.step = kEnded;
        }
        return true;
      default:
        return false;
    }
  }

  bool DoSend(State& s, int r) {
    Rank& rank = s[r];
    const int chunk = rank.sent;
    uint8_t (&staging)[kMaxWords] = rank.staging[SlotOf(chunk)];
    switch (rank.send) {
      case kAwaitCredit:  // [R1]
        if (variant_ != Variant::kNoCredit && rank.credit + sizes_.slots <= chunk) return false;
        rank.send = kFill;
        return true;
      case kFill:
        for (int w = 0; w < sizes_.words; ++w)
          staging[w] = NameOf(rank.call, chunk - rank.sent_before);
        rank.send = kPost;
        return true;
      case kPost:  // [R2]
        for (Put& put : rank.puts) {
          if (put.is_there != 0) continue;
          put = {1, SlotOf(chunk), UseOf(chunk), 0};
          ++rank.sent;
          rank.send = rank.sent - rank.sent_before == sizes_.chunks ? kSent : kAwaitCredit;
          return true;
        }
        return false;  // no queue is that long
      default:
        return false;
    }
  }

  // The call's i-th chunk, as its words say it: never 0.
  uint8_t NameOf(int call, int i) const { return static_cast<uint8_t>(call * 16 + i); }

  bool DoForward(State& s, int r) {
    Rank& rank = s[r];
    Rank& peer = s[PeerOf(r)];
    const int chunk = rank.received;
    if (variant_ == Variant::kOneWarp && rank.send != kSent) return false;
    const bool is_early = variant_ == Variant::kEarlyCredit;
    const auto next_chunk = [&] {
      ++rank.received;
      rank.forward =
          rank.received - rank.received_before == sizes_.chunks ? kForwarded : kAwaitFilled;
    };
    switch (rank.forward) {
      case kAwaitFilled:  // [R3]
        if (variant_ == Variant::kCounter ? rank.filled[0] <= chunk
                                          : rank.filled[SlotOf(chunk)] < UseOf(chunk)) {
          return false;
        }
        if (is_early) ++peer.credits_under_way;
        rank.forward = kReadWord;
        rank.word = 0;
        return true;
      case kReadWord:
        if (rank.landing[SlotOf(chunk)][rank.word] !=
            NameOf(rank.call, chunk - rank.received_before)) {
          verdict_ = 3;
        }
        if (++rank.word == sizes_.words) {
          rank.word = 0;
          rank.forward = kWriteRow;
          rank.to = 0;
        }
        return true;
      case kWriteRow: {  // to one rank of the node after the other
        Rank& other = s[FirstOfNode(r) + rank.to];
        if (other.call != rank.call || other.step == kEnded || other.mail != rank.call)
          verdict_ = 5;
        ++other.rows;
        if (++rank.to < sizes_.ranks_per_node) return true;
        rank.to = 0;
        if (is_early) {
          next_chunk();
        } else {
          rank.forward = kGiveCredit;
        }
        return true;
      }
      case kGiveCredit:  // [R4]
        ++peer.credits_under_way;
        next_chunk();
        return true;
      default:
        return false;
    }
  }

  // The network: one word of a put from rank r's staging to its peer's landing.
  bool BringWord(State& s, int r, int p, int w) const {
    Put& put = s[r].puts[p];
    if (put.is_there == 0 || (put.words >> w & 1) != 0) return false;
    s[PeerOf(r)].landing[put.slot][w] = s[r].staging[put.slot][w];
    put.words = static_cast<uint8_t>(put.words | 1 << w);
    const int all = (1 << sizes_.words) - 1;
    if (variant_ == Variant::kHeadFirst && put.use == 0 && put.words == all) put = {};
    return true;
  }
  bool BringSignal(State& s, int r, int p) const {
    Put& put = s[r].puts[p];
    const int all = (1 << sizes_.words) - 1;
    if (put.is_there == 0 || put.use == 0) return false;
    if (put.words != all && !(variant_ == Variant::kHeadFirst && (put.words & 1) != 0))
      return false;
    Rank& peer = s[PeerOf(r)];
    if (variant_ == Variant::kCounter) {
      ++peer.filled[0];
    } else {
      peer.filled[put.slot] = put.use;
    }
    put.use = 0;  // the signal has come
    if (put.words == all) put = {};
    return true;
  }
  bool BringCredit(State& s, int r) const {
    if (s[r].credits_under_way == 0) return false;
    --s[r].credits_under_way;
    ++s[r].credit;
    return true;
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
    for (const Sizes& sizes : {Sizes{1, 1, 2, 2, 2}, Sizes{1, 2, 2, 3, 2}, Sizes{2, 1, 1, 1, 2}}) {
      if (const int verdict = Model(sizes, static_cast<Variant>(v)).Check()) return verdict;
    }
    return 0;
  }
  std::printf("unknown variant %s\n", name.c_str());
  return 1;
}
