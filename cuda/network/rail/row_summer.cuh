// A warp that sums rows of this device's memory: bulk loads of their pieces into stages, sums in
// registers. cuda/network/rail/combine.cuh states the protocol. Who has acquired rows that this kernel has
// written has fenced the copy engine.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_ROW_SUMMER_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_ROW_SUMMER_CUH_

#include "cuda/network/rail/combine.h"
#include "cuda/network/rail/sums.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu::rail {

// Of one summer, in shared memory.
struct SummerStages {
  uint64_t full[kMaxSummerStages];  // [L]
};

// By a whole warp. Sums are added up piece by piece, each addend of a piece in a stage of its own, in the
// order of calls; the loads of a sum begin before the one before it is added up.
template <typename Vector>
class RowSummer {
  static constexpr int kVectors = kSumPieceBytes / 16 / 32;  // of a lane

 public:
  // `written`: where it tells of units; none for one that does not.
  __device__ RowSummer(SummerStages& shared, char* stages, int32_t num_stages, int32_t row_bytes,
                       int32_t* written)
      : shared_(shared),
        stages_(stages),
        num_stages_(num_stages),
        row_bytes_(row_bytes),
        num_pieces_((row_bytes + kSumPieceBytes - 1) / kSumPieceBytes),
        written_(written),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  // to = round(sum over lanes i < count, in their order, of weight * row).
  __device__ void sum(char* to, int32_t count, const char* row, float weight) {
    while (num_issued_ < num_loads(newest_)) {
      add_piece();
      load(newest_);
    }
    const Sum next{to, row, weight, count, 0};
    num_issued_ = 0;
    load(next);
    while (num_added_ < num_pieces_ && newest_.count > 0) {
      add_piece();
      load(next);
    }
    end_sum();
    newest_ = next;
    num_added_ = 0;
  }
  // Tells of so many units when all sums up to here are stored.
  __device__ void tell(int32_t num_units) {
    if (newest_.count > 0) {
      newest_.num_units = num_units;
    } else {
      publish(num_units);
    }
  }
  // Until all is stored.
  __device__ void finish() {
    while (num_added_ < num_pieces_ && newest_.count > 0) {
      add_piece();
      load(newest_);
    }
    end_sum();
    newest_ = {};
    num_issued_ = num_added_ = 0;
  }

 private:
  struct Sum {
    char* to;
    const char* row;    // each lane's
    float weight;       // likewise
    int32_t count;      // 0: there is none
    int32_t num_units;  // to be told of when it is stored, if not 0
  };

  __device__ int32_t num_loads(const Sum& sum) const { return sum.count * num_pieces_; }
  __device__ int32_t piece_bytes(int32_t piece) const {
    return min(kSumPieceBytes, row_bytes_ - piece * kSumPieceBytes);
  }
  __device__ char* stage(int32_t i) const { return stages_ + i * kSumPieceBytes; }

  // As many of a sum's loads as there are stages for, one a lane. [L]
  __device__ void load(const Sum& sum) {
    const int32_t count = min(num_loads(sum) - num_issued_, num_stages_ - num_in_flight_);
    if (count <= 0) return;
    const int32_t number = num_issued_ + min(lane_, count - 1);
    const int32_t piece = number / sum.count, addend = number - piece * sum.count;
    const auto row = __shfl_sync(~0u, reinterpret_cast<uint64_t>(sum.row), addend);
    if (lane_ < count) {
      int32_t to = load_stage_ + lane_;
      if (to >= num_stages_) to -= num_stages_;
      const auto bytes = static_cast<uint32_t>(piece_bytes(piece));
      mbarrier_arrive_expect_tx(&shared_.full[to], bytes);
      bulk_load(stage(to), reinterpret_cast<const char*>(row) + piece * kSumPieceBytes, bytes,
                &shared_.full[to]);
    }
    load_stage_ += count;
    if (load_stage_ >= num_stages_) load_stage_ -= num_stages_;
    num_issued_ += count;
    num_in_flight_ += count;
  }

  // The next piece of the newest sum but for one that is being loaded.
  __device__ void add_piece() {
    const int32_t size = piece_bytes(num_added_) / 16;
    Sums<Vector, kVectors> sums;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) sums.clear(j);
    for (int32_t i = 0; i < newest_.count; ++i) {
      if (num_in_flight_ == 0) load(newest_);                    // more addends than stages
      mbarrier_wait_parity(&shared_.full[add_stage_], parity_);  // [L]
      const auto* row = reinterpret_cast<const uint4*>(stage(add_stage_));
      const float weight = __shfl_sync(~0u, newest_.weight, i);
      // Beyond the piece's end lie any numbers, which nobody stores.
#pragma unroll
      for (int j = 0; j < kVectors; ++j) sums.add(j, row[lane_ + j * 32], weight);
      __syncwarp();  // all have read the stage
      --num_in_flight_;
      if (++add_stage_ == num_stages_) {
        add_stage_ = 0;
        parity_ ^= 1;
      }
    }
    auto* out = reinterpret_cast<uint4*>(newest_.to + num_added_ * kSumPieceBytes);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (lane_ + j * 32 < size) out[lane_ + j * 32] = sums.rounded(j);
    }
    ++num_added_;
  }

  __device__ void end_sum() {
    if (newest_.num_units != 0) publish(newest_.num_units);
  }
  __device__ void publish(int32_t num_units) {
    __syncwarp();                                                // what all have stored
    if (lane_ == 0) st_release_cta_shared(written_, num_units);  // then [P1]
  }

  SummerStages& shared_;
  char* const stages_;
  const int32_t num_stages_, row_bytes_, num_pieces_;
  int32_t* const written_;
  const int32_t lane_;
  Sum newest_{};
  int32_t num_added_ = 0;      // pieces of it
  int32_t num_issued_ = 0;     // loads of it, or of the next one
  int32_t num_in_flight_ = 0;  // loads, the oldest in add_stage_
  int32_t load_stage_ = 0, add_stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_ROW_SUMMER_CUH_
