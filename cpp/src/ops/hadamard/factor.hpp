// The matrices that Hadamard transforms of lengths other than powers of two are made of.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace quantrature {

inline constexpr int64_t kMaxPaley = 512;

inline bool is_prime(int64_t n) {
  if (n < 2) return false;
  for (int64_t d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

// The prime of the construction that gives a Hadamard matrix of this order, or 0.
inline int64_t paley_prime(int64_t order) {
  if (order % 4 == 0 && is_prime(order - 1)) return order - 1;  // = 4 i + 3
  if (order % 4 == 0 && (order / 2 - 1) % 4 == 1 && is_prime(order / 2 - 1)) return order / 2 - 1;
  return 0;
}

inline std::vector<float> paley(int64_t order) {
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

inline std::vector<float> cosines(int64_t order) {
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
inline std::vector<float> hadamard_factor_of(int64_t order, bool transposed) {
  if (order == 1) return {};
  const std::vector<float> made = paley_prime(order) != 0 ? paley(order) : cosines(order);
  if (!transposed) return made;
  std::vector<float> turned(made.size());
  for (int64_t b = 0; b < order; ++b)
    for (int64_t c = 0; c < order; ++c)
      turned[static_cast<size_t>(c * order + b)] = made[static_cast<size_t>(b * order + c)];
  return turned;
}

// The order of the factor of a transform of n numbers; what is left is a power of two.
inline int64_t hadamard_order_of(int64_t n) {
  const int64_t odd = n >> std::countr_zero(static_cast<uint64_t>(n));
  if (odd == 1) return 1;
  for (int64_t order = odd * 4; order <= kMaxPaley && n % order == 0; order *= 2)
    if (paley_prime(order) != 0) return order;
  return odd;
}

}  // namespace quantrature
