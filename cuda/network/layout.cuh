// layout over a network: ranks tell each other how many rows they have for each expert, and to whom
// their rows belong; nothing that is exchanged grows with the tokens of all ranks.
// After:    as after cuda/direct/layout.cu: every table to the bit, whatever ranks lie on which node.
// Roles:    num_blocks blocks of 512 threads, all resident. Block b owns the ids [b * ids_per_block,
//           ..) of this rank, its warp w a run of those. Of destinations and sources each warp of the
//           grid takes every n-th.
// Buffers:  name          | lives on         | written by          | read by
//           topk_idx      | XLA, own         | before the call     | own blocks
//           layout_counts | control block    | each block its line | all own blocks, after [B]
//           counts        | hop, [2][R][E]   | each rank its row   | all own blocks, after [N2]
//           sent          | hop, [T * K]     | own blocks          | the network, own rank, after [B]
//           received      | hop, [C]         | each rank its part  | own blocks, after [N4]
//           counted       | hop's signals, [2][R]: epochs, as counts
//           listed        | hop's signals, [R]: epochs
// Protocol: e = epoch of the call; counts and counted alternate by its parity.
//           1. Count own ids per expert into the block's line of layout_counts. [B] grid barrier.
//           2. Block 0: [N1] put_signal of this rank's row of counts to every rank, counted = e.
//           3. [N2] wait for the row of every rank. The table says where each expert begins, and
//           which of its rows are whose: kept are the first most(expert) in the order of ranks, so
//           kept rows of ranks before s are min(their rows, most), summed over a rank's experts.
//           4. Place own ids: send_row; and for each kept row an entry in `sent`, by destination and
//           in the order of ids: id and row. [B]
//           5. [N3] put_signal of a rank's entries to where they belong in its `received`, behind
//           those of ranks before this one, listed = e. Not if there are none, which it knows too.
//           6. [N4] wait for the entries of every rank that has some, and make tables of them: their
//           order is that of recv_order.
// Reuse:    A rank sends [N1] of e + 1 when it has ended e. So who has got it from q in [N2] of e + 1
//           knows that q is through with [N4] of e, and thus that q's `received`, and what was sent
//           to q from `sent` and counts, has been read. [N3] and step 4 of e + 1 come after that. A
//           row of counts of e + 2 comes from who has ended e + 1, so has had this rank's row of
//           e + 1, which it sent when it had ended e: of that parity nothing is in use.
// Progress: [N1] waits for nothing but own blocks, [N3] for [N2], [N4] for [N3]: no cycle. The grid is
//           at most one block an SM.
// Failure:  as cuda/direct/layout.cu's; other nodes are told (cuda/network/tell.cuh).
// Limits:   E <= 1024, R <= kMaxNetworkRanks, an even E; rows as kMaxRows says.
#ifndef JAX_EP_CUDA_NETWORK_LAYOUT_CUH_
#define JAX_EP_CUDA_NETWORK_LAYOUT_CUH_

#include <algorithm>

#include "cuda/core/divider.h"
#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/network/hop.cuh"
#include "cuda/network/hop_wait.cuh"
#include "cuda/network/layout.h"
#include "cuda/network/tell.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/notice.cuh"

namespace jax_ep::gpu {

namespace network_layout {

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;
inline constexpr int kCountsAtOnce = 8;  // of a thread, on their way at once

// The same on all ranks, like the sizes that it follows from.
struct Plan {
  Plan(const LayoutArguments& a, int64_t num_ranks, int64_t most_blocks)
      : num_ranks(static_cast<int32_t>(num_ranks)),
        top_k(a.top_k),
        experts_per_rank(a.num_experts / num_ranks) {
    num_ids = static_cast<int32_t>(a.num_tokens * a.top_k);
    const int64_t with_two = (num_ids + 2 * kNumThreads - 1) / (2 * kNumThreads);
    num_blocks =
        static_cast<int32_t>(std::min<int64_t>(most_blocks, std::max<int64_t>(1, with_two)));
    ids_per_block = (num_ids + num_blocks - 1) / num_blocks;
    ids_per_warp = (ids_per_block + kNumWarps - 1) / kNumWarps;
    num_experts = static_cast<int32_t>(a.num_experts);
    num_local = static_cast<int32_t>(a.num_experts / num_ranks);
  }
  int64_t shared_bytes() const {
    const int64_t by_expert = (kNumWarps + 6) * int64_t{num_experts};
    const int64_t by_rank = (kNumWarps + 3) * int64_t{num_ranks} + 2;
    return (by_expert + by_rank) * int64_t{sizeof(int32_t)};
  }

  int32_t num_ranks, num_blocks, num_ids, ids_per_block, ids_per_warp;
  int32_t num_experts, num_local;  // E, L
  Divider top_k, experts_per_rank;
};

struct Totals {
  int32_t num_invalid;                         // of the block's ids
  int32_t num_used, num_received, num_routed;  // rows of this rank's experts
};

template <typename Hop>
class Builder {
 public:
  __device__ Builder(const GroupView& g, const NetworkView& n, const Hop& hop,
                     const LayoutArguments& a, const Plan& plan, int32_t* memory, Totals& totals)
      : g_(g),
        n_(n),
        hop_(hop),
        a_(a),
        plan_(plan),
        at_(n.layout),
        totals_(totals),
        epoch_(ld_relaxed_gpu_u64(n.epoch) + 1),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        warp_of_grid_(static_cast<int32_t>(blockIdx.x) * kNumWarps + warp_),
        num_warps_(static_cast<int32_t>(gridDim.x) * kNumWarps),
        warp_count_(memory),
        own_(warp_count_ + kNumWarps * plan.num_experts),
        block_(own_ + plan.num_experts),
        before_(block_ + plan.num_experts),
        total_(before_ + plan.num_experts),
        offset_(total_ + plan.num_experts),
        most_(offset_ + plan.num_experts),
        next_(most_ + plan.num_experts),
        sent_begin_(next_ + kNumWarps * g.nodes.num_ranks),
        there_begin_(sent_begin_ + g.nodes.num_ranks + 1),
        from_begin_(there_begin_ + g.nodes.num_ranks) {
    const int32_t block_begin = static_cast<int32_t>(blockIdx.x) * plan.ids_per_block;
    const int32_t block_end = min(plan.num_ids, block_begin + plan.ids_per_block);
    begin_ = min(block_end, block_begin + warp_ * plan.ids_per_warp);
    end_ = min(block_end, begin_ + plan.ids_per_warp);
  }

  // By all threads of each block. False on a thread that finds the group broken.
  __device__ bool make() {
    count_ids();
    if (!grid_barrier(g_, OpKind::kLayout, 1)) return false;  // [B]
    sum_lines();
    bool ok = blockIdx.x != 0 || send_counts();
    ok = await_counts() && ok;
    if (__syncthreads_and(ok) == 0) return false;
    sum_ranks();
    place_experts();
    begin_sources();
    place_rows();
    if (!grid_barrier(g_, OpKind::kLayout, 2)) return false;  // [B]
    ok = send_entries();
    ok = receive_entries() && ok;
    fill_rest();
    return ok;
  }

 private:
  // 1. Fills the block's line of layout_counts; warp_count becomes the ids of the warps before.
  __device__ void count_ids() {
    for (int32_t i = threadIdx.x; i < kNumWarps * plan_.num_experts; i += kNumThreads) {
      warp_count_[i] = 0;
    }
    if (threadIdx.x == 0) totals_.num_invalid = 0;
    __syncthreads();
    int32_t num_invalid = 0;
    for (int32_t i = begin_ + lane_; i < end_; i += 32) {
      const int32_t id = a_.topk_idx[i];
      if (is_routed(id, plan_.num_experts)) {
        atomicAdd(&warp_count_[warp_ * plan_.num_experts + id], 1);
      } else if (is_invalid(id, plan_.num_experts)) {
        ++num_invalid;
      }
    }
    if (num_invalid != 0) atomicAdd(&totals_.num_invalid, num_invalid);
    __syncthreads();
    int32_t* line = g_.control->layout_counts[blockIdx.x];
    if (threadIdx.x == 0) line[kMaxExperts] = totals_.num_invalid;
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      int32_t sum = 0;
      for (int w = 0; w < kNumWarps; ++w) {
        int32_t& count = warp_count_[w * plan_.num_experts + e];
        const int32_t rows = count;
        count = sum;
        sum += rows;
      }
      line[e] = sum;
    }
  }

  // By expert: this rank's rows, and in `block_` those of the blocks before.
  __device__ void sum_lines() {
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      int32_t own = 0, blocks_before = 0;
      for (uint32_t b = 0; b < gridDim.x; ++b) {
        if (b == blockIdx.x) blocks_before = own;
        own += __ldcg(&g_.control->layout_counts[b][e]);
      }
      own_[e] = own;
      block_[e] = blocks_before;
    }
    __syncthreads();
  }

  // 2. By block 0.
  __device__ bool send_counts() {
    int32_t* row = at_.counts(n_.memory, epoch_, g_.nodes.rank);
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) row[e] = own_[e];
    __syncthreads();
    bool ok = true;
    for (int r = warp_; r < g_.nodes.num_ranks; r += kNumWarps) {
      if (r == g_.nodes.rank) continue;
      HopWait wait(g_, OpKind::kLayout, slot_of_rank(g_, hop_, r));
      ok = hop_.put_signal(r, r, row, row, plan_.num_experts * sizeof(int32_t),
                           at_.counted(n_.memory, epoch_, g_.nodes.rank), epoch_,
                           wait.until(kProgress, epoch_)) &&
           ok;  // [N1]
    }
    return ok;
  }

  // 3.
  __device__ bool await_counts() {
    for (int r = warp_; r < g_.nodes.num_ranks; r += kNumWarps) {
      if (r == g_.nodes.rank) continue;
      HopWait wait(g_, OpKind::kLayout, slot_of_rank(g_, hop_, r));
      if (!hop_.wait_signal(at_.counted(n_.memory, epoch_, r), epoch_,
                            wait.until(kStart, epoch_))) {
        return false;  // [N2]
      }
    }
    return true;
  }

  // By expert: rows of the ranks before this one, and of all.
  __device__ void sum_ranks() {
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      int32_t sum = 0;
      for (int first = 0; first < g_.nodes.num_ranks; first += kCountsAtOnce) {
        int32_t rows[kCountsAtOnce];
#pragma unroll
        for (int j = 0; j < kCountsAtOnce; ++j) {
          const int r = first + j;
          rows[j] = r < g_.nodes.num_ranks ? rows_of(r, e) : 0;
        }
#pragma unroll
        for (int j = 0; j < kCountsAtOnce; ++j) {
          if (first + j == g_.nodes.rank) before_[e] = sum;
          sum += rows[j];
        }
      }
      total_[e] = sum;
    }
    __syncthreads();
  }

  // Of rank r for expert e.
  __device__ int32_t rows_of(int r, int32_t e) const {
    return r == g_.nodes.rank ? own_[e] : __ldcg(at_.counts(n_.memory, epoch_, r) + e);
  }

  // By expert: offset_, most_. By rank: how many entries this one has for it (in sent_begin_, at
  // first), and those of ranks before. The experts of a rank by one warp.
  __device__ void place_experts() {
    for (int rank = warp_; rank < g_.nodes.num_ranks; rank += kNumWarps) {
      int32_t begin = 0, kept = 0, there = 0;
      int32_t used = 0, received = 0, routed = 0;
      for (int32_t step = 0; step < plan_.num_local; step += 32) {
        const int32_t e = rank * plan_.num_local + step + lane_;
        const bool is_expert = step + lane_ < plan_.num_local;
        const int32_t total = is_expert ? total_[e] : 0;
        const auto occupied = is_expert ? static_cast<int32_t>(a_.room.occupied_rows(total)) : 0;
        int32_t end = occupied;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int32_t lower = __shfl_up_sync(kAllLanes, end, distance);
          if (lane_ >= distance) end += lower;
        }
        const int32_t offset = begin + end - occupied;
        begin += __shfl_sync(kAllLanes, end, 31);
        if (!is_expert) continue;
        const auto most = static_cast<int32_t>(a_.room.most_rows(offset));
        offset_[e] = offset;
        most_[e] = most;
        there += min(before_[e], most);
        kept += min(before_[e] + own_[e], most) - min(before_[e], most);
        used += min(occupied, most);
        received += min(total, most);
        routed += total;
      }
      there = __reduce_add_sync(kAllLanes, there);
      kept = __reduce_add_sync(kAllLanes, kept);
      used = __reduce_add_sync(kAllLanes, used);
      received = __reduce_add_sync(kAllLanes, received);
      routed = __reduce_add_sync(kAllLanes, routed);
      if (lane_ != 0) continue;
      sent_begin_[rank + 1] = kept;
      there_begin_[rank] = there;
      if (rank != g_.nodes.rank) continue;
      totals_.num_used = used;
      totals_.num_received = received;
      totals_.num_routed = routed;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      sent_begin_[0] = 0;
      for (int r = 0; r < g_.nodes.num_ranks; ++r) sent_begin_[r + 1] += sent_begin_[r];
    }
    for (int r = threadIdx.x; r <= g_.nodes.num_ranks; r += kNumThreads) from_begin_[r] = 0;
    __syncthreads();
  }

  // By source: where its entries begin among those of this rank.
  __device__ void begin_sources() {
    for (int32_t l = threadIdx.x; l < plan_.num_local; l += kNumThreads) {
      const int32_t e = g_.nodes.rank * plan_.num_local + l;
      int32_t sum = 0;
      for (int r = 0; r < g_.nodes.num_ranks; ++r) {
        sum += rows_of(r, e);
        atomicAdd(&from_begin_[r + 1], min(sum, most_[e]));
      }
    }
  }

  // Kept rows of expert e that come before the warp's ids, of all ranks.
  __device__ int32_t kept_before(int32_t e) const {
    const int32_t in_block = warp_count_[warp_ * plan_.num_experts + e];
    return min(before_[e] + block_[e] + in_block, most_[e]);
  }

  // 4. By a warp, its ids in order.
  __device__ void place_rows() {
    int32_t* const next = next_ + warp_ * g_.nodes.num_ranks;  // by destination, in `sent`
    for (int r = lane_; r < g_.nodes.num_ranks; r += 32) {
      int32_t entries = sent_begin_[r];
      for (int32_t e = r * plan_.num_local; e < (r + 1) * plan_.num_local; ++e) {
        entries += kept_before(e) - min(before_[e], most_[e]);
      }
      next[r] = entries;
    }
    __syncwarp();
    int32_t* const count = warp_count_ + warp_ * plan_.num_experts;
    const uint32_t lower = (1u << lane_) - 1;
    RowEntry* const sent = at_.sent(n_.memory);
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t i = step + lane_;
      const int32_t id = i < end_ ? a_.topk_idx[i] : kNotRouted;
      const bool routed = is_routed(id, plan_.num_experts);
      const uint32_t same = __match_any_sync(kAllLanes, routed ? id : kNotRouted);
      int32_t row = kNoRow;
      if (routed) {
        const int32_t place = before_[id] + block_[id] + count[id] + __popc(same & lower);
        if (place < most_[id]) row = offset_[id] + place;
      }
      const int32_t rank = row != kNoRow ? plan_.experts_per_rank.quotient(id) : -1;
      const uint32_t together = __match_any_sync(kAllLanes, rank);
      if (rank >= 0) sent[next[rank] + __popc(together & lower)] = {i, row};
      __syncwarp();
      if (routed && (same & lower) == 0) count[id] += __popc(same);
      if (rank >= 0 && (together & lower) == 0) next[rank] += __popc(together);
      __syncwarp();
      if (i < end_) a_.send_row[i] = row;
    }
  }

  // 5.
  __device__ bool send_entries() {
    bool ok = true;
    for (int r = warp_of_grid_; r < g_.nodes.num_ranks; r += num_warps_) {
      const int32_t begin = sent_begin_[r], num_entries = sent_begin_[r + 1] - begin;
      if (r == g_.nodes.rank || num_entries == 0) continue;
      HopWait wait(g_, OpKind::kLayout, slot_of_rank(g_, hop_, r));
      ok = hop_.put_signal(r, r, at_.received(n_.memory) + there_begin_[r],
                           at_.sent(n_.memory) + begin, num_entries * sizeof(RowEntry),
                           at_.listed(n_.memory, g_.nodes.rank), epoch_,
                           wait.until(kProgress, epoch_)) &&
           ok;  // [N3]
    }
    return ok;
  }

  // 6. Several warps a source, where there are enough.
  __device__ bool receive_entries() {
    const int32_t num_parts = max(1, num_warps_ / g_.nodes.num_ranks);
    bool ok = true;
    for (int32_t item = warp_of_grid_; item < g_.nodes.num_ranks * num_parts; item += num_warps_) {
      const int r = item % g_.nodes.num_ranks;
      const int32_t begin = from_begin_[r], num_entries = from_begin_[r + 1] - begin;
      const RowEntry* entries = at_.received(n_.memory) + begin;
      if (r == g_.nodes.rank) entries = at_.sent(n_.memory) + sent_begin_[r];
      if (r != g_.nodes.rank && num_entries > 0) {
        HopWait wait(g_, OpKind::kLayout, slot_of_rank(g_, hop_, r));
        if (!hop_.wait_signal(at_.listed(n_.memory, r), epoch_, wait.until(kProgress, epoch_))) {
          ok = false;  // [N4]
          continue;
        }
      }
      read_entries(r, entries, begin, num_entries, item / g_.nodes.num_ranks, num_parts);
    }
    return ok;
  }

  // A part of the entries of rank r, whose first one is at `begin` of recv_order. Token t's rows
  // begin at the first entry of t or of a later token.
  __device__ void read_entries(int r, const RowEntry* entries, int32_t begin, int32_t num_entries,
                               int32_t part, int32_t num_parts) {
    const auto num_tokens = static_cast<int32_t>(a_.num_tokens);
    int32_t* const offsets = a_.recv_offsets + int64_t{r} * num_tokens;
    for (int32_t i = part * 32 + lane_; i <= num_entries; i += 32 * num_parts) {
      int32_t token = num_tokens;  // behind the last one
      if (i < num_entries) {
        const RowEntry entry = entry_at(entries + i);
        a_.recv_src[entry.row] = r * plan_.num_ids + entry.id;
        a_.recv_order[begin + i] = entry.row;
        token = plan_.top_k.quotient(entry.id) + 1;
      }
      const int32_t first = i == 0 ? 0 : plan_.top_k.quotient(entry_at(entries + i - 1).id) + 1;
      for (int32_t t = first; t < token; ++t) offsets[t] = begin + i;
    }
  }

  __device__ static RowEntry entry_at(const RowEntry* entry) {
    const int2 words = __ldcg(reinterpret_cast<const int2*>(entry));
    return {words.x, words.y};
  }

  // What holds no row, and all numbers of rows.
  __device__ void fill_rest() {
    for (int32_t l = warp_of_grid_; l < plan_.num_local; l += num_warps_) {
      const int32_t e = g_.nodes.rank * plan_.num_local + l;
      const auto size = static_cast<int32_t>(a_.room.group_size(offset_[e], total_[e]));
      for (int32_t i = min(total_[e], size) + lane_; i < size; i += 32) {
        a_.recv_src[offset_[e] + i] = kNoSource;
      }
    }
    const auto capacity = static_cast<int32_t>(a_.room.capacity);
    const auto first = static_cast<int32_t>(blockIdx.x * kNumThreads + threadIdx.x);
    for (int32_t i = first; i < capacity; i += num_warps_ * 32) {
      if (i >= totals_.num_used) a_.recv_src[i] = kNoSource;
      if (i >= totals_.num_received) a_.recv_order[i] = kNoSource;
    }
    if (blockIdx.x == 0) write_counters();
  }

  __device__ void write_counters() {
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      a_.expert_load[e] = total_[e];
      const int32_t l = e - g_.nodes.rank * plan_.num_local;
      if (l < 0 || l >= plan_.num_local) continue;
      a_.group_sizes[l] = static_cast<int32_t>(a_.room.group_size(offset_[e], total_[e]));
      a_.expert_counts[l] = total_[e];
    }
    if (threadIdx.x != 0) return;
    int32_t num_invalid = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) {
      num_invalid += __ldcg(&g_.control->layout_counts[b][kMaxExperts]);
    }
    a_.recv_offsets[g_.nodes.num_ranks * a_.num_tokens] = totals_.num_received;
    a_.counters[0] = totals_.num_received;
    a_.counters[1] = totals_.num_routed - totals_.num_received;
    a_.counters[2] = num_invalid;
    tell_of_invalid_ids(g_, g_.nodes.rank, plan_.num_experts, num_invalid);
  }

  const GroupView& g_;
  const NetworkView& n_;
  const Hop& hop_;
  const LayoutArguments& a_;
  const Plan& plan_;
  const NetworkLayoutMemory& at_;
  Totals& totals_;
  const uint64_t epoch_;
  const int32_t warp_, lane_, warp_of_grid_, num_warps_;
  int32_t begin_, end_;  // the warp's ids
  // In shared memory.
  int32_t* const warp_count_;   // [kNumWarps][E]: ids of the block's warps before; it grows
  int32_t* const own_;          // [E], ids of this rank
  int32_t* const block_;        // [E], of its blocks before
  int32_t* const before_;       // [E], of ranks before
  int32_t* const total_;        // [E], of all ranks
  int32_t* const offset_;       // [E], where the expert begins on its rank
  int32_t* const most_;         // [E], rows that it may keep
  int32_t* const next_;         // [kNumWarps][R], the warp's next entry in `sent`
  int32_t* const sent_begin_;   // [R + 1], in `sent`, by destination
  int32_t* const there_begin_;  // [R], in the destination's `received`
  int32_t* const from_begin_;   // [R + 1], in `received`, by source
};

template <typename Hop>
__global__ __launch_bounds__(kNumThreads, 1) void kernel(const __grid_constant__ GroupView g,
                                                         const __grid_constant__ NetworkView n,
                                                         const __grid_constant__ Hop hop,
                                                         const __grid_constant__ LayoutArguments a,
                                                         const __grid_constant__ Plan plan) {
  extern __shared__ int32_t memory[];
  __shared__ Totals totals;
  const bool is_claimed = claim_call(g, OpKind::kLayout);
  const bool may_begin = threadIdx.x == kLooker ? !is_broken(g, OpKind::kLayout) : is_claimed;
  bool ok = __syncthreads_and(may_begin) != 0;
  if (ok) ok = Builder<Hop>(g, n, hop, a, plan, memory, totals).make();
  const Finish finish = finish_block(g, OpKind::kLayout, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) {
    if (threadIdx.x == 0) *n.epoch += 1;
    return end_call(g);
  }
  tell_other_nodes(g, hop);                           // [T1]
  const auto num_units = [](uint32_t) { return 1; };  // peers tell of none
  fill_without_rows(a, g.nodes.num_ranks, fail_call(g, finish, num_units));
}

}  // namespace network_layout

template <typename Hop>
cudaError_t PrepareNetworkLayout() {
  constexpr int64_t kMostBytes = ((network_layout::kNumWarps + 6) * int64_t{kMaxExperts} +
                                  (network_layout::kNumWarps + 3) * int64_t{kMaxNetworkRanks} + 2) *
                                 int64_t{sizeof(int32_t)};
  return PrepareKernel(network_layout::kernel<Hop>, kMostBytes);
}

template <typename Hop>
cudaError_t LaunchNetworkLayout(const GroupView& group, const NetworkView& network, const Hop& hop,
                                const LayoutArguments& a, int num_sms, cudaStream_t stream) {
  if (group.nodes.num_ranks > kMaxNetworkRanks ||
      !network.layout.fits(a.num_tokens * a.top_k, a.num_experts, a.room.capacity)) {
    return cudaErrorInvalidValue;
  }
  const network_layout::Plan plan(a, group.nodes.num_ranks, std::min(num_sms, kMaxLayoutBlocks));
  network_layout::kernel<Hop>
      <<<static_cast<unsigned>(plan.num_blocks), network_layout::kNumThreads,
         static_cast<size_t>(plan.shared_bytes()), stream>>>(group, network, hop, a, plan);
  return cudaGetLastError();
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_LAYOUT_CUH_
