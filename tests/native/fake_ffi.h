// As much of XLA's FFI as a handler asks of it, for tests that call one without XLA.
#ifndef JAX_EP_TESTS_NATIVE_FAKE_FFI_H_
#define JAX_EP_TESTS_NATIVE_FAKE_FFI_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_ep::test {

// An operand or a result.
struct Array {
  xla::ffi::DataType type;
  std::vector<int64_t> shape;
  void* data;
};

// By name, as the attributes of a call are.
using Attributes = std::map<std::string, std::variant<int64_t, std::vector<int64_t>>>;

namespace fake_ffi {

struct Context {
  cudaStream_t stream;
  int32_t ordinal;
  void* state;
};
struct Failure {
  std::string message;
  XLA_FFI_Error_Code code;
};

inline Context* Of(XLA_FFI_InvokeContext* context) { return reinterpret_cast<Context*>(context); }

inline XLA_FFI_Error* Create(XLA_FFI_Error_Create_Args* args) {
  return reinterpret_cast<XLA_FFI_Error*>(new Failure{args->message, args->errc});
}
inline void GetDetails(XLA_FFI_Error_GetDetails_Args* args) {
  const auto* failure = reinterpret_cast<Failure*>(args->error);
  args->message = failure->message.c_str();
  args->errc = failure->code;
}
inline void Destroy(XLA_FFI_Error_Destroy_Args* args) {
  delete reinterpret_cast<Failure*>(args->error);
}
inline XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = Of(args->ctx)->stream;
  return nullptr;
}
inline XLA_FFI_Error* GetState(XLA_FFI_State_Get_Args* args) {
  args->state = Of(args->ctx)->state;
  return nullptr;
}
inline XLA_FFI_Error* GetOrdinal(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = Of(args->ctx)->ordinal;
  return nullptr;
}

inline XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = Create;
  api.XLA_FFI_Error_GetDetails = GetDetails;
  api.XLA_FFI_Error_Destroy = Destroy;
  api.XLA_FFI_Stream_Get = GetStream;
  api.XLA_FFI_State_Get = GetState;
  api.XLA_FFI_DeviceOrdinal_Get = GetOrdinal;
  return api;
}

}  // namespace fake_ffi

// Calls an execute handler on a device. What it fails with; nothing if it succeeds.
inline std::string CallHandler(XLA_FFI_Handler* handler, void* state, int32_t ordinal,
                               cudaStream_t stream, const std::vector<Array>& operands,
                               const std::vector<Array>& results, const Attributes& attributes) {
  static const XLA_FFI_Api api = fake_ffi::MakeApi();
  fake_ffi::Context context{stream, ordinal, state};
  // What the frame points to.
  std::deque<XLA_FFI_Buffer> buffers;
  const auto buffers_of = [&](const std::vector<Array>& arrays) {
    std::vector<void*> pointers;
    for (const Array& array : arrays) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr,
                         static_cast<XLA_FFI_DataType>(array.type), array.data,
                         static_cast<int64_t>(array.shape.size()),
                         const_cast<int64_t*>(array.shape.data())});
      pointers.push_back(&buffers.back());
    }
    return pointers;
  };
  std::vector<void*> args = buffers_of(operands), rets = buffers_of(results);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
  std::deque<XLA_FFI_ByteSpan> spans;
  std::deque<XLA_FFI_Scalar> scalars;
  std::deque<XLA_FFI_Array> lists;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> values;
  for (const auto& [name, value] : attributes) {
    spans.push_back({name.data(), name.size()});
    names.push_back(&spans.back());
    if (const auto* number = std::get_if<int64_t>(&value)) {
      scalars.push_back({XLA_FFI_DataType_S64, const_cast<int64_t*>(number)});
      types.push_back(XLA_FFI_AttrType_SCALAR);
      values.push_back(&scalars.back());
    } else {
      const auto& list = std::get<std::vector<int64_t>>(value);
      lists.push_back({XLA_FFI_DataType_S64, list.size(), const_cast<int64_t*>(list.data())});
      types.push_back(XLA_FFI_AttrType_ARRAY);
      values.push_back(&lists.back());
    }
  }
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<XLA_FFI_InvokeContext*>(&context);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()),
                arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()),
                ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,
                 nullptr,
                 static_cast<int64_t>(values.size()),
                 types.data(),
                 names.data(),
                 values.data()};
  auto* failure = reinterpret_cast<fake_ffi::Failure*>(handler(&frame));
  if (failure == nullptr) return "";
  const std::string message = failure->message;
  delete failure;
  return message;
}

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_NATIVE_FAKE_FFI_H_
