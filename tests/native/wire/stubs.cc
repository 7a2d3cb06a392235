// What NVSHMEM's UCX plugin looks for beside libucp, in libraries of these names:
//   libibverbs.so.1  says that there is a NIC, so that signals go as UCP's atomics; without one the
//                    plugin would carry them out on the CPU, through GDRCopy
//   libgdrapi.so.2   GDRCopy, without its kernel module: the mapping that it gives is a place that
//                    nobody looks at, while signals go as atomics
//   libucs.so.0      has but to be there
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

extern "C" {

void** ibv_get_device_list(int* num_devices) {
  static int device;
  static void* list[] = {&device, nullptr};
  if (num_devices != nullptr) *num_devices = 1;
  return list;
}
void ibv_free_device_list(void**) {}

struct GdrHandle {
  unsigned long pinned;
};
struct GdrInfo {
  uint64_t address, num_bytes;
  uint32_t page_bytes;
  uint64_t cycles;
  uint32_t cycles_per_ms;
  unsigned is_mapped : 1, is_write_combining : 1;
};
struct Pinned {
  uint64_t address;
  size_t num_bytes;
  void* place;
};

void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 99;
}
int gdr_driver_get_version(void*, int* major, int* minor) {
  gdr_runtime_get_version(major, minor);
  return 0;
}
void* gdr_open() {
  static int any;
  return &any;
}
int gdr_close(void*) { return 0; }
int gdr_pin_buffer(void*, unsigned long address, size_t num_bytes, uint64_t, uint32_t,
                   GdrHandle* handle) {
  void* place = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return ENOMEM;
  handle->pinned = reinterpret_cast<unsigned long>(new Pinned{address, num_bytes, place});
  return 0;
}
int gdr_unpin_buffer(void*, GdrHandle handle) {
  auto* pinned = reinterpret_cast<Pinned*>(handle.pinned);
  munmap(pinned->place, pinned->num_bytes);
  delete pinned;
  return 0;
}
int gdr_map(void*, GdrHandle handle, void** address, size_t) {
  *address = reinterpret_cast<Pinned*>(handle.pinned)->place;
  return 0;
}
int gdr_unmap(void*, GdrHandle, void*, size_t) { return 0; }
int gdr_get_info(void*, GdrHandle handle, GdrInfo* info) {
  const auto& pinned = *reinterpret_cast<Pinned*>(handle.pinned);
  *info = {pinned.address, pinned.num_bytes, 65536, 0, 0, 1, 0};
  return 0;
}
int gdr_copy_from_mapping(GdrHandle, void* to, const void*, size_t num_bytes) {
  std::memset(to, 0, num_bytes);
  return 0;
}
int gdr_copy_to_mapping(GdrHandle, void* to, const void* from, size_t num_bytes) {
  std::memcpy(to, from, num_bytes);
  return 0;
}

}  // extern "C"
