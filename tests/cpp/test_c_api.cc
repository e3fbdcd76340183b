#include "quantrature/c_api.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <regex>
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
    std::fill_n(tokens_, kTile, 1.0f);
    for (int64_t i = 0; i < 1 << kBits; ++i) table_[i] = static_cast<float>(i) - 3;
    for (int64_t i = 0; i < kCols; ++i) hessian_[i * kCols + i] = 1;
    for (int64_t i = 0; i < kBlock; ++i) wide_[i] = static_cast<float>(i);
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
  // The same codes, of a codebook.
  qtr_matvec_args matvec_of_codebook() {
    qtr_matvec_args args = matvec();
    args.w.zero = {};
    args.table = in(table_, 1, 1 << kBits);
    return args;
  }
  qtr_residuals_args residuals_of_codebook() {
    qtr_residuals_args args = residuals();
    args.w.zero = {};
    args.table = in(table_, 1, 1 << kBits);
    return args;
  }
  qtr_allocate_args allocate() {
    return {
        sizeof(qtr_allocate_args), costs_, sizes_, options_, 2, 3, 0, 0, indices_, nullptr, nullptr, nullptr};
  }
  qtr_kmeans_args kmeans() {
    return {sizeof(qtr_kmeans_args), in(w_, kRows, kCols), {}, 2, out(result_, kRows, 2), assignment_};
  }
  qtr_round_to_half_args round_to_half() {
    return {sizeof(qtr_round_to_half_args), w_, kCols, halves_, &smallest_, &largest_};
  }
  qtr_codebook_quantize_args codebook_quantize() {
    return {sizeof(qtr_codebook_quantize_args),
            in(w_, kRows, kCols),
            kBits,
            kGroup,
            in(table_, 1, 1 << kBits),
            nullptr,
            nullptr,
            packed_,
            kRows * kRowBytes,
            scale_,
            kRows * kGroups};
  }
  qtr_codebook_dequantize_args codebook_dequantize() {
    return {sizeof(qtr_codebook_dequantize_args),
            packed_,
            kRows * kRowBytes,
            kBits,
            kGroup,
            in(table_, 1, 1 << kBits),
            in(scale_, kRows, kGroups),
            out(result_, kRows, kCols)};
  }
  qtr_random_signs_args random_signs() { return {sizeof(qtr_random_signs_args), 1, kCols, signs_}; }
  qtr_hadamard_args hadamard() {
    return {sizeof(qtr_hadamard_args), in(w_, kRows, kCols), signs_, 0, out(result_, kRows, kCols)};
  }
  qtr_trellis_values_args trellis_values() {
    return {sizeof(qtr_trellis_values_args), QTR_HYB, kStateBits, states_, 2 << kStateBits};
  }
  // One sequence of 16 weights of 2 bits, and one tile of 16 x 16.
  qtr_trellis_quantize_args trellis_quantize() {
    return {sizeof(qtr_trellis_quantize_args), in(w_, 1, kTile), {QTR_HYB, 2, kStateBits}, 1, stream_, 4};
  }
  qtr_trellis_dequantize_args trellis_dequantize() {
    return {
        sizeof(qtr_trellis_dequantize_args), stream_, 4, {QTR_HYB, 2, kStateBits}, 1, out(result_, 1, kTile)};
  }
  qtr_trellis_matvec_args trellis_matvec() {
    return {sizeof(qtr_trellis_matvec_args),
            stream_,
            sizeof(stream_),
            kTile,
            kTile,
            {QTR_HYB, 2, kStateBits},
            1,
            in(tokens_, 1, kTile),
            out(result_, 1, kTile)};
  }
  qtr_hessian_accumulate_args hessian_accumulate() {
    return {sizeof(qtr_hessian_accumulate_args), out(sum_, kCols, kCols), in(w_, kRows, kCols)};
  }
  qtr_gptq_args gptq() {
    return {sizeof(qtr_gptq_args),
            in(w_, kRows, kCols),
            hessian_,
            kCols * kCols,
            kBits,
            kGroup,
            in(scale_, kRows, kGroups),
            in(zero_, kRows, kGroups),
            0.01,
            0,
            nullptr,
            nullptr,
            packed_,
            kRows * kRowBytes,
            &gptq_,
            nullptr,
            nullptr,
            0,
            QTR_MINMAX,
            0};
  }
  qtr_gptq_args fitting_gptq() {
    qtr_gptq_args a = gptq();
    a.scale = a.zero = {};
    a.fitted_scale = scale_;
    a.fitted_zero = zero_;
    a.fitted_size = kRows * kGroups;
    a.half = 1;
    return a;
  }

  // One row of one block.
  qtr_gguf_quantize_args gguf_quantize() {
    return {sizeof(qtr_gguf_quantize_args),
            in(wide_, 1, kBlock),
            QTR_GGUF_Q4_0,
            in(wide_, 1, kBlock),
            blocks_,
            18};
  }
  qtr_gguf_dequantize_args gguf_dequantize() {
    return {sizeof(qtr_gguf_dequantize_args), blocks_, 18, QTR_GGUF_Q4_0, out(wide_result_, 1, kBlock)};
  }

  static constexpr int64_t kTile = 16, kBlock = 32;
  static constexpr int32_t kStateBits = 6;
  float wide_[kBlock]{}, wide_result_[kBlock]{};
  uint8_t blocks_[18]{};
  float tokens_[kTile], table_[1 << kBits], hessian_[kCols * kCols]{}, sum_[kCols * kCols]{},
      smallest_ = 0, largest_ = 0, states_[2 << kStateBits]{};
  uint8_t signs_[(kCols + 7) / 8]{}, stream_[kTile * kTile * 2 / 8]{};
  uint16_t halves_[kCols]{};
  qtr_gptq_result gptq_{};
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
  static const std::regex form(R"(\[\w+\] [^:\n]+: got [\w.\[\] ]+=[^=]+(, [\w.\[\] ]+=[^=]+)*)");
  EXPECT_TRUE(std::regex_match(qtr_last_error(), form)) << qtr_last_error();
}

// What holds for every function: null, sizes never set, older and newer callers.
template <class Args>
void expect_sound(qtr_status (*function)(const Args*), const Args& good) {
  EXPECT_EQ(function(&good), QTR_OK) << qtr_last_error();
  EXPECT_STREQ(qtr_last_error(), "");
  EXPECT_EQ(function(nullptr), QTR_INVALID_ARGUMENT);
  EXPECT_NE(std::string(qtr_last_error()).find("[args] args must not be null: got args=null"),
            std::string::npos);

  for (const size_t size : {size_t{0}, size_t{7}, size_t{4097}, std::numeric_limits<size_t>::max()}) {
    Args args = good;
    args.struct_size = size;
    expect_refused(
        function, args,
        "[args] struct_size must be set to the size of the struct: got struct_size=" + std::to_string(size));
  }
  {  // an older caller that knew nothing but the size: everything reads as zero, which the op refuses
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
  expect_sound(qtr_residuals, residuals_of_codebook());
  expect_sound(qtr_matvec, matvec_of_codebook());
  expect_sound(qtr_allocate, allocate());
  expect_sound(qtr_kmeans, kmeans());
  expect_sound(qtr_round_to_half, round_to_half());
  expect_sound(qtr_codebook_quantize, codebook_quantize());
  expect_sound(qtr_codebook_dequantize, codebook_dequantize());
  expect_sound(qtr_random_signs, random_signs());
  expect_sound(qtr_hadamard, hadamard());
  expect_sound(qtr_trellis_values, trellis_values());
  expect_sound(qtr_trellis_quantize, trellis_quantize());
  expect_sound(qtr_trellis_dequantize, trellis_dequantize());
  expect_sound(qtr_trellis_matvec, trellis_matvec());
  expect_sound(qtr_hessian_accumulate, hessian_accumulate());
  expect_sound(qtr_gptq, gptq());
  expect_sound(qtr_gptq, fitting_gptq());
  expect_sound(qtr_gguf_quantize, gguf_quantize());
  expect_sound(qtr_gguf_dequantize, gguf_dequantize());
}

// With the unit matrix as Hessian no column makes up for another: the grids fit the matrix as it is.
TEST_F(CApi, GptqFitsTheGridsItIsNotGiven) {
  qtr_gptq_args fitting = fitting_gptq();
  ASSERT_EQ(qtr_gptq(&fitting), QTR_OK) << qtr_last_error();
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t group = 0; group < kGroups; ++group) {
      float low = w_[row * kCols + group * kGroup], high = low;
      for (int64_t col = group * kGroup; col < std::min((group + 1) * kGroup, kCols); ++col) {
        low = std::min(low, w_[row * kCols + col]);
        high = std::max(high, w_[row * kCols + col]);
      }
      const int64_t place = row * kGroups + group;
      EXPECT_NEAR(scale_[place], (high - low) / ((1 << kBits) - 1), 1e-3 * (high - low)) << place;
      EXPECT_NEAR(zero_[place], -low / scale_[place], 1e-2) << place;
    }
}

// An older program, which knows no fitted grids, is given none.
TEST_F(CApi, AShorterGptqStructHasItsOwnGrid) {
  qtr_gptq_args a = fitting_gptq();
  a.struct_size = offsetof(qtr_gptq_args, fitted_scale);
  expect_refused(qtr_gptq, a, "[gptq] scale must not be empty");
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
  expect_refused(qtr_compute_moments, m, "[moments] out must not be null: got out=null");
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
  REFUSED(qtr_compute_moments, moments(), a.out = nullptr, "[moments] out must not be null: got out=null");
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
  REFUSED(qtr_pqi_sum, sum(), a.w.data = nullptr, "[pqi_sum] w must not be null: got w=null");
  REFUSED(qtr_pqi_sum, sum(), a.w_quantized.rows = 1, "[pqi_sum] w_quantized must have the shape");
  REFUSED(qtr_pqi_sum, sum(), a.out = nullptr, "[pqi_sum] out must not be null: got out=null");
  REFUSED(qtr_interpolate, interpolate(), a.t = INFINITY, "[interpolate] t must be finite");
  REFUSED(qtr_interpolate, interpolate(), a.out.rows = 1, "[interpolate] out must have the shape");
}

TEST_F(CApi, Packing) {
  REFUSED(qtr_pack, pack(), a.codes = nullptr, "[pack] codes must not be null: got codes=null");
  REFUSED(qtr_pack, pack(), a.packed = nullptr, "[pack] packed must not be null: got packed=null");
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
  REFUSED(qtr_unpack, unpack(), a.packed = nullptr, "[unpack] packed must not be null: got packed=null");
  REFUSED(qtr_unpack, unpack(), a.row_bytes = 7,
          "[unpack] packed must have row_bytes(cols, bits) bytes a row");
  REFUSED(qtr_unpack, unpack(), a.bits = -1, "[unpack] bits must be 1 to 8");
}

TEST_F(CApi, Topk) {
  REFUSED(qtr_topk, topk(), a.x = nullptr, "[topk] x must not be null: got x=null");
  REFUSED(qtr_topk, topk(), a.x_count = 0, "[topk] x must");
  REFUSED(qtr_topk, topk(), a.k = -1, "[topk] k must");
  REFUSED(qtr_topk, topk(), a.k = 31, "[topk] k must");
  REFUSED(qtr_topk, topk(), a.key = static_cast<qtr_topk_key>(2), "[topk] key must");
  REFUSED(qtr_topk, topk(), a.indices = nullptr, "[topk] indices must not be null: got indices=null");
  REFUSED(qtr_topk, topk(), a.values = nullptr, "[topk] values must not be null: got values=null");
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
          "[extract_outliers] values must not be null: got values=null");
  REFUSED(qtr_extract_outliers, outliers(), a.row_offsets = nullptr,
          "[extract_outliers] row_offsets must not be null: got row_offsets=null");
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
  REFUSED(qtr_check_csr, csr(), a.csr.columns = nullptr, "[csr] columns must not be null: got columns=null");
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
  REFUSED(qtr_quantize, quantize(), a.solver = static_cast<qtr_grid_solver>(9), "[quantize] solver must be");
  REFUSED(qtr_quantize, quantize(), (a.sym = 1, a.solver = QTR_HQQ), "[quantize] ");
  REFUSED(qtr_quantize, quantize(), a.codes = nullptr, "[quantize] codes must not be null: got codes=null");
  REFUSED(qtr_quantize, quantize(), a.codes_size = 17, "[quantize] codes must hold all packed rows");
  REFUSED(qtr_quantize, quantize(), a.scale = nullptr, "[quantize] scale must not be null: got scale=null");
  REFUSED(qtr_quantize, quantize(), a.zero = nullptr, "[quantize] zero must not be null: got zero=null");
  REFUSED(qtr_quantize, quantize(), a.groups = 8, "[quantize] ");
  const int64_t offsets[4] = {0, 1, 1, 1}, falling[4] = {0, 1, 0, 1};
  const int32_t outside[1] = {10}, inside[1] = {1};
  REFUSED(qtr_quantize, quantize(), (a.exclude_row_offsets = offsets, a.exclude_columns = outside),
          "[quantize] ");
  REFUSED(qtr_quantize, quantize(), (a.exclude_row_offsets = falling, a.exclude_columns = inside),
          "[quantize] ");
  w_[7] = INFINITY;
  REFUSED(qtr_quantize, quantize(), , "[quantize] w must be finite");
  REFUSED(qtr_dequantize, dequantize(), a.codes = nullptr,
          "[dequantize] codes must not be null: got codes=null");
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
  REFUSED(qtr_matvec, matvec(), a.w.codes = nullptr, "[matvec] codes must not be null: got codes=null");
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
  REFUSED(qtr_matvec, matvec(), a.x.data = nullptr, "[matvec] x must not be null");
  REFUSED(qtr_matvec, matvec(), a.out.data = nullptr, "[matvec] out must not be null");
  REFUSED(qtr_matvec, matvec(), a.out.rows = 2, "[matvec] out must have a row for each vector");
  REFUSED(qtr_matvec, matvec(), a.activations = static_cast<qtr_activations>(2),
          "[matvec] activations must be float32 or int8: got activations=2");
  REFUSED(qtr_matvec, matvec(), a.w.zero.rows = 1, "[matvec] ");
  REFUSED(qtr_matvec, matvec(), a.w.scale.dtype = static_cast<qtr_dtype>(3),
          "[matvec] scale must be float32");
  REFUSED(qtr_matvec, matvec(), a.residuals.rows = 2, "[matvec] residuals must have the shape of w");
  REFUSED(qtr_matvec, matvec(), a.residuals.dtype = QTR_F16, "[matvec] residuals must be float32");
  REFUSED(qtr_residuals, residuals(), a.outliers.cols = 9, "[");
  REFUSED(qtr_residuals, residuals(), a.outliers.dtype = static_cast<qtr_dtype>(7),
          "[residuals] outliers must be");
  REFUSED(qtr_residuals, residuals(), a.out = nullptr, "[residuals] out must not be null: got out=null");
  REFUSED(qtr_residuals, residuals(), offsets_[1] = -1, "[csr] row_offsets must not fall");

  const auto spoil = [&](auto&& change, const std::string& text) {
    REFUSED(qtr_matvec, matvec_of_codebook(), change(a), "[matvec] " + text);
    REFUSED(qtr_residuals, residuals_of_codebook(), change(a), "[residuals] " + text);
  };
  spoil([](auto& a) { a.w.bits = 9; }, "bits must be 1 to 8: got bits=9");
  spoil([](auto& a) { a.table.cols = 4; }, "table must have 2^bits entries: got entries=4, bits=3");
  spoil([](auto& a) { a.table.rows = 2; }, "table must have one row, or one for each row: got rows=2");
  spoil([](auto& a) { a.table.dtype = static_cast<qtr_dtype>(3); }, "table must be float32");
  spoil([](auto& a) { a.w.group_size = -2; }, "group_size must be -1, 0 or at least 1: got group_size=-2");
  spoil([](auto& a) { a.w.group_size = 0; }, "scale must be there if and only if there are groups");
  spoil([](auto& a) { a.w.scale = {}; }, "scale must be there if and only if there are groups");
  spoil([](auto& a) { a.w.zero = a.w.scale; }, "zero must not be given with a table");
  spoil([](auto& a) { a.w.scale.rows = 1; }, "scale and zero must hold one number for each group");
}

TEST_F(CApi, AllocateAndKmeans) {
  REFUSED(qtr_allocate, allocate(), a.items = -1, "[allocate] items must be at least 1");
  REFUSED(qtr_allocate, allocate(), a.budget = 1, "[allocate] the smallest choice must be within the budget");
  REFUSED(qtr_allocate, allocate(), a.chosen = nullptr,
          "[allocate] chosen must not be null: got chosen=null");
  REFUSED(qtr_allocate, allocate(), a.costs = nullptr, "[allocate] costs must not be null: got costs=null");
  REFUSED(qtr_allocate, allocate(), a.sizes = nullptr, "[allocate] sizes must not be null: got sizes=null");
  REFUSED(qtr_allocate, allocate(), a.option_offsets = nullptr,
          "[allocate] option_offsets must not be null: got option_offsets=null");
  REFUSED(qtr_allocate, allocate(), a.items = 0, "[allocate] items must be at least 1");
  REFUSED(qtr_allocate, allocate(), a.relative_gap = -1, "[allocate] relative_gap must be finite");
  REFUSED(qtr_allocate, allocate(), a.relative_gap = NAN, "[allocate] relative_gap must be finite");
  REFUSED(qtr_allocate, allocate(), a.max_states = -1, "[allocate] max_states must be 0 to 2^24");
  REFUSED(qtr_allocate, allocate(), a.max_states = INT64_MAX, "[allocate] max_states must be 0 to 2^24");
  const int64_t late[3] = {1, 2, 4}, level[3] = {0, 0, 4}, falling[3] = {0, 2, 1};
  REFUSED(qtr_allocate, allocate(), a.option_offsets = late, "[allocate] option_offsets must begin with 0");
  REFUSED(qtr_allocate, allocate(), a.option_offsets = level, "[allocate] option_offsets must rise");
  REFUSED(qtr_allocate, allocate(), a.option_offsets = falling,
          "[allocate] option_offsets must rise, since each item has an option: got item=1, from=2, to=1");
  const double infinite[4] = {1, 0, INFINITY, 0}, huge[4] = {1e308, 0, 1e308, 0};
  REFUSED(qtr_allocate, allocate(), a.costs = infinite, "[allocate] costs must be finite: got item=1");
  REFUSED(qtr_allocate, allocate(), a.costs = huge, "[allocate] costs must add up to a finite number");
  const int64_t negative[4] = {1, -2, 1, 2}, vast[4] = {1, INT64_MAX / 2, 1, INT64_MAX / 2};
  REFUSED(qtr_allocate, allocate(), a.sizes = negative, "[allocate] sizes must be at least 0");
  REFUSED(qtr_allocate, allocate(), a.sizes = vast, "[allocate] sizes must add up to at most 2^62");
  REFUSED(qtr_kmeans, kmeans(), a.x.data = nullptr, "[kmeans] x must not be null");
  REFUSED(qtr_kmeans, kmeans(), a.centroids.dtype = QTR_F16, "[kmeans] centroids must be float32");
  REFUSED(qtr_kmeans, kmeans(), a.k = 0, "[kmeans] k must be 1 to 256");
  REFUSED(qtr_kmeans, kmeans(), a.k = 257, "[kmeans] k must be 1 to 256");
  REFUSED(qtr_kmeans, kmeans(), a.weights = in(w_, 1, kCols), "[kmeans] weights must have the shape of x");
  REFUSED(qtr_kmeans, kmeans(), a.weights = in(w_, kRows, kCols), "[kmeans] weights must");
  REFUSED(qtr_kmeans, kmeans(), a.centroids.rows = 2, "[kmeans] centroids must be float32 of k for each row");
  REFUSED(qtr_kmeans, kmeans(), a.assignment = nullptr,
          "[kmeans] assignment must not be null: got assignment=null");
}

TEST_F(CApi, GgufNamesWhatIsWrong) {
  const auto any_type = static_cast<qtr_gguf_type>(9);
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.w.data = nullptr, "[gguf] w must not be null");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.type = any_type, "[gguf] type must be that of Q4_0, ");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.type = QTR_GGUF_Q4_K,
          "[gguf] a matrix of type Q4_K must have columns in blocks of 256; choose another type (Q4_0, ");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.w.cols = 31,
          "[gguf] a matrix of type Q4_0 must have columns in blocks of 32");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.weights.cols = 31,
          "[gguf] weights must have the columns of w");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.weights.dtype = QTR_BF16, "[gguf] weights must be float32");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.data = nullptr, "[gguf] data must not be null");
  REFUSED(qtr_gguf_quantize, gguf_quantize(), a.data_size = 17,
          "[gguf] data must hold all blocks of all rows");
  REFUSED(qtr_gguf_dequantize, gguf_dequantize(), a.data = nullptr, "[gguf] data must not be null");
  REFUSED(qtr_gguf_dequantize, gguf_dequantize(), a.data_size = 36,
          "[gguf] data must hold all blocks of all rows");
  REFUSED(qtr_gguf_dequantize, gguf_dequantize(), a.type = any_type, "[gguf] type must be that of Q4_0, ");
  REFUSED(qtr_gguf_dequantize, gguf_dequantize(), a.out.data = nullptr, "[gguf] out must not be null");
  REFUSED(qtr_gguf_dequantize, gguf_dequantize(), a.out.dtype = QTR_F16, "[gguf] out must be float32");
  wide_[3] = -1;
  REFUSED(qtr_gguf_quantize, gguf_quantize(), (void)a,
          "[gguf] weights must be finite and not negative: got weight=-1, row=0, col=3");
  std::fill_n(wide_, kBlock, 0.0f);
  REFUSED(qtr_gguf_quantize, gguf_quantize(), (void)a, "[gguf] weights must not all be 0: got largest=0");
  wide_[5] = NAN;
  REFUSED(qtr_gguf_quantize, gguf_quantize(), (void)a,
          "[gguf] w must be finite: got value=nan, row=0, col=5");
}

TEST_F(CApi, RoundToHalf) {
  REFUSED(qtr_round_to_half, round_to_half(), a.count = 0, "[round_to_half] count must be at least 1");
  REFUSED(qtr_round_to_half, round_to_half(), a.count = INT64_MAX,
          "[round_to_half] values is larger than memory can be");
  REFUSED(qtr_round_to_half, round_to_half(), a.values = nullptr,
          "[round_to_half] values must not be null: got values=null");
  REFUSED(qtr_round_to_half, round_to_half(), a.halves = nullptr,
          "[round_to_half] halves must not be null: got halves=null");
  REFUSED(qtr_round_to_half, round_to_half(), a.smallest = nullptr,
          "[round_to_half] smallest must not be null: got smallest=null");
  REFUSED(qtr_round_to_half, round_to_half(), a.largest = nullptr,
          "[round_to_half] largest must not be null: got largest=null");
}

TEST_F(CApi, Codebook) {
  const auto spoil_quantize = [&](auto&& spoil, const char* text) {
    REFUSED(qtr_codebook_quantize, codebook_quantize(), spoil(a), text);
  };
  const auto spoil_dequantize = [&](auto&& spoil, const char* text) {
    REFUSED(qtr_codebook_dequantize, codebook_dequantize(), spoil(a), text);
  };
  const auto spoil_both = [&](auto&& spoil, const char* text) {
    spoil_quantize(spoil, text);
    spoil_dequantize(spoil, text);
  };
  spoil_both([](auto& a) { a.bits = 0; }, "[codebook] bits must be 1 to 8: got bits=0");
  spoil_both([](auto& a) { a.bits = 9; }, "[codebook] bits must be 1 to 8: got bits=9");
  spoil_both([](auto& a) { a.bits = 2; }, "[codebook] table must have 2^bits entries: got entries=8, bits=2");
  spoil_both([](auto& a) { a.table.data = nullptr; }, "[codebook] table must not be null");
  spoil_both([](auto& a) { a.table.rows = 2; }, "[codebook] table must have one row, or one for each row");
  spoil_both([](auto& a) { a.table.dtype = static_cast<qtr_dtype>(3); }, "[codebook] table must be float32");
  spoil_both([](auto& a) { a.group_size = -2; }, "[codebook] group_size must be -1, 0 or at least 1");
  spoil_both([](auto& a) { a.group_size = 0; }, "[codebook] scale must");
  spoil_both([](auto& a) { a.codes = nullptr; }, "[codebook] codes must not be null");
  spoil_both([](auto& a) { a.codes_size = 17; }, "[codebook] codes must hold all packed rows");
  spoil_quantize([](auto& a) { a.w.data = nullptr; }, "[codebook] w must not be null");
  spoil_quantize([](auto& a) { a.w.rows = int64_t{1} << 60; }, "[codebook] w is larger than memory can be");
  spoil_quantize([](auto& a) { a.scale = nullptr; }, "[codebook] scale must hold one number for each group");
  spoil_quantize([](auto& a) { a.groups = 8; }, "[codebook] scale must hold one number for each group");
  const int64_t late[4] = {1, 1, 1, 1}, falling[4] = {0, 1, 0, 1}, good[4] = {0, 1, 1, 1};
  const int32_t inside[1] = {1}, outside[1] = {10}, negative[1] = {-1};
  const auto exclude = [&](const int64_t* offsets, const int32_t* columns, const char* text) {
    spoil_quantize([&](auto& a) { a.exclude_row_offsets = offsets, a.exclude_columns = columns; }, text);
  };
  exclude(good, nullptr, "[codebook] exclude_columns must not be null");
  exclude(late, inside, "[codebook] exclude must have row_offsets from 0");
  exclude(falling, inside, "[codebook] exclude must have row_offsets that ascend");
  exclude(good, outside, "[codebook] exclude must lie within w: got row=0, col=10");
  exclude(good, negative, "[codebook] exclude must lie within w: got row=0, col=-1");
  spoil_dequantize([](auto& a) { a.scale.data = nullptr; }, "[codebook] scale must be there if");
  spoil_dequantize([](auto& a) { a.scale.rows = 2; }, "[codebook] scale must hold one number for each group");
  spoil_dequantize([](auto& a) { a.scale.row_stride = 4; }, "[codebook] scale must hold one number");
  spoil_dequantize([](auto& a) { a.out.data = nullptr; }, "[codebook] out must not be null");
  table_[7] = INFINITY;
  spoil_quantize([](auto&) {}, "[codebook] table must be finite");
  table_[7] = 4;
  w_[7] = NAN;
  spoil_quantize([](auto&) {}, "[codebook] w must be finite");
}

TEST_F(CApi, Hadamard) {
  REFUSED(qtr_random_signs, random_signs(), a.count = 0, "[random_signs] count must be at least 1");
  REFUSED(qtr_random_signs, random_signs(), a.count = INT64_MAX,
          "[random_signs] signs is larger than memory can be");
  REFUSED(qtr_random_signs, random_signs(), a.signs = nullptr,
          "[random_signs] signs must not be null: got signs=null");
  REFUSED(qtr_hadamard, hadamard(), a.x.data = nullptr, "[hadamard] x must not be null");
  REFUSED(qtr_hadamard, hadamard(), a.x.cols = 0, "[hadamard] x must not be empty");
  REFUSED(qtr_hadamard, hadamard(), a.x.dtype = static_cast<qtr_dtype>(-1), "[hadamard] x must be float32");
  REFUSED(qtr_hadamard, hadamard(), a.out.data = nullptr, "[hadamard] out must not be null");
  REFUSED(qtr_hadamard, hadamard(), a.out.rows = 2, "[hadamard] out must have the shape of x");
  REFUSED(qtr_hadamard, hadamard(), a.out.dtype = static_cast<qtr_dtype>(7),
          "[hadamard] out must be float32");
  std::vector<float> odd(2049);
  REFUSED(qtr_hadamard, hadamard(), (a.x = in(odd.data(), 1, 2049), a.out = out(odd.data(), 1, 2049)),
          "[hadamard] columns must not have so large an odd factor: got cols=2049");
}

TEST_F(CApi, Trellis) {
  const auto spoil_each = [&](auto&& spoil, const char* text) {
    REFUSED(qtr_trellis_quantize, trellis_quantize(), spoil(a), std::string("[trellis_quantize] ") + text);
    REFUSED(qtr_trellis_dequantize, trellis_dequantize(), spoil(a),
            std::string("[trellis_dequantize] ") + text);
    REFUSED(qtr_trellis_matvec, trellis_matvec(), spoil(a), std::string("[trellis_matvec] ") + text);
  };
  spoil_each([](auto& a) { a.trellis.code = static_cast<qtr_trellis_code>(3); }, "code must be 1mad");
  spoil_each([](auto& a) { a.trellis.code = static_cast<qtr_trellis_code>(-1); }, "code must be 1mad");
  spoil_each([](auto& a) { a.trellis.bits = 0; }, "bits must be 1 to 4: got bits=0");
  spoil_each([](auto& a) { a.trellis.bits = 5; }, "bits must be 1 to 4: got bits=5");
  spoil_each([](auto& a) { a.trellis.state_bits = 3; }, "state_bits must be at least the bits of a step");
  spoil_each([](auto& a) { a.trellis.state_bits = 17; }, "state_bits must be at least the bits of a step");
  spoil_each([](auto& a) { a.codes = nullptr; }, "codes must not be null");
  spoil_each([](auto& a) { a.codes_size = 3; }, "codes must hold a stream");
  spoil_each([](auto& a) { a.scale = NAN; }, "scale must be");
  REFUSED(qtr_trellis_quantize, trellis_quantize(), a.scale = 0,
          "[trellis_quantize] scale must be positive: got scale=0");
  REFUSED(qtr_trellis_quantize, trellis_quantize(), a.x.data = nullptr,
          "[trellis_quantize] x must not be null");
  REFUSED(qtr_trellis_quantize, trellis_quantize(), a.x.cols = 15, "columns must be a multiple");
  REFUSED(qtr_trellis_quantize, trellis_quantize(), a.x.cols = 2, "at least state_bits bits together");
  REFUSED(qtr_trellis_dequantize, trellis_dequantize(), a.out.data = nullptr,
          "[trellis_dequantize] out must not be null");
  REFUSED(qtr_trellis_dequantize, trellis_dequantize(), a.out.cols = 15, "columns must be a multiple");
  REFUSED(qtr_trellis_dequantize, trellis_dequantize(), a.out.cols = 2, "at least state_bits bits together");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.rows = 0,
          "[trellis_matvec] rows and columns must be multiples of 16");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.cols = 24,
          "[trellis_matvec] rows and columns must be multiples of 16");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.rows = a.cols = int64_t{1} << 62,
          "[trellis_matvec] the matrix is larger than memory can be");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.x.cols = 15,
          "[trellis_matvec] x must have as many numbers");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.out.rows = 2, "[trellis_matvec] out must be float32");
  REFUSED(qtr_trellis_matvec, trellis_matvec(), a.out.dtype = QTR_F16,
          "[trellis_matvec] out must be float32");
  REFUSED(qtr_trellis_values, trellis_values(), a.code = static_cast<qtr_trellis_code>(3),
          "[trellis_values] code must be 1mad");
  REFUSED(qtr_trellis_values, trellis_values(), a.state_bits = 1, "[trellis_values] state_bits must be 2");
  REFUSED(qtr_trellis_values, trellis_values(), a.state_bits = 64, "[trellis_values] state_bits must be 2");
  REFUSED(qtr_trellis_values, trellis_values(), a.out = nullptr,
          "[trellis_values] out must not be null: got out=null");
  REFUSED(qtr_trellis_values, trellis_values(), a.out_count = 64,
          "[trellis_values] out must hold the values of all states: got out_count=64, expected=128");
  w_[3] = INFINITY;
  REFUSED(qtr_trellis_quantize, trellis_quantize(), , "[trellis_quantize] x must be finite");
}

TEST_F(CApi, HessianAndGptq) {
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.x.data = nullptr,
          "[hessian_accumulate] x must not be null");
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.x.dtype = static_cast<qtr_dtype>(3),
          "[hessian_accumulate] x must be float32");
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.sum.data = nullptr,
          "[hessian_accumulate] sum must not be null");
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.sum.dtype = QTR_F16,
          "[hessian_accumulate] sum must be float32");
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.sum.rows = 9,
          "[hessian_accumulate] sum must have a row and a column for each column of x");
  REFUSED(qtr_hessian_accumulate, hessian_accumulate(), a.x.cols = 9,
          "[hessian_accumulate] sum must have a row and a column for each column of x");

  REFUSED(qtr_gptq, gptq(), a.w.data = nullptr, "[gptq] w must not be null: got w=null");
  REFUSED(qtr_gptq, gptq(), a.w.dtype = static_cast<qtr_dtype>(3), "[gptq] w must be float32");
  REFUSED(qtr_gptq, gptq(), a.bits = 0, "[gptq] bits must be 1 to 8");
  REFUSED(qtr_gptq, gptq(), a.bits = 9, "[gptq] bits must be 1 to 8");
  REFUSED(qtr_gptq, gptq(), a.group_size = 0, "[gptq] group_size must be -1 or at least 1");
  REFUSED(qtr_gptq, gptq(), a.hessian = nullptr, "[gptq] hessian must not be null: got hessian=null");
  REFUSED(qtr_gptq, gptq(), a.hessian_size = 99, "[gptq] hessian must have a row and a column");
  REFUSED(qtr_gptq, gptq(), (a.w.rows = 1, a.w.cols = int64_t{1} << 40),
          "[gptq] hessian is larger than memory can be");
  REFUSED(qtr_gptq, gptq(), a.damp = -1, "[gptq] damp must be finite and not negative");
  REFUSED(qtr_gptq, gptq(), a.damp = INFINITY, "[gptq] damp must be finite and not negative");
  REFUSED(qtr_gptq, gptq(), a.codes = nullptr, "[gptq] codes must not be null: got codes=null");
  REFUSED(qtr_gptq, gptq(), a.codes_size = 17, "[gptq] codes must hold all packed rows");
  REFUSED(qtr_gptq, gptq(), a.result = nullptr, "[gptq] result must not be null: got result=null");
  REFUSED(qtr_gptq, gptq(), a.scale.data = nullptr, "[gptq] scale must not be null");
  REFUSED(qtr_gptq, gptq(), a.scale.rows = 2, "[gptq] scale and zero must hold one number for each group");
  REFUSED(qtr_gptq, gptq(), a.zero.rows = 2, "[gptq] scale and zero must hold one number for each group");
  REFUSED(qtr_gptq, fitting_gptq(), a.fitted_size = 1,
          "[gptq] fitted_scale must hold one number for each group");
  REFUSED(qtr_gptq, fitting_gptq(), a.solver = QTR_HQQ, "[gptq] solver must be minmax or mse");
  REFUSED(qtr_gptq, fitting_gptq(), a.solver = static_cast<qtr_grid_solver>(-1),
          "[gptq] solver must be minmax or mse");
  const int64_t late[4] = {1, 1, 1, 1}, falling[4] = {0, 1, 0, 1}, good[4] = {0, 1, 1, 1};
  const int32_t inside[1] = {1}, outside[1] = {10};
  REFUSED(qtr_gptq, gptq(), a.exclude_row_offsets = good, "[gptq] exclude_columns must not be null");
  REFUSED(qtr_gptq, gptq(), (a.exclude_row_offsets = late, a.exclude_columns = inside),
          "[gptq] exclude must have row_offsets from 0");
  REFUSED(qtr_gptq, gptq(), (a.exclude_row_offsets = falling, a.exclude_columns = inside),
          "[gptq] exclude must have row_offsets that ascend");
  REFUSED(qtr_gptq, gptq(), (a.exclude_row_offsets = good, a.exclude_columns = outside),
          "[gptq] exclude must lie within w");
  std::vector<int64_t> order(kCols);
  std::iota(order.begin(), order.end(), int64_t{0});
  const std::vector<double> pivots(kCols, 1);
  const std::vector<float> factor((kCols + 7) / 8 * 8 * kCols);
  const auto factored = [&](qtr_gptq_args args) {
    args.factor = factor.data(), args.order = order.data(), args.pivots = pivots.data();
    args.hessian = nullptr;
    return args;
  };
  expect_sound(qtr_gptq, factored(gptq()));
  REFUSED(qtr_gptq, factored(gptq()), a.order = nullptr, "[gptq] order must not be null");
  REFUSED(qtr_gptq, factored(gptq()), a.pivots = nullptr, "[gptq] pivots must not be null");
  std::swap(order.front(), order.back());
  expect_sound(qtr_gptq, factored(gptq()));
  REFUSED(qtr_gptq, factored(fitting_gptq()), , "[gptq] order must keep groups whole where grids are fitted");
  order.front() = 0;
  REFUSED(qtr_gptq, factored(gptq()), , "[gptq] order must have each column once: got column=0");
  order.back() = kCols;
  REFUSED(qtr_gptq, factored(gptq()), , "[gptq] order must have each column once");
  scale_[2] = NAN;
  REFUSED(qtr_gptq, gptq(), , "[gptq] scale must be finite: got value=nan, group=2");
  scale_[2] = 0.5f;
  zero_[3] = INFINITY;
  REFUSED(qtr_gptq, gptq(), , "[gptq] zero must be finite: got value=inf, group=3");
  zero_[3] = 3;
  hessian_[kCols] = NAN;
  REFUSED(qtr_gptq, gptq(), , "[gptq] hessian must be finite");
  hessian_[kCols] = 0;
  hessian_[kCols + 1] = -1;
  REFUSED(qtr_gptq, gptq(), , "[gptq] hessian must not be negative on its diagonal");
  hessian_[kCols + 1] = 1;
  w_[4] = INFINITY;
  REFUSED(qtr_gptq, gptq(), , "[gptq] w must be finite");
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
