// layout_and_dispatch: ids and rows cross in one hop, into the peers' slots; each rank computes its
// tables, and copies the rows to where they belong.
// After:    the tables, counts and counters of cuda/direct/layout.cu, and the tokens and weights of
//           cuda/direct/dispatch, to the bit: tokens[row] = x of rank src [t] for every kept row,
//           (src, t, k) = recv_src[row]; padding is zero, the tail too if zero_tail. Without
//           `expand`, likewise, tokens as cuda/direct/dispatch leaves them then.
// Roles:    blocks of 16 warps with equal shares of units (units.h), all threads together in each
//           step; block b has the same units of all ranks. Each block has all ids, and computes all
//           of the tables for itself; what it writes of them is its share.
// Buffers:  name         | lives on       | written by               | read by
//           x, topk_*    | XLA, own       | before the call          | own blocks
//           entries, rows| slots, each    | peers' blocks, [I1], till| own blocks, [I2], [R2]..end
//                        | rank, area(e)  | [R1]                     |
//           tables,      | XLA, own       | own blocks               | later kernels
//             tokens, weights
// Protocol: 1. A block sends its tokens' ids and weights as entries to all peers, [I1], then its units'
//           rows to the peers with an expert of the token, then a flag to all, [R1].
//           2. [I2] It takes all ranks' ids as they come, and computes the tables.
//           3. It copies this rank's rows of its units, and zeros what holds no row.
//           4. [R2] All peers' rows of its units are here: it copies them.
// Reuse, Progress, Failure: cuda/sync/slots.cuh. A call that fails leaves -1 and 0 in the tables, NaN
//           in float tokens and in weights, 0 in integers.
// Limits:   fits_slots (cuda/memory/slots.h); rows at 16-byte addresses.
#include "cuda/direct/kernels.cuh"
#include "cuda/slots/block_units.cuh"
#include "cuda/slots/tables.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/slots.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {
namespace {

using namespace slots;

constexpr OpKind kKind = OpKind::kLayoutAndDispatch;

struct Shared {
  SlotAreas areas;
  TablesShared tables;
};

// Of tokens that are not expanded: copies the block's units of rank `src`, whose rows lie at `rows`,
// and zeros them where none is here. `rows_here`: of each of its ids, BlockTables' row. Called and not
// inlined, for the code of other calls to stay small.
__device__ __noinline__ void copy_not_expanded(const LayoutAndDispatchArguments& a,
                                               BlockUnits units, const char* rows,
                                               const int32_t* rows_here, int src) {
  const auto top_k = static_cast<int32_t>(a.top_k);
  const int32_t num_steps = units.num_steps_of(0, units.count());
  for (int32_t step = 0; step < num_steps; step += kAtOnce) {
    Place place[kAtOnce];
    uint4 vector[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      place[j] = units.place(step + j, 0, step + j < num_steps ? units.count() : 0);
      if (place[j].unit < 0) continue;
      vector[j] = __ldcg(
          reinterpret_cast<const uint4*>(rows + place[j].token * a.row_bytes + place[j].offset));
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (place[j].unit < 0) continue;
      bool is_here = false;
      for (int32_t k = 0; k < top_k; ++k) {
        is_here |= rows_here[place[j].token * top_k + k] != kNoRow;
      }
      if (!is_here && !a.zero_tail) continue;
      const int64_t row = src * a.num_tokens + place[j].token;
      *reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + row * a.row_bytes +
                                place[j].offset) = is_here ? vector[j] : uint4{0, 0, 0, 0};
    }
  }
}

// What a block does, in this order.
class Dispatcher {
 public:
  __device__ Dispatcher(const GroupView& g, const LayoutAndDispatchArguments& a, const Units& units,
                        Shared& shared, BlockTables& tables, Ranks* ranks)
      : g_(g),
        a_(a),
        units_(units, a.row_bytes),
        areas_(shared.areas),
        tables_(tables),
        ranks_(ranks),
        num_steps_(units_.num_steps_of(0, units_.count())),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(a.top_k)) {}

  // Begins to load the first rows and ids.
  __device__ void load_first() {
    find_places(0);
    load_x();
    first_id_ = id_of(lookup_turn());
  }

  // Which peers want which unit.
  __device__ void find_ranks() {
    const auto num_local = static_cast<int32_t>(a_.num_experts) / g_.num_ranks;
    for (int32_t unit = lookup_turn(); unit < units_.count(); unit += kNumWarps) {
      const int32_t id = unit == lookup_turn() ? first_id_ : id_of(unit);
      const bool routed = is_routed(id, a_.num_experts);
      const Ranks ranks = ranks_of_warp(routed ? id / num_local : -1);
      if (lane_ == 0) ranks_[unit] = ranks;
    }
  }

  __device__ void send() {
    if (g_.num_ranks == 1) return;
    send_entries();
    for (int32_t step = 0; step < num_steps_; step += kAtOnce) {
      if (step > 0) {
        find_places(step);
        load_x();
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const Place& place = place_[j];
        if (place.unit < 0) continue;
        const Ranks ranks = ranks_[place.unit];
        const uint64_t at = kSlotRowsOffset + place.token * a_.row_bytes + place.offset;
        for (int i = 1; i < g_.num_ranks; ++i) {
          const int r = g_.rank + i < g_.num_ranks ? g_.rank + i : g_.rank + i - g_.num_ranks;
          if (ranks.has(r)) *reinterpret_cast<uint4*>(areas_.there[r] + at) = x_[j];
        }
      }
    }
    send_slot_flags(g_, areas_);  // [R1]
  }

  // Copies the rows that one rank has sent, or this one's own.
  __device__ void copy_rows_of(int src) {
    const char* rows =
        src == g_.rank ? static_cast<const char*>(a_.x) : areas_.here[src] + kSlotRowsOffset;
    const int32_t first_flat = src * static_cast<int32_t>(a_.num_tokens) * top_k_;
    if (!a_.expand) return copy_not_expanded(a_, units_, rows, tables_.rows(first_flat), src);
    for (int32_t step = 0; step < num_steps_; step += kAtOnce) {
      uint4 vector[kAtOnce];
      find_places(step);
      // A row that has not been sent is read all the same, and stored nowhere.
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (place_[j].unit >= 0) {
          vector[j] = __ldcg(reinterpret_cast<const uint4*>(rows + place_[j].token * a_.row_bytes +
                                                            place_[j].offset));
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (place_[j].unit < 0) continue;
        const int32_t flat = first_flat + place_[j].token * top_k_;
        char* to = static_cast<char*>(a_.tokens) + place_[j].offset;
        for (int32_t k = 0; k < top_k_; ++k) {
          const int32_t row = tables_.row(flat + k);
          if (row != kNoRow) *reinterpret_cast<uint4*>(to + row * a_.row_bytes) = vector[j];
        }
      }
    }
  }
  // Of the peers, this rank's successor first: each link has its turn.
  __device__ void copy_rows_of_peers() {
    for (int i = 1; i < g_.num_ranks; ++i) {
      copy_rows_of(g_.rank + i < g_.num_ranks ? g_.rank + i : g_.rank + i - g_.num_ranks);
    }
  }

  // Whether a peer has sent rows for the block's units.
  __device__ bool has_rows_of(int src) const {
    for (int32_t unit = 0; unit < units_.count(); ++unit) {
      if (is_any_here((src * static_cast<int32_t>(a_.num_tokens) + units_.token_of(unit)) *
                      top_k_)) {
        return true;
      }
    }
    return false;
  }

  __device__ void zero_rest() const {
    tables_.for_each_empty_row(a_.zero_tail, [&](int32_t row) {
      if (a_.expand) zero_row(row);
      if (lane_ == 0 && a_.weights != nullptr) a_.weights[row] = 0.0f;
    });
    const bool has_last_row = !a_.expand && blockIdx.x == gridDim.x - 1;
    if (has_last_row && warp_ == 0) zero_row(a_.num_rows - 1);
  }

 private:
  // The lane's, of the unit's token.
  __device__ int32_t id_of(int32_t unit) const {
    if (unit >= units_.count() || lane_ >= top_k_) return kNotRouted;
    return a_.topk_idx[units_.token_of(unit) * top_k_ + lane_];
  }

  // Which vectors the thread has from a step on. Most calls have few steps, so this is done once.
  __device__ void find_places(int32_t step) {
    if (step == places_step_) return;
    places_step_ = step;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      place_[j] = units_.place(step + j, 0, step + j < num_steps_ ? units_.count() : 0);
    }
  }

  __device__ void load_x() {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (place_[j].unit < 0) continue;
      x_[j] = *reinterpret_cast<const uint4*>(static_cast<const char*>(a_.x) +
                                              place_[j].token * a_.row_bytes + place_[j].offset);
    }
  }

  __device__ void send_entries() const {
    for (int32_t unit = warp_; unit < units_.count(); unit += kNumWarps) {
      if (!units_.begins_token(unit) || lane_ >= top_k_) continue;
      const int32_t i = units_.token_of(unit) * top_k_ + lane_;
      const int32_t id = a_.topk_idx[i];
      const float weight = a_.weights != nullptr ? a_.topk_weights[i] : 0.0f;
      for (int r = 0; r < g_.num_ranks; ++r) {
        if (r != g_.rank) send_entry(areas_, r, i, id, weight);  // [I1]
      }
    }
  }

  // By a warp.
  __device__ void zero_row(int64_t row) const {
    auto* at = reinterpret_cast<uint4*>(static_cast<char*>(a_.tokens) + row * a_.row_bytes);
    for (int64_t i = lane_; i < a_.row_bytes / 16; i += 32) at[i] = uint4{0, 0, 0, 0};
  }

  __device__ bool is_any_here(int32_t flat) const {
    bool is_any = false;
    for (int32_t k = 0; k < top_k_; ++k) is_any |= tables_.row(flat + k) != kNoRow;
    return is_any;
  }

  const GroupView& g_;
  const LayoutAndDispatchArguments& a_;
  const BlockUnits units_;
  const SlotAreas& areas_;
  BlockTables& tables_;
  Ranks* const ranks_;  // of each unit, in shared memory: those that have an expert of the token
  const int32_t num_steps_, warp_, lane_, top_k_;
  int32_t first_id_;  // of the warp's first unit
  int32_t places_step_ = -1;
  Place place_[kAtOnce];  // from that step on
  uint4 x_[kAtOnce];      // likewise
};

__global__ __launch_bounds__(kNumThreads, 1) void layout_and_dispatch_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ LayoutAndDispatchArguments a,
    const __grid_constant__ Units units, int32_t tables_bytes) {
  extern __shared__ int32_t memory[];
  __shared__ Shared shared;
  timeline::begin();
  BlockTables tables(g, a, shared.areas, memory, shared.tables);
  Dispatcher block(g, a, units, shared, tables,
                   reinterpret_cast<Ranks*>(memory + tables_bytes / 4));
  block.load_first();
  const bool is_claimed = claim_call(g, kKind);
  const bool may_send = begin_slots(g, kKind, is_claimed, shared.areas);
  block.find_ranks();
  tables.clear();
  bool ok = may_send_slots(g, may_send);
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
  if (ok) {
    block.send();
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
    ok = tables.make();  // [I2]
  }
  if (ok) {
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
    tables.fill_rest();
    block.copy_rows_of(g.rank);
    block.zero_rest();
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kStore);
    ok = receive_slot_flags(g, kKind, shared.areas,
                            [&](int src) { return src < g.num_ranks && block.has_rows_of(src); });
  }
  if (ok) {
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kP2);
    block.copy_rows_of_peers();
  }
  timeline::end(g, kKind);
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill_without_rows(a, g.num_ranks, share);
  fill(a.tokens, a.num_rows * a.row_bytes, a.is_integer ? 0 : kNan, share);
  if (a.weights != nullptr) fill(a.weights, a.room.capacity * 4, kNan, share);
}

constexpr int64_t kMaxSharedBytes =
    tables_bytes(kMaxSlotGroupIds, kMaxExperts) + kMaxSlotTokens * int64_t{sizeof(Ranks)};

}  // namespace

cudaError_t LaunchLayoutAndDispatchInSlots(const GroupView& group,
                                           const LayoutAndDispatchArguments& a, int num_sms,
                                           cudaStream_t stream) {
  const SlotSizes sizes{group.num_ranks, a.num_tokens, a.top_k, a.num_experts, a.row_bytes};
  if (!fits_slots(sizes, group.slot_area_bytes)) return cudaErrorInvalidValue;
  const Units units = DivideRows(a.num_tokens, a.row_bytes, num_sms);
  const int64_t for_tables = tables_bytes(group.num_ranks * a.num_tokens * a.top_k, a.num_experts);
  const int64_t units_each = (units.count + units.num_blocks - 1) / units.num_blocks;
  const int64_t bytes = for_tables + units_each * int64_t{sizeof(Ranks)};
  layout_and_dispatch_kernel<<<static_cast<unsigned>(units.num_blocks), kNumThreads, bytes,
                               stream>>>(group, a, units, static_cast<int32_t>(for_tables));
  return cudaGetLastError();
}

cudaError_t PrepareLayoutAndDispatchInSlots() {
  return PrepareKernel(layout_and_dispatch_kernel, kMaxSharedBytes);
}

}  // namespace jax_ep::gpu
