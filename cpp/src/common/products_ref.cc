#include "common/products.hpp"

#include <cmath>

#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

template <class Number, int64_t kColumns>
void products(const Number* a, const Number* b, int64_t b_stride, int64_t k, Number* c, int64_t c_stride) {
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t j = 0; j < kColumns; ++j) {
      Number sum = c[i * c_stride + j];
      for (int64_t l = 0; l < k; ++l) sum = std::fma(a[l * kTileRows + i], b[l * b_stride + j], sum);
      c[i * c_stride + j] = sum;
    }
}

}  // namespace

void fill_products(KernelTable& table) {
  table.products_f32 = products<float, kTileFloats>;
  table.products_f64 = products<double, kTileDoubles>;
}

}  // namespace quantrature::reference
