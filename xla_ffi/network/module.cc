// The Python module jax_ep._nvshmem: NVSHMEM's start and end. Loaded only where a network is wanted,
// since it needs NVSHMEM's library (jax_ep/nvshmem.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "xla_ffi/network/nvshmem.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

const char* Name(gpu::LinkResult result) {
  switch (result) {
    case gpu::kLinkGood:
      return "good";
    case gpu::kLinkSilent:
      return "silent";
    case gpu::kLinkWrong:
      return "wrong";
    default:
      return "unknown";
  }
}

std::vector<std::string> CheckLinks(double timeout) {
  std::vector<std::string> names;
  const std::chrono::duration<double> seconds(timeout);
  for (gpu::LinkResult result :
       Nvshmem::Get().CheckLinks(std::chrono::duration_cast<std::chrono::nanoseconds>(seconds))) {
    names.push_back(Name(result));
  }
  return names;
}

}  // namespace

NB_MODULE(_nvshmem, m) {
  m.def("built_version", &Nvshmem::BuiltVersion);
  m.def("loaded_version", &Nvshmem::LoadedVersion);
  m.def(
      "unique_id",
      [] {
        const std::string id = Nvshmem::UniqueId();
        return nb::bytes(id.data(), id.size());
      },
      "By which the processes find each other: one makes it, all start with it.");
  m.def(
      "start",
      [](const nb::bytes& unique_id, int rank, int num_ranks, int ordinal) {
        const std::string id(unique_id.c_str(), unique_id.size());
        const nb::gil_scoped_release release;
        Nvshmem::Get().Start(id, rank, num_ranks, ordinal);
      },
      nb::arg("unique_id"), nb::arg("rank"), nb::arg("num_ranks"), nb::arg("ordinal"),
      "Collective, without a timeout.");
  m.def("check_links", &CheckLinks, nb::arg("timeout"), nb::call_guard<nb::gil_scoped_release>(),
        "Collective. Of each rank: 'good' if its row has arrived whole, 'silent' if none has, "
        "'wrong'.");
  m.def(
      "mapped_peers", [] { return Nvshmem::Get().MappedPeers(); },
      nb::call_guard<nb::gil_scoped_release>(),
      "Of each rank, whether it is reached by stores and not over a network.");
  m.def(
      "finalize", [] { Nvshmem::Get().Finalize(); }, nb::call_guard<nb::gil_scoped_release>(),
      "Collective, without a timeout. Does nothing if NVSHMEM is not running.");
}

}  // namespace jax_ep
