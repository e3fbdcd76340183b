#include "quantrature/matvec.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/ceil_div.hpp"
#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "layout/csr.hpp"
#include "ops/codebook/table.hpp"
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
constexpr int64_t kPanel = 256;  // vectors prepared at a time

// A checked matrix. Scales and zeros are one row each.
struct Codes {
  const uint8_t* codes;
  int64_t rows, cols, row_bytes, group, groups;
  int bits;
  bool sym;            // zeros are those of the symmetric grid
  Matrix scale, zero;  // data null: there are none
  Matrix table;        // data null: a grid

  bool of_codebook() const { return table.data != nullptr; }
};

Codes checked(const GridMatrix& w, const Matrix& table, const char* op) {
  check_for(op, w.rows > 0 && w.cols > 0, "w must not be empty", "rows", w.rows, "cols", w.cols);
  check_extent(w.rows, w.cols, op, "w");
  check_for(op, w.bits >= 1 && w.bits <= 8, "bits must be 1 to 8", "bits", w.bits);
  if (table.data == nullptr) {
    check_for(op, w.group_size == -1 || w.group_size >= 1, "group_size must be -1 or at least 1",
              "group_size", w.group_size);
  } else {
    check_table(table, w.bits, w.rows, op);
    check_for(op, w.group_size >= -1, "group_size must be -1, 0 or at least 1", "group_size", w.group_size);
    check_for(op, w.zero.data == nullptr, "zero must not be given with a table", "zeros",
              w.zero.rows * w.zero.cols);
    check_for(op, (w.scale.data != nullptr) == (w.group_size != 0),
              "scale must be there if and only if there are groups", "group_size", w.group_size);
  }
  Codes g{};
  g.codes = w.codes;
  g.rows = w.rows, g.cols = w.cols, g.bits = w.bits;
  g.row_bytes = row_bytes(w.cols, w.bits);
  g.group = w.group_size < 1 ? w.cols : std::min(w.group_size, w.cols);
  g.groups = w.group_size == 0 ? 0 : ceil_div(w.cols, g.group);
  if (table.data != nullptr) g.table = table;
  g.sym = w.zero.data == nullptr && !g.of_codebook();
  check_given(w.codes != nullptr, op, "codes");
  check_for(op, w.codes_size == g.rows * g.row_bytes, "codes must hold all packed rows", "codes_size",
            w.codes_size, "expected", g.rows * g.row_bytes);
  const auto in_a_row = [&](const Matrix& m, const char* name) {
    check_matrix(m, op, name);
    check_for(op, m.rows * m.cols == g.rows * g.groups && (m.rows == 1 || m.row_stride == m.cols),
              "scale and zero must hold one number for each group, without gaps", "groups", m.rows * m.cols,
              "expected", g.rows * g.groups);
    return Matrix{m.data, 1, m.rows * m.cols, m.rows * m.cols, m.dtype};
  };
  if (g.groups > 0) g.scale = in_a_row(w.scale, "scale");
  if (w.zero.data != nullptr) g.zero = in_a_row(w.zero, "zero");
  return g;
}

void check_shape(const Csr& m, const Codes& w, const char* rule) {
  check(m.rows == w.rows && m.cols == w.cols, rule, "rows", m.rows, "cols", m.cols, "expected rows", w.rows,
        "expected cols", w.cols);
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

// The same for a tile of vectors side by side: number j of vector v is x[j * kMatvecTile + v].
template <class Column>
void sparse_dots(const float* values, const Column* columns, int64_t n, const float* x, float* dots) {
  float sum[4][kMatvecTile] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float* from = x + columns[i] * kMatvecTile;
    for (int64_t v = 0; v < kMatvecTile; ++v) sum[i % 4][v] += values[i] * from[v];
  }
  for (int64_t v = 0; v < kMatvecTile; ++v) dots[v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
}

// Calls body(values, columns, n) for the residuals of a row.
template <class Body>
auto with_row(const Csr& m, int64_t row, Body&& body) {
  const int64_t begin = offset_of(m, row), n = offset_of(m, row + 1) - begin;
  const float* values = static_cast<const float*>(m.values) + begin;
  return m.cols <= kNarrowCols ? body(values, static_cast<const uint16_t*>(m.columns) + begin, n)
                               : body(values, static_cast<const int32_t*>(m.columns) + begin, n);
}

// The sum of each group of x.
void group_sums(const float* x, const Codes& w, float* sums) {
  constexpr int64_t kSums = 8;
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* from = x + g * w.group;
    const int64_t n = std::min(w.group, w.cols - g * w.group);
    double sum[kSums] = {};
    int64_t j = 0;
    for (; j + kSums <= n; j += kSums)
      for (int64_t k = 0; k < kSums; ++k) sum[k] += static_cast<double>(from[j + k]);
    for (; j < n; ++j) sum[j % kSums] += static_cast<double>(from[j]);
    sums[g] =
        static_cast<float>(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
  }
}

// x with each plane in the units of in_word_units.
void shift(const float* x, const Codes& w, float* to) {
  int left = w.bits;
  for (int p : {8, 4, 2, 1}) {
    if (left < p) continue;
    left -= p;
    float factors[kMatvecRun];
    for (int64_t i = 0; i < kMatvecRun; ++i) factors[i] = in_word_units(p, left, i);
    int64_t j = 0;
    for (; j + kMatvecRun <= w.cols; j += kMatvecRun)
      for (int64_t i = 0; i < kMatvecRun; ++i) to[j + i] = x[j + i] * factors[i];
    for (; j < w.cols; ++j) to[j] = x[j] * factors[j % kMatvecRun];
    to += w.cols;
  }
}

// Memory that is written before it is read.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(n == 0 ? nullptr : new T[static_cast<size_t>(n)]) {}
  T* data() const { return data_.get(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  std::unique_ptr<T[]> data_;
};

enum class Kernel { kLoose, kFloats, kBytes, kTables };

// How a matrix is multiplied.
struct Way {
  Kernel kernel;
  int64_t blocked;  // columns that it takes; the others are unpacked first
  int limbs;        // of a number of x, for kBytes
  bool round;       // x to integers of 8 bits, first

  int64_t chunks() const { return ceil_div(blocked, kMatvecChunk); }

  Way(const Codes& w, qtr_activations activations) : round(activations == QTR_ACTIVATIONS_INT8) {
    blocked = w.of_codebook() ? w.cols / kMatvecChunk * kMatvecChunk : blocked_columns(w.cols, w.bits);
    limbs = round ? 1 : 3;
    const bool fits = blocked > 0 && (w.group % 32 == 0 || w.group >= blocked);
    if (w.of_codebook() && fits && w.bits <= kMostTableBits && kernels().matvec_tables != nullptr)
      kernel = Kernel::kTables;
    else if (w.of_codebook())
      kernel = Kernel::kLoose, blocked = 0;
    else if (fits && kernels().matvec_bytes != nullptr)
      kernel = Kernel::kBytes;
    else if (fits && kernels().matvec_blocks != nullptr &&
             (w.group % 64 == 0 || w.group == 32 || w.group >= blocked))
      kernel = Kernel::kFloats;
    else
      kernel = Kernel::kLoose, blocked = 0;
  }
};

// The groups of the lanes of each chunk.
std::vector<MatvecLanes> lanes_of(const Codes& w, const Way& way) {
  std::vector<MatvecLanes> lanes;
  if (way.kernel != Kernel::kBytes) return lanes;
  for (int64_t column = 0; column < way.blocked; column += kMatvecChunk) {
    MatvecLanes chunk{};
    chunk.first = column / w.group;
    for (int64_t lane = 0; lane < 16; lane += 2)
      chunk.group[lane] = chunk.group[lane + 1] =
          static_cast<int32_t>(std::min(column + lane * 16, way.blocked - 1) / w.group - chunk.first);
    chunk.count = chunk.group[15] + 1;
    lanes.push_back(chunk);
  }
  return lanes;
}

// Some vectors in all the forms that the kernels read.
class Panel {
 public:
  // For up to `most` vectors.
  Panel(const Codes& w, const Way& way, bool residuals, DType dtype, int64_t most)
      : w_(w),
        way_(way),
        widened_(dtype == QTR_F32 ? 0 : most * w.cols),
        rounded_(way.round ? most * w.cols : 0),
        shifted_(way.kernel == Kernel::kFloats ? most * plane_count(w.bits) * w.cols : 0),
        sums_(w.of_codebook() ? 0 : most * w.groups),
        limbs_(way.kernel == Kernel::kBytes ? most * way.chunks() * way.limbs * kMatvecChunk : 0),
        limb_scale_(way.kernel == Kernel::kBytes ? most * way.chunks() * 16 : 0),
        side_by_side_(residuals && most >= kSideBySide ? ceil_div(most, kMatvecTile) * kMatvecTile * w.cols
                                                       : 0) {}

  // Takes n vectors from first on.
  void fill(const Matrix& m, int64_t first, int64_t n) {
    x_ = m.dtype == QTR_F32 ? static_cast<const float*>(m.data) + first * m.row_stride : widened_.data();
    x_stride_ = m.dtype == QTR_F32 ? m.row_stride : w_.cols;
    size_ = n;
    parallel_for_pieces(n, 4, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        if (widened_) float_row(m, first + v, 0, w_.cols, widened_.data() + v * w_.cols);
        prepare(v);
      }
    });
    if (!beside()) return;
    parallel_for_pieces(w_.cols, 256, [&](int64_t begin, int64_t end) {
      for (int64_t tile = 0; tile < n; tile += kMatvecTile) {
        float* to = side_by_side_.data() + tile * w_.cols + begin * kMatvecTile;
        for (int64_t j = begin; j < end; ++j, to += kMatvecTile)
          for (int64_t v = 0; v < kMatvecTile; ++v)
            to[v] = tile + v < n ? x_[(tile + v) * x_stride_ + j] : 0.0f;
      }
    });
  }

  int64_t size() const { return size_; }
  // A vector, and the same as the codes are multiplied with.
  const float* exact(int64_t v) const { return x_ + v * x_stride_; }
  const float* vector(int64_t v) const { return rounded_ ? rounded_.data() + v * w_.cols : exact(v); }
  int64_t vector_stride() const { return rounded_ ? w_.cols : x_stride_; }
  const float* shifted(int64_t v) const { return shifted_.data() + v * plane_count(w_.bits) * w_.cols; }
  const float* sums(int64_t v) const { return sums_.data() + v * w_.groups; }
  // Of the tile that begins with vector v.
  int8_t* limbs(int64_t v) const { return limbs_.data() + v * way_.chunks() * way_.limbs * kMatvecChunk; }
  float* limb_scale(int64_t v) const { return limb_scale_.data() + v * way_.chunks() * 16; }
  const float* side_by_side(int64_t v) const { return side_by_side_.data() + v * w_.cols; }
  // Whether there are enough vectors for it.
  bool beside() const { return size_ >= kSideBySide && side_by_side_; }

 private:
  static constexpr int64_t kSideBySide = 4;

  void prepare(int64_t v) {
    if (rounded_) kernels().matvec_round(exact(v), w_.cols, rounded_.data() + v * w_.cols);
    if (w_.of_codebook()) return;
    group_sums(vector(v), w_, sums_.data() + v * w_.groups);
    if (shifted_) shift(vector(v), w_, shifted_.data() + v * plane_count(w_.bits) * w_.cols);
    if (limbs_) split(v);
  }

  void split(int64_t v) {
    const int64_t tile = v / kMatvecTile * kMatvecTile, step = std::min(kMatvecTile, size_ - tile);
    const int64_t chunk = way_.limbs * kMatvecChunk, whole = way_.blocked / kMatvecChunk;
    int8_t* to = limbs(tile) + (v - tile) * chunk;
    float* scale = limb_scale(tile) + (v - tile) * 16;
    kernels().matvec_split(vector(v), whole, way_.limbs, to, step * chunk, scale, step * 16);
    if (whole == way_.chunks()) return;
    float last[kMatvecChunk] = {};
    std::copy(vector(v) + whole * kMatvecChunk, vector(v) + way_.blocked, last);
    kernels().matvec_split(last, 1, way_.limbs, to + whole * step * chunk, step * chunk,
                           scale + whole * step * 16, step * 16);
  }

  const Codes& w_;
  const Way& way_;
  const float* x_ = nullptr;
  int64_t x_stride_ = 0, size_ = 0;
  Buffer<float> widened_, rounded_, shifted_, sums_;
  Buffer<int8_t> limbs_;
  Buffer<float> limb_scale_, side_by_side_;
};

// Memory of one task.
struct Scratch {
  Buffer<float> scale, zero, table, y;
  Buffer<uint8_t> codes;
  Buffer<float> values;  // of the codes, of a codebook
};

class Product {
 public:
  Product(const MatvecArgs& args, const Codes& w)
      : a_(args),
        w_(w),
        way_(w, args.activations),
        lanes_(lanes_of(w, way_)),
        panel_(w, way_, args.residuals.row_offsets != nullptr, args.x.dtype, std::min(args.x.rows, kPanel)),
        rows_of_block_(std::max<int64_t>(1, kBlockElements / w.cols / 4) * 4),
        symmetric_(w.sym ? static_cast<size_t>(rows_of_block_ * w.groups) : 0, symmetric_zero(w.bits)) {
    const int64_t blocks = ceil_div(w.rows, rows_of_block_), groups = rows_of_block_ * w.groups;
    const int64_t tasks = std::min<int64_t>(blocks, num_threads() * kTasksPerThread);
    for (int64_t i = 0; i < tasks; ++i)
      scratch_.push_back({Buffer<float>(w.scale.dtype == QTR_F32 ? 0 : groups),
                          Buffer<float>(w.zero.dtype == QTR_F32 ? 0 : groups),
                          Buffer<float>(w.table.dtype == QTR_F32 ? 0 : rows_of_tables() * w.table.cols),
                          Buffer<float>(args.out.dtype == QTR_F32 ? 0 : kMatvecTile * rows_of_block_),
                          Buffer<uint8_t>(w.cols - way_.blocked),
                          Buffer<float>(w.of_codebook() ? w.cols - way_.blocked : 0)});
  }

  void run() {
    const int64_t blocks = ceil_div(w_.rows, rows_of_block_), tasks = static_cast<int64_t>(scratch_.size());
    for (int64_t first = 0; first < a_.x.rows; first += kPanel) {
      panel_.fill(a_.x, first, std::min(kPanel, a_.x.rows - first));
      parallel_for(tasks, [&](int64_t task) {
        for (int64_t tile = 0; tile < panel_.size(); tile += kMatvecTile)
          for (int64_t i = blocks * task / tasks; i < blocks * (task + 1) / tasks; ++i)
            multiply(i * rows_of_block_, std::min((i + 1) * rows_of_block_, w_.rows), first, tile,
                     scratch_[static_cast<size_t>(task)]);
      });
    }
  }

 private:
  // Rows [first, last) and the tile of vectors of the panel, which begins with vector panel_first.
  void multiply(int64_t first, int64_t last, int64_t panel_first, int64_t tile, Scratch& s) const {
    const int64_t groups = (last - first) * w_.groups, at = first * w_.groups;
    MatvecBlock block{};
    block.codes = w_.codes + first * w_.row_bytes;
    block.row_bytes = w_.row_bytes;
    block.rows = last - first;
    block.cols = w_.cols;
    block.bits = w_.bits;
    block.group = w_.group;
    block.groups = w_.groups;
    block.scale = groups == 0 ? nullptr : float_row(w_.scale, 0, at, groups, s.scale.data());
    if (!w_.of_codebook())
      block.zero = w_.sym ? symmetric_.data() : float_row(w_.zero, 0, at, groups, s.zero.data());
    block.vectors = std::min(kMatvecTile, panel_.size() - tile);
    block.x = panel_.vector(tile);
    block.x_stride = panel_.vector_stride();
    block.shifted = panel_.shifted(tile);
    block.sums = panel_.sums(tile);
    block.y_stride = s.y ? block.rows : a_.out.row_stride;
    block.y = s.y ? s.y.data()
                  : static_cast<float*>(a_.out.data) + (panel_first + tile) * a_.out.row_stride + first;

    for (int64_t v = 0; v < block.vectors; ++v) std::fill_n(block.y + v * block.y_stride, block.rows, 0.0f);
    if (w_.of_codebook()) {
      const MatvecTables tables = with_tables(block, first, s);
      if (way_.kernel == Kernel::kTables) kernels().matvec_tables(tables);
      if (way_.blocked < w_.cols) loose_entries(tables, tile, s);
    } else if (way_.kernel == Kernel::kBytes) {
      kernels().matvec_bytes({block, lanes_.data(), way_.limbs, panel_.limbs(tile), panel_.limb_scale(tile)});
    } else {
      if (way_.kernel == Kernel::kFloats) kernels().matvec_blocks(block);
      kernels().matvec_zeros(block);
    }
    if (way_.blocked < w_.cols && !w_.of_codebook()) loose_codes(block, tile, s.codes.data());
    if (a_.residuals.row_offsets != nullptr) outliers(block, first, tile);
    for (int64_t v = 0; s.y && v < block.vectors; ++v)
      store_float_row(a_.out, panel_first + tile + v, first, block.rows, block.y + v * block.y_stride);
  }

  // Rows of tables that a block reads.
  int64_t rows_of_tables() const { return w_.table.rows == 1 ? 1 : rows_of_block_; }

  // A block that begins with row `first` of the matrix.
  MatvecTables with_tables(const MatvecBlock& block, int64_t first, Scratch& s) const {
    const Matrix& t = w_.table;
    const int64_t row = t.rows == 1 ? 0 : first, rows = t.rows == 1 ? 1 : block.rows;
    if (t.dtype == QTR_F32)
      return {block, static_cast<const float*>(t.data) + row * t.row_stride, t.rows == 1 ? 0 : t.row_stride};
    for (int64_t i = 0; i < rows; ++i) float_row(t, row + i, 0, t.cols, s.table.data() + i * t.cols);
    return {block, s.table.data(), t.rows == 1 ? 0 : t.cols};
  }

  // The columns of a codebook that no chunk has: decoded first, once for all vectors of the tile.
  void loose_entries(const MatvecTables& m, int64_t tile, Scratch& s) const {
    const MatvecBlock& block = m.block;
    const int64_t begin = way_.blocked, n = w_.cols - begin, g = begin / w_.group;
    const int64_t of_first = std::min(n, (g + 1) * w_.group - begin);  // of the group that a chunk may end in
    uint8_t* codes = s.codes.data();
    float* values = s.values.data();
    for (int64_t row = 0; row < block.rows; ++row) {
      kernels().unpack_span(block.codes + row * block.row_bytes, PackedSpan{begin, w_.cols, w_.cols, w_.bits},
                            codes);
      const float* table = m.table + row * m.table_stride;
      const float* scale = block.scale == nullptr ? nullptr : block.scale + row * w_.groups + g;
      kernels().codebook_decode(codes, of_first, of_first, w_.bits, table, scale, values);
      if (of_first < n)
        kernels().codebook_decode(codes + of_first, n - of_first, w_.group, w_.bits, table, scale + 1,
                                  values + of_first);
      for (int64_t v = 0; v < block.vectors; ++v)
        block.y[v * block.y_stride + row] +=
            kernels().matvec_values(values, n, panel_.vector(tile + v) + begin);
    }
  }

  // The columns of a grid that no chunk has, unpacked first.
  void loose_codes(const MatvecBlock& block, int64_t tile, uint8_t* codes) const {
    for (int64_t row = 0; row < block.rows; ++row) {
      kernels().unpack_span(block.codes + row * block.row_bytes,
                            PackedSpan{way_.blocked, w_.cols, w_.cols, w_.bits}, codes);
      for (int64_t v = 0; v < block.vectors; ++v)
        block.y[v * block.y_stride + row] += kernels().matvec_codes(
            codes, way_.blocked, w_.cols, w_.group, block.scale + row * w_.groups, panel_.vector(tile + v));
    }
  }

  void outliers(const MatvecBlock& block, int64_t first, int64_t tile) const {
    for (int64_t row = 0; row < block.rows; ++row)
      with_row(a_.residuals, first + row, [&](const float* values, const auto* columns, int64_t n) {
        float* y = block.y + row;
        if (panel_.beside()) {
          float dots[kMatvecTile];
          sparse_dots(values, columns, n, panel_.side_by_side(tile), dots);
          for (int64_t v = 0; v < block.vectors; ++v) y[v * block.y_stride] += dots[v];
        } else {
          for (int64_t v = 0; v < block.vectors; ++v)
            y[v * block.y_stride] += sparse_dot(values, columns, n, panel_.exact(tile + v));
        }
      });
  }

  const MatvecArgs& a_;
  const Codes& w_;
  const Way way_;
  const std::vector<MatvecLanes> lanes_;
  Panel panel_;
  const int64_t rows_of_block_;
  const std::vector<float> symmetric_;  // zeros of a block
  std::vector<Scratch> scratch_;
};

// What a code stands for.
float value_of(const Codes& w, int64_t row, int64_t column, uint8_t code) {
  float buffer[2];
  const int64_t g = row * w.groups + column / w.group;
  const float scale = w.groups == 0 ? 1.0f : *float_row(w.scale, 0, g, 1, buffer);
  if (w.of_codebook()) return *float_row(w.table, w.table.rows == 1 ? 0 : row, code, 1, buffer + 1) * scale;
  const float zero = w.sym ? symmetric_zero(w.bits) : *float_row(w.zero, 0, g, 1, buffer + 1);
  return (static_cast<float>(code) - zero) * scale;
}

}  // namespace

void residuals(const ResidualsArgs& a) {
  const Codes w = checked(a.w, a.table, "residuals");
  if (a.device.kind == QTR_CPU) check_csr(a.outliers);
  check_shape(a.outliers, w, "[residuals] outliers must have the shape of w");
  check_given(a.outliers.nnz == 0 || a.out != nullptr, "residuals", "out");
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
            float buffer;
            const float image = value_of(w, row, column, codes[column - begin]);
            a.out[i] = *float_row(values, 0, i, 1, &buffer) - image;
          }
        }
      });
}

void matvec(const MatvecArgs& a) {
  const Codes w = checked(a.w, a.table, "matvec");
  check_matrix(a.x, "matvec", "x");
  check_matrix(a.out, "matvec", "out");
  check(a.x.cols == w.cols, "[matvec] x must have as many numbers as w has columns", "cols", a.x.cols,
        "expected", w.cols);
  check(a.out.rows == a.x.rows && a.out.cols == w.rows,
        "[matvec] out must have a row for each vector, a column for each row of w", "rows", a.out.rows,
        "cols", a.out.cols);
  check(a.activations == QTR_ACTIVATIONS_FLOAT32 || a.activations == QTR_ACTIVATIONS_INT8,
        "[matvec] activations must be float32 or int8", "activations", static_cast<int>(a.activations));
  if (a.residuals.row_offsets != nullptr) {
    check_shape(a.residuals, w, "[matvec] residuals must have the shape of w");
    check(a.residuals.dtype == QTR_F32, "[matvec] residuals must be float32", "dtype",
          static_cast<int>(a.residuals.dtype));
  }
  if (a.device.kind != QTR_CPU && a.activations != QTR_ACTIVATIONS_FLOAT32)
    throw Unsupported(complaint("[matvec] activations of 8 bits are for the CPU", "device.kind",
                                static_cast<int>(a.device.kind)));
  if (done_on_device(a, "matvec", &qtr_backend::matvec)) return;
  Product(a, w).run();
}

}  // namespace quantrature
