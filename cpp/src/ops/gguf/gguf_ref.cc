#include <algorithm>
#include <cmath>

#include "ops/gguf/layout.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

int code_of(const GgufLayout& layout, const uint8_t* block, int i) {
  const auto bits_of = [&](const GgufPlane& plane) {
    if (plane.bits == 0) return 0;
    const GgufPlace place = gguf_place(plane, i);
    return block[place.byte] >> place.shift & ((1 << plane.bits) - 1);
  };
  const int code = bits_of(layout.low) | bits_of(layout.high) << layout.low.bits;
  return layout.is_signed_byte() ? code ^ 128 : code;
}

float value_of(const GgufLayout& layout, const uint8_t* block, int i) {
  const GgufMultiples of = gguf_multiples(layout, block);
  const int code = code_of(layout, block, i), run = i / layout.run;
  const float q =
      layout.is_table() ? kGgufTable[static_cast<size_t>(code)] : static_cast<float>(code - layout.zero);
  const float d = gguf_half(block, layout.d);
  if (layout.scales == GgufScales::kNone) return layout.m < 0 ? d * q : d * q + gguf_half(block, layout.m);
  const float scale = d * static_cast<float>(of.scale[run]);
  if (layout.m < 0) return scale * q;
  return scale * q - gguf_half(block, layout.m) * static_cast<float>(of.minimum[run]);
}

void gguf_decode(int32_t type, const uint8_t* data, int64_t blocks, float* out) {
  const GgufLayout& layout = *gguf_layout(type);
  for (int64_t b = 0; b < blocks; ++b)
    for (int i = 0; i < layout.info.block_size; ++i)
      out[b * layout.info.block_size + i] = value_of(layout, data + b * layout.info.block_bytes, i);
}

float inverse(float scale) {
  return std::abs(scale) < kGgufSmallestScale ? 0.0f : 1 / scale;
}

// Where a number lies in the table: how many middles between neighbours are below it.
int place_of(float at, const float* table) {
  int place = 0;
  for (int i = 0; i < 15; ++i) place += (table[i] + table[i + 1]) / 2 < at;
  return place;
}

float nearest_code(const GgufRun& run, float at) {
  if (run.table != nullptr) return run.table[place_of(at, run.table)];
  return std::nearbyint(std::min(std::max(at, run.low), run.high));
}

void gguf_errors(const GgufRun& run, const GgufLines& lines, float* errors) {
  for (int line = 0; line < kGgufLines; ++line) {
    const float scale = lines.scale[line], offset = lines.offset[line], inv = inverse(scale);
    errors[line] = 0;
    for (int i = 0; i < run.n; ++i) {
      const float code = nearest_code(run, (run.x[i] - offset) * inv);
      const float apart = run.x[i] - (scale * code + offset);
      errors[line] += run.weights[i] * (apart * apart);
    }
  }
}

void gguf_solve(const GgufRun& run, GgufOffset offset, GgufLines& lines) {
  for (int line = 0; line < kGgufLines; ++line) {
    float &a = lines.scale[line], &b = lines.offset[line];
    const float inv = inverse(a);
    float w = 0, wx = 0, wq = 0, wqq = 0, wxq = 0;  // sums over the run
    for (int i = 0; i < run.n; ++i) {
      const float code = nearest_code(run, (run.x[i] - b) * inv), weighted = run.weights[i] * code;
      w += run.weights[i];
      wx += run.weights[i] * run.x[i];
      wq += weighted;
      wqq += weighted * code;
      wxq += weighted * run.x[i];
    }
    const auto without_offset = [&] {
      if (!(wqq > 0)) return;
      a = wxq / wqq;
      b = 0;
    };
    if (offset == GgufOffset::kNone) {
      without_offset();
      continue;
    }
    const float diagonal = w * wqq, determinant = diagonal - wq * wq;
    if (!(determinant > kGgufLeastDeterminant * diagonal)) continue;
    a = (w * wxq - wx * wq) / determinant;
    b = (wx - a * wq) / w;
    if (offset == GgufOffset::kNotAbove0 && b > 0) without_offset();
  }
}

void gguf_codes(const GgufRun& run, float scale, float offset, uint8_t* codes) {
  const float inv = inverse(scale);
  for (int i = 0; i < run.n; ++i) {
    const float at = (run.x[i] - offset) * inv;
    codes[i] = static_cast<uint8_t>(run.table != nullptr ? place_of(at, run.table)
                                                         : static_cast<int>(nearest_code(run, at) - run.low));
  }
}

}  // namespace

void fill_gguf(KernelTable& table) {
  table.gguf_decode = gguf_decode;
  table.gguf_errors = gguf_errors;
  table.gguf_solve = gguf_solve;
  table.gguf_codes = gguf_codes;
}

}  // namespace quantrature::reference
