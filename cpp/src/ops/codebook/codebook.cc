#include "quantrature/codebook.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/codebook/search.hpp"
#include "ops/codebook/table.hpp"
#include "quantrature/packing.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr float kSmallest = 0x1p-100f;

// What both directions know of the shape.
struct Groups {
  int64_t size;     // numbers of a group; all of a row without scales
  int64_t per_row;  // 0 without scales
};

Groups groups_of(int64_t cols, int64_t group_size) {
  check(group_size >= -1, "[codebook] group_size must be -1, 0 or at least 1", "group_size", group_size);
  if (group_size == 0) return {cols, 0};
  const int64_t size = group_size == -1 ? cols : std::min(group_size, cols);
  return {size, (cols + size - 1) / size};
}

// The entries of a table by rank, and the bounds between them.
class SortedTable {
 public:
  void sort(const float* entries, int count) {
    codes_.resize(static_cast<size_t>(count));
    std::iota(codes_.begin(), codes_.end(), uint8_t{0});
    std::stable_sort(codes_.begin(), codes_.end(),
                     [&](uint8_t a, uint8_t b) { return entries[a] < entries[b]; });
    const auto last = std::unique(codes_.begin(), codes_.end(),
                                  [&](uint8_t a, uint8_t b) { return entries[a] == entries[b]; });
    codes_.erase(last, codes_.end());
    bounds_.clear();
    bool in_order = true;
    for (size_t i = 1; i < codes_.size(); ++i) {
      bounds_.push_back(bound_between(entries[codes_[i - 1]], entries[codes_[i]]));
      in_order = in_order && codes_[i] == i;
    }
    search_ = {bounds_.data(), static_cast<int>(bounds_.size()), codes_.data(), in_order && codes_[0] == 0};
  }

  const CodebookSearch& search() const { return search_; }

 private:
  std::vector<uint8_t> codes_;
  std::vector<float> bounds_;
  CodebookSearch search_{};
};

// Memory of one task.
struct Scratch {
  std::vector<float> x, fitted, inv, entries;
  std::vector<uint8_t> codes;
  SortedTable table;
};

void check_entries(const Matrix& table) {
  std::vector<float> buffer(static_cast<size_t>(table.cols));
  for (int64_t row = 0; row < table.rows; ++row) {
    const float* entries = float_row(table, row, 0, table.cols, buffer.data());
    for (int64_t i = 0; i < table.cols; ++i)
      check(std::isfinite(entries[i]), "[codebook] table must be finite", "value", entries[i], "row", row,
            "entry", i);
  }
}

// Whether the row, at x, is finite; fits the scales.
bool fit(const CodebookQuantizeArgs& a, const Groups& groups, int64_t row, const float* x, Scratch& s) {
  const int64_t cols = a.w.cols, per_row = std::max<int64_t>(groups.per_row, 1);
  float* largest = s.inv.data();
  if (!kernels().codebook_largest(x, cols, groups.size, largest)) return false;
  if (groups.per_row == 0) return true;
  if (a.exclude_row_offsets != nullptr && a.exclude_row_offsets[row] < a.exclude_row_offsets[row + 1]) {
    std::copy_n(x, cols, s.fitted.data());
    for (int64_t i = a.exclude_row_offsets[row]; i < a.exclude_row_offsets[row + 1]; ++i)
      s.fitted[static_cast<size_t>(a.exclude_columns[i])] = 0;
    kernels().codebook_largest(s.fitted.data(), cols, groups.size, largest);
  }
  float* scale = a.scale + row * per_row;
  for (int64_t g = 0; g < per_row; ++g) {
    scale[g] = largest[g] < kSmallest ? 0.0f : largest[g];
    s.inv[static_cast<size_t>(g)] = scale[g] == 0 ? 0.0f : 1 / scale[g];
  }
  return true;
}

[[noreturn]] void refuse(const Matrix& w, int64_t row) {
  std::vector<float> buffer(static_cast<size_t>(w.cols));
  const float* x = float_row(w, row, 0, w.cols, buffer.data());
  for (int64_t col = 0; col < w.cols; ++col)
    check(std::isfinite(x[col]), "[codebook] w must be finite", "value", x[col], "row", row, "col", col);
  throw Error("[codebook] a row was refused that is finite");
}

}  // namespace

void codebook_quantize(const CodebookQuantizeArgs& a) {
  check_matrix(a.w, "codebook", "w");
  check_table(a.table, a.bits, a.w.rows, "codebook");
  const Groups groups = groups_of(a.w.cols, a.group_size);
  const int64_t width = row_bytes(a.w.cols, a.bits);
  check_given(a.codes != nullptr, "codebook", "codes");
  check(a.codes_size == a.w.rows * width, "[codebook] codes must hold all packed rows", "codes_size",
        a.codes_size, "expected", a.w.rows * width);
  check(a.groups == a.w.rows * groups.per_row && (a.scale != nullptr) == (groups.per_row > 0),
        "[codebook] scale must hold one number for each group", "groups", a.groups, "expected",
        a.w.rows * groups.per_row);
  if (done_on_device(a, "codebook", &qtr_backend::codebook_quantize)) return;
  check_entries(a.table);
  check_excluded("codebook", a.w, a.exclude_row_offsets, a.exclude_columns);

  const int64_t tasks = std::min<int64_t>(a.w.rows, num_threads() * kTasksPerThread);
  const auto cols = static_cast<size_t>(a.w.cols), entries = static_cast<size_t>(a.table.cols);
  std::vector<Scratch> scratch(static_cast<size_t>(tasks));
  for (Scratch& s : scratch) {
    s.x.resize(cols), s.codes.resize(cols), s.entries.resize(entries);
    s.inv.resize(static_cast<size_t>(std::max<int64_t>(groups.per_row, 1)));
    if (a.exclude_row_offsets != nullptr) s.fitted.resize(cols);
  }
  std::atomic<int64_t> first_bad{a.w.rows};
  parallel_for(tasks, [&](int64_t task) {
    Scratch& s = scratch[static_cast<size_t>(task)];
    const int64_t first = a.w.rows * task / tasks;
    for (int64_t row = first; row < a.w.rows * (task + 1) / tasks; ++row) {
      if (row == first || a.table.rows > 1)
        s.table.sort(float_row(a.table, a.table.rows > 1 ? row : 0, 0, a.table.cols, s.entries.data()),
                     static_cast<int>(a.table.cols));
      const float* x = float_row(a.w, row, 0, a.w.cols, s.x.data());
      if (!fit(a, groups, row, x, s)) {
        int64_t seen = first_bad.load();
        while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
        }
        return;
      }
      const float* inv = groups.per_row > 0 ? s.inv.data() : nullptr;
      kernels().codebook_encode(x, a.w.cols, groups.size, inv, s.table.search(), s.codes.data());
      kernels().pack_span(s.codes.data(), PackedSpan{0, a.w.cols, a.w.cols, a.bits}, a.codes + row * width);
    }
  });
  if (first_bad.load() < a.w.rows) refuse(a.w, first_bad.load());
}

void codebook_dequantize(const CodebookDequantizeArgs& a) {
  check_matrix(a.out, "codebook", "out");
  check_table(a.table, a.bits, a.out.rows, "codebook");
  const Groups groups = groups_of(a.out.cols, a.group_size);
  const int64_t cols = a.out.cols, width = row_bytes(cols, a.bits);
  check_given(a.codes != nullptr, "codebook", "codes");
  check(a.codes_size == a.out.rows * width, "[codebook] codes must hold all packed rows", "codes_size",
        a.codes_size, "expected", a.out.rows * width);
  const bool scaled = groups.per_row > 0;
  check((a.scale.data != nullptr) == scaled, "[codebook] scale must be there if and only if there are groups",
        "group_size", a.group_size);
  Matrix scales{};
  if (scaled) {
    check_matrix(a.scale, "codebook", "scale");
    const int64_t count = a.out.rows * groups.per_row;
    check(a.scale.rows * a.scale.cols == count && (a.scale.rows == 1 || a.scale.row_stride == a.scale.cols),
          "[codebook] scale must hold one number for each group, without gaps", "groups",
          a.scale.rows * a.scale.cols, "expected", count);
    scales = {a.scale.data, a.out.rows, groups.per_row, groups.per_row, a.scale.dtype};
  }

  if (done_on_device(a, "codebook", &qtr_backend::codebook_dequantize)) return;
  constexpr int64_t kCodes = 4096;  // about, of a piece
  parallel_for_pieces(a.out.rows, std::max<int64_t>(1, kCodes / cols), [&](int64_t first, int64_t last) {
    std::vector<uint8_t> codes(static_cast<size_t>(cols));
    std::vector<float> values(a.out.dtype == QTR_F32 ? 0 : codes.size());
    std::vector<float> scale_buffer(static_cast<size_t>(groups.per_row));
    float table_buffer[256];
    for (int64_t row = first; row < last; ++row) {
      kernels().unpack_span(a.codes + row * width, PackedSpan{0, cols, cols, a.bits}, codes.data());
      const float* table = float_row(a.table, a.table.rows > 1 ? row : 0, 0, a.table.cols, table_buffer);
      const float* scale = scaled ? float_row(scales, row, 0, groups.per_row, scale_buffer.data()) : nullptr;
      kernels().codebook_decode(codes.data(), cols, groups.size, a.bits, table, scale,
                                float_row_target(a.out, row, 0, values.data()));
      store_float_row(a.out, row, 0, cols, values.data());
    }
  });
}

}  // namespace quantrature
