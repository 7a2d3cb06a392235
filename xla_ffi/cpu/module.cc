// The Python module jax_ep._cpu: the handlers' addresses, and the few calls around them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "cuda/core/limits.h"
#include "cuda/memory/slots.h"
#include "cuda/network/layout.h"
#include "cuda/network/rail/combine.h"
#include "xla_ffi/attributes.h"
#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/meet/process_group.h"
#include "xla_ffi/cpu/meet/program.h"
#include "xla_ffi/cpu/meet/rendezvous.h"
#include "xla_ffi/module_common.h"
#include "xla_ffi/timeouts.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict Handlers() {
  nb::dict handlers;
  handlers[LayoutAttributes::kOp] = Stages(kInstantiateLayoutCpu, kLayoutCpu);
  handlers[DispatchAttributes::kOp] = Stages(kInstantiateDispatchCpu, kDispatchCpu);
  handlers[LayoutAndDispatchAttributes::kOp] =
      Stages(kInstantiateLayoutAndDispatchCpu, kLayoutAndDispatchCpu);
  handlers[CombineAttributes::kOp] = Stages(kInstantiateCombineCpu, kCombineCpu);
  return handlers;
}

// Those of CUDA too: a program can be lowered for it where nothing of it is built.
nb::dict Limits() {
  nb::dict limits;
  limits["max_rows"] = kMaxRows;
  limits["scale_block"] = kScaleBlock;
  limits["cuda_ranks"] = gpu::kMaxPeers;
  limits["cuda_experts"] = gpu::kMaxExperts;
  limits["cuda_top_k"] = gpu::kMaxTopK;
  limits["cuda_tokens_per_sm"] = gpu::kMaxUnitsPerBlock;
  limits["cuda_fp8_channels"] = gpu::kMaxFp8Channels;
  limits["cuda_scaled_row_bytes"] = gpu::kMaxScaledRowBytes;
  limits["cuda_weighted_row_bytes"] = gpu::kMaxWeightedRowBytes;
  limits["cuda_default_slot_bytes"] = gpu::kDefaultSlotBytes;
  limits["cuda_slot_bytes_per_device"] = gpu::min_slot_bytes(1);
  limits["cuda_slot_tokens"] = gpu::kMaxSlotTokens;
  limits["cuda_slot_ids"] = gpu::kMaxSlotIds;
  limits["cuda_slot_group_ids"] = gpu::kMaxSlotGroupIds;
  limits["network_ranks"] = gpu::kMaxNetworkRanks;
  limits["network_combine_nodes"] = gpu::rail::kMaxCombineNodes;
  return limits;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("handlers", &Handlers, "Stages of each target, as jax.ffi.register_ffi_target takes them.");
  m.def("limits", &Limits,
        "What a call may be: cuda/core/limits.h, cuda/memory/slots.h, cuda/network/region.h.");
  m.def(
      "combine_scratch_bytes",
      [](int64_t num_ranks, int64_t ranks_per_node, int64_t num_tokens, int64_t top_k,
         int64_t row_bytes, bool has_values) {
        TableSizes sizes{};
        sizes.num_ranks = num_ranks;
        sizes.num_tokens = num_tokens;
        sizes.top_k = top_k;
        return CombineScratchBytes(sizes, ranks_per_node, row_bytes, has_values);
      },
      nb::kw_only(), nb::arg("num_ranks"), nb::arg("ranks_per_node"), nb::arg("num_tokens"),
      nb::arg("top_k"), nb::arg("row_bytes"), nb::arg("has_values"),
      "Of a combine on CUDA whose group lies on several nodes.");
  m.def("state_type", &StateType<CpuSiteState>,
        "The call sites' state, as jax.ffi.register_ffi_type takes it.");
  m.def("end_program", &cpu::Program::End,
        "What this thread compiles or loads from now on belongs to another program.");
  m.def(
      "set_timeout",
      [](double arrival, double progress) {
        cpu::Rendezvous::Get().set_timeouts({Nanoseconds(arrival), Nanoseconds(progress)});
      },
      nb::arg("arrival"), nb::arg("progress"), "In seconds.");
  m.def(
      "timeout",
      [] {
        const Timeouts timeouts = cpu::Rendezvous::Get().timeouts();
        return std::pair(std::chrono::duration<double>(timeouts.arrival).count(),
                         std::chrono::duration<double>(timeouts.progress).count());
      },
      "Arrival and progress, in seconds.");
  m.def(
      "set_advice",
      [](std::string advice) { cpu::Rendezvous::Get().set_advice(std::move(advice)); },
      nb::arg("advice"), "What may keep ranks from coming: a sentence for the errors that say so.");
  m.def("set_poison_outputs", &SetPoisonOutputs, nb::arg("poison"));
  m.def("listen", &cpu::ProcessGroup::Listen, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "connect",
      [](int64_t process_index, const std::vector<std::string>& addresses, double seconds) {
        cpu::ProcessGroup::Connect(process_index, addresses, Nanoseconds(seconds));
      },
      nb::arg("process_index"), nb::arg("addresses"), nb::arg("seconds"),
      nb::call_guard<nb::gil_scoped_release>());
  m.def("disconnect", &cpu::ProcessGroup::Disconnect, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace jax_ep
