// The warps that add up. combine.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_COMBINE_ADDER_CUH_
#define JAX_EP_CUDA_DIRECT_COMBINE_ADDER_CUH_

#include "cuda/direct/combine/shared.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::combine {

// Adds up what the loader fetches, in the order in which it does, from the pipeline's job n on. Ends
// with a job that tells it to, and returns the number of the next one.
template <typename Vector, SumKind kKind, bool kWeighted>
__device__ uint32_t run_adder(PipelineIndex of_pipeline, const Work& work, Shared& shared,
                              const SumTables& tables, const char* stages, char* results,
                              uint32_t n) {
  constexpr int kCount = Vector::kCount;
  constexpr Role kRole = kKind == kForPeers ? Role::kAdder : Role::kOwnAdder;
  const int32_t adder = static_cast<int32_t>(threadIdx.x) - of_pipeline * kNumAdders;
  const int32_t lane = adder % 32, piece_bytes = work.plan.piece_bytes;
  const char* const stages_end = stages + work.plan.num_stages * piece_bytes;
  Pipeline& pipeline = shared.pipeline[of_pipeline];
  float sum[kVectorsEach][kCount] = {};  // of this rank's rows, then, for own units, of the ranks
  uint4 rounded[kVectorsEach] = {};      // such a sum
  const auto add = [&](int j, uint4 vector) {
    float x[kCount];
    Vector::load(vector, x);
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[j][c] = __fadd_rn(sum[j][c], x[c]);
  };
  const auto add_rounded = [&] {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) add(j, rounded[j]);
  };
  // Leaves 0 in its place.
  const auto take_rounded = [&] {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      rounded[j] = Vector::store(sum[j]);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[j][c] = 0.0f;
    }
  };
  uint32_t num_results = 0;
  while (true) {
    wait_phase(&pipeline.full[n % kNumJobs], n / kNumJobs);  // [L]
    const Job job = pipeline.job[n % kNumJobs];
    if (job.sum == kStop) timeline::mark(kRole, Event::kEnd);
    if (kKind == kOwn && job.sum == kStop) return n + 1;
    const char* stage = stages + job.first_stage * piece_bytes;
    // This thread's part of the next row. Beyond the piece's end lie any numbers, which nobody
    // stores.
    const auto next_row = [&] {
      const auto* row = reinterpret_cast<const uint4*>(stage) + adder;
      stage += piece_bytes;
      if (stage == stages_end) stage = stages;
      return row;
    };
    const float* weights = tables.weight[kKind] + job.first_weight;
#pragma unroll
    for (int32_t i = 0; i < kMaxJobRows; ++i) {
      if (i == job.num_own) break;
      const uint4* row = next_row();
      const float weight = kWeighted ? weights[i] : 1.0f;
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[kCount];
        Vector::load(row[j * kNumAdders], x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          sum[j][c] = __fadd_rn(sum[j][c], kWeighted ? __fmul_rn(weight, x[c]) : x[c]);
        }
      }
    }
    if (kKind == kOwn && (job.flags & kEndsOwn) != 0) take_rounded();  // as what crosses a link
#pragma unroll 1
    for (int32_t i = 0; kKind == kOwn && i < job.num_sums; ++i) {
      const uint4* row = next_row();
      if ((job.flags & kIsPair) == 0) {
        if ((job.flags >> i & kFollowsOwn) != 0) add_rounded();
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) add(j, row[j * kNumAdders]);
      } else if (i > 0 || (job.flags & kIsSecond) != 0) {
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          rounded[j] = Vector::add_two(rounded[j], row[j * kNumAdders]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) rounded[j] = row[j * kNumAdders];
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&pipeline.empty[n % kNumJobs]);  // [F]
    ++n;
    if (job.sum != kStop && (job.flags & kEndsSum) == 0) continue;
    const int32_t entry = SumTables::entry(max(job.sum, 0));
    const SumHead head = tables.head[kKind][entry];
    if (kKind == kOwn) {
      if ((job.flags & kIsPair) == 0) {
        if ((job.flags & kAddsOwn) != 0) add_rounded();
        take_rounded();
      } else if ((job.flags & kIsSingle) != 0) {
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) rounded[j] = Vector::add_two(rounded[j], uint4{});
      }
      auto* out = reinterpret_cast<uint4*>(static_cast<char*>(work.a.out) + head.offset);
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        const int32_t i = adder + j * kNumAdders;
        if (i * 16 < static_cast<int32_t>(head.bytes)) out[i] = rounded[j];
      }
    } else {
      const uint32_t slot = num_results % kNumResults;
      if (num_results >= kNumResults) {
        wait_phase(&shared.drained[slot], num_results / kNumResults - 1);  // [D]
      }
      ++num_results;
      if (job.sum == kStop) {
        if (adder == 0) shared.result[slot] = {0, 0, work.num_units};
      } else {
        auto* result = reinterpret_cast<uint4*>(results + slot * piece_bytes);
        take_rounded();
#pragma unroll
        for (int j = 0; j < kVectorsEach; ++j) {
          const int32_t i = adder + j * kNumAdders;
          if (i * 16 < static_cast<int32_t>(head.bytes)) result[i] = rounded[j];
        }
        if (adder == 0) {
          const uint64_t partial = shared.address[tables.peer[entry]][0];
          shared.result[slot] = {partial + head.offset, head.bytes, head.units_done};
        }
      }
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.written[slot]);  // [W]
      if (job.sum == kStop) return n;
    }
    timeline::mark(kRole, Event::kStore);
    __syncwarp();  // all lanes have read the entry
    if (lane == 0) mbarrier_arrive(&shared.used[kKind][job.sum / kTableSums % kNumTables]);  // [U]
  }
}

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_DIRECT_COMBINE_ADDER_CUH_
