// A model of how combine takes nodes' sums from its rails (cuda/network/rail/combine.cuh), in which
// every order of its steps is tried, for every choice of the nodes that tokens have rows on: a chunk
// that is read is the right one, and every call ends. Without a GPU; that chunks come whole, and not
// before slots are free, is rail_model's.
//
//   rail_combine_model [VARIANT]
//
// Nodes have one rank. A rank has a sender for each other node, and summers, which read
// what nodes have sent token by token, all of a token's nodes at once; the last of them to leave a
// chunk gives credit. Control variants do something else; the model has to find what that does.
//
// Exit codes: 0 right; 3 a chunk that is another one; 4 a call that does not end; 1 anything else.
#include <array>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <string>

#include "tests/native/search.h"

namespace {

enum class Variant {
  kRight,
  kOneSender,    // one for all nodes, to which it sends one after the other
  kFirstLeaves,  // credit by the first summer to leave
  kOneCount,     // of summers that have left a node's chunks, whatever the chunk
};
constexpr const char* kNames[] = {"right", "one-sender", "first-leaves", "one-count"};

constexpr int kMaxNodes = 3, kMaxSlots = 2, kMaxSummers = 2;
struct Sizes {
  int nodes, slots, rows_per_chunk, tokens, calls, summers;
  int stride;  // of the choices of nodes, every so many are tried
};

enum Phase : uint8_t { kOpenFirst, kLeaveFirst, kOpen, kRead, kLeave, kSummed };

// What has come from one node, and is under way to it no more.
struct Stream {
  uint8_t sent;              // chunks, in all calls
  uint8_t sent_in_call;      // by the sender, which lives on the other node
  uint8_t credit;            // chunks
  uint8_t chunk[kMaxSlots];  // that a slot holds, from 1 on
  uint8_t left[kMaxSlots];   // summers
};
struct Summer {
  uint8_t phase, token;
  uint8_t rows[kMaxNodes];  // read in this call, of each node
};
struct Rank {
  uint8_t call;  // kMaxCalls: ended
  Summer summer[kMaxSummers];
  Stream from[kMaxNodes];
};
using State = std::array<Rank, kMaxNodes>;

class Model {
 public:
  // `choice` has bits for each token of each rank: whether it has rows on the next node, and on the one
  // after.
  Model(const Sizes& sizes, Variant variant, uint32_t choice)
      : sizes_(sizes), variant_(variant), choice_(choice) {}

  int Check() {
    State first{};
    search_.Visit(first);
    return search_.Run([&](const State& state) { return Expand(state); });
  }
  size_t num_states() const { return search_.num_states(); }

 private:
  int Expand(const State& state) {
    bool moves = false, is_running = false;
    const auto step = [&](auto&& move) {
      State next = state;
      if (!move(next)) return;
      moves = true;
      search_.Visit(next);
    };
    for (int r = 0; r < sizes_.nodes; ++r) {
      if (state[r].call == sizes_.calls) continue;
      is_running = true;
      for (int to = 0; to < sizes_.nodes; ++to) {
        if (to != r) step([&](State& next) { return Send(next, r, to); });
      }
      for (int s = 0; s < sizes_.summers; ++s) {
        step([&](State& next) { return Sum(next, r, s); });
      }
      step([&](State& next) { return EndCall(next, r); });
    }
    return is_running && !moves ? 4 : verdict_;
  }

  bool HasRows(int rank, int token, int node) const {
    const int distance = (node + sizes_.nodes - rank) % sizes_.nodes;
    if (distance == 0) return false;  // its own part does not come over a rail
    const int token_of_all = rank * sizes_.tokens + token;
    return (choice_ >> (token_of_all * (sizes_.nodes - 1) + distance - 1) & 1) != 0;
  }
  int NumRows(int rank, int node) const {
    int count = 0;
    for (int t = 0; t < sizes_.tokens; ++t) count += HasRows(rank, t, node) ? 1 : 0;
    return count;
  }
  int NumChunks(int rank, int node) const {
    return 1 + (NumRows(rank, node) + sizes_.rows_per_chunk - 1) / sizes_.rows_per_chunk;
  }

  bool Send(State& s, int r, int to) const {
    Stream& stream = s[to].from[r];
    if (stream.sent_in_call == NumChunks(to, r)) return false;
    if (variant_ == Variant::kOneSender && to == (r + 2) % sizes_.nodes &&
        s[(r + 1) % sizes_.nodes].from[r].sent_in_call != NumChunks((r + 1) % sizes_.nodes, r)) {
      return false;
    }
    if (stream.credit + sizes_.slots <= stream.sent) return false;  // [R1]
    stream.chunk[stream.sent % sizes_.slots] = static_cast<uint8_t>(stream.sent + 1);
    ++stream.sent;
    ++stream.sent_in_call;
    return true;
  }

  // The chunk of a node that a summer is in, or comes to next.
  int ChunkOf(const State& s, int r, const Summer& summer, int node) const {
    const int before = s[r].call * NumChunks(r, node);
    if (summer.phase == kOpenFirst || summer.phase == kLeaveFirst) return before;
    const int row = summer.rows[node] - (summer.phase == kLeave ? 1 : 0);
    return before + 1 + row / sizes_.rows_per_chunk;
  }
  void Leave(State& s, int r, const Summer& summer, int node) const {
    Stream& stream = s[r].from[node];
    const int slot = ChunkOf(s, r, summer, node) % sizes_.slots;
    uint8_t& left = stream.left[variant_ == Variant::kOneCount ? 0 : slot];
    left = static_cast<uint8_t>((left + 1) % sizes_.summers);
    if (left == (variant_ == Variant::kFirstLeaves ? 1 % sizes_.summers : 0)) ++stream.credit;
  }

  // One step of a summer: its phase, of all nodes; false if it cannot move.
  bool Sum(State& s, int r, int index) {
    Summer& summer = s[r].summer[index];
    const auto for_each_node = [&](auto&& f) {
      const bool is_first = summer.phase == kOpenFirst || summer.phase == kLeaveFirst;
      for (int node = 0; node < sizes_.nodes; ++node) {
        if (node != r && (is_first || HasRows(r, summer.token, node))) f(node);
      }
    };
    bool may_move = true;
    switch (summer.phase) {
      case kOpenFirst:
      case kOpen:
        for_each_node([&](int node) {  // [R3]
          may_move &= s[r].from[node].sent > ChunkOf(s, r, summer, node);
        });
        if (may_move) ++summer.phase;
        return may_move;
      case kRead:
        for_each_node([&](int node) {
          const int chunk = ChunkOf(s, r, summer, node);
          if (s[r].from[node].chunk[chunk % sizes_.slots] != chunk + 1) verdict_ = 3;
          ++summer.rows[node];
        });
        summer.phase = kLeave;
        return true;
      case kLeaveFirst:
      case kLeave:
        for_each_node([&](int node) {  // [Q], [R4]
          const int rows = summer.rows[node];
          if (rows % sizes_.rows_per_chunk == 0 || rows == NumRows(r, node)) {
            Leave(s, r, summer, node);
          }
        });
        if (summer.phase == kLeave) ++summer.token;
        summer.phase = summer.token == sizes_.tokens ? kSummed : kOpen;
        return true;
      default:
        return false;
    }
  }

  bool EndCall(State& s, int r) const {
    for (int s_index = 0; s_index < sizes_.summers; ++s_index) {
      if (s[r].summer[s_index].phase != kSummed) return false;
    }
    for (int to = 0; to < sizes_.nodes; ++to) {
      if (to != r && s[to].from[r].sent_in_call != NumChunks(to, r)) return false;
    }
    ++s[r].call;
    for (Summer& summer : s[r].summer) summer = {};
    for (int to = 0; to < sizes_.nodes; ++to) s[to].from[r].sent_in_call = 0;
    return true;
  }

  const Sizes sizes_;
  const Variant variant_;
  const uint32_t choice_;
  int verdict_ = 0;
  jax_ep::test::Search<State> search_;
};

int CheckAll(const Sizes& sizes, Variant variant) {
  size_t num_states = 0, num_choices = 0;
  int verdict = 0;
  const uint32_t end = 1u << (sizes.nodes * sizes.tokens * (sizes.nodes - 1));
  // All ones first: every token has rows on all nodes.
  for (uint32_t i = 0; i < end && verdict == 0; i += static_cast<uint32_t>(sizes.stride)) {
    Model model(sizes, variant, end - 1 - i);
    verdict = model.Check();
    num_states += model.num_states();
    ++num_choices;
  }
  std::printf(
      "%d nodes, %d slots, %d rows a chunk, %d tokens, %d calls, %d summers: %zu choices, %zu "
      "states, %s\n",
      sizes.nodes, sizes.slots, sizes.rows_per_chunk, sizes.tokens, sizes.calls, sizes.summers,
      num_choices, num_states,
      verdict == 0   ? "right"
      : verdict == 3 ? "a wrong chunk"
                     : "a call does not end");
  return verdict;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : kNames[0];
  for (size_t v = 0; v < std::size(kNames); ++v) {
    if (name != kNames[v]) continue;
    for (const Sizes& sizes :
         {Sizes{3, 1, 1, 1, 2, 1, 1}, Sizes{3, 1, 2, 2, 1, 1, 61}, Sizes{3, 2, 1, 2, 1, 1, 97},
          Sizes{2, 1, 2, 3, 2, 2, 5}, Sizes{2, 2, 1, 3, 1, 2, 5}}) {
      if (const int verdict = CheckAll(sizes, static_cast<Variant>(v))) return verdict;
    }
    return 0;
  }
  std::printf("unknown variant %s\n", name.c_str());
  return 1;
}
