// How the kernels cut rows and share their memory, over many sizes: host code that needs no GPU.
#include "cuda/direct/combine/plan.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <utility>

#include "cuda/direct/dispatch/plan.h"
#include "cuda/direct/pieces.h"
#include "cuda/memory/control.h"
#include "cuda/rows/row_format.h"

namespace {

using namespace jax_ep::gpu;

// Whether pieces cover a row, each with something of it.
bool IsCut(int64_t row_bytes, int64_t count, int64_t bytes) {
  return count > 0 && bytes > 0 && bytes % 16 == 0 && (count - 1) * bytes < row_bytes &&
         count * bytes >= row_bytes;
}

constexpr int64_t kMiB = int64_t{1} << 20;

// Calls body(row_bytes): all rows of up to 64 KiB, and around what is large.
template <typename Body>
void ForRows(const Body& body) {
  for (int64_t row_bytes = 16; row_bytes <= 64 * 1024; row_bytes += 16) body(row_bytes);
  for (int64_t row_bytes = 64 * 1024; row_bytes < 32 * kMiB; row_bytes += 4096 + 16)
    body(row_bytes);
  for (const int64_t near : {1, 15, 16, 17, 32, 100, 255, 1024}) {
    for (int64_t row_bytes = near * kMiB - 20000; row_bytes < near * kMiB + 20000;
         row_bytes += 16) {
      body(row_bytes);
    }
  }
}

#define REQUIRE(condition, ...)                                   \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

void TestPieces() {
  ForRows([](int64_t row_bytes) {
    for (const int64_t count : {1, 2, 3, 7, 64, 132, 1000}) {
      const Pieces pieces = CutRow(row_bytes, count);
      REQUIRE(IsCut(row_bytes, pieces.count, pieces.bytes) && pieces.count <= count,
              "%ld bytes in %ld: %d of %d", long(row_bytes), long(count), pieces.count,
              pieces.bytes);
    }
  });
}

void TestDispatch() {
  const RowFormat formats[] = {kCopyFormat, kQuantizedFormat, kDequantizedFormat, kWeightedFormat,
                               kScaledFormat};
  int64_t longest[std::size(formats)] = {};
  // Rows of a token at one rank, and whether they come to a landing area.
  constexpr std::pair<int64_t, bool> arrivals[] = {{1, false}, {1, true}, {8, false}, {8, true}};
  for (int f = 0; f < static_cast<int>(std::size(formats)); ++f) {
    const RowFormat& format = formats[f];
    ForRows([&](int64_t row_bytes) {
      for (const int64_t num_tokens : {1, 128, 32768}) {
        for (const int32_t num_ranks : {1, 2, 72}) {
          for (const int32_t num_sms : {1, 16, 132}) {
            for (const auto& [rows_of_token, has_landing] : arrivals) {
              const dispatch::Sizes sizes{num_tokens, rows_of_token, row_bytes,
                                          num_ranks,  num_sms,       has_landing};
              dispatch::Plan plan{};
              const int64_t num_units = num_tokens * ((row_bytes + dispatch::kMaxPieceBytes - 1) /
                                                      dispatch::kMaxPieceBytes);
              const bool is_few = !format.is_cut || (num_units <= INT32_MAX &&
                                                     num_units <= kMaxUnitsPerBlock * num_sms);
              const bool made = dispatch::MakePlan(format, sizes, &plan);
              if (!made && (!format.is_cut || !is_few)) continue;
              REQUIRE(made && is_few, "format %d, %ld bytes", f, long(row_bytes));
              if (row_bytes > longest[f]) longest[f] = row_bytes;
              const int32_t num_rings = plan.num_senders + plan.num_receivers;
              const int64_t stage_bytes = dispatch::StageBytes(format, plan);
              REQUIRE(IsCut(row_bytes, plan.num_pieces, plan.piece_bytes),
                      "format %d, %ld bytes: %d pieces of %d", f, long(row_bytes), plan.num_pieces,
                      plan.piece_bytes);
              REQUIRE(format.is_cut ? plan.piece_bytes <= dispatch::kMaxPieceBytes
                                    : plan.num_pieces == 1,
                      "format %d, %ld bytes", f, long(row_bytes));
              // Receivers where peers' rows have to be moved on, or changed.
              const bool moves_on =
                  rows_of_token > 1 || has_landing || !format.is_stored_as_it_crosses;
              REQUIRE(plan.num_senders > 0 && num_rings <= format.max_rings &&
                          (plan.num_receivers > 0) == (num_ranks > 1 && moves_on),
                      "format %d, %ld bytes, %ld rows: %d receivers", f, long(row_bytes),
                      long(rows_of_token), plan.num_receivers);
              REQUIRE(plan.num_stages >= dispatch::kMinStages &&
                          num_rings * plan.num_stages <= dispatch::kMaxStages &&
                          plan.num_stages * stage_bytes + format.ring_bytes <=
                              dispatch::RingBytes(num_rings),
                      "format %d, %ld bytes: %d rings of %d stages", f, long(row_bytes), num_rings,
                      plan.num_stages);
            }
          }
        }
      }
    });
  }
  REQUIRE(longest[0] > 1024 * kMiB, "%ld", long(longest[0]));
  // What LaunchDispatch lets through: 32768 channels with their scales, 40 KiB, 48 KiB.
  REQUIRE(longest[1] >= 33792 && longest[2] >= 33792 && longest[3] >= kMaxWeightedRowBytes &&
              longest[4] >= kMaxScaledRowBytes,
          "%ld %ld %ld %ld", long(longest[1]), long(longest[2]), long(longest[3]),
          long(longest[4]));
  // Units are numbered in 32 bits.
  dispatch::Plan plan{};
  for (const int64_t num_tokens : {int64_t{1} << 31, int64_t{1} << 40}) {
    REQUIRE(!dispatch::MakePlan(kCopyFormat, {num_tokens, 1, 16, 2, 132, false}, &plan), "%ld",
            long(num_tokens));
  }
  REQUIRE(!dispatch::MakePlan(kCopyFormat, {1, 1, 0, 2, 132, false}, &plan), "empty rows");
}

void TestCombine() {
  ForRows([](int64_t row_bytes) {
    for (const int64_t num_tokens : {1, 2, 5, 131, 32768}) {
      for (const int32_t num_sms : {1, 16, 132}) {
        for (const int64_t top_k : {1, 32}) {
          combine::Plan plan{};
          int32_t num_blocks = 0;
          if (!combine::MakePlan(num_tokens, top_k, row_bytes, num_sms, &plan, &num_blocks)) {
            const int64_t num_units = num_tokens * plan.num_pieces;
            REQUIRE(num_units > INT32_MAX || num_units / num_sms >= kMaxUnitsPerBlock, "%ld bytes",
                    long(row_bytes));
            continue;
          }
          REQUIRE(IsCut(row_bytes, plan.num_pieces, plan.piece_bytes) &&
                      plan.piece_bytes <= combine::kMaxPieceBytes,
                  "%ld bytes: %d pieces of %d", long(row_bytes), plan.num_pieces, plan.piece_bytes);
          REQUIRE(
              num_blocks > 0 && num_blocks <= num_sms && num_blocks <= num_tokens * plan.num_pieces,
              "%ld bytes: %d blocks", long(row_bytes), num_blocks);
          // Tables, results and stages; an adder reads a longest piece from any stage.
          const int64_t bytes =
              combine::TablesBytes(top_k) +
              int64_t{combine::kNumResults + 2 * plan.num_stages} * plan.piece_bytes;
          REQUIRE(plan.num_stages >= combine::kMinStages &&
                      plan.num_stages <= combine::kMaxStages &&
                      bytes + combine::kMaxPieceBytes - plan.piece_bytes <= combine::kRingBytes,
                  "%ld bytes: %d stages", long(row_bytes), plan.num_stages);
        }
      }
    }
  });
  combine::Plan plan{};
  int32_t num_blocks = 0;
  REQUIRE(!combine::MakePlan(int64_t{1} << 31, 1, 16, 132, &plan, &num_blocks), "too many");
  REQUIRE(!combine::MakePlan(0, 1, 16, 132, &plan, &num_blocks), "no tokens");
  REQUIRE(!combine::MakePlan(1, 1, 0, 132, &plan, &num_blocks), "empty rows");
}

// As many tokens as Python lets through (limits.check_cuda), and no more.
void TestTokens() {
  for (const int32_t num_sms : {1, 2, 16}) {
    for (const int64_t beyond : {0, 1}) {
      const int64_t num_tokens = kMaxUnitsPerBlock * num_sms + beyond;
      dispatch::Plan dispatched{};
      combine::Plan combined{};
      int32_t num_blocks = 0;
      REQUIRE(dispatch::MakePlan(kCopyFormat, {num_tokens, 1, 16, 2, num_sms, false},
                                 &dispatched) == (beyond == 0),
              "%ld tokens on %d SMs", long(num_tokens), num_sms);
      REQUIRE(
          combine::MakePlan(num_tokens, 1, 16, num_sms, &combined, &num_blocks) == (beyond == 0),
          "%ld tokens on %d SMs", long(num_tokens), num_sms);
    }
  }
}

}  // namespace

int main() {
  TestPieces();
  TestDispatch();
  TestCombine();
  TestTokens();
  std::printf("plans hold\n");
}
