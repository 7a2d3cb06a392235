#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <random>
#include <thread>

#include "tests/native/check_cuda.h"
#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {
namespace {

constexpr int kNumStreams = 4;     // of a rank, for its copies
constexpr size_t kMaxCopies = 16;  // of a rank that are under way

uint64_t NowUs() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(now).count());
}

template <typename T>
T* HostMemory(size_t size) {
  void* memory = nullptr;
  CHECK_CUDA(cudaHostAlloc(&memory, std::max<size_t>(1, size) * sizeof(T), cudaHostAllocMapped));
  std::memset(memory, 0, std::max<size_t>(1, size) * sizeof(T));
  return static_cast<T*>(memory);
}

template <typename T>
T* DeviceMemory(size_t size) {
  void* memory = nullptr;
  CHECK_CUDA(cudaMalloc(&memory, std::max<size_t>(1, size) * sizeof(T)));
  CHECK_CUDA(cudaMemset(memory, 0, std::max<size_t>(1, size) * sizeof(T)));
  return static_cast<T*>(memory);
}

}  // namespace

// One rank's end of the network: its memory, and the thread that carries out what it posts.
class SimulatedNetwork::Nic {
 public:
  Nic(int rank, int num_ranks, int num_queues, size_t num_bytes, size_t num_signals,
      const NetworkModel& model)
      : num_ranks_(num_ranks),
        num_queues_(num_queues),
        model_(model),
        taken_(num_pairs()),
        retired_(num_pairs()),
        live_(num_pairs()),
        random_(model.seed * 1000 + static_cast<uint64_t>(rank)) {
    CHECK_CUDA(cudaGetDevice(&ordinal_));
    memory_ = {DeviceMemory<char>(num_bytes), HostMemory<uint64_t>(num_signals)};
    ring_ = HostMemory<NetworkDescriptor>(num_pairs() * kRingSlots);
    done_ = HostMemory<uint64_t>(num_pairs());
    posted_ = DeviceMemory<uint64_t>(num_pairs());
    for (cudaStream_t& stream : streams_) {
      CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
    for (size_t i = 0; i < kMaxCopies; ++i) {
      CHECK_CUDA(cudaEventCreateWithFlags(&free_events_.emplace_back(), cudaEventDisableTiming));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  ~Nic() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (cudaEvent_t event : free_events_) cudaEventDestroy(event);
    for (const Copy& copy : copies_) cudaEventDestroy(copy.ended);
    cudaFree(memory_.bytes);
    cudaFree(posted_);
    cudaFreeHost(memory_.signals);
    cudaFreeHost(ring_);
    cudaFreeHost(done_);
  }
  Nic(const Nic&) = delete;
  Nic& operator=(const Nic&) = delete;

  void Start(const std::vector<std::unique_ptr<Nic>>& all) {
    for (const auto& nic : all) peers_.push_back(nic->memory_);
    thread_ = std::thread([this] { Run(); });
  }
  void Stop() {
    stop_ = true;
    thread_.join();
    for (cudaStream_t stream : streams_) CHECK_CUDA(cudaStreamSynchronize(stream));
  }
  SimulatedHop hop() const { return {ring_, posted_, done_, memory_, num_queues_, num_ranks_}; }
  HopMemory memory() const { return memory_; }
  uint64_t num_out_of_order() const { return num_out_of_order_; }

 private:
  struct Operation {
    NetworkDescriptor descriptor;
    int rank;  // of the destination
    size_t fragments_left;
    bool is_done;
  };
  struct Fragment {
    Operation* operation;
    uint64_t offset, num_bytes, due_us;
  };
  struct Copy {
    Operation* operation;
    cudaEvent_t ended;
  };

  size_t num_pairs() const {
    return static_cast<size_t>(num_queues_) * static_cast<size_t>(num_ranks_);
  }
  uint64_t Random(uint64_t below) { return random_() % std::max<uint64_t>(1, below); }

  void Run() {
    CHECK_CUDA(cudaSetDevice(ordinal_));
    while (!stop_) {
      TakePosted();
      SendSignals();  // before what has just arrived: those that need not wait for it overtake
      EndCopies();
      SendSignals();
      Retire();
      BeginCopies();
    }
  }

  // [Q2]
  void TakePosted() {
    const uint64_t now = NowUs();
    const bool is_calm = model_.departure == NetworkModel::Departure::kAtOnce;
    for (size_t pair = 0; pair < num_pairs(); ++pair) {
      for (;; ++taken_[pair]) {
        const NetworkDescriptor& slot = ring_[pair * kRingSlots + taken_[pair] % kRingSlots];
        if (__atomic_load_n(&slot.sequence, __ATOMIC_ACQUIRE) != taken_[pair] + 1) break;
        auto operation = std::make_unique<Operation>(
            Operation{slot, static_cast<int>(pair) % num_ranks_, 0, false});
        const uint64_t size = slot.num_bytes;
        const uint64_t step = is_calm ? std::max<uint64_t>(1, size) : model_.fragment_bytes;
        for (uint64_t offset = 0; offset < size; offset += step) {
          uint64_t delay = model_.delay_us / 4 + Random(model_.delay_us);
          if (Random(16) == 0) delay *= 4;
          waiting_.push_back(
              {operation.get(), offset, std::min(step, size - offset), is_calm ? 0 : now + delay});
          ++operation->fragments_left;
        }
        live_[pair].push_back(std::move(operation));
      }
    }
  }

  // [Q4]
  void SendSignals() {
    for (auto& operations : live_) {
      bool are_done = true;  // those before
      for (auto& operation : operations) {
        const bool waits = !are_done && model_.order == NetworkModel::Order::kPair;
        const uint64_t kind = operation->descriptor.operation;
        const bool has_signal = (kind & (kAddSignal | kSetSignal)) != 0;
        if (!operation->is_done && operation->fragments_left == 0 && !(has_signal && waits)) {
          uint64_t* signal = peers_[operation->rank].signals + operation->descriptor.signal;
          const uint64_t value = operation->descriptor.value;
          if ((kind & kAddSignal) != 0) __atomic_fetch_add(signal, value, __ATOMIC_RELEASE);
          if ((kind & kSetSignal) != 0) __atomic_store_n(signal, value, __ATOMIC_RELEASE);
          operation->is_done = true;
        }
        are_done = are_done && operation->is_done;
      }
    }
  }

  // [Q3]
  void Retire() {
    for (size_t pair = 0; pair < num_pairs(); ++pair) {
      uint64_t& retired = retired_[pair];
      const uint64_t before = retired;
      for (; !live_[pair].empty() && live_[pair].front()->is_done; ++retired) {
        live_[pair].pop_front();
      }
      if (retired != before) __atomic_store_n(&done_[pair], retired, __ATOMIC_RELEASE);
    }
  }

  void EndCopies() {
    for (size_t i = 0; i < copies_.size();) {
      const cudaError_t status = cudaEventQuery(copies_[i].ended);
      if (status == cudaErrorNotReady) {
        ++i;
        continue;
      }
      CHECK_CUDA(status);
      --copies_[i].operation->fragments_left;
      free_events_.push_back(copies_[i].ended);
      copies_[i] = copies_.back();
      copies_.pop_back();
    }
  }

  // Of the next fragment to leave, in `waiting_`, which is in the order of posting; its size if none
  // may.
  size_t Choose() {
    const uint64_t now = NowUs();
    const size_t size = waiting_.size(), first = static_cast<size_t>(Random(size));
    for (size_t k = 0; k < size; ++k) {
      size_t i = k;
      if (model_.departure == NetworkModel::Departure::kRandom) i = (first + k) % size;
      if (model_.departure == NetworkModel::Departure::kYoungestFirst) i = size - 1 - k;
      if (waiting_[i].due_us <= now) return i;
    }
    return size;
  }

  void BeginCopies() {
    while (!waiting_.empty() && !free_events_.empty()) {
      const size_t i = Choose();
      if (i == waiting_.size()) break;
      const Fragment fragment = waiting_[i];
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
      num_out_of_order_ += i != 0;
      const NetworkDescriptor& d = fragment.operation->descriptor;
      const cudaStream_t stream = streams_[Random(kNumStreams)];
      CHECK_CUDA(cudaMemcpyAsync(peers_[fragment.operation->rank].bytes + d.dst + fragment.offset,
                                 memory_.bytes + d.src + fragment.offset, fragment.num_bytes,
                                 cudaMemcpyDeviceToDevice, stream));
      CHECK_CUDA(cudaEventRecord(free_events_.back(), stream));
      copies_.push_back({fragment.operation, free_events_.back()});
      free_events_.pop_back();
    }
  }

  const int num_ranks_, num_queues_;
  const NetworkModel model_;
  int ordinal_ = 0;
  HopMemory memory_{};
  NetworkDescriptor* ring_ = nullptr;
  uint64_t *done_ = nullptr, *posted_ = nullptr;
  std::vector<HopMemory> peers_;
  std::thread thread_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> num_out_of_order_{0};

  // The thread's own. By pair: descriptors taken, and done in their order; what is between.
  std::vector<uint64_t> taken_, retired_;
  std::vector<std::deque<std::unique_ptr<Operation>>> live_;
  std::vector<Fragment> waiting_;
  std::vector<Copy> copies_;
  std::vector<cudaEvent_t> free_events_;
  cudaStream_t streams_[kNumStreams] = {};
  std::mt19937_64 random_;
};

SimulatedNetwork::SimulatedNetwork(int num_ranks, int num_queues, size_t num_bytes,
                                   size_t num_signals, const NetworkModel& model) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    nics_.push_back(
        std::make_unique<Nic>(rank, num_ranks, num_queues, num_bytes, num_signals, model));
  }
  for (const auto& nic : nics_) nic->Start(nics_);
}

SimulatedNetwork::~SimulatedNetwork() {
  for (const auto& nic : nics_) nic->Stop();  // all, before the memory of one is freed
}

SimulatedHop SimulatedNetwork::hop(int rank) const { return nics_[rank]->hop(); }
HopMemory SimulatedNetwork::memory(int rank) const { return nics_[rank]->memory(); }

uint64_t SimulatedNetwork::num_out_of_order() const {
  uint64_t sum = 0;
  for (const auto& nic : nics_) sum += nic->num_out_of_order();
  return sum;
}

}  // namespace jax_ep::gpu::test
