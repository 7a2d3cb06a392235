// combine over rails: each rank sums its rows of a token, each node what its ranks have summed, and the
// token's rank what nodes have. A sum crosses the network once for each (token, node).
// After:    out[t] = round(sum over nodes ascending of round(sum over the node's ranks ascending of
//           round(sum over the kept rows of t on the rank, in k order, of weight * y))), sums and
//           products f32, each rounded on its own, from +0; who has none adds nothing.
//           collected[t, k] = values[row of (t, k)], 0 if there is none. Without `expand`, as in
//           cuda/direct/combine.
// Roles:    blocks, all resident, as many on all ranks; block b has a b-th of each rank's tokens, and
//           meets the blocks b of other ranks alone. Its tokens are taken in batches of 8; a unit is a
//           batch of one rank's tokens. It has C channels to each node, of which the c-th has the
//           batches c, c + C, .. The first warp tells the peers on the node which units are summed, and
//           hears them (messenger, progress.cuh). Of the rest
//             rank summers  | sum this rank's rows of a unit, for each rank of all nodes, and leave
//                           | that with the rank of its index on this node (row_summer.cuh)
//             node summers  | one for each channel to another node: sum what this node's ranks have
//                           | left for the peer on the rail there, and send it
//             token summers | as many for each channel: together they add up the nodes' sums of its
//                           | own tokens, one of which is of this node; each has a share of the row
// Buffers:  name               | lives on       | written by                  | read by
//           y, weights, values | XLA, own       | before the call             | rank summers
//           scratch (partial,  | XLA, each rank | rank summers of this node,  | node and token
//             values, has)     |                | [S2]..[P1]                  | summers, [P2]
//           staging, landing, filled, credit, chunks: as in dispatch.cuh, but another region
//           out, collected     | XLA, own       | token summers               | later kernels
//           left               | shared memory, a slot each: token summers that are through with it
//           stages             | shared memory, of each rank and node summer: pieces of rows, filled by
//                              | bulk loads, [L], and read by the warp that has asked for them
// Protocol: 1. On the node [S1] show scratch; [S2] wait for all.
//           2. Rank summers store their units in order, and the messenger tells of them, [P1]. A sum
//           of the node is made when all its ranks have told of the unit, [P2], this one too. A rank
//           summer has loads ahead of what it sums, so it tells of a unit when the last of its sums is
//           stored (row_summer.cuh).
//           3. Chunks go as in dispatch.cuh, [R1] to [R4]. A call's first one has no rows: it says
//           that the peer's node has come. Then rows come in the order of tokens, one for each token
//           that has any on the node, which both sides know, so none need be marked as the last.
//           [R4] is done by the token summer that is the last to leave the chunk ([Q]: it counts
//           itself in `left` when it has read the chunk's last row; of a first chunk when those of
//           all nodes have come).
// Proof:    Chunks are whole, and slots free, as in dispatch.cuh. With [Q] the last to leave knows that
//           all have, and leaves a node's chunks in their order; so does every summer, so that credit
//           for c is given, by whoever, after all have left c: to whom it is credit for an earlier
//           chunk that one has been left too. A summer is never a slot's use ahead of another: that
//           takes credit for the chunk that the other is in. So `left` counts whole rounds.
//           Scratch is written for this call alone, after [S2], and read after [P2]; a rank ends when
//           all units of its node are told, so nobody writes there afterwards.
// Reuse:    as in dispatch.cuh.
// Progress: rank summers wait for nothing but [S2]. Node summers wait for units, and for credit of
//           their node; token summers for units, and for the node whose next row they need. All nodes'
//           summers are warps of their own: what a token summer waits for is sent as soon as its slot
//           is free, and it has left all chunks before that one, whatever other nodes do.
//           A peer gives credit for a first chunk when all nodes have come to the call; before, waits
//           have the time that a rank may take to come. After, all that is waited for is progress.
// Failure:  out and collected become NaN; all else as in dispatch.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses, and fit a slot with their head;
//           at most kMaxCombineNodes nodes of kMaxRanksOfNode ranks, and kMaxCombineSlots
//           slots. Scratch is as large as all ranks' tokens.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_COMBINE_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_COMBINE_CUH_

#include <algorithm>

#include "cuda/direct/kernels.cuh"
#include "cuda/launch.h"
#include "cuda/network/rail/chunks.cuh"
#include "cuda/network/rail/combine.h"
#include "cuda/network/rail/rail.h"
#include "cuda/network/rail/row_summer.cuh"
#include "cuda/network/rail/sums.cuh"
#include "cuda/network/tell.cuh"
#include "cuda/network/warp_copy.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/start_end.cuh"

namespace jax_ep::gpu {
namespace rail {

struct CombineShared {
  uint64_t address[kMaxPeers][kNumAddresses];  // the first one is scratch
  // By node and channel of the block.
  uint32_t left[kMaxCombineNodes][kMaxCombineSlots];  // [Q]
  uint64_t received[kMaxCombineNodes];                // by a channel's first token summer: chunks
  SummerStages stages[kMaxSummers];                   // of rank summers, then of node summers
  Mailbox box;
};

// Between looks at a unit: those who wait take the issue slots of those who sum.
constexpr unsigned kUnitWaitNs = 400;

// What the roles of a block have in common.
struct CombineWork {
  const GroupView& g;
  const RailView& rail;
  const CombineArguments& a;
  CombineShared& shared;
  CombineWarps warps;
  CombineScratch scratch;
  ChunkFormat format;
  int32_t begin, end;  // tokens
  int32_t num_ranks;   // of all nodes

  __device__ int32_t num_batches() const { return num_batches_of(end - begin); }
  __host__ __device__ static constexpr int32_t num_batches_of(int32_t num_tokens) {
    return (num_tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  }
  // Blocks begin with different ranks, so that not all of them write to one at the same time.
  __device__ int32_t unit_of(int32_t batch, int32_t rank) const {
    const auto first = static_cast<int32_t>(blockIdx.x) % num_ranks;
    return batch * num_ranks + (rank + num_ranks - first) % num_ranks;
  }
  __device__ int32_t rank_of_unit(int32_t unit) const {
    return static_cast<int32_t>((static_cast<uint32_t>(unit) + blockIdx.x) %
                                static_cast<uint32_t>(num_ranks));
  }
  template <typename Vector>
  __device__ RowSummer<Vector> summer(int32_t index, char* stages, int32_t* written) const {
    return {shared.stages[index], stages + int64_t{index} * warps.stages * kSumPieceBytes,
            warps.stages, static_cast<int32_t>(format.row_bytes), written};
  }
  __device__ uint64_t own_scratch() const { return shared.address[g.rank][0]; }
  __device__ int64_t num_vectors() const { return format.row_bytes / 16; }

  // [P2], by a warp. False if the group is broken. This rank's own summers come to an end whatever
  // happens, so the wait for them needs none.
  __device__ bool await_unit(int32_t unit) const {
    const int32_t summer = unit % warps.rank_summers, num_before = unit / warps.rank_summers;
    while (ld_acquire_cta_shared(&shared.box.written[summer]) <= num_before) {
      __nanosleep(kUnitWaitNs);
    }
    __syncwarp();
    return g.num_ranks == 1 || wait_until_arrived(shared.box, unit) != kBroken;
  }
  // The ranks of this node that have summed a token of the rail's rank on `node`, a bit each.
  __device__ uint32_t ranks_with(int32_t node, int32_t token) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
    const bool has =
        lane < rail.ranks_per_node && *scratch.has(own_scratch(), node, lane, token) != 0;
    return __ballot_sync(~0u, has);
  }
};

// The i-th bit that is set.
__device__ inline int32_t nth_bit(uint32_t bits, int32_t i) {
  for (; i > 0; --i) bits &= bits - 1;
  return __ffs(static_cast<int>(bits)) - 1;
}

// Its units: those of `index`, index + rank_summers, ..
template <typename Vector>
__device__ void sum_own_rows(const CombineWork& work, int32_t index, char* stages) {
  const CombineArguments& a = work.a;
  const CombineScratch& scratch = work.scratch;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t num_units = work.shared.box.num_units;
  auto summer = work.summer<Vector>(index, stages, &work.shared.box.written[index]);
  int32_t num_done = 0;
  for (int32_t unit = index; unit < num_units; unit += work.warps.rank_summers) {
    const int32_t rank = work.rank_of_unit(unit);
    const int32_t first_token = work.begin + unit / work.num_ranks * kTokensAtOnce;
    const int32_t node = rank / work.rail.ranks_per_node;
    const uint64_t to = work.shared.address[rank % work.rail.ranks_per_node][0];
    int32_t first_row = 0, num_rows = 0;
    if (lane < kTokensAtOnce && first_token + lane < work.end) {
      const int64_t flat_token = rank * a.num_tokens + first_token + lane;
      first_row = a.recv_offsets[flat_token];
      num_rows = a.recv_offsets[flat_token + 1] - first_row;
      *scratch.has(to, node, work.g.rank, first_token + lane) = num_rows > 0;
    }
    uint32_t left = __ballot_sync(~0u, num_rows > 0);
    // Of the first token that is left, on each lane: looked up two tokens before, its weight one.
    const auto row_of = [&](uint32_t tokens) -> int32_t {
      if (tokens == 0) return kNoRow;
      const int32_t of = __ffs(static_cast<int>(tokens)) - 1;
      const int32_t count = __shfl_sync(~0u, num_rows, of);
      const int32_t first = __shfl_sync(~0u, first_row, of);
      return lane < count ? a.recv_order[first + lane] : kNoRow;
    };
    const auto weight_of = [&](int32_t row) {
      return row != kNoRow && a.weights != nullptr ? a.weights[row] : 1.0f;
    };
    const auto after_first = [](uint32_t tokens) { return tokens & (tokens - 1); };
    int32_t next_row = row_of(left), next_but_one = row_of(after_first(left));
    float next_weight = weight_of(next_row);
    for (; left != 0; left = after_first(left)) {
      const int32_t of = __ffs(static_cast<int>(left)) - 1, token = first_token + of;
      const int32_t count = __shfl_sync(~0u, num_rows, of);
      const int32_t row = next_row;
      const float weight = next_weight;
      next_row = next_but_one;
      next_but_one = row_of(after_first(after_first(left)));
      next_weight = weight_of(next_row);
      if (row != kNoRow && a.values != nullptr) {
        scratch.values(to, node, token)[a.recv_src[row] % a.top_k] = a.values[row];
      }
      const int64_t at = a.expand ? row : rank * a.num_tokens + token;
      summer.sum(scratch.partial(to, node, work.g.rank, token), a.expand ? count : 1,
                 static_cast<const char*>(a.y) + at * work.format.row_bytes, weight);
    }
    summer.tell(++num_done);
  }
  summer.finish();
}

// Sends what this node has for the peer on another one, over a channel of the block.
template <typename Vector, typename Hop>
class NodeSummer {
 public:
  __device__ NodeSummer(const CombineWork& work, const Channel<Hop>& channel, int32_t node,
                        int32_t of_block, int32_t rows_per_chunk, RowSummer<Vector> summer)
      : work_(work),
        channel_(channel),
        node_(node),
        of_block_(of_block),
        rows_per_chunk_(rows_per_chunk),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        summer_(summer),
        first_(channel.chunks(node).sent),
        chunk_(first_) {}

  // False if the group is broken.
  __device__ bool run() {
    const bool ok = send_all();
    summer_.finish();
    if (ok && lane_ == 0) channel_.chunks(node_).sent = chunk_;
    return ok;
  }

 private:
  __device__ bool send_all() {
    if (!channel_.await_credit(node_, chunk_, first_) || !send()) return false;  // [R1]
    const int32_t rank = work_.rail.rank_of(node_, work_.g.rank);
    for (int32_t batch = of_block_; batch < work_.num_batches(); batch += work_.warps.channels) {
      if (!work_.await_unit(work_.unit_of(batch, rank))) return false;  // [P2]
      fence_proxy_async_global();
      __syncwarp();
      const int32_t first_token = work_.begin + batch * kTokensAtOnce;
      const int32_t end_token = min(first_token + kTokensAtOnce, work_.end);
      for (int32_t token = first_token; token < end_token; ++token) {
        const uint32_t ranks = work_.ranks_with(node_, token);
        if (ranks == 0) continue;
        if (num_rows_ == 0 && !channel_.await_credit(node_, chunk_, first_)) return false;  // [R1]
        add_row(token, ranks);
        if (num_rows_ == rows_per_chunk_ && !send()) return false;
      }
    }
    return num_rows_ == 0 || send();
  }

  __device__ void add_row(int32_t token, uint32_t ranks) {
    const CombineArguments& a = work_.a;
    const CombineScratch& scratch = work_.scratch;
    const uint64_t here = work_.own_scratch();
    char* staging = channel_.staging(node_, chunk_);
    if (a.values != nullptr && lane_ < a.top_k) {
      reinterpret_cast<float*>(work_.format.row_head(staging, num_rows_))[lane_] =
          scratch.values(here, node_, token)[lane_];
    }
    const char* sum = scratch.partial(here, node_, nth_bit(ranks, lane_), token);
    char* row = work_.format.row(staging, num_rows_);
    if (__popc(ranks) == 1) {
      // Rounded already; that -0 stays is not seen where nodes are summed, from +0.
      copy_by_warp(row, scratch.partial(here, node_, nth_bit(ranks, 0), token),
                   work_.format.row_bytes);
    } else {
      summer_.sum(row, __popc(ranks), sum, 1.0f);
    }
    ++num_rows_;
  }

  // [R2]
  __device__ bool send() {
    summer_.finish();
    const int64_t num_bytes = work_.format.num_bytes(num_rows_);
    if (!channel_.send(node_, chunk_, num_rows_, false, num_bytes)) return false;
    ++chunk_;
    num_rows_ = 0;
    return true;
  }

  const CombineWork& work_;
  const Channel<Hop>& channel_;
  const int32_t node_, of_block_, rows_per_chunk_, lane_;
  RowSummer<Vector> summer_;
  const uint64_t first_;  // chunk of the call
  uint64_t chunk_;
  int32_t num_rows_ = 0;  // in it
};

// Adds up the nodes' sums of own tokens, those of a channel of the block.
template <typename Vector, typename Hop>
class TokenSummer {
  static constexpr int kAtOnce = 2;

 public:
  // The index-th of `count` that share the channel.
  __device__ TokenSummer(const CombineWork& work, const Channel<Hop>& channel, int32_t of_block,
                         int32_t index, int32_t count)
      : work_(work),
        channel_(channel),
        of_block_(of_block),
        index_(index),
        count_(count),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        num_nodes_(work.rail.at.num_nodes),
        is_of_node_(lane_ < num_nodes_ && lane_ != work.rail.node),
        own_rank_(work.rail.rank_of(work.rail.node, work.g.rank)) {
    if (is_of_node_) first_ = chunk_ = channel.chunks(lane_).received;
  }

  // False if the group is broken.
  __device__ bool run() {
    for (int32_t node = 0; node < num_nodes_; ++node) {
      if (node != work_.rail.node && !open(node)) return false;
    }
    for (int32_t node = 0; node < num_nodes_; ++node) {
      if (node != work_.rail.node && !leave(node)) return false;
    }
    for (int32_t batch = of_block_; batch < work_.num_batches(); batch += work_.warps.channels) {
      const int32_t first = work_.begin + batch * kTokensAtOnce;
      const int32_t end = min(first + kTokensAtOnce, work_.end);
      Choice next = choice_of(first, end);  // looked up a token before
      for (int32_t token = first; token < end; ++token) {
        const Choice choice = next;
        next = choice_of(token + 1, end);
        if (!add_up(token, batch, choice)) return false;
      }
    }
    if (index_ == 0 && is_of_node_) work_.shared.received[place_of(lane_)] = chunk_;
    return true;
  }

 private:
  __device__ uint64_t of_node(uint64_t value, int32_t node) const {
    return __shfl_sync(~0u, value, node);
  }
  // In what the block keeps by node and channel.
  __device__ int32_t place_of(int32_t node) const {
    return node * work_.warps.channels + of_block_;
  }

  // [R3] of the next chunk of a node.
  __device__ bool open(int32_t node) {
    ChunkHead head;
    if (!channel_.receive(node, of_node(chunk_, node), of_node(first_, node), head)) return false;
    if (lane_ == node) {
      row_ = 0;
      num_rows_ = static_cast<int32_t>(head.num_rows);
    }
    return true;
  }
  // [Q] Done with a node's chunk; [R4] by the last.
  __device__ bool leave(int32_t node) {
    const uint64_t chunk = of_node(chunk_, node);
    const auto slot = static_cast<int32_t>(chunk % static_cast<uint64_t>(work_.rail.at.num_slots));
    uint32_t num_left = 0;
    __syncwarp();
    if (lane_ == 0) {
      __threadfence_block();
      num_left = atomicAdd(&work_.shared.left[place_of(node)][slot], 1) + 1;
      __threadfence_block();
    }
    num_left = __shfl_sync(~0u, num_left, 0);
    if (lane_ == node) {
      ++chunk_;
      row_ = num_rows_ = 0;
    }
    return num_left % static_cast<uint32_t>(count_) != 0 || channel_.give_credit(node, chunk);
  }

  // A lane's (token, k).
  struct Choice {
    int32_t row, expert;
  };
  __device__ Choice choice_of(int32_t token, int32_t end) const {
    if (lane_ >= work_.a.top_k || token >= end) return {kNoRow, 0};
    const int64_t flat = token * work_.a.top_k + lane_;
    return {work_.a.send_row[flat], work_.a.topk_idx[flat]};
  }

  __device__ bool add_up(int32_t token, int32_t batch, const Choice& choice) {
    const CombineArguments& a = work_.a;
    const auto on_node = static_cast<int32_t>(a.num_local_experts) * work_.rail.ranks_per_node;
    // Where a lane's (token, k) has its row: the node, -1 if nowhere.
    const int32_t node_of_k = choice.row == kNoRow ? -1 : choice.expert / on_node;
    const uint32_t nodes = __reduce_or_sync(~0u, node_of_k < 0 ? 0 : 1u << node_of_k);
    const int32_t own_node = work_.rail.node;
    const uint32_t others = nodes & ~(1u << own_node);
    for (uint32_t left = others; left != 0; left &= left - 1) {
      const int32_t node = __ffs(static_cast<int>(left)) - 1;
      if (__shfl_sync(~0u, row_ == num_rows_, node) && !open(node)) return false;
    }
    if ((nodes >> own_node & 1) != 0 && !work_.await_unit(work_.unit_of(batch, own_rank_))) {
      return false;  // [P2]
    }
    char* landed = nullptr;  // of a lane's node: the head of the token's row
    if ((others >> lane_ & 1) != 0) {
      landed = work_.format.row_head(channel_.landing(lane_, chunk_), row_);
    }
    add_rows(token, nodes, others, reinterpret_cast<uint64_t>(landed));
    if (a.values != nullptr && index_ == 0) {
      collect(token, node_of_k, reinterpret_cast<uint64_t>(landed));
    }
    if ((others >> lane_ & 1) != 0) ++row_;
    for (uint32_t left = others; left != 0; left &= left - 1) {
      const int32_t node = __ffs(static_cast<int>(left)) - 1;
      if (__shfl_sync(~0u, row_ == num_rows_, node) && !leave(node)) return false;
    }
    return true;
  }

  // This summer's share of the token's row.
  __device__ void add_rows(int32_t token, uint32_t nodes, uint32_t others, uint64_t landed) const {
    const auto size = static_cast<int32_t>(work_.num_vectors());
    const int32_t stride = count_ * 32, own_node = work_.rail.node;
    const uint32_t ranks = (nodes >> own_node & 1) != 0 ? work_.ranks_with(own_node, token) : 0;
    const auto of_rank = [&](int32_t i) -> Addend {
      return {work_.scratch.partial(work_.own_scratch(), own_node, nth_bit(ranks, i), token), 1.0f};
    };
    const auto landed_of = [&](int32_t node) {
      return reinterpret_cast<const uint4*>(of_node(landed, node) + work_.format.row_head_bytes);
    };
    // On their way together: what one other node has sent, and this node's sum if one rank has it.
    const int32_t ahead = __ffs(static_cast<int>(others)) - 1;
    const uint4* const ahead_row = ahead >= 0 ? landed_of(ahead) : nullptr;
    const auto* const own_row =
        __popc(ranks) == 1 ? static_cast<const uint4*>(of_rank(0).row) : nullptr;
    auto* out = static_cast<uint4*>(work_.a.out) + int64_t{token} * size;
    for (int32_t first = index_ * 32; first < size; first += stride * kAtOnce) {
      const int32_t begin = first + lane_;
      uint4 of_ahead[kAtOnce] = {}, of_own[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = begin + j * stride;
        if (ahead_row != nullptr && i < size) of_ahead[j] = ahead_row[i];
        if (own_row != nullptr && i < size) of_own[j] = own_row[i];
      }
      if (own_row == nullptr && ranks != 0) {
        Sums<Vector, kAtOnce> own;
        own.add_up(begin, stride, size, __popc(ranks), of_rank);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) of_own[j] = own.rounded(j);
      }
      Sums<Vector, kAtOnce> total;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) total.clear(j);
      for (uint32_t left = nodes; left != 0; left &= left - 1) {
        const int32_t node = __ffs(static_cast<int>(left)) - 1;
        const uint4* const row = node == own_node || node == ahead ? nullptr : landed_of(node);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int32_t i = begin + j * stride;
          uint4 vector = node == own_node ? of_own[j] : of_ahead[j];
          if (row != nullptr && i < size) vector = row[i];
          total.add(j, vector);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = begin + j * stride;
        if (i < size) out[i] = total.rounded(j);
      }
    }
  }

  __device__ void collect(int32_t token, int32_t node_of_k, uint64_t landed) const {
    const uint64_t head = of_node(landed, max(node_of_k, 0));
    if (lane_ >= work_.a.top_k) return;
    float value = 0.0f;
    if (node_of_k == work_.rail.node) {
      value = work_.scratch.values(work_.own_scratch(), node_of_k, token)[lane_];
    } else if (node_of_k >= 0) {
      value = reinterpret_cast<const float*>(head)[lane_];
    }
    work_.a.collected[token * work_.a.top_k + lane_] = value;
  }

  const CombineWork& work_;
  const Channel<Hop>& channel_;
  const int32_t of_block_, index_, count_, lane_, num_nodes_;
  const bool is_of_node_;  // the lane has the state of the node of its number
  const int32_t own_rank_;
  uint64_t first_ = 0, chunk_ = 0;  // of the call, and the one that is read, or next
  int32_t row_ = 0, num_rows_ = 0;  // in that chunk: read, and all; 0 before it has come
};

template <typename Vector, typename Hop>
__global__ __launch_bounds__(kCombineThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ RailView rail,
                                                    const __grid_constant__ Hop hop,
                                                    const __grid_constant__ CombineArguments a,
                                                    int32_t rows_per_chunk) {
  constexpr OpKind kKind = OpKind::kCombine;
  extern __shared__ __align__(128) char stages[];
  __shared__ CombineShared shared;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t num_nodes = rail.at.num_nodes, num_ranks = num_nodes * rail.ranks_per_node;
  const CombineWarps warps = combine_warps(num_nodes);
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const auto num_units = [&](uint32_t block) {
    return CombineWork::num_batches_of(first_unit(a.num_tokens, block + 1) -
                                       first_unit(a.num_tokens, block)) *
           num_ranks;
  };
  const CombineWork work{
      g,
      rail,
      a,
      shared,
      warps,
      {num_nodes, rail.ranks_per_node, a.num_tokens, a.top_k, row_bytes, a.values != nullptr},
      combine_chunks(a.top_k, row_bytes, a.values != nullptr),
      first_unit(a.num_tokens, blockIdx.x),
      first_unit(a.num_tokens, blockIdx.x + 1),
      num_ranks};
  const bool is_claimed = claim_call(g, kKind);
  for (auto i = threadIdx.x; i < kMaxCombineNodes * kMaxCombineSlots; i += blockDim.x) {
    (&shared.left[0][0])[i] = 0;
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < warps.rank_summers + warps.node_summers; ++s) {
      for (int i = 0; i < warps.stages; ++i) mbarrier_init(&shared.stages[s].full[i], 1);
    }
    fence_mbarrier_init();
    shared.box = {{}, warps.rank_summers, num_units(blockIdx.x), 0, 1};
  }
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial), 0, 0, 0};
  if (blockIdx.x == 0) send_start(g, kKind, is_claimed, own);          // [S1]
  bool ok = receive_start(g, kKind, is_claimed, own, shared.address);  // [S2]
  if (ok) {
    if (warp == 0) {
      ok = run_messenger(g, kKind, shared.box);  // [P1], [P2]
    } else if (warp < warps.first_token_summer()) {
      sum_own_rows<Vector>(work, warp - 1, stages);
    } else {
      const bool is_for_tokens = warp < warps.first_node_summer();
      const int32_t index =
          warp - (is_for_tokens ? warps.first_token_summer() : warps.first_node_summer());
      const int32_t of_block = index % warps.channels, further = index / warps.channels;
      const Channel<Hop> channel(g, rail, hop, kKind, of_block);
      if (is_for_tokens) {
        const int32_t count = warps.token_summers / warps.channels;
        ok = TokenSummer<Vector, Hop>(work, channel, of_block, further, count).run();
      } else {
        const int32_t node = (rail.node + 1 + further) % num_nodes;
        const auto summer = work.summer<Vector>(warps.rank_summers + index, stages, nullptr);
        ok = NodeSummer<Vector, Hop>(work, channel, node, of_block, rows_per_chunk, summer).run();
      }
    }
  }
  // Others of the block have read it before.
  const bool is_good = __syncthreads_and(ok) != 0;
  const auto place = static_cast<int32_t>(threadIdx.x);
  const int32_t node = place / warps.channels, of_block = place % warps.channels;
  if (is_good && node < num_nodes && node != rail.node) {
    rail.chunks_of(node, static_cast<int32_t>(blockIdx.x) * warps.channels + of_block).received =
        shared.received[place];
  }
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  tell_other_nodes(g, hop);  // [T1]
  const Share share = fail_call(g, finish, num_units);
  fill(a.out, a.num_tokens * row_bytes, kNan, share);
  if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan, share);
}

template <typename Vector, typename Hop>
cudaError_t launch_combine(const GroupView& group, const RailView& view, const Hop& hop,
                           const CombineArguments& a, int num_sms, cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const ChunkFormat format = combine_chunks(a.top_k, row_bytes, a.values != nullptr);
  const int64_t rows_per_chunk = format.num_rows(view.at.slot_bytes);
  const int64_t num_ranks = int64_t{view.at.num_nodes} * view.ranks_per_node;
  const int32_t num_blocks = std::min(num_sms, view.at.max_blocks());
  if ((!a.expand && a.weights != nullptr) || row_bytes <= 0 || rows_per_chunk < 1 ||
      view.at.num_nodes < 2 || view.at.num_nodes > kMaxCombineNodes ||
      view.ranks_per_node > kMaxRanksOfNode || view.at.num_slots > kMaxCombineSlots ||
      num_blocks < 1 || num_blocks > kMaxBlocks || num_ranks > kMaxRailRanks ||
      (a.num_tokens + kTokensAtOnce) * num_ranks > kMaxUnitsPerBlock) {
    return cudaErrorInvalidValue;
  }
  combine_kernel<Vector, Hop>
      <<<static_cast<unsigned>(num_blocks), kCombineThreads, kCombineStageBytes, stream>>>(
          group, view, hop, a, static_cast<int32_t>(std::min<int64_t>(rows_per_chunk, INT32_MAX)));
  return cudaGetLastError();
}

}  // namespace rail

// On a layout of the whole group; a.partial is CombineScratch::num_bytes() of scratch; num_sms is that of
// all ranks. `view` is of another region than dispatch's.
template <typename Hop>
cudaError_t LaunchRailCombine(const GroupView& group, const RailView& view, const Hop& hop,
                              const CombineArguments& a, int num_sms, cudaStream_t stream) {
  switch (a.type) {
    case FloatType::kF32:
      return rail::launch_combine<F32Vector>(group, view, hop, a, num_sms, stream);
    case FloatType::kF16:
      return rail::launch_combine<F16Vector>(group, view, hop, a, num_sms, stream);
    case FloatType::kBF16:
      return rail::launch_combine<Bf16Vector>(group, view, hop, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Hop>
cudaError_t PrepareRailCombine() {
  for (auto* kernel : {rail::combine_kernel<F32Vector, Hop>, rail::combine_kernel<F16Vector, Hop>,
                       rail::combine_kernel<Bf16Vector, Hop>}) {
    if (cudaError_t e = PrepareKernel(kernel, rail::kCombineStageBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_RAIL_COMBINE_CUH_
