// What a timeline build (JAX_EP_TIMELINE) notes of a call: when each thing happened first and last,
// by block and role. cuda/sync/timeline.cuh notes it.
#ifndef JAX_EP_CUDA_MEMORY_TIMELINE_H_
#define JAX_EP_CUDA_MEMORY_TIMELINE_H_

#include <cstdint>

namespace jax_ep::gpu {

// Whose doing it is. Warps of a block that do the same are one.
enum class Role : int32_t {
  kBlock,  // all of its threads, or whichever does it for the block
  kSender,
  kReceiver,
  kZeroer,
  kMessenger,
  kScout,
  kLoader,  // of the sums for peers, and their adders
  kAdder,
  kOwnLoader,  // of the rank's own tokens, and their adders
  kOwnAdder,
  kStorer,
};
inline constexpr const char* kRoleNames[] = {"block",      "sender",    "receiver", "zeroer",
                                             "messenger",  "scout",     "loader",   "adder",
                                             "own loader", "own adder", "storer"};
inline constexpr int kNumRoles = 11;
static_assert(sizeof kRoleNames / sizeof kRoleNames[0] == kNumRoles);

// The tags are those of cuda/sync and of the kernels' headers.
enum class Event : int32_t {
  kStart,
  kS1,          // the buffers' addresses are sent
  kS2,          // those of all peers are here
  kLoad,        // a row's load is issued
  kStore,       // a row is stored, or its store is issued
  kFenceBegin,  // of the fence before [P1]
  kFenceEnd,
  kP1,       // the peers have been told of progress
  kP2,       // news of the peers' progress is here
  kBarrier,  // the grid barrier, passed
  kE1,
  kE2,
  kEnd,  // the role has nothing more to do
};
inline constexpr const char* kEventNames[] = {"start",       "S1",        "S2", "load", "store",
                                              "fence begin", "fence end", "P1", "P2",   "barrier",
                                              "E1",          "E2",        "end"};
inline constexpr int kNumEvents = 13;
static_assert(sizeof kEventNames / sizeof kEventNames[0] == kNumEvents);

// Nanoseconds since the block's start.
struct Mark {
  uint32_t first, last;
  uint32_t total;  // of all of its times, modulo 2^32: of two marks with equal counts, the
                   // difference is the time from one to the other, added up
  uint32_t count;  // 0: it did not happen
};

struct BlockTimeline {
  uint64_t start_ns;  // %globaltimer
  Mark mark[kNumRoles][kNumEvents];
};

// Of the newest call of an operation.
template <int kNumBlocks>
struct CallTimeline {
  uint32_t num_blocks;  // 0: it was never called
  BlockTimeline block[kNumBlocks];
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_MEMORY_TIMELINE_H_
