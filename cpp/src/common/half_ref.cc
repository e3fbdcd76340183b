#include "common/half.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

void f16_to_f32(const uint16_t* in, float* out, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_from_f16(in[i]);
}

void bf16_to_f32(const uint16_t* in, float* out, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_from_bf16(in[i]);
}

void f32_to_f16(const float* in, uint16_t* out, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) out[i] = f16_from_f32(in[i]);
}

void f32_to_bf16(const float* in, uint16_t* out, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_from_f32(in[i]);
}

}  // namespace

void fill_half(KernelTable& table) {
  table.f16_to_f32 = f16_to_f32;
  table.bf16_to_f32 = bf16_to_f32;
  table.f32_to_f16 = f32_to_f16;
  table.f32_to_bf16 = f32_to_bf16;
}

}  // namespace quantrature::reference
