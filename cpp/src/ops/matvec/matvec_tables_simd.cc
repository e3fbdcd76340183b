// Products of codes that stand for the entries of a table. A table of up to 16 entries is one vector, or two,
// out of which codes pick the factors of as many columns at once; it is multiplied by the scale of a group
// when the group begins, so that factors are rounded as dequantize has them and a group costs one
// multiplication. Instructions that move lanes take no more than the low bits of an index, and smaller tables
// are repeated in the vector: what lies above a code need not be masked away.
//
// With AVX-512 and VBMI, one instruction for each plane takes the codes of 64 columns out of the words, four
// to a lane of 32 bits; an entry then takes a shift, a look-up and the multiplication with x: what the
// kernel for floats (matvec_simd.cc) takes. Four rows share the loads of x. With AVX2, words give eight codes
// by a shift. Other targets have no such look-up: rows are decoded there first, and multiplied by
// matvec_values.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/matvec/matvec_tables_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/cache_control.h>

#include <array>
#include <limits>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

#undef QUANTRATURE_TABLES
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#define QUANTRATURE_TABLES Products

constexpr int kUnit = 64;  // columns
constexpr int kUnits = static_cast<int>(kMatvecChunk / kUnit);
constexpr int64_t kHalf = 32;  // the shortest group

// Which halves of units begin a group.
class Groups {
 public:
  HWY_INLINE explicit Groups(const MatvecBlock& b)
      : halves_(b.scale == nullptr || b.group >= b.cols ? std::numeric_limits<int64_t>::max()
                                                        : b.group / kHalf),
        left_(halves_) {}

  // The group of the next half; begins is whether it is its first, but for that of the row.
  HWY_INLINE int64_t Next(bool& begins) {
    begins = left_ == 0;
    if (begins) {
      left_ = halves_;
      ++group_;
    }
    --left_;
    return group_;
  }

 private:
  const int64_t halves_;
  int64_t left_, group_ = 0;
};

#if HWY_TARGET <= HWY_AVX3_DL

constexpr hn::FixedTag<uint8_t, 64> kBytes;
constexpr hn::FixedTag<uint32_t, 16> kWords;
constexpr hn::FixedTag<float, 16> kFloats;
using Byte = hn::Vec<hn::FixedTag<uint8_t, 64>>;
using Float = hn::Vec<hn::FixedTag<float, 16>>;

constexpr int kRows = 4;

// The low `kBits` bits of a lane choose an entry.
template <int kBits>
HWY_INLINE Float LoadTable(const float* HWY_RESTRICT table) {
  if constexpr (kBits == 4) return hn::LoadU(kFloats, table);
  if constexpr (kBits == 3) return Float{_mm512_broadcast_f32x8(_mm256_loadu_ps(table))};
  if constexpr (kBits == 2) return Float{_mm512_broadcast_f32x4(_mm_loadu_ps(table))};
  return hn::OddEven(hn::Set(kFloats, table[1]), hn::Set(kFloats, table[0]));
}

// Where byte b of lane d begins among the 64 bits that its half of the lanes of a plane of P bits has: there
// lies the code of column 16 b + d of unit kIndex, and with kAbove its field one bit further up.
template <int P, int kIndex, int kAbove>
constexpr std::array<uint8_t, 64> Windows() {
  std::array<uint8_t, 64> first{};
  for (int d = 0; d < 16; ++d)
    for (int b = 0; b < 4; ++b) {
      const int number = kIndex * 8 + 2 * b + d / 8;  // of the eight columns that share a bit
      const int bit = d % 2 * 32 + P * (number % (32 / P)) - kAbove;
      first[static_cast<size_t>(4 * d + b)] = static_cast<uint8_t>(bit & 63);
    }
  return first;
}
template <int P, int kIndex, int kAbove>
constexpr std::array<uint8_t, 64> kWindows = Windows<P, kIndex, kAbove>();

template <int P, int kIndex, int kAbove>
HWY_INLINE Byte PlaneCodes(const uint8_t* HWY_RESTRICT plane, int64_t chunk) {
  const uint8_t* block = plane + (P * kMatvecChunk / 8) * chunk + P * kIndex / 4 * 32;
  const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
  return Byte{_mm512_multishift_epi64_epi8(hn::LoadU(kBytes, kWindows<P, kIndex, kAbove>.data()).raw, words)};
}

// The codes of a unit: byte b of lane d is that of column 16 b + d, with other bits above it.
template <int kBits, int kIndex>
HWY_INLINE Byte UnitCodes(const uint8_t* HWY_RESTRICT row, int64_t plane_step, int64_t chunk) {
  if constexpr (kBits == 3)
    return hn::IfVecThenElse(hn::Set(kBytes, uint8_t{1}),
                             PlaneCodes<1, kIndex, 0>(row + 2 * plane_step, chunk),
                             PlaneCodes<2, kIndex, 1>(row, chunk));
  else
    return PlaneCodes<kBits, kIndex, 0>(row, chunk);
}

template <int kStep>
HWY_INLINE Float Entries(Byte codes, Float table) {
  return Float{_mm512_permutexvar_ps(hn::ShiftRight<8 * kStep>(hn::BitCast(kWords, codes)).raw, table.raw)};
}

// One of each of four rows, or vectors. (Arrays that loops index are kept in memory by the compiler.)
template <class T>
struct Four {
  T a, b, c, d;
};

HWY_INLINE void AddProducts(const Four<Float>& factor, Float x, Four<Float>& sum) {
  sum.a = hn::MulAdd(factor.a, x, sum.a);
  sum.b = hn::MulAdd(factor.b, x, sum.b);
  sum.c = hn::MulAdd(factor.c, x, sum.c);
  sum.d = hn::MulAdd(factor.d, x, sum.d);
}

// 16 columns, which x begins with.
template <int kStep, int kVectors>
HWY_INLINE void AddStep(const Four<Byte>& codes, const Four<Float>& tables, const float* HWY_RESTRICT x,
                        int64_t x_stride, Four<Four<Float>>& sums) {
  const Four<Float> factor{Entries<kStep>(codes.a, tables.a), Entries<kStep>(codes.b, tables.b),
                           Entries<kStep>(codes.c, tables.c), Entries<kStep>(codes.d, tables.d)};
  AddProducts(factor, hn::LoadU(kFloats, x), sums.a);
  if constexpr (kVectors == 4) {
    AddProducts(factor, hn::LoadU(kFloats, x + x_stride), sums.b);
    AddProducts(factor, hn::LoadU(kFloats, x + 2 * x_stride), sums.c);
    AddProducts(factor, hn::LoadU(kFloats, x + 3 * x_stride), sums.d);
  }
}

template <int kBits>
HWY_INLINE void PrefetchChunk(const uint8_t* HWY_RESTRICT row, int64_t plane_step, int64_t chunk) {
  if constexpr (kBits == 4) {
    hwy::Prefetch(row + 128 * chunk);
    hwy::Prefetch(row + 128 * chunk + 64);
  }
  if constexpr ((kBits & 2) != 0) hwy::Prefetch(row + 64 * chunk);
  if constexpr ((kBits & 1) != 0) hwy::Prefetch(row + (kBits & 2) * plane_step + 32 * chunk);
}

// Four rows, those from `row` on, and past the last one that one again, and one vector or four.
template <int kBits, int kVectors>
void AddRows(const MatvecTables& m, int64_t row, int64_t vector) {
  const MatvecBlock& b = m.block;
  const auto of_rows = [&](auto&& of) HWY_ATTR {
    const int64_t last = b.rows - 1;
    return Four<decltype(of(row))>{of(row), of(HWY_MIN(row + 1, last)), of(HWY_MIN(row + 2, last)),
                                   of(HWY_MIN(row + 3, last))};
  };
  const auto codes_of = of_rows([&](int64_t i) { return b.codes + i * b.row_bytes; });
  const auto tables_of = [&](int64_t group) HWY_ATTR {
    return of_rows([&](int64_t i) HWY_ATTR {
      const Float table = LoadTable<kBits>(m.table + i * m.table_stride);
      return b.scale == nullptr ? table : hn::Mul(table, hn::Set(kFloats, b.scale[i * b.groups + group]));
    });
  };
  Groups groups(b);
  Four<Float> tables = tables_of(0);
  const Float zero = hn::Zero(kFloats);
  const Four<Float> zeros{zero, zero, zero, zero};
  Four<Four<Float>> sums{zeros, zeros, zeros, zeros};

  const int64_t chunks = b.cols / kMatvecChunk, plane_step = (b.cols + 7) / 8, ahead = kRows * b.row_bytes;
  const float* x = b.x + vector * b.x_stride;
  const auto add_unit = [&](auto index, int64_t chunk) HWY_ATTR {
    constexpr int kIndex = decltype(index)::value;
    const auto unit = [&](const uint8_t* from)
                          HWY_ATTR { return UnitCodes<kBits, kIndex>(from, plane_step, chunk); };
    const Four<Byte> codes{unit(codes_of.a), unit(codes_of.b), unit(codes_of.c), unit(codes_of.d)};
    bool begins;
    int64_t group = groups.Next(begins);
    if (begins) tables = tables_of(group);
    AddStep<0, kVectors>(codes, tables, x, b.x_stride, sums);
    AddStep<1, kVectors>(codes, tables, x + 16, b.x_stride, sums);
    group = groups.Next(begins);
    if (begins) tables = tables_of(group);
    AddStep<2, kVectors>(codes, tables, x + 32, b.x_stride, sums);
    AddStep<3, kVectors>(codes, tables, x + 48, b.x_stride, sums);
    x += kUnit;
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    PrefetchChunk<kBits>(codes_of.a + ahead, plane_step, chunk);
    PrefetchChunk<kBits>(codes_of.b + ahead, plane_step, chunk);
    PrefetchChunk<kBits>(codes_of.c + ahead, plane_step, chunk);
    PrefetchChunk<kBits>(codes_of.d + ahead, plane_step, chunk);
    add_unit(std::integral_constant<int, 0>(), chunk);
    add_unit(std::integral_constant<int, 1>(), chunk);
    add_unit(std::integral_constant<int, 2>(), chunk);
    add_unit(std::integral_constant<int, 3>(), chunk);
  }
  const auto add = [&](int64_t v, const Four<Float>& of) HWY_ATTR {
    float* y = b.y + (vector + v) * b.y_stride + row;
    const auto total = [&](int64_t r, Float sum) HWY_ATTR {
      if (row + r < b.rows) y[r] += hn::GetLane(hn::SumOfLanes(kFloats, sum));
    };
    total(0, of.a);
    total(1, of.b);
    total(2, of.c);
    total(3, of.d);
  };
  add(0, sums.a);
  if constexpr (kVectors == 4) {
    add(1, sums.b);
    add(2, sums.c);
    add(3, sums.d);
  }
}

#else  // eight lanes

constexpr hn::FixedTag<float, 8> kFloats;
constexpr hn::FixedTag<uint32_t, 8> kWords;
using Float = hn::Vec<hn::FixedTag<float, 8>>;
using Word = hn::Vec<hn::FixedTag<uint32_t, 8>>;

constexpr int kRows = 1;

// The low `kBits` bits of a lane choose an entry.
template <int kBits>
struct Table {
  Float low, high;  // high: entries 8 to 15

  HWY_INLINE Table(const float* HWY_RESTRICT table, float scale) {
    const Float factor = hn::Set(kFloats, scale);
    low = high = hn::Mul(Load(table), factor);
    if constexpr (kBits == 4) high = hn::Mul(hn::LoadU(kFloats, table + 8), factor);
  }

  HWY_INLINE Float operator()(Word code) const {
    if constexpr (kBits < 4) return Float{_mm256_permutevar8x32_ps(low.raw, code.raw)};
#if HWY_TARGET <= HWY_AVX3
    return Float{_mm256_permutex2var_ps(low.raw, code.raw, high.raw)};
#else
    const __m256 beyond = _mm256_castsi256_ps(hn::ShiftLeft<28>(code).raw);  // the sign decides
    return Float{_mm256_blendv_ps(_mm256_permutevar8x32_ps(low.raw, code.raw),
                                  _mm256_permutevar8x32_ps(high.raw, code.raw), beyond)};
#endif
  }

 private:
  static HWY_INLINE Float Load(const float* HWY_RESTRICT table) {
    if constexpr (kBits >= 3) return hn::LoadU(kFloats, table);
    if constexpr (kBits == 2) return hn::LoadDup128(kFloats, table);
    return hn::OddEven(hn::Set(kFloats, table[1]), hn::Set(kFloats, table[0]));
  }
};

template <int kBits>
HWY_INLINE Word Down(Word x) {
  if constexpr (kBits >= 0)
    return hn::ShiftRight<kBits>(x);
  else
    return hn::ShiftLeft<-kBits>(x);
}

// The words of each plane that unit kIndex of a chunk has.
template <int kBits, int kIndex>
struct UnitWords {
  Word high, low;  // low: the plane of one bit beside that of two

  HWY_INLINE UnitWords(const uint8_t* HWY_RESTRICT row, int64_t plane_step, int64_t chunk) {
    constexpr int P = kBits == 3 ? 2 : kBits;
    high = low = Block<P>(row, chunk);
    if constexpr (kBits == 3) low = Block<1>(row + 2 * plane_step, chunk);
  }

  // The codes of the eight columns from 8 kNumber on.
  template <int kNumber>
  HWY_INLINE Word Codes() const {
    constexpr int kOfChunk = 8 * kIndex + kNumber;
    if constexpr (kBits == 3) {
      const Word bit = hn::Set(kWords, 1u);
      return hn::Or(hn::And(bit, Down<kOfChunk>(low)), hn::AndNot(bit, Down<2 * (kOfChunk % 16) - 1>(high)));
    } else {
      return Down<kBits*(kOfChunk % (32 / kBits))>(high);
    }
  }

 private:
  template <int P>
  static HWY_INLINE Word Block(const uint8_t* HWY_RESTRICT plane, int64_t chunk) {
    const uint8_t* block = plane + (P * kMatvecChunk / 8) * chunk + P * kIndex / 4 * 32;
    return hn::LoadU(kWords, reinterpret_cast<const uint32_t*>(block));
  }
};

template <int kVectors>
struct Sums {
  Float even[kVectors], odd[kVectors];  // of every second eight columns: additions wait for each other
};

template <int kVectors, int kNumber, class Words, class Lookup>
HWY_INLINE void AddEight(const Words& words, const Lookup& table, const float* HWY_RESTRICT x,
                         int64_t x_stride, Float (&sums)[kVectors]) {
  const Float factor = table(words.template Codes<kNumber>());
  for (int v = 0; v < kVectors; ++v)
    sums[v] = hn::MulAdd(factor, hn::LoadU(kFloats, x + v * x_stride + 8 * kNumber), sums[v]);
}

// A row, and one vector or four.
template <int kBits, int kVectors>
void AddRows(const MatvecTables& m, int64_t row, int64_t vector) {
  const MatvecBlock& b = m.block;
  const uint8_t* codes = b.codes + row * b.row_bytes;
  const auto table_of = [&](int64_t group) HWY_ATTR {
    return Table<kBits>(m.table + row * m.table_stride,
                        b.scale == nullptr ? 1.0f : b.scale[row * b.groups + group]);
  };
  Groups groups(b);
  Table<kBits> table = table_of(0);
  Sums<kVectors> sums;
  for (int v = 0; v < kVectors; ++v) sums.even[v] = sums.odd[v] = hn::Zero(kFloats);
  const int64_t chunks = b.cols / kMatvecChunk, plane_step = (b.cols + 7) / 8;
  const float* x = b.x + vector * b.x_stride;
  const auto add_unit = [&](auto index, int64_t chunk) HWY_ATTR {
    const UnitWords<kBits, decltype(index)::value> words(codes, plane_step, chunk);
    bool begins;
    int64_t group = groups.Next(begins);
    if (begins) table = table_of(group);
    AddEight<kVectors, 0>(words, table, x, b.x_stride, sums.even);
    AddEight<kVectors, 1>(words, table, x, b.x_stride, sums.odd);
    AddEight<kVectors, 2>(words, table, x, b.x_stride, sums.even);
    AddEight<kVectors, 3>(words, table, x, b.x_stride, sums.odd);
    group = groups.Next(begins);
    if (begins) table = table_of(group);
    AddEight<kVectors, 4>(words, table, x, b.x_stride, sums.even);
    AddEight<kVectors, 5>(words, table, x, b.x_stride, sums.odd);
    AddEight<kVectors, 6>(words, table, x, b.x_stride, sums.even);
    AddEight<kVectors, 7>(words, table, x, b.x_stride, sums.odd);
    x += kUnit;
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    add_unit(std::integral_constant<int, 0>(), chunk);
    add_unit(std::integral_constant<int, 1>(), chunk);
    add_unit(std::integral_constant<int, 2>(), chunk);
    add_unit(std::integral_constant<int, 3>(), chunk);
  }
  for (int v = 0; v < kVectors; ++v)
    b.y[(vector + v) * b.y_stride + row] +=
        hn::GetLane(hn::SumOfLanes(kFloats, hn::Add(sums.even[v], sums.odd[v])));
}

#endif

template <int kBits>
void AddBlock(const MatvecTables& m) {
  for (int64_t row = 0; row < m.block.rows; row += kRows) {
    int64_t v = 0;
    for (; v + 4 <= m.block.vectors; v += 4) AddRows<kBits, 4>(m, row, v);
    for (; v < m.block.vectors; ++v) AddRows<kBits, 1>(m, row, v);
  }
}

void Products(const MatvecTables& m) {
  switch (m.block.bits) {
    case 1:
      return AddBlock<1>(m);
    case 2:
      return AddBlock<2>(m);
    case 3:
      return AddBlock<3>(m);
    default:
      return AddBlock<4>(m);
  }
}

#else
#define QUANTRATURE_TABLES nullptr
#endif

float Values(const float* HWY_RESTRICT values, int64_t n, const float* HWY_RESTRICT x) {
  const hn::CappedTag<float, 16> d;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  auto a = hn::Zero(d), b = a, c = a, e = a;  // additions wait for each other
  const auto product = [&](int64_t at, auto sum) HWY_ATTR {
    return hn::MulAdd(hn::LoadU(d, values + at), hn::LoadU(d, x + at), sum);
  };
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    a = product(i, a);
    b = product(i + width, b);
    c = product(i + 2 * width, c);
    e = product(i + 3 * width, e);
  }
  for (; i + width <= n; i += width) a = product(i, a);
  float rest = 0;
  for (; i < n; ++i) rest += values[i] * x[i];
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e)))) + rest;
}

void FillKernels(KernelTable& table) {
  table.matvec_tables = QUANTRATURE_TABLES;
  table.matvec_values = Values;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(matvec_tables)
#endif
