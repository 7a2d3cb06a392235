#include "xla_ffi/cuda/timeline.h"

#include <cuda_runtime.h>

#include <iterator>
#include <memory>
#include <string>

#include "cuda/memory/control.h"
#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

struct Copy {
  decltype(gpu::ControlBlock::timeline) calls;
};

// (operation, block, role, event, first_ns, last_ns, total_ns, count) for each event that happened
// in the newest call of each operation.
nb::list Timeline(int ordinal) {
  const auto copy = std::make_unique<Copy>();
  {
    const nb::gil_scoped_release release;
    const gpu::ControlBlock* control = SymmetricMemory::Get().Control(ordinal);
    if (control == nullptr) Throw("no call has been set up" + OnDevice(ordinal));
    const DeviceScope scope(ordinal);
    Check(cudaMemcpy(&copy->calls, &control->timeline, sizeof copy->calls, cudaMemcpyDeviceToHost),
          "reading the timeline" + OnDevice(ordinal));
  }
  nb::list rows;
  for (int kind = 0; kind < static_cast<int>(kNumOps); ++kind) {
    const char* const operation = kOpNames[kind] + sizeof "jax_ep_" - 1;
    const auto& call = copy->calls[kind];
    for (uint32_t b = 0; b < call.num_blocks && b < std::size(call.block); ++b) {
      const gpu::BlockTimeline& block = call.block[b];
      for (int role = 0; role < gpu::kNumRoles; ++role) {
        for (int event = 0; event < gpu::kNumEvents; ++event) {
          const gpu::Mark& mark = block.mark[role][event];
          if (mark.count == 0) continue;
          rows.append(nb::make_tuple(operation, b, gpu::kRoleNames[role], gpu::kEventNames[event],
                                     block.start_ns + mark.first, block.start_ns + mark.last,
                                     mark.total, mark.count));
        }
      }
    }
  }
  return rows;
}

}  // namespace

void RegisterTimeline(nb::module_& m) {
  m.def("timeline", &Timeline, nb::arg("ordinal"),
        "What the newest call of each operation has noted on a device that has no work left: "
        "(operation, block, role, event, first_ns, last_ns, total_ns, count).");
}

}  // namespace jax_ep
