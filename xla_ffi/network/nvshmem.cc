#include "xla_ffi/network/nvshmem.h"

#include <nvshmem_host.h>

#include <cstring>
#include <thread>

#include "xla_ffi/memory/driver.h"
#include "xla_ffi/network/exit_guard.h"

namespace jax_ep {
namespace {

constexpr char kSpentText[] =
    "NVSHMEM was started before in this process and has not been brought to an orderly end, so it "
    "cannot be started again: start the job again";
constexpr std::chrono::milliseconds kLookInterval{1};

std::string Text(const nvshmemi_version_t& version) {
  return std::to_string(version.major) + "." + std::to_string(version.minor) + "." +
         std::to_string(version.patch);
}

constexpr nvshmemi_version_t kBuiltVersion{
    NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};

void RequireZero(int status, const std::string& call) {
  if (status != 0) {
    Throw(call + " failed with status " + std::to_string(status) +
          "; with NVSHMEM_DEBUG=WARN it says more");
  }
}

}  // namespace

Nvshmem& Nvshmem::Get() {
  static Nvshmem* const nvshmem = new Nvshmem;
  return *nvshmem;
}

std::string Nvshmem::BuiltVersion() { return Text(kBuiltVersion); }

std::string Nvshmem::LoadedVersion() {
  nvshmemi_version_t version{};
  nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
  return Text(version);
}

std::string Nvshmem::UniqueId() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  RequireZero(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
  return std::string(reinterpret_cast<const char*>(&id), sizeof id);
}

std::string Nvshmem::BusId(int ordinal) {
  char id[32];
  Check(cudaDeviceGetPCIBusId(id, sizeof id, ordinal), "cudaDeviceGetPCIBusId" + OnDevice(ordinal));
  return id;
}

size_t Nvshmem::FreeBytes(int ordinal) {
  const DeviceScope scope(ordinal);
  size_t free = 0, total = 0;
  Check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo" + OnDevice(ordinal));
  return free;
}

void Nvshmem::Start(const std::string& unique_id, int rank, int num_ranks, int ordinal,
                    int64_t region_bytes, bool has_slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (unique_id.size() != sizeof id) {
    Throw("NVSHMEM's unique id has " + std::to_string(sizeof id) + " bytes; got " +
          std::to_string(unique_id.size()));
  }
  if (state_ == State::kSpent) Throw(kSpentText);
  if (state_ == State::kRunning) Throw("NVSHMEM is running already");
  const bool is_second = num_ranks_ > 0;
  // Theirs would be other ranks, another heap, and an end at another time.
  if (nvshmemx_init_status() > NVSHMEM_STATUS_IS_BOOTSTRAPPED ||
      (nvshmemx_init_status() == NVSHMEM_STATUS_IS_BOOTSTRAPPED && !is_second)) {
    Throw("something else in this process has started NVSHMEM");
  }
  if (is_second && (rank != rank_ || num_ranks != num_ranks_ || ordinal != ordinal_)) {
    Throw("NVSHMEM can be started again only as before: as process " + std::to_string(rank_) +
          " of " + std::to_string(num_ranks_) + OnDevice(ordinal_));
  }
  Check(cudaSetDevice(ordinal), "cudaSetDevice " + std::to_string(ordinal));
  Check(cudaFree(nullptr), "a context" + OnDevice(ordinal));
  Check(gpu::PrepareNetworkKernels(has_slots), "loading the network's kernels" + OnDevice(ordinal));

  std::memcpy(&id, unique_id.data(), sizeof id);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  RequireZero(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes),
              "nvshmemx_set_attr_uniqueid_args");
  state_ = State::kSpent;  // until all is well
  GuardExit([] { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_BOOTSTRAPPED; });
  // The host's part gives a status where nvshmemx_init_attr would call exit(). It gives 0 also if
  // processes have met and nothing else has come about, and what comes next would call exit().
  RequireZero(nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes),
              "nvshmemx_hostlib_init_attr");
  if (nvshmemx_init_status() < NVSHMEM_STATUS_IS_INITIALIZED) {
    Throw(
        "NVSHMEM has met the other processes and then failed: it has no transport to one of them "
        "(see NVSHMEM_REMOTE_TRANSPORT), or no memory for its heap (NVSHMEM_SYMMETRIC_SIZE); with "
        "NVSHMEM_DEBUG=WARN it says more");
  }
  // Then the device's part, which is linked into this library: what nvshmemx_init_attr would do.
  int provided = 0;
  RequireZero(nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided,
                                   NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, kBuiltVersion),
              "nvshmemi_init_thread");
  if (nvshmem_my_pe() != rank || nvshmem_n_pes() != num_ranks) {
    Throw("NVSHMEM counts this process as " + std::to_string(nvshmem_my_pe()) + " of " +
          std::to_string(nvshmem_n_pes()) + ", not as " + std::to_string(rank) + " of " +
          std::to_string(num_ranks));
  }
  rank_ = rank;
  num_ranks_ = num_ranks;
  ordinal_ = ordinal;
  Allocate(region_bytes);
  state_ = State::kRunning;
}

// What a running kernel would wait for must be there before: see Buffers in link_check.cuh.
void Nvshmem::Allocate(int64_t region_bytes) {
  const size_t bytes = gpu::link_check_bytes(num_ranks_);
  link_bytes_ = static_cast<char*>(nvshmem_malloc(bytes));
  link_signals_ = static_cast<uint64_t*>(nvshmem_calloc(num_ranks_, sizeof(uint64_t)));
  if (link_bytes_ == nullptr || link_signals_ == nullptr) {
    Throw("NVSHMEM's heap has no room for " + std::to_string(bytes) +
          " bytes: see NVSHMEM_SYMMETRIC_SIZE");
  }
  const std::string what = "NVSHMEM's set-up" + OnDevice(ordinal_);
  if (region_bytes > 0) {
    region_ = static_cast<char*>(nvshmem_malloc(static_cast<size_t>(region_bytes)));
    if (region_ == nullptr) {
      Throw("NVSHMEM's heap has no room for " + std::to_string(region_bytes) +
            " bytes: see NVSHMEM_SYMMETRIC_SIZE");
    }
    region_bytes_ = region_bytes;
    Check(cudaMemset(region_, 0, static_cast<size_t>(region_bytes)), what);
    Check(cudaDeviceSynchronize(), what);
  }
  Check(cudaHostAlloc(&results_, num_ranks_ * sizeof *results_, cudaHostAllocMapped), what);
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), what);
  Check(cudaEventCreateWithFlags(&checked_, cudaEventDisableTiming), what);
}

void Nvshmem::Free() {
  if (region_ != nullptr) nvshmem_free(region_);
  region_ = nullptr;
  nvshmem_free(link_signals_);
  nvshmem_free(link_bytes_);
  cudaEventDestroy(checked_);
  cudaStreamDestroy(stream_);
  cudaFreeHost(results_);
}

void Nvshmem::RequireRunning() const {
  if (state_ != State::kRunning) Throw("NVSHMEM is not running");
}

std::vector<gpu::LinkResult> Nvshmem::CheckLinks(std::chrono::nanoseconds timeout) {
  std::lock_guard<std::mutex> lock(mutex_);
  RequireRunning();
  const std::string what = "checking the network" + OnDevice(ordinal_);
  Check(cudaSetDevice(ordinal_), what);
  for (int r = 0; r < num_ranks_; ++r) results_[r] = gpu::kLinkUnknown;
  const gpu::LinkCheck check{
      link_bytes_, link_signals_, results_, ++round_, static_cast<uint64_t>(timeout.count()),
      rank_,       num_ranks_};
  Check(gpu::LaunchLinkCheck(check, stream_), what);
  Check(cudaEventRecord(checked_, stream_), what);
  // Not cudaStreamSynchronize: NVSHMEM's proxy thread makes calls into CUDA for the kernel.
  for (;;) {
    const cudaError_t status = cudaEventQuery(checked_);
    if (status == cudaSuccess) break;
    if (status != cudaErrorNotReady) Check(status, what);
    std::this_thread::sleep_for(kLookInterval);
  }
  return std::vector<gpu::LinkResult>(results_, results_ + num_ranks_);
}

gpu::NetworkPart Nvshmem::Part() {
  std::lock_guard<std::mutex> lock(mutex_);
  RequireRunning();
  gpu::NetworkPart part = gpu::MakeNetworkPart();
  part.region = region_;
  part.region_bytes = region_bytes_;
  part.num_processes = num_ranks_;
  return part;
}

std::vector<bool> Nvshmem::MappedPeers() {
  std::lock_guard<std::mutex> lock(mutex_);
  RequireRunning();
  std::vector<bool> mapped;
  for (int r = 0; r < num_ranks_; ++r) mapped.push_back(nvshmem_ptr(link_bytes_, r) != nullptr);
  return mapped;
}

void Nvshmem::Finalize() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (state_ == State::kIdle) return;
  if (state_ == State::kSpent) Throw(kSpentText);
  state_ = State::kSpent;
  // NVSHMEM calls exit() where the device has failed.
  Check(cudaSetDevice(ordinal_), "NVSHMEM's end" + OnDevice(ordinal_));
  Check(cudaDeviceSynchronize(), "NVSHMEM's end" + OnDevice(ordinal_));
  Free();
  nvshmem_finalize();
  // Of the two parts that Start has started NVSHMEM 3.4.5 counts each one, and ends with the last.
  if (nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED) nvshmemx_hostlib_finalize();
  if (nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED) Throw("NVSHMEM has not ended");
  state_ = State::kIdle;
}

}  // namespace jax_ep
