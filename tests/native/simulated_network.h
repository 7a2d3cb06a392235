// The network of cuda/network/simulated_hop.cuh: a thread for each rank that carries out what its
// kernels have posted, in the worst order that the chosen model allows.
#ifndef JAX_EP_TESTS_NATIVE_SIMULATED_NETWORK_H_
#define JAX_EP_TESTS_NATIVE_SIMULATED_NETWORK_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/network/simulated_hop.cuh"

namespace jax_ep::gpu::test {

struct NetworkModel {
  // What is ordered beside a signal and the bytes of its own put_signal.
  enum class Order {
    kPair,  // "rc": a signal comes after all that was posted before it to the same queue pair
    kNone,  // "srd": nothing
  };
  // Bytes travel in fragments. A source is read when a fragment leaves.
  enum class Departure {
    kAtOnce,         // in the order of posting, whole
    kRandom,         // after a random delay, in any order
    kYoungestFirst,  // likewise, the youngest of those that may leave first
  };
  const char* name;
  Order order;
  Departure departure;
  uint64_t
      delay_us;  // a fragment's is a quarter to five quarters of it; of one in 16 four times that
  uint64_t fragment_bytes;
  uint64_t seed;
};

// Of one seed, that kernels are tried over; the first one is calm.
inline std::vector<NetworkModel> NetworkModels(uint64_t seed) {
  using Order = NetworkModel::Order;
  using Departure = NetworkModel::Departure;
  return {{"rc, at once", Order::kPair, Departure::kAtOnce, 0, 0, seed},
          {"rc, random", Order::kPair, Departure::kRandom, 1000, 2048, seed},
          {"srd, random", Order::kNone, Departure::kRandom, 1000, 2048, seed},
          {"srd, youngest first", Order::kNone, Departure::kYoungestFirst, 1000, 2048, seed}};
}

// Of ranks that all lie on the current device.
class SimulatedNetwork {
 public:
  SimulatedNetwork(int num_ranks, int num_queues, size_t num_bytes, size_t num_signals,
                   const NetworkModel& model);
  // When no kernel uses it any more.
  ~SimulatedNetwork();
  SimulatedNetwork(const SimulatedNetwork&) = delete;
  SimulatedNetwork& operator=(const SimulatedNetwork&) = delete;

  SimulatedHop hop(int rank) const;
  HopMemory memory(int rank) const;
  // Fragments that have left before older ones.
  uint64_t num_out_of_order() const;

 private:
  class Nic;
  std::vector<std::unique_ptr<Nic>> nics_;
};

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_SIMULATED_NETWORK_H_
