// The ranks of a group as streams of this process on one GPU, and what each has for a case.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_RANKS_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_RANKS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda/launch.h"
#include "cuda/memory/slots.h"
#include "tests/native/call_arguments.h"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_oracle.h"

namespace jax_ep::gpu::test {

inline constexpr int kMaxRanks = 8;
inline constexpr uint64_t kSlotBytes = 24 << 20;  // of a device
inline constexpr uint64_t kSlotAreaBytes = slot_area_bytes(kSlotBytes, kMaxRanks);
inline constexpr uint64_t kSecond = 1000000000;  // ns

// Device memory of one allocation, so that a tool sees every access beyond its end.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(1, size) * sizeof(T)));
    Fill(0xff);
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    CHECK_CUDA(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void Fill(int byte) { CHECK_CUDA(cudaMemset(data_, byte, size_ * sizeof(T))); }
  void Fill(int byte, cudaStream_t stream) {
    CHECK_CUDA(cudaMemsetAsync(data_, byte, size_ * sizeof(T), stream));
  }
  T* get() { return data_; }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    CHECK_CUDA(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// All ranks of one GPU: streams, control blocks, error records.
class Group {
 public:
  Group() {
    for (int r = 0; r < kMaxRanks; ++r) {
      CHECK_CUDA(cudaStreamCreateWithFlags(&stream_[r], cudaStreamNonBlocking));
      CHECK_CUDA(cudaMalloc(&control_[r], kSlotsOffset + kSlotBytes));
      CHECK_CUDA(cudaMemset(control_[r], 0, kSlotsOffset + kSlotBytes));
      CHECK_CUDA(cudaHostAlloc(&error_[r], sizeof(ErrorRecord), cudaHostAllocMapped));
      std::memset(error_[r], 0, sizeof(ErrorRecord));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  ~Group() {
    for (int r = 0; r < kMaxRanks; ++r) {
      cudaStreamDestroy(stream_[r]);
      cudaFree(control_[r]);
      cudaFreeHost(error_[r]);
    }
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Of a group of the devices in `slots`, as the rank-th of them sees it.
  GroupView View(int rank, const std::vector<int>& slots, uint64_t operation,
                 uint64_t timeout_ns) const {
    const int own = slots[rank];
    GroupView view{};
    view.control = control_[own];
    CHECK_CUDA(cudaHostGetDevicePointer(&view.error, error_[own], 0));
    view.operation = operation;
    view.call = ++num_calls_;
    view.slot_area_bytes = kSlotAreaBytes;
    error_[own]->arrival_timeout_ns = error_[own]->progress_timeout_ns = timeout_ns;
    view.rank = rank;
    view.num_ranks = static_cast<int32_t>(slots.size());
    for (int q = 0; q < view.num_ranks; ++q) {
      view.peer[q].control = control_[slots[q]];
      view.peer[q].shift = 0;
      view.peer[q].slot_here = slots[q];
      view.peer[q].slot_there = own;
    }
    return view;
  }
  // Of the first devices: the slot of each is its rank.
  GroupView View(int rank, int num_ranks, uint64_t operation, uint64_t timeout_ns) const {
    std::vector<int> slots(num_ranks);
    std::iota(slots.begin(), slots.end(), 0);
    return View(rank, slots, operation, timeout_ns);
  }
  cudaStream_t stream(int rank) const { return stream_[rank]; }
  ErrorRecord& error(int rank) const { return *error_[rank]; }
  ControlBlock* control(int rank) const { return control_[rank]; }

  // Of all ranks, between calls: as after a new beginning.
  void SetUpAgain() {
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < kMaxRanks; ++r) {
      CHECK_CUDA(cudaMemset(control_[r], 0, kSlotsOffset + kSlotBytes));
      std::memset(error_[r], 0, sizeof(ErrorRecord));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }

 private:
  cudaStream_t stream_[kMaxRanks];
  ControlBlock* control_[kMaxRanks];
  ErrorRecord* error_[kMaxRanks];
  mutable uint64_t num_calls_ = 0;
};

// One rank's buffers for one case, all poisoned but the operands.
struct Buffers {
  explicit Buffers(const Data& d, int r)
      : ids(d.ids[r]),
        same_ids(d.ids[r]),
        send_row(d.num_tokens * d.top_k),
        recv_src(d.capacity),
        recv_order(d.capacity),
        recv_offsets(d.num_ranks * d.num_tokens + 1),
        group_sizes(d.num_local),
        expert_counts(d.num_local),
        expert_load(d.num_experts),
        counters(3),
        x(d.x[r]),
        g(d.g[r]),
        tokens(d.capacity * d.row_bytes),
        d_y(d.capacity * d.row_bytes),
        landing(d.num_ranks * d.num_tokens * d.row_bytes),
        y(d.y[r]),
        partial(d.num_ranks * d.num_tokens * d.row_bytes),
        out(d.num_tokens * d.row_bytes),
        topk_weights(d.topk_weights[r]),
        weights(d.capacity),
        row_weights(d.row_weights[r]),
        values(d.values[r]),
        collected(d.num_tokens * d.top_k),
        d_weights(d.capacity) {}

  // To zeros, so that a kernel's own NaN is seen.
  void ClearResults() {
    for (Buffer<uint8_t>* rows : {&tokens, &d_y, &out}) rows->Fill(0);
    for (Buffer<float>* values : {&weights, &collected, &d_weights}) values->Fill(0);
  }

  LayoutArguments Layout(const Data& d) { return LayoutOf(Sizes(d), Pointers()); }
  // With a landing area, as where peers cannot reach `tokens`; otherwise without.
  DispatchArguments Dispatch(const Data& d, bool lands = false) {
    DispatchArguments a = DispatchOf(Sizes(d), Pointers(), DispatchMode::kCopy);
    if (!d.weighted) {
      a.topk_weights = nullptr;
      a.weights = nullptr;
    }
    a.landing = lands ? landing.get() : nullptr;
    return a;
  }
  LayoutAndDispatchArguments LayoutAndDispatch(const Data& d) {
    return LayoutAndDispatchOf(Sizes(d), Pointers(), d.weighted);
  }
  // The gradient of combine: dispatch's weighted form.
  DispatchArguments Gradient(const Data& d, bool lands = false) {
    DispatchArguments a = DispatchOf(Sizes(d), Pointers(), DispatchMode::kWeighted);
    a.x = g.get();
    a.tokens = d_y.get();
    a.landing = lands ? landing.get() : nullptr;
    return a;
  }
  CombineArguments Combine(const Data& d) {
    CombineArguments a = CombineOf(Sizes(d), Pointers());
    if (d.weighted) {
      a.weights = row_weights.get();
      a.values = values.get();
      a.collected = collected.get();
    }
    return a;
  }

  static CallSizes Sizes(const Data& d) {
    return {d.num_ranks,    d.num_tokens, d.top_k, d.num_experts, d.alignment,      d.capacity,
            d.num_channels, d.row_bytes,  d.type,  d.zero_tail,   d.expert_capacity};
  }
  CallBuffers<uint8_t> Pointers() {
    CallBuffers<uint8_t> b{};
    b.ids = ids.get();
    b.send_row = send_row.get();
    b.recv_src = recv_src.get();
    b.recv_order = recv_order.get();
    b.recv_offsets = recv_offsets.get();
    b.group_sizes = group_sizes.get();
    b.expert_counts = expert_counts.get();
    b.expert_load = expert_load.get();
    b.counters = counters.get();
    b.x = x.get();
    b.y = y.get();
    b.tokens = tokens.get();
    b.partial = partial.get();
    b.out = out.get();
    b.topk_weights = topk_weights.get();
    b.weights = weights.get();
    b.row_weights = row_weights.get();
    b.dots = d_weights.get();
    b.collected = collected.get();
    return b;
  }

  // A layout's tables, so that the other calls have something to do without one.
  void WriteTables(const Data& d, int r) {
    const auto write = [](Buffer<int32_t>& to, const std::vector<int32_t>& from) {
      CHECK_CUDA(cudaMemcpy(to.get(), from.data(), from.size() * 4, cudaMemcpyHostToDevice));
    };
    write(send_row, d.send_row[r]);
    write(recv_src, d.recv_src[r]);
    write(recv_order, d.recv_order[r]);
    write(recv_offsets, d.recv_offsets[r]);
    write(group_sizes, d.group_sizes[r]);
  }

  // Writes the ids again, after something else.
  void Rewrite(const Data& d, int r, cudaStream_t stream) {
    ids.Fill(0xee, stream);
    CHECK_CUDA(cudaMemcpyAsync(ids.get(), same_ids.get(), d.ids[r].size() * sizeof(int32_t),
                               cudaMemcpyDeviceToDevice, stream));
  }

  // Everything that a round writes, in the order of the stream.
  void Poison(cudaStream_t stream) {
    for (Buffer<int32_t>* table : {&send_row, &recv_src, &recv_order, &recv_offsets, &group_sizes,
                                   &expert_counts, &expert_load, &counters}) {
      table->Fill(0xee, stream);
    }
    tokens.Fill(0xff, stream);
    landing.Fill(0xff, stream);
    partial.Fill(0xff, stream);
    out.Fill(0xff, stream);
    weights.Fill(0xff, stream);
    collected.Fill(0xff, stream);
    d_y.Fill(0xff, stream);
    d_weights.Fill(0xff, stream);
  }

  Buffer<int32_t> ids, same_ids, send_row, recv_src, recv_order, recv_offsets, group_sizes,
      expert_counts, expert_load, counters;
  Buffer<uint8_t> x, g, tokens, d_y, landing, y, partial, out;
  Buffer<float> topk_weights, weights, row_weights, values, collected, d_weights;
};

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_RANKS_H_
