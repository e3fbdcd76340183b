#include "quantrature/c_api.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace {

// Arguments of every function that are good, over memory of the fixture, for tests to spoil one by one.
class CApi : public testing::Test {
 protected:
  static constexpr int64_t kRows = 3, kCols = 10, kGroup = 4, kGroups = 3, kBits = 3;
  static constexpr int64_t kRowBytes = kBits * ((kCols + 7) / 8);

  CApi() {
    for (int64_t i = 0; i < kRows * kCols; ++i) {
      w_[i] = static_cast<float>(std::sin(static_cast<double>(i)));
      codes_[i] = static_cast<uint8_t>(i % 8);
    }
    std::fill_n(scale_, kRows * kGroups, 0.5f);
    std::fill_n(zero_, kRows * kGroups, 3.0f);
    std::fill_n(vector_, kCols, 1.0f);
  }

  static qtr_matrix in(const float* data, int64_t rows, int64_t cols) {
    return {data, rows, cols, cols, QTR_F32};
  }
  static qtr_mutable_matrix out(float* data, int64_t rows, int64_t cols) {
    return {data, rows, cols, cols, QTR_F32};
  }

  qtr_moments_args moments() {
    return {sizeof(qtr_moments_args), in(w_, kRows, kCols), QTR_OVER_ROWS, kGroup, moments_, kRows * kGroups};
  }
  qtr_pqi_accumulate_args accumulate() {
    return {sizeof(qtr_pqi_accumulate_args), out(result_, kRows, kCols), in(w_, kRows, kCols), 0.5};
  }
  qtr_pqi_finalize_args finalize() {
    return {
        sizeof(qtr_pqi_finalize_args), in(w_, kRows, kCols), in(w_, kRows, kCols), in(w_, kRows, kCols), 0,
        out(result_, kRows, kCols)};
  }
  qtr_pqi_sum_args sum() {
    return {sizeof(qtr_pqi_sum_args), in(w_, kRows, kCols), in(w_, kRows, kCols), in(w_, kRows, kCols),
            &number_};
  }
  qtr_interpolate_args interpolate() {
    return {sizeof(qtr_interpolate_args), in(w_, kRows, kCols), in(w_, kRows, kCols), 0.5,
            out(result_, kRows, kCols)};
  }
  qtr_pack_args pack() {
    return {sizeof(qtr_pack_args), codes_, kRows, kCols, kCols, kBits, packed_, kRowBytes};
  }
  qtr_unpack_args unpack() {
    return {sizeof(qtr_unpack_args), packed_, kRows, kRowBytes, kBits, codes_, kCols, kCols};
  }
  qtr_topk_args topk() {
    matrix_ = in(w_, kRows, kCols);
    return {sizeof(qtr_topk_args), &matrix_, 1, 4, QTR_KEY_ABS, 0, indices_, values_, nullptr};
  }
  qtr_outliers_args outliers() {
    return {sizeof(qtr_outliers_args),
            in(w_, kRows, kCols),
            4,
            0,
            nullptr,
            out(result_, kRows, kCols),
            values_,
            columns_,
            offsets_};
  }
  qtr_check_csr_args csr() {
    const uint16_t columns[4] = {1, 3, 0, 9};
    const int32_t offsets[kRows + 1] = {0, 2, 2, 4};
    std::copy_n(columns, 4, columns_);
    std::copy_n(offsets, kRows + 1, offsets_);
    return {sizeof(qtr_check_csr_args), {values_, columns_, offsets_, kRows, kCols, 4, QTR_F32}};
  }
  qtr_quantize_args quantize() {
    return {sizeof(qtr_quantize_args),
            in(w_, kRows, kCols),
            kBits,
            kGroup,
            1,
            0,
            QTR_MINMAX,
            0,
            nullptr,
            nullptr,
            packed_,
            kRows * kRowBytes,
            scale_,
            zero_,
            kRows * kGroups};
  }
  qtr_dequantize_args dequantize() {
    return {sizeof(qtr_dequantize_args),
            packed_,
            kRows * kRowBytes,
            kBits,
            kGroup,
            1,
            in(scale_, kRows, kGroups),
            in(zero_, kRows, kGroups),
            out(result_, kRows, kCols)};
  }
  qtr_grid_matrix grid() {
    return {packed_,
            kRows * kRowBytes,
            kRows,
            kCols,
            kBits,
            kGroup,
            in(scale_, kRows, kGroups),
            in(zero_, kRows, kGroups)};
  }
  qtr_residuals_args residuals() { return {sizeof(qtr_residuals_args), grid(), csr().csr, result_}; }
  qtr_matvec_args matvec() {
    qtr_matvec_args args{};
    args.struct_size = sizeof(args);
    args.w = grid();
    args.residuals = csr().csr;
    args.x = in(vector_, 1, kCols);
    args.out = out(result_, 1, kRows);
    return args;
  }
  qtr_allocate_args allocate() {
    return {
        sizeof(qtr_allocate_args), costs_, sizes_, options_, 2, 3, 0, 0, indices_, nullptr, nullptr, nullptr};
  }
  qtr_kmeans_args kmeans() {
    return {sizeof(qtr_kmeans_args), in(w_, kRows, kCols), {}, 2, out(result_, kRows, 2), assignment_};
  }

  float w_[kRows * kCols], result_[kRows * kCols]{}, scale_[kRows * kGroups], zero_[kRows * kGroups],
      vector_[kCols], values_[kRows * kCols]{};
  uint8_t codes_[kRows * kCols], packed_[kRows * kRowBytes]{}, assignment_[kRows * kCols]{};
  uint16_t columns_[kRows * kCols]{};
  int32_t offsets_[kRows + 1]{};
  int64_t indices_[kRows * kCols]{};
  qtr_moments moments_[kRows * kGroups]{};
  qtr_matrix matrix_{};
  double number_ = 0;
  double costs_[4] = {1, 0, 1, 0};
  int64_t sizes_[4] = {1, 2, 1, 2}, options_[3] = {0, 2, 4};
};

template <class Args>
void expect_refused(qtr_status (*function)(const Args*), const Args& args, const std::string& text,
                    qtr_status status = QTR_INVALID_ARGUMENT) {
  EXPECT_EQ(function(&args), status) << text;
  EXPECT_NE(std::string(qtr_last_error()).find(text), std::string::npos)
      << qtr_last_error() << "\nlacks " << text;
}

// What holds for every function: null, sizes never set, older and newer callers.
template <class Args>
void expect_sound(qtr_status (*function)(const Args*), const Args& good) {
  EXPECT_EQ(function(&good), QTR_OK) << qtr_last_error();
  EXPECT_STREQ(qtr_last_error(), "");
  EXPECT_EQ(function(nullptr), QTR_INVALID_ARGUMENT);
  EXPECT_NE(std::string(qtr_last_error()).find("[args] the argument struct must not be null"),
            std::string::npos);

  for (const size_t size : {size_t{0}, size_t{7}, size_t{4097}, std::numeric_limits<size_t>::max()}) {
    Args args = good;
    args.struct_size = size;
    expect_refused(
        function, args,
        "[args] struct_size must be set to the size of the struct: got struct_size=" + std::to_string(size));
  }
  {  // an older caller that knew nothing but the size: everything reads as zero, and that is refused by the
     // op
    Args args = good;
    args.struct_size = sizeof(size_t);
    EXPECT_EQ(function(&args), QTR_INVALID_ARGUMENT);
  }
  struct Newer {
    Args args;
    uint64_t unknown[4];
  } newer{good, {0, 0, 0, 0}};
  newer.args.struct_size = sizeof(Newer);
  EXPECT_EQ(function(&newer.args), QTR_OK) << qtr_last_error();
  newer.unknown[3] = 1;
  expect_refused(function, newer.args, "[args] fields that this version does not know must be zero",
                 QTR_UNSUPPORTED);
}

TEST_F(CApi, EveryFunctionTakesCallersOfOtherVersions) {
  expect_sound(qtr_compute_moments, moments());
  expect_sound(qtr_pqi_accumulate, accumulate());
  expect_sound(qtr_pqi_finalize, finalize());
  expect_sound(qtr_pqi_sum, sum());
  expect_sound(qtr_interpolate, interpolate());
  expect_sound(qtr_pack, pack());
  expect_sound(qtr_unpack, unpack());
  expect_sound(qtr_topk, topk());
  expect_sound(qtr_extract_outliers, outliers());
  expect_sound(qtr_check_csr, csr());
  expect_sound(qtr_quantize, quantize());
  expect_sound(qtr_dequantize, dequantize());
  expect_sound(qtr_residuals, residuals());
  expect_sound(qtr_matvec, matvec());
  expect_sound(qtr_allocate, allocate());
  expect_sound(qtr_kmeans, kmeans());
}

// A caller compiled against a shorter struct: what lies behind its end is not read.
TEST_F(CApi, FieldsBeyondTheCallersSizeReadAsZero) {
  qtr_allocate_args a = allocate();
  a.struct_size = offsetof(qtr_allocate_args, cost);
  a.cost = reinterpret_cast<double*>(1);
  a.size = reinterpret_cast<int64_t*>(1);
  a.bound = reinterpret_cast<double*>(1);
  EXPECT_EQ(qtr_allocate(&a), QTR_OK) << qtr_last_error();
  EXPECT_EQ(indices_[0] + indices_[1], 1);

  qtr_moments_args m = moments();
  m.struct_size = offsetof(qtr_moments_args, out);
  m.out = reinterpret_cast<qtr_moments*>(1);
  expect_refused(qtr_compute_moments, m, "[moments] out must hold one result");
}

#define REFUSED(function, good, spoil, text) \
  do {                                       \
    auto a = good;                           \
    spoil;                                   \
    expect_refused(function, a, text);       \
  } while (0)

TEST_F(CApi, Moments) {
  REFUSED(qtr_compute_moments, moments(), a.x.data = nullptr, "[moments] x must not be null");
  REFUSED(qtr_compute_moments, moments(), a.x.rows = 0, "[moments] x must not be empty: got rows=0");
  REFUSED(qtr_compute_moments, moments(), a.x.cols = -1, "[moments] x must not be empty");
  REFUSED(qtr_compute_moments, moments(), a.x.rows = int64_t{1} << 62,
          "[moments] x is larger than memory can be");
  REFUSED(qtr_compute_moments, moments(), a.x.row_stride = 9, "[moments] x has rows that overlap");
  REFUSED(qtr_compute_moments, moments(), a.x.row_stride = INT64_MAX,
          "[moments] x is larger than memory can be");
  REFUSED(qtr_compute_moments, moments(), a.x.dtype = static_cast<qtr_dtype>(9),
          "[moments] x must be float32");
  REFUSED(qtr_compute_moments, moments(), a.over = static_cast<qtr_moments_over>(3),
          "[moments] over must be");
  REFUSED(qtr_compute_moments, moments(), a.group_size = 0, "[moments] group_size must be");
  REFUSED(qtr_compute_moments, moments(), a.out = nullptr, "[moments] out must");
  REFUSED(qtr_compute_moments, moments(), a.out_count = 1, "[moments] out must hold one result");
}

TEST_F(CApi, Integral) {
  REFUSED(qtr_pqi_accumulate, accumulate(), a.acc.data = nullptr, "[pqi_accumulate] acc must not be null");
  REFUSED(qtr_pqi_accumulate, accumulate(), a.acc.dtype = QTR_F16, "[pqi_accumulate] acc must be float32");
  REFUSED(qtr_pqi_accumulate, accumulate(), a.grad.data = nullptr, "[pqi_accumulate] grad must not be null");
  REFUSED(qtr_pqi_accumulate, accumulate(), a.grad.cols = 9, "[pqi_accumulate] grad must have the shape");
  REFUSED(qtr_pqi_accumulate, accumulate(), a.weight = NAN, "[pqi_accumulate] weight must be finite");
  REFUSED(qtr_pqi_accumulate, accumulate(), a.weight = 1e300, "[pqi_accumulate] weight must be finite");
  REFUSED(qtr_pqi_finalize, finalize(), a.acc.data = nullptr, "[pqi_finalize] acc must not be null");
  REFUSED(qtr_pqi_finalize, finalize(), a.w.rows = 2, "[pqi_finalize] w must have the shape");
  REFUSED(qtr_pqi_finalize, finalize(), a.w_quantized.cols = 2,
          "[pqi_finalize] w_quantized must have the shape");
  REFUSED(qtr_pqi_finalize, finalize(), a.out.data = nullptr, "[pqi_finalize] out must not be null");
  REFUSED(qtr_pqi_finalize, finalize(), a.out.dtype = QTR_BF16, "[pqi_finalize] out must be float32");
  REFUSED(qtr_pqi_sum, sum(), a.w.data = nullptr, "[pqi_sum] w must not be null");
  REFUSED(qtr_pqi_sum, sum(), a.w_quantized.rows = 1, "[pqi_sum] w_quantized must have the shape");
  REFUSED(qtr_pqi_sum, sum(), a.out = nullptr, "[pqi_sum] out must not be null");
  REFUSED(qtr_interpolate, interpolate(), a.t = INFINITY, "[interpolate] t must be finite");
  REFUSED(qtr_interpolate, interpolate(), a.out.rows = 1, "[interpolate] out must have the shape");
}

TEST_F(CApi, Packing) {
  REFUSED(qtr_pack, pack(), a.codes = nullptr, "[pack] codes and packed must not be null");
  REFUSED(qtr_pack, pack(), a.packed = nullptr, "[pack] codes and packed must not be null");
  REFUSED(qtr_pack, pack(), a.rows = 0, "[pack] codes must not be empty");
  REFUSED(qtr_pack, pack(), a.rows = INT64_MAX, "[pack] codes is larger than memory can be");
  REFUSED(qtr_pack, pack(), a.cols = -5, "[pack] codes must not be empty");
  REFUSED(qtr_pack, pack(), a.cols = INT64_MAX, "[pack] codes");
  REFUSED(qtr_pack, pack(), a.bits = 0, "[pack] bits must be 1 to 8: got bits=0");
  REFUSED(qtr_pack, pack(), a.bits = 9, "[pack] bits must be 1 to 8: got bits=9");
  REFUSED(qtr_pack, pack(), a.row_stride = 9, "[pack] codes has rows that overlap");
  REFUSED(qtr_pack, pack(), a.row_bytes = 5, "[pack] packed must have row_bytes(cols, bits) bytes a row");
  codes_[12] = 8;
  REFUSED(qtr_pack, pack(), , "[pack] codes must fit into bits: got code=8, row=1, col=2");
  REFUSED(qtr_unpack, unpack(), a.packed = nullptr, "[unpack] codes and packed must not be null");
  REFUSED(qtr_unpack, unpack(), a.row_bytes = 7,
          "[unpack] packed must have row_bytes(cols, bits) bytes a row");
  REFUSED(qtr_unpack, unpack(), a.bits = -1, "[unpack] bits must be 1 to 8");
}

TEST_F(CApi, Topk) {
  REFUSED(qtr_topk, topk(), a.x = nullptr, "[topk] x must");
  REFUSED(qtr_topk, topk(), a.x_count = 0, "[topk] x must");
  REFUSED(qtr_topk, topk(), a.k = -1, "[topk] k must");
  REFUSED(qtr_topk, topk(), a.k = 31, "[topk] k must");
  REFUSED(qtr_topk, topk(), a.key = static_cast<qtr_topk_key>(2), "[topk] key must");
  REFUSED(qtr_topk, topk(), a.indices = nullptr, "[topk] indices");
  REFUSED(qtr_topk, topk(), a.values = nullptr, "[topk]");
  const qtr_topk_args two = [&] {
    static qtr_matrix pair[2];
    pair[0] = pair[1] = in(w_, kRows, kCols);
    qtr_topk_args a = topk();
    a.x = pair;
    a.x_count = 2;
    a.per_row = 1;
    return a;
  }();
  expect_refused(qtr_topk, two, "[topk]");
  w_[5] = NAN;
  REFUSED(qtr_topk, topk(), , "[topk] x must have no NaN");
}

TEST_F(CApi, Outliers) {
  REFUSED(qtr_extract_outliers, outliers(), a.count = -1, "[extract_outliers] count must be at least 0");
  REFUSED(qtr_extract_outliers, outliers(), a.count = 31, "[extract_outliers] count must not exceed");
  REFUSED(qtr_extract_outliers, outliers(), (a.per_row = 1, a.count = 11),
          "must not exceed the length of a row");
  REFUSED(qtr_extract_outliers, outliers(), a.remainder.rows = 1,
          "remainder must have the shape and dtype of w");
  REFUSED(qtr_extract_outliers, outliers(), a.remainder.dtype = QTR_F16,
          "must have the shape and dtype of w");
  REFUSED(qtr_extract_outliers, outliers(), a.values = nullptr,
          "values, columns and row_offsets must not be null");
  REFUSED(qtr_extract_outliers, outliers(), a.row_offsets = nullptr, "row_offsets must not be null");
  const int64_t falling[4] = {3, 2, 5, 6}, outside[4] = {1, 2, 3, 30}, negative[4] = {-1, 2, 3, 4};
  REFUSED(qtr_extract_outliers, outliers(), a.indices = falling, "indices must ascend, each given once");
  REFUSED(qtr_extract_outliers, outliers(), a.indices = outside, "indices must be within w: got index=30");
  REFUSED(qtr_extract_outliers, outliers(), a.indices = negative, "indices must be within w: got index=-1");
  REFUSED(qtr_extract_outliers, outliers(), (a.per_row = 1, a.indices = falling), "of the whole matrix");
}

TEST_F(CApi, Csr) {
  const auto with_offsets = [&](int32_t a, int32_t b, int32_t c, int32_t d) {
    qtr_check_csr_args args = csr();
    const int32_t offsets[] = {a, b, c, d};
    std::copy_n(offsets, 4, offsets_);
    return args;
  };
  const auto with_columns = [&](uint16_t a, uint16_t b) {
    qtr_check_csr_args args = csr();
    columns_[0] = a;
    columns_[1] = b;
    return args;
  };
  REFUSED(qtr_check_csr, csr(), a.csr.rows = 0, "[csr] shape must not be empty");
  REFUSED(qtr_check_csr, csr(), a.csr.nnz = -1, "[csr] nnz must be at least 0");
  REFUSED(qtr_check_csr, csr(), a.csr.columns = nullptr,
          "[csr] values, columns and row_offsets must not be null");
  REFUSED(qtr_check_csr, with_offsets(1, 2, 2, 4), , "[csr] row_offsets must begin with 0");
  REFUSED(qtr_check_csr, with_offsets(0, 2, 2, 3), , "[csr] row_offsets must end with the number of values");
  REFUSED(qtr_check_csr, with_offsets(0, 2, 1, 4), , "[csr] row_offsets must not fall");
  REFUSED(qtr_check_csr, with_offsets(0, -1, 2, 4), , "[csr] row_offsets must not fall");
  REFUSED(qtr_check_csr, with_offsets(0, 9, 9, 4), , "[csr] row_offsets must not fall");
  REFUSED(qtr_check_csr, with_columns(3, 3), , "[csr] columns of a row must ascend");
  REFUSED(qtr_check_csr, with_columns(3, 10), ,
          "[csr] columns must be within the shape: got row=0, column=10");
}

TEST_F(CApi, Grid) {
  REFUSED(qtr_quantize, quantize(), a.bits = 0, "[quantize] bits must be 1 to 8");
  REFUSED(qtr_quantize, quantize(), a.bits = 9, "[quantize] bits must be 1 to 8");
  REFUSED(qtr_quantize, quantize(), a.group_size = 0, "[quantize] group_size must be");
  REFUSED(qtr_quantize, quantize(), a.group_size = -2, "[quantize] group_size must be");
  REFUSED(qtr_quantize, quantize(), (a.axis = 0, a.group_size = 7), "[quantize] group_size must");
  REFUSED(qtr_quantize, quantize(), a.axis = 2, "[quantize] axis must be 0 or 1");
  REFUSED(qtr_quantize, quantize(), a.solver = static_cast<qtr_grid_solver>(3), "[quantize] solver must be");
  REFUSED(qtr_quantize, quantize(), (a.sym = 1, a.solver = QTR_HQQ), "[quantize] ");
  REFUSED(qtr_quantize, quantize(), a.codes = nullptr, "[quantize] ");
  REFUSED(qtr_quantize, quantize(), a.codes_size = 17, "[quantize] codes must hold all packed rows");
  REFUSED(qtr_quantize, quantize(), a.scale = nullptr, "[quantize] ");
  REFUSED(qtr_quantize, quantize(), a.zero = nullptr, "[quantize] ");
  REFUSED(qtr_quantize, quantize(), a.groups = 8, "[quantize] ");
  const int64_t offsets[4] = {0, 1, 1, 1}, falling[4] = {0, 1, 0, 1};
  const int32_t outside[1] = {10}, inside[1] = {1};
  REFUSED(qtr_quantize, quantize(), (a.exclude_row_offsets = offsets, a.exclude_columns = outside),
          "[quantize] ");
  REFUSED(qtr_quantize, quantize(), (a.exclude_row_offsets = falling, a.exclude_columns = inside),
          "[quantize] ");
  w_[7] = INFINITY;
  REFUSED(qtr_quantize, quantize(), , "[quantize] w must be finite");
  REFUSED(qtr_dequantize, dequantize(), a.codes = nullptr, "[dequantize] ");
  REFUSED(qtr_dequantize, dequantize(), a.codes_size = 0, "[dequantize] codes must hold all packed rows");
  REFUSED(qtr_dequantize, dequantize(), a.bits = 16, "[dequantize] bits must be 1 to 8");
  REFUSED(qtr_dequantize, dequantize(), a.group_size = 0, "[dequantize] group_size must be");
  REFUSED(qtr_dequantize, dequantize(), a.scale.rows = 2,
          "[dequantize] scale and zero must hold one number for each group");
  REFUSED(qtr_dequantize, dequantize(), a.zero.rows = 1,
          "[dequantize] scale and zero must hold one number for each group");
  REFUSED(qtr_dequantize, dequantize(), a.out.data = nullptr, "[dequantize] out must not be null");
}

TEST_F(CApi, Matvec) {
  REFUSED(qtr_matvec, matvec(), a.w.codes = nullptr, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.w.codes_size = 1, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.w.bits = 0, "[matvec] bits must be 1 to 8");
  REFUSED(qtr_matvec, matvec(), a.w.rows = 0, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.w.rows = INT64_MAX, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.w.group_size = 0, "[matvec] group_size must be");
  REFUSED(qtr_matvec, matvec(), a.w.scale.rows = 1, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.x.cols = 9, "[matvec] x must have as many numbers as w has columns");
  REFUSED(qtr_matvec, matvec(), a.x.dtype = static_cast<qtr_dtype>(-1), "[matvec] x must be float32");
  REFUSED(qtr_matvec, matvec(), a.out.cols = 2, "[matvec] out must have a row for each vector");
  REFUSED(qtr_matvec, matvec(), a.out.dtype = static_cast<qtr_dtype>(-1), "[matvec] out must be float32");
  REFUSED(qtr_matvec, matvec(), a.residuals.rows = 2, "[matvec] residuals must have the shape of w");
  REFUSED(qtr_matvec, matvec(), a.residuals.dtype = QTR_F16, "[matvec] residuals must be float32");
  REFUSED(qtr_residuals, residuals(), a.outliers.cols = 9, "[");
  REFUSED(qtr_residuals, residuals(), a.outliers.dtype = static_cast<qtr_dtype>(7),
          "[residuals] outliers must be");
  REFUSED(qtr_residuals, residuals(), a.out = nullptr, "[residuals] out must not be null");
  REFUSED(qtr_residuals, residuals(), offsets_[1] = -1, "[csr] row_offsets must not fall");
}

TEST_F(CApi, AllocateAndKmeans) {
  REFUSED(qtr_allocate, allocate(), a.items = -1, "[allocate] items must be at least 1");
  REFUSED(qtr_allocate, allocate(), a.budget = 1, "[allocate] the smallest choice must be within the budget");
  REFUSED(qtr_allocate, allocate(), a.chosen = nullptr, "[allocate] chosen must not be null");
  REFUSED(qtr_kmeans, kmeans(), a.k = 0, "[kmeans] k must be 1 to 256");
  REFUSED(qtr_kmeans, kmeans(), a.k = 257, "[kmeans] k must be 1 to 256");
  REFUSED(qtr_kmeans, kmeans(), a.weights = in(w_, 1, kCols), "[kmeans] weights must have the shape of x");
  REFUSED(qtr_kmeans, kmeans(), a.weights = in(w_, kRows, kCols), "[kmeans] weights must");
  REFUSED(qtr_kmeans, kmeans(), a.centroids.rows = 2, "[kmeans] centroids must be float32 of k for each row");
  REFUSED(qtr_kmeans, kmeans(), a.assignment = nullptr, "[kmeans] assignment");
}

TEST_F(CApi, AnErrorStaysUntilTheNextCall) {
  qtr_moments_args bad = moments();
  bad.x.rows = 0;
  EXPECT_EQ(qtr_compute_moments(&bad), QTR_INVALID_ARGUMENT);
  EXPECT_STRNE(qtr_last_error(), "");
  const qtr_moments_args good = moments();
  EXPECT_EQ(qtr_compute_moments(&good), QTR_OK);
  EXPECT_STREQ(qtr_last_error(), "");
}

struct Executed {
  int calls = 0;
  int64_t tasks = 0;
  static void run(void* context, int64_t count, void (*task)(void*, int64_t), void* task_context) {
    auto* self = static_cast<Executed*>(context);
    ++self->calls;
    self->tasks += count;
    for (int64_t i = count; i-- > 0;) task(task_context, i);
  }
};

TEST_F(CApi, TheExecutorRunsTheWork) {
  Executed executed;
  const qtr_executor executor{sizeof(qtr_executor), &executed, 2, Executed::run};
  EXPECT_EQ(qtr_set_executor(&executor), QTR_OK);
  std::vector<float> x(1 << 20, 1.0f);
  qtr_moments out;
  const qtr_moments_args args{sizeof(args), in(x.data(), 1, 1 << 20), QTR_OVER_TENSOR, -1, &out, 1};
  EXPECT_EQ(qtr_compute_moments(&args), QTR_OK);
  EXPECT_EQ(qtr_set_executor(nullptr), QTR_OK);
  EXPECT_EQ(out.mean, 1.0);
  EXPECT_GT(executed.calls, 0);
  EXPECT_GT(executed.tasks, 1);
  REFUSED(qtr_set_executor, executor, a.run = nullptr, "[set_executor] run must not be null");
  REFUSED(qtr_set_executor, executor, a.concurrency = 0, "[set_executor] concurrency must be at least 1");
  REFUSED(qtr_set_executor, executor, a.struct_size = 0, "[args] struct_size");
}

struct Heard {
  std::vector<std::string> lines;
  static void write(void* context, qtr_log_level level, const char* message) {
    static_cast<Heard*>(context)->lines.push_back(std::to_string(level) + " " + message);
  }
};

TEST_F(CApi, TheLogHookHearsWhatIsAtItsLevel) {
  Heard heard;
  const std::string before = qtr_get_target();  // the first question is logged, too
  qtr_log_hook hook{sizeof(qtr_log_hook), &heard, QTR_LOG_INFO, Heard::write};
  EXPECT_EQ(qtr_set_log_hook(&hook), QTR_OK);
  EXPECT_EQ(qtr_set_target("reference"), QTR_OK);
  EXPECT_EQ(qtr_set_target("nothing"), QTR_INVALID_ARGUMENT);
  hook.level = QTR_LOG_ERROR;
  EXPECT_EQ(qtr_set_log_hook(&hook), QTR_OK);
  EXPECT_EQ(qtr_set_target(before.c_str()), QTR_OK);
  EXPECT_EQ(qtr_set_num_threads(-3), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_log_hook(nullptr), QTR_OK);
  EXPECT_EQ(qtr_set_num_threads(-4), QTR_INVALID_ARGUMENT);
  ASSERT_EQ(heard.lines.size(), 3u);
  EXPECT_EQ(heard.lines[0], "1 [target] kernels of the set reference run");
  EXPECT_NE(heard.lines[1].find("3 [target] this CPU and build have no such kernel set"), std::string::npos);
  EXPECT_EQ(heard.lines[2], "3 [set_num_threads] count must be at least 1: got count=-3");
  REFUSED(qtr_set_log_hook, hook, a.write = nullptr, "[set_log_hook] write must not be null");
  REFUSED(qtr_set_log_hook, hook, a.level = static_cast<qtr_log_level>(4), "[set_log_hook] level must be");
}

TEST_F(CApi, Runtime) {
  EXPECT_EQ(std::count(qtr_version(), qtr_version() + std::strlen(qtr_version()), '.'), 2);
  EXPECT_EQ(qtr_set_target("nothing"), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_target(nullptr), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_target(std::string(qtr_get_target()).c_str()), QTR_OK);
  EXPECT_EQ(qtr_set_num_threads(0), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_num_threads(qtr_get_num_threads()), QTR_OK);
  EXPECT_EQ(qtr_set_executor(nullptr), QTR_OK);
}

}  // namespace
