// network_exchange: every rank sends chunks of rows to every other over several channels, through
// staging that is used again and again: what kernels across nodes do with a hop, and no more.
//
// After:    results.wrong_rows is 0, if the hop and the protocol keep what hop.cuh says.
// Roles:    block b is channel b; warp w < num_ranks sends to rank w, warp num_ranks + w receives from
//           rank w. A rank has nothing to send to itself.
// Buffers:  of each pair of ranks and each channel, num_slots chunks; offsets are ExchangeShape's.
//           staging | sender, bytes     | written by the sender, read by the network
//           landing | receiver, bytes   | written by the network, read by the receiver
//           arrived | receiver, signals | one a slot: how often it has been filled
//           credit  | sender, signals   | chunks that the receiver has read
// Protocol: chunk c is in slot c % num_slots, as its use c / num_slots + 1:
//           [X1] the sender waits until credit is above c - num_slots
//           [X2] fills staging and sends it, by the Protocol in question
//           [X3] the receiver waits until arrived is the use, and reads landing
//           [X4] adds one to credit
// Reuse:    credit above c - num_slots says that chunk c - num_slots was read, so the network has
//           read staging's slot and written landing's ([C] of hop.cuh), and nothing of the slot's use
//           before is under way.
// Progress: all blocks of all ranks are resident together, which the programs see to.
// Failure:  HopWait's, of a group of this rank alone: the peers find out for themselves.
#ifndef JAX_EP_TESTS_NATIVE_NETWORK_EXCHANGE_CUH_
#define JAX_EP_TESTS_NATIVE_NETWORK_EXCHANGE_CUH_

#include <cuda_runtime.h>

#include "cuda/network/hop.cuh"
#include "cuda/network/hop_wait.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/network_ranks.h"

namespace jax_ep::gpu::test {

enum class Protocol : int {
  kPutSignal,       // a chunk with its signal
  kFlushAndSignal,  // rows, flush, then the signal on another queue
  // Wrong: negative controls.
  kWithoutFlush,   // rows, then the signal on their queue
  kOtherQueue,     // rows, then the signal on another queue
  kWithoutCredit,  // as kPutSignal, but for [X1]
};
inline constexpr const char* kProtocolNames[] = {"put_signal", "flush_and_signal", "without_flush",
                                                 "other_queue", "without_credit"};

struct ExchangeShape {
  int num_ranks, num_channels, num_slots, rows_per_chunk, row_bytes;

  __host__ __device__ size_t chunk_bytes() const {
    return static_cast<size_t>(rows_per_chunk) * static_cast<size_t>(row_bytes);
  }
  __host__ __device__ int num_all_slots() const { return num_ranks * num_channels * num_slots; }
  __host__ __device__ int slot_of(int rank, int channel, uint64_t chunk) const {
    return (rank * num_channels + channel) * num_slots +
           static_cast<int>(chunk % static_cast<uint64_t>(num_slots));
  }
  __host__ __device__ size_t num_bytes() const { return 2 * num_all_slots() * chunk_bytes(); }
  __host__ __device__ int num_signals() const { return num_all_slots() + num_ranks * num_channels; }
  __device__ uint4* staging(const HopMemory& m, int slot) const {
    return reinterpret_cast<uint4*>(m.bytes + slot * chunk_bytes());
  }
  __device__ uint4* landing(const HopMemory& m, int slot) const {
    return staging(m, num_all_slots() + slot);
  }
  __device__ uint64_t* arrived(const HopMemory& m, int slot) const { return m.signals + slot; }
  __device__ uint64_t* credit(const HopMemory& m, int rank, int channel) const {
    return m.signals + num_all_slots() + rank * num_channels + channel;
  }
};

struct ExchangeResults {
  unsigned long long wrong_rows;
  unsigned long long ended_waits;
};

struct Exchange {
  ExchangeShape shape;
  HopMemory memory;
  ExchangeResults* results;
  uint64_t first_chunk;  // chunks that were exchanged before
  int num_chunks;
  int rank;
  Protocol protocol;
  uint64_t receiver_delay_ns;  // before it reads: staging is reused while landing is full
};

__device__ inline uint4 exchange_word(int from, int to, int channel, uint64_t chunk, int row,
                                      int i) {
  uint32_t x = static_cast<uint32_t>((from * 64 + to) * 64 + channel) * 0x9e3779b9u;
  x = (x ^ static_cast<uint32_t>(chunk)) * 0x85ebca6bu;
  x = (x ^ static_cast<uint32_t>(row * 4096 + i)) * 0xc2b2ae35u;
  return {x ^ x >> 15, static_cast<uint32_t>(chunk), static_cast<uint32_t>(row),
          static_cast<uint32_t>(i)};
}

// [X2]
template <typename Hop>
__device__ bool send_chunk(const Hop& hop, const Exchange& x, int to, int channel, uint64_t chunk,
                           HopWait& wait) {
  const ExchangeShape& s = x.shape;
  const int words = s.row_bytes / static_cast<int>(sizeof(uint4)), lane = threadIdx.x % 32;
  const int here = s.slot_of(to, channel, chunk), there = s.slot_of(x.rank, channel, chunk);
  const uint64_t use = chunk / static_cast<uint64_t>(s.num_slots) + 1;
  uint4* staging = s.staging(x.memory, here);
  uint4* landing = s.landing(x.memory, there);
  for (int i = lane; i < s.rows_per_chunk * words; i += 32) {
    staging[i] = exchange_word(x.rank, to, channel, chunk, i / words, i % words);
  }
  uint64_t* arrived = s.arrived(x.memory, there);
  wait.until(kProgress, use);
  if (x.protocol == Protocol::kPutSignal || x.protocol == Protocol::kWithoutCredit) {
    return hop.put_signal(channel, to, landing, staging, s.chunk_bytes(), arrived, use, wait);
  }
  for (int row = 0; row < s.rows_per_chunk; ++row) {
    if (!hop.put(channel, to, landing + row * words, staging + row * words, s.row_bytes, wait)) {
      return false;
    }
  }
  if (x.protocol == Protocol::kFlushAndSignal && !hop.flush(channel, wait)) return false;
  const int queue = x.protocol == Protocol::kWithoutFlush ? channel : channel + 1;
  return hop.add_signal(queue, to, arrived, 1, wait);
}

template <typename Hop>
__device__ bool send_all(const Hop& hop, const Exchange& x, int to, int channel, HopWait& wait) {
  const ExchangeShape& s = x.shape;
  const auto num_slots = static_cast<uint64_t>(s.num_slots);
  for (uint64_t c = x.first_chunk; c < x.first_chunk + static_cast<uint64_t>(x.num_chunks); ++c) {
    if (x.protocol != Protocol::kWithoutCredit && c >= num_slots) {
      const uint64_t read = c - num_slots + 1;
      if (!hop.wait_signal(s.credit(x.memory, to, channel), read, wait.until(kProgress, read))) {
        return false;  // [X1]
      }
    }
    if (!send_chunk(hop, x, to, channel, c, wait)) return false;
  }
  return true;
}

template <typename Hop>
__device__ bool receive_all(const Hop& hop, const Exchange& x, int from, int channel,
                            HopWait& wait) {
  const ExchangeShape& s = x.shape;
  const int words = s.row_bytes / static_cast<int>(sizeof(uint4)), lane = threadIdx.x % 32;
  const uint64_t start = globaltimer_ns();
  while (globaltimer_ns() - start < x.receiver_delay_ns) {
  }
  for (uint64_t c = x.first_chunk; c < x.first_chunk + static_cast<uint64_t>(x.num_chunks); ++c) {
    const int slot = s.slot_of(from, channel, c);
    const uint64_t use = c / static_cast<uint64_t>(s.num_slots) + 1;
    if (!hop.wait_signal(s.arrived(x.memory, slot), use, wait.until(kProgress, use))) {
      return false;  // [X3]
    }
    const uint4* landing = s.landing(x.memory, slot);
    for (int row = 0; row < s.rows_per_chunk; ++row) {
      bool is_wrong = false;
      for (int i = lane; i < words; i += 32) {
        const uint4 got = landing[row * words + i];
        const uint4 right = exchange_word(from, x.rank, channel, c, row, i);
        is_wrong |= got.x != right.x || got.y != right.y || got.z != right.z || got.w != right.w;
      }
      if (__any_sync(~0u, is_wrong) && lane == 0) atomicAdd(&x.results->wrong_rows, 1ull);
    }
    // [X4]
    wait.until(kProgress, c + 1);
    if (!hop.add_signal(channel, from, s.credit(x.memory, x.rank, channel), 1, wait)) return false;
  }
  return true;
}

template <typename Hop>
__global__ void exchange(Hop hop, Exchange x, GroupView g) {
  const int warp = static_cast<int>(threadIdx.x) / 32, channel = static_cast<int>(blockIdx.x);
  const int peer = warp % x.shape.num_ranks;
  if (peer == x.rank) return;
  HopWait wait(g, OpKind::kDispatch, peer);
  const bool ended = warp < x.shape.num_ranks ? send_all(hop, x, peer, channel, wait)
                                              : receive_all(hop, x, peer, channel, wait);
  if (!ended && is_first_lane()) atomicAdd(&x.results->ended_waits, 1ull);
}

// Of one rank, on its stream.
class ExchangeRank {
 public:
  explicit ExchangeRank(uint64_t timeout_ns) : rank_(timeout_ns) {
    CHECK_CUDA(cudaHostAlloc(&results_, sizeof(ExchangeResults), cudaHostAllocMapped));
    CHECK_CUDA(cudaMalloc(&counted_, sizeof(ExchangeResults)));
    Clear();
  }
  ~ExchangeRank() {
    cudaFree(counted_);
    cudaFreeHost(results_);
  }
  ExchangeRank(const ExchangeRank&) = delete;
  ExchangeRank& operator=(const ExchangeRank&) = delete;

  // Between exchanges.
  void Clear() {
    CHECK_CUDA(cudaMemset(counted_, 0, sizeof(ExchangeResults)));
    rank_.Clear();
  }
  template <typename Hop>
  void Launch(const Hop& hop, Exchange x) {
    x.results = counted_;
    const cudaStream_t stream = rank_.stream();
    exchange<<<x.shape.num_channels, 64 * x.shape.num_ranks, 0, stream>>>(hop, x, rank_.View());
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaMemcpyAsync(results_, counted_, sizeof *results_, cudaMemcpyDefault, stream));
  }
  // Of all exchanges since Clear, when the last one has ended.
  ExchangeResults Wait() {
    CHECK_CUDA(cudaStreamSynchronize(rank_.stream()));
    return *results_;
  }
  const ErrorRecord& error() const { return rank_.error(); }

 private:
  LoneRank rank_;
  ExchangeResults *results_ = nullptr, *counted_ = nullptr;
};

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_NETWORK_EXCHANGE_CUH_
