// Part of network_rails: dispatch, against the oracle.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/network/rail/dispatch.cuh"
#include "tests/native/call_arguments.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/network_rails.h"

namespace jax_ep::gpu::test {
namespace {

// One rank's operands, the tables of its layout, and its results, which are poisoned.
struct DispatchBuffers {
  DispatchBuffers(const Data& d, const FormData& data, int r)
      : ids(d.ids[r]),
        send_row(d.send_row[r]),
        recv_src(d.recv_src[r]),
        recv_offsets(d.recv_offsets[r]),
        group_sizes(d.group_sizes[r]),
        topk_weights(d.topk_weights[r]),
        form(d, data, r) {}

  DispatchArguments Arguments(const Data& d) {
    CallBuffers<uint8_t> b{};
    b.ids = ids.get();
    b.send_row = send_row.get();
    b.recv_src = recv_src.get();
    b.recv_offsets = recv_offsets.get();
    b.group_sizes = group_sizes.get();
    b.topk_weights = d.weighted ? topk_weights.get() : nullptr;
    DispatchArguments a = DispatchOf(Buffers::Sizes(d), b, DispatchMode::kCopy);
    form.Set(d, a);
    return a;
  }

  Buffer<int32_t> ids, send_row, recv_src, recv_offsets, group_sizes;
  Buffer<float> topk_weights;
  FormBuffers form;
};

void Launch(Job& job, int rank, DispatchBuffers& buffers, const Data& d, uint64_t operation,
            Fault fault = Fault::kNone) {
  // Sometimes fewer warps than nodes, so that a warp has several of them.
  const int max_nodes = operation % 2 == 0 ? rail::kMaxPairs : 2;
  CHECK_CUDA(LaunchRailDispatch(job.View(rank, operation), job.Rail(rank), job.HopOf(rank, fault),
                                buffers.Arguments(d), BlocksOf(job.shape(), operation),
                                job.stream(rank), max_nodes));
}

// What ranks send, and what they must get.
Data MakeDispatchData(const Case& c, int num_ranks, uint64_t seed) {
  std::mt19937_64 rng(seed);
  Data d = MakeLayoutData(c, num_ranks, rng);
  for (int r = 0; r < num_ranks; ++r) {
    std::vector<uint8_t> x(d.num_tokens * d.row_bytes);
    for (size_t i = 0; i < x.size(); i += sizeof(uint64_t)) {
      const uint64_t bits = rng();
      std::memcpy(&x[i], &bits, sizeof bits);
    }
    std::vector<float> topk_weights(d.num_tokens * d.top_k);
    for (float& weight : topk_weights) weight = static_cast<float>(rng() >> 40) * 0x1p-24f;
    d.x.push_back(x);
    d.topk_weights.push_back(topk_weights);
  }
  for (int r = 0; r < num_ranks; ++r) MakeReceived(d, r);
  return d;
}

// As it is, or with scales; expanded or not.
Form AnyForm(const Data& d, std::mt19937_64& rng) {
  Form form;
  form.expand = rng() % 3 != 0;
  if (d.num_channels % kRowAlignment != 0 || rng() % 3 != 0) return form;
  form.mode = DispatchMode::kScaled;
  form.num_scales = std::vector<int64_t>{1, 4, d.num_channels / 16}[rng() % 3];
  return form;
}

// How many rows of a rank's result are wrong; says what the first ones of a run hold.
int NumWrongRows(const JobShape& shape, const Data& d, const FormData& data, int rank, int call,
                 const DispatchBuffers& b, int& num_to_print) {
  const Form& form = data.form;
  const int64_t row_bytes = form.row_bytes(d), num_scales = form.scales_per_row();
  const std::vector<uint8_t> got = Specified(d, rank, form, b.form.tokens.Read(), row_bytes);
  const std::vector<uint8_t> right = Specified(d, rank, form, data.tokens[rank], row_bytes);
  std::vector<float> got_scales, right_scales;
  if (form.keeps_scales()) {
    got_scales = Specified(d, rank, form, b.form.scales.Read(), num_scales);
    right_scales = Specified(d, rank, form, data.scales[rank], num_scales);
  }
  const std::vector<float> weights = b.form.weights.Read();
  int num_wrong = 0;
  for (int64_t row = 0; row < NumSpecified(d, rank) && d.weighted; ++row) {
    if (std::memcmp(&weights[row], &d.weights[rank][row], sizeof(float)) == 0) continue;
    ++num_wrong;
    if (num_to_print-- <= 0) continue;
    std::printf("  call %d, rank %d, weight of row %lld: %g, right %g, source %d\n", call, rank,
                static_cast<long long>(row), weights[row], d.weights[rank][row],
                d.recv_src[rank][row]);
  }
  for (int64_t row = 0; row * row_bytes < static_cast<int64_t>(right.size()); ++row) {
    const uint8_t *a = &got[row * row_bytes], *e = &right[row * row_bytes];
    const bool is_right_row = std::memcmp(a, e, row_bytes) == 0;
    const bool are_right_scales = num_scales == 0 || std::memcmp(&got_scales[row * num_scales],
                                                                 &right_scales[row * num_scales],
                                                                 num_scales * sizeof(float)) == 0;
    if (is_right_row && are_right_scales) continue;
    ++num_wrong;
    if (num_to_print-- <= 0) continue;
    // Of which token, and what is there in its place.
    int64_t flat_token = row;
    if (form.expand) {
      const int32_t flat = d.recv_src[rank][row];
      flat_token = flat < 0 ? -1 : flat / d.top_k;
    } else if (!HoldsToken(d, rank, row)) {
      flat_token = -1;
    }
    const auto src = static_cast<int>(flat_token < 0 ? -1 : flat_token / d.num_tokens);
    const int64_t token = flat_token < 0 ? -1 : flat_token % d.num_tokens;
    const uint8_t* first = std::mismatch(a, a + row_bytes, e).first;
    const bool is_untouched = std::all_of(a, a + row_bytes, [](uint8_t v) { return v == 0xff; });
    std::string holds = is_untouched ? "nothing" : "something else";
    for (int64_t s = 0; s < d.num_ranks * d.num_tokens; ++s) {
      const uint8_t* x = &data.x[s / d.num_tokens][s % d.num_tokens * row_bytes];
      if (std::memcmp(a, x, row_bytes) == 0) {
        holds = "token " + std::to_string(s % d.num_tokens) + " of rank " +
                std::to_string(s / d.num_tokens);
      }
    }
    std::printf(
        "  call %d, rank %d, row %lld%s: of rank %d (%s), token %lld: %s from byte "
        "%lld of %lld on, holds %s; scales %s\n",
        call, rank, static_cast<long long>(row), form.name().c_str(), src,
        src < 0                                                     ? "none"
        : src / shape.ranks_per_node == rank / shape.ranks_per_node ? "own node"
        : src % shape.ranks_per_node == rank % shape.ranks_per_node ? "same rail"
                                                                    : "two hops",
        static_cast<long long>(token), is_right_row ? "right" : "wrong",
        static_cast<long long>(first - a), static_cast<long long>(row_bytes), holds.c_str(),
        are_right_scales ? "right" : "wrong");
  }
  return num_wrong;
}

// Calls one behind the other on each rank's stream.
void RunDispatch(Group& group, const JobShape& shape, const NetworkModel& model, int num_calls,
                 Fault fault = Fault::kNone) {
  if (g_num_failed >= kEnoughFailures) return;
  const bool is_control = fault != Fault::kNone;
  std::mt19937_64 rng(model.seed * 7919 + static_cast<uint64_t>(shape.num_ranks) * 31 +
                      static_cast<uint64_t>(shape.ranks_per_node));
  Job job(group, shape, model, is_control ? kSecond : 8 * kSecond);
  std::vector<Data> data;
  std::vector<FormData> forms;
  std::vector<std::vector<std::unique_ptr<DispatchBuffers>>> buffers(
      static_cast<size_t>(num_calls));
  for (int call = 0; call < num_calls; ++call) {
    if (is_control && call > 0) {
      data.push_back(data[0]);  // what comes in the wrong call may be anything, but stays in bounds
    } else {
      const Case c = is_control ? CaseOfControls() : AnyCase(rng, shape.slot_bytes);
      data.push_back(MakeDispatchData(c, shape.num_ranks, rng()));
    }
    const Data& d = data.back();
    forms.push_back(FormOracle(d, rng()).Make(is_control ? Form{} : AnyForm(d, rng)));
    for (int r = 0; r < shape.num_ranks; ++r) {
      buffers[call].push_back(std::make_unique<DispatchBuffers>(d, forms[call], r));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto launched = Clock::now();
  RunCalls(job, num_calls, rng, [&](int r, int call) {
    Launch(job, r, *buffers[call][r], data[call], model.seed * 1000 + static_cast<uint64_t>(call),
           fault);
  });
  const double seconds = SecondsSince(launched);
  int num_wrong = 0, num_to_print = is_control ? 0 : 12;
  for (int call = 0; call < num_calls; ++call) {
    const int before = num_wrong;
    for (int r = 0; r < shape.num_ranks; ++r) {
      num_wrong +=
          NumWrongRows(shape, data[call], forms[call], r, call, *buffers[call][r], num_to_print);
    }
    if (num_wrong == before || is_control) continue;
    const Data& d = data[call];
    std::printf(
        "  call %d: %d rows wrong; T %lld, K %lld, L %lld, A %lld, C %lld, row %lld bytes, "
        "routing %d, %s, %s%s\n",
        call, num_wrong - before, static_cast<long long>(d.num_tokens),
        static_cast<long long>(d.top_k), static_cast<long long>(d.num_local),
        static_cast<long long>(d.alignment), static_cast<long long>(d.capacity),
        static_cast<long long>(d.row_bytes), static_cast<int>(d.routing),
        d.weighted ? "weighted" : "plain", d.zero_tail ? "zero tail" : "any tail",
        forms[call].form.name().c_str());
  }
  ReportCalls(job, model, "dispatch", fault, num_calls, num_wrong, seconds);
}

// A rank that never comes: all others end within the timeout of one, and their results say so.
void RunDispatchWithoutOne(Group& group, const JobShape& shape, const NetworkModel& model,
                           Fault fault = Fault::kNone) {
  if (g_num_failed >= kEnoughFailures) return;
  const int missing = shape.num_ranks - 1;
  Job job(group, shape, model, kNearTimeoutNs, kFarTimeoutNs);
  const Data d = MakeDispatchData(CaseOfControls(), shape.num_ranks, model.seed);
  std::vector<std::unique_ptr<DispatchBuffers>> buffers;
  const FormData data = FormOracle(d, model.seed).Make({});
  for (int r = 0; r < shape.num_ranks; ++r) {
    buffers.push_back(std::make_unique<DispatchBuffers>(d, data, r));
    buffers[r]->form.tokens.Fill(0);
    buffers[r]->form.weights.Fill(0);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = Clock::now();
  for (int r = 0; r < missing; ++r) Launch(job, r, *buffers[r], d, model.seed, fault);
  job.Synchronize();
  const double seconds = SecondsSince(start);
  int num_wrong = 0;
  for (int r = 0; r < missing; ++r) {
    const std::vector<float> weights = buffers[r]->form.weights.Read();
    const std::vector<uint8_t> tokens = buffers[r]->form.tokens.Read();
    bool is_right = HasHeard(job, r) && std::all_of(weights.begin(), weights.end(),
                                                    [](float v) { return std::isnan(v); });
    for (size_t i = 0; i < tokens.size() && is_right; i += TypeBytes(d.type)) {
      is_right = std::isnan(ReadNumber(d.type, tokens.data() + i));
    }
    num_wrong += !is_right;
  }
  ReportWithoutOne(job, model, "dispatch", fault, num_wrong, seconds);
}

// Calls of which one is another on one rank: both ends of its rail say so, or are told.
void RunOtherCall(Group& group, const JobShape& shape, const NetworkModel& model) {
  if (g_num_failed >= kEnoughFailures) return;
  Job job(group, shape, model, kSecond / 2);
  const Data d = MakeDispatchData(CaseOfControls(), shape.num_ranks, model.seed);
  std::vector<std::unique_ptr<DispatchBuffers>> buffers;
  const FormData data = FormOracle(d, model.seed).Make({});
  for (int r = 0; r < shape.num_ranks; ++r) {
    buffers.push_back(std::make_unique<DispatchBuffers>(d, data, r));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const int first_of_last = shape.num_ranks - shape.ranks_per_node;
  for (int r = 0; r < shape.num_ranks; ++r) {
    Launch(job, r, *buffers[r], d, r < first_of_last ? 1 : 2);
  }
  job.Synchronize();
  int num_wrong = 0;
  for (int r = 0; r < shape.num_ranks; ++r) num_wrong += job.error(r).valid == 0;
  bool is_named = false;
  for (int r = 0; r < shape.num_ranks; ++r) is_named |= job.error(r).phase == kOtherCall;
  const bool is_failure = num_wrong > 0 || !is_named;
  g_num_failed += is_failure;
  std::printf("%s: %s, another call on one node, %s: %d ranks without an error\n",
              is_failure ? "FAILED" : "ok", model.name, shape.name().c_str(), num_wrong);
  if (is_failure) job.Print();
  std::fflush(stdout);
}

}  // namespace

void TestRailDispatch(Group& group, bool is_small) {
  CHECK_CUDA(PrepareRailDispatch<FaultyHop>());
  RunJobs(
      is_small,
      [&](const JobShape& shape, const NetworkModel& model, int num_calls) {
        RunDispatch(group, shape, model, num_calls);
      },
      [&](const JobShape& shape, const NetworkModel& model) {
        RunDispatch(group, shape, model, 4, Fault::kHeadFirst);
        RunDispatch(group, shape, model, 1, Fault::kWithoutCredit);
      });
  for (const JobShape& shape : FailureJobs()) {
    RunDispatchWithoutOne(group, shape, NetworkModels(1)[1]);
    RunOtherCall(group, shape, NetworkModels(1)[1]);
  }
  RunDispatchWithoutOne(group, FailureJobs().back(), NetworkModels(1)[1], Fault::kNotTold);
}

}  // namespace jax_ep::gpu::test
