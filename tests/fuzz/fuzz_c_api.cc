// The other functions of the C interface, over hostile sizes, settings and numbers.
#include <cmath>

#include "arguments.hpp"

using fuzz::accepted;
using fuzz::Arguments;
using fuzz::call;

namespace {

constexpr int64_t kMost = 4096;

bool fits(int64_t n) {
  return n >= 0 && n <= kMost;
}

void quantize(Arguments& in) {
  qtr_quantize_args args{};
  args.w = in.matrix<qtr_matrix>(in.extent(8), in.extent(80));
  args.bits = in.choice<int32_t>(1, 8);
  args.group_size = in.extent(100) - 1;
  args.axis = in.choice<int32_t>(0, 1);
  args.sym = in.coin();
  args.solver = in.choice(QTR_MINMAX, QTR_HQQ);
  args.round_zero = in.coin();
  args.integer_zero = in.coin();
  args.scale_format = in.choice(QTR_SCALE_F32, QTR_SCALE_E8M0);
  // Room for the most that any of these settings needs; the size that is said may be wrong.
  const int64_t most = 8 * 8 * 80 * 8, rows = args.w.rows, cols = args.w.cols;
  args.codes = in.array<uint8_t>(most);
  args.scale = in.array<float>(most);
  args.zero = in.coin() ? in.array<float>(most) : nullptr;
  if (rows > 0 && rows <= 8 && cols > 0 && cols <= 80 && args.group_size != 0 && args.group_size <= 4096 &&
      args.bits > 0 && args.bits <= 8) {
    const int64_t group = args.group_size < 0 ? (args.axis == 0 ? rows : cols) : args.group_size;
    const bool along = args.axis == 1;
    args.groups = along ? rows * ((cols + group - 1) / group) : rows * cols / group;
    args.codes_size =
        along ? rows * args.bits * ((cols + 7) / 8) : group * args.bits * ((rows * cols / group + 7) / 8);
    if (in.within(0, 15) == 0) args.groups = in.any<int8_t>();
    if (in.within(0, 15) == 0) args.codes_size = in.any<int8_t>();
    if (in.coin()) {
      int64_t* offsets = in.array<int64_t>(rows + 1);
      args.exclude_row_offsets = offsets;
      for (int64_t i = 0; i <= rows; ++i)  // an array has an end, which the offsets must name
        if (offsets[i] > 40) offsets[i] = 40;
      args.exclude_columns = in.array<int32_t>(40);
    }
  }
  accepted(call(qtr_quantize, args, in));
}

void moments(Arguments& in) {
  qtr_moments_args args{};
  args.x = in.matrix<qtr_matrix>(in.extent(8), in.extent(200));
  args.over = in.choice(QTR_OVER_TENSOR, QTR_OVER_COLUMNS);
  args.group_size = in.extent(100) - 1;
  args.out_count = in.within<int64_t>(0, 8 * 200);
  args.out = in.array<qtr_moments>(args.out_count);
  accepted(call(qtr_compute_moments, args, in));
}

void topk(Arguments& in) {
  qtr_matrix x[2] = {in.matrix<qtr_matrix>(in.extent(8), in.extent(200)),
                     in.matrix<qtr_matrix>(in.extent(8), in.extent(200))};
  qtr_topk_args args{};
  args.x = x;
  args.x_count = in.within<int64_t>(0, 2);
  args.k = in.within<int64_t>(-1, 300);
  args.key = in.choice(QTR_KEY_ABS, QTR_KEY_VALUE);
  args.per_row = in.coin();
  args.indices = in.array<int64_t>(8 * 300);
  args.values = in.array<float>(8 * 300);
  args.counts = in.coin() ? in.array<int64_t>(2) : nullptr;
  accepted(call(qtr_topk, args, in));
}

void outliers(Arguments& in) {
  qtr_outliers_args args{};
  args.w = in.matrix<qtr_matrix>(in.extent(8), in.extent(200));
  args.remainder = in.matrix<qtr_mutable_matrix>(args.w.rows, args.w.cols);
  args.count = in.within<int64_t>(-1, 300);
  args.per_row = in.coin();
  if (in.coin() && args.count >= 0) args.indices = in.array<int64_t>(args.count);
  args.values = in.array<float>(8 * 300);
  args.columns = in.array<int32_t>(8 * 300);
  args.row_offsets = in.array<int64_t>(fits(args.w.rows) ? args.w.rows + 1 : 1);
  accepted(call(qtr_extract_outliers, args, in));
}

void csr(Arguments& in) {
  const int64_t rows = in.extent(8), cols = in.extent(200);
  accepted(call(qtr_check_csr, qtr_check_csr_args{0, in.csr(rows, cols)}, in));
}

void integral(Arguments& in) {
  const int64_t rows = in.extent(8), cols = in.extent(200);
  const auto acc = in.matrix<qtr_mutable_matrix>(rows, cols, in.coin());
  const qtr_matrix read{acc.data, acc.rows, acc.cols, acc.row_stride, acc.dtype};
  const auto w = in.matrix<qtr_matrix>(rows, cols), image = in.matrix<qtr_matrix>(rows, in.coin() ? cols : 1);
  const double number = in.coin() ? 0.5 : static_cast<double>(in.any<int64_t>()) * 1e200;
  double sum;
  accepted(call(qtr_pqi_accumulate, qtr_pqi_accumulate_args{0, acc, w, number}, in));
  accepted(call(qtr_pqi_sum, qtr_pqi_sum_args{0, read, w, image, &sum}, in));
  accepted(call(qtr_interpolate,
                qtr_interpolate_args{0, w, image, number, in.matrix<qtr_mutable_matrix>(rows, cols)}, in));
  accepted(call(qtr_pqi_finalize, qtr_pqi_finalize_args{0, read, w, image, in.coin(), acc}, in));
}

void kmeans(Arguments& in) {
  qtr_kmeans_args args{};
  args.x = in.matrix<qtr_matrix>(in.extent(4), in.extent(60));
  if (in.coin()) args.weights = in.matrix<qtr_matrix>(args.x.rows, args.x.cols);
  args.k = in.choice<int32_t>(1, 20);
  args.centroids = in.matrix<qtr_mutable_matrix>(args.x.rows, args.k, true);
  args.assignment = in.array<uint8_t>(4 * 60);
  accepted(call(qtr_kmeans, args, in));
}

void pack(Arguments& in) {
  qtr_pack_args args{};
  args.rows = in.extent(6);
  args.cols = in.extent(300);
  args.row_stride = in.within(0, 7) == 0 ? in.extent(64) : args.cols;
  args.bits = in.choice<int32_t>(1, 8);
  args.codes = in.array<uint8_t>(6 * 300);
  args.row_bytes =
      in.within(0, 7) == 0 || !fits(args.cols) ? in.any<int16_t>() : args.bits * ((args.cols + 7) / 8);
  args.packed = in.array<uint8_t>(6 * 8 * 40);
  accepted(call(qtr_pack, args, in));
}

void round_to_half(Arguments& in) {
  qtr_round_to_half_args args{};
  args.count = in.extent(200);
  args.values = in.array<float>(fits(args.count) ? args.count : 0);
  args.halves = in.array<uint16_t>(fits(args.count) ? args.count : 0);
  float extremes[2];
  args.smallest = extremes;
  args.largest = in.within(0, 15) == 0 ? nullptr : extremes + 1;
  accepted(call(qtr_round_to_half, args, in));
}

// Rows of excluded positions; an array has an end, which the offsets must name.
template <class Args>
void exclude(Arguments& in, Args& args) {
  if (!fits(args.w.rows) || in.coin()) return;
  int64_t* offsets = in.array<int64_t>(args.w.rows + 1);
  const bool regular = in.coin();
  for (int64_t i = 0; i <= args.w.rows; ++i) {
    if (regular) offsets[i] = args.w.rows > 0 ? 40 * i / args.w.rows : 0;
    if (offsets[i] > 40) offsets[i] = 40;
  }
  int32_t* columns = in.array<int32_t>(40);
  if (in.coin())
    for (int i = 0; i < 40; ++i) columns[i] &= 7;
  args.exclude_row_offsets = offsets;
  args.exclude_columns = columns;
}

int64_t groups_of_a_row(int64_t cols, int64_t group_size) {
  if (group_size == 0) return 0;
  return group_size < 0 || group_size >= cols ? 1 : (cols + group_size - 1) / group_size;
}

// Outputs of the size that the other arguments ask for, mostly.
template <class Args>
void codes_of(Arguments& in, Args& args) {
  const bool sizes = args.w.rows > 0 && args.w.rows <= 8 && args.w.cols > 0 && args.w.cols <= 200 &&
                     args.bits > 0 && args.bits <= 8;
  args.codes_size =
      in.within(0, 15) == 0 || !sizes ? in.any<uint8_t>() : args.w.rows * args.bits * ((args.w.cols + 7) / 8);
  args.codes = in.array<uint8_t>(args.codes_size);
}

void codebook(Arguments& in) {
  qtr_codebook_quantize_args args{};
  args.w = in.matrix<qtr_matrix>(in.extent(8), in.extent(200));
  args.bits = in.choice<int32_t>(1, 8);
  args.group_size = in.coin() ? in.within<int64_t>(-1, 64) : in.extent(300) - 2;
  const int64_t entries = args.bits > 0 && args.bits <= 8 ? 1 << args.bits : 8;
  args.table =
      in.matrix<qtr_matrix>(in.coin() ? 1 : args.w.rows, in.within(0, 15) == 0 ? in.extent(300) : entries);
  codes_of(in, args);
  const bool sizes = fits(args.w.rows) && fits(args.w.cols);
  args.groups = in.within(0, 15) == 0 || !sizes ? in.any<uint8_t>()
                                                : args.w.rows * groups_of_a_row(args.w.cols, args.group_size);
  args.scale = in.within(0, 15) == 0 || args.groups <= 0 ? nullptr : in.array<float>(args.groups);
  exclude(in, args);
  accepted(call(qtr_codebook_quantize, args, in));
}

void hadamard(Arguments& in) {
  qtr_random_signs_args random{};
  random.seed = in.any<uint64_t>();
  random.count = in.extent(3000);
  random.signs =
      in.within(0, 15) == 0 ? nullptr : in.array<uint8_t>(fits(random.count) ? (random.count + 7) / 8 : 0);
  accepted(call(qtr_random_signs, random, in));
  qtr_hadamard_args args{};
  args.x = in.matrix<qtr_matrix>(in.extent(4), in.extent(3000));
  if (in.coin()) args.signs = in.array<uint8_t>(fits(args.x.cols) ? (args.x.cols + 7) / 8 : 0);
  args.inverse = in.coin();
  args.out = in.matrix<qtr_mutable_matrix>(args.x.rows, in.within(0, 15) == 0 ? in.extent(300) : args.x.cols);
  accepted(call(qtr_hadamard, args, in));
}

void trellis(Arguments& in) {
  qtr_trellis_values_args values{};
  values.code = in.choice(QTR_1MAD, QTR_HYB);
  values.state_bits = in.choice<int32_t>(2, 8);
  values.out_count =
      in.within(0, 7) == 0 ? in.any<int16_t>() : (values.code == QTR_HYB ? 2 : 1) << (values.state_bits & 15);
  values.out = in.array<float>(values.out_count < 0 ? 0 : values.out_count);
  accepted(call(qtr_trellis_values, values, in));

  qtr_trellis_quantize_args args{};
  args.x = in.matrix<qtr_matrix>(in.extent(2), in.coin() ? 16 : in.extent(80));
  args.trellis = {in.choice(QTR_1MAD, QTR_HYB), in.choice<int32_t>(1, 4), in.choice<int32_t>(2, 8)};
  args.scale = in.coin() ? 1 : in.any<int16_t>() / 256.0f;
  const bool sizes =
      fits(args.x.rows) && fits(args.x.cols) && args.trellis.bits > 0 && args.trellis.bits <= 4;
  args.codes_size = in.within(0, 15) == 0 || !sizes
                        ? in.any<uint8_t>()
                        : args.x.rows * ((args.x.cols * args.trellis.bits + 7) / 8);
  args.codes = in.array<uint8_t>(args.codes_size);
  accepted(call(qtr_trellis_quantize, args, in));
}

void gptq(Arguments& in) {
  const int64_t rows = in.extent(4), cols = in.extent(24);
  qtr_hessian_accumulate_args accumulate{};
  accumulate.x = in.matrix<qtr_matrix>(in.extent(6), cols);
  accumulate.sum =
      in.matrix<qtr_mutable_matrix>(in.within(0, 15) == 0 ? rows : cols, cols, in.within(0, 15) != 0);
  const bool summed = accepted(call(qtr_hessian_accumulate, accumulate, in)) &&
                      accumulate.struct_size == sizeof(accumulate) && accumulate.sum.row_stride == cols;
  qtr_gptq_args args{};
  args.w = in.matrix<qtr_matrix>(rows, cols);
  args.hessian_size = in.within(0, 15) == 0 || !fits(cols) ? in.any<uint8_t>() : cols * cols;
  // One that inputs have, or any numbers at all.
  args.hessian = summed && args.hessian_size == cols * cols ? static_cast<const float*>(accumulate.sum.data)
                                                            : in.array<float>(args.hessian_size);
  args.bits = in.choice<int32_t>(1, 8);
  args.group_size = in.coin() ? in.within<int64_t>(-1, 16) : in.extent(300) - 2;
  const int64_t groups = fits(cols) ? groups_of_a_row(cols, args.group_size) : 1;
  args.scale = in.matrix<qtr_matrix>(in.within(0, 15) == 0 ? in.extent(8) : rows, groups);
  if (in.coin()) args.zero = in.matrix<qtr_matrix>(rows, groups);
  args.damp = in.within(0, 7) == 0 ? std::nan("") : in.any<uint8_t>() / 256.0;
  args.ordered = in.coin();
  codes_of(in, args);
  exclude(in, args);
  qtr_gptq_result result;
  args.result = in.within(0, 15) == 0 ? nullptr : &result;
  if (in.coin()) {
    const bool sizes = fits(rows) && fits(cols);
    args.fitted_size = in.within(0, 15) == 0 || !sizes ? in.any<uint8_t>() : rows * groups;
    args.fitted_scale = in.array<float>(args.fitted_size);
    if (in.coin()) args.fitted_zero = in.array<float>(args.fitted_size);
    args.solver = in.choice(QTR_MINMAX, QTR_HQQ);
    args.half = in.coin();
  }
  accepted(call(qtr_gptq, args, in));
}

void gguf(Arguments& in) {
  constexpr qtr_gguf_type kTypes[] = {QTR_GGUF_Q4_0, QTR_GGUF_Q4_1, QTR_GGUF_Q5_0,  QTR_GGUF_Q5_1,
                                      QTR_GGUF_Q8_0, QTR_GGUF_Q2_K, QTR_GGUF_Q3_K,  QTR_GGUF_Q4_K,
                                      QTR_GGUF_Q5_K, QTR_GGUF_Q6_K, QTR_GGUF_IQ4_NL};
  constexpr int64_t kBytes[] = {18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18};
  const size_t chosen = in.within<size_t>(0, std::size(kTypes) - 1);
  const qtr_gguf_type type =
      in.within(0, 15) == 0 ? static_cast<qtr_gguf_type>(in.any<int32_t>()) : kTypes[chosen];
  const int64_t block = kBytes[chosen] > 34 ? 256 : 32;
  const int64_t rows = in.extent(3), cols = in.within(0, 7) == 0 ? in.extent(300) : block * in.within(1, 2);
  const bool sizes = rows > 0 && rows <= 3 && cols > 0 && cols <= 512;
  const int64_t size =
      in.within(0, 15) == 0 || !sizes ? in.any<uint8_t>() : rows * (cols / block) * kBytes[chosen];
  uint8_t* data = in.array<uint8_t>(size);

  qtr_gguf_dequantize_args reading{};
  reading.data = data;
  reading.data_size = size;
  reading.type = type;
  reading.out = in.matrix<qtr_mutable_matrix>(rows, cols, true);
  accepted(call(qtr_gguf_dequantize, reading, in));

  qtr_gguf_quantize_args args{};
  args.w = in.matrix<qtr_matrix>(rows, cols);
  args.type = type;
  if (in.coin()) args.weights = in.matrix<qtr_matrix>(in.coin() ? rows : 1, cols, true);
  args.data = data;
  args.data_size = size;
  accepted(call(qtr_gguf_quantize, args, in));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Arguments in(data, size);
  constexpr void (*kTargets[])(Arguments&) = {quantize, moments, topk, outliers,      csr,
                                              integral, kmeans,  pack, round_to_half, codebook,
                                              hadamard, trellis, gptq, gguf};
  kTargets[in.within<size_t>(0, std::size(kTargets) - 1)](in);
  return 0;
}
