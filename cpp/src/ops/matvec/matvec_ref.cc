#include <algorithm>
#include <cmath>

#include "layout/planes.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

void matvec_blocks(const MatvecBlock& b) noexcept {
  const int64_t end = blocked_columns(b.cols, b.bits);
  for (int64_t row = 0; row < b.rows; ++row)
    for (int64_t v = 0; v < b.vectors; ++v) {
      double sum = 0;
      for (int64_t j = 0; j < end; ++j)
        sum += static_cast<double>(b.scale[row * b.groups + j / b.group]) *
               code_at(b.codes + row * b.row_bytes, b.bits, b.cols, j) *
               static_cast<double>(b.x[v * b.x_stride + j]);
      b.y[v * b.y_stride + row] += static_cast<float>(sum);
    }
}

void matvec_zeros(const MatvecBlock& b) noexcept {
  for (int64_t row = 0; row < b.rows; ++row)
    for (int64_t v = 0; v < b.vectors; ++v) {
      double sum = 0;
      for (int64_t g = 0; g < b.groups; ++g)
        sum += static_cast<double>(b.scale[row * b.groups + g]) *
               static_cast<double>(b.zero[row * b.groups + g]) *
               static_cast<double>(b.sums[v * b.groups + g]);
      b.y[v * b.y_stride + row] -= static_cast<float>(sum);
    }
}

float matvec_codes(const uint8_t* codes, int64_t begin, int64_t end, int64_t group, const float* scale,
                   const float* x) noexcept {
  double sum = 0;
  for (int64_t j = begin; j < end; ++j)
    sum += static_cast<double>(scale[j / group]) * codes[j - begin] * static_cast<double>(x[j]);
  return static_cast<float>(sum);
}

// Values are rounded as dequantize has them.
void matvec_tables(const MatvecTables& m) noexcept {
  const MatvecBlock& b = m.block;
  const int64_t end = b.cols / kMatvecChunk * kMatvecChunk;
  for (int64_t row = 0; row < b.rows; ++row)
    for (int64_t v = 0; v < b.vectors; ++v) {
      double sum = 0;
      for (int64_t j = 0; j < end; ++j) {
        const float entry =
            m.table[row * m.table_stride + code_at(b.codes + row * b.row_bytes, b.bits, b.cols, j)];
        const float value = b.scale == nullptr ? entry : entry * b.scale[row * b.groups + j / b.group];
        sum += static_cast<double>(value) * static_cast<double>(b.x[v * b.x_stride + j]);
      }
      b.y[v * b.y_stride + row] += static_cast<float>(sum);
    }
}

float matvec_values(const float* values, int64_t n, const float* x) noexcept {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(values[j]) * static_cast<double>(x[j]);
  return static_cast<float>(sum);
}

// To multiples of a 127th of the largest of each run.
void matvec_round(const float* x, int64_t n, float* out) noexcept {
  for (int64_t begin = 0; begin < n; begin += kMatvecRun) {
    const int64_t end = std::min(begin + kMatvecRun, n);
    float largest = 0;
    for (int64_t j = begin; j < end; ++j) largest = std::abs(x[j]) <= largest ? largest : std::abs(x[j]);
    const bool rounds = !(largest < kSmallestRounded);
    const float unit = rounds ? largest / 127 : 0.0f, inverse = rounds ? 127 / largest : 0.0f;
    for (int64_t j = begin; j < end; ++j) out[j] = std::nearbyint(x[j] * inverse) * unit;
  }
}

}  // namespace

void fill_matvec(KernelTable& table) {
  table.matvec_blocks = matvec_blocks;
  table.matvec_zeros = matvec_zeros;
  table.matvec_codes = matvec_codes;
  table.matvec_round = matvec_round;
}

void fill_matvec_bytes(KernelTable&) {}

void fill_matvec_tables(KernelTable& table) {
  table.matvec_tables = matvec_tables;
  table.matvec_values = matvec_values;
}

}  // namespace quantrature::reference
