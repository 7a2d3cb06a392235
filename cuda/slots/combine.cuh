// combine in slots: each rank sums its rows of every peer's token into the slots of the token's rank,
//           which adds the sums.
// After:    out and collected as cuda/direct/combine leaves them, to the bit.
// Roles:    blocks of 16 warps, of which the first ones send and the others receive, and in them teams
//           of warps that have a unit each at a time (units.h).
// Buffers:  name          | lives on       | written by               | read by
//           y, weights,   | XLA, own       | before the call          | own blocks
//             values
//           atoms, entries| slots, each    | peers' blocks, [I1]      | own blocks, [I2]
//                         | rank, area(e)  |                          |
//           out,          | XLA, own       | own blocks               | later kernels
//             collected
//           rows          | shared memory  | warps, for a batch of    | all threads
//                         |                | units at a time          |
//           stages        | shared memory  | each thread, by cp.async | that thread
// Protocol: 1. Blocks sum this rank's rows of the peers' tokens, and send the sums to the token's rank as
//           atoms where there are any, values as entries, [I1].
//           2. The others sum the rows that this rank has of its own tokens,
//           3. and add to them the peers' sums as they come, [I2], ranks ascending; where these lie on
//           several nodes, nodes ascending, each sum of a node's ranks rounded.
//           Ranks of other nodes, if there are any, are sent sums and values in other ways, [U1], and
//           wait for them by [U2], and for the ranks by [T2]: cuda/network/slots.cuh.
// Reuse, Progress, Failure: cuda/sync/slots.cuh. A call that fails leaves NaN.
// Limits:   fits_slots (fits.h); rows at 16-byte addresses; compiled without -ftz, -fmad=false.
#ifndef JAX_EP_CUDA_SLOTS_COMBINE_CUH_
#define JAX_EP_CUDA_SLOTS_COMBINE_CUH_

#include <algorithm>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/slots/fits.h"
#include "cuda/slots/teams.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/slots.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::slots {
namespace {  // one source has each kernel, and compiles what it calls with it

constexpr int kRowsAtOnce = 4;  // of a sum, on their way
// Of shared memory: a thread's vectors of those rows.
constexpr int64_t kStageBytes = int64_t{kRowsAtOnce} * kVectorsEach * kNumThreads * 16;
constexpr int64_t kMaxBatchBytes = 64 * 1024;

// Of shared memory, for each unit of a batch: how many rows are to be summed, which, and their
// weights; and the peers that send a sum.
constexpr int64_t bytes_each(int64_t top_k) {
  return (1 + 2 * top_k) * int64_t{4} + int64_t{sizeof(Ranks)};
}

// What the host works out.
struct CombineSteps {
  Divider num_local_experts;
  int32_t batch_units;
};

// A block as one that sends, or as one that receives.
template <typename Vector, typename Far>
class Combiner : Far {
  static constexpr OpKind kKind = OpKind::kCombine;
  static constexpr int kCount = Vector::kCount;

 public:
  __device__ Combiner(const GroupView& g, const Far& far, const CombineArguments& a,
                      const Units& units, const CombineSteps& steps, char* memory, SlotAreas& areas,
                      bool sends, int32_t block, int32_t num_blocks)
      : Far(far),
        g_(g),
        a_(a),
        units_(units),
        steps_(steps),
        row_bytes_(a.num_channels * (16 / kCount)),
        team_(units),
        areas_(areas),
        sends_(sends),
        block_(block),
        num_blocks_(num_blocks),
        num_units_(num_steps((sends ? far.num_ranks(g) - 1 : 1) * units.count,
                             static_cast<uint32_t>(block), static_cast<uint32_t>(num_blocks))),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(a.top_k)),
        stage_(reinterpret_cast<uint4*>(memory) + threadIdx.x),
        count_(reinterpret_cast<int32_t*>(memory + kStageBytes)),
        row_(count_ + steps.batch_units),
        weight_(reinterpret_cast<float*>(row_ + steps.batch_units * top_k_)),
        peers_(reinterpret_cast<Ranks*>(weight_ + steps.batch_units * top_k_)) {}

  // What is to be added for the block's units of a batch, from its unit `first` on: by a warp for
  // each. From the last warp on: the first ones ask for the call's leave.
  __device__ void find_rows(int32_t first) {
#pragma unroll 1
    for (int32_t i = kNumWarps - 1 - warp_; i < batch_of(first); i += kNumWarps) {
      const Unit unit = unit_of(first + i);
      const int32_t token = token_of(units_, unit.number);
      const int32_t flat_token = unit.rank * static_cast<int32_t>(a_.num_tokens) + token;
      const bool is_own = !sends_ && lane_ < top_k_;
      const int32_t at = token * top_k_ + lane_;
      const bool is_kept = is_own && a_.send_row[at] != kNoRow;
      const int32_t id = is_own ? a_.topk_idx[at] : 0;
      const Run rows = rows_of(flat_token);
      const int32_t count = a_.expand ? rows.count : min(rows.count, 1);
      if (lane_ < count) {
        const int32_t row = a_.expand ? a_.recv_order[rows.begin + lane_] : flat_token;
        row_[i * top_k_ + lane_] = row;
        weight_[i * top_k_ + lane_] = a_.weights != nullptr ? a_.weights[row] : 1.0f;
      }
      if (lane_ == 0) count_[i] = count;
      if (sends_) continue;
      const Ranks peers = ranks_of_warp(is_kept ? steps_.num_local_experts.quotient(id) : -1);
      if (lane_ == 0) peers_[i] = peers;
    }
  }

  // The sums of all its units, with the rows of the first batch found. False if the group is broken;
  // not the same on all threads.
  __device__ bool run(SlotWait& wait) {
    bool ok = true;
    [[maybe_unused]] bool has_sent = true;  // to far ranks
#pragma unroll 1
    for (int32_t first = 0; first < num_units_; first += steps_.batch_units) {
      if (first > 0) {
        __syncthreads();
        find_rows(first);
        __syncthreads();
      }
#pragma unroll 1
      for (int32_t i = team_.is_none() ? INT32_MAX : team_.number(); i < batch_of(first) && ok;
           i += team_.count()) {
        if (sends_ && count_[i] == 0) continue;
        const Unit unit = unit_of(first + i);
        const Place place = team_.place(unit.number);
        Words word;
        sum_rows(place, i, word);
        if (sends_) {
          if constexpr (Far::kExists) {
            if (this->is_far(unit.rank)) {
              has_sent &= send_to_far_rank(unit, place, word);
              continue;
            }
          }
          const int peer = Far::index(unit.rank);
          send_words<PlainAtoms>(areas_.there[peer], slot_tag(areas_.epoch[peer]), place,
                                 units_.stride, word);
        } else if constexpr (Far::kExists) {
          ok = add_nodes(place, i, unit.number, word, wait);
        } else {
          ok = add_ranks(place, i, word, wait);
        }
      }
      if (a_.values != nullptr && ok) ok = move_values(*this, first, wait);
    }
    if (!sends_ && block_ == 0 && warp_ == kNumWarps - 1 && ok) {
      ok = receive_slot_flags(g_, kKind, areas_, wait);  // [W2]
      if constexpr (Far::kExists) {
        __syncwarp();
        ok &= this->await_told(0, 1);  // [T2]
      }
    }
    if constexpr (Far::kExists) ok &= has_sent;
    return ok;
  }

 private:
  __device__ const Far& far() const { return *this; }

  struct Unit {
    int rank;  // whose token it is of
    int32_t number;
  };
  // The block's i-th; of the peers, this rank's successor first.
  __device__ Unit unit_of(int32_t i) const {
    const Turn turn(units_.count, block_ + i * num_blocks_);
    return {sends_ ? successor(far(), g_, 1 + turn.rank_index) : Far::rank(g_), turn.unit};
  }
  __device__ int32_t batch_of(int32_t first) const {
    return min(steps_.batch_units, num_units_ - first);
  }

  // The expert rows that this rank has of a token, in recv_order.
  struct Run {
    int32_t begin, count;
  };
  __device__ Run rows_of(int32_t flat_token) const {
    const int32_t begin = a_.recv_offsets[flat_token];
    // No more than there is room for here, whatever the tables say; where they point to is trusted.
    return {begin, max(0, min(a_.recv_offsets[flat_token + 1] - begin, top_k_))};
  }

  // Of this rank's rows of the unit, rounded. Rows come by way of shared memory, so that there is one
  // copy of the code that adds.
  __device__ void sum_rows(const Place& place, int32_t i, Words& rounded) const {
    const int32_t count = count_[i];
    float sum[kVectorsEach][kCount] = {};
#pragma unroll 1
    for (int32_t begin = 0; begin < count; begin += kRowsAtOnce) {
      const int32_t size = min(kRowsAtOnce, count - begin);
#pragma unroll 1
      for (int32_t k = 0; k < size; ++k) {
        const auto* row =
            reinterpret_cast<const uint4*>(static_cast<const char*>(a_.y) +
                                           row_[i * top_k_ + begin + k] * row_bytes_) +
            place.first;
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          if (j < place.count) {
            copy_async_16(stage_ + (k * kVectorsEach + j) * kNumThreads, row + j * units_.stride);
          }
        }
      }
      wait_copies_async();
#pragma unroll 1
      for (int32_t k = 0; k < size; ++k) {
        const float weight = weight_[i * top_k_ + begin + k];
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          float x[kCount];
          Vector::load(stage_[(k * kVectorsEach + j) * kNumThreads], x);
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, x[c]));
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) set_vector(rounded, j, Vector::store(sum[j]));
  }

  // All ranks' sums of a unit, of which this one's are `own`. False if the group is broken.
  __device__ bool add_ranks(const Place& place, int32_t i, const Words& own, SlotWait& wait) const {
    const Ranks peers = peers_[i];
    const bool has_own = count_[i] != 0;
    float total[kVectorsEach][kCount] = {};
#pragma unroll 1
    for (int r = 0; r < g_.num_ranks; ++r) {
      Words word;
      if (r == g_.rank) {
        if (!has_own) continue;
#pragma unroll
        for (int w = 0; w < kMaxAtoms * 3; ++w) word[w] = own[w];
      } else {
        if (!peers.has(r)) continue;
        if (!receive_words<PlainAtoms>(wait, r, areas_.here[r], areas_.epoch[r], place,
                                       units_.stride, word)) {
          return false;
        }
      }
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[kCount];
        Vector::load(vector_of(word, j), x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) total[j][c] = __fadd_rn(total[j][c], x[c]);
      }
    }
    store(place, total);
    return true;
  }

  // Likewise of several nodes: each one's sum is rounded. The same on all lanes.
  __device__ bool add_nodes(const Place& place, int32_t i, int32_t unit, const Words& own,
                            SlotWait& wait) const {
    const Ranks peers = peers_[i];
    const bool has_own = count_[i] != 0;
    float total[kVectorsEach][kCount] = {};
#pragma unroll 1
    for (int first = 0; first < Far::num_ranks(g_); first += g_.num_ranks) {
      float of_node[kVectorsEach][kCount] = {};
#pragma unroll 1
      for (int r = first; r < first + g_.num_ranks; ++r) {
        Words word;
        if (r == Far::rank(g_)) {
          if (!has_own) continue;
#pragma unroll
          for (int w = 0; w < kMaxAtoms * 3; ++w) word[w] = own[w];
        } else if (!peers.has(r)) {
          continue;
        } else if (this->is_far(r)) {
          if (team_.size(unit) > 0 && !this->await_unit(r, unit)) return false;  // [U2]
          PlainAtoms::unpack(this->landed_unit(r, unit) + this->values_bytes(), team_.size(unit),
                             team_.thread(), place, units_.stride, word);
        } else {
          const int peer = Far::index(r);
          const bool ok = receive_words<PlainAtoms>(wait, peer, areas_.here[peer],
                                                    areas_.epoch[peer], place, units_.stride, word);
          if (__all_sync(0xffffffffu, ok) == 0) return false;
        }
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          float x[kCount];
          Vector::load(vector_of(word, j), x);
#pragma unroll
          for (int c = 0; c < kCount; ++c) of_node[j][c] = __fadd_rn(of_node[j][c], x[c]);
        }
      }
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[kCount];
        Vector::load(Vector::store(of_node[j]), x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) total[j][c] = __fadd_rn(total[j][c], x[c]);
      }
    }
    store(place, total);
    return true;
  }

  __device__ void store(const Place& place, const float (&total)[kVectorsEach][kCount]) const {
    auto* to = reinterpret_cast<uint4*>(static_cast<char*>(a_.out) + place.token * row_bytes_) +
               place.first;
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j < place.count) to[j * units_.stride] = Vector::store(total[j]);
    }
  }

  // A unit's sum, by its team, with the values of the token that begins with it. False if the group is
  // broken; not the same on all warps.
  __device__ bool send_to_far_rank(const Unit& unit, const Place& place, const Words& word) const {
    const int32_t size = team_.size(unit.number), values_bytes = this->values_bytes();
    if (size == 0) return true;
    char* const staged = this->staged_unit(unit.rank, unit.number);
    const bool has_values = a_.values != nullptr && begins_token(units_, unit.number);
    if (has_values && team_.warp() == 0) {
      stage_values(unit.rank, place.token, reinterpret_cast<float*>(staged));
    }
    PlainAtoms::pack(staged + values_bytes, size, team_.thread(), place, units_.stride, word);
    team_.meet();
    if (team_.warp() != 0) return true;
    const int32_t begin = has_values ? 0 : values_bytes;
    return this->put_unit(unit.rank, unit.number, staged, begin,
                          values_bytes - begin + PlainAtoms::packed_bytes(size));
  }

  // The values of the tokens that begin with a unit of the batch. What only some calls need is called.
  // (By a copy: so that this one need not lie in memory.) False if the group is broken.
  __device__ __noinline__ static bool move_values(Combiner block, int32_t first, SlotWait& wait) {
    bool ok = true;
    for (int32_t i = block.warp_; i < block.batch_of(first); i += kNumWarps) {
      const Unit unit = block.unit_of(first + i);
      if (!begins_token(block.units_, unit.number)) continue;
      const int32_t token = token_of(block.units_, unit.number);
      if (block.sends_) {
        if constexpr (Far::kExists) {
          if (block.is_far(unit.rank)) continue;  // they have gone with the unit
        }
        block.send_values(unit.rank, token);
      } else if constexpr (Far::kExists) {
        ok = ok && block.collect_from_nodes(token, wait);
      } else {
        ok = ok && block.collect(token, wait);
      }
    }
    return ok;
  }
  // Where this rank has a row of the peer's token.
  __device__ void send_values(int rank, int32_t token) const {
    const int32_t flat_token = rank * static_cast<int32_t>(a_.num_tokens) + token;
    const Run rows = rows_of(flat_token);
    if (lane_ >= rows.count) return;
    const int32_t row = a_.recv_order[rows.begin + lane_];
    const int32_t k = a_.recv_src[row] - flat_token * top_k_;
    send_entry(areas_, Far::index(rank), token * top_k_ + k, 0, a_.values[row]);  // [I1]
  }
  __device__ void stage_values(int rank, int32_t token, float* values) const {
    const int32_t flat_token = rank * static_cast<int32_t>(a_.num_tokens) + token;
    const Run rows = rows_of(flat_token);
    if (lane_ >= rows.count) return;
    const int32_t row = a_.recv_order[rows.begin + lane_];
    values[a_.recv_src[row] - flat_token * top_k_] = a_.values[row];
  }
  // As collect; the same on all lanes.
  __device__ bool collect_from_nodes(int32_t token, SlotWait& wait) const {
    const int32_t unit = token << units_.piece_shift;
    const int32_t at = token * top_k_ + lane_;
    const int32_t row = lane_ < top_k_ ? a_.send_row[at] : kNoRow;
    const int32_t rank = row != kNoRow ? steps_.num_local_experts.quotient(a_.topk_idx[at]) : -1;
    const Ranks ranks = ranks_of_warp(rank);
#pragma unroll 1
    for (int r = 0; r < Far::num_ranks(g_); ++r) {
      if (ranks.has(r) && this->is_far(r) && !this->await_unit(r, unit)) return false;  // [U2]
    }
    bool ok = true;
    float value = 0.0f;
    if (rank == Far::rank(g_)) {
      value = a_.values[row];
    } else if (rank >= 0 && this->is_far(rank)) {
      value = __ldcg(reinterpret_cast<const float*>(this->landed_unit(rank, unit)) + lane_);
    } else if (rank >= 0) {
      ok = receive_value(Far::index(rank), at, wait, value);
    }
    if (ok && lane_ < top_k_) a_.collected[at] = value;
    return __all_sync(0xffffffffu, ok) != 0;
  }
  __device__ bool collect(int32_t token, SlotWait& wait) const {
    if (lane_ >= top_k_) return true;
    const int32_t at = token * top_k_ + lane_, row = a_.send_row[at];
    float value = 0.0f;
    if (row != kNoRow) {
      const int32_t r = steps_.num_local_experts.quotient(a_.topk_idx[at]);
      if (r == g_.rank) {
        value = a_.values[row];
      } else if (!receive_value(r, at, wait, value)) {
        return false;
      }
    }
    a_.collected[at] = value;
    return true;
  }
  __device__ bool receive_value(int rank, int32_t at, SlotWait& wait, float& value) const {
    const uint64_t expected = areas_.epoch[rank];
    for (uint32_t n = 1;; ++n) {
      uint64_t entry, epoch;
      ld_relaxed_sys_b128(entries_of(areas_.here[rank]) + at, entry, epoch);
      value = __uint_as_float(static_cast<uint32_t>(entry >> 32));
      if (epoch == expected) return true;  // [I2]
      if (!wait.may_go_on(n, rank, expected)) return false;
    }
  }

  const GroupView& g_;
  const CombineArguments& a_;
  const Units& units_;
  const CombineSteps& steps_;
  const int64_t row_bytes_;
  const Team team_;
  SlotAreas& areas_;
  const bool sends_;
  const int32_t block_, num_blocks_;  // of those that do so
  const int32_t num_units_;           // of the block
  const int32_t warp_, lane_, top_k_;
  // In shared memory; the last ones of the units of a batch.
  uint4* const stage_;    // [kRowsAtOnce][kVectorsEach], kNumThreads apart
  int32_t* const count_;  // [unit]
  int32_t* const row_;    // [unit][K]
  float* const weight_;   // [unit][K]
  Ranks* const peers_;    // [unit], that have rows of this rank's token
};

template <typename Vector>
__device__ __noinline__ void fail_combine(const GroupView& g, const CombineArguments& a,
                                          Finish finish) {
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount), kNan, share);
  if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan, share);
}

template <typename Vector, typename Reach>
__global__ __launch_bounds__(kNumThreads, 1) void combine_in_slots_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ CombineArguments a,
    const __grid_constant__ Units units, const __grid_constant__ Blocks blocks,
    const __grid_constant__ CombineSteps steps, const __grid_constant__ Reach reach) {
  using Far = typename Reach::Far;
  constexpr OpKind kKind = OpKind::kCombine;
  extern __shared__ __align__(16) char sum_memory[];
  __shared__ SlotAreas areas;
  timeline::begin();
  const auto index = static_cast<int32_t>(blockIdx.x);
  bool sends = index < blocks.num_senders;
  const bool does_both = sends && index >= blocks.first_receiver;
  const bool is_claimed = claim_call(g, kKind);
  const bool may_send = begin_slots(g, kKind, is_claimed, areas);
  const Far far(g, reach, kKind);
  SlotWait wait(g, kKind);
  uint32_t swept = 0;
  bool ok = true;
  [[maybe_unused]] bool has_told = true;  // far ranks
#pragma unroll 1
  for (bool is_first = true;; is_first = sends = false) {
    Combiner<Vector, Far> block(g, far, a, units, steps, sum_memory, areas, sends,
                                sends ? index : index - blocks.first_receiver,
                                sends ? blocks.num_senders : blocks.count - blocks.first_receiver);
    block.find_rows(0);
    if (is_first) {
      ok = may_send_slots(g, may_send, areas);
      if (ok) swept = load_swept(g, areas);
      if constexpr (Far::kExists) {
        if (ok && index == 0) has_told = far.tell(0);  // [T1]
      }
      if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
    } else {
      __syncthreads();
    }
    if (ok) ok = block.run(wait);
    if constexpr (Far::kExists) ok = ok && has_told;
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, sends ? Event::kS1 : Event::kP2);
    if (!does_both || !sends) break;
    ok = __syncthreads_and(ok) != 0;
  }
  timeline::end(g, kKind);
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish != Finish::kEnd) {
    if constexpr (Far::kExists) far.tell_of_failure();
    return fail_combine<Vector>(g, a, finish);
  }
  if constexpr (Far::kExists) far.end();
  sweep_slots(g, areas, swept);
  end_call(g);
}

template <typename Vector, typename ReachOf>
cudaError_t LaunchCombineOf(const GroupView& group, const CombineArguments& a, int64_t num_ranks,
                            int num_sms, cudaStream_t stream, const ReachOf& reach_of) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const auto num_local = static_cast<int32_t>(a.num_local_experts);
  const SlotSizes sizes{num_ranks, a.num_tokens, a.top_k, num_local * num_ranks, {row_bytes}};
  if (!fits_slots(sizes, group.slot_area_bytes)) return cudaErrorInvalidValue;
  const Units units = DivideRows(a.num_tokens, row_bytes / kRowAlignment, num_sms, 1);
  const int64_t num_sent = (num_ranks - 1) * units.count;
  // Both halves of the work read rows and add: what is sent is summed first.
  const Blocks blocks = DivideBlocks(num_sent, units.count, num_sms, 2);
  const int64_t num_receivers = blocks.count - blocks.first_receiver;
  const int64_t most_units = std::max(
      blocks.num_senders > 0 ? (num_sent + blocks.num_senders - 1) / blocks.num_senders : 0,
      (units.count + num_receivers - 1) / num_receivers);
  const auto batch_units =
      static_cast<int32_t>(std::min(most_units, kMaxBatchBytes / bytes_each(a.top_k)));
  const auto reach = reach_of(units);
  combine_in_slots_kernel<Vector><<<static_cast<unsigned>(blocks.count), kNumThreads,
                                    kStageBytes + batch_units * bytes_each(a.top_k), stream>>>(
      group, a, units, blocks, CombineSteps{Divider(num_local), batch_units}, reach);
  return cudaGetLastError();
}

// `reach_of(units)`: how far ranks are reached, by a call that is divided like that.
template <typename ReachOf>
cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& a, int64_t num_ranks,
                          int num_sms, cudaStream_t stream, const ReachOf& reach_of) {
  switch (a.type) {
    case FloatType::kF32:
      return LaunchCombineOf<F32Vector>(group, a, num_ranks, num_sms, stream, reach_of);
    case FloatType::kF16:
      return LaunchCombineOf<F16Vector>(group, a, num_ranks, num_sms, stream, reach_of);
    case FloatType::kBF16:
      return LaunchCombineOf<Bf16Vector>(group, a, num_ranks, num_sms, stream, reach_of);
  }
  return cudaErrorInvalidValue;
}

template <typename Reach>
cudaError_t PrepareCombine() {
  for (auto* kernel :
       {combine_in_slots_kernel<F32Vector, Reach>, combine_in_slots_kernel<F16Vector, Reach>,
        combine_in_slots_kernel<Bf16Vector, Reach>}) {
    if (cudaError_t e = PrepareKernel(kernel, kStageBytes + kMaxBatchBytes); e != cudaSuccess) {
      return e;
    }
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_COMBINE_CUH_
