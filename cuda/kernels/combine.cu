// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    one block an SM, 19 warps in two pipelines: one sums for the peers, one adds up this
//           rank's own tokens, in which the other one helps when it is done. Each has a loader, which fetches what is to be added by bulk copies
//           into a ring of stages, job by job, and seven warps of adders, which add job after job in
//           registers. Own results go straight to memory; sums for peers go to a ring of results,
//           from where the storer has them copied. The scout looks up rows and weights, 32 sums at a
//           time, and sends values to where they are collected; the messenger talks to the peers. A
//           unit is a piece of a token's row. Block b has the same units on every rank, so it only
//           ever meets the blocks b of the peers.
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
//           In the block: [T] a table is filled, [U] used up; [L] a job's rows are loaded (its
//           barrier's phase), [F] all adders have read them; [W] a result is written, [D] the copy
//           engine has read it.
// Reuse:    partial is the call's own scratch. Progress is epoch and count, so it only grows.
// Progress: sums for peers wait only for [S2]; an own sum waits for peers' sums of the same unit,
//           which wait for nothing of it. Blocks of a grid do not wait for each other, and begin in
//           order, so fewer SMs than blocks will do.
// Failure:  a timeout fills out and collected with NaN; see group_sync.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; K <= 32; at most kMaxUnitsPerBlock
//           units a block; compiled without -ftz, -fmad=false.
#include "cuda/kernels/combine_scout.cuh"
#include "cuda/kernels/kernels.cuh"
#include "cuda/kernels/row_types.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

using namespace combine;

// Fetches what the adders of one pipeline add up.
class Loader {
 public:
  __device__ Loader(Kind pipeline, const Work& work, Shared& shared, const Tables& tables,
                    char* stages)
      : work_(work),
        g_(work.g),
        a_(work.a),
        cut_(work.cut),
        shared_(shared),
        pipeline_(shared.pipeline[pipeline]),
        tables_(tables),
        stages_(stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        row_bytes_(work.row_bytes()),
        num_stages_(cut_.num_stages),
        max_rows_(min(kMaxJobRows, num_stages_)),
        free_stages_(num_stages_) {}

  // Both end with a job that tells the others.
  __device__ void sum_for_peers() {
    int32_t sum = 0;
    for (int32_t step = 0; step < work_.num_steps; ++step) {
      for (int32_t i = 1; i < g_.num_ranks; ++i, ++sum) {
        look_up(kForPeers, sum);
        if (head_.count == 0) continue;
        const bool is_last = i == g_.num_ranks - 1;
        const int64_t row = g_.rank * a_.num_tokens + work_.token_of(step);
        emit({shared_.address[work_.peer(i)][0] + row * row_bytes_, work_.offset_of(step),
              kEndsUnit, is_last ? step + 1 : step});
      }
    }
    head_ = {};
    emit({0, 0, kStop, work_.num_steps});
  }
  // What the other loader does not take.
  __device__ void add_up_own() {
    int32_t there = g_.num_ranks == 1 ? work_.num_steps : 0;
    while (true) {
      int32_t step = 0;
      if (lane_ == 0) step = atomicAdd(&shared_.next_own, 1);
      step = __shfl_sync(0xffffffffu, step, 0);
      if (step >= work_.num_steps) break;
      if (step >= there) there = wait_for_more(shared_.box, step);  // [P2]
      look_up(kOwn, step);
      // The scout fills all tables, whatever becomes of the call.
      if (there == kBroken) continue;
      const uint32_t adds_own = head_.ends != 0 && head_.follows_own == 0 ? kAddsOwn : 0;
      emit({reinterpret_cast<uint64_t>(a_.out) + work_.token_of(step) * row_bytes_,
            work_.offset_of(step), kEndsUnit | adds_own, 0});
    }
    head_ = {};
    emit({0, 0, kStop, 0});
  }

 private:
  // Where a sum goes, and what else its last job says.
  struct Target {
    uint64_t row;
    int64_t offset;  // of the piece
    uint32_t flags;
    int32_t num_done;
  };

  // What the scout has found for a sum: its head, and this lane's row.
  __device__ void look_up(Kind kind, int32_t sum) {
    const int32_t table = sum / kTableSums, slot = table % kNumTables;
    if (table != table_[kind]) wait_phase(&shared_.filled[kind][slot], table / kNumTables);  // [T]
    table_[kind] = table;
    const int32_t entry = slot * kTableSums + sum % kTableSums;
    head_ = tables_.head[kind][entry];
    if (lane_ < head_.count) {
      const int32_t i = entry * static_cast<int32_t>(a_.top_k) + lane_;
      source_ = tables_.source[kind][i];
      weight_ = tables_.weight[kind][i];
    }
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(&shared_.used[kind][slot]);  // [U]
  }

  // A new job's slot, and `count` stages for it, as soon as the adders have left them. [F]
  __device__ Job& reserve(int32_t count) {
    while (free_stages_ < count || next_job_ - oldest_job_ == kNumJobs) {
      const uint32_t slot = oldest_job_ % kNumJobs;
      wait_phase(&pipeline_.empty[slot], oldest_job_ / kNumJobs);
      free_stages_ += pipeline_.job[slot].num_rows;
      ++oldest_job_;
      __syncwarp();  // all lanes have read it: the slot may be filled again
    }
    free_stages_ -= count;
    return pipeline_.job[next_job_ % kNumJobs];
  }

  // Has the rows that were looked up added, by the whole warp.
  __device__ void emit(const Target& target) {
    const int64_t end = min(target.offset + cut_.piece_bytes, row_bytes_);
    const auto bytes = static_cast<uint32_t>(end - target.offset);
    int32_t first = 0;
    do {
      const int32_t num_rows = min(head_.count - first, max_rows_);
      Job& job = reserve(num_rows);
      const int32_t i = lane_ - first;
      const bool mine = i >= 0 && i < num_rows;
      uint64_t* full = &pipeline_.full[next_job_ % kNumJobs];
      if (mine) job.weight[i] = weight_;
      if (lane_ == 0) {
        job.to = target.row + target.offset;
        job.flags = first + num_rows == head_.count ? target.flags : 0;
        job.bytes = bytes;
        job.num_done = target.num_done;
        job.num_rows = num_rows;
        job.ends = head_.ends >> first;
        job.is_sum = head_.is_sum >> first;
        job.follows_own = head_.follows_own >> first;
        job.first_stage = stage_;
      }
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(num_rows) * bytes);
      if (mine) {
        int32_t stage = stage_ + i;
        if (stage >= num_stages_) stage -= num_stages_;
        bulk_load(stages_ + stage * cut_.piece_bytes,
                  reinterpret_cast<const void*>(source_ + target.offset), bytes, full);  // [L]
      }
      ++next_job_;
      stage_ += num_rows;
      if (stage_ >= num_stages_) stage_ -= num_stages_;
      first += num_rows;
    } while (first < head_.count);
  }

  const Work& work_;
  const GroupView& g_;
  const CombineArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  Pipeline& pipeline_;
  const Tables& tables_;
  char* const stages_;
  const int32_t lane_;
  const int64_t row_bytes_;
  const int32_t num_stages_, max_rows_;
  int32_t stage_ = 0, free_stages_;         // the next one, and how many are free from there on
  uint32_t next_job_ = 0, oldest_job_ = 0;  // in flight: [oldest, next)
  int32_t table_[2] = {-1, -1};             // by kind: the last one
  SumHead head_;
  uint64_t source_ = 0;  // of this lane's row
  float weight_ = 0.0f;
};

// Adds up what the loader fetches, in the order in which it does, from the pipeline's job n on. Ends
// with a job that tells it to, and returns the number of the next one.
template <typename Vector, Kind kKind>
__device__ uint32_t run_adder(Kind of_pipeline, const Cut& cut, Shared& shared, const char* stages,
                              char* results, uint32_t n) {
  constexpr int kCount = Vector::kCount;
  const int32_t adder = static_cast<int32_t>(threadIdx.x) - of_pipeline * kNumAdders;
  const int32_t lane = adder % 32;
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
    const Job& job = pipeline.job[n % kNumJobs];
    wait_phase(&pipeline.full[n % kNumJobs], n / kNumJobs);  // [L]
    const uint32_t bytes = job.bytes, flags = job.flags;
    const int32_t num_done = job.num_done;
    const uint64_t to = job.to;
    const int32_t num_rows = job.num_rows;
    int32_t stage = job.first_stage;
    for (int32_t i = 0; i < num_rows; ++i) {
      // Beyond the piece's end lie any numbers, which nobody stores.
      const auto* row = reinterpret_cast<const uint4*>(stages + stage * cut.piece_bytes) + adder;
      if (++stage == cut.num_stages) stage = 0;
      if (kKind == kOwn && (job.is_sum >> i & 1) != 0) {
        const bool follows_own = (job.follows_own >> i & 1) != 0;
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          if (follows_own) add(j, own[j]);
          add(j, row[j * kNumAdders]);
        }
        continue;
      }
      const float weight = job.weight[i];
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[kCount];
        Vector::load(row[j * kNumAdders], x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, x[c]));
      }
      if (kKind == kOwn && (job.ends >> i & 1) != 0) {
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
    if ((flags & (kEndsUnit | kStop)) == 0) continue;
    if (kKind == kOwn) {
      if ((flags & kStop) != 0) return n;
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        if ((flags & kAddsOwn) != 0) add(j, own[j]);
        const int32_t i = adder + j * kNumAdders;
        if (i * 16 < static_cast<int32_t>(bytes)) {
          reinterpret_cast<uint4*>(to)[i] = Vector::store(sum[j]);
        }
#pragma unroll
        for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
      }
      continue;
    }
    const uint32_t slot = num_results % kNumResults;
    if (num_results >= kNumResults) {
      wait_phase(&shared.drained[slot], num_results / kNumResults - 1);  // [D]
    }
    ++num_results;
    auto* result = reinterpret_cast<uint4*>(results + slot * cut.piece_bytes);
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      const int32_t i = adder + j * kNumAdders;
      if (i * 16 < static_cast<int32_t>(bytes)) result[i] = Vector::store(sum[j]);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
    }
    if (adder == 0) shared.result[slot] = {to, bytes, num_done, (flags & kStop) != 0};
    fence_proxy_async_shared();  // the copy engine reads what was written
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.written[slot]);  // [W]
    if ((flags & kStop) != 0) return n;
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
    st_release_cta_shared(&shared.box.done[0], num_units);  // then [P1]
  };
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kNumResults, use = n / kNumResults;
    for (int i = 0; !mbarrier_test_wait_parity(&shared.written[slot], use & 1); ++i) {  // [W]
      if (i < kPatience || stored == told) continue;
      bulk_wait_group<0>();  // nothing to do meanwhile
      tell(stored);
    }
    const Result result = shared.result[slot];
    if (result.to != 0) {
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
    if (!result.stop) continue;
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
  const Work work{g, a, cut, first, first_unit(num_units, blockIdx.x + 1) - first};
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
        mbarrier_init(&shared.used[kind][i], kTableSums);
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
        n = run_adder<Vector, kForPeers>(pipeline, cut, shared, rows, results, n);
      }
      run_adder<Vector, kOwn>(pipeline, cut, shared, rows, results, n);
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
