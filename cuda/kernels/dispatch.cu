// dispatch: each rank pulls the rows of its experts from where their tokens live.
// After:    tokens[row] = x of rank src [t] for every kept row, (src, t, k) = recv_src[row];
// padding
//           is zero, the tail too if zero_tail; weights[row] = topk_weights of src [t, k], else 0.
// Roles:    num_sms blocks of 8 warps, one block an SM. Warps 0 and 1 each run a ring: they load
// each
//           token's row once (bulk copy, from the peer into shared memory) and store it to each of
//           its rows (bulk copies from the same shared memory). Warps 2..7 fetch the weights and
//           zero what holds no row.
// Buffers:  x, topk_weights | XLA, each rank | before the call | all ranks, [S2]..[E1]
//           stages          | shared memory  | ring's loads    | ring's stores
//           tokens, weights | XLA, own       | own blocks      | later kernels
// Protocol: 1. [S1] show x and topk_weights, [S2] wait for all. 2. Rings and helpers work through
//           the (token, source) pairs, handed out by a counter, and the rows. 3. [E1], [E2].
//           In a ring, token n uses stage n % S: [L] its load completes the stage's barrier (phase
//           n / S), [F] its stores have read the stage before token n + S is loaded into it.
// Reuse:    no memory outlives the call but the control block.
// Progress: [S1] waits for nothing; blocks do not wait for each other.
// Failure:  a timeout fills tokens and weights with NaN bits; see group_sync.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; longer ones than a stage go in
//           pieces, one after the other.
#include "cuda/kernels/kernels.cuh"
#include "cuda/layout/placement.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumRings = 2;
constexpr int kNumWarps = 8;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kMaxStages = 16;
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int kUnitsAtOnce = 4;
constexpr int64_t kStageBytes = 208 * 1024;  // of shared memory, for all stages of a block

// A ring's stages in shared memory, and what the token in each is for.
struct Ring {
  char* stages;               // [num_stages][stage_bytes]
  uint64_t* full;             // [num_stages]
  int32_t (*rows)[kMaxTopK];  // [num_stages], rows of the token
  int4* token;                // [num_stages]: number of rows, offset in the row, bytes
  int32_t num_stages;
  int32_t stage_bytes;
};

// Takes work from the device's counter until none is left. A unit is one piece of the row of one
// (source, token) pair; a ring takes kUnitsAtOnce, so that rings with fewer rows take more.
__device__ void run_ring(const GroupView& g, const TokenOrder& order, const DispatchArguments& a,
                         const Ring& ring, const uint64_t (*address)[kNumAddresses],
                         int32_t num_pieces) {
  const int32_t lane = threadIdx.x % 32;
  const auto num_tokens = static_cast<int32_t>(a.num_tokens);
  const int64_t num_units = int64_t{g.num_ranks} * num_tokens * num_pieces;

  uint32_t left = 0;  // lanes whose unit is still to be loaded
  bool exhausted = false;
  int32_t flat_token = 0, piece = 0, first_slot = 0, num_rows = 0;
  uint32_t num_loaded = 0;
  const auto load_next = [&]() {
    while (left == 0) {
      if (exhausted) return;
      uint32_t taken = 0;
      if (lane == 0) taken = atomicAdd(&g.control->local.next_unit, kUnitsAtOnce);
      const int64_t unit = int64_t{__shfl_sync(0xffffffffu, taken, 0)} + lane;
      exhausted = unit - lane + kUnitsAtOnce >= num_units;
      num_rows = 0;
      if (lane < kUnitsAtOnce && unit < num_units) {
        piece = static_cast<int32_t>(unit % num_pieces);
        flat_token = order.flat_token(static_cast<int32_t>(unit / num_pieces));
        first_slot = a.recv_offsets[flat_token];
        num_rows = a.recv_offsets[flat_token + 1] - first_slot;
      }
      left = __ballot_sync(0xffffffffu, num_rows > 0);
    }
    const int32_t from = __ffs(static_cast<int>(left)) - 1;
    left &= left - 1;
    const uint32_t stage = num_loaded++ % ring.num_stages;
    const int32_t count = __shfl_sync(0xffffffffu, num_rows, from);
    const int32_t slot = __shfl_sync(0xffffffffu, first_slot, from);
    if (lane == from) {
      const int32_t src = flat_token / num_tokens;
      const int64_t at = int64_t{piece} * ring.stage_bytes;
      const auto bytes = static_cast<uint32_t>(min(int64_t{ring.stage_bytes}, a.row_bytes - at));
      const uint64_t row = address[src][0] + (flat_token - src * num_tokens) * a.row_bytes + at;
      mbarrier_arrive_expect_tx(&ring.full[stage], bytes);
      bulk_load(ring.stages + stage * ring.stage_bytes, reinterpret_cast<const void*>(row), bytes,
                &ring.full[stage]);
      ring.token[stage] = int4{count, static_cast<int32_t>(at), static_cast<int32_t>(bytes), 0};
    }
    if (lane < count) ring.rows[stage][lane] = a.recv_order[slot + lane];
  };

  for (int32_t i = 0; i < ring.num_stages; ++i) load_next();
  for (uint32_t next = 0; next < num_loaded; ++next) {
    const uint32_t stage = next % ring.num_stages;
    while (!mbarrier_try_wait_parity(&ring.full[stage], next / ring.num_stages & 1)) {  // [L]
    }
    __syncwarp();  // what the lanes noted at the load
    const int4 token = ring.token[stage];
    if (lane < token.x) {
      bulk_store(static_cast<char*>(a.tokens) + ring.rows[stage][lane] * a.row_bytes + token.y,
                 ring.stages + stage * ring.stage_bytes, static_cast<uint32_t>(token.z));
    }
    bulk_commit_group();
    if (next > 0) {
      bulk_wait_group_read<1>();  // [F] of the token before
      __syncwarp();
      load_next();
    }
  }
  bulk_wait_group<0>();  // written: [E1] may follow
  __syncwarp();
}

// Weights and zeros, by the warps that run no ring.
__device__ void run_helpers(const GroupView& g, const DispatchArguments& a,
                            const uint64_t (*address)[kNumAddresses]) {
  const int32_t lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * (kNumWarps - kNumRings) + threadIdx.x / 32 - kNumRings;
  const int64_t num_warps = int64_t{gridDim.x} * (kNumWarps - kNumRings);
  int32_t used = 0;
  for (int64_t e = lane; e < a.num_local_experts; e += 32) used += a.group_sizes[e];
  used = __reduce_add_sync(0xffffffffu, used);
  const int64_t end = a.zero_tail ? a.capacity : used;
  const auto ids_per_rank = static_cast<int32_t>(a.num_tokens * a.top_k);
  for (int64_t batch = warp * 32; batch < end; batch += num_warps * 32) {
    const int64_t row = batch + lane;
    const int32_t flat = row < end ? a.recv_src[row] : 0;
    if (a.weights != nullptr && row < end) {
      float weight = 0.0f;
      if (flat != kNoSource) {
        const int32_t src = flat / ids_per_rank;
        const auto* weights = reinterpret_cast<const int32_t*>(address[src][1]);
        weight = __int_as_float(ld_relaxed_sys_i32(weights + (flat - src * ids_per_rank)));
      }
      a.weights[row] = weight;
    }
    uint32_t empty = __ballot_sync(0xffffffffu, row < end && flat == kNoSource);
    while (empty != 0) {
      const int64_t zero_row = batch + __ffs(static_cast<int>(empty)) - 1;
      empty &= empty - 1;
      auto* at = reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + zero_row * a.row_bytes);
      for (int64_t i = lane; i < a.row_bytes / 16; i += 32) at[i] = uint4{0, 0, 0, 0};
    }
  }
}

__device__ void poison(const DispatchArguments& a) {
  const int64_t begin = int64_t{blockIdx.x} * kNumThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kNumThreads;
  auto* tokens = static_cast<uint4*>(a.tokens);
  const uint4 ones{~0u, ~0u, ~0u, ~0u};
  for (int64_t i = begin; i < a.capacity * a.row_bytes / 16; i += stride) tokens[i] = ones;
  for (int64_t i = begin; a.weights != nullptr && i < a.capacity; i += stride) {
    a.weights[i] = __int_as_float(-1);
  }
}

__global__ __launch_bounds__(kNumThreads,
                             1) void dispatch_kernel(const __grid_constant__ GroupView g,
                                                     const __grid_constant__ DispatchArguments a,
                                                     int32_t num_stages, int32_t stage_bytes,
                                                     int32_t num_pieces) {
  extern __shared__ __align__(128) char stages[];
  __shared__ uint64_t address[kMaxPeers][kNumAddresses];
  __shared__ uint64_t full[kNumRings][kMaxStages];
  __shared__ int32_t rows[kNumRings][kMaxStages][kMaxTopK];
  __shared__ int4 token[kNumRings][kMaxStages];
  const int32_t warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int r = 0; r < kNumRings; ++r) {
      for (int s = 0; s < num_stages; ++s) mbarrier_init(&full[r][s], 1);
    }
    fence_mbarrier_init();
  }
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.x),
                                       reinterpret_cast<uint64_t>(a.topk_weights), 0};
  if (blockIdx.x == 0) send_start(g, own);                                   // [S1]
  if (!receive_start(g, OpKind::kDispatch, own, address)) return poison(a);  // [S2]

  if (warp < kNumRings) {
    fence_proxy_async();  // what [S2] made visible is read by the copy engine
    const TokenOrder order{g.num_ranks, static_cast<int32_t>(a.num_tokens), g.rank};
    const Ring ring{stages + int64_t{warp} * num_stages * stage_bytes,
                    full[warp],
                    rows[warp],
                    token[warp],
                    num_stages,
                    stage_bytes};
    run_ring(g, order, a, ring, address, num_pieces);
  } else {
    run_helpers(g, a, address);
  }

  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = is_last_block(g);
  __syncthreads();
  if (!last) return;
  send_end(g);                        // [E1]
  receive_end(g, OpKind::kDispatch);  // [E2]
  advance_epochs(g);
  if (threadIdx.x == 0) {
    g.control->local.num_blocks_done = 0;
    g.control->local.next_unit = 0;
  }
}

}  // namespace

cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& a, int num_sms,
                           cudaStream_t stream) {
  // Equal pieces, each a multiple of 16 bytes.
  const int64_t num_pieces = (a.row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  const int64_t piece = ((a.row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16;
  int64_t num_stages = kStageBytes / kNumRings / piece;
  num_stages = num_stages < kMaxStages ? num_stages : kMaxStages;
  dispatch_kernel<<<static_cast<unsigned>(num_sms), kNumThreads, kNumRings * num_stages * piece,
                    stream>>>(group, a, static_cast<int32_t>(num_stages),
                              static_cast<int32_t>(piece), static_cast<int32_t>(num_pieces));
  return cudaGetLastError();
}

cudaError_t PrepareDispatch() { return PrepareKernel(dispatch_kernel, kStageBytes); }

}  // namespace jax_ep::gpu
