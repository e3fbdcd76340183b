#include "quantrature/matvec.hpp"

#include <algorithm>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/grid/line.hpp"
#include "ops/matvec/block.hpp"
#include "quantrature/outliers.hpp"
#include "quantrature/packing.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kBlockElements = 1 << 16;
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kNarrowCols = 65536;

int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}

// A checked matrix. Scales and zeros are one row each.
struct Grid {
  const uint8_t* codes;
  int64_t rows, cols, row_bytes, group, groups;
  int bits;
  bool sym;
  Matrix scale, zero;
};

Grid checked(const GridMatrix& w, const char* op) {
  const auto rule = [&](const char* text) { return std::string("[") + op + "] " + text; };
  check(w.rows > 0 && w.cols > 0, rule("w must not be empty").c_str(), "rows", w.rows, "cols", w.cols);
  check(w.bits >= 1 && w.bits <= 8, rule("bits must be 1 to 8").c_str(), "bits", w.bits);
  check(w.group_size == -1 || w.group_size >= 1, rule("group_size must be -1 or at least 1").c_str(),
        "group_size", w.group_size);
  Grid g{};
  g.codes = w.codes;
  g.rows = w.rows, g.cols = w.cols, g.bits = w.bits;
  g.row_bytes = row_bytes(w.cols, w.bits);
  g.group = w.group_size == -1 ? w.cols : std::min(w.group_size, w.cols);
  g.groups = ceil_div(w.cols, g.group);
  g.sym = w.zero.data == nullptr;
  check(w.codes != nullptr && w.codes_size == g.rows * g.row_bytes,
        rule("codes must hold all packed rows").c_str(), "codes_size", w.codes_size, "expected",
        g.rows * g.row_bytes);
  const auto in_a_row = [&](const Matrix& m, const char* name) {
    check_matrix(m, op, name);
    check(m.rows * m.cols == g.rows * g.groups && (m.rows == 1 || m.row_stride == m.cols),
          rule("scale and zero must hold one number for each group, without gaps").c_str(), "groups",
          m.rows * m.cols, "expected", g.rows * g.groups);
    return Matrix{m.data, 1, m.rows * m.cols, m.rows * m.cols, m.dtype};
  };
  g.scale = in_a_row(w.scale, "scale");
  if (!g.sym) g.zero = in_a_row(w.zero, "zero");
  return g;
}

void check_shape(const Csr& m, const Grid& w, const char* rule) {
  check(m.rows == w.rows && m.cols == w.cols, rule, "rows", m.rows, "cols", m.cols, "expected rows", w.rows,
        "expected cols", w.cols);
}

int64_t offset_of(const Csr& m, int64_t row) {
  return m.nnz > INT32_MAX ? static_cast<const int64_t*>(m.row_offsets)[row]
                           : static_cast<const int32_t*>(m.row_offsets)[row];
}

int64_t column_of(const Csr& m, int64_t i) {
  return m.cols <= kNarrowCols ? static_cast<const uint16_t*>(m.columns)[i]
                               : static_cast<const int32_t*>(m.columns)[i];
}

// Four sums, so that one addition need not wait for the last.
template <class Column>
float sparse_dot(const float* values, const Column* columns, int64_t n, const float* x) {
  float sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int64_t k = 0; k < 4; ++k) sum[k] += values[i + k] * x[columns[i + k]];
  for (; i < n; ++i) sum[i % 4] += values[i] * x[columns[i]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

float sparse_dot(const Csr& m, int64_t row, const float* x) {
  const int64_t begin = offset_of(m, row), n = offset_of(m, row + 1) - begin;
  const float* values = static_cast<const float*>(m.values) + begin;
  return m.cols <= kNarrowCols ? sparse_dot(values, static_cast<const uint16_t*>(m.columns) + begin, n, x)
                               : sparse_dot(values, static_cast<const int32_t*>(m.columns) + begin, n, x);
}

// The vectors in all the forms that the kernels read.
struct Vectors {
  std::vector<float> widened, shifted, sums;
  const float* x;

  Vectors(const Matrix& m, const Grid& w, bool by_blocks) {
    x = static_cast<const float*>(m.data);
    if (m.dtype != QTR_F32 || (m.rows > 1 && m.row_stride != m.cols)) {
      widened.resize(static_cast<size_t>(m.rows * m.cols));
      for (int64_t v = 0; v < m.rows; ++v) {
        float* to = widened.data() + v * m.cols;
        const float* from = float_row(m, v, 0, m.cols, to);
        if (from != to) std::copy_n(from, m.cols, to);
      }
      x = widened.data();
    }
    sums.resize(static_cast<size_t>(m.rows * w.groups));
    for (int64_t v = 0; v < m.rows; ++v)
      for (int64_t g = 0; g < w.groups; ++g) {
        double sum = 0;
        for (int64_t j = g * w.group; j < std::min((g + 1) * w.group, w.cols); ++j)
          sum += static_cast<double>(x[v * w.cols + j]);
        sums[static_cast<size_t>(v * w.groups + g)] = static_cast<float>(sum);
      }
    if (by_blocks) shift(m.rows, w);
  }

 private:
  void shift(int64_t vectors, const Grid& w) {
    shifted.resize(static_cast<size_t>(vectors * plane_count(w.bits) * w.cols));
    float* to = shifted.data();
    for (int64_t v = 0; v < vectors; ++v) {
      int left = w.bits;
      for (int p : {8, 4, 2, 1}) {
        if (left < p) continue;
        left -= p;
        float factors[64];
        for (int64_t i = 0; i < 64; ++i) factors[i] = in_word_units(p, left, i);
        const float* from = x + v * w.cols;
        for (int64_t j = 0; j < w.cols; ++j) to[j] = from[j] * factors[j % 64];
        to += w.cols;
      }
    }
  }
};

// Memory of one task.
struct Scratch {
  std::vector<float> scale, zero;
  std::vector<uint8_t> codes;
};

class Product {
 public:
  Product(const MatvecArgs& args, const Grid& w)
      : a_(args),
        w_(w),
        blocked_(w.cols / kMatvecChunk * kMatvecChunk),
        by_blocks_(blocked_ > 0 && (w.group % 64 == 0 || w.group == 32 || w.group >= blocked_)),
        vectors_(args.x, w, by_blocks_),
        rows_of_block_(std::max<int64_t>(1, kBlockElements / w.cols)) {
    const int64_t blocks = ceil_div(w.rows, rows_of_block_);
    scratch_.resize(static_cast<size_t>(std::min<int64_t>(blocks, num_threads() * kTasksPerThread)));
    for (Scratch& s : scratch_) {
      const auto groups = static_cast<size_t>(rows_of_block_ * w.groups);
      s.scale.resize(groups);
      s.zero.resize(groups, symmetric_zero(w.bits));
      s.codes.resize(static_cast<size_t>(by_blocks_ ? kMatvecChunk : w.cols));
    }
  }

  void run() {
    const int64_t blocks = ceil_div(w_.rows, rows_of_block_), tasks = static_cast<int64_t>(scratch_.size());
    parallel_for(tasks, [&](int64_t task) {
      for (int64_t i = blocks * task / tasks; i < blocks * (task + 1) / tasks; ++i)
        rows(i * rows_of_block_, std::min((i + 1) * rows_of_block_, w_.rows),
             scratch_[static_cast<size_t>(task)]);
    });
  }

 private:
  void rows(int64_t first, int64_t last, Scratch& s) const {
    float* y = static_cast<float*>(a_.out.data);
    const int64_t vectors = a_.x.rows, groups = (last - first) * w_.groups, at = first * w_.groups;
    MatvecBlock block{};
    block.codes = w_.codes + first * w_.row_bytes;
    block.row_bytes = w_.row_bytes;
    block.rows = last - first;
    block.cols = w_.cols;
    block.bits = w_.bits;
    block.group = w_.group;
    block.groups = w_.groups;
    block.scale = float_row(w_.scale, 0, at, groups, s.scale.data());
    block.zero = w_.sym ? s.zero.data() : float_row(w_.zero, 0, at, groups, s.zero.data());
    block.vectors = vectors;
    block.x = vectors_.x;
    block.shifted = vectors_.shifted.data();
    block.sums = vectors_.sums.data();
    block.y = y + first;
    block.y_stride = a_.out.row_stride;

    for (int64_t v = 0; v < vectors; ++v) std::fill_n(block.y + v * block.y_stride, block.rows, 0.0f);
    if (by_blocks_) kernels().matvec_blocks(block);
    const int64_t begin = by_blocks_ ? blocked_ : 0;
    if (begin < w_.cols) loose_codes(block, begin, s.codes.data());
    kernels().matvec_zeros(block);
    if (a_.residuals.row_offsets != nullptr)
      for (int64_t row = first; row < last; ++row)
        for (int64_t v = 0; v < vectors; ++v)
          y[v * a_.out.row_stride + row] += sparse_dot(a_.residuals, row, vectors_.x + v * w_.cols);
  }

  // Columns from begin on, unpacked first.
  void loose_codes(const MatvecBlock& block, int64_t begin, uint8_t* codes) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      kernels().unpack_span(block.codes + row * block.row_bytes, PackedSpan{begin, w_.cols, w_.cols, w_.bits},
                            codes);
      for (int64_t v = 0; v < block.vectors; ++v)
        block.y[v * block.y_stride + row] += kernels().matvec_codes(
            codes, begin, w_.cols, w_.group, block.scale + row * w_.groups, block.x + v * w_.cols);
    }
  }

  const MatvecArgs& a_;
  const Grid& w_;
  int64_t blocked_;  // columns in whole chunks
  bool by_blocks_;   // whether the groups let a kernel read those packed
  Vectors vectors_;
  int64_t rows_of_block_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void residuals(const ResidualsArgs& a) {
  const Grid w = checked(a.w, "residuals");
  if (a.device.kind == QTR_CPU) check_csr(a.outliers);
  check_shape(a.outliers, w, "[residuals] outliers must have the shape of w");
  check(a.outliers.nnz == 0 || a.out != nullptr, "[residuals] out must not be null");
  check(a.outliers.dtype == QTR_F32 || a.outliers.dtype == QTR_F16 || a.outliers.dtype == QTR_BF16,
        "[residuals] outliers must be float32, float16 or bfloat16", "dtype",
        static_cast<int>(a.outliers.dtype));
  if (done_on_device(a, "residuals", &qtr_backend::residuals)) return;
  const int64_t nnz = std::max<int64_t>(1, a.outliers.nnz);
  const Matrix values{a.outliers.values, 1, nnz, nnz, a.outliers.dtype};
  constexpr int64_t kSpan = 4096;  // codes unpacked at a time; a multiple of 256
  parallel_for_pieces(
      w.rows, std::max<int64_t>(1, kBlockElements / w.cols), [&](int64_t first, int64_t last) {
        uint8_t codes[kSpan];
        for (int64_t row = first; row < last; ++row) {
          int64_t unpacked = -1;
          for (int64_t i = offset_of(a.outliers, row); i < offset_of(a.outliers, row + 1); ++i) {
            const int64_t column = column_of(a.outliers, i), begin = column / kSpan * kSpan;
            if (begin != unpacked)
              kernels().unpack_span(w.codes + row * w.row_bytes,
                                    PackedSpan{begin, std::min(begin + kSpan, w.cols), w.cols, w.bits},
                                    codes);
            unpacked = begin;
            const int64_t g = row * w.groups + column / w.group;
            float buffer[3];
            const float scale = *float_row(w.scale, 0, g, 1, buffer);
            const float zero = w.sym ? symmetric_zero(w.bits) : *float_row(w.zero, 0, g, 1, buffer + 1);
            const float image = (static_cast<float>(codes[column - begin]) - zero) * scale;
            a.out[i] = *float_row(values, 0, i, 1, buffer + 2) - image;
          }
        }
      });
}

void matvec(const MatvecArgs& a) {
  const Grid w = checked(a.w, "matvec");
  check_matrix(a.x, "matvec", "x");
  check_matrix(a.out, "matvec", "out");
  check(a.x.cols == w.cols, "[matvec] x must have as many numbers as w has columns", "cols", a.x.cols,
        "expected", w.cols);
  check(a.out.rows == a.x.rows && a.out.cols == w.rows && a.out.dtype == QTR_F32,
        "[matvec] out must be float32, a row for each vector, a column for each row of w", "rows", a.out.rows,
        "cols", a.out.cols, "dtype", static_cast<int>(a.out.dtype));
  if (a.residuals.row_offsets != nullptr) {
    check_shape(a.residuals, w, "[matvec] residuals must have the shape of w");
    check(a.residuals.dtype == QTR_F32, "[matvec] residuals must be float32", "dtype",
          static_cast<int>(a.residuals.dtype));
  }
  if (done_on_device(a, "matvec", &qtr_backend::matvec)) return;
  Product(a, w).run();
}

}  // namespace quantrature
