// The Python module jax_ep._cuda: the handlers' addresses, and the calls around them.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/attributes.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/network.h"
#include "xla_ffi/cuda/timeline.h"
#include "xla_ffi/memory/symmetric_memory.h"
#include "xla_ffi/module_common.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict Handlers(bool recordable) {
  nb::dict handlers;
  handlers[LayoutAttributes::kOp] = Stages(
      kInstantiateLayoutCuda, recordable ? Poisoned<kLayoutCudaRecordable> : Poisoned<kLayoutCuda>);
  handlers[DispatchAttributes::kOp] =
      Stages(kInstantiateDispatchCuda,
             recordable ? Poisoned<kDispatchCudaRecordable> : Poisoned<kDispatchCuda>);
  handlers[CombineAttributes::kOp] =
      Stages(kInstantiateCombineCuda,
             recordable ? Poisoned<kCombineCudaRecordable> : Poisoned<kCombineCuda>);
  handlers[CombineGradientAttributes::kOp] =
      Stages(kInstantiateCombineGradientCuda, recordable ? Poisoned<kCombineGradientCudaRecordable>
                                                         : Poisoned<kCombineGradientCuda>);
  handlers[LayoutAndDispatchAttributes::kOp] = Stages(
      kInstantiateLayoutAndDispatchCuda,
      recordable ? Poisoned<kLayoutAndDispatchCudaRecordable> : Poisoned<kLayoutAndDispatchCuda>);
  nb::dict quantize;
  XLA_FFI_Handler* const execute =
      recordable ? Poisoned<kQuantizeCudaRecordable> : Poisoned<kQuantizeCuda>;
  quantize["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  handlers[kQuantizeOp] = quantize;
  return handlers;
}

nb::dict BuildFacts() {
  nb::dict facts;
  facts["toolkit"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
  facts["architectures"] = JAX_EP_CUDA_ARCHITECTURES;
  return facts;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.def("handlers", &Handlers, nb::arg("recordable"),
        "Stages of each target, as jax.ffi.register_ffi_target takes them. Recordable: XLA may put "
        "their calls into command buffers.");
  m.def("build", &BuildFacts, "What this part was compiled with and for.");
  m.def("state_type", &StateType<CudaSiteState>,
        "The call sites' state, as jax.ffi.register_ffi_type takes it.");
  m.def(
      "setup",
      [](int64_t process, int64_t num_processes, const std::vector<int>& ids,
         const std::vector<int>& ordinals, size_t staging_bytes, bool staged_only,
         size_t slot_bytes, bool requires_slots) {
        SymmetricMemory::Get().Setup(process, num_processes, ids, ordinals, staging_bytes,
                                     staged_only, slot_bytes, requires_slots);
      },
      nb::arg("process"), nb::arg("num_processes"), nb::arg("ids"), nb::arg("ordinals"),
      nb::arg("staging_bytes"), nb::arg("staged_only"), nb::arg("slot_bytes"),
      nb::arg("requires_slots"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "export_memory",
      [](const std::vector<uint64_t>& pointers) { return SymmetricMemory::Get().Export(pointers); },
      nb::arg("pool_pointers"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "import_memory",
      [](const std::vector<std::string>& exports) { SymmetricMemory::Get().Import(exports); },
      nb::arg("exports"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "close_descriptors", [] { SymmetricMemory::Get().CloseDescriptors(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "end_own_waits", [] { SymmetricMemory::Get().EndOwnWaits(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "synchronize",
      [](double seconds) { return SymmetricMemory::Get().Synchronize(Nanoseconds(seconds)); },
      nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "join_network",
      [](const nb::capsule& part, const std::vector<std::string>& hosts, int64_t ranks_per_node,
         bool has_slots) {
        Network::Get().Join(*static_cast<const gpu::NetworkPart*>(part.data(gpu::kNetworkPartName)),
                            hosts, ranks_per_node, has_slots);
        SymmetricMemory::Get().SetHosts(hosts);
      },
      nb::arg("part"), nb::arg("hosts"), nb::arg("ranks_per_node"), nb::arg("has_slots"));
  m.def(
      "release",
      [](bool ended) {
        Network::Get().Leave();
        SymmetricMemory::Get().Release(ended);
      },
      nb::arg("devices_have_ended"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "watch", [] { return SymmetricMemory::Get().Watch(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "awaited_elsewhere", [] { return SymmetricMemory::Get().AwaitedElsewhere(); },
      nb::call_guard<nb::gil_scoped_release>(),
      "Processes of other nodes for which devices have waited for some time.");
  m.def(
      "tell_left", [](int64_t process) { SymmetricMemory::Get().TellLeft(process); },
      nb::arg("process"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "recorded_error", [] { return SymmetricMemory::Get().RecordedError(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "describe", [] { return SymmetricMemory::Get().Describe(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "slot_area_bytes", [] { return SymmetricMemory::Get().SlotAreaBytes(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "slots_problem", [] { return SymmetricMemory::Get().SlotsProblem(); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "set_timeout",
      [](double arrival, double progress) {
        SymmetricMemory::Get().SetTimeouts({Nanoseconds(arrival), Nanoseconds(progress)});
      },
      nb::arg("arrival"), nb::arg("progress"), nb::call_guard<nb::gil_scoped_release>());
  m.def("set_poison_outputs", &SetPoisonOutputs, nb::arg("poison"));
#ifdef JAX_EP_TIMELINE
  RegisterTimeline(m);
#endif
}

}  // namespace jax_ep
