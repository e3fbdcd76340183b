// Where the fields of a block lie, for each type: the one table of types, and how its fields are read and
// written.
#pragma once

#include <array>
#include <cstdint>

#include "common/half.hpp"
#include "quantrature/gguf.hpp"

namespace quantrature {

constexpr int kGgufMostNumbers = 256;  // of a block
constexpr int kGgufMostRuns = 16;      // of a block

// Some bits of each code. The numbers come in stretches of `span`, one byte each; further stretches lie in
// higher bits of the same bytes until these are full.
struct GgufPlane {
  int at;    // first byte
  int bits;  // 0: no such plane
  int span;
};

enum class GgufScales {
  kNone,        // a block is one run
  kNibbles,     // 4 bits, and 4 bits of minimum, in a byte
  kSixBits,     // 6 bits, stored plus 32
  kSixBitsTwo,  // 6 bits, and 6 bits of minimum
  kBytes        // 8 bits, signed
};

// A run is the numbers that share a scale: value = scale (code - zero) + offset.
struct GgufLayout {
  GgufTypeInfo info;
  int run;        // numbers of a run
  int zero;       // code of 0
  int d;          // first byte of d, float16
  int m;          // of m or dmin, float16; -1: there is none
  int scales_at;  // first byte of the scales of the runs
  GgufScales scales;
  GgufPlane low, high;

  constexpr int runs() const { return info.block_size / run; }
  constexpr int largest_code() const { return (1 << (low.bits + high.bits)) - 1; }
  constexpr bool is_table() const { return info.type == QTR_GGUF_IQ4_NL; }
  constexpr bool is_signed_byte() const { return info.type == QTR_GGUF_Q8_0; }
};

inline constexpr std::array<GgufLayout, 11> kGgufLayouts = {{
    {{QTR_GGUF_Q4_0, "Q4_0", 32, 18}, 32, 8, 0, -1, 0, GgufScales::kNone, {2, 4, 16}, {}},
    {{QTR_GGUF_Q4_1, "Q4_1", 32, 20}, 32, 0, 0, 2, 0, GgufScales::kNone, {4, 4, 16}, {}},
    {{QTR_GGUF_Q5_0, "Q5_0", 32, 22}, 32, 16, 0, -1, 0, GgufScales::kNone, {6, 4, 16}, {2, 1, 1}},
    {{QTR_GGUF_Q5_1, "Q5_1", 32, 24}, 32, 0, 0, 2, 0, GgufScales::kNone, {8, 4, 16}, {4, 1, 1}},
    {{QTR_GGUF_Q8_0, "Q8_0", 32, 34}, 32, 128, 0, -1, 0, GgufScales::kNone, {2, 8, 32}, {}},
    {{QTR_GGUF_IQ4_NL, "IQ4_NL", 32, 18}, 32, 0, 0, -1, 0, GgufScales::kNone, {2, 4, 16}, {}},
    {{QTR_GGUF_Q2_K, "Q2_K", 256, 84}, 16, 0, 80, 82, 0, GgufScales::kNibbles, {16, 2, 32}, {}},
    {{QTR_GGUF_Q3_K, "Q3_K", 256, 110}, 16, 4, 108, -1, 96, GgufScales::kSixBits, {32, 2, 32}, {0, 1, 32}},
    {{QTR_GGUF_Q4_K, "Q4_K", 256, 144}, 32, 0, 0, 2, 4, GgufScales::kSixBitsTwo, {16, 4, 32}, {}},
    {{QTR_GGUF_Q5_K, "Q5_K", 256, 176}, 32, 0, 0, 2, 4, GgufScales::kSixBitsTwo, {48, 4, 32}, {16, 1, 32}},
    {{QTR_GGUF_Q6_K, "Q6_K", 256, 210}, 16, 32, 208, -1, 192, GgufScales::kBytes, {0, 4, 64}, {128, 2, 32}},
}};

// Null for a number that is no type.
constexpr const GgufLayout* gguf_layout(int32_t type) {
  for (const GgufLayout& layout : kGgufLayouts)
    if (layout.info.type == type) return &layout;
  return nullptr;
}

// The values of the codes of IQ4_NL.
inline constexpr std::array<float, 16> kGgufTable = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                     1,    13,   25,  38,  53,  69,  89,  113};

struct GgufPlace {
  int byte, shift;
};

// Of number i of a block.
constexpr GgufPlace gguf_place(const GgufPlane& plane, int i) {
  const int in_byte = 8 / plane.bits, stretch = i / plane.span;
  return {plane.at + plane.span * (stretch / in_byte) + i % plane.span, plane.bits * (stretch % in_byte)};
}

inline float gguf_half(const uint8_t* block, int at) {
  return f32_from_f16(static_cast<uint16_t>(block[at] | block[at + 1] << 8));
}

inline void gguf_set_half(uint8_t* block, int at, float value) {
  const uint16_t bits = f16_from_f32(value);
  block[at] = static_cast<uint8_t>(bits), block[at + 1] = static_cast<uint8_t>(bits >> 8);
}

// What the scales of the runs are multiples of, and the multiples.
struct GgufMultiples {
  int scale[kGgufMostRuns], minimum[kGgufMostRuns];
};

// Of both, 6 bits of eight runs: four bytes with the scales of runs 0 to 3, four with their minimums, four
// with the low halves of the others, whose two high bits are the highest of the bytes before.
constexpr GgufMultiples gguf_multiples(const GgufLayout& layout, const uint8_t* block) {
  GgufMultiples of{};
  const uint8_t* s = block + layout.scales_at;
  for (int i = 0; i < layout.runs(); ++i) switch (layout.scales) {
      case GgufScales::kNone:
        of.scale[i] = of.minimum[i] = 1;
        break;
      case GgufScales::kNibbles:
        of.scale[i] = s[i] & 15, of.minimum[i] = s[i] >> 4;
        break;
      case GgufScales::kSixBits:
        of.scale[i] = ((s[i % 8] >> (i / 8 * 4) & 15) | (s[8 + i % 4] >> (i / 4 * 2) & 3) << 4) - 32;
        break;
      case GgufScales::kSixBitsTwo:
        if (i < 4) {
          of.scale[i] = s[i] & 63, of.minimum[i] = s[i + 4] & 63;
        } else {
          of.scale[i] = (s[i + 4] & 15) | s[i - 4] >> 6 << 4, of.minimum[i] = s[i + 4] >> 4 | s[i] >> 6 << 4;
        }
        break;
      case GgufScales::kBytes:
        of.scale[i] = static_cast<int8_t>(s[i]);
        break;
    }
  return of;
}

// The bytes of the scales must be 0 before.
constexpr void gguf_set_multiples(const GgufLayout& layout, const GgufMultiples& of, uint8_t* block) {
  uint8_t* s = block + layout.scales_at;
  const auto add = [&](int at, int bits) { s[at] = static_cast<uint8_t>(s[at] | bits); };
  for (int i = 0; i < layout.runs(); ++i) {
    const int scale = of.scale[i], minimum = of.minimum[i];
    switch (layout.scales) {
      case GgufScales::kNone:
        break;
      case GgufScales::kNibbles:
        add(i, scale | minimum << 4);
        break;
      case GgufScales::kSixBits:
        add(i % 8, ((scale + 32) & 15) << (i / 8 * 4));
        add(8 + i % 4, (scale + 32) >> 4 << (i / 4 * 2));
        break;
      case GgufScales::kSixBitsTwo:
        if (i < 4) {
          add(i, scale), add(i + 4, minimum);
        } else {
          add(i + 4, (scale & 15) | (minimum & 15) << 4);
          add(i - 4, scale >> 4 << 6), add(i, minimum >> 4 << 6);
        }
        break;
      case GgufScales::kBytes:
        add(i, scale & 255);
        break;
    }
  }
}

// The bytes of the plane must be 0 before. `shift`: the lowest bit of a code that the plane has.
inline void gguf_set_plane(const GgufLayout& layout, const GgufPlane& plane, int shift, const uint8_t* codes,
                           uint8_t* block) {
  if (plane.bits == 0) return;
  const int mask = (1 << plane.bits) - 1, flip = layout.is_signed_byte() ? 128 : 0;
  for (int i = 0; i < layout.info.block_size; ++i) {
    const GgufPlace place = gguf_place(plane, i);
    block[place.byte] =
        static_cast<uint8_t>(block[place.byte] | ((codes[i] ^ flip) >> shift & mask) << place.shift);
  }
}

}  // namespace quantrature
