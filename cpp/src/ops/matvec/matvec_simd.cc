// The products of blocks are written out in vectors. Eight words of a plane have the codes of eight
// neighbours at the same bits, so that a mask and a conversion give eight factors at once, as in_word_units
// (block.hpp) says; the multiplication adds to a sum of 64 or 32 codes, whose scale comes in at its end.
// Three instructions for eight codes of a plane: the arithmetic is the limit, not the memory. They are
// compiled where they have their use: not where matvec_bytes_simd.cc has faster ones, and not without
// vectors.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/matvec/matvec_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <bit>
#include <cmath>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

static_assert(std::endian::native == std::endian::little, "blocks are loaded as words");

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kLanes = 8;  // of a block
constexpr int64_t kUnit = kMatvecUnit;
constexpr int kUnits = static_cast<int>(kMatvecChunk / kUnit);

using Floats = hn::CappedTag<float, kLanes>;
using Words = hn::RebindToUnsigned<Floats>;
using Float = hn::Vec<Floats>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kParts = kLanes / kWidth;  // vectors that hold eight numbers

#undef QUANTRATURE_BLOCKS
#if HWY_TARGET != HWY_SCALAR && !(HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL)
#define QUANTRATURE_BLOCKS MatvecBlocks

template <int kVectors>
struct Sums {
  Float part[kVectors][kParts];

  HWY_INLINE Sums() {
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kParts; ++i) part[v][i] = hn::Zero(Floats());
  }
};

HWY_INLINE float Total(const Float (&part)[kParts]) {
  const Floats d;
  Float sum = part[0];
  for (int i = 1; i < kParts; ++i) sum = hn::Add(sum, part[i]);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// Field k of words that begin with the fields of a unit, times what in_word_units undoes.
template <int P, int K>
HWY_INLINE Float Field(hn::Vec<Words> words) {
  const Words w;
  const hn::RebindToSigned<Floats> i;
  if constexpr (P * (K + 1) == 32)
    return hn::ConvertTo(Floats(), hn::BitCast(i, hn::ShiftRight<32 - P>(words)));
  else
    return hn::ConvertTo(Floats(), hn::BitCast(i, hn::And(words, hn::Set(w, ((1u << P) - 1) << (P * K)))));
}

template <int P, int K, int kEnd, int kVectors>
HWY_INLINE void AddFields(hn::Vec<Words> words, const float* HWY_RESTRICT x, int64_t x_stride, int part,
                          Sums<kVectors>& sums) {
  const Floats d;
  const Float field = Field<P, K>(words);
  for (int v = 0; v < kVectors; ++v)
    sums.part[v][part] =
        hn::MulAdd(field, hn::LoadU(d, x + v * x_stride + kLanes * K + part * kWidth), sums.part[v][part]);
  if constexpr (K + 1 < kEnd) AddFields<P, K + 1, kEnd>(words, x, x_stride, part, sums);
}

// Half kHalf of the 64 codes of unit kIndex of a chunk; both halves, if kHalf is 2. The plane and x begin
// with the chunk.
template <int P, int kIndex, int kHalf, int kVectors>
HWY_INLINE void AddUnit(const uint8_t* HWY_RESTRICT plane, const float* HWY_RESTRICT x, int64_t x_stride,
                        Sums<kVectors>& sums) {
  const Words w;
  constexpr int kCodes = kUnit * kIndex;
  const auto* words = reinterpret_cast<const uint32_t*>(plane);
  for (int part = 0; part < kParts; ++part) {
    const auto load = [&](int block)
                          HWY_ATTR { return hn::LoadU(w, words + block * kLanes + part * kWidth); };
    if constexpr (P == 8) {
      if (kHalf != 1) AddFields<P, 0, 4>(load(2 * kIndex), x + kCodes, x_stride, part, sums);
      if (kHalf != 0) AddFields<P, 0, 4>(load(2 * kIndex + 1), x + kCodes + kUnit / 2, x_stride, part, sums);
    } else {
      const auto unit = hn::ShiftRight<P * 8 * kIndex % 32>(load(P * 8 * kIndex / 32));
      AddFields<P, kHalf == 1 ? 4 : 0, kHalf == 0 ? 4 : 8>(unit, x + kCodes, x_stride, part, sums);
    }
  }
}

// The planes of a row and of the vectors, moved on chunk by chunk.
template <int kBits>
struct Planes {
  const uint8_t* codes[3];
  const float* x[3];

  HWY_INLINE Planes(const uint8_t* row, const float* shifted, int64_t cols) {
    int i = 0;
    for (int p : {8, 4, 2, 1}) {
      if (!(kBits & p)) continue;
      codes[i] = row;
      x[i] = shifted + i * cols;
      row += p * ((cols + 7) / 8);
      ++i;
    }
  }

  template <int kIndex, int kHalf, int kVectors>
  HWY_INLINE void Add(int64_t x_stride, Sums<kVectors>& sums) const {
    constexpr int kSecond = kBits & 4 ? 1 : 0, kThird = kSecond + (kBits & 2 ? 1 : 0);
    if constexpr (kBits == 8) AddUnit<8, kIndex, kHalf>(codes[0], x[0], x_stride, sums);
    if constexpr ((kBits & 4) != 0) AddUnit<4, kIndex, kHalf>(codes[0], x[0], x_stride, sums);
    if constexpr ((kBits & 2) != 0) AddUnit<2, kIndex, kHalf>(codes[kSecond], x[kSecond], x_stride, sums);
    if constexpr ((kBits & 1) != 0) AddUnit<1, kIndex, kHalf>(codes[kThird], x[kThird], x_stride, sums);
  }

  HWY_INLINE void Advance(int64_t columns) {
    int i = 0;
    for (int p : {8, 4, 2, 1}) {
      if (!(kBits & p)) continue;
      codes[i] += p * columns / 8;
      x[i] += columns;
      ++i;
    }
  }
};

template <int kVectors>
HWY_INLINE void AddScaled(const Sums<kVectors>& sums, float scale, Sums<kVectors>& total) {
  const Float factor = hn::Set(Floats(), scale);
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kParts; ++i) total.part[v][i] = hn::MulAdd(sums.part[v][i], factor, total.part[v][i]);
}

// Where the scales of a row are read; to divide columns by group sizes would take longer than to multiply.
struct Scales {
  const float* next;
  int64_t units_of_group;
  int64_t units_left;

  HWY_INLINE float OfUnit() {
    if (units_left == 0) {
      units_left = units_of_group;
      ++next;
    }
    --units_left;
    return *next;
  }
};

template <int kBits, bool kHalves, int kIndex, int kVectors>
HWY_INLINE void AddOneUnit(const Planes<kBits>& planes, Scales& scales, int64_t x_stride,
                           Sums<kVectors>& total) {
  if constexpr (kHalves) {
    Sums<kVectors> first, second;
    planes.template Add<kIndex, 0>(x_stride, first);
    planes.template Add<kIndex, 1>(x_stride, second);
    AddScaled(first, scales.next[0], total);
    AddScaled(second, scales.next[1], total);
    scales.next += 2;
  } else {
    Sums<kVectors> sums;
    planes.template Add<kIndex, 2>(x_stride, sums);
    AddScaled(sums, scales.OfUnit(), total);
  }
}

template <int kBits, bool kHalves, int kIndex, int kVectors>
HWY_INLINE void AddUnits(const Planes<kBits>& planes, Scales& scales, int64_t x_stride,
                         Sums<kVectors>& total) {
  AddOneUnit<kBits, kHalves, kIndex>(planes, scales, x_stride, total);
  if constexpr (kIndex + 1 < kUnits) AddUnits<kBits, kHalves, kIndex + 1>(planes, scales, x_stride, total);
}

template <int kBits, bool kHalves, int kVectors>
void AddRows(const MatvecBlock& b, int64_t vector) {
  const int64_t x_stride = plane_count(kBits) * b.cols;
  const int64_t blocked = blocked_columns(b.cols, kBits);
  const int64_t chunks = blocked / kMatvecChunk, units = blocked % kMatvecChunk / kUnit;
  const int64_t units_of_group = (b.group >= blocked ? blocked : b.group) / kUnit;
  for (int64_t row = 0; row < b.rows; ++row) {
    Planes<kBits> planes(b.codes + row * b.row_bytes, b.shifted + vector * x_stride, b.cols);
    Scales scales{b.scale + row * b.groups, units_of_group, units_of_group};
    Sums<kVectors> total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      AddUnits<kBits, kHalves, 0>(planes, scales, x_stride, total);
      planes.Advance(kMatvecChunk);
    }
    if constexpr (has_units(kBits))
      for (int64_t unit = 0; unit < units; ++unit) {
        AddOneUnit<kBits, kHalves, 0>(planes, scales, x_stride, total);
        planes.Advance(kUnit);
      }
    for (int v = 0; v < kVectors; ++v) b.y[(vector + v) * b.y_stride + row] += Total(total.part[v]);
  }
}

template <int kBits>
void AddBlock(const MatvecBlock& b) {
  const bool halves = b.group == kUnit / 2;
  int64_t v = 0;
  for (; v + 4 <= b.vectors; v += 4) (halves ? AddRows<kBits, true, 4> : AddRows<kBits, false, 4>)(b, v);
  for (; v < b.vectors; ++v) (halves ? AddRows<kBits, true, 1> : AddRows<kBits, false, 1>)(b, v);
}

void MatvecBlocks(const MatvecBlock& b) {
  switch (b.bits) {
    case 1:
      return AddBlock<1>(b);
    case 2:
      return AddBlock<2>(b);
    case 3:
      return AddBlock<3>(b);
    case 4:
      return AddBlock<4>(b);
    case 5:
      return AddBlock<5>(b);
    case 6:
      return AddBlock<6>(b);
    case 7:
      return AddBlock<7>(b);
    default:
      return AddBlock<8>(b);
  }
}

#else
#define QUANTRATURE_BLOCKS nullptr
#endif

// Calls body(i) for i at every full vector of [0, n), then rest(i) for the numbers that remain.
template <class Body, class Rest>
HWY_INLINE void ForVectors(int64_t n, Body&& body, Rest&& rest) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i);
  for (; i < n; ++i) rest(i);
}

void MatvecZeros(const MatvecBlock& b) {
  const Floats d;
  for (int64_t v = 0; v < b.vectors; ++v)
    for (int64_t row = 0; row < b.rows; ++row) {
      const float* scale = b.scale + row * b.groups;
      const float* zero = b.zero + row * b.groups;
      const float* sums = b.sums + v * b.groups;
      Float total = hn::Zero(d);
      float rest = 0;
      ForVectors(
          b.groups,
          [&](int64_t g) HWY_ATTR {
            total = hn::MulAdd(hn::Mul(hn::LoadU(d, scale + g), hn::LoadU(d, zero + g)),
                               hn::LoadU(d, sums + g), total);
          },
          [&](int64_t g) { rest += scale[g] * zero[g] * sums[g]; });
      b.y[v * b.y_stride + row] -= hn::GetLane(hn::SumOfLanes(d, total)) + rest;
    }
}

float MatvecCodes(const uint8_t* HWY_RESTRICT codes, int64_t begin, int64_t end, int64_t group,
                  const float* HWY_RESTRICT scale, const float* HWY_RESTRICT x) {
  const Floats d;
  const hn::Rebind<uint8_t, Floats> bytes;
  const hn::RebindToSigned<Floats> i;
  Float total = hn::Zero(d);
  float rest = 0;
  for (int64_t from = begin; from < end;) {
    const int64_t g = from / group, to = HWY_MIN((g + 1) * group, end);
    const uint8_t* c = codes + (from - begin);
    Float sum = hn::Zero(d);
    float loose = 0;
    ForVectors(
        to - from,
        [&](int64_t k) HWY_ATTR {
          const Float code = hn::ConvertTo(d, hn::PromoteTo(i, hn::LoadU(bytes, c + k)));
          sum = hn::MulAdd(code, hn::LoadU(d, x + from + k), sum);
        },
        [&](int64_t k) { loose += static_cast<float>(c[k]) * x[from + k]; });
    total = hn::MulAdd(sum, hn::Set(d, scale[g]), total);
    rest += scale[g] * loose;
    from = to;
  }
  return hn::GetLane(hn::SumOfLanes(d, total)) + rest;
}

void MatvecRound(const float* HWY_RESTRICT x, int64_t n, float* HWY_RESTRICT out) {
  const Floats d;
  const hn::RebindToSigned<Floats> i;
  for (int64_t begin = 0; begin < n; begin += kMatvecRun) {
    const float* from = x + begin;
    float* to = out + begin;
    const int64_t size = HWY_MIN(kMatvecRun, n - begin);
    // As integers, magnitudes keep their order and NaN is above all.
    auto bits = hn::Zero(i);
    int32_t loose = 0;
    ForVectors(
        size,
        [&](int64_t k) HWY_ATTR { bits = hn::Max(bits, hn::BitCast(i, hn::Abs(hn::LoadU(d, from + k)))); },
        [&](int64_t k) { loose = HWY_MAX(loose, std::bit_cast<int32_t>(std::fabs(from[k]))); });
    const float largest = std::bit_cast<float>(HWY_MAX(loose, hn::GetLane(hn::MaxOfLanes(i, bits))));
    const bool rounds = !(largest < kSmallestRounded);
    const float unit = rounds ? largest / 127 : 0.0f, inverse = rounds ? 127 / largest : 0.0f;
    ForVectors(
        size,
        [&](int64_t k) HWY_ATTR {
          const Float scaled = hn::Mul(hn::LoadU(d, from + k), hn::Set(d, inverse));
          hn::StoreU(hn::Mul(hn::Round(scaled), hn::Set(d, unit)), d, to + k);
        },
        [&](int64_t k) { to[k] = std::nearbyint(from[k] * inverse) * unit; });
  }
}

void FillKernels(KernelTable& table) {
  table.matvec_blocks = QUANTRATURE_BLOCKS;
  table.matvec_zeros = MatvecZeros;
  table.matvec_codes = MatvecCodes;
  table.matvec_round = MatvecRound;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(matvec)
#endif
