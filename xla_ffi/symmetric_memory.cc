#include "xla_ffi/symmetric_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace jax_ep {
namespace {

[[noreturn]] void Throw(const std::string& what) { throw std::runtime_error("jax_ep: " + what); }

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

// Restores the thread's current device.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal) {
    Check(cudaGetDevice(&saved_), "cudaGetDevice");
    Check(cudaSetDevice(ordinal), "cudaSetDevice " + std::to_string(ordinal));
  }
  ~DeviceScope() { cudaSetDevice(saved_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int saved_ = 0;
};

std::string Hex(const void* data, size_t bytes) {
  std::string text;
  for (size_t i = 0; i < bytes; ++i) {
    const auto byte = static_cast<const unsigned char*>(data)[i];
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

void Unhex(const std::string& text, void* data, size_t bytes) {
  if (text.size() != 2 * bytes) Throw("a process sent a handle of another size");
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<unsigned char*>(data)[i] =
        static_cast<unsigned char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
}

int64_t MemberCode(int64_t process, int64_t id) { return process << 32 | id; }

CUmemAccessDesc Access(int ordinal) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = ordinal;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return access;
}

// A descriptor of another process of this user, in this one.
int TakeDescriptor(int64_t pid, int fd) {
  const auto process = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
  if (process < 0) Throw("pidfd_open " + std::to_string(pid) + ": " + strerror(errno));
  const auto mine = static_cast<int>(syscall(SYS_pidfd_getfd, process, fd, 0));
  const int error = errno;
  close(process);
  if (mine < 0) Throw("pidfd_getfd from " + std::to_string(pid) + ": " + strerror(error));
  return mine;
}

}  // namespace

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

int64_t SymmetricMemory::Member(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* device = FindLocal(ordinal);
  return device == nullptr ? -1 : device->member;
}

void SymmetricMemory::Setup(int64_t process, const std::vector<int>& ids,
                            const std::vector<int>& ordinals) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!devices_.empty()) return;
  process_ = process;
  std::vector<Device> devices;
  for (size_t i = 0; i < ordinals.size(); ++i) {
    const int ordinal = ordinals[i];
    const DeviceScope scope(ordinal);
    const std::string on = " on CUDA device " + std::to_string(ordinal);
    int major = 0;
    Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal),
          "compute capability" + on);
    if (major != 9) {
      Throw("the CUDA kernels are built for Hopper (sm_90a); CUDA device " +
            std::to_string(ordinal) + " has compute capability " + std::to_string(major) + ".x");
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
    device.ordinal = ordinal;
    device.member = MemberCode(process, ids.at(i));
    Check(cudaMalloc(&device.control, sizeof(gpu::ControlBlock)), "control memory" + on);
    Check(cudaMemset(device.control, 0, sizeof(gpu::ControlBlock)), "control memory" + on);
    Check(cudaHostAlloc(&device.error, sizeof(gpu::ErrorRecord), cudaHostAllocMapped),
          "error record" + on);
    std::memset(device.error, 0, sizeof(gpu::ErrorRecord));
    Check(cudaHostGetDevicePointer(&device.error_on_device, device.error, 0), "error record" + on);
    Check(gpu::PrepareKernels(), "loading the kernels" + on);
    Check(cudaDeviceSynchronize(), "set-up" + on);
    devices.push_back(device);
  }
  devices_ = std::move(devices);
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
  if (pool_pointers.size() != devices_.size()) Throw("one pool pointer a device is needed");
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // peers take descriptors from here
  std::ostringstream out;
  out << getpid();
  for (size_t i = 0; i < devices_.size(); ++i) {
    Device& device = devices_[i];
    const DeviceScope scope(device.ordinal);
    const std::string on = " on CUDA device " + std::to_string(device.ordinal);
    cudaIpcMemHandle_t control;
    Check(cudaIpcGetMemHandle(&control, device.control), "cudaIpcGetMemHandle" + on);
    CUdeviceptr begin = 0;
    size_t bytes = 0;
    Check(driver.cuMemGetAddressRange(&begin, &bytes, pool_pointers[i]), "XLA's pool" + on);
    CUmemGenericAllocationHandle handle;
    Check(driver.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(begin)),
          "XLA's pool" + on + " is not made of VMM allocations, which peers could map");
    int fd = -1;
    const CUresult exported = driver.cuMemExportToShareableHandle(
        &fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    driver.cuMemRelease(handle);
    Check(exported, "exporting XLA's pool" + on);
    device.shared[begin] = begin + bytes;
    out << " " << device.member << " " << Hex(&control, sizeof control) << " " << begin << " "
        << bytes << " " << fd;
  }
  return out.str();
}

void SymmetricMemory::Import(const std::vector<std::string>& exports) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Driver& driver = Driver::Get();
  for (size_t process = 0; process < exports.size(); ++process) {
    if (static_cast<int64_t>(process) == process_) continue;
    std::istringstream in(exports[process]);
    int64_t pid = 0;
    in >> pid;
    int64_t member = 0;
    int fd = -1;
    std::string handle_text;
    uint64_t begin = 0, bytes = 0;
    while (in >> member >> handle_text >> begin >> bytes >> fd) {
      const std::string whose = " of process " + std::to_string(process) + ", device " +
                                std::to_string(member & 0xffffffff);
      RemoteDevice remote;
      cudaIpcMemHandle_t control;
      Unhex(handle_text, &control, sizeof control);
      for (const Device& device : devices_) {
        const DeviceScope scope(device.ordinal);
        void* mapped = nullptr;
        Check(cudaIpcOpenMemHandle(&mapped, control, cudaIpcMemLazyEnablePeerAccess),
              "control memory" + whose);
        remote.control[device.ordinal] = static_cast<gpu::ControlBlock*>(mapped);
      }
      const int mine = TakeDescriptor(pid, fd);
      CUmemGenericAllocationHandle handle;
      const CUresult imported = driver.cuMemImportFromShareableHandle(
          &handle, reinterpret_cast<void*>(static_cast<intptr_t>(mine)),
          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
      close(mine);
      Check(imported, "importing XLA's pool" + whose);
      CUdeviceptr at = 0;
      Check(driver.cuMemAddressReserve(&at, bytes, 0, 0, 0), "address space for the pool" + whose);
      Check(driver.cuMemMap(at, bytes, 0, handle, 0), "mapping the pool" + whose);
      driver.cuMemRelease(handle);
      std::vector<CUmemAccessDesc> access;
      for (const Device& device : devices_) access.push_back(Access(device.ordinal));
      Check(driver.cuMemSetAccess(at, bytes, access.data(), access.size()), "access" + whose);
      remote.mapped = reinterpret_cast<void*>(at);
      remote.mapped_bytes = bytes;
      remote.shift = static_cast<int64_t>(at - begin);
      remote_[member] = remote;
    }
  }
  AssignSlots();
}

void SymmetricMemory::Release() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [member, remote] : remote_) {
    for (auto& [ordinal, control] : remote.control) {
      const DeviceScope scope(ordinal);
      cudaIpcCloseMemHandle(control);
    }
    Driver::Get().cuMemUnmap(reinterpret_cast<CUdeviceptr>(remote.mapped), remote.mapped_bytes);
    Driver::Get().cuMemAddressFree(reinterpret_cast<CUdeviceptr>(remote.mapped),
                                   remote.mapped_bytes);
  }
  remote_.clear();
  for (Device& device : devices_) {
    const DeviceScope scope(device.ordinal);
    cudaFree(device.control);
    cudaFreeHost(device.error);
  }
  devices_.clear();
  slot_.clear();
}

std::optional<std::string> SymmetricMemory::FillGroup(const int64_t* members, int num_ranks,
                                                      int ordinal, gpu::GroupView* view) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Device* own = FindLocal(ordinal);
  if (own == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  view->control = own->control;
  view->error = own->error_on_device;
  view->num_ranks = num_ranks;
  view->rank = -1;
  for (int r = 0; r < num_ranks; ++r) {
    gpu::PeerView& peer = view->peer[r];
    peer = {};
    if (members[r] == own->member) view->rank = r;
    if (members[r] >> 32 == process_) {
      for (const Device& local : devices_) {
        if (local.member == members[r]) peer.control = local.control;
      }
    } else if (const auto it = remote_.find(members[r]); it != remote_.end()) {
      peer.control = it->second.control.at(ordinal);
      peer.shift = it->second.shift;
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

std::optional<std::string> SymmetricMemory::Share(int ordinal, const void* pointer, size_t bytes) {
  if (pointer == nullptr || bytes == 0) return std::nullopt;
  const auto address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard<std::mutex> lock(mutex_);
  Device* device = FindLocal(ordinal);
  if (device == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  const auto it = device->shared.upper_bound(address);
  if (it != device->shared.begin() && address + bytes <= std::prev(it)->second) return std::nullopt;
  if (!remote_.empty()) {
    return "a buffer lies outside the part of XLA's memory that was exported to the other "
           "processes; set XLA_PYTHON_CLIENT_PREALLOCATE=true so that the pool does not grow";
  }
  const Driver& driver = Driver::Get();
  CUdeviceptr begin = 0;
  size_t size = 0;
  if (const CUresult r = driver.cuMemGetAddressRange(&begin, &size, address); r != CUDA_SUCCESS) {
    return "cuMemGetAddressRange: " + driver.Text(r);
  }
  std::vector<CUmemAccessDesc> access;
  for (const Device& d : devices_) access.push_back(Access(d.ordinal));
  // Memory that is not VMM needs no more than the peer access of Setup.
  CUmemGenericAllocationHandle handle;
  if (driver.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(begin)) == CUDA_SUCCESS) {
    driver.cuMemRelease(handle);
    if (const CUresult r = driver.cuMemSetAccess(begin, size, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemSetAccess on XLA's memory: " + driver.Text(r);
    }
  }
  device->shared[begin] = begin + size;
  return std::nullopt;
}

std::optional<std::string> SymmetricMemory::RecordedError() {
  static constexpr const char* kKinds[] = {"jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine"};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Device& device : devices_) {
    const auto* record = device.error;
    if (__atomic_load_n(&record->valid, __ATOMIC_ACQUIRE) == 0) continue;
    const std::string rank = "rank " + std::to_string(record->rank);
    const std::string peer = "rank " + std::to_string(record->peer);
    std::ostringstream out;
    out << kKinds[record->kind % 3] << ": ";
    if (record->phase == 2) {
      out << rank << " and " << peer << " are in different calls (operation " << std::hex
          << record->expected_epoch << ", " << record->seen_epoch << ")";
    } else if (record->phase == 4) {
      out << "on " << rank << " only " << record->seen_epoch << " of " << record->expected_epoch
          << " blocks got a streaming multiprocessor until the timeout: other work holds the rest; "
             "pass a smaller num_sms to jax_ep.make_layout";
    } else {
      out << rank << " waited for " << peer << " to " << (record->phase == 0 ? "come" : "finish")
          << " until the timeout (expected epoch " << record->expected_epoch << ", seen "
          << record->seen_epoch << "); the group is broken";
    }
    return out.str();
  }
  return std::nullopt;
}

}  // namespace jax_ep
