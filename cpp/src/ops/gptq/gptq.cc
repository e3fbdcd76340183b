#include "quantrature/gptq.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.hpp"
#include "common/cholesky.hpp"
#include "common/float_rows.hpp"
#include "common/products.hpp"
#include "ops/grid/line.hpp"
#include "quantrature/grid.hpp"
#include "quantrature/packing.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kStrip = kGptqStrip;
constexpr double kRaised[] = {1, 2, 5, 10, 20, 50, 100};

static_assert(kTileRows == kGptqColumns && kTileFloats == kGptqRows);

size_t at(int64_t i) {
  return static_cast<size_t>(i);
}

// A and the squared diagonal of R, columns in the order they are taken.
class Feedback {
 public:
  // Of the caller.
  explicit Feedback(const GptqArgs& a)
      : n_(a.w.cols), h_(nullptr), order_(a.order, a.order + n_), pivots_(a.pivots, a.pivots + n_) {
    if (a.device.kind != QTR_CPU) return;
    panels_.resize(at(offset(panel_count())));
    parallel_for(panel_count(), [&](int64_t p) {
      for (int64_t j = 0; j < std::min((p + 1) * kGptqColumns, n_); ++j)
        for (int64_t k = 0; k < kGptqColumns; ++k)
          if (j < p * kGptqColumns + k)
            panels_[at(offset(p) + j * kGptqColumns + k)] = a.factor[(p * n_ + j) * kGptqColumns + k];
    });
  }

  Feedback(const GptqArgs& a, GptqResult& result) : n_(a.w.cols), h_(a.hessian), order_(at(n_)) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (a.ordered)
      std::stable_sort(order_.begin(), order_.end(),
                       [&](int64_t i, int64_t j) { return diagonal(i) > diagonal(j); });
    if (a.ordered && a.fitted_scale != nullptr) keep_groups_whole(a.group_size == -1 ? n_ : a.group_size);
    double sum = 0;
    int64_t alive = 0;
    for (int64_t i = 0; i < n_; ++i) {
      sum += static_cast<double>(diagonal(i));
      alive += diagonal(i) > 0;
    }
    mean_ = alive > 0 ? sum / static_cast<double>(alive) : 1.0;
    result.dead = n_ - alive;
    panels_.resize(at(offset(panel_count())));
    pivots_.assign(at(n_), 1.0);
    result.damp = std::numeric_limits<double>::infinity();
    for (double raised : kRaised)
      if (factor(raised * a.damp)) {
        result.damp = raised * a.damp;
        break;
      }
    factor_.clear();
    factor_.shrink_to_fit();
  }

  int64_t panel_count() const { return (n_ + kGptqColumns - 1) / kGptqColumns; }
  int64_t column(int64_t place) const { return order_[at(place)]; }
  double pivot(int64_t place) const { return pivots_[at(place)]; }
  const int64_t* order() const { return order_.data(); }
  const double* pivots() const { return pivots_.data(); }
  // Rows j of A up to the end of a panel of columns, each of kGptqColumns numbers.
  const float* panel(int64_t p) const { return panels_.data() + offset(p); }

 private:
  static int64_t offset(int64_t p) { return p * (p + 1) / 2 * kGptqColumns * kGptqColumns; }

  float diagonal(int64_t i) const { return h_[i * n_ + i]; }

  // Groups in the order of their first columns, which are those with the largest elements of the diagonal.
  void keep_groups_whole(int64_t group) {
    std::vector<int64_t> rank(at((n_ + group - 1) / group), -1);
    int64_t next = 0;
    for (int64_t column : order_)
      if (int64_t& mine = rank[at(column / group)]; mine < 0) mine = next++;
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t i, int64_t j) { return rank[at(i / group)] < rank[at(j / group)]; });
  }

  // The matrix is factored back to front, which makes the factor upper triangular.
  bool factor(double damp) {
    const int64_t size = (n_ + kCholeskyBlock - 1) / kCholeskyBlock * kCholeskyBlock;
    factor_.assign(at(size * size), 0.0);
    for (int64_t i = n_; i < size; ++i) factor_[at(i * size + i)] = 1;
    parallel_for(n_, [&](int64_t i) {
      const int64_t row = order_[at(n_ - 1 - i)];
      double* to = factor_.data() + i * size;
      if (diagonal(row) > 0)
        for (int64_t j = 0; j < i; ++j) {
          const int64_t col = order_[at(n_ - 1 - j)];
          if (diagonal(col) > 0)
            to[j] = static_cast<double>(h_[std::max(row, col) * n_ + std::min(row, col)]);
        }
      to[i] = diagonal(row) > 0 ? static_cast<double>(diagonal(row)) + damp * mean_ : mean_;
    });
    if (!cholesky(factor_.data(), size)) return false;
    parallel_for(panel_count(), [&](int64_t p) {
      const int64_t first = p * kGptqColumns, count = std::min(kGptqColumns, n_ - first);
      float* to = panels_.data() + offset(p);
      for (int64_t j = 0; j < std::min(first + kGptqColumns, n_); ++j)
        for (int64_t k = std::max(first, j + 1); k < first + count; ++k)
          to[j * kGptqColumns + k - first] = static_cast<float>(
              factor_[at((n_ - 1 - j) * size + n_ - 1 - k)] / factor_[at((n_ - 1 - k) * size + n_ - 1 - k)]);
      for (int64_t k = first; k < first + count; ++k) {
        const double root = factor_[at((n_ - 1 - k) * size + n_ - 1 - k)];
        pivots_[at(k)] = root * root;
      }
    });
    return true;
  }

  int64_t n_;
  const float* h_;
  std::vector<int64_t> order_;
  double mean_ = 1;
  std::vector<double> factor_, pivots_;
  std::vector<float> panels_;
};

// Rows that one task takes through all columns.
class Strip {
 public:
  Strip(const GptqArgs& a, const Feedback& feedback, int64_t first)
      : a_(a),
        fitted_(a.fitted_scale != nullptr),
        feedback_(feedback),
        first_(first),
        rows_(std::min(kStrip, a.w.rows - first)),
        group_(a.group_size == -1 ? a.w.cols : a.group_size),
        groups_((a.w.cols + group_ - 1) / group_),
        errors_(at(a.w.cols * kStrip)),
        codes_(at(kStrip * a.w.cols)),
        exact_(a.exclude_row_offsets == nullptr ? 0 : at(a.w.cols)) {
    for (std::vector<float>* line : {&inv_, &zero_, &scale_}) line->resize(at(groups_ * kStrip));
  }

  // The error of the rows.
  double run() {
    load();
    double loss = 0;
    const int64_t cols = a_.w.cols;
    for (int64_t first = 0; first < cols;) {
      int64_t end = std::min(first - first % kGptqColumns + kGptqColumns, cols);
      if (fitted_) {
        if (begins_group(first)) fit(first);
        for (int64_t k = first + 1; k < end; ++k)
          if (begins_group(k)) end = k;
      }
      for (int64_t piece = 0; piece < rows_; piece += kGptqRows) loss += columns(first, end, piece);
      first = end;
    }
    const int64_t bytes = row_bytes(a_.w.cols, a_.bits);
    for (int64_t r = 0; r < rows_; ++r)
      kernels().pack_span(codes_.data() + r * a_.w.cols, PackedSpan{0, a_.w.cols, a_.w.cols, a_.bits},
                          a_.codes + (first_ + r) * bytes);
    return loss;
  }

 private:
  void load() {
    std::vector<float> buffer(at(std::max(a_.w.cols, groups_)));
    for (int64_t r = 0; r < rows_; ++r) {
      const float* w = float_row(a_.w, first_ + r, 0, a_.w.cols, buffer.data());
      for (int64_t k = 0; k < a_.w.cols; ++k) errors_[at(k * kStrip + r)] = w[feedback_.column(k)];
      if (fitted_) continue;
      spread(a_.scale, r, buffer.data(), scale_);
      if (a_.zero.data != nullptr) spread(a_.zero, r, buffer.data(), zero_);
    }
    if (!fitted_ && a_.zero.data == nullptr) std::fill(zero_.begin(), zero_.end(), symmetric_zero(a_.bits));
    for (size_t i = 0; i < scale_.size(); ++i) inv_[i] = scale_[i] == 0 ? 0.0f : 1.0f / scale_[i];
    if (exact_.empty()) return;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t i = a_.exclude_row_offsets[first_ + r]; i < a_.exclude_row_offsets[first_ + r + 1]; ++i)
        exact_[at(a_.exclude_columns[i])] |= uint64_t{1} << r;
  }

  int64_t group_of(int64_t place) const { return feedback_.column(place) / group_; }

  bool begins_group(int64_t place) const { return place == 0 || group_of(place) != group_of(place - 1); }

  // The grid of the group that begins at a place, from its weights moved to make up for the errors before it.
  void fit(int64_t first) {
    int64_t end = first + 1;
    while (end < a_.w.cols && !begins_group(end)) ++end;
    const int64_t size = end - first, group = group_of(first);
    std::vector<float> x(at(size * kGptqRows)), moves(at(size * kGptqRows)), row(at(size));
    const GridRule rule{a_.bits,
                        a_.fitted_zero == nullptr,
                        false,
                        a_.solver == QTR_MSE,
                        std::numeric_limits<float>::infinity(),
                        false,
                        a_.integer_zero != 0,
                        a_.scale_format};
    for (int64_t piece = 0; piece < rows_; piece += kGptqRows) {
      for (int64_t from = first; from < end;) {
        const int64_t base = from - from % kGptqColumns, to = std::min(base + kGptqColumns, end);
        const float* panel = feedback_.panel(base / kGptqColumns);
        float sums[kGptqColumns * kGptqRows] = {};
        for (int64_t k = from; k < to; ++k)
          std::copy_n(errors_.data() + k * kStrip + piece, kGptqRows, sums + (k - base) * kGptqRows);
        kernels().products_f32(panel, errors_.data() + piece, kStrip, first, sums, kGptqRows);
        kernels().products_f32(panel + first * kGptqColumns, moves.data(), kGptqRows, from - first, sums,
                               kGptqRows);
        for (int64_t k = from; k < to; ++k) {
          float* now = x.data() + (k - first) * kGptqRows;
          std::copy_n(sums + (k - base) * kGptqRows, kGptqRows, now);
          for (int64_t j = from; j < k; ++j) {
            const float a = panel[j * kGptqColumns + k - base];
            const float* move = moves.data() + (j - first) * kGptqRows;
            for (int64_t r = 0; r < kGptqRows; ++r) now[r] += move[r] * a;
          }
          const float* w = errors_.data() + k * kStrip + piece;
          for (int64_t r = 0; r < kGptqRows; ++r) moves[at((k - first) * kGptqRows + r)] = w[r] - now[r];
        }
        from = to;
      }
      for (int64_t r = 0; r < std::min(kGptqRows, rows_ - piece); ++r) {
        for (int64_t k = 0; k < size; ++k) row[at(k)] = x[at(k * kGptqRows + r)];
        clamp_excluded(first, piece + r, row);
        float inv, zero, scale;
        check(kernels().grid_fit(row.data(), size, size, rule, GridLines{&inv, &zero, &scale}),
              "[gptq] the range of a group must be finite in float32", "row", first_ + piece + r, "group",
              group);
        for (float* number : {&zero, &scale})
          if (a_.half != 0) {
            uint16_t half;
            kernels().f32_to_f16(number, &half, 1);
            kernels().f16_to_f32(&half, number, 1);
          }
        const int64_t line = group * kStrip + piece + r, place = (first_ + piece + r) * groups_ + group;
        scale_[at(line)] = a_.fitted_scale[place] = scale;
        zero_[at(line)] = zero;
        inv_[at(line)] = scale == 0 ? 0.0f : 1.0f / scale;
        if (a_.fitted_zero != nullptr) a_.fitted_zero[place] = zero;
      }
    }
  }

  // Excluded positions count as the nearest number between the extremes of the rest, as in grid.hpp.
  void clamp_excluded(int64_t first, int64_t r, std::vector<float>& row) const {
    if (exact_.empty()) return;
    const auto excluded = [&](size_t k) {
      return (exact_[at(feedback_.column(first + static_cast<int64_t>(k)))] >> r & 1) != 0;
    };
    float lo = std::numeric_limits<float>::infinity(), hi = -lo;
    for (size_t k = 0; k < row.size(); ++k)
      if (!excluded(k)) lo = std::min(lo, row[k]), hi = std::max(hi, row[k]);
    if (lo > hi) lo = hi = 0;
    for (size_t k = 0; k < row.size(); ++k)
      if (excluded(k)) row[k] = std::min(std::max(row[k], lo), hi);
  }

  void spread(const Matrix& m, int64_t r, float* buffer, std::vector<float>& to) const {
    const float* from = float_row(m, 0, (first_ + r) * groups_, groups_, buffer);
    for (int64_t g = 0; g < groups_; ++g) to[at(g * kStrip + r)] = from[g];
  }

  // Columns of one panel.
  double columns(int64_t first, int64_t end, int64_t piece) {
    const int64_t p = first / kGptqColumns, skipped = first % kGptqColumns;
    const int count = static_cast<int>(end - first);
    float panel[kGptqColumns * kGptqRows] = {};
    float* sums = panel + skipped * kGptqRows;
    uint8_t codes[kGptqColumns * kGptqRows];
    GptqColumns c{};
    c.count = count;
    c.bits = a_.bits;
    c.sums = sums;
    c.errors = errors_.data() + first * kStrip + piece;
    c.stride = kStrip;
    c.feedback = feedback_.panel(p) + first * kGptqColumns + skipped;
    c.codes = codes;
    for (int k = 0; k < count; ++k) {
      const int64_t column = feedback_.column(first + k), line = column / group_ * kStrip + piece;
      std::copy_n(c.errors + k * kStrip, kGptqRows, sums + k * kGptqRows);
      c.inv[k] = inv_.data() + line;
      c.zero[k] = zero_.data() + line;
      c.scale[k] = scale_.data() + line;
      if (!exact_.empty()) c.exact[k] = static_cast<uint32_t>(exact_[at(column)] >> piece);
    }
    kernels().products_f32(feedback_.panel(p), errors_.data() + piece, kStrip, first, panel, kGptqRows);
    kernels().gptq_columns(c);
    double loss = 0;
    const int64_t rows = std::min(kGptqRows, rows_ - piece);
    for (int k = 0; k < count; ++k) {
      double sum = 0;
      uint8_t* to = codes_.data() + piece * a_.w.cols + feedback_.column(first + k);
      for (int64_t r = 0; r < rows; ++r) {
        const double apart = static_cast<double>(sums[k * kGptqRows + r]);
        sum += apart * apart;
        to[r * a_.w.cols] = codes[k * kGptqRows + r];
      }
      loss += sum * feedback_.pivot(first + k);
    }
    return loss;
  }

  const GptqArgs& a_;
  bool fitted_;  // or the grid is given
  const Feedback& feedback_;
  int64_t first_, rows_, group_, groups_;
  std::vector<float> errors_, inv_, zero_, scale_;  // kStrip for each column, or group
  std::vector<uint8_t> codes_;                      // row after row, columns where they belong
  std::vector<uint64_t> exact_;                     // a bit for each row
};

void check_weights(const GptqArgs& a) {
  const int64_t n = a.w.cols;
  std::atomic<bool> good{true};
  parallel_for_pieces(a.w.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(at(n));
    for (int64_t r = begin; r < end; ++r) {
      const float* w = float_row(a.w, r, 0, n, buffer.data());
      for (int64_t j = 0; j < n; ++j)
        if (!std::isfinite(w[j])) good = false;
    }
  });
  if (good) return;
  float value;
  for (int64_t r = 0; r < a.w.rows; ++r)
    for (int64_t j = 0; j < n; ++j) {
      const float x = *float_row(a.w, r, j, 1, &value);
      check(std::isfinite(x), "[gptq] w must be finite", "value", x, "row", r, "col", j);
    }
}

void check_hessian(const GptqArgs& a) {
  const int64_t n = a.w.cols;
  std::atomic<bool> good{true};
  parallel_for_pieces(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bool row = a.hessian[i * n + i] >= 0;
      for (int64_t j = 0; j <= i; ++j) row = row && std::isfinite(a.hessian[i * n + j]);
      if (!row) good = false;
    }
  });
  if (good) return;
  for (int64_t i = 0; i < n; ++i) {
    check(!(a.hessian[i * n + i] < 0), "[gptq] hessian must not be negative on its diagonal", "value",
          a.hessian[i * n + i], "row", i);
    for (int64_t j = 0; j <= i; ++j)
      check(std::isfinite(a.hessian[i * n + j]), "[gptq] hessian must be finite", "value",
            a.hessian[i * n + j], "row", i, "col", j);
  }
}

// Each column once, and where grids are fitted all columns of a group after each other.
void check_order(const GptqArgs& a) {
  check_given(a.order != nullptr, "gptq", "order");
  check_given(a.pivots != nullptr, "gptq", "pivots");
  const int64_t group = a.group_size == -1 ? a.w.cols : a.group_size;
  std::vector<bool> taken(at(a.w.cols)), begun(at((a.w.cols - 1) / group + 1));
  for (int64_t place = 0; place < a.w.cols; ++place) {
    const int64_t column = a.order[place];
    check(column >= 0 && column < a.w.cols && !taken[at(column)], "[gptq] order must have each column once",
          "column", column, "place", place);
    taken[at(column)] = true;
    const bool begins = place == 0 || column / group != a.order[place - 1] / group;
    check(a.fitted_scale == nullptr || !begins || !begun[at(column / group)],
          "[gptq] order must keep groups whole where grids are fitted", "column", column, "place", place);
    begun[at(column / group)] = true;
  }
}

void check_grid(const Matrix& m, const char* name) {
  std::vector<float> buffer(static_cast<size_t>(m.cols));
  const float* numbers = float_row(m, 0, 0, m.cols, buffer.data());
  for (int64_t g = 0; g < m.cols; ++g)
    if (!std::isfinite(numbers[g]))
      check_for("gptq", false, (std::string(name) + " must be finite").c_str(), "value", numbers[g], "group",
                g);
}

}  // namespace

void gptq(const GptqArgs& a) {
  check_matrix(a.w, "gptq", "w");
  check(a.bits >= 1 && a.bits <= 8, "[gptq] bits must be 1 to 8", "bits", a.bits);
  check(a.group_size == -1 || a.group_size >= 1, "[gptq] group_size must be -1 or at least 1", "group_size",
        a.group_size);
  check_extent(a.w.cols, a.w.cols, "gptq", "hessian");
  if (a.factor == nullptr) {
    check_given(a.hessian != nullptr, "gptq", "hessian");
    check(a.hessian_size == a.w.cols * a.w.cols,
          "[gptq] hessian must have a row and a column for each column of w", "size", a.hessian_size,
          "expected", a.w.cols * a.w.cols);
  }
  check(std::isfinite(a.damp) && a.damp >= 0, "[gptq] damp must be finite and not negative", "damp", a.damp);
  check_given(a.codes != nullptr, "gptq", "codes");
  check(a.codes_size == a.w.rows * row_bytes(a.w.cols, a.bits), "[gptq] codes must hold all packed rows",
        "codes_size", a.codes_size, "expected", a.w.rows * row_bytes(a.w.cols, a.bits));
  check_given(a.result != nullptr, "gptq", "result");
  const int64_t groups = group_count(a.w.rows, a.w.cols, a.group_size, 1);
  const bool on_device = a.device.kind != QTR_CPU;  // whose numbers the backend looks at
  if (on_device) backend_of(a.device, "gptq");
  GptqArgs flat = a;
  const auto in_a_row = [&](Matrix& m, const char* name) {
    check_matrix(m, "gptq", name);
    check(m.rows * m.cols == groups && (m.rows == 1 || m.row_stride == m.cols),
          "[gptq] scale and zero must hold one number for each group, without gaps", "groups",
          m.rows * m.cols, "expected", groups);
    m = Matrix{m.data, 1, groups, groups, m.dtype};
    if (!on_device) check_grid(m, name);
  };
  if (a.fitted_scale != nullptr) {
    check(a.fitted_size == groups, "[gptq] fitted_scale must hold one number for each group", "fitted_size",
          a.fitted_size, "expected", groups);
    check(a.scale_format >= QTR_SCALE_F32 && a.scale_format <= QTR_SCALE_E8M0,
          "[gptq] scale_format must be f32, f16, bf16 or e8m0", "scale_format",
          static_cast<int>(a.scale_format));
    check(a.half == 0 || a.scale_format == QTR_SCALE_F32, "[gptq] half goes without a scale_format", "half",
          a.half);
    check(!a.integer_zero || a.fitted_zero != nullptr, "[gptq] integer_zero goes without symmetric grids",
          "integer_zero", a.integer_zero);
    check(a.solver == QTR_MINMAX || a.solver == QTR_MSE, "[gptq] solver must be minmax or mse", "solver",
          static_cast<int>(a.solver));
    flat.scale = flat.zero = {};
  } else {
    in_a_row(flat.scale, "scale");
    if (flat.zero.data != nullptr) in_a_row(flat.zero, "zero");
  }
  if (on_device) {
    check_given(a.exclude_row_offsets == nullptr || a.exclude_columns != nullptr, "gptq", "exclude_columns");
  } else {
    check_excluded("gptq", a.w, a.exclude_row_offsets, a.exclude_columns);
    check_weights(a);
  }
  if (a.factor == nullptr)
    check_hessian(a);
  else
    check_order(a);
  *a.result = {a.damp, 0, 0};
  const Feedback feedback = a.factor == nullptr ? Feedback(flat, *a.result) : Feedback(flat);
  const qtr_gptq_columns_args columns{flat, a.factor == nullptr ? feedback.panel(0) : nullptr,
                                      feedback.order(), feedback.pivots(), a.device};
  if (done_on_device(columns, "gptq", &qtr_backend::gptq_columns)) return;
  const int64_t strips = (a.w.rows + kStrip - 1) / kStrip;
  std::vector<double> losses(at(strips));
  parallel_for(strips, [&](int64_t i) { losses[at(i)] = Strip(flat, feedback, i * kStrip).run(); });
  a.result->loss = std::accumulate(losses.begin(), losses.end(), 0.0);
}

}  // namespace quantrature
