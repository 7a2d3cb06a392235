#include "xla_ffi/memory/driver.h"

#include <stdexcept>

namespace jax_ep {
namespace {

[[noreturn]] void Fail(bool is_out_of_memory, const std::string& what) {
  if (is_out_of_memory) throw OutOfMemory(kPrefix + what);
  Throw(what);
}

}  // namespace

void Throw(const std::string& what) { throw std::runtime_error(kPrefix + what); }

void Check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  Fail(status == cudaErrorMemoryAllocation, what + ": " + cudaGetErrorString(status));
}

void Check(CUresult status, const std::string& what) {
  if (status == CUDA_SUCCESS) return;
  Fail(status == CUDA_ERROR_OUT_OF_MEMORY, what + ": " + Driver::Get().Text(status));
}

std::string OnDevice(int ordinal) { return " on CUDA device " + std::to_string(ordinal); }

bool HasAtomics(int ordinal, int other) {
  int possible = 0;
  Check(cudaDeviceGetP2PAttribute(&possible, cudaDevP2PAttrNativeAtomicSupported, ordinal, other),
        "cudaDeviceGetP2PAttribute of CUDA devices " + std::to_string(ordinal) + " and " +
            std::to_string(other));
  return possible != 0;
}

const Driver& Driver::Get() {
  static const Driver* const driver = new Driver;
  return *driver;
}

std::string Driver::Text(CUresult result) const {
  const char* text = nullptr;
  cuGetErrorString(result, &text);
  return text == nullptr ? "unknown error" : text;
}

void* Driver::Address(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || address == nullptr) Throw(std::string("no ") + name);
  return address;
}

DeviceScope::DeviceScope(int ordinal) {
  if (Driver::Get().cuCtxGetCurrent(&saved_) != CUDA_SUCCESS) saved_ = nullptr;
  Check(cudaSetDevice(ordinal), "cudaSetDevice " + std::to_string(ordinal));
}

DeviceScope::DeviceScope(int ordinal, std::nothrow_t) {
  if (Driver::Get().cuCtxGetCurrent(&saved_) != CUDA_SUCCESS) saved_ = nullptr;
  cudaSetDevice(ordinal);
}

DeviceScope::~DeviceScope() { Driver::Get().cuCtxSetCurrent(saved_); }

}  // namespace jax_ep
