#include "cuda/core/limits.h"
#include "cuda/core/wire_row.h"
#include "cuda/rows/quantize.h"
#include "xla_ffi/calls.h"
#include "xla_ffi/checks.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/handlers.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

// x [T, H] as float8 values [T, H] with their scales [T, S]. No other rank takes part.
ffi::Error Quantize(cudaStream_t stream, int32_t ordinal, int64_t num_sms,
                    int64_t power_of_two_scales, ffi::AnyBuffer operand,
                    ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> scales) {
  Checks checks(kQuantizeOp);
  checks.Shape("x", operand.dimensions(), {-1, -1});
  if (!checks.ok()) return checks.error();
  const int64_t num_rows = operand.dimensions()[0], num_channels = operand.dimensions()[1];
  Rows x;
  x.data = operand.untyped_data();
  x.type = operand.element_type();
  x.num_channels = num_channels;
  checks.Require(x.float_type().has_value(), "x must be bf16, f16 or f32");
  checks.Require(
      num_channels > 0 && num_channels % kRowAlignment == 0 && num_channels <= gpu::kMaxFp8Channels,
      "x must have a multiple of " + std::to_string(kRowAlignment) + " channels, at most " +
          std::to_string(gpu::kMaxFp8Channels));
  checks.Type("values", values->element_type(), ffi::F8E4M3FN);
  checks.Shape("values", values->dimensions(), {num_rows, num_channels});
  checks.Type("scales", scales->element_type(), ffi::F32);
  checks.Shape("scales", scales->dimensions(), {num_rows, num_block_scales(num_channels)});
  for (const void* rows : {x.data, values->untyped_data()}) {
    checks.Require(reinterpret_cast<uintptr_t>(rows) % kRowAlignment == 0,
                   "rows must lie at a multiple of " + std::to_string(kRowAlignment) + " bytes");
  }
  if (!checks.ok()) return checks.error();
  const gpu::QuantizeArguments arguments{x.data,
                                         values->untyped_data(),
                                         static_cast<float*>(scales->untyped_data()),
                                         num_rows,
                                         num_channels,
                                         *x.float_type(),
                                         power_of_two_scales != 0};
  return CudaStatus(kQuantizeOp, gpu::LaunchQuantize(arguments, NumSms(ordinal, num_sms), stream));
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Attr<int64_t>("num_sms")
      .Attr<int64_t>("power_of_two_scales")
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kQuantizeCuda, Quantize, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kQuantizeCudaRecordable, Quantize, Binding(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
