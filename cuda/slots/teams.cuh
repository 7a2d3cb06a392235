// A block's teams, and what a thread has of their units (units.h).
#ifndef JAX_EP_CUDA_SLOTS_TEAMS_CUH_
#define JAX_EP_CUDA_SLOTS_TEAMS_CUH_

#include "cuda/core/divider.h"
#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/slots/units.h"
#include "cuda/sync/slots.cuh"

namespace jax_ep::gpu::slots {

// A thread's part of a unit.
struct Place {
  int32_t token;
  int32_t first;  // of its vectors, in the row; the next ones are a stride away
  int32_t count;  // of its vectors; 0: the thread has nothing to do
  int32_t atoms;  // index of its first atom, in an area; the next ones are a stride away
};

// The block's team that the thread belongs to.
class Team {
 public:
  __device__ explicit Team(const Units& units)
      : units_(units),
        number_(static_cast<int32_t>(threadIdx.x) / 32 / units.team_warps),
        thread_(static_cast<int32_t>(threadIdx.x) - number_ * units.team_warps * 32) {}

  __device__ int32_t number() const { return number_; }
  __device__ int32_t count() const { return kNumWarps / units_.team_warps; }  // of the block
  // Of warps that are left over.
  __device__ bool is_none() const { return number_ >= count(); }

  // Of the team: the thread, and its warp.
  __device__ int32_t thread() const { return thread_; }
  __device__ int32_t warp() const { return thread_ / 32; }
  __device__ int32_t num_warps() const { return units_.team_warps; }
  // Until all of the team have come.
  __device__ void meet() const {
    if (units_.team_warps == 1) return __syncwarp();
    barrier_sync(1 + number_, units_.team_warps * 32);
  }
  static_assert(1 + kNumWarps / 2 < 16, "a barrier for each team of several warps");

  // A unit's vectors; the last ones of a row may have none.
  __device__ int32_t size(int32_t unit) const {
    const int32_t piece = unit & ((1 << units_.piece_shift) - 1);
    const int32_t left = units_.row_vectors - piece * units_.piece_vectors;
    return max(0, min(units_.piece_vectors, left));
  }

  __device__ Place place(int32_t unit) const {
    const int32_t piece = unit & ((1 << units_.piece_shift) - 1);
    const int32_t begin = piece * units_.piece_vectors;
    const int32_t size = min(units_.piece_vectors, units_.row_vectors - begin);
    Place place{unit >> units_.piece_shift, begin + thread_, 0,
                unit * kMaxAtoms * units_.stride + thread_};
    if (thread_ < units_.stride) {
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) place.count += thread_ + j * units_.stride < size;
    }
    return place;
  }

 private:
  const Units& units_;
  const int32_t number_, thread_;
};

__device__ inline int32_t token_of(const Units& units, int32_t unit) {
  return unit >> units.piece_shift;
}
__device__ inline bool begins_token(const Units& units, int32_t unit) {
  return (unit & ((1 << units.piece_shift) - 1)) == 0;
}

// All units of several ranks, rank by rank, of which somebody takes the first one and then each
// step-th.
struct Turn {
  int32_t rank_index = 0, unit;
  __device__ Turn(int32_t num_units, int32_t first) : unit(first), num_units_(num_units) {
    settle();
  }
  __device__ void next(int32_t step) {
    unit += step;
    settle();
  }

 private:
  __device__ void settle() {
    for (; unit >= num_units_; unit -= num_units_) ++rank_index;
  }
  const int32_t num_units_;
};

// The i-th rank after this one: each link has its turn. Of the whole group, or of this node.
template <typename Far>
__device__ int successor(const Far& far, const GroupView& g, int i) {
  const int r = far.rank(g) + i;
  return r < far.num_ranks(g) ? r : r - far.num_ranks(g);
}
__device__ inline int successor(const GroupView& g, int i) {
  const int r = g.rank + i;
  return r < g.num_ranks ? r : r - g.num_ranks;
}

// A set of ranks.
struct Ranks {
  uint32_t word[(kMaxPeers + 31) / 32];
  __device__ bool has(int rank) const { return (word[rank / 32] >> rank % 32 & 1) != 0; }
};

// Of all lanes' ranks, -1 for none; by a warp, on all lanes.
__device__ inline Ranks ranks_of_warp(int32_t rank) {
  Ranks ranks;
#pragma unroll
  for (int w = 0; w < (kMaxPeers + 31) / 32; ++w) {
    const bool is_here = rank >= 32 * w && rank < 32 * (w + 1);
    ranks.word[w] = __reduce_or_sync(0xffffffffu, is_here ? 1u << rank % 32 : 0u);
  }
  return ranks;
}

// Of a thread's place, three to an atom. A form of rows says which of its kAtoms atoms a thread has.
using Words = uint32_t[kMaxAtoms * 3];

// Of words that are vectors: the j-th.
__device__ inline uint4 vector_of(const Words& word, int j) {
  return {word[4 * j], word[4 * j + 1], word[4 * j + 2], word[4 * j + 3]};
}
__device__ inline void set_vector(Words& word, int j, uint4 vector) {
  word[4 * j] = vector.x;
  word[4 * j + 1] = vector.y;
  word[4 * j + 2] = vector.z;
  word[4 * j + 3] = vector.w;
}

struct PlainAtoms {  // as many as its vectors fill
  static constexpr int kAtoms = kMaxAtoms;
  __device__ static bool has_atom(const Place& place, int j) {
    return place.count > 0 && j <= place.count;
  }

  // Packed, as its vectors are.
  __device__ static int32_t packed_bytes(int32_t size) { return size * 16; }
  __device__ static void pack(char* to, int32_t, int32_t thread, const Place& place, int32_t stride,
                              const Words& word) {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j < place.count) {
        reinterpret_cast<uint4*>(to)[thread + j * stride] = vector_of(word, j);
      }
    }
  }
  __device__ static void unpack(const char* from, int32_t, int32_t thread, const Place& place,
                                int32_t stride, Words& word) {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      set_vector(word, j, __ldcg(reinterpret_cast<const uint4*>(from) + thread + j * stride));
    }
  }
};

template <typename Form>
__device__ inline void send_words(char* area, uint32_t tag, const Place& place, int32_t stride,
                                  const Words& word) {
  SlotAtom* to = atoms_of(area) + place.atoms;
#pragma unroll
  for (int j = 0; j < Form::kAtoms; ++j) {
    if (Form::has_atom(place, j)) {
      send_atom(to, word[3 * j], word[3 * j + 1], word[3 * j + 2], tag);
    }
    to += stride;
  }
}

// What send_words has sent, for which it waits. False if the group is broken.
template <typename Form>
__device__ inline bool receive_words(SlotWait& wait, int rank, char* area, uint64_t epoch,
                                     const Place& place, int32_t stride, Words& word) {
  const uint32_t tag = slot_tag(epoch);
  const SlotAtom* from = atoms_of(area) + place.atoms;
  for (uint32_t n = 1;; ++n) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < Form::kAtoms; ++j) {
      if (Form::has_atom(place, j)) {
        all &= read_atom(from + j * stride, tag, word[3 * j], word[3 * j + 1], word[3 * j + 2]);
      }
    }
    if (all) return true;
    if (!wait.may_go_on(n, rank, epoch)) return false;
  }
}

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_TEAMS_CUH_
