#include <algorithm>
#include <cmath>

#include "ops/codebook/search.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

bool codebook_largest(const float* x, int64_t n, int64_t group, float* largest) noexcept {
  bool finite = true;
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    largest[g] = 0;
    for (int64_t i = begin; i < std::min(begin + group, n); ++i) {
      finite = finite && std::isfinite(x[i]);
      largest[g] = std::max(largest[g], std::abs(x[i]));
    }
  }
  return finite;
}

void codebook_encode(const float* x, int64_t n, int64_t group, const float* inv, const CodebookSearch& search,
                     uint8_t* codes) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    const float at = inv == nullptr ? x[i] : x[i] * inv[i / group];
    int rank = 0;
    while (rank < search.count && search.bounds[rank] < at) ++rank;
    codes[i] = search.codes[rank];
  }
}

void codebook_decode(const uint8_t* codes, int64_t n, int64_t group, int, const float* table,
                     const float* scale, float* out) noexcept {
  for (int64_t i = 0; i < n; ++i)
    out[i] = scale == nullptr ? table[codes[i]] : table[codes[i]] * scale[i / group];
}

}  // namespace

void fill_codebook(KernelTable& table) {
  table.codebook_largest = codebook_largest;
  table.codebook_encode = codebook_encode;
  table.codebook_decode = codebook_decode;
}

}  // namespace quantrature::reference
