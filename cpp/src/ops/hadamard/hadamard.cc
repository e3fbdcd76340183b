#include "quantrature/hadamard.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kMaxPaley = 512;
constexpr int64_t kMaxOrder = 2048;
constexpr int64_t kTaskElements = 1 << 15;

bool is_prime(int64_t n) {
  if (n < 2) return false;
  for (int64_t d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

// The prime of the construction that gives a Hadamard matrix of this order, or 0.
int64_t paley_prime(int64_t order) {
  if (order % 4 == 0 && is_prime(order - 1)) return order - 1;  // = 4 i + 3
  if (order % 4 == 0 && (order / 2 - 1) % 4 == 1 && is_prime(order / 2 - 1)) return order / 2 - 1;
  return 0;
}

std::vector<float> paley(int64_t order) {
  const int64_t r = paley_prime(order);
  std::vector<float> chi(static_cast<size_t>(r), -1);
  chi[0] = 0;
  for (int64_t i = 1; i < r; ++i) chi[static_cast<size_t>(i * i % r)] = 1;
  const bool first = r == order - 1;
  const auto bordered = [&](int64_t i, int64_t j) {
    if (i == 0 || j == 0) return i == j ? 0.0f : (first && j == 0 ? -1.0f : 1.0f);
    return chi[static_cast<size_t>((i - j + r) % r)];
  };
  std::vector<float> made(static_cast<size_t>(order * order));
  for (int64_t i = 0; i < order; ++i)
    for (int64_t j = 0; j < order; ++j) {
      float& to = made[static_cast<size_t>(i * order + j)];
      if (first) {
        to = bordered(i, j) + (i == j ? 1.0f : 0.0f);
      } else {
        const float s = bordered(i / 2, j / 2);
        const bool both = i % 2 == 1 && j % 2 == 1;
        if (s == 0)
          to = i % 2 == 0 && j % 2 == 0 ? 1.0f : -1.0f;
        else
          to = both ? -s : s;
      }
    }
  return made;
}

std::vector<float> cosines(int64_t order) {
  const auto n = static_cast<double>(order);
  std::vector<float> made(static_cast<size_t>(order * order));
  for (int64_t b = 0; b < order; ++b)
    for (int64_t c = 0; c < order; ++c) {
      // Reduced first, so that the angle is exact.
      const auto angle = static_cast<double>((2 * b + 1) * c % (4 * order));
      made[static_cast<size_t>(b * order + c)] = static_cast<float>(
          c == 0 ? 1.0 : std::numbers::sqrt2 * std::cos(std::numbers::pi * angle / (2 * n)));
    }
  return made;
}

// The factor and its order; empty for order 1.
std::vector<float> factor_of(int64_t order, bool transposed) {
  if (order == 1) return {};
  const std::vector<float> made = paley_prime(order) != 0 ? paley(order) : cosines(order);
  if (!transposed) return made;
  std::vector<float> turned(made.size());
  for (int64_t b = 0; b < order; ++b)
    for (int64_t c = 0; c < order; ++c)
      turned[static_cast<size_t>(c * order + b)] = made[static_cast<size_t>(b * order + c)];
  return turned;
}

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
  check(a.signs != nullptr, "[random_signs] signs must not be null");
  for (int64_t byte = 0; byte < (a.count + 7) / 8; ++byte) {
    const uint64_t word = mix(a.seed + (static_cast<uint64_t>(byte) / 8 + 1) * 0x9E3779B97F4A7C15u);
    const auto bits = static_cast<uint8_t>(word >> byte % 8 * 8);
    const int64_t used = std::min<int64_t>(8, a.count - byte * 8);
    a.signs[byte] = static_cast<uint8_t>(bits & ((1 << used) - 1));
  }
}

int64_t hadamard_order(int64_t n) {
  check(n >= 1, "[hadamard] n must be at least 1", "n", n);
  const int64_t odd = n >> std::countr_zero(static_cast<uint64_t>(n));
  if (odd == 1) return 1;
  for (int64_t order = odd * 4; order <= kMaxPaley && n % order == 0; order *= 2)
    if (paley_prime(order) != 0) return order;
  return odd;
}

void hadamard(const HadamardArgs& a) {
  check_on_cpu(a.device, "hadamard");
  check_matrix(a.x, "hadamard", "x");
  check_matrix(a.out, "hadamard", "out");
  check(a.out.rows == a.x.rows && a.out.cols == a.x.cols, "[hadamard] out must have the shape of x", "rows",
        a.out.rows, "cols", a.out.cols, "expected rows", a.x.rows, "expected cols", a.x.cols);
  const int64_t n = a.x.cols, order = hadamard_order(n), block = n / order;
  check(order <= kMaxOrder, "[hadamard] columns must not have so large an odd factor", "cols", n, "order",
        order);
  const std::vector<float> factor = factor_of(order, a.inverse != 0);
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
