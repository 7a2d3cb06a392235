// copy_rows: rows copied by bulk copies, each loaded once and stored F times: what the rate of a
//           link, or of the expansion into expert order, is measured with; F = 0: of reading alone.
// After:    dst[f, i] = src[i] for every row i and copy f.
// Roles:    num_sms blocks, one an SM (their shared memory admits no second), of two warps. Lane 0
//           of each warp runs a ring; ring r of all takes rows r, r + rings, r + 2 rings, ..
// Buffers:  src    | this device or a peer | the host, before | the rings
//           stages | shared memory         | a ring's loads   | its stores
//           dst    | this device or a peer | the rings        | the host, after
// Protocol: row n of a ring uses stage n % S: [L] its load completes the stage's barrier (phase
//           n / S), [F] its stores have read the stage before row n + S is loaded into it.
// Reuse:    a launch starts with fresh barriers; rounds rewrite the same values.
// Progress: no block waits for another, nor for another device.
// Failure:  a load that takes longer than the timeout sets *status; the ring then ends.
// Limits:   rows of at most 16 KB, multiples of 16 bytes at 16-byte addresses.
//
// flag_hop: two devices pass a number to and fro, one thread each.
// After:    *nanoseconds = the time of num_round_trips round trips, each two hops, after the first
//           one, which absorbs that the two kernels do not start together.
// Buffers:  own_flag  | own device | the peer | this thread
//           peer_flag | the peer   | this thread | the peer
// Protocol: trip i: the one that begins releases i in the peer's flag [H1] and acquires i from its
//           own [H2]; the other acquires, then releases.
// Reuse:    flags are 0 before the launch and only grow.
// Progress: both kernels must run at once, on two devices.
// Failure:  a wait longer than the timeout sets *status; the peer then runs into its own.
#include "cuda/probe/link_probe.h"
#include "cuda/probe/timed_wait.cuh"
#include "cuda/ptx/bulk_copy.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumRings = 2;
constexpr int kNumThreads = kNumRings * 32;
constexpr int kMaxStages = 16;
constexpr int32_t kStageBytes = 208 * 1024;  // of shared memory, for all stages of a block
static_assert(kStageBytes / kNumRings / kMaxProbeRowBytes >= 2, "a ring has two stages at least");

// A ring's place in its rows, which it walks round and round, and in its stages.
struct Cursor {
  int64_t row;
  int32_t stage;
  uint32_t parity;  // of the stage's phase

  __device__ void advance(int64_t first, int64_t step, int64_t num_rows, int32_t num_stages) {
    row += step;
    if (row >= num_rows) row = first;
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__global__ __launch_bounds__(kNumThreads,
                             1) void copy_rows_kernel(const __grid_constant__ ProbeCopy a,
                                                      int32_t num_stages) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[kNumRings][kMaxStages];
  if (threadIdx.x == 0) {
    for (int r = 0; r < kNumRings; ++r) {
      for (int s = 0; s < num_stages; ++s) mbarrier_init(&full[r][s], 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;

  const int32_t ring = static_cast<int32_t>(threadIdx.x) / 32;
  char* stages = shared + int64_t{ring} * num_stages * a.row_bytes;
  const int64_t first = int64_t{blockIdx.x} * kNumRings + ring;
  if (first >= a.num_rows) return;
  const int64_t num_rings = int64_t{gridDim.x} * kNumRings;
  const int64_t num_turns = ((a.num_rows - first - 1) / num_rings + 1) * a.num_rounds;
  Cursor next_load{first, 0, 0}, next_store{first, 0, 0};
  const auto load = [&] {
    uint64_t* barrier = &full[ring][next_load.stage];
    mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(a.row_bytes));
    bulk_load(stages + int64_t{next_load.stage} * a.row_bytes,
              static_cast<const char*>(a.src) + next_load.row * a.row_bytes,
              static_cast<uint32_t>(a.row_bytes), barrier);
    next_load.advance(first, num_rings, a.num_rows, num_stages);
  };

  for (int64_t turn = 0; turn < num_stages && turn < num_turns; ++turn) load();
  for (int64_t turn = 0; turn < num_turns; ++turn) {
    const auto loaded = [&] {
      return mbarrier_try_wait_parity(&full[ring][next_store.stage], next_store.parity);
    };
    if (!wait_until(loaded, a.timeout_ns)) {  // [L]
      *a.status = kProbeTimedOut;
      break;
    }
    for (int64_t copy = 0; copy < a.num_copies; ++copy) {
      bulk_store(static_cast<char*>(a.dst) + (copy * a.num_rows + next_store.row) * a.row_bytes,
                 stages + int64_t{next_store.stage} * a.row_bytes,
                 static_cast<uint32_t>(a.row_bytes));
    }
    bulk_commit_group();
    next_store.advance(first, num_rings, a.num_rows, num_stages);
    if (turn > 0) {
      bulk_wait_group_read<1>();  // [F] of the row before, whose stage the next load takes
      if (turn - 1 + num_stages < num_turns) load();
    }
  }
  bulk_wait_group<0>();
}

__global__ void flag_hop_kernel(const __grid_constant__ ProbeFlagHop a) {
  uint64_t start = 0;
  for (uint64_t trip = 1; trip <= static_cast<uint64_t>(a.num_round_trips) + 1; ++trip) {
    if (a.begins) st_release_sys(a.peer_flag, trip);  // [H1]
    const auto arrived = [&] { return ld_acquire_sys(a.own_flag) >= trip; };
    if (!wait_until(arrived, a.timeout_ns)) {  // [H2]
      *a.status = kProbeTimedOut;
      return;
    }
    if (!a.begins) st_release_sys(a.peer_flag, trip);  // [H1]
    if (trip == 1) start = globaltimer_ns();
  }
  *a.nanoseconds = globaltimer_ns() - start;
}

}  // namespace

cudaError_t LaunchProbeCopy(const ProbeCopy& a, int num_sms, cudaStream_t stream) {
  if (a.num_rows < 1 || a.row_bytes < 16 || a.row_bytes > kMaxProbeRowBytes ||
      a.row_bytes % 16 != 0 || a.num_copies < 0 || a.num_rounds < 1 || num_sms < 1) {
    return cudaErrorInvalidValue;
  }
  int32_t num_stages = kStageBytes / kNumRings / a.row_bytes;
  num_stages = num_stages < kMaxStages ? num_stages : kMaxStages;
  // All of the shared memory whatever the stages need: one block an SM.
  copy_rows_kernel<<<static_cast<unsigned>(num_sms), kNumThreads, kStageBytes, stream>>>(
      a, num_stages);
  return cudaGetLastError();
}

cudaError_t LaunchProbeFlagHop(const ProbeFlagHop& a, cudaStream_t stream) {
  if (a.num_round_trips < 1) return cudaErrorInvalidValue;
  flag_hop_kernel<<<1, 1, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t PrepareProbes() {
  const cudaError_t error = cudaFuncSetAttribute(
      copy_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStageBytes);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, flag_hop_kernel);
}

}  // namespace jax_ep::gpu
