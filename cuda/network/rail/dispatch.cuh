// dispatch over rails: each rank's rows go to where their experts live, on other nodes in two hops.
// A row crosses the network once for each node that has an expert of it, to the rank of the same
// index there (its peer on the rail), which brings it to the ranks of that node.
// After:    as after cuda/direct/dispatch: tokens[row] = x of rank src [t] for every kept row,
//           (src, t, k) = recv_src[row]; padding is zero, the tail too if zero_tail; weights[row] =
//           topk_weights of src [t, k], else 0. To the bit, whatever ranks lie on which node.
//           Without `expand`, and with kScaled, as there, too.
// Roles:    blocks, all resident, as many on all ranks; block b has a b-th of each rank's tokens, which
//           meet the blocks b of other ranks alone. It has C = plan.channels channels to each node, of
//           which the c-th has every C-th of these tokens. num_pairs warps send, as many forward: the
//           i-th of either is for channel i % C, and of other nodes for those that are i / C + 1,
//           i / C + 1 + num_pairs / C, .. further round. num_own warps move what stays on the node.
//           Each warp, when it has nothing else to do, zeroes what holds no row. Then the first warp
//           tells the peers on the node, and hears them (messenger, progress.cuh).
// Buffers:  name            | lives on       | written by                   | read by
//           x, topk_weights | XLA, own       | before the call              | senders, movers of own
//           tokens, weights | XLA, each rank | forwarders and movers of own | later kernels
//                           |                | rows of this node, [S2]..[P1]; own warps (the rest)
//           staging         | hop's bytes    | senders, [R1]..[R2]          | the network
//           landing         | hop's bytes    | the network, up to [R3]      | forwarders, [R3]..[R4]
//           filled          | hop's signals, one a slot of landing: how often it has been filled
//           credit          | hop's signals: chunks that the peer on the rail has read
//           chunks          | own, one a pair and channel: chunks of earlier calls, both ways
//           stages          | shared memory  | loads of rows                | stores of rows
// Protocol: 1. On the node [S1] show tokens, weights and scales; [S2] wait for all.
//           2. Of a pair and channel, chunk c lies in slot c % S, as its use c / S + 1. It says what
//           call it is of, how many rows it holds, and whether it is the call's last; there is one at
//           least. A row has with it where it belongs on the node, its weights and its scales.
//           [R1] the sender waits until credit is above c - S
//           [R2] fills staging and sends it: put_signal, filled = the use
//           [R3] the forwarder waits until filled is the use, looks at the head, and loads the rows
//           from landing to its stages, from where it stores each to all its places on the node
//           [R4] when all rows have been loaded: one more to the sender's credit
//           3. When all warps of a block are through, and their stores are where they belong, the
//           block publishes one unit to the blocks b of the node's ranks, [P1], and waits for theirs,
//           [P2]. Of the rail's peers nobody waits for the end.
//           [L], [F] of stages: as in cuda/direct/dispatch/dispatch.cu; rail.h divides them.
// Proof:    Rows are whole: [R3] sees the use of c, which the sender sets with c's bytes alone, so by
//           [D] of hop.cuh they are there, and no later ones: those of c + S wait for [R4] of c. Their
//           loads follow a fence of the copy engine's proxy. `filled` is set by one warp, to values in
//           order, each after the answer to the one before ([R1]), as hop.cuh wants of a signal.
//           Rows are all there: a rank's row is written by a block of its node, as own, or when it
//           has come over the rail. That block has told with [P1] when its chunks of this call are
//           all forwarded, up to the last. A rank ends with [P2] of all blocks of all its node's
//           ranks, so then nobody writes to its memory any more, and all its rows are in it.
//           Staging and landing belong to no call, and what is in them when a rank's call has ended
//           is at the peer's disposal. So a rank may be a call behind its peer: that one then fills
//           what slots are free, and waits for credit.
// Reuse:    credit above c - S says that all chunks up to c - S have been read, for forwarders give it
//           in their order: the network has read staging and written landing of that slot ([C]), and
//           nothing of its last use is under way. A forwarder reads its warp's last from landing in
//           [R4]'s program order, and its copies from there have completed before. chunks: the block's
//           own, stored at a role's end for the next call on the stream.
// Progress: a sender waits for [S2] of its node, and for credit; a forwarder for [S2], and for chunks;
//           neither for a store to come to its end, but at its own. They are warps of their own, and
//           all blocks are resident, so a chunk that is sent is read, and credit comes back. With more
//           nodes than warps: senders and forwarders of distance d wait for those of d - num_pairs, of
//           whichever rank, so by induction all come to their turn. [P2] waits for roles alone.
//           A peer's first chunk comes when its whole node has come to the call ([S2]). A block has
//           one from each other node, so when its roles are through, every rank has come, and what it
//           still waits for is progress. Before, waits have the time that a rank may take to come.
// Failure:  rows and weights become NaN, integers 0; see give_up.cuh. What breaks is the node's group:
//           other nodes are told (cuda/network/tell.cuh). Final rows are written from this node
//           alone, and leave.cuh sees to those who do; late chunks come to landing. chunks and
//           signals no longer agree then: the group is set up anew with both of them zero before it
//           is used again.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses, and fit a slot with their head; they
//           cross as x has them (kCopy, kScaled); the same slots, their size and, in a call, blocks on
//           all ranks; at most kMaxRailRanks ranks.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_DISPATCH_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_DISPATCH_CUH_

#include <algorithm>

#include "cuda/direct/kernels.cuh"
#include "cuda/launch.h"
#include "cuda/network/rail/chunks.cuh"
#include "cuda/network/rail/forwarder.cuh"
#include "cuda/network/rail/rail.h"
#include "cuda/network/rail/row_mover.cuh"
#include "cuda/network/rail/sender.cuh"
#include "cuda/network/tell.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/start_end.cuh"

namespace jax_ep::gpu {
namespace rail {

// Whether a row of tokens that are not expanded is to be zeroed: one of a token that has none here,
// and the last one.
__device__ inline bool is_gap(const DispatchArguments& a, int64_t row) {
  if (row >= a.num_rows - 1) return row == a.num_rows - 1;
  return a.zero_tail && a.recv_offsets[row] == a.recv_offsets[row + 1];
}

// Zeros, by any warp; those of a block share its part.
__device__ inline void zero_rest(const DispatchArguments& a, Shared& shared) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  int32_t used = 0;
  if (!a.zero_tail) {
    for (int64_t e = lane; e < a.num_local_experts; e += 32) used += a.group_sizes[e];
    used = __reduce_add_sync(~0u, used);
  }
  const int64_t end = a.zero_tail ? a.capacity : used;
  const int64_t num_looked_at = a.expand ? end : max(end, a.num_rows);
  while (true) {
    uint32_t taken = 0;
    if (lane == 0) taken = atomicAdd(&shared.num_batches, 1);
    taken = __shfl_sync(~0u, taken, 0);
    const int64_t batch = (int64_t{taken} * gridDim.x + blockIdx.x) * kRowsAtOnce;
    if (batch >= num_looked_at) break;
    const int64_t row = batch + lane;
    const bool is_empty = row < end && a.recv_src[row] == kNoSource;
    if (is_empty && a.weights != nullptr) a.weights[row] = 0.0f;
    uint32_t empty = __ballot_sync(~0u, a.expand ? is_empty : is_gap(a, row));
    for (; empty != 0; empty &= empty - 1) {
      const int64_t zero_row = batch + __ffs(static_cast<int>(empty)) - 1;
      auto* at = reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + zero_row * a.row_bytes);
      for (int64_t i = lane; i < a.row_bytes / 16; i += 32) at[i] = uint4{0, 0, 0, 0};
      for (int64_t i = lane; i < a.num_scales; i += 32)
        a.scales[zero_row * a.num_scales + i] = 0.0f;
    }
  }
}

// A warp's role. False if the group is broken.
template <typename Hop>
__device__ bool run_role(const GroupView& g, const RailView& rail, const Hop& hop,
                         const DispatchArguments& a, const Plan& plan, Shared& shared,
                         char* stages) {
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t num_nodes = rail.at.num_nodes;
  const int32_t begin = first_unit(a.num_tokens, blockIdx.x);
  const int32_t end = first_unit(a.num_tokens, blockIdx.x + 1);
  const int32_t index = warp < plan.num_pairs ? warp : warp - plan.num_pairs;
  const int32_t of_block = index % plan.channels, first_distance = index / plan.channels + 1;
  const int32_t nodes_at_once = plan.num_pairs / plan.channels;
  const Channel<Hop> channel(g, rail, hop, OpKind::kDispatch, of_block);
  bool ok = true;
  if (warp < plan.num_pairs) {
    Sender<Hop> sender(channel, rail, a, plan);
    for (int32_t d = first_distance; d < num_nodes && ok; d += nodes_at_once) {
      ok = sender.send((rail.node + d) % num_nodes, begin + of_block, end, plan.channels);
    }
    return ok;
  }
  RowMover mover(plan, shared, index, stages);
  const Deliverer deliverer(a, shared, mover);
  if (index < plan.num_pairs) {
    Forwarder<Hop> forwarder(channel, a, plan, deliverer);
    for (int32_t d = first_distance; d < num_nodes && ok; d += nodes_at_once) {
      const int32_t node = (rail.node + num_nodes - d) % num_nodes;
      ok = forwarder.forward(node, rail.rank_of(node, g.rank));
    }
  } else {
    move_own_rows(g, rail, a, deliverer, begin + index - plan.num_pairs, end, plan.num_own);
  }
  mover.finish();
  return ok;
}

template <typename Hop>
__global__ __launch_bounds__(kMaxThreads,
                             1) void dispatch_kernel(const __grid_constant__ GroupView g,
                                                     const __grid_constant__ RailView rail,
                                                     const __grid_constant__ Hop hop,
                                                     const __grid_constant__ DispatchArguments a,
                                                     const __grid_constant__ Plan plan) {
  constexpr OpKind kKind = OpKind::kDispatch;
  extern __shared__ __align__(128) char stages[];
  __shared__ Shared shared;
  const bool is_claimed = claim_call(g, kKind);
  if (threadIdx.x == 0) {
    for (int s = 0; s < plan.num_movers() * plan.num_stages; ++s) mbarrier_init(&shared.full[s], 1);
    fence_mbarrier_init();
    shared.num_batches = 0;
    shared.box = {{}, 1, 1, 0, 1};  // one unit, of one mover: the block
  }
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.tokens),
                                       reinterpret_cast<uint64_t>(a.weights),
                                       reinterpret_cast<uint64_t>(a.scales), 0};
  if (blockIdx.x == 0) send_start(g, kKind, is_claimed, own);          // [S1]
  bool ok = receive_start(g, kKind, is_claimed, own, shared.address);  // [S2]
  if (ok) ok = run_role(g, rail, hop, a, plan, shared, stages);
  if (ok) zero_rest(a, shared);
  ok = __syncthreads_and(ok) != 0;
  if (ok && threadIdx.x < 32) {
    if (threadIdx.x == 0) st_release_cta_shared(&shared.box.written[0], 1);
    __syncwarp();
    ok = run_messenger(g, kKind, shared.box);  // [P1], [P2]
  }
  const Finish finish = finish_block(g, kKind, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  tell_other_nodes(g, hop);  // [T1]
  const Share share = fail_call(g, finish, [](uint32_t) { return 1; });
  fill(a.tokens, a.num_rows * a.row_bytes, a.is_integer ? 0 : kNan, share);
  fill(a.scales, a.num_rows * a.num_scales * 4, kNan, share);
  if (a.weights != nullptr) fill(a.weights, a.capacity * 4, kNan, share);
}

}  // namespace rail

// On a layout of the whole group; num_sms and max_nodes, that a block serves at once, are those of all
// ranks.
template <typename Hop>
cudaError_t LaunchRailDispatch(const GroupView& group, const RailView& view, const Hop& hop,
                               const DispatchArguments& a, int num_sms, cudaStream_t stream,
                               int32_t max_nodes = rail::kMaxPairs) {
  const ChunkFormat format =
      dispatch_chunks(a.top_k, WireRowBytes(a.row_bytes, a.num_channels, a.num_scales));
  rail::Plan plan;
  const bool is_verbatim = a.mode == DispatchMode::kCopy || a.mode == DispatchMode::kScaled;
  const int32_t num_blocks = std::min(num_sms, view.at.max_blocks());
  if (!is_verbatim || a.landing != nullptr || num_blocks < 1 || num_blocks > kMaxBlocks ||
      view.ranks_per_node * view.at.num_nodes > kMaxRailRanks ||
      !rail::MakePlan(view.at, format, a.row_bytes, max_nodes, &plan)) {
    return cudaErrorInvalidValue;
  }
  rail::dispatch_kernel<Hop>
      <<<static_cast<unsigned>(num_blocks), static_cast<unsigned>(plan.num_warps() * 32),
         rail::kStageBytes, stream>>>(group, view, hop, a, plan);
  return cudaGetLastError();
}

template <typename Hop>
cudaError_t PrepareRailDispatch() {
  return PrepareKernel(rail::dispatch_kernel<Hop>, rail::kStageBytes);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_RAIL_DISPATCH_CUH_
