#include "quantrature/grid.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/grid/line.hpp"
#include "ops/grid/pieces.hpp"
#include "quantrature/packing.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kRows = 16;  // of a piece on axis 0, turned at a time
constexpr int64_t kTasksPerThread = 4;

GridView view_of(int64_t rows, int64_t cols, int64_t group_size, int axis, const char* op) {
  const auto rule = [&](const char* text) { return std::string("[") + op + "] " + text; };
  check(axis == 0 || axis == 1, rule("axis must be 0 or 1").c_str(), "axis", axis);
  check(group_size == -1 || group_size >= 1, rule("group_size must be -1 or at least 1").c_str(),
        "group_size", group_size);
  const int64_t group = group_size == -1 ? rows : group_size;
  check(axis == 1 || rows * cols % group == 0, rule("group_size must divide the size on axis 0").c_str(),
        "group_size", group, "rows", rows, "cols", cols);
  return grid_view(rows, cols, group_size, axis);
}

// Memory of one task.
struct Scratch {
  std::vector<float> x, inv, zero, scale;
  std::vector<uint8_t> codes;
};

class Quantizer {
 public:
  Quantizer(const QuantizeArgs& args, const GridView& view)
      : a_(args),
        pieces_(view),
        rule_(rule_of(args)),
        w_(view.axis == 1 ? args.w : Matrix{args.w.data, view.rows, view.cols, view.cols, args.w.dtype}),
        row_bytes_(row_bytes(view.cols, args.bits)) {
    const int64_t tasks = std::min<int64_t>(pieces_.count(), num_threads() * kTasksPerThread);
    scratch_.resize(static_cast<size_t>(tasks));
    for (Scratch& s : scratch_) {
      const auto groups = static_cast<size_t>(pieces_.groups_of_longest());
      for (std::vector<float>* line : {&s.inv, &s.zero, &s.scale}) line->resize(groups);
      s.codes.resize(static_cast<size_t>(pieces_.longest()));
      if (view.axis == 0 || args.w.dtype != QTR_F32 || args.exclude_row_offsets != nullptr)
        s.x.resize(static_cast<size_t>(pieces_.longest()));
    }
    if (args.exclude_row_offsets != nullptr) mark_excluded();
  }

  void run() {
    if (is_hqq(a_.solver))
      solve_hqq();
    else
      for_pieces([&](const GridPiece& piece, Scratch& s, int64_t) {
        const float* x = load(piece, s);
        if (!fit(x, piece, s)) return false;
        store(x, piece, s);
        return true;
      });
  }

 private:
  // Calls body(piece, scratch, index) for every piece; complains about the first for which it returns false.
  template <class Body>
  void for_pieces(Body&& body) {
    const int64_t count = pieces_.count(), tasks = static_cast<int64_t>(scratch_.size());
    std::atomic<int64_t> first_bad{count};
    parallel_for(tasks, [&](int64_t task) {
      for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
        if (body(GridPiece(pieces_, i), scratch_[static_cast<size_t>(task)], i)) continue;
        int64_t seen = first_bad.load();
        while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
        }
        return;
      }
    });
    if (first_bad.load() < count) refuse(GridPiece(pieces_, first_bad.load()));
  }

  // The numbers of a piece, group after group.
  const float* load(const GridPiece& piece, Scratch& s) const {
    const GridView& v = pieces_.view;
    const float* x = s.x.data();
    if (v.axis == 1) {
      x = float_row(w_, piece.row, piece.begin, piece.size, s.x.data());
    } else {
      // A line of the cache at a time: single numbers, a group apart, would evict each other.
      float rows[kRows * kGridColumns];
      const float* sources[kRows];
      for (int64_t first = 0; first < v.rows; first += kRows) {
        const int64_t count = std::min(kRows, v.rows - first), width = piece.end - piece.begin;
        for (int64_t k = 0; k < count; ++k)
          sources[k] = float_row(w_, first + k, piece.begin, width, rows + k * kGridColumns);
        for (int64_t c = 0; c < width; ++c)
          for (int64_t k = 0; k < count; ++k)
            s.x[static_cast<size_t>(c * v.group + first + k)] = sources[k][c];
      }
    }
    if (excluded_.empty()) return x;
    if (x != s.x.data()) std::copy_n(x, piece.size, s.x.data());
    clamp_excluded(piece, s.x.data());
    return s.x.data();
  }

  bool fit(const float* x, const GridPiece& piece, Scratch& s) const {
    if (a_.solver == QTR_GIVEN) return take_given(x, piece, s);
    const GridLines lines{s.inv.data(), s.zero.data(), s.scale.data()};
    if (!kernels().grid_fit(x, piece.size, pieces_.view.group, rule_, lines)) return false;
    const int64_t groups = ceil_div(piece.size, pieces_.view.group);
    std::copy_n(s.scale.data(), groups, a_.scale + piece.first_group);
    if (!rule_.sym) std::copy_n(s.zero.data(), groups, a_.zero + piece.first_group);
    return true;
  }

  bool take_given(const float* x, const GridPiece& piece, Scratch& s) const {
    const int64_t groups = ceil_div(piece.size, pieces_.view.group);
    for (int64_t g = 0; g < groups; ++g) {
      const GridLine line = given_line(a_.scale[piece.first_group + g],
                                       rule_.sym ? symmetric_zero(a_.bits) : a_.zero[piece.first_group + g]);
      s.inv[static_cast<size_t>(g)] = line.inv;
      s.zero[static_cast<size_t>(g)] = line.zero;
    }
    return std::all_of(x, x + piece.size, [](float v) { return std::isfinite(v); });
  }

  void store(const float* x, const GridPiece& piece, Scratch& s) {
    const GridView& v = pieces_.view;
    if (v.axis == 1) return store_row(x, piece, s);
    kernels().grid_encode(x, piece.size, v.group, a_.bits, s.inv.data(), s.zero.data(), s.codes.data());
    uint8_t rows[kRows * kGridColumns];
    for (int64_t first = 0; first < v.rows; first += kRows) {
      const int64_t count = std::min(kRows, v.rows - first);
      for (int64_t c = 0; c < piece.end - piece.begin; ++c)
        for (int64_t k = 0; k < count; ++k)
          rows[k * kGridColumns + c] = s.codes[static_cast<size_t>(c * v.group + first + k)];
      for (int64_t k = 0; k < count; ++k)
        kernels().pack_span(rows + k * kGridColumns, PackedSpan{piece.begin, piece.end, v.cols, a_.bits},
                            a_.codes + (first + k) * row_bytes_);
    }
  }

  void store_row(const float* x, const GridPiece& piece, Scratch& s) {
    const int64_t group = pieces_.view.group, cols = pieces_.view.cols;
    uint8_t* row = a_.codes + piece.row * row_bytes_;
    const float *inv = s.inv.data(), *zero = s.zero.data();
    const PackedSpan span{piece.begin, piece.end, cols, a_.bits};
    const int64_t done = kernels().grid_encode_blocks(x, piece.size, group, a_.bits, inv, zero, span, row);
    if (done == piece.size) return;
    // The group at hand goes on; what is left of it comes first.
    uint8_t* codes = s.codes.data();
    const int64_t head = std::min((group - done % group) % group, piece.size - done);
    if (head > 0)
      kernels().grid_encode(x + done, head, head, a_.bits, inv + done / group, zero + done / group, codes);
    const int64_t g = (done + head) / group;
    kernels().grid_encode(x + done + head, piece.size - done - head, group, a_.bits, inv + g, zero + g,
                          codes + head);
    kernels().pack_span(codes, PackedSpan{piece.begin + done, piece.end, cols, a_.bits}, row);
  }

  // Every group goes through all iterations while it is in the cache; which of them was the last is known
  // when the errors of all groups have been added.
  void solve_hqq() {
    const GridView& v = pieces_.view;
    std::vector<float> zeros(static_cast<size_t>(v.groups() * kHqqIterations));
    std::vector<float> inv(static_cast<size_t>(v.groups()));
    std::vector<double> errors(static_cast<size_t>(pieces_.count() * kHqqIterations));
    for_pieces([&](const GridPiece& piece, Scratch& s, int64_t index) {
      const float* x = load(piece, s);
      if (!fit(x, piece, s)) return false;
      std::copy_n(s.inv.data(), ceil_div(piece.size, v.group), inv.data() + piece.first_group);
      kernels().grid_hqq(x, piece.size, v.group, rule_, {s.inv.data(), s.zero.data(), s.scale.data()},
                         zeros.data() + piece.first_group * kHqqIterations,
                         errors.data() + index * kHqqIterations);
      return true;
    });
    const int64_t last = last_of(errors);
    for_pieces([&](const GridPiece& piece, Scratch& s, int64_t) {
      const int64_t groups = ceil_div(piece.size, v.group);
      for (int64_t g = 0; g < groups; ++g)
        s.zero[static_cast<size_t>(g)] = a_.zero[piece.first_group + g] =
            stored_zero(zeros[static_cast<size_t>((piece.first_group + g) * kHqqIterations + last)], rule_);
      std::copy_n(inv.data() + piece.first_group, groups, s.inv.data());
      store(load(piece, s), piece, s);
      return true;
    });
  }

  int64_t last_of(const std::vector<double>& errors) const {
    double sums[kHqqIterations] = {};
    for (int64_t p = 0; p < pieces_.count(); ++p)
      for (int64_t i = 0; i < kHqqIterations; ++i)
        sums[i] += errors[static_cast<size_t>(p * kHqqIterations + i)];
    const double size = static_cast<double>(pieces_.view.rows) * static_cast<double>(pieces_.view.cols);
    return last_iteration(sums, size, first_limit(a_.solver));
  }

  void mark_excluded() {
    const int64_t* offsets = a_.exclude_row_offsets;
    check_excluded("quantize", a_.w, offsets, a_.exclude_columns);
    excluded_.resize(static_cast<size_t>(a_.w.rows * a_.w.cols));
    for (int64_t row = 0; row < a_.w.rows; ++row)
      for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i)
        excluded_[static_cast<size_t>(row * a_.w.cols + a_.exclude_columns[i])] = 1;
  }

  bool is_excluded(const GridPiece& piece, int64_t i) const {
    const GridView& v = pieces_.view;
    const int64_t at =
        v.axis == 1 ? piece.row * v.cols + piece.begin + i : i % v.group * v.cols + piece.begin + i / v.group;
    return excluded_[static_cast<size_t>(at)] != 0;
  }

  // What is not finite stays, to be refused.
  void clamp_excluded(const GridPiece& piece, float* x) const {
    const int64_t group = pieces_.view.group;
    for (int64_t begin = 0; begin < piece.size; begin += group) {
      const int64_t end = std::min(begin + group, piece.size);
      float lo = std::numeric_limits<float>::infinity(), hi = -lo;
      bool any = false;
      for (int64_t i = begin; i < end; ++i) {
        if (is_excluded(piece, i))
          any = true;
        else
          lo = std::min(lo, x[i]), hi = std::max(hi, x[i]);
      }
      if (!any) continue;
      if (lo > hi) lo = hi = 0;
      for (int64_t i = begin; i < end; ++i)
        if (is_excluded(piece, i) && std::isfinite(x[i])) x[i] = std::min(std::max(x[i], lo), hi);
    }
  }

  [[noreturn]] void refuse(const GridPiece& piece) const {
    float value;
    for (int64_t row = 0; row < a_.w.rows; ++row)
      for (int64_t col = 0; col < a_.w.cols; ++col) {
        const float x = *float_row(a_.w, row, col, 1, &value);
        check(std::isfinite(x), "[quantize] w must be finite", "value", x, "row", row, "col", col);
      }
    throw InvalidArgument(complaint("[quantize] the range of a group must be finite in float32",
                                    "first_group", piece.first_group, "groups",
                                    ceil_div(piece.size, pieces_.view.group)));
  }

  const QuantizeArgs& a_;
  GridPieces pieces_;
  GridRule rule_;
  Matrix w_;  // as the view
  int64_t row_bytes_;
  std::vector<Scratch> scratch_;
  std::vector<uint8_t> excluded_;  // of each weight, if any is
};

}  // namespace

int64_t group_count(int64_t rows, int64_t cols, int64_t group_size, int axis) {
  check(rows > 0 && cols > 0, "[group_count] the matrix must not be empty", "rows", rows, "cols", cols);
  check_extent(rows, cols, "group_count", "the matrix");
  return view_of(rows, cols, group_size, axis, "group_count").groups();
}

void quantize(const QuantizeArgs& a) {
  check_matrix(a.w, "quantize", "w");
  check(a.bits >= 1 && a.bits <= 8, "[quantize] bits must be 1 to 8", "bits", a.bits);
  check(a.solver >= QTR_MINMAX && a.solver <= QTR_GIVEN,
        "[quantize] solver must be minmax, mse, hqq, hqq-scale-free or given", "solver",
        static_cast<int>(a.solver));
  const GridView view = view_of(a.w.rows, a.w.cols, a.group_size, a.axis, "quantize");
  check(a.axis == 1 || a.w.rows == 1 || a.w.row_stride == a.w.cols,
        "[quantize] w must have no gaps between rows on axis 0", "row_stride", a.w.row_stride, "cols",
        a.w.cols);
  check(!a.sym || !is_hqq(a.solver), "[quantize] solver hqq fits the zero, which sym has not", "sym", a.sym);
  check(!a.sym || !a.round_zero, "[quantize] round_zero goes without sym", "sym", a.sym);
  check(a.solver != QTR_GIVEN || !a.round_zero, "[quantize] round_zero goes without a given grid",
        "round_zero", a.round_zero);
  check(!a.sym || !a.integer_zero, "[quantize] integer_zero goes without sym", "sym", a.sym);
  check(a.scale_format >= QTR_SCALE_F32 && a.scale_format <= QTR_SCALE_E8M0,
        "[quantize] scale_format must be f32, f16, bf16 or e8m0", "scale_format",
        static_cast<int>(a.scale_format));
  check(a.solver != QTR_GIVEN || !(a.integer_zero || a.scale_format != QTR_SCALE_F32),
        "[quantize] integer_zero and scale_format go without a given grid", "integer_zero", a.integer_zero);
  const int64_t bytes = view.rows * row_bytes(view.cols, a.bits);
  check_given(a.codes != nullptr, "quantize", "codes");
  check(a.codes_size == bytes, "[quantize] codes must hold all packed rows", "codes_size", a.codes_size,
        "expected", bytes);
  check_given(a.scale != nullptr, "quantize", "scale");
  check(a.groups == view.groups(), "[quantize] scale must hold one number for each group", "groups", a.groups,
        "expected", view.groups());
  check_given(a.sym || a.zero != nullptr, "quantize", "zero");
  check_given(a.exclude_row_offsets == nullptr || a.exclude_columns != nullptr, "quantize",
              "exclude_columns");
  if (done_on_device(a, "quantize", &qtr_backend::quantize)) return;
  Quantizer(a, view).run();
}

void dequantize(const DequantizeArgs& a) {
  check_matrix(a.out, "dequantize", "out");
  check(a.bits >= 1 && a.bits <= 8, "[dequantize] bits must be 1 to 8", "bits", a.bits);
  const GridView view = view_of(a.out.rows, a.out.cols, a.group_size, a.axis, "dequantize");
  check(a.axis == 1 || a.out.rows == 1 || a.out.row_stride == a.out.cols,
        "[dequantize] out must have no gaps between rows on axis 0", "row_stride", a.out.row_stride, "cols",
        a.out.cols);
  const int64_t width = row_bytes(view.cols, a.bits);
  check_given(a.codes != nullptr, "dequantize", "codes");
  check(a.codes_size == view.rows * width, "[dequantize] codes must hold all packed rows", "codes_size",
        a.codes_size, "expected", view.rows * width);
  const bool sym = a.zero.data == nullptr;
  // The numbers as one row, whatever shape the caller gives them.
  const auto in_a_row = [&](const Matrix& m, const char* name) {
    check_matrix(m, "dequantize", name);
    check(m.rows * m.cols == view.groups() && (m.rows == 1 || m.row_stride == m.cols),
          "[dequantize] scale and zero must hold one number for each group, without gaps", "groups",
          m.rows * m.cols, "expected", view.groups());
    return Matrix{m.data, 1, view.groups(), view.groups(), m.dtype};
  };
  const Matrix scales = in_a_row(a.scale, "scale");
  const Matrix zeros = sym ? Matrix{} : in_a_row(a.zero, "zero");
  const MutableMatrix out =
      a.axis == 1 ? a.out : MutableMatrix{a.out.data, view.rows, view.cols, view.cols, a.out.dtype};

  if (done_on_device(a, "dequantize", &qtr_backend::dequantize)) return;
  constexpr int64_t kCodes = 4096;  // unpacked at a time; a multiple of 256
  const int64_t spans = ceil_div(view.cols, kCodes);
  parallel_for_pieces(
      view.rows * spans, std::max<int64_t>(1, 4 * kCodes / view.cols), [&](int64_t first, int64_t last) {
        uint8_t codes[kCodes];
        float scale_buffer[kCodes], zero_buffer[kCodes], values[kCodes];
        if (sym) std::fill_n(zero_buffer, kCodes, symmetric_zero(a.bits));
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = i / spans, begin = i % spans * kCodes,
                        end = std::min(begin + kCodes, view.cols);
          kernels().unpack_span(a.codes + row * width, PackedSpan{begin, end, view.cols, a.bits}, codes);
          float* target = float_row_target(out, row, begin, values);
          // On axis 0 each number has its own scale; on axis 1 the first group may have begun before.
          const int64_t group = a.axis == 1 ? view.group : 1;
          const int64_t row_groups = a.axis == 1 ? row * view.groups_per_row : 0;
          const auto decode = [&](int64_t from, int64_t to) {
            const int64_t g = row_groups + from / group, groups = ceil_div(to - from, group);
            const float* scale = float_row(scales, 0, g, groups, scale_buffer);
            const float* zero = sym ? zero_buffer : float_row(zeros, 0, g, groups, zero_buffer);
            kernels().grid_decode(codes + (from - begin), to - from, group, zero, scale,
                                  target + (from - begin));
          };
          const int64_t head = std::min(ceil_div(begin, group) * group, end);
          if (begin < head) decode(begin, head);
          if (head < end) decode(head, end);
          store_float_row(out, row, begin, end - begin, values);
        }
      });
}

void round_to_half(const RoundToHalfArgs& a) {
  check(a.count >= 1, "[round_to_half] count must be at least 1", "count", a.count);
  check_extent(1, a.count, "round_to_half", "values");
  check_given(a.values != nullptr, "round_to_half", "values");
  check_given(a.halves != nullptr, "round_to_half", "halves");
  check_given(a.smallest != nullptr, "round_to_half", "smallest");
  check_given(a.largest != nullptr, "round_to_half", "largest");
  constexpr int64_t kPart = 1 << 14;
  struct Extremes {
    int32_t below_smallest = INT32_MAX, largest = 0;  // bits of magnitudes, the smallest less 1
  };
  std::vector<Extremes> parts(static_cast<size_t>(ceil_div(a.count, kPart)));
  parallel_for_pieces(a.count, kPart, [&](int64_t begin, int64_t end) {
    kernels().f32_to_f16(a.values + begin, a.halves + begin, end - begin);
    Extremes part;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(a.values[i]) & INT32_MAX;
      part.below_smallest = std::min(part.below_smallest, static_cast<int32_t>(bits - 1) & INT32_MAX);
      part.largest = std::max(part.largest, bits);
    }
    parts[static_cast<size_t>(begin / kPart)] = part;
  });
  Extremes all;
  for (const Extremes& part : parts) {
    all.below_smallest = std::min(all.below_smallest, part.below_smallest);
    all.largest = std::max(all.largest, part.largest);
  }
  *a.smallest = all.below_smallest == INT32_MAX ? std::numeric_limits<float>::infinity()
                                                : std::bit_cast<float>(all.below_smallest + 1);
  *a.largest = std::bit_cast<float>(all.largest);
}

}  // namespace quantrature
