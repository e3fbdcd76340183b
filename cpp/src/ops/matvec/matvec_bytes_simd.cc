// Products of codes and integers of 8 bits, four to an instruction, where the CPU has that instruction and
// one to move bytes across a vector of 64 (AVX-512 VNNI and VBMI); elsewhere the kernels for floats stand in,
// and the table has none of these.
//
// A chunk of 256 codes becomes four vectors of 64 bytes, in the order of byte_place: vector f has the columns
// 8 f to 8 f + 7 of each 32. So each 32-bit lane of the products stays within 32 columns, and groups of 32
// cost what groups of 64 do: one conversion and one multiplication by the scales of the lanes a chunk. A
// number of three limbs takes three products and comes together by shifts of the sum. Four rows at a time
// share the loads of x. The arithmetic is the limit, not the memory: on Zen 4, where 12 products take 12
// cycles, a chunk takes 21, 26 and 19 with 4, 3 and 2 bits out of the first cache; with one limb 13, 17
// and 11.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/matvec/matvec_bytes_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <hwy/cache_control.h>

#include <array>
#include <bit>

#include "common/ceil_div.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL

namespace hn = hwy::HWY_NAMESPACE;

constexpr hn::FixedTag<uint8_t, 64> kBytes;
constexpr hn::FixedTag<uint32_t, 16> kWords;
constexpr hn::FixedTag<int32_t, 16> kInts;
constexpr hn::FixedTag<float, 16> kFloats;
using Byte = hn::Vec<hn::FixedTag<uint8_t, 64>>;
using Int = hn::Vec<hn::FixedTag<int32_t, 16>>;
using Float = hn::Vec<hn::FixedTag<float, 16>>;

constexpr int kRows = 4;
constexpr int kLanes = 16;
constexpr int64_t kUnits = kMatvecChunk / kMatvecUnit;

// sum += the four products of each lane.
HWY_INLINE void AddProducts(Byte codes, Byte x, Int& sum) {
  // Volatile, so that the compiler lets the sums take turns as written: each waits four cycles for its last.
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(x.raw));
}

// Byte 8 r + i of the result is byte of(r, i) of the source.
template <class Of>
constexpr std::array<uint8_t, 64> Order(Of of) {
  std::array<uint8_t, 64> order{};
  for (int r = 0; r < 8; ++r)
    for (int i = 0; i < 8; ++i) order[static_cast<size_t>(8 * r + i)] = static_cast<uint8_t>(of(r, i));
  return order;
}

// Where a plane has the fields of columns 32 r + 8 f + i, by packing.hpp. With 4 bits, one byte has those of
// f = 0 and 1 and the next those of f = 2 and 3; with 2, one byte has all four; with 1, the upper half of the
// byte belongs to odd r. With 8, the bytes of two f are taken at once, out of half the chunk.
constexpr auto kOrder4 = Order([](int r, int i) { return 32 * (r / 2) + 4 * i + 2 * (r % 2); });
constexpr auto kOrder4Next = Order([](int r, int i) { return 32 * (r / 2) + 4 * i + 2 * (r % 2) + 1; });
constexpr auto kOrder2 = Order([](int r, int i) { return 32 * (r / 4) + 4 * i + r % 4; });
constexpr auto kOrder1 = Order([](int r, int i) { return 4 * i + r / 2; });
constexpr auto kOrder8 = Order([](int r, int i) { return 32 * (r % 4) + 4 * i + r / 4; });
constexpr auto kOrder8Next = Order([](int r, int i) { return 32 * (r % 4) + 4 * i + r / 4 + 2; });

HWY_INLINE Byte Permuted(Byte x, const std::array<uint8_t, 64>& order) {
  return Byte{_mm512_permutexvar_epi8(hn::LoadU(kBytes, order.data()).raw, x.raw)};
}
HWY_INLINE Byte Permuted(Byte low, Byte high, const std::array<uint8_t, 64>& order) {
  return Byte{_mm512_permutex2var_epi8(low.raw, hn::LoadU(kBytes, order.data()).raw, high.raw)};
}

// Bits move between bytes; what they bring along is masked away.
template <int kBits>
HWY_INLINE Byte Down(Byte x) {
  if constexpr (kBits == 0)
    return x;
  else if constexpr (kBits > 0)
    return hn::BitCast(kBytes, hn::ShiftRight<kBits>(hn::BitCast(kWords, x)));
  else
    return hn::BitCast(kBytes, hn::ShiftLeft<-kBits>(hn::BitCast(kWords, x)));
}

// The planes of a chunk of a row: vectors whose bytes have the fields of one or more f.
template <int kBits>
struct Fields {
  Byte eight[4], four[2], two, one;

  // Those of the row `ahead` bytes on are asked for: rows are too short for the hardware to foresee them. Of
  // the units behind the first `units`, if the codes have units, the codes are 0.
  HWY_INLINE Fields(const uint8_t* HWY_RESTRICT row, int64_t plane_step, int64_t chunk, int64_t ahead,
                    int64_t units) {
    if constexpr (kBits == 8) {
      const uint8_t* from = row + 256 * chunk;
      for (int i = 0; i < 4; ++i) hwy::Prefetch(from + ahead + 64 * i);
      const auto unit = [&](int64_t i) HWY_ATTR {
        return i < units ? hn::LoadU(kBytes, from + 64 * i) : hn::Zero(kBytes);
      };
      const Byte a = unit(0), b = unit(1), c = unit(2), d = unit(3);
      const Byte low = Permuted(a, b, kOrder8), high = Permuted(c, d, kOrder8);
      const Byte low_next = Permuted(a, b, kOrder8Next), high_next = Permuted(c, d, kOrder8Next);
      eight[0] = hn::ConcatLowerLower(kBytes, high, low);
      eight[1] = hn::ConcatUpperUpper(kBytes, high, low);
      eight[2] = hn::ConcatLowerLower(kBytes, high_next, low_next);
      eight[3] = hn::ConcatUpperUpper(kBytes, high_next, low_next);
      return;
    }
    if constexpr ((kBits & 4) != 0) {
      const uint8_t* from = row + 128 * chunk;
      hwy::Prefetch(from + ahead);
      hwy::Prefetch(from + ahead + 64);
      Byte a, b;
      if constexpr (has_units(kBits)) {
        const auto of_units = [&](int64_t first) HWY_ATTR {
          return hn::FirstN(kBytes, static_cast<size_t>(32 * HWY_MIN(HWY_MAX(units - first, 0), 2)));
        };
        a = hn::MaskedLoad(of_units(0), kBytes, from);
        b = hn::MaskedLoad(of_units(2), kBytes, from + 64);
      } else {
        a = hn::LoadU(kBytes, from), b = hn::LoadU(kBytes, from + 64);
      }
      four[0] = Permuted(a, b, kOrder4);
      four[1] = Permuted(a, b, kOrder4Next);
      row += 4 * plane_step;
    }
    if constexpr ((kBits & 2) != 0) {
      const uint8_t* from = row + 64 * chunk;
      hwy::Prefetch(from + ahead);
      two = Permuted(hn::LoadU(kBytes, from), kOrder2);
      row += 2 * plane_step;
    }
    if constexpr ((kBits & 1) != 0) {
      const uint8_t* from = row + 32 * chunk;
      hwy::Prefetch(from + ahead);
      const auto half = hn::LoadU(hn::Half<decltype(kBytes)>(), from);
      const Byte bytes = Permuted(hn::ZeroExtendVector(kBytes, half), kOrder1);
      alignas(64) static constexpr uint32_t shifts[kLanes] = {0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4};
      one = hn::BitCast(kBytes, hn::BitCast(kWords, bytes) >> hn::Load(kWords, shifts));
    }
  }

  // The codes of vector F.
  template <int F>
  HWY_INLINE Byte Codes() const {
    if constexpr (kBits == 8) return eight[F];
    Byte code{};
    if constexpr ((kBits & 4) != 0) code = Down<F % 2 * 4 - (kBits & 3)>(four[F / 2]);
    if constexpr ((kBits & 2) != 0)
      code = With < 3 << (kBits & 1), (kBits & 4) != 0 > (Down<2 * F - (kBits & 1)>(two), code);
    if constexpr ((kBits & 1) != 0) code = With < 1, kBits != 1 > (Down<F>(one), code);
    return hn::And(code, hn::Set(kBytes, static_cast<uint8_t>((1 << kBits) - 1)));
  }

 private:
  // Code with the bits of mask out of low, if it has others already.
  template <int kMask, bool kOthers>
  static HWY_INLINE Byte With(Byte low, Byte code) {
    if constexpr (!kOthers)
      return low;
    else
      return hn::IfVecThenElse(hn::Set(kBytes, static_cast<uint8_t>(kMask)), low, code);
  }
};

// One of each of four rows. (Arrays that loops index are kept in memory by the compiler.)
template <class T>
struct OfRows {
  T a, b, c, d;
};

template <int kBits>
struct Codes {
  Byte f0, f1, f2, f3;

  HWY_INLINE explicit Codes(const Fields<kBits>& fields)
      : f0(fields.template Codes<0>()),
        f1(fields.template Codes<1>()),
        f2(fields.template Codes<2>()),
        f3(fields.template Codes<3>()) {}
};

// The products of a chunk with one limb, added to sums.
template <int kBits>
HWY_INLINE void AddLimb(const OfRows<Codes<kBits>>& codes, const int8_t* HWY_RESTRICT x, OfRows<Int>& sums) {
  const auto limb = [&](int f)
                        HWY_ATTR { return hn::LoadU(kBytes, reinterpret_cast<const uint8_t*>(x + 64 * f)); };
  const Byte x0 = limb(0), x1 = limb(1), x2 = limb(2), x3 = limb(3);
  AddProducts(codes.a.f0, x0, sums.a);
  AddProducts(codes.b.f0, x0, sums.b);
  AddProducts(codes.c.f0, x0, sums.c);
  AddProducts(codes.d.f0, x0, sums.d);
  AddProducts(codes.a.f1, x1, sums.a);
  AddProducts(codes.b.f1, x1, sums.b);
  AddProducts(codes.c.f1, x1, sums.c);
  AddProducts(codes.d.f1, x1, sums.d);
  AddProducts(codes.a.f2, x2, sums.a);
  AddProducts(codes.b.f2, x2, sums.b);
  AddProducts(codes.c.f2, x2, sums.c);
  AddProducts(codes.d.f2, x2, sums.d);
  AddProducts(codes.a.f3, x3, sums.a);
  AddProducts(codes.b.f3, x3, sums.b);
  AddProducts(codes.c.f3, x3, sums.c);
  AddProducts(codes.d.f3, x3, sums.d);
}

HWY_INLINE OfRows<Int> NoInts() {
  const Int zero = hn::Zero(kInts);
  return {zero, zero, zero, zero};
}

HWY_INLINE void ShiftUp(OfRows<Int>& sums) {
  sums = {hn::ShiftLeft<8>(sums.a), hn::ShiftLeft<8>(sums.b), hn::ShiftLeft<8>(sums.c),
          hn::ShiftLeft<8>(sums.d)};
}

HWY_INLINE OfRows<Float> Floats(const OfRows<Int>& sums) {
  return {hn::ConvertTo(kFloats, sums.a), hn::ConvertTo(kFloats, sums.b), hn::ConvertTo(kFloats, sums.c),
          hn::ConvertTo(kFloats, sums.d)};
}

HWY_INLINE OfRows<Float> MulAdd(const OfRows<Float>& x, Float y, const OfRows<Float>& z) {
  return {hn::MulAdd(x.a, y, z.a), hn::MulAdd(x.b, y, z.b), hn::MulAdd(x.c, y, z.c), hn::MulAdd(x.d, y, z.d)};
}

// The products of a chunk and a vector in units of x. Up to 4 bits, the sum of all limbs fits into 32 bits.
template <int kBits, int kLimbs>
HWY_INLINE OfRows<Float> ChunkProducts(const OfRows<Codes<kBits>>& codes, const int8_t* HWY_RESTRICT x) {
  OfRows<Int> sums = NoInts();
  AddLimb(codes, x, sums);
  if constexpr (kLimbs == 1) return Floats(sums);
  constexpr bool kApart = kBits > 4;
  OfRows<Int> low = sums;
  if constexpr (kApart)
    low = NoInts();
  else
    ShiftUp(low);
  AddLimb(codes, x + kMatvecChunk, low);
  ShiftUp(low);
  AddLimb(codes, x + 2 * kMatvecChunk, low);
  if constexpr (kApart) return MulAdd(Floats(sums), hn::Set(kFloats, 65536.0f), Floats(low));
  return Floats(low);
}

// Adds products, in units of x, to total.
HWY_INLINE void AddScaled(const OfRows<Float>& products, Float unit, const OfRows<Float>& scale,
                          OfRows<Float>& total) {
  total.a = hn::MulAdd(hn::Mul(products.a, unit), scale.a, total.a);
  total.b = hn::MulAdd(hn::Mul(products.b, unit), scale.b, total.b);
  total.c = hn::MulAdd(hn::Mul(products.c, unit), scale.c, total.c);
  total.d = hn::MulAdd(hn::Mul(products.d, unit), scale.d, total.d);
}

// Minus the sum of scale zero sums over the groups, in lanes.
HWY_INLINE Float Zeros(const float* HWY_RESTRICT scale, const float* HWY_RESTRICT zero,
                       const float* HWY_RESTRICT sums, int64_t groups) {
  Float total = hn::Zero(kFloats);
  int64_t g = 0;
  for (; g + kLanes <= groups; g += kLanes) {
    const Float shift = hn::Mul(hn::LoadU(kFloats, scale + g), hn::LoadU(kFloats, zero + g));
    total = hn::NegMulAdd(shift, hn::LoadU(kFloats, sums + g), total);
  }
  if (g == groups) return total;
  const auto some = hn::FirstN(kFloats, static_cast<size_t>(groups - g));
  const Float shift =
      hn::Mul(hn::MaskedLoad(some, kFloats, scale + g), hn::MaskedLoad(some, kFloats, zero + g));
  return hn::NegMulAdd(shift, hn::MaskedLoad(some, kFloats, sums + g), total);
}

// Four rows: those from `row` on, and past the last one that one again.
template <int kBits, int kLimbs, bool kManyVectors>
void AddRows(const MatvecBytes& m, int64_t row) {
  const MatvecBlock& b = m.block;
  const int64_t vectors = kManyVectors ? b.vectors : 1;
  const auto of_rows = [&](auto&& of) HWY_ATTR {
    const int64_t last = b.rows - 1;
    return OfRows<decltype(of(row))>{of(row), of(HWY_MIN(row + 1, last)), of(HWY_MIN(row + 2, last)),
                                     of(HWY_MIN(row + 3, last))};
  };
  const auto codes_of = of_rows([&](int64_t i) { return b.codes + i * b.row_bytes; });
  const auto scale_of = of_rows([&](int64_t i) { return b.scale + i * b.groups; });
  OfRows<Float> totals[kManyVectors ? kMatvecTile : 1];
  for (int64_t v = 0; v < vectors; ++v)
    totals[v] = of_rows([&](int64_t i) HWY_ATTR {
      return Zeros(b.scale + i * b.groups, b.zero + i * b.groups, b.sums + v * b.groups, b.groups);
    });
  OfRows<Float> total = totals[0];

  const int64_t units = blocked_columns(b.cols, kBits) / kMatvecUnit;
  const int64_t chunks = ceil_div(units, kUnits), plane_step = (b.cols + 7) / 8, ahead = kRows * b.row_bytes;
  const int8_t* x = m.x;
  const float* x_scale = m.x_scale;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const MatvecLanes& lanes = m.lanes[chunk];
    const auto some = hn::FirstN(kFloats, static_cast<size_t>(lanes.count));
    const auto order = hn::SetTableIndices(kFloats, lanes.group);
    const auto codes_at = [&](const uint8_t* from) HWY_ATTR {
      return Codes<kBits>(Fields<kBits>(from, plane_step, chunk, ahead, units - kUnits * chunk));
    };
    const auto scale_at = [&](const float* from) HWY_ATTR {
      return hn::TableLookupLanes(hn::MaskedLoad(some, kFloats, from + lanes.first), order);
    };
    const OfRows<Codes<kBits>> codes{codes_at(codes_of.a), codes_at(codes_of.b), codes_at(codes_of.c),
                                     codes_at(codes_of.d)};
    const OfRows<Float> scale{scale_at(scale_of.a), scale_at(scale_of.b), scale_at(scale_of.c),
                              scale_at(scale_of.d)};
    for (int64_t v = 0; v < vectors; ++v) {
      OfRows<Float>& to = kManyVectors ? totals[v] : total;
      AddScaled(ChunkProducts<kBits, kLimbs>(codes, x), hn::LoadU(kFloats, x_scale), scale, to);
      x += kLimbs * kMatvecChunk;
      x_scale += kLanes;
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const OfRows<Float>& of = kManyVectors ? totals[v] : total;
    float* y = b.y + v * b.y_stride + row;
    const auto add = [&](int64_t r, Float sum) HWY_ATTR {
      if (row + r < b.rows) y[r] += hn::GetLane(hn::SumOfLanes(kFloats, sum));
    };
    add(0, of.a);
    add(1, of.b);
    add(2, of.c);
    add(3, of.d);
  }
}

template <int kBits, int kLimbs>
void AddBlock(const MatvecBytes& m) {
  for (int64_t row = 0; row < m.block.rows; row += kRows)
    (m.block.vectors == 1 ? AddRows<kBits, kLimbs, false> : AddRows<kBits, kLimbs, true>)(m, row);
}

template <int kBits>
void AddAnyLimbs(const MatvecBytes& m) {
  (m.limbs == 1 ? AddBlock<kBits, 1> : AddBlock<kBits, 3>)(m);
}

void Products(const MatvecBytes& m) {
  switch (m.block.bits) {
    case 1:
      return AddAnyLimbs<1>(m);
    case 2:
      return AddAnyLimbs<2>(m);
    case 3:
      return AddAnyLimbs<3>(m);
    case 4:
      return AddAnyLimbs<4>(m);
    case 5:
      return AddAnyLimbs<5>(m);
    case 6:
      return AddAnyLimbs<6>(m);
    case 7:
      return AddAnyLimbs<7>(m);
    default:
      return AddAnyLimbs<8>(m);
  }
}

// 2^e, a normal float.
HWY_INLINE float PowerOfTwo(int e) {
  return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23);
}

// A power of two in which every number of a run is an integer of three limbs from -128 to 127.
HWY_INLINE float UnitOfLimbs(float largest) {
  constexpr float kMost = 127 * 65793.0f;  // 127 in every limb
  constexpr int kLeast = -94;              // what is lost below is far within the contract
  const int e = HWY_MAX(static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23) - 126, kLeast);
  return PowerOfTwo(largest * PowerOfTwo(23 - e) > kMost ? e - 22 : e - 23);
}

template <int kLimbs>
HWY_INLINE void SplitRun(const float* HWY_RESTRICT x, int64_t column, int8_t* HWY_RESTRICT out,
                         float* HWY_RESTRICT scale) {
  const hn::FixedTag<uint8_t, 16> narrow;
  const hn::Half<decltype(narrow)> half;
  Int largest_bits = hn::Zero(kInts);
  for (int64_t i = 0; i < kMatvecRun; i += kLanes)
    largest_bits = hn::Max(largest_bits, hn::BitCast(kInts, hn::Abs(hn::LoadU(kFloats, x + i))));
  const auto bits = static_cast<uint32_t>(hn::GetLane(hn::MaxOfLanes(kInts, largest_bits)));
  const auto largest = std::bit_cast<float>(bits);
  float unit = 0, inverse = 0;
  if (bits >= 0x7f800000) {
    unit = std::bit_cast<float>(0x7fc00000);  // NaN: so is all that is multiplied by it
  } else if (kLimbs == 3) {
    unit = UnitOfLimbs(largest);
    inverse = 1 / unit;
  } else if (largest >= kSmallestRounded) {
    unit = largest / 127;
    inverse = 127 / largest;
  }
  hn::Store(hn::Set(hn::FixedTag<float, 4>(), unit), hn::FixedTag<float, 4>(), scale);
  for (int64_t i = 0; i < kMatvecRun; i += kLanes) {
    Int left = hn::NearestInt(hn::Mul(hn::LoadU(kFloats, x + i), hn::Set(kFloats, inverse)));
    for (int limb = kLimbs - 1; limb >= 0; --limb) {
      // The lowest limb as a signed byte, and what it leaves, divided by 256. (Highway 1.0.3 truncates
      // wrongly.)
      const hn::Vec<decltype(narrow)> bytes{_mm512_cvtepi32_epi8(left.raw)};
      left = hn::ShiftRight<8>(hn::Add(left, hn::Set(kInts, 128)));
      auto* to = reinterpret_cast<uint8_t*>(out) + limb * kMatvecChunk + byte_place(column + i);
      hn::StoreU(hn::LowerHalf(half, bytes), half, to);
      hn::StoreU(hn::UpperHalf(half, bytes), half, to + 64);
    }
  }
}

void Split(const float* HWY_RESTRICT x, int64_t chunks, int limbs, int8_t* HWY_RESTRICT out, int64_t out_step,
           float* HWY_RESTRICT scale, int64_t scale_step) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t column = 0; column < kMatvecChunk; column += kMatvecRun)
      (limbs == 1 ? SplitRun<1> : SplitRun<3>)(x + column, column, out, scale + column / kMatvecRun * 4);
    x += kMatvecChunk;
    out += out_step;
    scale += scale_step;
  }
}

#endif

void FillKernels([[maybe_unused]] KernelTable& table) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
  table.matvec_split = Split;
  table.matvec_bytes = Products;
#endif
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(matvec_bytes)
#endif
