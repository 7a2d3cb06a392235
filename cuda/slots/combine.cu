// combine in slots: each rank sums its rows of every peer's token into the slots of the token's rank,
//           which adds the sums.
// After:    out and collected as cuda/direct/combine leaves them, to the bit.
// Roles:    blocks of 16 warps with equal shares of units (units.h), all threads together in each
//           step; block b has the same units of all ranks.
// Buffers:  name         | lives on       | written by               | read by
//           y, weights,  | XLA, own       | before the call          | own blocks
//             values
//           rows, values | slots, each    | peers' blocks, till [R1] | own blocks, [R2]..end
//                        | rank, area(e)  |                          |
//           out,         | XLA, own       | own blocks               | later kernels
//             collected
//           sums         | shared memory  | warps, for a batch of    | all threads
//                        |                | units at a time          |
// Protocol: 1. A block sums its rows of the peers' tokens, its units of them, and stores the sums at
//           the token's rank where there are any, then a flag to all, [R1].
//           2. It sums the rows that this rank has of its own tokens.
//           3. [R2] All peers' sums of its units are here: it adds them up, ranks ascending.
// Reuse, Progress, Failure: cuda/sync/slots.cuh. A call that fails leaves NaN.
// Limits:   fits_slots (cuda/memory/slots.h); rows at 16-byte addresses; compiled without -ftz,
//           -fmad=false.
#include <algorithm>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/slots/block_units.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/slots.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {
namespace {

using namespace slots;

constexpr OpKind kKind = OpKind::kCombine;
constexpr int kRowsAtOnce = 4;  // of a sum, on their way
constexpr int kSumsAtOnce = 2;  // vectors of a thread, likewise
constexpr int64_t kMaxSharedBytes = 160 * 1024;

// Of shared memory, for each unit of a batch: of each rank, how many rows are to be summed, which,
// and their weights; and the peers that send a sum.
constexpr int64_t bytes_each(int64_t num_ranks, int64_t top_k) {
  return num_ranks * (1 + 2 * top_k) * int64_t{4} + int64_t{sizeof(Ranks)};
}
static_assert(bytes_each(kMaxPeers, kMaxTopK) <= kMaxSharedBytes);

template <typename Vector>
class Combiner {
  static constexpr int kCount = Vector::kCount;

 public:
  __device__ Combiner(const GroupView& g, const CombineArguments& a, const Units& units,
                      int32_t batch_units, char* memory, const SlotAreas& areas)
      : g_(g),
        a_(a),
        row_bytes_(a.num_channels * (16 / kCount)),
        units_(units, row_bytes_),
        areas_(areas),
        batch_units_(batch_units),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(a.top_k)),
        count_(reinterpret_cast<int32_t*>(memory)),
        row_(count_ + batch_units * g.num_ranks),
        weight_(reinterpret_cast<float*>(row_ + batch_units * g.num_ranks * top_k_)),
        peers_(reinterpret_cast<Ranks*>(weight_ + batch_units * g.num_ranks * top_k_)) {}

  // What is to be added for the units of a batch: by a warp for each of a unit and a rank.
  __device__ void find_rows(int32_t first) {
    const int32_t num_units = end_of(first) - first;
    const auto num_tokens = static_cast<int32_t>(a_.num_tokens);
    for (int32_t i = lookup_turn(); i < num_units * g_.num_ranks; i += kNumWarps) {
      const int32_t unit = i / g_.num_ranks, r = i - unit * g_.num_ranks;
      const int32_t token = units_.token_of(first + unit);
      const int32_t flat_token = r * num_tokens + token;
      const Run rows = rows_of(flat_token);
      const int32_t count = a_.expand ? rows.count : min(rows.count, 1);
      if (lane_ < count) {
        const int32_t row = a_.expand ? a_.recv_order[rows.begin + lane_] : flat_token;
        row_[i * top_k_ + lane_] = row;
        weight_[i * top_k_ + lane_] = a_.weights != nullptr ? a_.weights[row] : 1.0f;
      }
      if (lane_ == 0) count_[i] = count;
      if (r != g_.rank) continue;
      const int32_t at = token * top_k_ + lane_;
      const bool is_kept = lane_ < top_k_ && a_.send_row[at] != kNoRow;
      const int32_t num_local = static_cast<int32_t>(a_.num_local_experts);
      const Ranks peers = ranks_of_warp(is_kept ? a_.topk_idx[at] / num_local : -1);
      if (lane_ == 0) peers_[unit] = peers;
    }
  }

  __device__ void send() {
    if (g_.num_ranks == 1) return;
    for (int32_t first = 0; first < units_.count(); first += batch_units_) {
      if (first > 0) find_again(first);
      if (a_.values != nullptr) send_values(first);
      const int32_t end = end_of(first), num_steps = units_.num_steps_of(first, end);
      for (int i = 1; i < g_.num_ranks; ++i) {
        const int r = g_.rank + i < g_.num_ranks ? g_.rank + i : g_.rank + i - g_.num_ranks;
        for (int32_t step = 0; step < num_steps; step += kSumsAtOnce) {
          Place place[kSumsAtOnce];
          uint4 sum[kSumsAtOnce];
          find_places(step, num_steps, first, place);
          sum_rows(place, first, r, sum);
#pragma unroll
          for (int j = 0; j < kSumsAtOnce; ++j) {
            if (place[j].unit < 0 || count_[index(place[j].unit - first, r)] == 0) continue;
            *reinterpret_cast<uint4*>(areas_.there[r] + place_in_area(place[j])) = sum[j];
          }
        }
      }
    }
    send_slot_flags(g_, areas_);  // [R1]
  }

  // False if the group is broken; the same on all threads.
  __device__ bool add_up() {
    bool has_waited = false;
    for (int32_t first = 0; first < units_.count(); first += batch_units_) {
      if (batch_units_ < units_.count()) find_again(first);
      const int32_t end = end_of(first), num_steps = units_.num_steps_of(first, end);
      for (int32_t step = 0; step < num_steps; step += kSumsAtOnce) {
        Place place[kSumsAtOnce];
        uint4 own[kSumsAtOnce];
        find_places(step, num_steps, first, place);
        sum_rows(place, first, g_.rank, own);
        if (!has_waited) {
          if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kStore);
          if (!wait(first)) return false;
          if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kP2);
        }
        has_waited = true;
#pragma unroll
        for (int j = 0; j < kSumsAtOnce; ++j) {
          if (place[j].unit >= 0) add_ranks(place[j], first, own[j]);
        }
      }
      if (a_.values != nullptr) collect(first);
    }
    return true;
  }

 private:
  // The expert rows that this rank has of a token, in recv_order.
  struct Run {
    int32_t begin, count;
  };
  __device__ Run rows_of(int32_t flat_token) const {
    const int32_t begin = a_.recv_offsets[flat_token];
    // Within the table, whatever the layout says.
    return {begin, max(0, min(a_.recv_offsets[flat_token + 1] - begin, top_k_))};
  }

  __device__ int32_t end_of(int32_t first) const {
    return min(first + batch_units_, units_.count());
  }
  __device__ int32_t index(int32_t in_batch, int rank) const {
    return in_batch * g_.num_ranks + rank;
  }
  __device__ uint64_t place_in_area(const Place& place) const {
    return kSlotRowsOffset + place.token * row_bytes_ + place.offset;
  }
  __device__ void find_places(int32_t step, int32_t num_steps, int32_t first,
                              Place (&place)[kSumsAtOnce]) const {
#pragma unroll
    for (int j = 0; j < kSumsAtOnce; ++j) {
      place[j] = units_.place(step + j, first, step + j < num_steps ? end_of(first) : 0);
    }
  }

  __device__ void find_again(int32_t first) {
    __syncthreads();
    find_rows(first);
    __syncthreads();
  }

  // Of this rank's rows of rank `src`'s token at each place, rounded.
  __device__ void sum_rows(const Place (&place)[kSumsAtOnce], int32_t first, int src,
                           uint4 (&rounded)[kSumsAtOnce]) const {
    int32_t count[kSumsAtOnce], at[kSumsAtOnce], most = 0;
    float sum[kSumsAtOnce][kCount] = {};
#pragma unroll
    for (int j = 0; j < kSumsAtOnce; ++j) {
      const int32_t i = place[j].unit < 0 ? 0 : index(place[j].unit - first, src);
      count[j] = place[j].unit < 0 ? 0 : count_[i];
      at[j] = i * top_k_;
      most = max(most, count[j]);
    }
    for (int32_t begin = 0; begin < most; begin += kRowsAtOnce) {
      uint4 vector[kSumsAtOnce][kRowsAtOnce];
#pragma unroll
      for (int j = 0; j < kSumsAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (begin + i >= count[j]) continue;
          const int64_t row = row_[at[j] + begin + i];
          vector[j][i] = __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(a_.y) +
                                                               row * row_bytes_ + place[j].offset));
        }
      }
#pragma unroll
      for (int j = 0; j < kSumsAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (begin + i >= count[j]) continue;
          const float weight = weight_[at[j] + begin + i];
          float x[kCount];
          Vector::load(vector[j][i], x);
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, x[c]));
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSumsAtOnce; ++j) rounded[j] = Vector::store(sum[j]);
  }

  // Of one vector: `own` is this rank's sum.
  __device__ void add_ranks(const Place& place, int32_t first, uint4 own) const {
    const Ranks peers = peers_[place.unit - first];
    const bool has_own = count_[index(place.unit - first, g_.rank)] != 0;
    float total[kCount] = {};
    for (int begin = 0; begin < g_.num_ranks; begin += kRowsAtOnce) {
      uint4 vector[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int r = begin + i;
        if (r >= g_.num_ranks || r == g_.rank || !peers.has(r)) continue;
        vector[i] = __ldcg(reinterpret_cast<const uint4*>(areas_.here[r] + place_in_area(place)));
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int r = begin + i;
        if (r >= g_.num_ranks || !(r == g_.rank ? has_own : peers.has(r))) continue;
        float x[kCount];
        Vector::load(r == g_.rank ? own : vector[i], x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) total[c] = __fadd_rn(total[c], x[c]);
      }
    }
    *reinterpret_cast<uint4*>(static_cast<char*>(a_.out) + place.token * row_bytes_ +
                              place.offset) = Vector::store(total);
  }

  __device__ bool wait(int32_t first) const {
    return receive_slot_flags(g_, kKind, areas_, [&](int r) {  // [R2]
      bool is_any = false;
      for (int32_t unit = 0; r < g_.num_ranks && unit < end_of(first) - first; ++unit) {
        is_any |= peers_[unit].has(r);
      }
      return is_any;
    });
  }

  __device__ uint64_t values_offset(int32_t at) const {
    return slot_values_offset(a_.num_tokens, row_bytes_) + at * sizeof(float);
  }

  // Those of a peer's token, where its row has them.
  __device__ void send_values(int32_t first) const {
    const int32_t num_units = end_of(first) - first;
    const auto num_tokens = static_cast<int32_t>(a_.num_tokens);
    for (int32_t i = warp_; i < num_units * g_.num_ranks; i += kNumWarps) {
      const int32_t unit = i / g_.num_ranks, r = i - unit * g_.num_ranks;
      if (r == g_.rank || !units_.begins_token(first + unit)) continue;
      const Run rows = rows_of(r * num_tokens + units_.token_of(first + unit));
      if (lane_ >= rows.count) continue;
      const int32_t row = a_.recv_order[rows.begin + lane_];
      const int32_t at = a_.recv_src[row] - r * num_tokens * top_k_;
      *reinterpret_cast<float*>(areas_.there[r] + values_offset(at)) = a_.values[row];
    }
  }
  __device__ void collect(int32_t first) const {
    const auto num_local = static_cast<int32_t>(a_.num_local_experts);
    for (int32_t unit = first + warp_; unit < end_of(first); unit += kNumWarps) {
      if (!units_.begins_token(unit) || lane_ >= top_k_) continue;
      const int32_t at = units_.token_of(unit) * top_k_ + lane_, row = a_.send_row[at];
      float value = 0.0f;
      if (row != kNoRow) {
        const int32_t r = a_.topk_idx[at] / num_local;
        value = r == g_.rank
                    ? a_.values[row]
                    : __ldcg(reinterpret_cast<const float*>(areas_.here[r] + values_offset(at)));
      }
      a_.collected[at] = value;
    }
  }

  const GroupView& g_;
  const CombineArguments& a_;
  const int64_t row_bytes_;
  const BlockUnits units_;
  const SlotAreas& areas_;
  const int32_t batch_units_, warp_, lane_, top_k_;
  // In shared memory, of the units of a batch.
  int32_t* const count_;  // [unit][R]
  int32_t* const row_;    // [unit][R][K]
  float* const weight_;   // [unit][R][K]
  Ranks* const peers_;    // [unit], that have rows of this rank's token
};

template <typename Vector>
__global__ __launch_bounds__(kNumThreads, 1) void combine_in_slots_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ CombineArguments a,
    const __grid_constant__ Units units, int32_t batch_units) {
  extern __shared__ __align__(16) char memory[];
  __shared__ SlotAreas areas;
  timeline::begin();
  Combiner<Vector> block(g, a, units, batch_units, memory, areas);
  const bool is_claimed = claim_call(g, kKind);
  const bool may_send = begin_slots(g, kKind, is_claimed, areas);
  block.find_rows(0);
  bool ok = may_send_slots(g, may_send);
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
  if (ok) {
    block.send();
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
    ok = block.add_up();
  }
  timeline::end(g, kKind);
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount), kNan, share);
  if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan, share);
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const SlotSizes sizes{group.num_ranks, a.num_tokens, a.top_k,
                        a.num_local_experts * group.num_ranks, row_bytes};
  if (!fits_slots(sizes, group.slot_area_bytes)) return cudaErrorInvalidValue;
  const Units units = DivideRows(a.num_tokens, row_bytes, num_sms);
  const int64_t each = bytes_each(group.num_ranks, a.top_k);
  const int64_t units_each = (units.count + units.num_blocks - 1) / units.num_blocks;
  const auto batch_units = static_cast<int32_t>(std::min(units_each, kMaxSharedBytes / each));
  combine_in_slots_kernel<Vector>
      <<<static_cast<unsigned>(units.num_blocks), kNumThreads, batch_units * each, stream>>>(
          group, a, units, batch_units);
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
    if (cudaError_t e = PrepareKernel(kernel, kMaxSharedBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
