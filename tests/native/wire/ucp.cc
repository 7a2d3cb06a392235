// The functions of UCP that NVSHMEM's UCX plugin calls, over the wire. Handles are pointers to what is
// here; configuration, contexts and workers have nothing in them, there is one wire a process.
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tests/native/wire/wire.h"

namespace jax_ep::wire {
namespace {

constexpr uint64_t kMagic = 0x77697265;

struct Address {
  uint64_t magic;
  pid_t process;
};
struct Endpoint {
  int peer;
};
struct Memory {
  void* begin;
  size_t num_bytes;
};
struct PackedKey {
  uint64_t magic;
  Key key;
};

template <typename Handle>
Handle AnyHandle() {
  static int any;
  return reinterpret_cast<Handle>(&any);
}
int PeerOf(ucp_ep_h endpoint) { return reinterpret_cast<Endpoint*>(endpoint)->peer; }
const RemoteMemory& MemoryOf(ucp_rkey_h key) { return *reinterpret_cast<RemoteMemory*>(key); }

ucs_status_ptr_t Move(Transfer transfer, ucp_ep_h endpoint, char* local, size_t num_bytes,
                      uint64_t address, ucp_rkey_h key, const ucp_request_param_t* parameters) {
  // NVSHMEM takes single values from the host's memory, and they are all that it so takes.
  const bool is_flag = transfer == Transfer::kPut &&
                       (parameters->op_attr_mask & UCP_OP_ATTR_FIELD_MEMORY_TYPE) != 0 &&
                       parameters->memory_type == UCS_MEMORY_TYPE_HOST;
  return Wire::Get().Move(transfer, PeerOf(endpoint), MemoryOf(key), address, local, num_bytes,
                          is_flag, *parameters);
}

}  // namespace
}  // namespace jax_ep::wire

using jax_ep::wire::Wire;
namespace wire = jax_ep::wire;

extern "C" {

ucs_status_t ucp_config_read(const char*, const char*, ucp_config_t** config) {
  *config = wire::AnyHandle<ucp_config_t*>();
  return UCS_OK;
}
ucs_status_t ucp_config_modify(ucp_config_t*, const char*, const char*) { return UCS_OK; }
void ucp_config_release(ucp_config_t*) {}

ucs_status_t ucp_init_version(unsigned, unsigned, const ucp_params_t*, const ucp_config_t*,
                              ucp_context_h* context) {
  *context = wire::AnyHandle<ucp_context_h>();
  return UCS_OK;
}
void ucp_cleanup(ucp_context_h) {}

ucs_status_t ucp_worker_create(ucp_context_h, const ucp_worker_params_t*, ucp_worker_h* worker) {
  Wire::Get().Start();
  *worker = wire::AnyHandle<ucp_worker_h>();
  return UCS_OK;
}
void ucp_worker_destroy(ucp_worker_h) { Wire::Get().Stop(); }
ucs_status_t ucp_worker_query(ucp_worker_h, ucp_worker_attr_t* attributes) {
  if (attributes->field_mask & UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER) {
    attributes->max_am_header = 4096;
  }
  return UCS_OK;
}
ucs_status_t ucp_worker_get_address(ucp_worker_h, ucp_address_t** address, size_t* num_bytes) {
  *address = reinterpret_cast<ucp_address_t*>(new wire::Address{wire::kMagic, getpid()});
  *num_bytes = sizeof(wire::Address);
  return UCS_OK;
}
void ucp_worker_release_address(ucp_worker_h, ucp_address_t* address) {
  delete reinterpret_cast<wire::Address*>(address);
}
ucs_status_t ucp_worker_fence(ucp_worker_h) {
  Wire::Get().Fence();
  return UCS_OK;
}
ucs_status_ptr_t ucp_worker_flush_nbx(ucp_worker_h, const ucp_request_param_t* parameters) {
  return Wire::Get().Flush(*parameters);
}
unsigned ucp_worker_progress(ucp_worker_h) { return Wire::Get().Progress(); }

// Active messages, which the plugin does without where it finds a NIC (stubs.cc).
ucs_status_t ucp_worker_set_am_recv_handler(ucp_worker_h, const ucp_am_handler_param_t*) {
  return UCS_OK;
}
void ucp_am_data_release(ucp_worker_h, void*) {}
ucs_status_ptr_t ucp_am_send_nbx(ucp_ep_h, unsigned, const void*, size_t, const void*, size_t,
                                 const ucp_request_param_t*) {
  wire::Die("active messages are not there: has the plugin found libibverbs of this folder?");
}

ucs_status_t ucp_ep_create(ucp_worker_h, const ucp_ep_params_t* parameters, ucp_ep_h* endpoint) {
  const auto& address = *reinterpret_cast<const wire::Address*>(parameters->address);
  if (address.magic != wire::kMagic) wire::Die("an address that is not the wire's");
  *endpoint = reinterpret_cast<ucp_ep_h>(new wire::Endpoint{Wire::Get().AddPeer(address.process)});
  return UCS_OK;
}
ucs_status_ptr_t ucp_ep_close_nb(ucp_ep_h endpoint, unsigned) {
  delete reinterpret_cast<wire::Endpoint*>(endpoint);
  return nullptr;
}

ucs_status_t ucp_mem_map(ucp_context_h, const ucp_mem_map_params_t* parameters, ucp_mem_h* memory) {
  *memory = reinterpret_cast<ucp_mem_h>(new wire::Memory{parameters->address, parameters->length});
  return UCS_OK;
}
ucs_status_t ucp_mem_unmap(ucp_context_h, ucp_mem_h memory) {
  delete reinterpret_cast<wire::Memory*>(memory);
  return UCS_OK;
}
ucs_status_t ucp_rkey_pack(ucp_context_h, ucp_mem_h memory, void** buffer, size_t* num_bytes) {
  const auto& region = *reinterpret_cast<wire::Memory*>(memory);
  *buffer = new wire::PackedKey{wire::kMagic, Wire::Get().Publish(region.begin, region.num_bytes)};
  *num_bytes = sizeof(wire::PackedKey);
  return UCS_OK;
}
void ucp_rkey_buffer_release(void* buffer) { delete static_cast<wire::PackedKey*>(buffer); }
ucs_status_t ucp_ep_rkey_unpack(ucp_ep_h, const void* buffer, ucp_rkey_h* key) {
  wire::PackedKey packed;
  std::memcpy(&packed, buffer, sizeof packed);  // at any address
  if (packed.magic != wire::kMagic) wire::Die("a key that is not the wire's");
  *key = reinterpret_cast<ucp_rkey_h>(new wire::RemoteMemory(Wire::Get().Map(packed.key)));
  return UCS_OK;
}
void ucp_rkey_destroy(ucp_rkey_h key) { delete reinterpret_cast<wire::RemoteMemory*>(key); }

ucs_status_ptr_t ucp_put_nbx(ucp_ep_h endpoint, const void* buffer, size_t num_bytes,
                             uint64_t address, ucp_rkey_h key,
                             const ucp_request_param_t* parameters) {
  return wire::Move(wire::Transfer::kPut, endpoint,
                    const_cast<char*>(static_cast<const char*>(buffer)), num_bytes, address, key,
                    parameters);
}
ucs_status_ptr_t ucp_get_nbx(ucp_ep_h endpoint, void* buffer, size_t num_bytes, uint64_t address,
                             ucp_rkey_h key, const ucp_request_param_t* parameters) {
  return wire::Move(wire::Transfer::kGet, endpoint, static_cast<char*>(buffer), num_bytes, address,
                    key, parameters);
}
ucs_status_t ucp_atomic_post(ucp_ep_h endpoint, ucp_atomic_post_op_t operation, uint64_t value,
                             size_t num_bytes, uint64_t address, ucp_rkey_h key) {
  const auto same = [&] {
    switch (operation) {
      case UCP_ATOMIC_POST_OP_ADD:
        return UCP_ATOMIC_OP_ADD;
      case UCP_ATOMIC_POST_OP_AND:
        return UCP_ATOMIC_OP_AND;
      case UCP_ATOMIC_POST_OP_OR:
        return UCP_ATOMIC_OP_OR;
      case UCP_ATOMIC_POST_OP_XOR:
        return UCP_ATOMIC_OP_XOR;
      default:
        wire::Die("atomic post %d", static_cast<int>(operation));
    }
  }();
  const wire::Atomic atomic{same, value, 0, nullptr, true};
  Wire::Get().Apply(atomic, wire::PeerOf(endpoint), wire::MemoryOf(key), address, num_bytes,
                    nullptr);
  return UCS_OK;
}
ucs_status_ptr_t ucp_atomic_op_nbx(ucp_ep_h endpoint, ucp_atomic_op_t operation, const void* buffer,
                                   size_t, uint64_t address, ucp_rkey_h key,
                                   const ucp_request_param_t* parameters) {
  const uint32_t given = parameters->op_attr_mask;
  const size_t num_bytes = (given & UCP_OP_ATTR_FIELD_DATATYPE) != 0
                               ? parameters->datatype >> UCP_DATATYPE_SHIFT
                               : sizeof(uint64_t);
  wire::Atomic atomic{operation, 0, 0, nullptr, true};
  if (buffer != nullptr) std::memcpy(&atomic.value, buffer, num_bytes);
  if ((given & UCP_OP_ATTR_FIELD_REPLY_BUFFER) != 0) atomic.reply = parameters->reply_buffer;
  if (operation == UCP_ATOMIC_OP_CSWAP) {  // the new value is where the old one goes
    atomic.compared = atomic.value;
    std::memcpy(&atomic.value, atomic.reply, num_bytes);
  }
  // A signal is set by a swap, whose old value the plugin takes nowhere.
  atomic.needs_old = operation != UCP_ATOMIC_OP_SWAP || (given & UCP_OP_ATTR_FIELD_USER_DATA) != 0;
  return Wire::Get().Apply(atomic, wire::PeerOf(endpoint), wire::MemoryOf(key), address, num_bytes,
                           parameters);
}

ucs_status_t ucp_request_check_status(void* request) {
  return static_cast<wire::Request*>(request)->status;
}
void ucp_request_free(void* request) { Wire::Get().Free(static_cast<wire::Request*>(request)); }

}  // extern "C"
