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

// What a stage holds: a piece of an addend.
struct SumPiece {
  uint64_t to;  // where the sum belongs, if this is its last addend; else 0
  float weight;
  uint16_t bytes;
  uint16_t is_first;   // of the sum's addends
  int32_t units_done;  // once this is added up, if not 0
};

// Of one summer, in shared memory.
struct SummerStages {
  uint64_t full[kMaxSummerStages];  // [L]
  SumPiece piece[kMaxSummerStages];
};

// By a whole warp, in the order of calls.
template <typename Vector>
class RowSummer {
  static constexpr int kVectors = kSumPieceBytes / 16 / 32;  // of a lane

 public:
  // `written`: where it tells of units; none for one that does not.
  __device__ RowSummer(SummerStages& shared, char* stages, int32_t num_stages, int32_t* written)
      : shared_(shared),
        stages_(stages),
        num_stages_(num_stages),
        written_(written),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  // Adds a sum of rows: addend(i) is the i-th of `count`, on all lanes.
  template <typename AddendOf>
  __device__ void sum(char* to, int32_t row_bytes, int32_t count, const AddendOf& addend) {
    for (int32_t at = 0; at < row_bytes; at += kSumPieceBytes) {
      const int32_t bytes = min(kSumPieceBytes, row_bytes - at);
      for (int32_t i = 0; i < count; ++i) {
        const Addend next = addend(i);
        add(static_cast<const char*>(next.row) + at, bytes, next.weight, i == 0,
            i + 1 < count ? nullptr : to + at);
      }
    }
  }
  // Tells of so many units when all sums up to here are stored.
  __device__ void tell(int32_t num_units) {
    __syncwarp();
    if (lane_ == 0) {
      if (num_loaded_ == num_added_) {
        st_release_cta_shared(written_, num_units);  // then [P1]
      } else {
        shared_.piece[last_].units_done = num_units;
      }
    }
    __syncwarp();
  }
  // Until all is stored.
  __device__ void finish() {
    while (num_loaded_ != num_added_) add_next();
  }

 private:
  // Begins to load a piece of an addend. The last one of a sum says where that goes.
  __device__ void add(const char* from, int32_t bytes, float weight, bool is_first, char* to) {
    if (num_loaded_ - num_added_ == num_stages_) add_next();
    if (lane_ == 0) {
      shared_.piece[load_stage_] = {reinterpret_cast<uint64_t>(to), weight,
                                    static_cast<uint16_t>(bytes), is_first, 0};
      uint64_t* full = &shared_.full[load_stage_];
      mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(bytes));
      bulk_load(stage(load_stage_), from, static_cast<uint32_t>(bytes), full);  // [L]
    }
    last_ = load_stage_;
    load_stage_ = load_stage_ + 1 == num_stages_ ? 0 : load_stage_ + 1;
    ++num_loaded_;
  }

  __device__ char* stage(int32_t i) const { return stages_ + i * kSumPieceBytes; }

  __device__ void add_next() {
    mbarrier_wait_parity(&shared_.full[add_stage_], parity_);  // [L]
    const SumPiece piece = shared_.piece[add_stage_];
    const auto* row = reinterpret_cast<const uint4*>(stage(add_stage_));
    const int32_t size = piece.bytes / 16;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (piece.is_first != 0) sums_.clear(j);
      if (lane_ + j * 32 < size) sums_.add(j, row[lane_ + j * 32], piece.weight);
    }
    auto* out = reinterpret_cast<uint4*>(piece.to);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (out != nullptr && lane_ + j * 32 < size) out[lane_ + j * 32] = sums_.rounded(j);
    }
    __syncwarp();  // all have read the stage; what they have stored the first one tells
    if (lane_ == 0 && piece.units_done != 0) st_release_cta_shared(written_, piece.units_done);
    if (++add_stage_ == num_stages_) {
      add_stage_ = 0;
      parity_ ^= 1;
    }
    ++num_added_;
  }

  SummerStages& shared_;
  char* const stages_;
  const int32_t num_stages_;
  int32_t* const written_;
  const int32_t lane_;
  Sums<Vector, kVectors> sums_;
  // Pieces; stages of the next ones, and of the newest; the phase to wait for.
  int32_t num_loaded_ = 0, num_added_ = 0, load_stage_ = 0, add_stage_ = 0, last_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_ROW_SUMMER_CUH_
