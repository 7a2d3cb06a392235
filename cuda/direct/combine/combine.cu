// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
//           Without `expand`, y is as dispatch's tokens without it, and the row of rank src's t on
//           r, if any was kept, is y[src * T + t]: the inner sum is of that one, with weight 1.
// Roles:    one block an SM, 19 warps in two pipelines: one sums for the peers, one adds up this
//           rank's own tokens, and the first helps the second when it is done. Each has a loader,
//           which fetches what is to be added by bulk copies into a ring of stages, job by job, and
//           seven warps of adders, which add job after job in registers. Own results go straight to
//           memory; sums for peers go to a ring of results, from where the storer has them copied.
//           The scout finds out what is to be added, 32 sums at a time, and sends values to where
//           they are collected; the messenger talks to the peers. A unit is a piece of a token's
//           row. Block b has the same units on every rank, so it only ever meets the blocks b of the
//           peers.
// Buffers:  name                   | lives on       | written by              | read by
//           y                      | XLA, own       | before the call         | loaders
//           weights, values        | XLA, own       | before the call         | scout
//           partial [R, T, H]      | XLA, each rank | storers of rank r,      | own loaders, [P2]
//             (partial[r]: from r) |                | [S2]..[P1]              |
//           collected              | XLA, each rank | scouts, [S2]..[P1]      | later kernels
//           out                    | XLA, own       | own adders              | later kernels
//           stages, results, tables| shared memory  | see [L] [F] [W] [D] [T] [U]
// Protocol: 1. [S1] show partial and collected, [S2] wait for all.
//           2. Unit by unit, a block sums its own rows of every peer's token into that peer's
//           partial; beside that, as soon as all peers have done a unit, it adds up that unit of its
//           own tokens, with what they have sent.
//           3. [P1] when sums are stored, the block publishes to the peers' blocks how many units
//           are, the last one when values are too; [P2] a loader knows the count before it fetches
//           them. A block ends when it has published all and all has arrived.
//           In the block: [T] a table is filled, [U] all its sums are added up; [L] a job's rows are
//           loaded (its barrier's phase), [F] all adders have read them; [W] a result is written,
//           [D] the copy engine has read it.
//           plan.h divides rows and shared memory, shared.cuh is what the warps share; scout.cuh,
//           loader.cuh and adder.cuh are theirs, the storer's is here.
// Reuse:    partial is the call's own scratch. Progress is epoch and count, so it only grows.
// Progress: sums for peers wait only for [S2]; an own sum waits for peers' sums of the same unit,
//           which wait for nothing of it. Blocks of a grid do not wait for each other, and begin in
//           order, so fewer SMs than blocks will do.
// Failure:  a timeout fills out and collected with NaN; see give_up.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; K <= 32; at most kMaxUnitsPerBlock
//           units a block; compiled without -ftz, -fmad=false.
#include "cuda/direct/combine/adder.cuh"
#include "cuda/direct/combine/loader.cuh"
#include "cuda/direct/combine/plan.h"
#include "cuda/direct/combine/scout.cuh"
#include "cuda/direct/combine/shared.cuh"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/quantize.h"
#include "cuda/rows/row_types.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/start_end.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {
namespace {

using namespace combine;

constexpr int kUnread = 1;     // newest results that may still be read
constexpr int kPatience = 32;  // looks for a result before a pause is used

// The storer, by one thread: has sums for peers copied to them, and publishes that, but for the newest
// kUnpublished ones.
template <int kUnpublished>
__device__ void run_storer(const Plan& plan, Shared& shared, const char* results) {
  int32_t done[kUnpublished] = {};  // of the newest: units that are done with them
  int32_t stored = 0, published = 0;
  const auto publish = [&](int32_t num_units) {
    if (num_units <= published) return;
    published = num_units;
    st_release_cta_shared(&shared.box.written[0], num_units);  // then [P1]
  };
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kNumResults, use = n / kNumResults;
    for (int i = 0; !mbarrier_test_wait_parity(&shared.written[slot], use & 1); ++i) {  // [W]
      if (i < kPatience || stored == published) continue;
      bulk_wait_group<0>();  // nothing to do meanwhile
      publish(stored);
    }
    const Result result = shared.result[slot];
    if (result.bytes != 0) {
      bulk_store(reinterpret_cast<void*>(result.to), results + slot * plan.piece_bytes,
                 result.bytes);
    }
    bulk_commit_group();
    timeline::mark(Role::kStorer, Event::kStore);
    stored = result.units_done;
    bulk_wait_group_read<kUnread>();
    if (n >= kUnread) mbarrier_arrive(&shared.drained[(n - kUnread) % kNumResults]);  // [D]
    if (done[0] > published) bulk_wait_group<kUnpublished>();
    publish(done[0]);
#pragma unroll
    for (int i = 0; i + 1 < kUnpublished; ++i) done[i] = done[i + 1];
    done[kUnpublished - 1] = stored;
    if (result.bytes != 0) continue;
    bulk_wait_group<0>();
    timeline::mark(Role::kStorer, Event::kEnd);
    return publish(stored);
  }
}

template <typename Vector, bool kWeighted>
__global__ __launch_bounds__(kNumThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ CombineArguments a,
                                                    const __grid_constant__ Plan plan) {
  extern __shared__ __align__(128) char ring[];
  __shared__ Shared shared;
  timeline::begin();
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int64_t num_units = a.num_tokens * plan.num_pieces;  // of the grid
  const int32_t first = first_unit(num_units, blockIdx.x);
  const int32_t end = first_unit(num_units, blockIdx.x + 1);
  const Work work{g, a, plan, a.num_channels * (16 / Vector::kCount), first, end - first};
  const SumTables tables(ring, static_cast<int32_t>(a.top_k));
  char* results = ring + TablesBytes(a.top_k);
  const auto stages_of = [&](PipelineIndex pipeline) {
    return results + (kNumResults + pipeline * plan.num_stages) * plan.piece_bytes;
  };
  Scout scout(work, shared, tables);
  if (threadIdx.x == 0) {
    for (const int kind : {kForPeers, kOwn}) {
      for (int i = 0; i < kNumTables; ++i) {
        mbarrier_init(&shared.filled[kind][i], 1);
        mbarrier_init(&shared.used[kind][i], kTableSums * kAdderWarps);
      }
      for (int i = 0; i < kNumJobs; ++i) {
        mbarrier_init(&shared.pipeline[kind].full[i], 1);
        mbarrier_init(&shared.pipeline[kind].empty[i], kAdderWarps);
      }
    }
    for (int i = 0; i < kNumResults; ++i) {
      mbarrier_init(&shared.written[i], kAdderWarps);
      mbarrier_init(&shared.drained[i], 1);
    }
    fence_mbarrier_init();
    shared.next_own = 0;
    shared.box = {{}, 1, work.num_units, 0, a.values == nullptr};
  }
  __syncthreads();
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected)};
  const bool is_claimed = claim_call(g, OpKind::kCombine);
  if (blockIdx.x == 0) {
    send_start(g, OpKind::kCombine, is_claimed, own);  // [S1]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
  }
  if (warp == kScout) scout.begin();
  bool ok = receive_start(g, OpKind::kCombine, is_claimed, own, shared.address);  // [S2]
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
  if (ok) {
    if (warp < 2 * kAdderWarps) {
      const PipelineIndex pipeline = warp < kAdderWarps ? kPeersFirst : kOwnOnly;
      const char* rows = stages_of(pipeline);
      uint32_t n = 0;
      if (pipeline == kPeersFirst) {
        n = run_adder<Vector, kForPeers, kWeighted>(pipeline, work, shared, tables, rows, results,
                                                    n);
      }
      run_adder<Vector, kOwn, kWeighted>(pipeline, work, shared, tables, rows, results, n);
    } else if (warp < kStorer) {
      const PipelineIndex pipeline = warp == kLoaders ? kPeersFirst : kOwnOnly;
      Loader loader(pipeline, work, shared, tables, stages_of(pipeline));
      if (pipeline == kPeersFirst) loader.sum_for_peers();
      loader.add_up_own();
    } else if (warp == kStorer) {
      if (threadIdx.x == kStorer * 32) {
        // Enough are under way to hide how long a store takes; no more, so that peers hear soon.
        if (work.num_units >= 64) {
          run_storer<12>(plan, shared, results);
        } else {
          run_storer<1>(plan, shared, results);
        }
      }
    } else if (warp == kMessenger) {
      ok = run_messenger(g, OpKind::kCombine, shared.box);
      timeline::mark(Role::kMessenger, Event::kEnd);
    } else {
      scout.run();
    }
  }
  timeline::end(g, OpKind::kCombine);
  const Finish finish = finish_block(g, OpKind::kCombine, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd) return end_call(g);
  const Share share = fail_call(g, finish, [&](uint32_t block) {
    return first_unit(num_units, block + 1) - first_unit(num_units, block);
  });
  fill(a.out, a.num_tokens * work.row_bytes, kNan, share);
  if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan, share);
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  Plan plan;
  int32_t num_blocks;
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  if (!MakePlan(a.num_tokens, a.top_k, row_bytes, num_sms, &plan, &num_blocks)) {
    return cudaErrorInvalidValue;
  }
  auto* kernel =
      a.weights != nullptr ? combine_kernel<Vector, true> : combine_kernel<Vector, false>;
  kernel<<<num_blocks, kNumThreads, kRingBytes, stream>>>(group, a, plan);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& a, int num_sms,
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

cudaError_t PrepareCombine() {
  for (auto* kernel : {combine_kernel<F32Vector, false>, combine_kernel<F32Vector, true>,
                       combine_kernel<F16Vector, false>, combine_kernel<F16Vector, true>,
                       combine_kernel<Bf16Vector, false>, combine_kernel<Bf16Vector, true>}) {
    if (cudaError_t e = PrepareKernel(kernel, kRingBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t PrepareKernels() {
  if (cudaError_t e = PrepareLayout(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareDispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareCombine(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareLayoutAndDispatchInSlots(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareCombineInSlots(); e != cudaSuccess) return e;
  return PrepareQuantize();
}

}  // namespace jax_ep::gpu
