// Dispatch in every form of rows: by itself on a layout, and in slots together with the layout. Results
// are poisoned before, so that padding, gaps and tail are seen to be written.
#include "tests/native/kernels_forms.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

// Of the case; those that are not expanded, which are other code in who receives, in fewer kinds.
std::vector<Form> FormsOf(const Data& d, bool expand) {
  std::vector<Form> forms = {{DispatchMode::kCopy, expand}};
  if (!HasFp8(d)) return forms;
  for (const bool power_of_two_scales : {false, true}) {
    if (power_of_two_scales && !expand) continue;
    for (const DispatchMode mode : {DispatchMode::kQuantize, DispatchMode::kDequantize}) {
      forms.push_back(Quantizing(d, mode, expand, power_of_two_scales));
    }
  }
  // One a row, one a block of 128 channels, and (mostly) a number that the copy engine takes, or
  // slots.
  std::set<int64_t> num_scales = {1, num_block_scales(d.num_channels), d.num_channels / 16};
  if (!expand) num_scales = {1, 4};
  for (const int64_t n : num_scales) forms.push_back({DispatchMode::kScaled, expand, n});
  return forms;
}

// Twice on all ranks, so that the second time meets what the first one left in control blocks.
void RunForm(const Group& group, const Data& d, const FormData& data,
             std::vector<std::unique_ptr<Buffers>>& buffers, int num_sms, uint64_t operation,
             bool in_slots) {
  std::vector<std::unique_ptr<FormBuffers>> results;
  for (int r = 0; r < d.num_ranks; ++r) {
    results.push_back(std::make_unique<FormBuffers>(d, data, r));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      FormBuffers& out = *results[r];
      const cudaStream_t stream = group.stream(r);
      out.Poison(stream);
      const GroupView view = group.View(r, d.num_ranks, operation, 10 * kSecond);
      if (in_slots) {
        LayoutAndDispatchArguments a = buffers[r]->LayoutAndDispatch(d);
        out.Set(d, a);
        CHECK_CUDA(LaunchLayoutAndDispatchInSlots(view, a, num_sms, stream));
        continue;
      }
      DispatchArguments a = buffers[r]->Dispatch(d);
      out.Set(d, a);
      // Every case mixes ranks whose rows land elsewhere first with ranks whose do not.
      a.landing = (r + operation) % 2 == 0 ? out.landing.get() : nullptr;
      CHECK_CUDA(LaunchDispatch(view, a, num_sms, stream));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    if (in_slots) CompareNotice(group, d, r);
    CompareForm(d, r, data, *results[r], in_slots ? "in slots" : "on a layout");
  }
}

}  // namespace

void RunForms(const Group& group, const Data& d, int num_sms, uint64_t seed) {
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < d.num_ranks; ++r) {
    buffers.push_back(std::make_unique<Buffers>(d, r));
    buffers[r]->WriteTables(d, r);
  }
  FormOracle oracle(d, seed);
  uint64_t operation = seed << 16;  // tells calls of a case apart
  for (const bool expand : {true, false}) {
    if (!expand && num_sms == 1) continue;  // they are divided in the same way
    for (const Form& form : FormsOf(d, expand)) {
      const FormData data = oracle.Make(form);
      for (const bool in_slots : {false, true}) {
        if (in_slots && !FitsSlots(d, form)) continue;
        const int num_wrong_before = g_tally.num_wrong;
        RunForm(group, d, data, buffers, num_sms, ++operation, in_slots);
        if (g_tally.num_wrong != num_wrong_before) {
          PrintCase(d, ((in_slots ? "in slots" : "on a layout") + form.name()).c_str(), num_sms);
        }
      }
    }
  }
}

}  // namespace jax_ep::gpu::test
