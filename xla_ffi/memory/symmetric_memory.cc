#include "xla_ffi/memory/symmetric_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <future>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

namespace jax_ep {
namespace {

constexpr char kPrefix[] = "jax_ep: ";

[[noreturn]] void Throw(const std::string& what) { throw std::runtime_error(kPrefix + what); }

void Check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) Throw(what + ": " + cudaGetErrorString(status));
}

// The driver's functions by name: machines that build or import this may have no driver.
struct Driver {
  template <typename Fn>
  static Fn* Load(const char* name) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || address == nullptr) Throw(std::string("no ") + name);
    return reinterpret_cast<Fn*>(address);
  }
#define JAX_EP_DRIVER(name) decltype(::name)* name = Load<decltype(::name)>(#name)
  JAX_EP_DRIVER(cuGetErrorString);
  JAX_EP_DRIVER(cuCtxGetCurrent);
  JAX_EP_DRIVER(cuCtxSetCurrent);
  JAX_EP_DRIVER(cuPointerGetAttribute);
  JAX_EP_DRIVER(cuMemPoolSetAccess);
  JAX_EP_DRIVER(cuMemGetAllocationGranularity);
  JAX_EP_DRIVER(cuMemCreate);
  JAX_EP_DRIVER(cuMemGetAddressRange);
  JAX_EP_DRIVER(cuMemSetAccess);
  JAX_EP_DRIVER(cuMemRetainAllocationHandle);
  JAX_EP_DRIVER(cuMemExportToShareableHandle);
  JAX_EP_DRIVER(cuMemImportFromShareableHandle);
  JAX_EP_DRIVER(cuMemAddressReserve);
  JAX_EP_DRIVER(cuMemAddressFree);
  JAX_EP_DRIVER(cuMemMap);
  JAX_EP_DRIVER(cuMemUnmap);
  JAX_EP_DRIVER(cuMemRelease);
#undef JAX_EP_DRIVER

  static const Driver& Get() {
    static const Driver* const driver = new Driver;
    return *driver;
  }

  std::string Text(CUresult result) const {
    const char* text = nullptr;
    cuGetErrorString(result, &text);
    return text == nullptr ? "unknown error" : text;
  }
};

void Check(CUresult status, const std::string& what) {
  if (status != CUDA_SUCCESS) Throw(what + ": " + Driver::Get().Text(status));
}

// Makes a device current on this thread; restores what was, without making a context for it.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal) {
    if (Driver::Get().cuCtxGetCurrent(&saved_) != CUDA_SUCCESS) saved_ = nullptr;
    Check(cudaSetDevice(ordinal), "cudaSetDevice " + std::to_string(ordinal));
  }
  ~DeviceScope() { Driver::Get().cuCtxSetCurrent(saved_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  CUcontext saved_ = nullptr;
};

// A hold on an allocation; mappings of it live without.
class AllocationHandle {
 public:
  explicit AllocationHandle(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  ~AllocationHandle() { Driver::Get().cuMemRelease(handle_); }
  AllocationHandle(const AllocationHandle&) = delete;
  AllocationHandle& operator=(const AllocationHandle&) = delete;
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_;
};

int64_t MemberCode(int64_t process, int64_t id) { return process << 32 | id; }

std::string OnDevice(int ordinal) { return " on CUDA device " + std::to_string(ordinal); }

std::vector<CUmemAccessDesc> AccessFor(const std::vector<int>& ordinals) {
  std::vector<CUmemAccessDesc> all;
  for (int ordinal : ordinals) {
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = ordinal;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    all.push_back(access);
  }
  return all;
}

// Zeroed memory of device `ordinal`, which must be current, for all of `ordinals` and for export.
std::shared_ptr<Mapping> Allocate(int ordinal, size_t bytes, const std::vector<int>& ordinals,
                                  const std::string& what) {
  const Driver& driver = Driver::Get();
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = ordinal;
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  size_t granularity = 0;
  Check(driver.cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        what);
  const size_t rounded = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle created;
  Check(driver.cuMemCreate(&created, rounded, &prop, 0), what);
  const AllocationHandle handle(created);
  auto mapping = std::make_shared<Mapping>(handle.get(), rounded, ordinals, what);
  Check(cudaMemset(reinterpret_cast<void*>(mapping->begin()), 0, rounded), what);
  Check(cudaDeviceSynchronize(), what);
  return mapping;
}

// A descriptor for other processes of the allocation that is mapped at `begin`.
Descriptor ExportAllocation(uint64_t begin, const std::string& what) {
  const Driver& driver = Driver::Get();
  CUmemGenericAllocationHandle retained;
  Check(driver.cuMemRetainAllocationHandle(&retained, reinterpret_cast<void*>(begin)), what);
  const AllocationHandle handle(retained);
  int fd = -1;
  Check(driver.cuMemExportToShareableHandle(&fd, handle.get(),
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        what);
  return Descriptor(fd);
}

// A descriptor of another process of this user, in this one.
Descriptor TakeDescriptor(int64_t pid, int fd) {
  const Descriptor process(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0)));
  if (process.get() < 0) Throw("pidfd_open " + std::to_string(pid) + ": " + strerror(errno));
  Descriptor mine(static_cast<int>(syscall(SYS_pidfd_getfd, process.get(), fd, 0)));
  if (mine.get() < 0) {
    Throw("pidfd_getfd from process " + std::to_string(pid) + ": " + strerror(errno) +
          "; run the processes as one user, and in a container allow the system call (for example "
          "--cap-add=SYS_PTRACE)");
  }
  return mine;
}

// Maps what process `pid` has exported as its descriptor `fd`.
std::shared_ptr<Mapping> MapPeer(int64_t pid, int fd, size_t bytes,
                                 const std::vector<int>& ordinals, const std::string& what) {
  const Descriptor mine = TakeDescriptor(pid, fd);
  CUmemGenericAllocationHandle imported;
  Check(Driver::Get().cuMemImportFromShareableHandle(
            &imported, reinterpret_cast<void*>(static_cast<intptr_t>(mine.get())),
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "importing " + what);
  const AllocationHandle handle(imported);
  return std::make_shared<Mapping>(handle.get(), bytes, ordinals, what);
}

// For the kernels that run, too.
void WriteTimeouts(const Timeouts& timeouts, gpu::ErrorRecord* record) {
  __atomic_store_n(&record->arrival_timeout_ns, timeouts.arrival.count(), __ATOMIC_RELEASE);
  __atomic_store_n(&record->progress_timeout_ns, timeouts.progress.count(), __ATOMIC_RELEASE);
}

// The driver's own kernels for copies are loaded at their first use, which may wait for the whole
// device; later a peer may be spinning there.
void WarmUpCopies(const Mapping& staging, const std::string& what) {
  auto* begin = reinterpret_cast<char*>(staging.begin());
  for (size_t bytes : {size_t{256}, staging.bytes() / 2}) {
    Check(cudaMemcpyAsync(begin, begin + staging.bytes() / 2, bytes, cudaMemcpyDeviceToDevice),
          what);
  }
  Check(cudaDeviceSynchronize(), what);
}

}  // namespace

Descriptor::Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

Mapping::Mapping(uint64_t allocation_handle, size_t bytes, const std::vector<int>& ordinals,
                 const std::string& what)
    : bytes_(bytes) {
  const Driver& driver = Driver::Get();
  CUdeviceptr at = 0;
  Check(driver.cuMemAddressReserve(&at, bytes, 0, 0, 0), "address space for " + what);
  CUresult status = driver.cuMemMap(at, bytes, 0, allocation_handle, 0);
  if (status == CUDA_SUCCESS) {
    const std::vector<CUmemAccessDesc> access = AccessFor(ordinals);
    status = driver.cuMemSetAccess(at, bytes, access.data(), access.size());
    if (status != CUDA_SUCCESS) driver.cuMemUnmap(at, bytes);
  }
  if (status != CUDA_SUCCESS) driver.cuMemAddressFree(at, bytes);
  Check(status, "mapping " + what);
  begin_ = at;
}

Mapping::~Mapping() {
  Driver::Get().cuMemUnmap(begin_, bytes_);
  Driver::Get().cuMemAddressFree(begin_, bytes_);
}

SymmetricMemory& SymmetricMemory::Get() {
  static SymmetricMemory* const memory = new SymmetricMemory;
  return *memory;
}

SymmetricMemory::Device* SymmetricMemory::FindLocal(int ordinal) {
  for (Device& device : devices_) {
    if (device.ordinal == ordinal) return &device;
  }
  return nullptr;
}

std::vector<int> SymmetricMemory::Ordinals() const {
  std::vector<int> ordinals;
  for (const Device& device : devices_) ordinals.push_back(device.ordinal);
  return ordinals;
}

int64_t SymmetricMemory::Member(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* device = FindLocal(ordinal);
  return device == nullptr ? -1 : device->member;
}

SymmetricMemory::Device SymmetricMemory::MakeDevice(int ordinal, int64_t member,
                                                    const std::vector<int>& ordinals) {
  const DeviceScope scope(ordinal);
  const std::string on = OnDevice(ordinal);
  int major = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal),
        "compute capability" + on);
  if (major != 9) {
    Throw("the CUDA kernels are built for Hopper (sm_90a); CUDA device " + std::to_string(ordinal) +
          " has compute capability " + std::to_string(major) + ".x");
  }
  for (int other : ordinals) {
    if (other == ordinal) continue;
    int possible = 0;
    Check(cudaDeviceCanAccessPeer(&possible, ordinal, other), "cudaDeviceCanAccessPeer" + on);
    if (possible == 0) {
      Throw("CUDA device " + std::to_string(ordinal) + " cannot reach the memory of device " +
            std::to_string(other));
    }
    const cudaError_t status = cudaDeviceEnablePeerAccess(other, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();  // by XLA; a later check must not report it
    } else {
      Check(status, "cudaDeviceEnablePeerAccess" + on);
    }
  }
  Device device;
  if (const auto last = retired_.find(member); last != retired_.end()) {
    // Its former peers have ended their calls, and this device's come one after the other.
    device.staging = last->second.staging;
    device.staging_bytes = last->second.staging_bytes;
    if (last->second.reusable) {
      device.control = last->second.control;
      device.error = last->second.error;
    }
  }
  if (device.control == nullptr) {
    device.control = Allocate(ordinal, sizeof(gpu::ControlBlock), ordinals, "control memory" + on);
    gpu::ErrorRecord* record = nullptr;
    Check(cudaHostAlloc(&record, sizeof *record, cudaHostAllocMapped), "error record" + on);
    device.error = {record, [](gpu::ErrorRecord* r) { cudaFreeHost(r); }};
  }
  device.ordinal = ordinal;
  device.member = member;
  Check(cudaHostGetDevicePointer(&device.error_on_device, device.error.get(), 0),
        "error record" + on);
  Check(gpu::PrepareKernels(), "loading the kernels" + on);
  Check(cudaDeviceSynchronize(), "set-up" + on);
  return device;
}

void SymmetricMemory::Setup(int64_t process, int64_t num_processes, const std::vector<int>& ids,
                            const std::vector<int>& ordinals, size_t staging_bytes,
                            bool staged_only) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Device> devices = devices_;
  bool changed = devices.empty();
  if (devices.empty()) {
    for (size_t i = 0; i < ordinals.size(); ++i) {
      devices.push_back(MakeDevice(ordinals[i], MemberCode(process, ids.at(i)), ordinals));
    }
  }
  for (Device& device : devices) {
    if (device.staging_bytes >= staging_bytes) continue;
    const DeviceScope scope(device.ordinal);
    const std::string what = "a staging region of " + std::to_string(staging_bytes) + " bytes" +
                             OnDevice(device.ordinal);
    auto staging = Allocate(device.ordinal, staging_bytes, ordinals, what);
    WarmUpCopies(*staging, what);
    device.staging = std::move(staging);
    device.staging_bytes = staging_bytes;
    changed = true;
  }
  if (devices_.empty()) {
    // Nothing fails from here on for want of anything. All ranks of a process that begins anew are
    // in it and start at epoch 0: captured command buffers work again too.
    for (const Device& device : devices) {
      const DeviceScope scope(device.ordinal);
      const std::string what = "control memory" + OnDevice(device.ordinal);
      std::memset(device.error.get(), 0, sizeof(gpu::ErrorRecord));
      WriteTimeouts(timeouts_, device.error.get());
      Check(cudaMemset(device.control_block(), 0, sizeof(gpu::ControlBlock)), what);
      Check(cudaDeviceSynchronize(), what);
    }
  }
  staged_only_ = staged_only;
  if (!changed) return;
  for (const Device& device : devices) {
    kept_.insert(kept_.end(), {device.control, device.staging, device.error});
  }
  process_ = process;
  num_processes_ = num_processes;
  devices_ = std::move(devices);
  retired_.clear();
  AssignSlots();
}

void SymmetricMemory::AssignSlots() {
  slot_.clear();
  for (const Device& device : devices_) slot_[device.member] = 0;
  for (const auto& [member, remote] : remote_) slot_[member] = 0;
  int next = 0;
  for (auto& [member, slot] : slot_) slot = next++;  // ascending: the same numbers everywhere
  if (next > gpu::kMaxPeers) Throw("more devices than an NVLink domain has");
}

std::string SymmetricMemory::Export(const std::vector<uint64_t>& pool_pointers) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Driver& driver = Driver::Get();
  if (!staged_only_ && pool_pointers.size() != devices_.size()) {
    Throw("one pool pointer a device is needed");
  }
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // peers take descriptors from here
  std::ostringstream out;
  out << getpid() << " " << sizeof(gpu::ControlBlock);
  const auto show = [&](uint64_t begin, size_t bytes, const std::string& what) {
    descriptors_.push_back(ExportAllocation(begin, what));
    out << " " << descriptors_.back().get() << " " << begin << " " << bytes;
  };
  const auto show_none = [&] { out << " -1 0 0"; };
  pool_problem_ = staged_only_ ? "JAX_EP_PATH=staged" : "";
  for (size_t i = 0; i < devices_.size(); ++i) {
    Device& device = devices_[i];
    const DeviceScope scope(device.ordinal);
    const std::string on = OnDevice(device.ordinal);
    out << " " << device.member;
    show(device.control->begin(), device.control->bytes(), "exporting control memory" + on);
    if (staged_only_) {
      show_none();
    } else {
      CUdeviceptr begin = 0;
      size_t bytes = 0;
      Check(driver.cuMemGetAddressRange(&begin, &bytes, pool_pointers[i]), "XLA's memory" + on);
      try {
        show(begin, bytes, "exporting XLA's memory" + on);
        device.pool_begin = begin;
        device.pool_end = begin + bytes;
      } catch (const std::runtime_error& error) {  // thrown before anything was shown
        pool_problem_ = error.what() + sizeof kPrefix - 1;
        show_none();
      }
    }
    if (device.staging == nullptr && !pool_problem_.empty()) {
      Throw("other processes cannot map XLA's memory (" + pool_problem_ +
            "), so rows have to go through a staging region. Pass "
            "jax_ep.initialize(staging_bytes=...) in every process: a call needs about num_ranks * "
            "tokens * row bytes, and says how much if that is too little. Or let XLA use its "
            "default allocator (unset XLA_PYTHON_CLIENT_ALLOCATOR)");
    }
    if (device.staging == nullptr) {
      show_none();
    } else {
      show(device.staging->begin(), device.staging->bytes(), "exporting the staging region" + on);
    }
  }
  return out.str();
}

void SymmetricMemory::Import(const std::vector<std::string>& exports) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<int> ordinals = Ordinals();
  std::map<int64_t, RemoteDevice> all;
  for (size_t process = 0; process < exports.size(); ++process) {
    if (static_cast<int64_t>(process) == process_) continue;
    std::istringstream in(exports[process]);
    int64_t pid = 0;
    size_t control_bytes = 0;
    if (!(in >> pid >> control_bytes)) continue;
    if (control_bytes != sizeof(gpu::ControlBlock)) {
      Throw("process " + std::to_string(process) + " runs another version of jax_ep");
    }
    for (int64_t member = 0; in >> member;) {
      const std::string whose = " of process " + std::to_string(process) + ", device " +
                                std::to_string(member & 0xffffffff);
      uint64_t begin = 0;
      const auto map = [&](const std::string& what) -> std::shared_ptr<Mapping> {
        int fd = -1;
        size_t bytes = 0;
        if (!(in >> fd >> begin >> bytes)) Throw("an incomplete message" + whose);
        return fd < 0 ? nullptr : MapPeer(pid, fd, bytes, ordinals, what + whose);
      };
      RemoteDevice remote;
      remote.control = map("control memory");
      remote.pool = map("XLA's memory");
      if (remote.pool != nullptr) remote.shift = static_cast<int64_t>(remote.pool->begin() - begin);
      remote.staging = map("the staging region");
      all[member] = std::move(remote);
    }
  }
  remote_ = std::move(all);
  AssignSlots();
}

void SymmetricMemory::CloseDescriptors() {
  std::lock_guard<std::mutex> lock(mutex_);
  descriptors_.clear();
}

bool SymmetricMemory::Synchronize(std::chrono::nanoseconds timeout) {
  std::vector<int> ordinals;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ordinals = Ordinals();
  }
  if (ordinals.empty()) return true;
  // There is no wait for a device with a timeout, so a thread waits; if the wait never ends it
  // goes with the process.
  const auto ended = std::make_shared<std::promise<void>>();
  std::future<void> all_ended = ended->get_future();
  std::thread([ordinals, ended] {
    for (int ordinal : ordinals) {
      // A device that has failed has no work left either.
      if (cudaSetDevice(ordinal) == cudaSuccess) cudaDeviceSynchronize();
    }
    ended->set_value();
  }).detach();
  return all_ended.wait_for(timeout) == std::future_status::ready;
}

void SymmetricMemory::Release(bool devices_have_ended) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (devices_.empty()) return;
  for (Device& device : devices_) {
    CUcontext saved = nullptr;
    Driver::Get().cuCtxGetCurrent(&saved);
    // On a device that has failed it fails, and there is nothing left to tell.
    if (devices_have_ended && cudaSetDevice(device.ordinal) == cudaSuccess) {
      cudaMemset(&device.control_block()->local.broken, 0xff, sizeof(uint32_t));
      cudaDeviceSynchronize();
    }
    cudaGetLastError();
    Driver::Get().cuCtxSetCurrent(saved);
    // A job of several processes numbers its devices anew, and maps its peers at other addresses.
    device.reusable = devices_have_ended && num_processes_ == 1;
    device.shared.clear();
    device.pool_begin = device.pool_end = 0;
    retired_[device.member] = std::move(device);
  }
  if (!devices_have_ended) {
    for (const auto& [member, remote] : remote_) {
      kept_.insert(kept_.end(), {remote.control, remote.pool, remote.staging});
    }
  }
  remote_.clear();
  descriptors_.clear();
  devices_.clear();
  slot_.clear();
  pool_problem_.clear();
}

void SymmetricMemory::SetTimeouts(const Timeouts& timeouts) {
  std::lock_guard<std::mutex> lock(mutex_);
  timeouts_ = timeouts;
  for (const Device& device : devices_) WriteTimeouts(timeouts_, device.error.get());
}

std::optional<std::string> SymmetricMemory::FillGroup(const int64_t* members, int num_ranks,
                                                      int ordinal, gpu::GroupView* view) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* own = FindLocal(ordinal);
  if (own == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  view->control = own->control_block();
  view->error = own->error_on_device;
  view->staging = own->staging == nullptr ? 0 : own->staging->begin();
  view->staging_bytes = own->staging_bytes;
  view->num_ranks = num_ranks;
  view->rank = -1;
  for (int r = 0; r < num_ranks; ++r) {
    gpu::PeerView& peer = view->peer[r];
    peer = {};
    if (members[r] == own->member) view->rank = r;
    if (members[r] >> 32 == process_) {
      for (const Device& local : devices_) {
        if (local.member != members[r]) continue;
        peer.control = local.control_block();
        peer.staging = local.staging == nullptr ? 0 : local.staging->begin();
      }
    } else if (const auto it = remote_.find(members[r]); it != remote_.end()) {
      const RemoteDevice& remote = it->second;
      peer.control = reinterpret_cast<gpu::ControlBlock*>(remote.control->begin());
      peer.staging = remote.staging == nullptr ? 0 : remote.staging->begin();
      peer.shift = remote.shift;
    }
    if (peer.control == nullptr) {
      return "rank " + std::to_string(r) + " lives on device " +
             std::to_string(members[r] & 0xffffffff) + " of process " +
             std::to_string(members[r] >> 32) +
             ", which this process is not connected to; call jax_ep.initialize() in every process";
    }
    peer.slot_here = slot_.at(members[r]);
    peer.slot_there = slot_.at(own->member);
  }
  if (view->rank < 0) return "CUDA device " + std::to_string(ordinal) + " is not in this group";
  return std::nullopt;
}

std::optional<std::string> SymmetricMemory::Share(int ordinal, const void* pointer, size_t bytes,
                                                  bool with_other_processes) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard<std::mutex> lock(mutex_);
  Device* device = FindLocal(ordinal);
  if (device == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  if (staged_only_) return "JAX_EP_PATH=staged";
  if (with_other_processes &&
      !(device->pool_begin <= address && address + bytes <= device->pool_end)) {
    if (!pool_problem_.empty()) return pool_problem_;
    return "it lies outside the part of XLA's memory that the other processes have mapped: the "
           "pool has grown since jax_ep.initialize(), which XLA_PYTHON_CLIENT_PREALLOCATE=true "
           "prevents";
  }
  const auto it = device->shared.upper_bound(address);
  if (it != device->shared.begin() && address + bytes <= std::prev(it)->second) return std::nullopt;
  return ShareLocally(device, address);
}

std::optional<std::string> SymmetricMemory::ShareLocally(Device* device, uint64_t address) {
  if (devices_.size() < 2) return std::nullopt;
  const Driver& driver = Driver::Get();
  CUdeviceptr begin = 0;
  size_t size = 0;
  if (const CUresult r = driver.cuMemGetAddressRange(&begin, &size, address); r != CUDA_SUCCESS) {
    return "cuMemGetAddressRange: " + driver.Text(r);
  }
  const std::vector<CUmemAccessDesc> access = AccessFor(Ordinals());
  CUmemGenericAllocationHandle handle;
  CUmemoryPool pool = nullptr;
  if (driver.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(begin)) == CUDA_SUCCESS) {
    driver.cuMemRelease(handle);
    if (const CUresult r = driver.cuMemSetAccess(begin, size, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemSetAccess on XLA's memory: " + driver.Text(r);
    }
  } else if (driver.cuPointerGetAttribute(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, address) ==
                 CUDA_SUCCESS &&
             pool != nullptr) {
    if (const CUresult r = driver.cuMemPoolSetAccess(pool, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemPoolSetAccess on XLA's memory: " + driver.Text(r);
    }
  }
  // Other memory (cudaMalloc) needs no more than the peer access of Setup.
  device->shared[begin] = begin + size;
  return std::nullopt;
}

std::string SymmetricMemory::Describe() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (devices_.empty()) return "CUDA: not set up";
  std::ostringstream out;
  out << "CUDA: " << devices_.size() << " device(s) of this process, " << remote_.size()
      << " of others; ";
  if (staged_only_ || !pool_problem_.empty()) {
    out << "staged path (" << (staged_only_ ? "JAX_EP_PATH=staged" : pool_problem_) << ")";
  } else {
    out << "direct path: peers read and write XLA's memory";
  }
  out << "; staging region of " << devices_.front().staging_bytes << " bytes a device";
  return out.str();
}

std::optional<std::string> SymmetricMemory::RecordedError() {
  static constexpr const char* kKinds[] = {"jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine",
                                           "jax_ep_combine_gradient"};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Device& device : devices_) {
    const gpu::ErrorRecord* record = device.error.get();
    if (__atomic_load_n(&record->valid, __ATOMIC_ACQUIRE) == 0) continue;
    const std::string rank = "rank " + std::to_string(record->rank);
    const std::string peer = "rank " + std::to_string(record->peer);
    std::ostringstream out;
    out << kKinds[record->kind % std::size(kKinds)] << ": ";
    const uint64_t expected = record->expected_epoch, seen = record->seen_epoch;
    switch (record->phase) {
      case gpu::kOtherCall:
        out << rank << " and " << peer << " are in different calls (operation " << std::hex
            << expected << ", " << seen << ")";
        break;
      case gpu::kNotResident:
        out << "on " << rank << " only " << seen << " of " << expected
            << " blocks got a streaming multiprocessor until the timeout: other work holds the "
               "rest; pass a smaller num_sms to jax_ep.make_layout";
        break;
      case gpu::kToldByPeer:
        out << rank << " was told by " << peer << ", which has given up";
        if (seen != static_cast<uint64_t>(record->peer)) out << " on rank " << seen;
        out << " and says why";
        break;
      case gpu::kProgress:
        out << rank << " waited for " << peer << " to finish until the timeout (expected epoch "
            << gpu::epoch_of(expected) << ", seen " << gpu::epoch_of(seen) << " with "
            << gpu::units_of(seen, gpu::epoch_of(expected)) << " of "
            << gpu::units_of(expected, gpu::epoch_of(expected))
            << " steps; if several processes share that GPU, pass a smaller num_sms to "
               "jax_ep.make_layout)";
        break;
      case gpu::kTwoAtOnce:
        out << rank
            << " found another call running on its device, where calls must follow one another. A "
               "program with a compiler option xla_gpu_command_buffer_scheduling_mode of its own "
               "may run them at once: set that in XLA_FLAGS instead, before jax_ep is imported";
        break;
      default:
        out << rank << " waited for " << peer << " to "
            << (record->phase == gpu::kStart ? "come" : "finish")
            << " until the timeout (expected epoch " << expected << ", seen " << seen << ")";
    }
    out << "; the group is broken, and later calls fail at once. Once all ranks can come again, "
           "call jax_ep.finalize() and then jax_ep.initialize() in every process, or start the job "
           "again";
    return out.str();
  }
  return std::nullopt;
}

}  // namespace jax_ep
