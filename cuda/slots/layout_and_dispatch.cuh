// layout_and_dispatch: ids and rows cross in one hop, into the peers' slots; each rank computes its
// tables, and copies the rows to where they belong.
// After:    the tables, counts and counters of cuda/direct/layout.cu, and the tokens and weights of
//           cuda/direct/dispatch, to the bit: tokens[row] = x of rank src [t] for every kept row,
//           (src, t, k) = recv_src[row]; padding is zero, the tail too if zero_tail. Without
//           `expand`, in float8 or with scales, likewise, tokens and scales as cuda/direct/dispatch
//           leaves them then.
// Roles:    blocks of 16 warps, of which the first ones send and the others receive, and in them teams
//           of warps that have a unit each at a time (units.h). Each block that receives has all ids,
//           and computes all of the tables for itself; what it writes of them is its share.
// Buffers:  name          | lives on       | written by               | read by
//           x, topk_*     | XLA, own       | before the call          | own blocks
//           entries, atoms| slots, each    | peers' blocks, [I1]      | own blocks, [I2]
//                         | rank, area(e)  |                          |
//           tables,       | XLA, own       | own blocks               | later kernels
//             tokens, weights
// Protocol: 1. Blocks send the tokens' ids and weights to all peers as entries, then the units of rows
//           to the peers with an expert of the token as atoms, [I1].
//           2. The others take all ranks' ids as they come, [I2], and compute the tables.
//           3. They copy this rank's rows, and zero what holds no row.
//           4. They copy the peers' rows as they come, [I2].
//           Ranks of other nodes, if there are any, are sent the same in other ways, [T1] and [U1],
//           and wait for it by [T2] and [U2]: cuda/network/slots.cuh.
// Reuse, Progress, Failure: cuda/sync/slots.cuh. A call that fails leaves -1 and 0 in the tables, NaN
//           in float tokens and in weights, 0 in integers.
// Limits:   fits_slots (fits.h); rows at 16-byte addresses.
#ifndef JAX_EP_CUDA_SLOTS_LAYOUT_AND_DISPATCH_CUH_
#define JAX_EP_CUDA_SLOTS_LAYOUT_AND_DISPATCH_CUH_

#include "cuda/direct/kernels.cuh"
#include "cuda/slots/fits.h"
#include "cuda/slots/row_forms.cuh"
#include "cuda/slots/tables.cuh"
#include "cuda/slots/teams.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/slots.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::slots {
namespace {  // one source has each kernel, and compiles what it calls with it

struct DispatchShared {
  SlotAreas areas;
  TablesShared tables;
};

template <typename Rows, typename Far>
class Dispatcher : Far {
  using Tables = BlockTables<Far>;

 public:
  __device__ Dispatcher(const GroupView& g, const Far& far, const LayoutAndDispatchArguments& a,
                        const Units& units, const TableSteps& steps, SlotAreas& areas)
      : Far(far),
        g_(g),
        a_(a),
        units_(units),
        steps_(steps),
        areas_(areas),
        team_(units),
        rows_(a, units.stride),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(a.top_k)) {}

  // Begins to load what is needed first, by a block that sends or receives: blocks take a unit for
  // each of their teams in turn.
  __device__ void load_first(int32_t block, int32_t num_blocks, bool sends) {
    if (sends) load_entry(block * steps_.ids_per_sender + static_cast<int32_t>(threadIdx.x));
    const int32_t unit = first_of(block, num_blocks);
    if (!team_.is_none() && unit < units_.count) load(unit);
  }

  // To the peers. The ids go first: all of a peer's blocks wait for all of them. False if the group is
  // broken; not the same on all threads.
  __device__ bool send(int32_t block, int32_t num_blocks) {
    bool ok = true;
    if constexpr (Far::kExists) ok = block != 0 || tell_far_ranks();
    send_entries(block * steps_.ids_per_sender);
    if (team_.is_none()) return ok;
    const int32_t step = num_blocks * team_.count();
#pragma unroll 1
    for (int32_t unit = first_of(block, num_blocks); unit < units_.count; unit += step) {
      if (unit != loaded_) load(unit);
      const Ranks ranks = ranks_of_warp(
          is_routed(id_, a_.num_experts) ? steps_.experts_per_rank.quotient(id_) : -1);
      if constexpr (Far::kExists) ok &= send_to_far_ranks(unit, ranks);
#pragma unroll 1
      for (int n = 1; n < g_.num_ranks; ++n) {
        const int i = successor(g_, n);
        if (!ranks.has(i + Far::rank(g_) - g_.rank)) continue;
        send_words<Rows>(areas_.there[i], slot_tag(areas_.epoch[i]), place_, units_.stride, word_);
      }
    }
    return ok;
  }

  // This rank's own rows, then the peers' as they come. False if the group is broken; the same on all
  // lanes.
  __device__ bool receive(int32_t block, int32_t num_blocks, const Tables& tables, SlotWait& wait) {
    if (team_.is_none()) return fill_rest(block, num_blocks, tables);
    const int32_t step = num_blocks * team_.count();
    Turn turn(units_.count, first_of(block, num_blocks));
#pragma unroll 1
    for (bool has_own = false, has_filled = false;; turn.next(step)) {
      const bool is_end = turn.rank_index >= Far::num_ranks(g_);
      // While the peers' rows are on their way; or else after them.
      if ((is_end || (has_own && turn.rank_index > 0)) && !has_filled) {
        has_filled = fill_rest(block, num_blocks, tables);
      }
      if (is_end) return true;
      has_own |= turn.rank_index == 0;
      const int r = successor(far(), g_, turn.rank_index);
      const int32_t flat =
          (r * static_cast<int32_t>(a_.num_tokens) + token_of(units_, turn.unit)) * top_k_ + lane_;
      const int32_t row = lane_ < top_k_ ? tables.row(flat) : kNoRow;  // lane k's
      const bool is_kept = row != kNoRow && !(Far::kExists && row == kDroppedRow);
      const uint32_t kept = __ballot_sync(0xffffffffu, is_kept);
      if constexpr (Far::kExists) {
        const bool is_wanted = __any_sync(0xffffffffu, Far::is_far(r) && row != kNoRow) != 0;
        const bool comes = is_wanted && team_.size(turn.unit) > 0;
        if (comes && !this->await_unit(r, turn.unit)) return false;  // [U2]
      }
      if (kept == 0 && (a_.expand || !a_.zero_tail)) continue;
      if (Far::is_far(r)) {
        if constexpr (Far::kExists) {
          place_ = team_.place(turn.unit);
          if (kept != 0) {
            Rows::unpack(this->landed_unit(r, turn.unit), team_.size(turn.unit), team_.thread(),
                         place_, units_.stride, word_);
          }
        }
      } else if (r != Far::rank(g_)) {
        const int i = Far::index(r);
        place_ = team_.place(turn.unit);
        const bool ok = kept == 0 || receive_words<Rows>(wait, i, areas_.here[i], areas_.epoch[i],
                                                         place_, units_.stride, word_);
        if (__all_sync(0xffffffffu, ok) == 0) return false;
      } else if (turn.unit != loaded_) {
        load(turn.unit);
      }
      loaded_ = -1;
      rows_.decode(place_, word_);
      store(r, row, kept);
    }
  }

 private:
  __device__ int32_t first_of(int32_t block, int32_t num_blocks) const {
    return block + num_blocks * team_.number();
  }

  __device__ void load(int32_t unit) {
    loaded_ = unit;
    place_ = team_.place(unit);
    rows_.load(place_, word_);
    id_ = lane_ < top_k_ ? a_.topk_idx[place_.token * top_k_ + lane_] : kNotRouted;
  }

  // Each block that sends has a run of the ids.
  __device__ int32_t num_entries() const { return static_cast<int32_t>(a_.num_tokens) * top_k_; }
  __device__ void load_entry(int32_t i) {
    if (i >= num_entries()) return;
    entry_id_ = a_.topk_idx[i];
    entry_weight_ = a_.weights != nullptr ? a_.topk_weights[i] : 0.0f;
  }
  __device__ void send_entries(int32_t begin) {
    const int32_t end = min(begin + steps_.ids_per_sender, num_entries());
    const int32_t first = begin + static_cast<int32_t>(threadIdx.x);
#pragma unroll 1
    for (int32_t i = first; i < end; i += kNumThreads) {
      if (i != first) load_entry(i);
#pragma unroll 1
      for (int r = 0; r < g_.num_ranks; ++r) {
        if (r != g_.rank) send_entry(areas_, r, i, entry_id_, entry_weight_);  // [I1]
      }
    }
  }

  __device__ const Far& far() const { return *this; }

  // All ids, by the threads of one block. False if the group is broken.
  __device__ bool tell_far_ranks() const {
    auto* const told = this->told_entries();
#pragma unroll 1
    for (auto i = static_cast<int32_t>(threadIdx.x); i < num_entries(); i += kNumThreads) {
      told[i] = {a_.topk_idx[i], a_.weights != nullptr ? a_.topk_weights[i] : 0.0f};
    }
    return this->tell(num_entries());  // [T1]
  }
  // A unit that is loaded, by its team: it is packed once, and each warp puts it to some of the ranks.
  // Likewise.
  __device__ bool send_to_far_ranks(int32_t unit, const Ranks& ranks) const {
    const int32_t num_ranks = Far::num_ranks(g_);
    const auto goes_to = [&](int r) { return ranks.has(r) && this->is_far(r); };
    bool is_wanted = false;
#pragma unroll 1
    for (int n = 1; n < num_ranks && !is_wanted; ++n) {
      is_wanted = goes_to(successor(far(), g_, n));
    }
    const int32_t size = team_.size(unit);
    if (!is_wanted || size == 0) return true;
    char* const staged = this->staged_unit(unit);
    Rows::pack(staged, size, team_.thread(), place_, units_.stride, word_);
    team_.meet();
    bool ok = true;
    int32_t turn = 0;  // of the team's warps
#pragma unroll 1
    for (int n = 1; n < num_ranks; ++n) {
      const int r = successor(far(), g_, n);
      if (!goes_to(r)) continue;
      if (turn == team_.warp()) ok &= this->put_unit(r, unit, staged, 0, Rows::packed_bytes(size));
      if (++turn == team_.num_warps()) turn = 0;
    }
    return ok;
  }

  // A unit of rank `src`, to the rows of the lanes in `kept`.
  __device__ void store(int src, int32_t row, uint32_t kept) {
    if (!a_.expand) {
      if (kept == 0) {
#pragma unroll
        for (uint32_t& word : word_) word = 0;
      }
      return rows_.store(src * a_.num_tokens + place_.token, place_, word_);
    }
#pragma unroll 1
    for (; kept != 0; kept &= kept - 1) {
      rows_.store(__shfl_sync(0xffffffffu, row, __ffs(static_cast<int>(kept)) - 1), place_, word_);
    }
  }

  // What holds no row: the block's share. By each warp, once; true.
  __device__ bool fill_rest(int32_t block, int32_t num_blocks, const Tables& tables) const {
    tables.fill_rest();
    // The warps of all blocks share the rows, neighbours among different blocks.
    const int32_t warp = block + static_cast<int32_t>(threadIdx.x) / 32 * num_blocks;
    const int32_t num_warps = num_blocks * kNumWarps;
    if (tables.has_padding()) zero_padding(a_, tables, rows_, warp, num_warps);
    if (!a_.expand && warp == 0) rows_.zero(a_.num_rows - 1);
    if (!a_.zero_tail) return true;
    const auto capacity = static_cast<int32_t>(a_.room.capacity);
#pragma unroll 1
    for (int32_t i = tables.num_used() + warp; i < capacity; i += num_warps) zero_row(a_, rows_, i);
    return true;
  }
  __device__ static void zero_row(const LayoutAndDispatchArguments& a, const Rows& rows,
                                  int32_t row) {
    if (a.expand) rows.zero(row);
    if (threadIdx.x % 32 == 0 && a.weights != nullptr) a.weights[row] = 0.0f;
  }
  // Of this rank's experts, and its sources. Only some calls need it, so it is called. (By copies: so
  // that the tables need not lie in memory.)
  __device__ __noinline__ static void zero_padding(const LayoutAndDispatchArguments& a,
                                                   Tables tables, Rows rows, int32_t warp,
                                                   int32_t num_warps) {
    // Few experts can have much: then several warps share that of one.
    const int32_t num_local = tables.num_local(), parts = max(1, num_warps / num_local);
    for (int32_t i = warp; i < num_local * parts; i += num_warps) {
      const int32_t part = i / num_local;
      const typename Tables::Padding padding =
          tables.padding_of(tables.first_local() + i - part * num_local);
      for (int32_t row = padding.begin + part; row < padding.end; row += parts) {
        zero_row(a, rows, row);
        if (threadIdx.x % 32 == 0) a.recv_src[row] = kNoSource;
      }
    }
  }

  const GroupView& g_;
  const LayoutAndDispatchArguments& a_;
  const Units& units_;
  const TableSteps& steps_;
  SlotAreas& areas_;
  const Team team_;
  const Rows rows_;
  const int32_t lane_, top_k_;
  int32_t loaded_ = -1;  // the unit of this rank's x that place_ and word_ have
  Place place_;
  Words word_;
  int32_t id_;        // lane k's, of that unit's token
  int32_t entry_id_;  // of the thread's newest entry
  float entry_weight_;
};

__device__ __noinline__ void fail_dispatch(const GroupView& g, const LayoutAndDispatchArguments& a,
                                           int num_ranks, Finish finish) {
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill_without_rows(a, num_ranks, share);
  const bool is_wide = a.mode == DispatchMode::kCopy || a.mode == DispatchMode::kDequantize;
  fill(a.tokens, a.num_rows * (is_wide ? a.row_bytes : a.num_channels), a.is_integer ? 0 : kNan,
       share);
  if (a.scales != nullptr) fill(a.scales, a.num_rows * a.num_scales * 4, kNan, share);
  if (a.weights != nullptr) fill(a.weights, a.room.capacity * 4, kNan, share);
}

template <typename Rows, typename Reach>
__global__ __launch_bounds__(kNumThreads, 1) void layout_and_dispatch_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ LayoutAndDispatchArguments a,
    const __grid_constant__ Units units, const __grid_constant__ Blocks blocks,
    const __grid_constant__ TableSteps steps, const __grid_constant__ Reach reach) {
  using Far = typename Reach::Far;
  constexpr OpKind kKind = OpKind::kLayoutAndDispatch;
  extern __shared__ int32_t table_memory[];
  __shared__ DispatchShared shared;
  timeline::begin();
  const auto index = static_cast<int32_t>(blockIdx.x);
  const bool sends = index < blocks.num_senders, receives = index >= blocks.first_receiver;
  const int32_t receiver = index - blocks.first_receiver;
  const int32_t num_receivers = blocks.count - blocks.first_receiver;
  const Far far(g, reach, kKind);
  BlockTables<Far> tables(g, far, a, steps, shared.areas, table_memory, shared.tables, receiver,
                          num_receivers);
  Dispatcher<Rows, Far> block(g, far, a, units, steps, shared.areas);
  block.load_first(sends ? index : receiver, sends ? blocks.num_senders : num_receivers, sends);
  const bool is_claimed = claim_call(g, kKind);
  const bool may_send = begin_slots(g, kKind, is_claimed, shared.areas);
  if (receives) tables.clear();
  SlotWait wait(g, kKind);
  bool ok = may_send_slots(g, may_send, shared.areas);
  const uint32_t swept = ok ? load_swept(g, shared.areas) : 0;
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
  if (ok && sends) {
    const bool has_sent = block.send(index, blocks.num_senders);
    if constexpr (Far::kExists) ok = __syncthreads_and(has_sent) != 0;
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
  }
  if (ok && receives) {
    ok = tables.make(wait);
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
    ok = ok && block.receive(receiver, num_receivers, tables, wait);
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kP2);
  }
  timeline::end(g, kKind);
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish != Finish::kEnd) {
    if constexpr (Far::kExists) far.tell_of_failure();
    return fail_dispatch(g, a, far.num_ranks(g), finish);
  }
  if constexpr (Far::kExists) far.end();
  sweep_slots(g, shared.areas, swept);
  end_call(g);
}

inline constexpr int64_t kMaxTablesBytes = tables_bytes(kMaxSlotGroupIds, kMaxExperts);

// Calls body(kernel) for that of the rows.
template <typename Reach, typename Body>
cudaError_t WithDispatchKernel(DispatchMode mode, FloatType type, const Body& body) {
  const auto with_type = [&](auto f32, auto f16, auto bf16) {
    switch (type) {
      case FloatType::kF32:
        return body(f32);
      case FloatType::kF16:
        return body(f16);
      case FloatType::kBF16:
        return body(bf16);
    }
    return cudaErrorInvalidValue;
  };
  switch (mode) {
    case DispatchMode::kCopy:
      return body(layout_and_dispatch_kernel<CopiedRows, Reach>);
    case DispatchMode::kScaled:
      return body(layout_and_dispatch_kernel<ScaledRows, Reach>);
    case DispatchMode::kQuantize:
      return with_type(layout_and_dispatch_kernel<QuantizedRows<F32Vector>, Reach>,
                       layout_and_dispatch_kernel<QuantizedRows<F16Vector>, Reach>,
                       layout_and_dispatch_kernel<QuantizedRows<Bf16Vector>, Reach>);
    case DispatchMode::kDequantize:
      return with_type(layout_and_dispatch_kernel<DequantizedRows<F32Vector>, Reach>,
                       layout_and_dispatch_kernel<DequantizedRows<F16Vector>, Reach>,
                       layout_and_dispatch_kernel<DequantizedRows<Bf16Vector>, Reach>);
    case DispatchMode::kWeighted:
      break;
  }
  return cudaErrorInvalidValue;
}

// `reach_of(units)`: how far ranks are reached, by a call that is divided like that.
template <typename ReachOf>
cudaError_t LaunchDispatch(const GroupView& group, const LayoutAndDispatchArguments& a,
                           int64_t num_ranks, int num_sms, cudaStream_t stream,
                           const ReachOf& reach_of) {
  const SlotRow row = slot_row(a.mode, a.type, a.row_bytes, a.num_scales);
  const SlotSizes sizes{num_ranks, a.num_tokens, a.top_k, a.num_experts, row};
  if (!fits_slots(sizes, group.slot_area_bytes)) return cudaErrorInvalidValue;
  const Units units = DivideRows(a.num_tokens, row.bytes / kRowAlignment, num_sms, row.multiple);
  // One more, so that some block has no unit, and time for what only one of them does.
  const int64_t num_received = num_ranks * units.count + 1;
  // Those that receive have the tables to make, and store a row as often as it has experts here.
  const Blocks blocks = DivideBlocks(num_ranks > 1 ? units.count : 0, num_received, num_sms, 4);
  const TableSteps steps =
      TableStepsOf(num_ranks, a.num_tokens, a.top_k, a.num_experts, a.room, blocks.num_senders);
  const int64_t shared_bytes = tables_bytes(num_ranks * a.num_tokens * a.top_k, a.num_experts);
  const auto reach = reach_of(units);
  return WithDispatchKernel<std::decay_t<decltype(reach)>>(a.mode, a.type, [&](auto* kernel) {
    kernel<<<static_cast<unsigned>(blocks.count), kNumThreads, shared_bytes, stream>>>(
        group, a, units, blocks, steps, reach);
    return cudaGetLastError();
  });
}

template <typename Reach>
cudaError_t PrepareDispatch() {
  const auto prepare = [](auto* kernel) { return PrepareKernel(kernel, kMaxTablesBytes); };
  for (const DispatchMode mode : {DispatchMode::kCopy, DispatchMode::kScaled,
                                  DispatchMode::kQuantize, DispatchMode::kDequantize}) {
    for (const FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
      if (cudaError_t e = WithDispatchKernel<Reach>(mode, type, prepare); e != cudaSuccess) {
        return e;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_LAYOUT_AND_DISPATCH_CUH_
