// The Python module jax_ep._nvshmem: NVSHMEM's start and end. Loaded only where a network is wanted,
// since it needs NVSHMEM's library (jax_ep/nvshmem.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla_ffi/memory/driver.h"
#include "xla_ffi/network/nvshmem.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

const char* Name(gpu::LinkResult result) {
  switch (result) {
    case gpu::kLinkGood:
      return "good";
    case gpu::kLinkSilent:
      return "silent";
    case gpu::kLinkWrong:
      return "wrong";
    default:
      return "unknown";
  }
}

// A call that NVSHMEM may never end. It runs on a thread of its own, which is left behind then, and
// which never comes by Python: there it would be ended while C++ is on its stack, if the interpreter
// exits before.
class Call {
 public:
  template <typename Fn>
  explicit Call(Fn fn) : state_(std::make_shared<State>()) {
    std::thread([state = state_, fn = std::move(fn)] {
      std::vector<std::string> result;
      std::optional<std::string> error;
      try {
        result = fn();
      } catch (const std::exception& e) {
        error = e.what();
      }
      const std::lock_guard<std::mutex> lock(state->mutex);
      state->result = std::move(result);
      state->error = std::move(error);
      state->has_ended = true;
      state->ended.notify_all();
    }).detach();
  }

  // Whether it ends, or has ended, within that time.
  bool Wait(double seconds) const {
    std::unique_lock<std::mutex> lock(state_->mutex);
    return state_->ended.wait_for(lock, std::chrono::duration<double>(seconds),
                                  [this] { return state_->has_ended; });
  }
  // When it has ended.
  std::vector<std::string> Result() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    if (!state_->has_ended) Throw("the call has not ended");
    if (state_->error) throw std::runtime_error(*state_->error);
    return state_->result;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable ended;
    bool has_ended = false;
    std::vector<std::string> result;
    std::optional<std::string> error;
  };
  std::shared_ptr<State> state_;
};

Call Start(const nb::bytes& unique_id, int rank, int num_ranks, int ordinal, int64_t region_bytes,
           bool has_slots) {
  std::string id(unique_id.c_str(), unique_id.size());
  return Call([id = std::move(id), rank, num_ranks, ordinal, region_bytes, has_slots] {
    Nvshmem::Get().Start(id, rank, num_ranks, ordinal, region_bytes, has_slots);
    return std::vector<std::string>();
  });
}

Call CheckLinks(double timeout) {
  return Call([timeout] {
    std::vector<std::string> names;
    const std::chrono::duration<double> seconds(timeout);
    for (gpu::LinkResult result :
         Nvshmem::Get().CheckLinks(std::chrono::duration_cast<std::chrono::nanoseconds>(seconds))) {
      names.push_back(Name(result));
    }
    return names;
  });
}

Call Finalize() {
  return Call([] {
    Nvshmem::Get().Finalize();
    return std::vector<std::string>();
  });
}

}  // namespace

NB_MODULE(_nvshmem, m) {
  nb::class_<Call>(m, "Call", "A call under way, which may never end.")
      .def("wait", &Call::Wait, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
           "Whether it ends within that time.")
      .def("result", &Call::Result, "What it gives, or raises, when it has ended.");
  m.def("built_version", &Nvshmem::BuiltVersion);
  m.def("loaded_version", &Nvshmem::LoadedVersion);
  m.def(
      "unique_id",
      [] {
        const std::string id = Nvshmem::UniqueId();
        return nb::bytes(id.data(), id.size());
      },
      "By which the processes find each other: one makes it, all start with it.");
  m.def(
      "free_bytes", [](int ordinal) { return Nvshmem::FreeBytes(ordinal); }, nb::arg("ordinal"),
      nb::call_guard<nb::gil_scoped_release>(), "That the device has left for a heap.");
  m.def(
      "bus_id", [](int ordinal) { return Nvshmem::BusId(ordinal); }, nb::arg("ordinal"),
      nb::call_guard<nb::gil_scoped_release>(), "Of the device, on its host.");
  m.def("start", &Start, nb::arg("unique_id"), nb::arg("rank"), nb::arg("num_ranks"),
        nb::arg("ordinal"), nb::arg("region_bytes"), nb::arg("has_slots"), "Collective.");
  m.def(
      "part",
      [] {
        static gpu::NetworkPart part;
        part = Nvshmem::Get().Part();
        return nb::capsule(&part, gpu::kNetworkPartName);
      },
      "What jax_ep._cuda needs for calls across nodes.");
  m.def("check_links", &CheckLinks, nb::arg("timeout"),
        "Collective. Of each rank: 'good' if its row has arrived whole, 'silent' if none has, "
        "'wrong'.");
  m.def(
      "mapped_peers", [] { return Nvshmem::Get().MappedPeers(); },
      nb::call_guard<nb::gil_scoped_release>(),
      "Of each rank, whether it is reached by stores and not over a network.");
  m.def("finalize", &Finalize, "Collective. Does nothing if NVSHMEM is not running.");
}

}  // namespace jax_ep
