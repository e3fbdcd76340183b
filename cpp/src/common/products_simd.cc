// Written out in vectors: 16 sums stay in registers while l runs, or 8 where there are but 16 registers.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/products_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "common/products.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// The columns of one or two vectors.
template <int kVectors, class D, class Number>
HWY_INLINE void Columns(D d, const Number* HWY_RESTRICT a, const Number* HWY_RESTRICT b, int64_t b_stride,
                        int64_t k, Number* HWY_RESTRICT c, int64_t c_stride) {
  constexpr int64_t kWidth = static_cast<int64_t>(hn::MaxLanes(D()));
  hn::Vec<D> sum[kTileRows][kVectors];
  HWY_UNROLL(8)
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::LoadU(d, c + i * c_stride + v * kWidth);
  for (int64_t l = 0; l < k; ++l, a += kTileRows, b += b_stride) {
    hn::Vec<D> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(d, b + v * kWidth);
    HWY_UNROLL(8)
    for (int i = 0; i < kTileRows; ++i) {
      const hn::Vec<D> left = hn::Set(d, a[i]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(left, right[v], sum[i][v]);
    }
  }
  HWY_UNROLL(8)
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[i][v], d, c + i * c_stride + v * kWidth);
}

template <int64_t kColumns, class Number>
HWY_INLINE void Products(const Number* a, const Number* b, int64_t b_stride, int64_t k, Number* c,
                         int64_t c_stride) {
  const hn::CappedTag<Number, static_cast<size_t>(kColumns)> d;
  constexpr int64_t kWidth = static_cast<int64_t>(hn::MaxLanes(d));
  constexpr bool kManyRegisters = HWY_ARCH_ARM || HWY_TARGET <= HWY_AVX3;
  constexpr int kVectors = kManyRegisters && kColumns >= 2 * kWidth ? 2 : 1;
  for (int64_t j = 0; j < kColumns; j += kVectors * kWidth)
    Columns<kVectors>(d, a, b + j, b_stride, k, c + j, c_stride);
}

void ProductsF32(const float* a, const float* b, int64_t b_stride, int64_t k, float* c, int64_t c_stride) {
  Products<kTileFloats>(a, b, b_stride, k, c, c_stride);
}

void ProductsF64(const double* a, const double* b, int64_t b_stride, int64_t k, double* c, int64_t c_stride) {
  Products<kTileDoubles>(a, b, b_stride, k, c, c_stride);
}

void FillKernels(KernelTable& table) {
  table.products_f32 = ProductsF32;
  table.products_f64 = ProductsF64;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(products)
#endif
