// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
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
//           3. [P1] when sums are stored, the block tells the peers' blocks how many units are
//           there, the last one when values are too; [P2] a loader knows the count before it fetches
//           them. A block ends when it has told all and knows all.
//           In the block: [T] a table is filled, [U] all its sums are added up; [L] a job's rows are
//           loaded (its barrier's phase), [F] all adders have read them; [W] a result is written,
//           [D] the copy engine has read it.
// Reuse:    partial is the call's own scratch. Progress is epoch and count, so it only grows.
// Progress: sums for peers wait only for [S2]; an own sum waits for peers' sums of the same unit,
//           which wait for nothing of it. Blocks of a grid do not wait for each other, and begin in
//           order, so fewer SMs than blocks will do.
// Failure:  a timeout fills out and collected with NaN; see give_up.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; K <= 32; at most kMaxUnitsPerBlock
//           units a block; compiled without -ftz, -fmad=false.
#include "cuda/direct/combine/scout.cuh"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/start_end.cuh"

namespace jax_ep::gpu {
namespace {

using namespace combine;

// Fetches what the adders of one pipeline add up.
class Loader {
 public:
  __device__ Loader(Kind pipeline, const Work& work, Shared& shared, const Tables& tables,
                    char* stages)
      : work_(work),
        shared_(shared),
        pipeline_(shared.pipeline[pipeline]),
        tables_(tables),
        stages_(stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(work.a.top_k)),
        piece_bytes_(work.cut.piece_bytes),
        num_stages_(work.cut.num_stages),
        max_rows_(min(kMaxJobRows, num_stages_)),
        free_stages_(num_stages_) {}

  // Both end with a job that tells the adders.
  __device__ void sum_for_peers() {
    const int32_t num_sums = work_.num_sums(kForPeers);
    for (int32_t sum = 0; sum < num_sums; ++sum) {
      wait_for_table(kForPeers, sum);
      if (tables_.head[kForPeers][Tables::entry(sum)].count > 0) {
        fetch(kForPeers, sum);
      } else {
        pass(kForPeers, sum);
      }
    }
    stop();
  }
  // What the other loader does not take.
  __device__ void add_up_own() {
    int32_t there = work_.g.num_ranks == 1 ? work_.num_steps : 0;
    while (true) {
      int32_t step = 0;
      if (lane_ == 0) step = atomicAdd(&shared_.next_own, 1);
      step = __shfl_sync(0xffffffffu, step, 0);
      if (step >= work_.num_steps) return stop();
      if (step >= there) there = wait_until_arrived(shared_.box, step);  // [P2]
      wait_for_table(kOwn, step);
      if (there != kBroken) {
        fetch(kOwn, step);
      } else {
        pass(kOwn, step);
      }
    }
  }

 private:
  // Until the scout has found a sum's rows. Nobody is two uses of a table's memory behind: sums are
  // taken in order, and a table is filled again only when all of its sums are added up.
  __device__ void wait_for_table(Kind kind, int32_t sum) {
    const int32_t table = sum / kTableSums;
    if (table == table_[kind]) return;
    wait_phase(&shared_.filled[kind][table % kNumTables], table / kNumTables);  // [T]
    table_[kind] = table;
  }

  // For a sum that the adders do not see. The scout fills all tables, whatever becomes of the call.
  __device__ void pass(Kind kind, int32_t sum) {
    __syncwarp();  // all lanes have read the entry
    if (lane_ == 0) {
      mbarrier_arrive(&shared_.used[kind][sum / kTableSums % kNumTables], kAdderWarps);  // [U]
    }
  }

  // Waits for a job's slot, and for stages. [F]
  __device__ void reserve(int32_t count) {
    while (free_stages_ < count || next_job_ - oldest_job_ == kNumJobs) {
      const uint32_t slot = oldest_job_ % kNumJobs;
      wait_phase(&pipeline_.empty[slot], oldest_job_ / kNumJobs);
      free_stages_ += static_cast<int32_t>(num_rows_ >> (2 * slot) & 3);
      ++oldest_job_;
    }
    free_stages_ -= count;
    const uint32_t slot = next_job_ % kNumJobs;
    num_rows_ = (num_rows_ & ~(3u << (2 * slot))) | static_cast<uint32_t>(count) << (2 * slot);
  }

  // Passes jobs with a sum's rows on, by the whole warp.
  __device__ void fetch(Kind kind, int32_t sum) {
    const int32_t entry = Tables::entry(sum);
    const SumHead& head = tables_.head[kind][entry];
    const int32_t count = head.count;
    const uint32_t bytes = head.bytes;
    const uint64_t source = lane_ < count ? tables_.source[kind][entry * top_k_ + lane_] : 0;
    __syncwarp();  // all lanes have read the entry
    int32_t first = 0;
    do {
      const int32_t num_rows = min(count - first, max_rows_);
      reserve(num_rows);
      uint64_t* full = &pipeline_.full[next_job_ % kNumJobs];
      if (lane_ == 0) {
        pipeline_.job[next_job_ % kNumJobs] = {sum, first, num_rows, stage_};
        mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(num_rows) * bytes);
      }
      const int32_t i = lane_ - first;
      if (i >= 0 && i < num_rows) {
        int32_t stage = stage_ + i;
        if (stage >= num_stages_) stage -= num_stages_;
        bulk_load(stages_ + stage * piece_bytes_, reinterpret_cast<const void*>(source), bytes,
                  full);  // [L]
      }
      ++next_job_;
      stage_ += num_rows;
      if (stage_ >= num_stages_) stage_ -= num_stages_;
      first += num_rows;
    } while (first < count);
  }

  __device__ void stop() {
    reserve(0);
    if (lane_ == 0) {
      pipeline_.job[next_job_ % kNumJobs] = {kStop, 0, 0, 0};
      mbarrier_arrive(&pipeline_.full[next_job_ % kNumJobs]);
    }
    ++next_job_;
  }

  const Work& work_;
  Shared& shared_;
  Pipeline& pipeline_;
  const Tables& tables_;
  char* const stages_;
  const int32_t lane_, top_k_, piece_bytes_, num_stages_, max_rows_;
  int32_t stage_ = 0, free_stages_;         // the next one, and how many are free from there on
  uint32_t next_job_ = 0, oldest_job_ = 0;  // in flight: [oldest, next)
  uint32_t num_rows_ = 0;                   // of each slot's job, two bits
  int32_t table_[2] = {-1, -1};             // by kind: the newest one
};

// Adds up what the loader fetches, in the order in which it does, from the pipeline's job n on. Ends
// with a job that tells it to, and returns the number of the next one.
template <typename Vector, Kind kKind>
__device__ uint32_t run_adder(Kind of_pipeline, const Work& work, Shared& shared,
                              const Tables& tables, const char* stages, char* results, uint32_t n) {
  constexpr int kCount = Vector::kCount;
  const int32_t adder = static_cast<int32_t>(threadIdx.x) - of_pipeline * kNumAdders;
  const int32_t lane = adder % 32, piece_bytes = work.cut.piece_bytes;
  Pipeline& pipeline = shared.pipeline[of_pipeline];
  float sum[kVectorsEach][kCount] = {};  // of this rank's rows, then, for own units, of the ranks
  uint4 own[kVectorsEach] = {};          // the rounded sum of this rank's rows, for own units
  const auto add = [&](int j, uint4 vector) {
    float x[kCount];
    Vector::load(vector, x);
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[j][c] = __fadd_rn(sum[j][c], x[c]);
  };
  uint32_t num_results = 0;
  while (true) {
    wait_phase(&pipeline.full[n % kNumJobs], n / kNumJobs);  // [L]
    const Job job = pipeline.job[n % kNumJobs];
    if (kKind == kOwn && job.sum == kStop) return n + 1;
    const int32_t entry = Tables::entry(max(job.sum, 0));
    const SumHead head = tables.head[kKind][entry];
    const float* weights = tables.weight[kKind] + entry * static_cast<int32_t>(work.a.top_k);
    const int32_t end_row = job.first_row + job.num_rows;
    int32_t stage = job.first_stage;
    for (int32_t i = job.first_row; i < end_row; ++i) {
      // Beyond the piece's end lie any numbers, which nobody stores.
      const auto* row = reinterpret_cast<const uint4*>(stages + stage * piece_bytes) + adder;
      if (++stage == work.cut.num_stages) stage = 0;
      if (kKind == kOwn && (head.is_sum >> i & 1) != 0) {
        const bool follows_own = (head.follows_own >> i & 1) != 0;
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          if (follows_own) add(j, own[j]);
          add(j, row[j * kNumAdders]);
        }
        continue;
      }
      const float weight = weights[i];
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[kCount];
        Vector::load(row[j * kNumAdders], x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, x[c]));
      }
      if (kKind == kOwn && (head.ends >> i & 1) != 0) {
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          own[j] = Vector::store(sum[j]);  // as what crosses a link
#pragma unroll
          for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&pipeline.empty[n % kNumJobs]);  // [F]
    ++n;
    if (job.sum != kStop && end_row < head.count) continue;
    if (kKind == kOwn) {
      // This rank's sum comes last where no peer of a higher rank has rows.
      const bool adds_own = head.ends != 0 && head.follows_own == 0;
      auto* out = reinterpret_cast<uint4*>(static_cast<char*>(work.a.out) + head.offset);
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        if (adds_own) add(j, own[j]);
        const int32_t i = adder + j * kNumAdders;
        if (i * 16 < static_cast<int32_t>(head.bytes)) out[i] = Vector::store(sum[j]);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
      }
    } else {
      const uint32_t slot = num_results % kNumResults;
      if (num_results >= kNumResults) {
        wait_phase(&shared.drained[slot], num_results / kNumResults - 1);  // [D]
      }
      ++num_results;
      if (job.sum == kStop) {
        if (adder == 0) shared.result[slot] = {0, 0, work.num_steps};
      } else {
        auto* result = reinterpret_cast<uint4*>(results + slot * piece_bytes);
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          const int32_t i = adder + j * kNumAdders;
          if (i * 16 < static_cast<int32_t>(head.bytes)) result[i] = Vector::store(sum[j]);
#pragma unroll
          for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
        }
        if (adder == 0) {
          const uint64_t partial = shared.address[tables.peer[entry]][0];
          shared.result[slot] = {partial + head.offset, head.bytes, head.num_done};
        }
      }
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.written[slot]);  // [W]
      if (job.sum == kStop) return n;
    }
    __syncwarp();  // all lanes have read the entry
    if (lane == 0) mbarrier_arrive(&shared.used[kKind][job.sum / kTableSums % kNumTables]);  // [U]
  }
}

// By one thread: has sums for peers copied to them, and says so, but for the newest kUntold ones.
template <int kUntold>
__device__ void run_storer(const Cut& cut, Shared& shared, const char* results) {
  int32_t done[kUntold] = {};  // of the newest: units that are done with them
  int32_t stored = 0, told = 0;
  const auto tell = [&](int32_t num_units) {
    if (num_units <= told) return;
    told = num_units;
    st_release_cta_shared(&shared.box.written[0], num_units);  // then [P1]
  };
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kNumResults, use = n / kNumResults;
    for (int i = 0; !mbarrier_test_wait_parity(&shared.written[slot], use & 1); ++i) {  // [W]
      if (i < kPatience || stored == told) continue;
      bulk_wait_group<0>();  // nothing to do meanwhile
      tell(stored);
    }
    const Result result = shared.result[slot];
    if (result.bytes != 0) {
      bulk_store(reinterpret_cast<void*>(result.to), results + slot * cut.piece_bytes,
                 result.bytes);
    }
    bulk_commit_group();
    stored = result.num_done;
    bulk_wait_group_read<kUnread>();
    if (n >= kUnread) mbarrier_arrive(&shared.drained[(n - kUnread) % kNumResults]);  // [D]
    if (done[0] > told) bulk_wait_group<kUntold>();
    tell(done[0]);
#pragma unroll
    for (int i = 0; i + 1 < kUntold; ++i) done[i] = done[i + 1];
    done[kUntold - 1] = stored;
    if (result.bytes != 0) continue;
    bulk_wait_group<0>();
    return tell(stored);
  }
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ CombineArguments a,
                                                    const __grid_constant__ Cut cut) {
  extern __shared__ __align__(128) char ring[];
  __shared__ Shared shared;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const int32_t first = first_unit(num_units, blockIdx.x);
  const int32_t num_steps = first_unit(num_units, blockIdx.x + 1) - first;
  const Work work{g, a, cut, a.num_channels * (16 / Vector::kCount), first, num_steps};
  const Tables tables(ring, static_cast<int32_t>(a.top_k));
  char* results = ring + Tables::bytes(a.top_k);
  const auto stages_of = [&](Kind pipeline) {
    return results + (kNumResults + pipeline * cut.num_stages) * cut.piece_bytes;
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
    shared.box = {{}, 1, work.num_steps, 0, a.values == nullptr};
  }
  __syncthreads();
  if (warp == kScout) scout.begin();
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected)};
  if (blockIdx.x == 0) send_start(g, OpKind::kCombine, own);          // [S1]
  bool ok = receive_start(g, OpKind::kCombine, own, shared.address);  // [S2]
  if (ok) {
    if (warp < 2 * kAdderWarps) {
      const Kind pipeline = warp < kAdderWarps ? kForPeers : kOwn;
      const char* rows = stages_of(pipeline);
      uint32_t n = 0;
      if (pipeline == kForPeers) {
        n = run_adder<Vector, kForPeers>(pipeline, work, shared, tables, rows, results, n);
      }
      run_adder<Vector, kOwn>(pipeline, work, shared, tables, rows, results, n);
    } else if (warp < kStorer) {
      const Kind pipeline = warp == kLoader ? kForPeers : kOwn;
      Loader loader(pipeline, work, shared, tables, stages_of(pipeline));
      if (pipeline == kForPeers) loader.sum_for_peers();
      loader.add_up_own();
    } else if (warp == kStorer) {
      if (threadIdx.x == kStorer * 32) {
        // Enough are under way to hide how long a store takes; no more, so that peers hear soon.
        if (work.num_steps >= 64) {
          run_storer<12>(cut, shared, results);
        } else {
          run_storer<1>(cut, shared, results);
        }
      }
    } else if (warp == kMessenger) {
      ok = run_messenger(g, OpKind::kCombine, shared.box);
    } else {
      scout.run();
    }
  }
  const Finish finish = finish_block(g, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kFail) {
    fill(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount), kNan);
    if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan);
  }
  end_call(g);
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  // Few tokens are cut so that every block has some; equal pieces, multiples of 16 bytes.
  const int64_t fewest = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  const int64_t most = row_bytes < kMinPieceBytes ? 1 : row_bytes / kMinPieceBytes;
  int64_t num_pieces = num_sms / a.num_tokens;
  if (num_pieces > most) num_pieces = most;
  if (num_pieces < fewest) num_pieces = fewest;
  Cut cut;
  cut.piece_bytes =
      static_cast<int32_t>(((row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16);
  cut.num_pieces = static_cast<int32_t>((row_bytes + cut.piece_bytes - 1) / cut.piece_bytes);
  // Adders read as far as the longest piece goes, wherever their stage is.
  const int64_t bytes = kRingBytes - Tables::bytes(a.top_k) - (kMaxPieceBytes - cut.piece_bytes);
  const int64_t stages = bytes / cut.piece_bytes - kNumResults;
  cut.num_stages = static_cast<int32_t>(stages / 2 < kMaxStages ? stages / 2 : kMaxStages);
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const auto num_blocks = static_cast<int>(num_units < num_sms ? num_units : num_sms);
  if ((num_units + num_blocks - 1) / num_blocks > kMaxUnitsPerBlock || num_units > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  combine_kernel<Vector><<<num_blocks, kNumThreads, kRingBytes, stream>>>(group, a, cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& a, int num_sms,
                          cudaStream_t stream) {
  switch (a.type) {
    case RowType::kF32:
      return Launch<F32Vector>(group, a, num_sms, stream);
    case RowType::kF16:
      return Launch<F16Vector>(group, a, num_sms, stream);
    case RowType::kBF16:
      return Launch<Bf16Vector>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareCombine() {
  for (auto* kernel :
       {combine_kernel<F32Vector>, combine_kernel<F16Vector>, combine_kernel<Bf16Vector>}) {
    if (cudaError_t e = PrepareKernel(kernel, kRingBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t PrepareKernels() {
  if (cudaError_t e = PrepareLayout(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareDispatch(); e != cudaSuccess) return e;
  return PrepareCombine();
}

}  // namespace jax_ep::gpu
