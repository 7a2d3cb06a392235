// A warp that moves rows to several places: bulk loads into stages, bulk stores from there.
// cuda/network/rail/dispatch.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_ROW_MOVER_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_ROW_MOVER_CUH_

#include "cuda/network/rail/rail.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/progress.cuh"

namespace jax_ep::gpu::rail {

enum Address { kTokens, kWeights, kScales };  // that a rank shows its peers

// What the warps of a block share.
struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  // By stage, the movers' one after the other.
  uint64_t full[kMaxStages];    // [L]
  uint64_t to[kMaxStages][32];  // where each lane stores the piece; 0: nowhere
  int32_t bytes[kMaxStages];
  uint32_t num_batches;  // of rows that have been looked at for zeroing
  Mailbox box;
};

class RowMover {
 public:
  // The index-th of the block.
  __device__ RowMover(const Plan& plan, Shared& shared, int32_t index, char* stages)
      : plan_(plan),
        shared_(shared),
        first_slot_(index * plan.num_stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        stages_(stages + index * bytes_of_mover(plan.num_movers())) {}

  // Begins to bring a row to where each lane says; to nobody for 0. Who has acquired the row has
  // fenced the copy engine.
  __device__ void move(const char* row, int64_t row_bytes, uint64_t to) {
    if (__any_sync(~0u, to != 0) == 0) return;
    for (int64_t at = 0; at < row_bytes; at += plan_.piece_bytes) {
      if (num_loaded_ - num_stored_ == plan_.num_stages - 1) store_next();
      const auto bytes = static_cast<uint32_t>(min(int64_t{plan_.piece_bytes}, row_bytes - at));
      const int32_t slot = first_slot_ + load_stage_;
      shared_.to[slot][lane_] = to == 0 ? 0 : to + at;
      if (lane_ == 0) {
        shared_.bytes[slot] = static_cast<int32_t>(bytes);
        mbarrier_arrive_expect_tx(&shared_.full[slot], bytes);
        bulk_load(stage(load_stage_), row + at, bytes, &shared_.full[slot]);  // [L]
      }
      load_stage_ = load_stage_ + 1 == plan_.num_stages ? 0 : load_stage_ + 1;
      ++num_loaded_;
    }
  }
  // Until all rows have been read from where they were.
  __device__ void drain() {
    while (num_loaded_ != num_stored_) store_next();
  }
  // Until they are where they belong.
  __device__ void finish() {
    drain();
    bulk_wait_group<0>();
  }

 private:
  __device__ char* stage(int32_t i) const { return stages_ + i * plan_.piece_bytes; }

  // Stores the oldest piece.
  __device__ void store_next() {
    const int32_t slot = first_slot_ + store_stage_;
    mbarrier_wait_parity(&shared_.full[slot], parity_);  // [L]
    __syncwarp();                                        // `bytes`
    const uint64_t to = shared_.to[slot][lane_];
    if (to != 0) {
      bulk_store(reinterpret_cast<void*>(to), stage(store_stage_),
                 static_cast<uint32_t>(shared_.bytes[slot]));
    }
    bulk_commit_group();
    if (++store_stage_ == plan_.num_stages) {
      store_stage_ = 0;
      parity_ ^= 1;
    }
    ++num_stored_;
    bulk_wait_group_read<1>();  // [F] of the piece before
    __syncwarp();
  }

  const Plan& plan_;
  Shared& shared_;
  const int32_t first_slot_, lane_;
  char* const stages_;
  // Pieces, the stages of the next ones, the phase to wait for.
  int32_t num_loaded_ = 0, num_stored_ = 0, load_stage_ = 0, store_stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_ROW_MOVER_CUH_
