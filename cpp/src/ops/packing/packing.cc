#include "quantrature/packing.hpp"

#include <algorithm>
#include <atomic>

#include "common/check.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kSpan = 1 << 16;  // codes of one task; a multiple of 256

void check_layout(const char* op, const void* codes, int64_t rows, int64_t cols, int64_t row_stride,
                  const void* packed, int64_t bytes, int bits) {
  const std::string at = std::string("[") + op + "] ";
  const auto rule = [&](const char* text) { return at + text; };
  check(rows > 0 && cols > 0, rule("codes must not be empty").c_str(), "rows", rows, "cols", cols);
  check_extent(rows, std::max(cols, row_stride), op, "codes");
  check_given(codes != nullptr, op, "codes");
  check_given(packed != nullptr, op, "packed");
  check(bits >= 1 && bits <= 8, rule("bits must be 1 to 8").c_str(), "bits", bits);
  check(rows == 1 || row_stride >= cols, rule("codes has rows that overlap").c_str(), "row_stride",
        row_stride, "cols", cols);
  check(bytes == row_bytes(cols, bits), rule("packed must have row_bytes(cols, bits) bytes a row").c_str(),
        "row_bytes", bytes, "expected", row_bytes(cols, bits));
}

// Calls body(row, span) for spans that cover all rows; short rows share a task.
template <class Body>
void for_spans(int64_t rows, int64_t cols, int bits, Body&& body) {
  const int64_t spans = (cols + kSpan - 1) / kSpan;
  parallel_for_pieces(rows * spans, std::max<int64_t>(1, kSpan / cols), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % spans * kSpan;
      body(i / spans, PackedSpan{begin, std::min(begin + kSpan, cols), cols, bits});
    }
  });
}

}  // namespace

int64_t row_bytes(int64_t cols, int bits) {
  check(bits >= 1 && bits <= 8, "[row_bytes] bits must be 1 to 8", "bits", bits);
  check(cols >= 1, "[row_bytes] cols must be at least 1", "cols", cols);
  check_extent(1, cols, "row_bytes", "a row");
  return bits * ((cols + 7) / 8);
}

void pack(const PackArgs& a) {
  check_layout("pack", a.codes, a.rows, a.cols, a.row_stride, a.packed, a.row_bytes, a.bits);
  if (done_on_device(a, "pack", &qtr_backend::pack)) return;
  std::atomic<bool> fits{true};
  for_spans(a.rows, a.cols, a.bits, [&](int64_t row, const PackedSpan& span) {
    const uint8_t used =
        kernels().pack_span(a.codes + row * a.row_stride + span.begin, span, a.packed + row * a.row_bytes);
    if (used >> a.bits != 0) fits.store(false, std::memory_order_relaxed);
  });
  if (fits.load()) return;
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t col = 0; col < a.cols; ++col) {
      const int code = a.codes[row * a.row_stride + col];
      check(code >> a.bits == 0, "[pack] codes must fit into bits", "code", code, "row", row, "col", col,
            "bits", a.bits);
    }
}

void unpack(const UnpackArgs& a) {
  check_layout("unpack", a.codes, a.rows, a.cols, a.row_stride, a.packed, a.row_bytes, a.bits);
  if (done_on_device(a, "unpack", &qtr_backend::unpack)) return;
  for_spans(a.rows, a.cols, a.bits, [&](int64_t row, const PackedSpan& span) {
    kernels().unpack_span(a.packed + row * a.row_bytes, span, a.codes + row * a.row_stride + span.begin);
  });
}

}  // namespace quantrature
