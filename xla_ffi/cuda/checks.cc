#include "xla_ffi/cuda/checks.h"

#include <string>

#include "cuda/core/limits.h"

namespace jax_ep {
namespace {

void CheckTopK(const TableSizes& sizes, Checks* checks) {
  checks->Require(sizes.top_k <= gpu::kMaxTopK,
                  "k must be at most " + std::to_string(gpu::kMaxTopK));
}

// Kernels move rows by 16 bytes; another address is a trap, which would end the context.
void CheckAddress(const char* name, const Memory& memory, Checks* checks) {
  checks->Require(
      reinterpret_cast<uintptr_t>(memory.data) % kRowAlignment == 0,
      std::string(name) + " must lie at a multiple of " + std::to_string(kRowAlignment) + " bytes");
}

void CheckRows(const char* name, const Rows& rows, Checks* checks) {
  checks->Require(rows.num_channels > 0, std::string(name) + " must have channels");
  checks->Require(rows.row_bytes() % kRowAlignment == 0,
                  "a row of " + std::string(name) + " must be a multiple of " +
                      std::to_string(kRowAlignment) + " bytes");
  CheckAddress(name, rows, checks);
}

}  // namespace

void CheckForKernel(const LayoutCall& call, Checks* checks) {
  checks->Require(call.sizes.num_experts <= gpu::kMaxExperts,
                  "num_experts must be at most " + std::to_string(gpu::kMaxExperts));
  CheckTopK(call.sizes, checks);
}

void CheckForKernel(const DispatchCall& call, Checks* checks) {
  CheckTopK(call.sizes, checks);
  CheckRows("x", call.x, checks);
  CheckRows("tokens", call.tokens, checks);
  CheckAddress("scales", call.scales, checks);
  if (call.quantization == QuantizationKind::kGivenScales) {
    CheckAddress("x_scales", call.x_scales, checks);
    checks->Require(wire_row_bytes(call.x.num_channels, call.num_scales) <= gpu::kMaxScaledRowBytes,
                    "a row of x with its scales must be at most " +
                        std::to_string(gpu::kMaxScaledRowBytes) + " bytes");
  } else if (call.quantization != QuantizationKind::kNone) {
    checks->Require(call.x.num_channels <= gpu::kMaxFp8Channels,
                    "x must have at most " + std::to_string(gpu::kMaxFp8Channels) +
                        " channels to be quantised");
  }
}

// Whichever kernels take it.
void CheckForKernel(const LayoutAndDispatchCall& call, Checks* checks) {
  CheckForKernel(call.layout, checks);
  CheckForKernel(call.dispatch, checks);
}

void CheckForKernel(const CombineCall& call, Checks* checks) {
  CheckTopK(call.sizes, checks);
  CheckRows("y", call.y, checks);
  CheckRows("out", call.out, checks);
  CheckRows("partial", call.partial, checks);
}

void CheckForKernel(const CombineGradientCall& call, Checks* checks) {
  CheckTopK(call.sizes, checks);
  CheckRows("g", call.g, checks);
  CheckRows("y", call.y, checks);
  CheckRows("d_y", call.d_y, checks);
  checks->Require(
      call.g.row_bytes() <= gpu::kMaxWeightedRowBytes,
      "a row of g must be at most " + std::to_string(gpu::kMaxWeightedRowBytes) + " bytes");
}

}  // namespace jax_ep
