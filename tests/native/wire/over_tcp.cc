// over_tcp: lets NVSHMEM's UCX plugin run over TCP with a real libucp, where there is no NIC. Preloaded
// (LD_PRELOAD), it stands between the two:
//   - the plugin asks for UCX's transports of a NIC; it gets TCP
//   - UCX carries out atomics over TCP on the target's CPU, which cannot touch a GPU's memory. Here they
//     travel as active messages, and the target carries them out with copies
// An atomic after a fence, by which signals come, first waits for all that was put before.
#include <dlfcn.h>
#include <ucp/api/ucp.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "tests/native/wire/driver.h"

namespace jax_ep::wire {
namespace {

constexpr char kTransports[] = "tcp,cuda_copy,self";
constexpr unsigned kDo = 61, kDone = 62;  // active messages; the plugin's have smaller numbers

struct Request {
  ucp_atomic_op_t operation;
  uint32_t num_bytes;
  uint64_t value, address;
};

// Of the real library.
template <typename Function>
Function* Real(Function*, const char* name) {
  static void* const library = dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL);
  void* symbol = library != nullptr ? dlsym(library, name) : nullptr;
  if (symbol == nullptr) Die("libucp has no %s", name);
  return reinterpret_cast<Function*>(symbol);
}
#define JAX_EP_REAL(name) (::jax_ep::wire::Real(&name, #name))

std::atomic<uint64_t> g_num_sent{0}, g_num_done{0};
bool g_has_put = false;    // since the last fence
bool g_must_wait = false;  // a fence has followed puts that no atomic has waited for
ucp_worker_h g_worker = nullptr;

void Execute(const Request& request) {
  static std::mutex mutex;
  static Driver& driver = Driver::Get();
  static const CUstream stream = driver.MakeStream();
  static auto* const pinned = reinterpret_cast<uint64_t*>(driver.AllocatePinned(64));
  std::lock_guard<std::mutex> lock(mutex);
  auto* target = reinterpret_cast<void*>(request.address);
  const bool is_device = driver.IsDeviceMemory(target);
  const auto move = [&](void* to, const void* from) {
    if (is_device) {
      driver.CopyAndWait(to, from, request.num_bytes, stream);
    } else {
      std::memcpy(to, from, request.num_bytes);
    }
  };
  pinned[0] = pinned[1] = 0;
  switch (request.operation) {
    case UCP_ATOMIC_OP_ADD:
      move(&pinned[0], target);
      pinned[1] = pinned[0] + request.value;
      break;
    case UCP_ATOMIC_OP_SWAP:
      pinned[1] = request.value;
      break;
    default:
      Die("atomic %d", static_cast<int>(request.operation));
  }
  move(target, &pinned[1]);
}

void Send(ucp_ep_h endpoint, unsigned id, const Request& request, unsigned flags) {
  auto* kept = new Request(request);
  ucp_request_param_t parameters{};
  parameters.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  parameters.flags = flags | UCP_AM_SEND_FLAG_EAGER;
  parameters.user_data = kept;
  parameters.cb.send = [](void* sent, ucs_status_t, void* user_data) {
    delete static_cast<Request*>(user_data);
    JAX_EP_REAL(ucp_request_free)(sent);
  };
  const ucs_status_ptr_t sent =
      JAX_EP_REAL(ucp_am_send_nbx)(endpoint, id, kept, sizeof *kept, nullptr, 0, &parameters);
  if (UCS_PTR_IS_ERR(sent)) Die("an active message: status %d", UCS_PTR_STATUS(sent));
  if (sent == nullptr) delete kept;
}

ucs_status_t OnDo(void*, const void* header, size_t num_bytes, void*, size_t,
                  const ucp_am_recv_param_t* parameters) {
  Request request;
  if (num_bytes != sizeof request) Die("an active message of %zu bytes", num_bytes);
  std::memcpy(&request, header, sizeof request);
  Execute(request);
  Send(parameters->reply_ep, kDone, request, 0);
  return UCS_OK;
}
ucs_status_t OnDone(void*, const void*, size_t, void*, size_t, const ucp_am_recv_param_t*) {
  ++g_num_done;
  return UCS_OK;
}

// Until all that was put has arrived.
void AwaitPuts() {
  ucp_request_param_t parameters{};
  const ucs_status_ptr_t flush = JAX_EP_REAL(ucp_worker_flush_nbx)(g_worker, &parameters);
  if (flush == nullptr || UCS_PTR_IS_ERR(flush)) return;
  while (JAX_EP_REAL(ucp_request_check_status)(flush) == UCS_INPROGRESS) {
    JAX_EP_REAL(ucp_worker_progress)(g_worker);
  }
  JAX_EP_REAL(ucp_request_free)(flush);
}

void SendAtomic(ucp_ep_h endpoint, const Request& request) {
  if (g_must_wait) {
    AwaitPuts();
    g_must_wait = g_has_put = false;
  }
  ++g_num_sent;
  Send(endpoint, kDo, request, UCP_AM_SEND_FLAG_REPLY);
}

}  // namespace
}  // namespace jax_ep::wire

namespace wire = jax_ep::wire;

extern "C" {

ucs_status_t ucp_config_modify(ucp_config_t* config, const char* name, const char* value) {
  if (std::strcmp(name, "TLS") == 0) value = wire::kTransports;
  return JAX_EP_REAL(ucp_config_modify)(config, name, value);
}

ucs_status_t ucp_worker_create(ucp_context_h context, const ucp_worker_params_t* parameters,
                               ucp_worker_h* worker) {
  const ucs_status_t status = JAX_EP_REAL(ucp_worker_create)(context, parameters, worker);
  if (status != UCS_OK) return status;
  wire::g_worker = *worker;
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB;
  handler.id = wire::kDo;
  handler.cb = wire::OnDo;
  JAX_EP_REAL(ucp_worker_set_am_recv_handler)(*worker, &handler);
  handler.id = wire::kDone;
  handler.cb = wire::OnDone;
  JAX_EP_REAL(ucp_worker_set_am_recv_handler)(*worker, &handler);
  // What CUDA might let wait for a kernel is made now.
  uint64_t word = 0;
  wire::Execute({UCP_ATOMIC_OP_ADD, sizeof word, 1, reinterpret_cast<uint64_t>(&word)});
  return UCS_OK;
}

ucs_status_t ucp_atomic_post(ucp_ep_h endpoint, ucp_atomic_post_op_t operation, uint64_t value,
                             size_t num_bytes, uint64_t address, ucp_rkey_h) {
  if (operation != UCP_ATOMIC_POST_OP_ADD) wire::Die("atomic post %d", static_cast<int>(operation));
  wire::SendAtomic(endpoint, {UCP_ATOMIC_OP_ADD, static_cast<uint32_t>(num_bytes), value, address});
  return UCS_OK;
}
ucs_status_ptr_t ucp_atomic_op_nbx(ucp_ep_h endpoint, ucp_atomic_op_t operation, const void* buffer,
                                   size_t, uint64_t address, ucp_rkey_h,
                                   const ucp_request_param_t* parameters) {
  // Whoever wants the old value gives data for its callback; nobody here does.
  if ((parameters->op_attr_mask & UCP_OP_ATTR_FIELD_USER_DATA) != 0) {
    return UCS_STATUS_PTR(UCS_ERR_UNSUPPORTED);
  }
  const auto num_bytes = static_cast<uint32_t>(parameters->datatype >> UCP_DATATYPE_SHIFT);
  uint64_t value = 0;
  std::memcpy(&value, buffer, num_bytes);
  wire::SendAtomic(endpoint, {operation, num_bytes, value, address});
  return nullptr;
}

ucs_status_ptr_t ucp_put_nbx(ucp_ep_h endpoint, const void* buffer, size_t num_bytes,
                             uint64_t address, ucp_rkey_h key,
                             const ucp_request_param_t* parameters) {
  wire::g_has_put = true;
  return JAX_EP_REAL(ucp_put_nbx)(endpoint, buffer, num_bytes, address, key, parameters);
}
ucs_status_t ucp_worker_fence(ucp_worker_h worker) {
  // What is put from here on takes nothing of it back: several send by one worker.
  wire::g_must_wait |= wire::g_has_put;
  wire::g_has_put = false;
  return JAX_EP_REAL(ucp_worker_fence)(worker);
}
ucs_status_ptr_t ucp_worker_flush_nbx(ucp_worker_h worker, const ucp_request_param_t* parameters) {
  while (wire::g_num_done < wire::g_num_sent) JAX_EP_REAL(ucp_worker_progress)(worker);
  return JAX_EP_REAL(ucp_worker_flush_nbx)(worker, parameters);
}

}  // extern "C"
