// The Python module jax_ep._probe, which measures links and memory for the benchmark and the
// doctor: allocates, launches, times by events, checks what arrived.
//
// Everything is freed before a function returns: memory by cudaMalloc, beside XLA's pool, so that
// peer access is all that another device of this process needs to reach it.
#include "cuda/probe/link_probe.h"

#include <cuda_runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "xla_ffi/memory/driver.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

constexpr uint64_t kTimeoutNs = uint64_t{5} * 1000 * 1000 * 1000;  // of a wait on the device
constexpr int kPattern = 0x5a;

class DeviceMemory {
 public:
  DeviceMemory(int ordinal, size_t bytes, int fill) : ordinal_(ordinal) {
    const DeviceScope scope(ordinal);
    Check(cudaMalloc(&data_, bytes), std::to_string(bytes) + " bytes beside JAX's memory pool" +
                                         OnDevice(ordinal) +
                                         " (see XLA_PYTHON_CLIENT_MEM_FRACTION)");
    const cudaError_t filled = cudaMemset(data_, fill, bytes);
    if (filled != cudaSuccess) cudaFree(data_);
    Check(filled, "cudaMemset" + OnDevice(ordinal));
  }
  ~DeviceMemory() {
    const DeviceScope scope(ordinal_, std::nothrow);
    cudaFree(data_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  int ordinal_;
  void* data_ = nullptr;
};

// A device with its own stream, the events that time it, and a status word for its kernels.
class TimedStream {
 public:
  explicit TimedStream(int ordinal) : ordinal_(ordinal), status_(ordinal, sizeof(uint32_t), 0) {
    const DeviceScope scope(ordinal);
    Check(gpu::PrepareProbes(), "loading the probes' kernels" + OnDevice(ordinal));
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
          "a stream" + OnDevice(ordinal));
    Check(cudaEventCreate(&begin_), "an event" + OnDevice(ordinal));
    Check(cudaEventCreate(&end_), "an event" + OnDevice(ordinal));
    Check(cudaDeviceSynchronize(), "set-up" + OnDevice(ordinal));
  }
  ~TimedStream() {
    const DeviceScope scope(ordinal_, std::nothrow);
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  TimedStream(const TimedStream&) = delete;
  TimedStream& operator=(const TimedStream&) = delete;

  int ordinal() const { return ordinal_; }
  uint32_t* status() const { return status_.data<uint32_t>(); }

  // Enqueues `launch(stream)` between the two events.
  template <typename LaunchFn>
  void Enqueue(const std::string& what, const LaunchFn& launch) {
    const DeviceScope scope(ordinal_);
    Check(cudaEventRecord(begin_, stream_), what + OnDevice(ordinal_));
    Check(launch(stream_), what + OnDevice(ordinal_));
    Check(cudaEventRecord(end_, stream_), what + OnDevice(ordinal_));
  }
  // Waits for what was enqueued last; its seconds.
  double Finish(const std::string& what) {
    const DeviceScope scope(ordinal_);
    Check(cudaStreamSynchronize(stream_), what + OnDevice(ordinal_));
    uint32_t status = 0;
    Check(cudaMemcpy(&status, status_.data(), sizeof status, cudaMemcpyDeviceToHost),
          what + OnDevice(ordinal_));
    if (status == gpu::kProbeTimedOut) {
      Throw(what + OnDevice(ordinal_) + ": a wait took longer than " +
            std::to_string(kTimeoutNs / 1000 / 1000 / 1000) + " s");
    }
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin_, end_), what + OnDevice(ordinal_));
    return milliseconds / 1e3;
  }

 private:
  int ordinal_;
  DeviceMemory status_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void RequireArrived(const std::string& what, int ordinal, const void* row, int64_t row_bytes) {
  const DeviceScope scope(ordinal);
  std::vector<unsigned char> bytes(static_cast<size_t>(row_bytes));
  Check(cudaMemcpy(bytes.data(), row, bytes.size(), cudaMemcpyDeviceToHost),
        what + OnDevice(ordinal));
  if (!std::all_of(bytes.begin(), bytes.end(), [](unsigned char b) { return b == kPattern; })) {
    Throw(what + ": the data that arrived" + OnDevice(ordinal) + " are wrong");
  }
}

bool PeerAccess(int first, int second) {
  int possible = 0;
  Check(cudaDeviceCanAccessPeer(&possible, first, second),
        "cudaDeviceCanAccessPeer(" + std::to_string(first) + ", " + std::to_string(second) + ")");
  return possible != 0;
}

void EnablePeerAccess(int from, int to) {
  if (!PeerAccess(from, to)) {
    Throw("CUDA device " + std::to_string(from) + " cannot reach the memory of device " +
          std::to_string(to));
  }
  const DeviceScope scope(from);
  const cudaError_t status = cudaDeviceEnablePeerAccess(to, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // a later check must not report it
  } else {
    Check(status, "cudaDeviceEnablePeerAccess" + OnDevice(from));
  }
}

std::vector<double> MemoryCopy(int ordinal, int64_t num_bytes, int num_repeats) {
  const std::string what = "device memory copy";
  const auto bytes = static_cast<size_t>(num_bytes);
  const DeviceMemory src(ordinal, bytes, kPattern), dst(ordinal, bytes, 0);
  TimedStream timed(ordinal);
  std::vector<double> seconds;
  for (int i = -1; i < num_repeats; ++i) {  // the first is to warm up
    timed.Enqueue(what, [&](cudaStream_t stream) {
      return cudaMemcpyAsync(dst.data(), src.data(), bytes, cudaMemcpyDeviceToDevice, stream);
    });
    const double s = timed.Finish(what);
    if (i >= 0) seconds.push_back(s);
  }
  RequireArrived(what, ordinal, dst.data<char>() + num_bytes - 16, 16);
  return seconds;
}

std::vector<double> RowCopy(int ordinal, int64_t num_rows, int row_bytes, int num_copies,
                            int num_rounds, int num_sms, int num_repeats) {
  const std::string what = "row copy on " + std::to_string(num_sms) + " SMs";
  const int64_t bytes = num_rows * row_bytes;
  const DeviceMemory src(ordinal, bytes, kPattern);
  const DeviceMemory dst(ordinal, bytes * std::max(num_copies, 1), 0);
  TimedStream timed(ordinal);
  const gpu::ProbeCopy copy{src.data(), dst.data(), num_rows,       row_bytes,
                            num_copies, num_rounds, timed.status(), kTimeoutNs};
  std::vector<double> seconds;
  for (int i = -1; i < num_repeats; ++i) {
    timed.Enqueue(what,
                  [&](cudaStream_t stream) { return gpu::LaunchProbeCopy(copy, num_sms, stream); });
    const double s = timed.Finish(what);
    if (i >= 0) seconds.push_back(s / num_rounds);
  }
  if (num_copies > 0) {
    RequireArrived(what, ordinal, dst.data<char>() + bytes * num_copies - row_bytes, row_bytes);
  }
  return seconds;
}

std::vector<double> LinkCopy(int first, int second, int64_t num_rows, int row_bytes, int num_rounds,
                             int num_sms, int num_repeats) {
  const std::string what = "copy between CUDA devices " + std::to_string(first) + " and " +
                           std::to_string(second) + ", both ways, on " + std::to_string(num_sms) +
                           " SMs";
  EnablePeerAccess(first, second);
  EnablePeerAccess(second, first);
  const int64_t bytes = num_rows * row_bytes;
  const std::array<int, 2> ordinal{first, second};
  const std::array<DeviceMemory, 2> src{DeviceMemory(first, bytes, kPattern),
                                        DeviceMemory(second, bytes, kPattern)};
  const std::array<DeviceMemory, 2> dst{DeviceMemory(first, bytes, 0),
                                        DeviceMemory(second, bytes, 0)};
  std::array<TimedStream, 2> timed{TimedStream(first), TimedStream(second)};
  std::vector<double> seconds;
  for (int i = -1; i < num_repeats; ++i) {
    for (int d = 0; d < 2; ++d) {
      const gpu::ProbeCopy copy{src[d].data(), dst[1 - d].data(), num_rows,  row_bytes, 1,
                                num_rounds,    timed[d].status(), kTimeoutNs};
      timed[d].Enqueue(
          what, [&](cudaStream_t stream) { return gpu::LaunchProbeCopy(copy, num_sms, stream); });
    }
    const double there = timed[0].Finish(what), back = timed[1].Finish(what);
    if (i >= 0) seconds.push_back(std::max(there, back) / num_rounds);
  }
  for (int d = 0; d < 2; ++d) {
    RequireArrived(what, ordinal[d], dst[d].data<char>() + bytes - row_bytes, row_bytes);
  }
  return seconds;
}

std::vector<double> FlagHop(int first, int second, int num_round_trips, int num_repeats) {
  const std::string what =
      "flags between CUDA devices " + std::to_string(first) + " and " + std::to_string(second);
  EnablePeerAccess(first, second);
  EnablePeerAccess(second, first);
  const std::array<int, 2> ordinal{first, second};
  // Two words a device, zero before its kernel starts: the flag, and the result.
  const std::array<DeviceMemory, 2> words{DeviceMemory(first, 16, 0), DeviceMemory(second, 16, 0)};
  std::array<TimedStream, 2> timed{TimedStream(first), TimedStream(second)};
  std::vector<double> seconds;
  for (int i = -1; i < num_repeats; ++i) {
    for (int d = 0; d < 2; ++d) {
      const DeviceScope scope(ordinal[d]);
      Check(cudaMemset(words[d].data(), 0, 16), what);
      Check(cudaDeviceSynchronize(), what);
    }
    for (int d = 0; d < 2; ++d) {
      const gpu::ProbeFlagHop hop{words[d].data<uint64_t>(),
                                  words[1 - d].data<uint64_t>(),
                                  words[d].data<uint64_t>() + 1,
                                  num_round_trips,
                                  d == 0,
                                  timed[d].status(),
                                  kTimeoutNs};
      timed[d].Enqueue(what,
                       [&](cudaStream_t stream) { return gpu::LaunchProbeFlagHop(hop, stream); });
    }
    timed[0].Finish(what);
    timed[1].Finish(what);
    uint64_t nanoseconds = 0;
    const DeviceScope scope(first);
    Check(cudaMemcpy(&nanoseconds, words[0].data<uint64_t>() + 1, sizeof nanoseconds,
                     cudaMemcpyDeviceToHost),
          what);
    if (i >= 0) seconds.push_back(static_cast<double>(nanoseconds) / 1e9 / num_round_trips / 2);
  }
  return seconds;
}

nb::dict DeviceFacts(int ordinal) {
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, ordinal),
        "cudaGetDeviceProperties" + OnDevice(ordinal));
  nb::dict facts;
  facts["name"] = std::string(properties.name);
  facts["compute_capability"] =
      std::to_string(properties.major) + "." + std::to_string(properties.minor);
  facts["num_sms"] = properties.multiProcessorCount;
  facts["memory_bytes"] = static_cast<uint64_t>(properties.totalGlobalMem);
  return facts;
}

}  // namespace

NB_MODULE(_probe, m) {
  m.def("device", &DeviceFacts, nb::arg("ordinal"));
  m.def("peer_access", &PeerAccess, nb::arg("first"), nb::arg("second"),
        "Whether the first device can reach the second one's memory.");
  m.def("memory_copy", &MemoryCopy, nb::arg("ordinal"), nb::arg("num_bytes"),
        nb::arg("num_repeats"), nb::call_guard<nb::gil_scoped_release>(),
        "Seconds of the CUDA library's copy of num_bytes inside a device, by repeat.");
  m.def("row_copy", &RowCopy, nb::arg("ordinal"), nb::arg("num_rows"), nb::arg("row_bytes"),
        nb::arg("num_copies"), nb::arg("num_rounds"), nb::arg("num_sms"), nb::arg("num_repeats"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Seconds a round of loading each row once and storing it num_copies times, in a device; "
        "with 0 copies of reading alone.");
  m.def("link_copy", &LinkCopy, nb::arg("first"), nb::arg("second"), nb::arg("num_rows"),
        nb::arg("row_bytes"), nb::arg("num_rounds"), nb::arg("num_sms"), nb::arg("num_repeats"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Seconds a round of pushing the rows to each other at once: the slower direction's.");
  m.def("flag_hop", &FlagHop, nb::arg("first"), nb::arg("second"), nb::arg("num_round_trips"),
        nb::arg("num_repeats"), nb::call_guard<nb::gil_scoped_release>(),
        "Seconds from a device's releasing store until the other one's spinning thread sees it.");
}

}  // namespace jax_ep
