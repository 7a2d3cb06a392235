// A model of how calls in slots reach ranks of other nodes (cuda/network/slots.cuh), in which every
// order of their steps and of the network's is tried: a unit that is read is whole and the right one,
// what is told of a call is of that call, signals do not fall, and every call ends. Without a GPU;
// memory is sequentially consistent here, and a put_signal's signal comes after its own bytes, as hop.cuh
// promises, but in no order with any other call's.
//
//   far_slots_model [VARIANT]
//
// Every rank is a node. In a call it tells the others of it, and sends some of them its unit, the same
// one to each; which ones a routing of the calls says. Who gets a unit may have no room for it.
// Telling, sending, and waiting for each other rank's word and unit are done by blocks, at the same
// time. The network reads a word of staging when it brings it, which is the latest it may.
// Control variants leave something out; the model has to find what that does.
//
// Exit codes: 0 right; 3 a unit that is not whole, or another one, or another call's word; 4 a call that
// does not end; 5 a signal that falls; 1 anything else.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "tests/native/search.h"

namespace {

enum class Variant {
  kRight,
  kOneArea,      // staging and landing are the same for all epochs
  kOneWord,      // a signal is the same for all epochs
  kNotTold,      // [T2] is left out
  kDroppedUnit,  // [U2] is left out for a unit that there is no room for
  kSignalFirst,  // a signal comes with the first word
};
constexpr const char* kNames[] = {"right",    "one-area",     "one-word",
                                  "not-told", "dropped-unit", "signal-first"};

constexpr int kMaxRanks = 2, kMaxWords = 2, kMaxPuts = 6;
struct Sizes {
  int ranks, words, calls;
};

// What a rank does about another: its word, its unit.
enum Wait : uint8_t { kAwaits, kReads, kHas };
// What it does for all: fills staging, then puts to one rank after the other.
enum Send : uint8_t { kFills = 0xff, kAllPut = 0xfe };

enum Kind : uint8_t { kTold, kUnit };
struct Put {
  uint8_t is_there, to, kind, call, has_signalled;
  uint8_t words;  // that have been brought, a bit each
};
struct Area {
  uint8_t told, unit[kMaxWords];  // the call that they are of
};
struct Rank {
  uint8_t call;  // from 1 on; calls + 1: it has ended all
  uint8_t telling, sending;
  uint8_t word[kMaxRanks], unit[kMaxRanks],
      next[kMaxRanks];  // by other rank; next: word of its unit
  Area staging[2], landing[2][kMaxRanks];
  uint8_t told[2][kMaxRanks], arrived[2][kMaxRanks];
  Put puts[kMaxPuts];  // under way
};
using State = std::array<Rank, kMaxRanks>;

class Model {
 public:
  Model(const Sizes& sizes, Variant variant) : sizes_(sizes), variant_(variant) {}

  // With units from where to where the bits of `routing` say, call by call.
  int Check(uint32_t routing) {
    routing_ = routing;
    State first{};
    for (int r = 0; r < sizes_.ranks; ++r) Begin(first, r, 1);
    search_ = {};
    search_.Visit(first);
    verdict_ = search_.Run([&](const State& state) { return Expand(state); });
    return verdict_;
  }
  size_t num_states() const { return search_.num_states(); }

 private:
  bool Sends(int call, int from, int to) const {
    const int pair = (call - 1) * sizes_.ranks * (sizes_.ranks - 1) + from * (sizes_.ranks - 1) +
                     (to < from ? to : to - 1);
    return (routing_ >> pair % 32 & 1) != 0;
  }
  int AreaOf(int call) const { return variant_ == Variant::kOneArea ? 0 : call & 1; }
  int SignalOf(int call) const { return variant_ == Variant::kOneWord ? 0 : call & 1; }

  void Begin(State& s, int r, int call) const {
    Rank& rank = s[r];
    rank.call = static_cast<uint8_t>(call);
    rank.telling = rank.sending = kFills;
    for (int q = 0; q < sizes_.ranks; ++q) {
      rank.word[q] = q == r ? kHas : kAwaits;
      rank.unit[q] = q != r && Sends(call, q, r) ? kAwaits : kHas;
      rank.next[q] = 0;
    }
  }

  int Expand(const State& state) {
    bool moves = false, is_running = false;
    const auto step = [&](auto&& move) {
      State next = state;
      if (!move(next)) return;
      moves = true;
      // The order of what is under way means nothing.
      for (Rank& rank : next) {
        std::sort(std::begin(rank.puts), std::end(rank.puts),
                  [](const Put& a, const Put& b) { return std::memcmp(&a, &b, sizeof a) < 0; });
      }
      search_.Visit(next);
    };
    for (int r = 0; r < sizes_.ranks; ++r) {
      if (state[r].call <= sizes_.calls) {
        is_running = true;
        step([&](State& s) { return DoSend(s, r, kTold); });
        step([&](State& s) { return DoSend(s, r, kUnit); });
        for (int q = 0; q < sizes_.ranks; ++q) {
          step([&](State& s) { return DoWord(s, r, q); });
          step([&](State& s) { return DoUnit(s, r, q, /*has_room=*/true); });
          step([&](State& s) { return DoUnit(s, r, q, /*has_room=*/false); });
        }
        step([&](State& s) { return DoEnd(s, r); });
      }
      for (int p = 0; p < kMaxPuts; ++p) {
        for (int w = 0; w < sizes_.words; ++w) {
          step([&](State& s) { return BringWord(s, r, p, w); });
        }
        step([&](State& s) { return BringSignal(s, r, p); });
      }
    }
    return is_running && !moves ? 4 : verdict_;
  }

  // [T1], [U1]: false if it cannot move.
  bool DoSend(State& s, int r, Kind kind) const {
    Rank& rank = s[r];
    uint8_t& at = kind == kTold ? rank.telling : rank.sending;
    Area& staging = rank.staging[AreaOf(rank.call)];
    if (at == kAllPut) return false;
    if (at == kFills) {
      if (kind == kTold) {
        staging.told = rank.call;
      } else {
        for (int w = 0; w < sizes_.words; ++w) staging.unit[w] = rank.call;
      }
      at = 0;
      return true;
    }
    while (at < sizes_.ranks && (at == r || (kind == kUnit && !Sends(rank.call, r, at)))) ++at;
    if (at == sizes_.ranks) {
      at = kAllPut;
      return true;
    }
    for (Put& put : rank.puts) {
      if (put.is_there != 0) continue;
      put = {1, at, kind, rank.call, 0, 0};
      ++at;
      return true;
    }
    return false;  // no queue is that long
  }

  // [T2]
  bool DoWord(State& s, int r, int q) {
    Rank& rank = s[r];
    if (rank.word[q] == kHas) return false;
    if (variant_ != Variant::kNotTold) {
      if (rank.told[SignalOf(rank.call)][q] < rank.call) return false;
      if (rank.landing[AreaOf(rank.call)][q].told != rank.call) verdict_ = 3;
    }
    rank.word[q] = kHas;
    return true;
  }

  // [U2]
  bool DoUnit(State& s, int r, int q, bool has_room) {
    Rank& rank = s[r];
    if (rank.unit[q] == kHas) return false;
    if (rank.unit[q] == kAwaits) {
      const bool waits = has_room || variant_ != Variant::kDroppedUnit;
      if (waits && rank.arrived[SignalOf(rank.call)][q] < rank.call) return false;
      rank.unit[q] = has_room ? kReads : kHas;
      return true;
    }
    if (!has_room) return false;
    if (rank.landing[AreaOf(rank.call)][q].unit[rank.next[q]] != rank.call) verdict_ = 3;
    if (++rank.next[q] == sizes_.words) rank.unit[q] = kHas;
    return true;
  }

  bool DoEnd(State& s, int r) const {
    Rank& rank = s[r];
    if (rank.telling != kAllPut || rank.sending != kAllPut) return false;
    for (int q = 0; q < sizes_.ranks; ++q) {
      if (rank.word[q] != kHas || rank.unit[q] != kHas) return false;
    }
    Begin(s, r, rank.call + 1);
    return true;
  }

  // The network: a word of a put from rank r's staging, then the put's signal.
  bool BringWord(State& s, int r, int p, int w) const {
    Put& put = s[r].puts[p];
    if (put.is_there == 0 || w >= NumWords(put) || (put.words >> w & 1) != 0) return false;
    const int area = AreaOf(put.call);
    const auto word_of = [&](Area& at) -> uint8_t& {
      return put.kind == kTold ? at.told : at.unit[w];
    };
    word_of(s[put.to].landing[area][r]) = word_of(s[r].staging[area]);
    put.words = static_cast<uint8_t>(put.words | 1 << w);
    if (put.has_signalled != 0 && IsAllThere(put)) put = {};
    return true;
  }
  bool BringSignal(State& s, int r, int p) {
    Put& put = s[r].puts[p];
    if (put.is_there == 0 || put.has_signalled != 0) return false;
    const bool is_early = variant_ == Variant::kSignalFirst && (put.words & 1) != 0;
    if (!IsAllThere(put) && !is_early) return false;
    Rank& to = s[put.to];
    uint8_t& signal = (put.kind == kTold ? to.told : to.arrived)[SignalOf(put.call)][r];
    if (signal > put.call) verdict_ = 5;
    signal = put.call;
    put.has_signalled = 1;
    if (IsAllThere(put)) put = {};
    return true;
  }
  int NumWords(const Put& put) const { return put.kind == kTold ? 1 : sizes_.words; }
  bool IsAllThere(const Put& put) const { return put.words == (1 << NumWords(put)) - 1; }

  const Sizes sizes_;
  const Variant variant_;
  uint32_t routing_ = 0;
  int verdict_ = 0;
  jax_ep::test::Search<State> search_;
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : kNames[0];
  struct Case {
    Sizes sizes;
    std::vector<uint32_t> routings;
  };
  // Those in which the variants are found out soon come first.
  const Case cases[] = {{{2, 1, 4}, {0x00, 0xff, 0x5a, 0x81, 0x37, 0xc4}},
                        {{2, 2, 3}, {0x00, 0x3f, 0x01, 0x1e, 0x29, 0x12}}};
  for (size_t v = 0; v < std::size(kNames); ++v) {
    if (name != kNames[v]) continue;
    for (const Case& c : cases) {
      Model model(c.sizes, static_cast<Variant>(v));
      size_t num_states = 0;
      for (const uint32_t routing : c.routings) {
        const int verdict = model.Check(routing);
        num_states += model.num_states();
        if (verdict == 0) continue;
        std::printf("%d ranks, routing %x: %s\n", c.sizes.ranks, routing,
                    verdict == 3   ? "a wrong word"
                    : verdict == 4 ? "a call does not end"
                                   : "a signal falls");
        return verdict;
      }
      std::printf("%d ranks, %d words, %d calls, %zu routings: %zu states, right\n", c.sizes.ranks,
                  c.sizes.words, c.sizes.calls, c.routings.size(), num_states);
    }
    return 0;
  }
  std::printf("unknown variant %s\n", name.c_str());
  return 1;
}
