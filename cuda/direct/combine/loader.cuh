// The warp that fetches what a pipeline's adders add up. combine.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_COMBINE_LOADER_CUH_
#define JAX_EP_CUDA_DIRECT_COMBINE_LOADER_CUH_

#include "cuda/direct/combine/shared.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::combine {

// Fetches what the adders of one pipeline add up.
class Loader {
 public:
  __device__ Loader(PipelineIndex pipeline, const Work& work, Shared& shared,
                    const SumTables& tables, char* stages)
      : work_(work),
        shared_(shared),
        pipeline_(shared.pipeline[pipeline]),
        tables_(tables),
        stages_(stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(work.a.top_k)),
        piece_bytes_(work.plan.piece_bytes),
        num_stages_(work.plan.num_stages),
        max_rows_(min(kMaxJobRows, num_stages_)),
        free_stages_(num_stages_) {}

  // Both end with a job that tells the adders.
  __device__ void sum_for_peers() {
    const int32_t num_sums = work_.num_sums(kForPeers);
    for (int32_t sum = 0; sum < num_sums; ++sum) {
      wait_for_table(kForPeers, sum);
      if (tables_.rows[kForPeers][SumTables::entry(sum)].count > 0) {
        fetch(kForPeers, sum);
      } else {
        skip(kForPeers, sum);
      }
    }
    stop(kForPeers);
  }
  // What the other loader does not take.
  __device__ void add_up_own() {
    int32_t arrived = work_.g.num_ranks == 1 ? work_.num_units : 0;
    while (true) {
      int32_t unit = 0;
      if (lane_ == 0) unit = atomicAdd(&shared_.next_own, 1);
      unit = __shfl_sync(0xffffffffu, unit, 0);
      if (unit >= work_.num_units) return stop(kOwn);
      if (unit >= arrived) {
        arrived = wait_until_arrived(shared_.box, unit);  // [P2]
        timeline::mark(Role::kOwnLoader, Event::kP2);
      }
      wait_for_table(kOwn, unit);
      if (arrived != kBroken) {
        fetch(kOwn, unit);
      } else {
        skip(kOwn, unit);
      }
    }
  }

 private:
  // Until the scout has found a sum's rows. Nobody is two uses of a table's memory behind: sums are
  // taken in order, and a table is filled again only when all of its sums are added up.
  __device__ void wait_for_table(SumKind kind, int32_t sum) {
    const int32_t table = sum / kTableSums;
    if (table == table_[kind]) return;
    wait_phase(&shared_.filled[kind][table % kNumTables], table / kNumTables);  // [T]
    table_[kind] = table;
  }

  // For a sum that the adders do not see. The scout fills all tables, whatever becomes of the call.
  __device__ void skip(SumKind kind, int32_t sum) {
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
  __device__ void fetch(SumKind kind, int32_t sum) {
    const int32_t entry = SumTables::entry(sum);
    const SumRows rows = tables_.rows[kind][entry];
    const int32_t count = rows.count;
    const uint32_t bytes = tables_.head[kind][entry].bytes;
    const uint64_t source = lane_ < count ? tables_.source[kind][entry * top_k_ + lane_] : 0;
    __syncwarp();  // all lanes have read the entry
    int32_t first = 0;
    do {
      const int32_t num_rows = min(count - first, max_rows_);
      reserve(num_rows);
      uint64_t* full = &pipeline_.full[next_job_ % kNumJobs];
      if (lane_ == 0) {
        pipeline_.job[next_job_ % kNumJobs] = job_of(kind, sum, rows, first, num_rows);
        mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(num_rows) * bytes);
      }
      const int32_t i = lane_ - first;
      if (i >= 0 && i < num_rows) {
        int32_t stage = stage_ + i;
        if (stage >= num_stages_) stage -= num_stages_;
        bulk_load(stages_ + stage * piece_bytes_, reinterpret_cast<const void*>(source), bytes,
                  full);  // [L]
      }
      timeline::mark(kind == kForPeers ? Role::kLoader : Role::kOwnLoader, Event::kLoad);
      ++next_job_;
      stage_ += num_rows;
      if (stage_ >= num_stages_) stage_ -= num_stages_;
      first += num_rows;
    } while (first < count);
  }

  // Of so many of a sum's rows, from one on, in the stages from `stage_` on.
  __device__ Job job_of(SumKind kind, int32_t sum, const SumRows& rows, int32_t first,
                        int32_t count) const {
    const bool has_own = rows.num_own > 0;
    const int32_t num_own = max(0, min(rows.num_own - first, count));
    const int32_t first_sum = first + num_own, end = first + count;
    uint32_t flags = end == rows.count ? kEndsSum : 0u;
    if (kind == kOwn) {
      const int32_t num_rounded = rows.count - rows.num_own + (has_own ? 1 : 0);
      if (num_own > 0 && first_sum == rows.num_own) flags |= kEndsOwn;
      if (num_rounded == 1 || num_rounded == 2) {  // of which either may be the first
        flags |= kIsPair;
        if (has_own || first > 0) flags |= kIsSecond;
        if (num_rounded == 1) flags |= kIsSingle;
      } else if (has_own && first_sum <= rows.own_before && rows.own_before < end) {
        flags |= kFollowsOwn << (rows.own_before - first_sum);
      } else if (has_own && rows.own_before == rows.count) {
        flags |= kAddsOwn;
      }
    }
    return {sum, stage_, num_own, count - num_own, SumTables::entry(sum) * top_k_ + first, flags};
  }

  // No more sums of the kind.
  __device__ void stop(SumKind kind) {
    reserve(0);
    if (lane_ == 0) {
      pipeline_.job[next_job_ % kNumJobs] = {kStop, 0, 0, 0, 0, 0};
      mbarrier_arrive(&pipeline_.full[next_job_ % kNumJobs]);
    }
    timeline::mark(kind == kForPeers ? Role::kLoader : Role::kOwnLoader, Event::kEnd);
    ++next_job_;
  }

  const Work& work_;
  Shared& shared_;
  Pipeline& pipeline_;
  const SumTables& tables_;
  char* const stages_;
  const int32_t lane_, top_k_, piece_bytes_, num_stages_, max_rows_;
  int32_t stage_ = 0, free_stages_;         // the next one, and how many are free from there on
  uint32_t next_job_ = 0, oldest_job_ = 0;  // in flight: [oldest, next)
  uint32_t num_rows_ = 0;                   // of each slot's job, two bits
  int32_t table_[2] = {-1, -1};             // by kind: the newest one
};

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_DIRECT_COMBINE_LOADER_CUH_
