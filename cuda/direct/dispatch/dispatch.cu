// dispatch: each rank writes its tokens' rows to where their experts live.
// After:    tokens[row] = x of rank src [t] for every kept row, (src, t, k) = recv_src[row];
//           padding is zero, the tail too if zero_tail; weights[row] = topk_weights of src [t, k],
//           else 0.
//           Without `expand`: tokens[src * T + t] = x of rank src [t] where any of its rows was
//           kept, tokens[R * T] = 0, the others zero if zero_tail; weights as ever.
//           With fp8, x crosses as float8_e4m3fn with a scale per 128 channels, as
//           jax_ep/reference_fp8.py's quantize defines them: tokens and scales are those, or, with
//           kDequantize, tokens are their products in x's type. With kScaled x is float8 and has
//           scales: they cross together, scales[row] = x_scales of src [t].
//           With kWeighted, which is the gradient of combine: tokens[row] = round(row_weights[row] *
//           x of src [t]), dots[row] = sum over channels of y[row] * x of src [t], 0 if it holds no
//           row; all in f32.
// Roles:    one block an SM, or fewer, if they have nothing to do; 6 warps, 12 with fp8, 8 with
//           kScaled, 18 with kWeighted. The first ones, senders and then receivers, run a ring of
//           stages each; with kWeighted each has helpers, which share the channels of its rows and
//           form products and sums. Senders load (or quantise) each of the rank's own tokens once
//           and store it to its rows here, and to one row at each other rank that has any: the
//           first of them, or a row of the landing area. From there a receiver of that rank fetches
//           it and stores it to the token's other rows (to all, if they differ from what has
//           crossed; there are no receivers where nothing is left to do, as with one row a token
//           that has crossed to its place). Then come a warp that sends the weights and the
//           messenger, which talks to the peers. All others, when they have nothing else to do,
//           zero what holds no row. A unit is a piece of a token's row; sender m of n has the units
//           m, m + n, .. of its block, receivers likewise. Block b has the same units on every
//           rank, so it only ever meets the blocks b of the peers. Of shared units (kShared) a
//           block sends what crosses; the rows that stay here are stored by whichever sender is
//           free, which loads the token again.
// Buffers:  name            | lives on       | written by                     | read by
//           x, x_scales,    | XLA, own       | before the call                | own senders
//             topk_weights  |                |                                |
//           tokens, weights,| XLA, each rank | peers' senders, [S2]..[P1]     | receivers, [P2], what
//             scales        |                | (one row a token, weights,     | peers wrote; later
//                           |                | scales); own warps (the rest)  | kernels
//           landing         | each rank      | peers' senders, [S2]..[P1]     | receivers, [P2]
//           stages          | shared memory  | ring's loads; sums over a      | ring's stores,
//                           |                | helper's channels: the helper  | helpers
// Protocol: 1. [S1] show tokens, weights, scales, landing; [S2] wait for all.
//           2. Senders store their units, receivers those that have arrived.
//           3. [P1] when units are written at the peers, the block publishes to the peers' blocks
//           how many, the last one when the weights are; [P2] a receiver knows the count before it
//           fetches a unit. A block ends when it has published all and all has arrived.
//           In a ring, unit n uses stage n % S: [L] its load completes the stage's barrier (phase
//           n / S), [F] its stores have read the stage before unit n + S is loaded; [M] the helpers
//           are through with unit n before unit n + 1 counts as stored.
//           plan.h divides the shared memory, shared.cuh is what its warps share, ring.cuh the stages,
//           sender.cuh and receiver.cuh who fills and empties them; the rings know nothing of what a
//           row becomes: those are the codecs of cuda/rows/.
// Reuse:    no memory outlives the call but the control block, whose progress only grows.
// Progress: senders wait for [S2] and their helpers, which wait for loads alone; receivers also for
//           the peers' senders of the same block. Blocks of a grid do not wait for each other (who
//           has taken a shared unit stores it, and waits for nobody), and begin in order, so fewer
//           SMs than blocks will do.
// Failure:  a timeout fills tokens, scales, weights and dots with NaN, integers with 0; see
//           give_up.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; longer ones than a stage go in
//           pieces; at most kMaxUnitsPerBlock units a block; with fp8 at most kMaxFp8Channels, with
//           kScaled and kWeighted at most kMaxScaledRowBytes and kMaxWeightedRowBytes, and no pieces.
#include <algorithm>
#include <type_traits>

#include "cuda/core/placement.h"
#include "cuda/direct/dispatch/plan.h"
#include "cuda/direct/dispatch/receiver.cuh"
#include "cuda/direct/dispatch/ring.cuh"
#include "cuda/direct/dispatch/sender.cuh"
#include "cuda/direct/dispatch/shared.cuh"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/dequantized_rows.cuh"
#include "cuda/rows/quantized_rows.cuh"
#include "cuda/rows/scaled_rows.cuh"
#include "cuda/rows/weighted_rows.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/start_end.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {
namespace {

using namespace dispatch;

// Stores the weights of a block's tokens, at the units that begin them; by a warp.
template <typename Rows>
__device__ void send_weights(const DispatchArguments& a, const Plan& plan, Shared<Rows>& shared,
                             int32_t first_unit) {
  const int64_t end_unit = first_unit + shared.box.num_units;
  const int64_t begin = (first_unit + plan.num_pieces - 1) / plan.num_pieces * a.top_k;
  const int64_t end = (end_unit + plan.num_pieces - 1) / plan.num_pieces * a.top_k;
  const auto num_local = static_cast<int32_t>(a.num_local_experts);
#pragma unroll 4
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) % 32; i < end; i += 32) {
    const int32_t row = a.send_row[i], expert = a.topk_idx[i];
    const float weight = a.topk_weights[i];
    if (row != kNoRow)
      reinterpret_cast<float*>(shared.address[expert / num_local][kWeights])[row] = weight;
  }
  set_values_written(shared.box);
}

// Whether a row of tokens that are not expanded is to be zeroed: one of a token that has none here,
// and the last one.
__device__ inline bool is_gap(const DispatchArguments& a, int64_t row) {
  if (row >= a.num_rows - 1) return row == a.num_rows - 1;
  return a.zero_tail && a.recv_offsets[row] == a.recv_offsets[row + 1];
}

// Zeros, by any warp; those of a block share its part.
template <typename Rows>
__device__ void zero_rest(const DispatchArguments& a, Shared<Rows>& shared) {
  timeline::mark(Role::kZeroer, Event::kStart);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int64_t row_bytes = Rows::tokens_row_bytes(a);
  const int64_t num_scales = Rows::num_scales(a);
  int32_t used = 0;
  if (!a.zero_tail) {
    for (int64_t e = lane; e < a.num_local_experts; e += 32) used += a.group_sizes[e];
    used = __reduce_add_sync(0xffffffffu, used);
  }
  const int64_t end = a.zero_tail ? a.capacity : used;
  const int64_t last = a.dots != nullptr ? a.capacity : end;
  const int64_t num_looked_at = a.expand ? last : max(last, a.num_rows);
  while (true) {
    uint32_t taken = 0;
    if (lane == 0) taken = atomicAdd(&shared.num_batches, 1);
    taken = __shfl_sync(0xffffffffu, taken, 0);
    const int64_t batch = (int64_t{taken} * gridDim.x + blockIdx.x) * kRowsAtOnce;
    if (batch >= num_looked_at) break;
    const int64_t row = batch + lane;
    const bool is_empty = row < last && a.recv_src[row] == kNoSource;
    if (is_empty && a.dots != nullptr) a.dots[row] = 0.0f;
    if (is_empty && row < end && a.weights != nullptr) a.weights[row] = 0.0f;
    const bool is_zero = a.expand ? is_empty && row < end : is_gap(a, row);
    uint32_t empty = __ballot_sync(0xffffffffu, is_zero);
    for (; empty != 0; empty &= empty - 1) {
      const int64_t zero_row = batch + __ffs(static_cast<int>(empty)) - 1;
      auto* at = reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + zero_row * row_bytes);
      for (int64_t i = lane; i < row_bytes / 16; i += 32) at[i] = uint4{0, 0, 0, 0};
      for (int64_t i = lane; i < num_scales; i += 32) a.scales[zero_row * num_scales + i] = 0.0f;
    }
  }
  timeline::mark(Role::kZeroer, Event::kEnd);
}

template <typename Rows>
constexpr OpKind kOpKind =
    std::is_same_v<Rows, WeightedRows> ? OpKind::kCombineGradient : OpKind::kDispatch;

template <typename Rows>
__global__ __launch_bounds__(kNumThreads<Rows>,
                             1) void dispatch_kernel(const __grid_constant__ GroupView g,
                                                     const __grid_constant__ DispatchArguments a,
                                                     const __grid_constant__ Plan plan) {
  constexpr int kNumHelpers = Rows::kFormat.num_helpers;
  extern __shared__ __align__(128) char rings[];
  __shared__ Shared<Rows> shared;
  timeline::begin();
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t num_rings = plan.num_senders + plan.num_receivers;
  const int64_t num_units = a.num_tokens * plan.num_pieces;
  const int32_t first = first_unit(num_units, blockIdx.x);
  const int32_t num_own = first_unit(num_units, blockIdx.x + 1) - first;
  const bool is_claimed = claim_call(g, kOpKind<Rows>);
  if (threadIdx.x == 0) {
    for (int s = 0; s < num_rings * plan.num_stages; ++s) {
      mbarrier_init(&shared.full[s], 1);
      if (kNumHelpers > 0) mbarrier_init(&shared.computed[s], kNumHelpers);
    }
    fence_mbarrier_init();
    shared.num_batches = 0;
    shared.box = {{}, plan.num_senders, num_own, 0, a.weights == nullptr};
  }
  const auto tokens = reinterpret_cast<uint64_t>(a.tokens);
  const auto weights = reinterpret_cast<uint64_t>(a.weights);
  const auto scales = reinterpret_cast<uint64_t>(a.scales);
  const uint64_t own[kNumAddresses] = {tokens, weights, scales, 0};
  if (blockIdx.x == 0) {
    const uint64_t shown[kNumAddresses] = {a.landing != nullptr ? 0 : tokens, weights, scales,
                                           reinterpret_cast<uint64_t>(a.landing)};
    send_start(g, kOpKind<Rows>, is_claimed, shown);  // [S1]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
  }
  bool ok = num_own > 0 ? receive_start(g, kOpKind<Rows>, is_claimed, own, shared.address)  // [S2]
                        : __syncthreads_and(is_claimed) != 0;
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
  if (ok && num_own > 0) {
    const int32_t slot = warp / kWarpsOfRing<Rows>, part = warp % kWarpsOfRing<Rows>;
    char* memory = rings + slot * RingBytes(num_rings);
    if (slot < num_rings && part > 0) {
      Ring<Rows>(g, a, plan, shared, 0, 1, slot, first, memory).help(part - 1);
    } else if (slot < plan.num_senders) {
      Sender<Rows>(g, a, plan, shared, slot, first, memory).run();
    } else if (slot < num_rings) {
      ok = Receiver<Rows>(g, a, plan, shared, slot - plan.num_senders, first, memory).run();
    } else if (warp == kMessenger<Rows>) {
      ok = run_messenger(g, kOpKind<Rows>, shared.box);
      timeline::mark(Role::kMessenger, Event::kEnd);
    } else if (warp == kWeightSender<Rows> && a.weights != nullptr) {
      send_weights(a, plan, shared, first);
    }
  }
  if (ok && warp != kMessenger<Rows>) zero_rest<Rows>(a, shared);
  timeline::end(g, kOpKind<Rows>);
  const Finish finish = finish_block(g, kOpKind<Rows>, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  const Share share = fail_call(g, finish, [&](uint32_t block) {
    return first_unit(num_units, block + 1) - first_unit(num_units, block);
  });
  fill(a.tokens, a.num_rows * Rows::tokens_row_bytes(a), a.is_integer ? 0 : kNan, share);
  fill(a.scales, a.num_rows * Rows::num_scales(a) * 4, kNan, share);
  if (a.weights != nullptr) fill(a.weights, a.capacity * 4, kNan, share);
  if (a.dots != nullptr) fill(a.dots, a.capacity * 4, kNan, share);
}

template <typename Rows>
cudaError_t Launch(const GroupView& group, const DispatchArguments& a, int num_sms,
                   cudaStream_t stream) {
  const Sizes sizes{a.num_tokens,
                    a.expand ? a.top_k : 1,
                    WireRowBytes(a.row_bytes, a.num_channels, a.num_scales),
                    group.num_ranks,
                    num_sms,
                    a.landing != nullptr};
  Plan plan;
  if (!MakePlan(Rows::kFormat, sizes, &plan)) return cudaErrorInvalidValue;
  const int32_t num_blocks =
      NumBlocks(a.num_tokens * plan.num_pieces, std::max(a.capacity, a.num_rows), num_sms);
  dispatch_kernel<Rows>
      <<<static_cast<unsigned>(num_blocks), kNumThreads<Rows>, kRingBytes, stream>>>(group, a,
                                                                                     plan);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& a, int num_sms,
                           cudaStream_t stream) {
  switch (a.mode) {
    case DispatchMode::kCopy:
      return Launch<CopyRows>(group, a, num_sms, stream);
    case DispatchMode::kQuantize:
      return Launch<QuantizedRows>(group, a, num_sms, stream);
    case DispatchMode::kDequantize:
      return Launch<DequantizedRows>(group, a, num_sms, stream);
    case DispatchMode::kScaled:
      return Launch<ScaledRows>(group, a, num_sms, stream);
    case DispatchMode::kWeighted:
      return Launch<WeightedRows>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareDispatch() {
  for (auto* kernel :
       {dispatch_kernel<CopyRows>, dispatch_kernel<QuantizedRows>, dispatch_kernel<DequantizedRows>,
        dispatch_kernel<ScaledRows>, dispatch_kernel<WeightedRows>}) {
    if (cudaError_t e = PrepareKernel(kernel, kRingBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
