#include "quantrature/hadamard.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/hadamard/factor.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kMaxOrder = 2048;
constexpr int64_t kTaskElements = 1 << 15;

uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

void apply_signs(const uint8_t* signs, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(x[i]) ^ uint32_t{signs[i / 8]} >> i % 8 << 31);
}

}  // namespace

void random_signs(const RandomSignsArgs& a) {
  check(a.count >= 1, "[random_signs] count must be at least 1", "count", a.count);
  check_extent(1, a.count, "random_signs", "signs");
  check_given(a.signs != nullptr, "random_signs", "signs");
  for (int64_t byte = 0; byte < (a.count + 7) / 8; ++byte) {
    const uint64_t word = mix(a.seed + (static_cast<uint64_t>(byte) / 8 + 1) * 0x9E3779B97F4A7C15u);
    const auto bits = static_cast<uint8_t>(word >> byte % 8 * 8);
    const int64_t used = std::min<int64_t>(8, a.count - byte * 8);
    a.signs[byte] = static_cast<uint8_t>(bits & ((1 << used) - 1));
  }
}

int64_t hadamard_order(int64_t n) {
  check(n >= 1, "[hadamard] n must be at least 1", "n", n);
  return hadamard_order_of(n);
}

void hadamard(const HadamardArgs& a) {
  check_matrix(a.x, "hadamard", "x");
  check_matrix(a.out, "hadamard", "out");
  check(a.out.rows == a.x.rows && a.out.cols == a.x.cols, "[hadamard] out must have the shape of x", "rows",
        a.out.rows, "cols", a.out.cols, "expected rows", a.x.rows, "expected cols", a.x.cols);
  const int64_t n = a.x.cols, order = hadamard_order(n), block = n / order;
  check(order <= kMaxOrder, "[hadamard] columns must not have so large an odd factor", "cols", n, "order",
        order);
  if (done_on_device(a, "hadamard", &qtr_backend::hadamard)) return;
  const std::vector<float> factor = hadamard_factor_of(order, a.inverse != 0);
  const auto norm = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
  const auto size = static_cast<size_t>(n);
  parallel_for_pieces(a.x.rows, std::max<int64_t>(1, kTaskElements / n), [&](int64_t first, int64_t last) {
    std::vector<float> work(size), mixed(order > 1 ? size : 0);
    for (int64_t row = first; row < last; ++row) {
      const float* from = float_row(a.x, row, 0, n, work.data());
      if (from != work.data()) std::copy_n(from, n, work.data());
      if (a.signs != nullptr && !a.inverse) apply_signs(a.signs, work.data(), n);
      for (int64_t b = 0; b < order; ++b) kernels().hadamard_sylvester(work.data() + b * block, block);
      float* x = work.data();
      if (order > 1) {
        kernels().hadamard_factor(work.data(), order, factor.data(), block, mixed.data());
        x = mixed.data();
      }
      for (int64_t i = 0; i < n; ++i) x[i] *= norm;
      if (a.signs != nullptr && a.inverse) apply_signs(a.signs, x, n);
      float* to = float_row_target(a.out, row, 0, x);
      if (to != x) std::copy_n(x, n, to);
      store_float_row(a.out, row, 0, n, x);
    }
  });
}

}  // namespace quantrature
