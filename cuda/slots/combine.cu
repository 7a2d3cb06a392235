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
//           3. and add to them the peers' sums as they come, [I2], ranks ascending.
// Reuse, Progress, Failure: cuda/sync/slots.cuh. A call that fails leaves NaN.
// Limits:   fits_slots (fits.h); rows at 16-byte addresses; compiled without -ftz, -fmad=false.
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

namespace jax_ep::gpu {
namespace {

using namespace slots;

constexpr OpKind kKind = OpKind::kCombine;
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
struct Steps {
  Divider num_local_experts;
  int32_t batch_units;
};

// A block as one that sends, or as one that receives.
template <typename Vector>
class Combiner {
  static constexpr int kCount = Vector::kCount;

 public:
  __device__ Combiner(const GroupView& g, const CombineArguments& a, const Units& units,
                      const Steps& steps, char* memory, SlotAreas& areas, bool sends, int32_t block,
                      int32_t num_blocks)
      : g_(g),
        a_(a),
        units_(units),
        steps_(steps),
        row_bytes_(a.num_channels * (16 / kCount)),
        team_(units),
        areas_(areas),
        sends_(sends),
        block_(block),
        num_blocks_(num_blocks),
        num_units_(num_steps((sends ? g.num_ranks - 1 : 1) * units.count,
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
          send_words<PlainAtoms>(areas_.there[unit.rank], slot_tag(areas_.epoch[unit.rank]), place,
                                 units_.stride, word);
        } else {
          ok = add_ranks(place, i, word, wait);
        }
      }
      if (a_.values != nullptr && ok) ok = move_values(*this, first, wait);
    }
    if (!sends_ && block_ == 0 && warp_ == kNumWarps - 1 && ok) {
      ok = receive_slot_flags(g_, kKind, areas_, wait);  // [W2]
    }
    return ok;
  }

 private:
  struct Unit {
    int rank;  // whose token it is of
    int32_t number;
  };
  // The block's i-th; of the peers, this rank's successor first.
  __device__ Unit unit_of(int32_t i) const {
    const Turn turn(units_.count, block_ + i * num_blocks_);
    return {sends_ ? successor(g_, 1 + turn.rank_index) : g_.rank, turn.unit};
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
    auto* to = reinterpret_cast<uint4*>(static_cast<char*>(a_.out) + place.token * row_bytes_) +
               place.first;
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j < place.count) to[j * units_.stride] = Vector::store(total[j]);
    }
    return true;
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
        block.send_values(unit.rank, token);
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
    send_entry(areas_, rank, token * top_k_ + k, 0, a_.values[row]);  // [I1]
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
  const Steps& steps_;
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
__device__ __noinline__ void fail(const GroupView& g, const CombineArguments& a, Finish finish) {
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount), kNan, share);
  if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan, share);
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads, 1) void combine_in_slots_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ CombineArguments a,
    const __grid_constant__ Units units, const __grid_constant__ Blocks blocks,
    const __grid_constant__ Steps steps) {
  extern __shared__ __align__(16) char memory[];
  __shared__ SlotAreas areas;
  timeline::begin();
  const auto index = static_cast<int32_t>(blockIdx.x);
  bool sends = index < blocks.num_senders;
  const bool does_both = sends && index >= blocks.first_receiver;
  const bool is_claimed = claim_call(g, kKind);
  const bool may_send = begin_slots(g, kKind, is_claimed, areas);
  SlotWait wait(g, kKind);
  uint32_t swept = 0;
  bool ok = true;
#pragma unroll 1
  for (bool is_first = true;; is_first = sends = false) {
    Combiner<Vector> block(g, a, units, steps, memory, areas, sends,
                           sends ? index : index - blocks.first_receiver,
                           sends ? blocks.num_senders : blocks.count - blocks.first_receiver);
    block.find_rows(0);
    if (is_first) {
      ok = may_send_slots(g, may_send, areas);
      if (ok) swept = load_swept(g, areas);
      if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
    } else {
      __syncthreads();
    }
    if (ok) ok = block.run(wait);
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, sends ? Event::kS1 : Event::kP2);
    if (!does_both || !sends) break;
    ok = __syncthreads_and(ok) != 0;
  }
  timeline::end(g, kKind);
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish != Finish::kEnd) return fail<Vector>(g, a, finish);
  sweep_slots(g, areas, swept);
  end_call(g);
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const auto num_local = static_cast<int32_t>(a.num_local_experts);
  const SlotSizes sizes{
      group.num_ranks, a.num_tokens, a.top_k, int64_t{num_local} * group.num_ranks, {row_bytes}};
  if (!fits_slots(sizes, group.slot_area_bytes)) return cudaErrorInvalidValue;
  const Units units = DivideRows(a.num_tokens, row_bytes / kRowAlignment, num_sms, 1);
  const int64_t num_sent = int64_t{group.num_ranks - 1} * units.count;
  // Both halves of the work read rows and add: what is sent is summed first.
  const Blocks blocks = DivideBlocks(num_sent, units.count, num_sms, 2);
  const int64_t num_receivers = blocks.count - blocks.first_receiver;
  const int64_t most_units = std::max(
      blocks.num_senders > 0 ? (num_sent + blocks.num_senders - 1) / blocks.num_senders : 0,
      (units.count + num_receivers - 1) / num_receivers);
  const auto batch_units =
      static_cast<int32_t>(std::min(most_units, kMaxBatchBytes / bytes_each(a.top_k)));
  combine_in_slots_kernel<Vector><<<static_cast<unsigned>(blocks.count), kNumThreads,
                                    kStageBytes + batch_units * bytes_each(a.top_k), stream>>>(
      group, a, units, blocks, Steps{Divider(num_local), batch_units});
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCombineInSlots(const GroupView& group, const CombineArguments& a, int num_sms,
                                 cudaStream_t stream) {
  switch (a.type) {
    case FloatType::kF32:
      return Launch<F32Vector>(group, a, num_sms, stream);
    case FloatType::kF16:
      return Launch<F16Vector>(group, a, num_sms, stream);
    case FloatType::kBF16:
      return Launch<Bf16Vector>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareCombineInSlots() {
  for (auto* kernel : {combine_in_slots_kernel<F32Vector>, combine_in_slots_kernel<F16Vector>,
                       combine_in_slots_kernel<Bf16Vector>}) {
    if (cudaError_t e = PrepareKernel(kernel, kStageBytes + kMaxBatchBytes); e != cudaSuccess) {
      return e;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
