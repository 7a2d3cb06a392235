// The forms that dispatched rows have: how they cross and what comes out of it, by dispatch on a layout
// or by the call in slots that makes the layout too. What each must give is taken from what rows as they
// are give, and from fp8_oracle.h.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_FORMS_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_FORMS_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/slots/fits.h"
#include "tests/native/fp8_oracle.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_ranks.h"

namespace jax_ep::gpu::test {

struct Form {
  DispatchMode mode = DispatchMode::kCopy;
  bool expand = true;
  int64_t num_scales = 0;  // of a row as it crosses
  bool power_of_two_scales = false;
  bool is_integer = false;  // what rows are said to be, as they are

  bool keeps_scales() const {
    return mode == DispatchMode::kQuantize || mode == DispatchMode::kScaled;
  }
  // Of tokens.
  int64_t num_rows(const Data& d) const {
    return expand ? d.capacity : d.num_ranks * d.num_tokens + 1;
  }
  int64_t row_bytes(const Data& d) const { return keeps_scales() ? d.num_channels : d.row_bytes; }
  int64_t scales_per_row() const { return keeps_scales() ? num_scales : 0; }
  // Of x.
  int64_t x_row_bytes(const Data& d) const {
    return mode == DispatchMode::kScaled ? d.num_channels : d.row_bytes;
  }

  std::string name() const {
    const char* const of_mode[] = {"", ", quantised", ", dequantised", ", with scales"};
    return std::string(of_mode[static_cast<int>(mode)]) + (expand ? "" : ", not expanded");
  }
};

inline Form Quantizing(const Data& d, DispatchMode mode, bool expand, bool power_of_two_scales) {
  return {mode, expand, num_block_scales(d.num_channels), power_of_two_scales};
}

inline bool HasFp8(const Data& d) {
  return d.num_channels % kRowAlignment == 0 && d.num_channels <= kMaxFp8Channels;
}

// Whether a call of the case goes through slots.
inline bool FitsSlots(const Data& d, const Form& form) {
  return fits_slots({d.num_ranks, d.num_tokens, d.top_k, d.num_experts,
                     slot_row(form.mode, d.type, form.x_row_bytes(d), form.num_scales)},
                    kSlotAreaBytes);
}

// Not expanded -------------------------------------------------------------------------------

// Whether a row of rank r holds a token.
inline bool HoldsToken(const Data& d, int r, int64_t row) {
  return row < d.num_ranks * d.num_tokens && d.recv_offsets[r][row] != d.recv_offsets[r][row + 1];
}

// Rank r's rows that are not expanded, from expert rows of so many numbers.
template <typename T>
std::vector<T> NotExpanded(const Data& d, int r, const std::vector<T>& rows, int64_t row_size) {
  std::vector<T> result((d.num_ranks * d.num_tokens + 1) * row_size, T{0});
  for (int64_t row = 0; row < d.capacity && row_size > 0; ++row) {
    const int64_t flat = d.recv_src[r][row];
    if (flat < 0) continue;
    std::copy_n(&rows[row * row_size], row_size, &result[flat / d.top_k * row_size]);
  }
  return result;
}

// Of rows of so many numbers those that are specified. Without zero_tail the tail is not; in gaps, where
// rows are not expanded, zeros stand for what may be there.
template <typename T>
std::vector<T> Specified(const Data& d, int r, const Form& form, std::vector<T> rows,
                         int64_t row_size) {
  if (form.expand) {
    rows.resize(NumSpecified(d, r) * row_size);
    return rows;
  }
  for (int64_t row = 0; row < d.num_ranks * d.num_tokens && !d.zero_tail; ++row) {
    if (!HoldsToken(d, r, row)) std::fill_n(&rows[row * row_size], row_size, T{0});
  }
  return rows;
}

// What all ranks send, and what all must get -------------------------------------------------

struct FormData {
  Form form;
  std::vector<std::vector<uint8_t>> x, tokens;  // [R], rows
  std::vector<std::vector<float>> x_scales,
      scales;  // [R][T * num_scales], [R][num_rows * num_scales]
};

class FormOracle {
 public:
  FormOracle(const Data& d, uint64_t seed) : d_(d), seed_(seed) {}

  FormData Make(const Form& form) {
    FormData result{form, d_.x, d_.tokens, {}, {}};
    result.x_scales.resize(d_.num_ranks);
    result.scales.resize(d_.num_ranks);
    if (form.mode == DispatchMode::kScaled) {
      ScaledData scaled = MakeScaledData(d_, form.num_scales, seed_);
      result.x = std::move(scaled.x);
      result.x_scales = std::move(scaled.x_scales);
      result.tokens = std::move(scaled.tokens);
      result.scales = std::move(scaled.scales);
    } else if (form.mode != DispatchMode::kCopy) {
      const Fp8Data& fp8 = Fp8(form.power_of_two_scales);
      result.x = fp8.x;
      result.tokens = form.keeps_scales() ? fp8.numbers : fp8.dequantized;
      if (form.keeps_scales()) result.scales = fp8.scales;
    }
    for (int r = 0; r < d_.num_ranks && !form.expand; ++r) {
      result.tokens[r] = NotExpanded(d_, r, result.tokens[r], form.row_bytes(d_));
      result.scales[r] = NotExpanded(d_, r, result.scales[r], form.scales_per_row());
    }
    return result;
  }

 private:
  // Plain loops over every number: once for each kind of scales.
  const Fp8Data& Fp8(bool power_of_two_scales) {
    const auto found = fp8_.find(power_of_two_scales);
    if (found != fp8_.end()) return found->second;
    return fp8_[power_of_two_scales] = MakeFp8Data(d_, MakeFp8Rows(d_, seed_), power_of_two_scales);
  }

  const Data& d_;
  const uint64_t seed_;
  std::map<bool, Fp8Data> fp8_;
};

// On the device ------------------------------------------------------------------------------

// One rank's operands and results, all results poisoned. Behind each result is a guard of so many bytes,
// which no call may write.
struct FormBuffers {
  FormBuffers(const Data& d, const FormData& data, int r)
      : FormBuffers(d, data.form, data.x[r], data.x_scales[r], 0) {}
  FormBuffers(const Data& d, const Form& form, const std::vector<uint8_t>& x_rows,
              const std::vector<float>& scales_of_x, size_t guard_bytes)
      : form(form),
        x(x_rows),
        x_scales(scales_of_x),
        tokens(form.num_rows(d) * form.row_bytes(d) + guard_bytes),
        scales(form.num_rows(d) * form.scales_per_row() + guard_bytes / sizeof(float)),
        weights(d.capacity + guard_bytes / sizeof(float)),
        landing(d.num_ranks * d.num_tokens *
                WireRowBytes(d.row_bytes, d.num_channels, form.num_scales)) {}

  void Poison(cudaStream_t stream) {
    tokens.Fill(0xff, stream);
    scales.Fill(0xff, stream);
    weights.Fill(0xff, stream);
    landing.Fill(0xff, stream);
  }

  // To the arguments of dispatch, or of the call in slots, with rows as they are.
  template <typename Arguments>
  void Set(const Data& d, Arguments& a) {
    a.x = x.get();
    a.row_bytes = form.x_row_bytes(d);
    a.mode = form.mode;
    a.type = d.type;
    a.num_scales = form.num_scales;
    a.power_of_two_scales = form.power_of_two_scales;
    a.is_integer = form.is_integer;
    a.x_scales = form.mode == DispatchMode::kScaled ? x_scales.get() : nullptr;
    a.tokens = tokens.get();
    a.scales = form.keeps_scales() ? scales.get() : nullptr;
    a.weights = d.weighted ? weights.get() : nullptr;
    a.num_rows = form.num_rows(d);
    a.expand = form.expand;
  }

  const Form form;
  Buffer<uint8_t> x;
  Buffer<float> x_scales;
  Buffer<uint8_t> tokens;
  Buffer<float> scales, weights;
  Buffer<uint8_t> landing;
};

// `what` says by which call.
inline void CompareForm(const Data& d, int r, const FormData& expected, const FormBuffers& actual,
                        const char* what) {
  const Form& form = expected.form;
  const std::string of = form.name() + ", " + what;
  const int64_t row_bytes = form.row_bytes(d), num_scales = form.scales_per_row();
  std::vector<uint8_t> rows = Specified(d, r, form, actual.tokens.Read(), row_bytes);
  const std::vector<uint8_t> right = Specified(d, r, form, expected.tokens[r], row_bytes);
  if (form.mode == DispatchMode::kQuantize) MakeNansEqual(rows);
  if (form.mode == DispatchMode::kDequantize) {
    CompareNumbers(("tokens" + of).c_str(), r, d.type, rows, right);
  } else {
    Compare(("tokens" + of).c_str(), r, rows, right);
  }
  if (form.keeps_scales()) {  // as bits: some are NaN
    Compare(("scales" + of).c_str(), r, Specified(d, r, form, actual.scales.Read(), num_scales),
            Specified(d, r, form, expected.scales[r], num_scales));
  }
  if (d.weighted) {
    Compare(("weights" + of).c_str(), r, actual.weights.Read(), d.weights[r], NumSpecified(d, r));
  }
  Compare(("x" + of).c_str(), r, actual.x.Read(), expected.x[r]);
  Compare(("scales of x" + of).c_str(), r, actual.x_scales.Read(), expected.x_scales[r]);
}

// Calls that fail ----------------------------------------------------------------------------

inline constexpr size_t kGuardBytes = 1 << 20;
inline constexpr int kOverwritten = 0x5a;  // no call writes that

// All there are, with integers; four scales of a row fit slots.
inline std::vector<Form> FormsToFail(const Data& d) {
  std::vector<Form> forms;
  for (const bool expand : {true, false}) {
    forms.push_back({DispatchMode::kCopy, expand});
    forms.push_back({DispatchMode::kCopy, expand});
    forms.back().is_integer = true;
    forms.push_back(Quantizing(d, DispatchMode::kQuantize, expand, false));
    forms.push_back(Quantizing(d, DispatchMode::kDequantize, expand, false));
    forms.push_back({DispatchMode::kScaled, expand, 4});
  }
  return forms;
}

// Of a call that will fail: with guards.
inline void Overwrite(FormBuffers& b) {
  b.tokens.Fill(kOverwritten);
  b.scales.Fill(kOverwritten);
  b.weights.Fill(kOverwritten);
}

// All bits of a failed call's results are set, which is NaN in every float type, or none where they are
// integers; and nothing is written behind them.
inline void RequireFormFilled(const Data& d, const FormBuffers& b) {
  const Form& form = b.form;
  const auto require = [&](const char* name, const auto& result, size_t num_bytes, uint8_t byte) {
    const auto numbers = result.Read();
    const auto* const bytes = reinterpret_cast<const uint8_t*>(numbers.data());
    const size_t size = numbers.size() * sizeof numbers[0];
    const auto* const end = std::find_if(bytes, bytes + size, [&](uint8_t v) { return v != byte; });
    REQUIRE(static_cast<size_t>(end - bytes) == num_bytes, "%zu bytes of %s%s, not %zu, are %02x",
            static_cast<size_t>(end - bytes), name, form.name().c_str(), num_bytes, byte);
    REQUIRE(
        std::all_of(bytes + num_bytes, bytes + size, [](uint8_t v) { return v == kOverwritten; }),
        "written behind %s%s", name, form.name().c_str());
  };
  const int64_t num_rows = form.num_rows(d);
  require("tokens", b.tokens, num_rows * form.row_bytes(d), form.is_integer ? 0 : 0xff);
  require("scales", b.scales, num_rows * form.scales_per_row() * sizeof(float), 0xff);
  require("weights", b.weights, d.weighted ? d.capacity * sizeof(float) : 0, 0xff);
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_FORMS_H_
