// Readers of the packed formats: unpack, the dequantizations and the products of grids, codebooks and
// trellises over hostile codes, sizes and positions.
#include "arguments.hpp"

using fuzz::accepted;
using fuzz::Arguments;
using fuzz::call;
using fuzz::expect;

namespace {

void unpack(Arguments& in) {
  const int64_t rows = in.extent(6), cols = in.extent(600);
  const int32_t bits = in.choice<int32_t>(1, 8);
  const int64_t right = bits * ((cols <= 4096 ? cols + 7 : 8) / 8);
  const int64_t row_bytes = in.within(0, 7) == 0 ? in.any<int16_t>() : right;
  const bool fits = rows > 0 && rows <= 6 && cols > 0 && cols <= 600 && row_bytes > 0 && row_bytes < 4800;
  qtr_unpack_args args{};
  args.packed = in.array<uint8_t>(fits ? rows * row_bytes : 1);
  args.rows = rows;
  args.row_bytes = row_bytes;
  args.bits = bits;
  args.codes = in.array<uint8_t>(fits ? rows * cols : 1);
  args.cols = args.row_stride = cols;
  if (!accepted(call(qtr_unpack, args, in)) || args.struct_size < sizeof(args)) return;
  qtr_pack_args back{sizeof(qtr_pack_args),
                     args.codes,
                     rows,
                     cols,
                     cols,
                     bits,
                     in.array<uint8_t>(rows * row_bytes),
                     row_bytes};
  qtr_unpack_args again = args;
  again.struct_size = sizeof(again);
  again.packed = back.packed;
  again.codes = in.array<uint8_t>(rows * cols);
  expect(accepted(qtr_pack(&back)) && accepted(qtr_unpack(&again)), "unpacked codes cannot be packed");
  expect(std::memcmp(args.codes, again.codes, static_cast<size_t>(rows * cols)) == 0, "codes change");
}

qtr_grid_matrix grid(Arguments& in, int64_t rows, int64_t cols) {
  qtr_grid_matrix w{};
  w.rows = rows;
  w.cols = cols;
  w.bits = in.choice<int32_t>(1, 8);
  w.group_size = in.coin() ? 64 : in.extent(300) - 1;
  const bool fits = rows > 0 && rows <= 8 && cols > 0 && cols <= 600 && w.bits >= 1 && w.bits <= 8;
  w.codes_size = in.within(0, 7) == 0 || !fits ? in.any<uint8_t>() : rows * w.bits * ((cols + 7) / 8);
  w.codes = in.array<uint8_t>(w.codes_size);
  const int64_t group = w.group_size < 1 ? 600 : w.group_size;
  const int64_t groups = fits ? (cols + group - 1) / group : 1;
  w.scale = in.matrix<qtr_matrix>(in.within(0, 7) == 0 ? in.extent(8) : rows, groups);
  if (in.coin()) w.zero = in.matrix<qtr_matrix>(rows, groups);
  return w;
}

void dequantize(Arguments& in) {
  const int64_t rows = in.extent(8), cols = in.extent(600);
  const qtr_grid_matrix w = grid(in, rows, cols);
  qtr_dequantize_args args{0,       w.codes,      w.codes_size,
                           w.bits,  w.group_size, in.choice<int32_t>(0, 1),
                           w.scale, w.zero,       in.matrix<qtr_mutable_matrix>(rows, cols)};
  accepted(call(qtr_dequantize, args, in));
}

// Codes of a codebook in place of those of a grid.
qtr_matrix table(Arguments& in, qtr_grid_matrix& w) {
  if (in.within(0, 7) != 0) w.zero = {};
  if (in.coin()) {
    w.group_size = 0;
    if (in.within(0, 7) != 0) w.scale = {};
  }
  const int64_t entries = w.bits >= 1 && w.bits <= 8 ? 1 << w.bits : 8;
  return in.matrix<qtr_matrix>(in.coin() ? 1 : w.rows, in.within(0, 15) == 0 ? in.extent(300) : entries);
}

void product(Arguments& in) {
  const int64_t rows = in.extent(8), cols = in.extent(600);
  qtr_matvec_args args{};
  args.w = grid(in, rows, cols);
  if (in.coin()) args.table = table(in, args.w);
  const int64_t vectors = in.within<int64_t>(1, 3);
  args.x = in.matrix<qtr_matrix>(vectors, in.within(0, 15) == 0 ? in.extent(600) : cols);
  args.out = in.matrix<qtr_mutable_matrix>(vectors, rows, true);
  if (in.coin()) {
    // As a reader does: positions are checked before they are used.
    qtr_residuals_args residuals{};
    residuals.w = args.w;
    residuals.table = args.table;
    residuals.outliers = in.csr(rows, cols);
    residuals.out = in.array<float>(residuals.outliers.nnz < 0 ? 0 : residuals.outliers.nnz);
    if (!accepted(call(qtr_residuals, residuals, in)) || residuals.struct_size < sizeof(residuals)) return;
    args.residuals = residuals.outliers;
    args.residuals.values = residuals.out;
    args.residuals.dtype = QTR_F32;
  }
  accepted(call(qtr_matvec, args, in));
}

void codebook(Arguments& in) {
  const int64_t rows = in.extent(8), cols = in.extent(600);
  qtr_codebook_dequantize_args args{};
  args.bits = in.choice<int32_t>(1, 8);
  args.group_size = in.coin() ? in.within<int64_t>(-1, 64) : in.extent(300) - 2;
  const bool fits = rows > 0 && rows <= 8 && cols > 0 && cols <= 600 && args.bits >= 1 && args.bits <= 8;
  args.codes_size = in.within(0, 7) == 0 || !fits ? in.any<uint8_t>() : rows * args.bits * ((cols + 7) / 8);
  args.codes = in.array<uint8_t>(args.codes_size);
  const int64_t entries = args.bits >= 1 && args.bits <= 8 ? 1 << args.bits : 8;
  args.table = in.matrix<qtr_matrix>(in.coin() ? 1 : rows, in.within(0, 15) == 0 ? in.extent(300) : entries);
  const int64_t group = args.group_size < 1 ? 600 : args.group_size;
  if (args.group_size != 0 || in.within(0, 7) == 0)
    args.scale = in.matrix<qtr_matrix>(in.within(0, 7) == 0 ? in.extent(8) : rows,
                                       fits ? (cols + group - 1) / group : 1);
  args.out = in.matrix<qtr_mutable_matrix>(rows, cols);
  accepted(call(qtr_codebook_dequantize, args, in));
}

qtr_trellis trellis(Arguments& in) {
  return {in.choice(QTR_1MAD, QTR_HYB), in.choice<int32_t>(1, 4), in.choice<int32_t>(2, 16)};
}

void sequences(Arguments& in) {
  qtr_trellis_dequantize_args args{};
  args.trellis = trellis(in);
  args.scale = in.any<int16_t>() / 256.0f;
  const int64_t rows = in.extent(4), cols = in.coin() ? 256 : in.extent(600);
  const bool fits =
      rows > 0 && rows <= 4 && cols > 0 && cols <= 600 && args.trellis.bits >= 1 && args.trellis.bits <= 4;
  args.codes_size =
      in.within(0, 7) == 0 || !fits ? in.any<uint8_t>() : rows * ((cols * args.trellis.bits + 7) / 8);
  args.codes = in.array<uint8_t>(args.codes_size);
  args.out = in.matrix<qtr_mutable_matrix>(rows, cols);
  accepted(call(qtr_trellis_dequantize, args, in));
}

void tiles(Arguments& in) {
  qtr_trellis_matvec_args args{};
  args.trellis = trellis(in);
  args.scale = in.any<int16_t>() / 256.0f;
  args.rows = in.within(0, 7) == 0 ? in.extent(64) : 16 * in.within<int64_t>(1, 3);
  args.cols = in.within(0, 7) == 0 ? in.extent(64) : 16 * in.within<int64_t>(1, 6);
  const bool fits = args.rows > 0 && args.rows <= 64 && args.cols > 0 && args.cols <= 96 &&
                    args.trellis.bits >= 1 && args.trellis.bits <= 4;
  args.codes_size = in.within(0, 7) == 0 || !fits
                        ? in.any<uint8_t>()
                        : args.rows / 16 * (args.cols / 16) * 32 * args.trellis.bits;
  args.codes = in.array<uint8_t>(args.codes_size);
  const int64_t vectors = in.within<int64_t>(1, 3);
  args.x = in.matrix<qtr_matrix>(vectors, in.within(0, 15) == 0 ? in.extent(64) : args.cols);
  args.out = in.matrix<qtr_mutable_matrix>(vectors, args.rows, in.within(0, 15) != 0);
  accepted(call(qtr_trellis_matvec, args, in));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Arguments in(data, size);
  constexpr void (*kTargets[])(Arguments&) = {unpack, dequantize, product, codebook, sequences, tiles};
  kTargets[in.within<size_t>(0, std::size(kTargets) - 1)](in);
  return 0;
}
