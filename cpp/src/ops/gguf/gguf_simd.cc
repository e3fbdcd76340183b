// The fit is written out in vectors, whose lanes are lines: the sums of a line stay in one lane, in the order
// of the numbers, so that nothing is added across lanes. Decoding is plain loops over constant strides, which
// the compiler vectorises.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/gguf/gguf_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <utility>

#include "ops/gguf/layout.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kGgufLines>;
using Float = hn::Vec<Floats>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kVectors = kGgufLines / kWidth;
constexpr int kBounds = 15;
// Numbers up to 2^22 round to the nearest integer, ties to even, when it is added.
constexpr float kLarge = 0x1.8p23f;

HWY_INLINE Float Inverse(Float scale) {
  const Floats d;
  const auto none = hn::Lt(hn::Abs(scale), hn::Set(d, kGgufSmallestScale));
  return hn::IfThenZeroElse(none, hn::Div(hn::Set(d, 1.0f), scale));
}

// Codes that are integers from low to high.
class Integers {
 public:
  explicit Integers(const GgufRun& run) : low_(run.low), high_(run.high) {}
  HWY_INLINE Float Nearest(Float at) const {
    const Floats d;
    const Float within = hn::Min(hn::Max(at, hn::Set(d, low_)), hn::Set(d, high_));
    const Float large = hn::Set(d, kLarge);
    return hn::Sub(hn::Add(within, large), large);
  }

 private:
  float low_, high_;
};

// Codes that are entries of a table.
class Entries {
 public:
  explicit Entries(const GgufRun& run) : first_(run.table[0]) {
    for (int i = 0; i < kBounds; ++i) {
      bounds_[i] = (run.table[i] + run.table[i + 1]) / 2;
      steps_[i] = run.table[i + 1] - run.table[i];
    }
  }
  HWY_INLINE Float Nearest(Float at) const {
    const Floats d;
    Float entry = hn::Set(d, first_);
    for (int i = 0; i < kBounds; ++i) {
      const auto beyond = hn::Lt(hn::Set(d, bounds_[i]), at);
      entry = hn::Add(entry, hn::IfThenElseZero(beyond, hn::Set(d, steps_[i])));
    }
    return entry;
  }
  HWY_INLINE Float Place(Float at) const {
    const Floats d;
    Float place = hn::Zero(d);
    for (int i = 0; i < kBounds; ++i) {
      const auto beyond = hn::Lt(hn::Set(d, bounds_[i]), at);
      place = hn::Add(place, hn::IfThenElseZero(beyond, hn::Set(d, 1.0f)));
    }
    return place;
  }

 private:
  float first_, bounds_[kBounds], steps_[kBounds];
};

template <class Codes>
HWY_INLINE void Errors(const GgufRun& run, const Codes& codes, const GgufLines& lines, float* errors) {
  const Floats d;
  Float scale[kVectors], offset[kVectors], inv[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = hn::LoadU(d, lines.scale + v * kWidth);
    offset[v] = hn::LoadU(d, lines.offset + v * kWidth);
    inv[v] = Inverse(scale[v]);
    sum[v] = hn::Zero(d);
  }
  for (int i = 0; i < run.n; ++i) {
    const Float x = hn::Set(d, run.x[i]), weight = hn::Set(d, run.weights[i]);
    for (int v = 0; v < kVectors; ++v) {
      const Float code = codes.Nearest(hn::Mul(hn::Sub(x, offset[v]), inv[v]));
      const Float apart = hn::Sub(x, hn::Add(hn::Mul(scale[v], code), offset[v]));
      sum[v] = hn::Add(sum[v], hn::Mul(weight, hn::Mul(apart, apart)));
    }
  }
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, errors + v * kWidth);
}

template <class Codes>
HWY_INLINE void Solve(const GgufRun& run, const Codes& codes, GgufOffset how, GgufLines& lines) {
  const Floats d;
  float w = 0, wx = 0;
  for (int i = 0; i < run.n; ++i) {
    w += run.weights[i];
    wx += run.weights[i] * run.x[i];
  }
  const Float zero = hn::Zero(d), all_w = hn::Set(d, w), all_wx = hn::Set(d, wx);
  for (int v = 0; v < kVectors; ++v) {
    const Float scale = hn::LoadU(d, lines.scale + v * kWidth);
    const Float offset = hn::LoadU(d, lines.offset + v * kWidth);
    const Float inv = Inverse(scale);
    Float wq = zero, wqq = zero, wxq = zero;
    for (int i = 0; i < run.n; ++i) {
      const Float x = hn::Set(d, run.x[i]);
      const Float code = codes.Nearest(hn::Mul(hn::Sub(x, offset), inv));
      const Float weighted = hn::Mul(hn::Set(d, run.weights[i]), code);
      wq = hn::Add(wq, weighted);
      wqq = hn::Add(wqq, hn::Mul(weighted, code));
      wxq = hn::Add(wxq, hn::Mul(weighted, x));
    }
    const auto moves = hn::Gt(wqq, zero);
    const Float alone = hn::Div(wxq, wqq);
    if (how == GgufOffset::kNone) {
      hn::StoreU(hn::IfThenElse(moves, alone, scale), d, lines.scale + v * kWidth);
      hn::StoreU(hn::IfThenElse(moves, zero, offset), d, lines.offset + v * kWidth);
      continue;
    }
    const Float diagonal = hn::Mul(all_w, wqq), determinant = hn::Sub(diagonal, hn::Mul(wq, wq));
    const auto solved = hn::Gt(determinant, hn::Mul(hn::Set(d, kGgufLeastDeterminant), diagonal));
    Float a = hn::Div(hn::Sub(hn::Mul(all_w, wxq), hn::Mul(all_wx, wq)), determinant);
    Float b = hn::Div(hn::Sub(all_wx, hn::Mul(a, wq)), all_w);
    if (how == GgufOffset::kNotAbove0) {
      const auto above = hn::And(hn::Gt(b, zero), moves);
      a = hn::IfThenElse(above, alone, a);
      b = hn::IfThenElse(above, zero, b);
    }
    hn::StoreU(hn::IfThenElse(solved, a, scale), d, lines.scale + v * kWidth);
    hn::StoreU(hn::IfThenElse(solved, b, offset), d, lines.offset + v * kWidth);
  }
}

void GgufErrors(const GgufRun& run, const GgufLines& lines, float* errors) {
  if (run.table != nullptr) return Errors(run, Entries(run), lines, errors);
  Errors(run, Integers(run), lines, errors);
}

void GgufSolve(const GgufRun& run, GgufOffset offset, GgufLines& lines) {
  if (run.table != nullptr) return Solve(run, Entries(run), offset, lines);
  Solve(run, Integers(run), offset, lines);
}

void GgufCodes(const GgufRun& run, float scale, float offset, uint8_t* codes) {
  const Floats d;
  const hn::Rebind<int32_t, Floats> ints;
  const hn::Rebind<uint8_t, Floats> bytes;
  const Float inv = Inverse(hn::Set(d, scale)), from = hn::Set(d, offset);
  for (int i = 0; i < run.n; i += kWidth) {
    const Float at = hn::Mul(hn::Sub(hn::LoadU(d, run.x + i), from), inv);
    const Float code = run.table != nullptr ? Entries(run).Place(at)
                                            : hn::Sub(Integers(run).Nearest(at), hn::Set(d, run.low));
    hn::StoreU(hn::DemoteTo(bytes, hn::ConvertTo(ints, code)), bytes, codes + i);
  }
}

// Adds the bits of a plane to all codes of a block.
template <int at, int bits, int span, int shift, int size>
HWY_INLINE void AddPlane(const uint8_t* HWY_RESTRICT block, uint8_t* HWY_RESTRICT codes) {
  if constexpr (bits > 0) {
    constexpr int in_byte = 8 / bits, mask = (1 << bits) - 1;
    for (int first = 0; first < size; first += span * in_byte)
      for (int stretch = 0; stretch < in_byte; ++stretch)
        for (int i = 0; i < span; ++i) {
          uint8_t& code = codes[first + stretch * span + i];
          code = static_cast<uint8_t>(code | (block[at + first / in_byte + i] >> (bits * stretch) & mask)
                                                 << shift);
        }
  }
}

template <size_t index>
void DecodeType(const uint8_t* HWY_RESTRICT data, int64_t blocks, float* HWY_RESTRICT out) {
  constexpr const GgufLayout& layout = kGgufLayouts[index];
  constexpr GgufPlane low = layout.low, high = layout.high;
  constexpr int size = layout.info.block_size, run = layout.run;
  for (int64_t b = 0; b < blocks; ++b, data += layout.info.block_bytes, out += size) {
    uint8_t codes[size] = {};
    AddPlane<low.at, low.bits, low.span, 0, size>(data, codes);
    AddPlane<high.at, high.bits, high.span, low.bits, size>(data, codes);
    const GgufMultiples of = gguf_multiples(layout, data);
    const float d = gguf_half(data, layout.d), m = layout.m < 0 ? 0.0f : gguf_half(data, layout.m);
    for (int r = 0; r < size / run; ++r) {
      constexpr bool one_run = layout.scales == GgufScales::kNone;
      const float scale = one_run ? d : d * static_cast<float>(of.scale[r]);
      const float offset = one_run ? m : m * static_cast<float>(of.minimum[r]);
      for (int i = r * run; i < (r + 1) * run; ++i) {
        float q;
        if constexpr (layout.is_table())
          q = kGgufTable[codes[i]];
        else if constexpr (layout.is_signed_byte())
          q = static_cast<float>(static_cast<int8_t>(codes[i]));
        else
          q = static_cast<float>(codes[i] - layout.zero);
        if constexpr (layout.m < 0)
          out[i] = scale * q;
        else
          out[i] = one_run ? scale * q + offset : scale * q - offset;
      }
    }
  }
}

template <size_t... index>
HWY_INLINE void DecodeAny(int32_t type, const uint8_t* data, int64_t blocks, float* out,
                          std::index_sequence<index...>) {
  ((kGgufLayouts[index].info.type == type ? DecodeType<index>(data, blocks, out) : void()), ...);
}

void GgufDecode(int32_t type, const uint8_t* data, int64_t blocks, float* out) {
  DecodeAny(type, data, blocks, out, std::make_index_sequence<kGgufLayouts.size()>());
}

void FillKernels(KernelTable& table) {
  table.gguf_decode = GgufDecode;
  table.gguf_errors = GgufErrors;
  table.gguf_solve = GgufSolve;
  table.gguf_codes = GgufCodes;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(gguf)
#endif
