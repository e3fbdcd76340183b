// Written out in vectors: sixteen states come out of 16 bytes by a shuffle of bytes and a shift for each,
// their values out of the arithmetic of the code. A tile row of the product keeps its sums, or the weights of
// a tile where there are several vectors, in registers.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/trellis/trellis_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <bit>
#include <cstring>
#include <type_traits>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

static_assert(std::endian::native == std::endian::little, "words are put together from bytes");

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kTile>;
using Words = hn::RebindToUnsigned<Floats>;
using Ints = hn::RebindToSigned<Floats>;
using Bytes = hn::Repartition<uint8_t, Words>;
using Float = hn::Vec<Floats>;
using Word = hn::Vec<Words>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kParts = kTile / kWidth;  // vectors that hold sixteen numbers
constexpr int kGroup = 16;              // states that are read together

// A stream with its beginning repeated behind its end, so that a window is never cut.
struct Unrolled {
  uint8_t bytes[kMaxTileBytes + 32];

  HWY_INLINE Unrolled(const uint8_t* stream, int size) {
    std::memcpy(bytes, stream, static_cast<size_t>(size));
    std::memcpy(bytes + size, stream, 32);
  }
};

// The states of a group, part after part.
template <int kStepBits>
class States {
 public:
  explicit HWY_INLINE States(int state_bits) {
    HWY_ALIGN uint8_t bytes[4 * kGroup];
    HWY_ALIGN uint32_t shifts[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      // Eight step bits: the second half of a group begins eight bytes on.
      const int first = i * kStepBits / 8 - (kStepBits == 8 && i >= kGroup / 2 ? kGroup / 2 : 0);
      for (int b = 0; b < 4; ++b) bytes[4 * i + b] = static_cast<uint8_t>(first + 3 - b);
      shifts[i] = static_cast<uint32_t>(32 - state_bits - i * kStepBits % 8);
    }
    for (int part = 0; part < kParts; ++part) {
      pattern_[part] = hn::Load(Bytes(), bytes + 4 * kWidth * part);
      shift_[part] = hn::Load(Words(), shifts + kWidth * part);
    }
    mask_ = hn::Set(Words(), (1u << state_bits) - 1);
  }

  HWY_INLINE Word operator()(const uint8_t* HWY_RESTRICT group, int part) const {
    const Bytes d;
    hn::Vec<Bytes> bytes;
    if constexpr (kStepBits == 8 && kParts == 1) {
      const hn::Half<Bytes> half;
      bytes = hn::Combine(d, hn::LoadDup128(half, group + kGroup / 2), hn::LoadDup128(half, group));
    } else {
      const int from = kStepBits == 8 && part >= kParts / 2 ? kGroup / 2 : 0;
      bytes = hn::LoadDup128(d, group + from);
    }
    const Word word = hn::BitCast(Words(), hn::TableLookupBytes(bytes, pattern_[part]));
    return hn::And(word >> shift_[part], mask_);
  }

 private:
  hn::Vec<Bytes> pattern_[kParts];
  Word shift_[kParts];
  Word mask_;
};

// A float16 in the low half of a word.
HWY_INLINE Float FromHalf(Word half) {
  const Words w;
  const Word sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(w, 0x8000u)));
  const Word magnitude = hn::ShiftLeft<13>(hn::And(half, hn::Set(w, 0x7FFFu)));
  const Float finite = hn::Mul(hn::BitCast(Floats(), magnitude), hn::Set(Floats(), 0x1p112f));
  return hn::BitCast(Floats(), hn::Or(sign, hn::BitCast(w, finite)));
}

HWY_INLINE Float OneMad(Word state) {
  const Words w;
  const Word u = hn::Add(hn::Mul(state, hn::Set(w, 34038481u)), hn::Set(w, 76625530u));
  const Word low = hn::Set(w, 0x00FF00FFu);
  const Word pairs = hn::Add(hn::And(u, low), hn::And(hn::ShiftRight<8>(u), low));
  const Word sum = hn::And(hn::Add(pairs, hn::ShiftRight<16>(pairs)), hn::Set(w, 0xFFFFu));
  return hn::ConvertTo(Floats(), hn::Sub(hn::BitCast(Ints(), sum), hn::Set(Ints(), 510)));
}

HWY_INLINE Float ThreeInst(Word state) {
  const Words w;
  const Word u = hn::Add(hn::Mul(state, hn::Set(w, 89226354u)), hn::Set(w, 64248484u));
  const Word halves = hn::Xor(hn::And(u, hn::Set(w, 0x8FFF8FFFu)), hn::Set(w, 0x3B603B60u));
  const Float sum = hn::Add(FromHalf(halves), FromHalf(hn::ShiftRight<16>(halves)));
  // To the 11 bits of float16, ties to even; the sum is 0 or as large as a normal float16.
  const Word bits = hn::BitCast(w, sum);
  const Word odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(w, 1u));
  const Word rounded = hn::Add(bits, hn::Add(odd, hn::Set(w, 0xFFFu)));
  return hn::BitCast(Floats(), hn::And(rounded, hn::Set(w, 0xFFFFE000u)));
}

// Pairs of float16.
HWY_INLINE Word Hyb(Word state, const uint32_t* pairs) {
  const Words w;
  const Word h = hn::Mul(state, hn::Add(state, hn::Set(w, 1u)));
  const Word index = hn::And(hn::ShiftRight<6>(h), hn::Set(w, 511u));
  const Word sign = hn::ShiftLeft<16>(hn::And(h, hn::Set(w, 0x8000u)));
  return hn::Xor(hn::GatherIndex(w, pairs, hn::BitCast(Ints(), index)), sign);
}

// Calls row(i, part, raw) for each part of each of the 16 rows of a tile.
template <int kCode, int kStepBits, class Row>
HWY_INLINE void ForRows(const uint8_t* stream, const States<kStepBits>& states, const uint32_t* pairs,
                        Row&& row) {
  constexpr int kWeights = kCode == QTR_HYB ? 2 : 1;
  const Unrolled unrolled(stream, kTileWeights / kWeights * kStepBits / 8);
  for (int group = 0; group < kTile / kWeights; ++group) {
    const uint8_t* from = unrolled.bytes + group * kGroup * kStepBits / 8;
    for (int part = 0; part < kParts; ++part) {
      const Word state = states(from, part);
      if constexpr (kCode == QTR_1MAD) {
        row(group, part, OneMad(state));
      } else if constexpr (kCode == QTR_3INST) {
        row(group, part, ThreeInst(state));
      } else {
        const Word pair = Hyb(state, pairs);
        const Float first = FromHalf(pair), second = FromHalf(hn::ShiftRight<16>(pair));
        HWY_ALIGN float both[2 * kWidth];
        hn::StoreInterleaved2(first, second, Floats(), both);
        const int at = 2 * (group * kTile + part * kWidth);
        row(at / kTile, at % kTile / kWidth, hn::Load(Floats(), both));
        row((at + kWidth) / kTile, (at + kWidth) % kTile / kWidth, hn::Load(Floats(), both + kWidth));
      }
    }
  }
}

template <int kCode, int kStepBits>
void DecodeTile(const uint8_t* stream, const TrellisReader& reader, float factor, float* HWY_RESTRICT out) {
  const States<kStepBits> states(reader.state_bits);
  const Float by = hn::Set(Floats(), factor);
  ForRows<kCode>(stream, states, reader.hyb_pairs, [&](int i, int part, Float raw) HWY_ATTR {
    hn::StoreU(hn::Mul(raw, by), Floats(), out + i * kTile + part * kWidth);
  });
}

// Sums of the sixteen rows for one vector.
struct Sums {
  Float of[kTile];

  HWY_INLINE Sums() {
    for (Float& sum : of) sum = hn::Zero(Floats());
  }
  HWY_INLINE void Add(int i, Float raw, const float* HWY_RESTRICT x) {
    of[i] = hn::MulAdd(raw, hn::LoadU(Floats(), x), of[i]);
  }
  HWY_INLINE void Store(float factor, float* HWY_RESTRICT y) const {
    for (int i = 0; i < kTile; ++i) y[i] = hn::GetLane(hn::SumOfLanes(Floats(), of[i])) * factor;
  }
};

template <int kCode, int kStepBits>
void MultiplyRow(const TrellisRow& row, const TrellisReader& reader) {
  const States<kStepBits> states(reader.state_bits);
  const int bytes = kTileWeights * reader.bits / 8;
  if (row.vectors == 1) {
    Sums sums;
    for (int64_t t = 0; t < row.tiles; ++t)
      ForRows<kCode>(row.streams + t * bytes, states, reader.hyb_pairs,
                     [&](int i, int part, Float raw)
                         HWY_ATTR { sums.Add(i, raw, row.x + t * kTile + part * kWidth); });
    return sums.Store(row.factor, row.y);
  }
  constexpr int64_t kTogether = 8;
  for (int64_t first = 0; first < row.vectors; first += kTogether) {
    const int64_t vectors = HWY_MIN(kTogether, row.vectors - first);
    Sums sums[kTogether];
    HWY_ALIGN float tile[kTileWeights];
    for (int64_t t = 0; t < row.tiles; ++t) {
      ForRows<kCode>(row.streams + t * bytes, states, reader.hyb_pairs,
                     [&](int i, int part, Float raw)
                         HWY_ATTR { hn::Store(raw, Floats(), tile + i * kTile + part * kWidth); });
      for (int64_t v = 0; v < vectors; ++v) {
        const float* x = row.x + ((first + v) * row.tiles + t) * kTile;
        for (int i = 0; i < kTile; ++i)
          for (int part = 0; part < kParts; ++part)
            sums[v].Add(i, hn::Load(Floats(), tile + i * kTile + part * kWidth), x + part * kWidth);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) sums[v].Store(row.factor, row.y + (first + v) * row.y_stride);
  }
}

// Calls body with the code and the bits of a step as constants.
template <class Body>
HWY_INLINE void WithConstants(const TrellisReader& reader, Body&& body) {
  const auto with_code = [&](auto code) {
    constexpr int kScale = decltype(code)::value == QTR_HYB ? 2 : 1;
    switch (reader.bits) {
      case 1:
        return body(code, std::integral_constant<int, 1 * kScale>());
      case 2:
        return body(code, std::integral_constant<int, 2 * kScale>());
      case 3:
        return body(code, std::integral_constant<int, 3 * kScale>());
      default:
        return body(code, std::integral_constant<int, 4 * kScale>());
    }
  };
  switch (reader.code) {
    case QTR_1MAD:
      return with_code(std::integral_constant<int, QTR_1MAD>());
    case QTR_3INST:
      return with_code(std::integral_constant<int, QTR_3INST>());
    default:
      return with_code(std::integral_constant<int, QTR_HYB>());
  }
}

void Decode(const uint8_t* stream, const TrellisReader& reader, float factor, float* out) {
  WithConstants(reader, [&](auto code, auto step_bits) {
    DecodeTile<decltype(code)::value, decltype(step_bits)::value>(stream, reader, factor, out);
  });
}

void Matvec(const TrellisRow& row, const TrellisReader& reader) {
  WithConstants(reader, [&](auto code, auto step_bits) {
    MultiplyRow<decltype(code)::value, decltype(step_bits)::value>(row, reader);
  });
}

#endif

void FillKernels(KernelTable& table) {
#if HWY_TARGET == HWY_SCALAR
  static_cast<void>(table);
#else
  table.trellis_decode = Decode;
  table.trellis_matvec = Matvec;
#endif
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(trellis)
#endif
