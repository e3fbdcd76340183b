// Products of codes and integers of 8 bits, four to an instruction, where the CPU has that instruction and
// one to move bytes across a vector of 64 (AVX-512 VNNI and VBMI); elsewhere the kernels for floats stand in,
// and the table has none of these.
//
// A chunk of 256 codes becomes four vectors of 64 bytes, in the order of byte_place: vector f has the columns
// 8 f to 8 f + 7 of each 32. So each 32-bit lane of the products stays within 32 columns, and groups of 32
// cost what groups of 64 do: one conversion and one multiplication by the scales of the lanes a chunk. A
// number of three limbs takes three products and comes together by shifts of the sum. Four rows at a time
// share the loads of x. The products are the limit, three of them for 64 codes, at one a cycle (Zen 4); with
// one limb it is the unpacking of codes, or the memory.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/matvec/matvec_bytes_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <array>
#include <bit>

#include "runtime/simd_kernels.hpp"

#define QUANTRATURE_UNROLL _Pragma("GCC unroll 16")

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

constexpr int kRowsAtOnce = 4;
constexpr int kLanes = 16;
constexpr int kVectorsOfChunk = 4;

// sum += the four products of each lane.
HWY_INLINE void AddProducts(Byte codes, Byte x, Int& sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(x.raw));
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
  Byte eight[kVectorsOfChunk], four[2], two, one;

  HWY_INLINE Fields(const uint8_t* HWY_RESTRICT row, int64_t plane_step, int64_t chunk) {
    if constexpr (kBits == 8) {
      const uint8_t* from = row + 256 * chunk;
      const Byte a = hn::LoadU(kBytes, from), b = hn::LoadU(kBytes, from + 64);
      const Byte c = hn::LoadU(kBytes, from + 128), d = hn::LoadU(kBytes, from + 192);
      const Byte low = Permuted(a, b, kOrder8), high = Permuted(c, d, kOrder8);
      const Byte low_next = Permuted(a, b, kOrder8Next), high_next = Permuted(c, d, kOrder8Next);
      eight[0] = hn::ConcatLowerLower(kBytes, high, low);
      eight[1] = hn::ConcatUpperUpper(kBytes, high, low);
      eight[2] = hn::ConcatLowerLower(kBytes, high_next, low_next);
      eight[3] = hn::ConcatUpperUpper(kBytes, high_next, low_next);
      return;
    }
    if constexpr ((kBits & 4) != 0) {
      const Byte a = hn::LoadU(kBytes, row + 128 * chunk), b = hn::LoadU(kBytes, row + 128 * chunk + 64);
      four[0] = Permuted(a, b, kOrder4);
      four[1] = Permuted(a, b, kOrder4Next);
      row += 4 * plane_step;
    }
    if constexpr ((kBits & 2) != 0) {
      two = Permuted(hn::LoadU(kBytes, row + 64 * chunk), kOrder2);
      row += 2 * plane_step;
    }
    if constexpr ((kBits & 1) != 0) {
      const auto half = hn::LoadU(hn::Half<decltype(kBytes)>(), row + 32 * chunk);
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

template <int kRows, int kVectors>
struct IntSums {
  Int of[kRows][kVectors];

  HWY_INLINE IntSums() {
    QUANTRATURE_UNROLL
    for (int r = 0; r < kRows; ++r) QUANTRATURE_UNROLL
    for (int v = 0; v < kVectors; ++v) of[r][v] = hn::Zero(kInts);
  }

  HWY_INLINE void ShiftUp() {
    QUANTRATURE_UNROLL
    for (int r = 0; r < kRows; ++r) QUANTRATURE_UNROLL
    for (int v = 0; v < kVectors; ++v) of[r][v] = hn::ShiftLeft<8>(of[r][v]);
  }

  // Adds the products with one limb; of the next vector it lies x_step bytes on.
  HWY_INLINE void Add(const Byte (&codes)[kRows][kVectorsOfChunk], const int8_t* HWY_RESTRICT x,
                      int64_t x_step) {
    QUANTRATURE_UNROLL
    for (int f = 0; f < kVectorsOfChunk; ++f) QUANTRATURE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Byte limb = hn::LoadU(kBytes, reinterpret_cast<const uint8_t*>(x + v * x_step + 64 * f));
      QUANTRATURE_UNROLL
      for (int r = 0; r < kRows; ++r) AddProducts(codes[r][f], limb, of[r][v]);
    }
  }
};

// Adds to total[row][vector] the products of a chunk. Up to 4 bits, the sum of all limbs fits into 32 bits.
template <int kBits, int kLimbs, int kRows, int kVectors>
HWY_INLINE void AddChunk(const Byte (&codes)[kRows][kVectorsOfChunk], const Float (&scale)[kRows],
                         const int8_t* HWY_RESTRICT x, const float* HWY_RESTRICT x_scale,
                         float* HWY_RESTRICT total) {
  constexpr bool kApart = kLimbs == 3 && kBits > 4;
  constexpr int64_t kStep = kLimbs * kMatvecChunk;
  IntSums<kRows, kVectors> first, rest;
  first.Add(codes, x, kStep);
  if constexpr (kLimbs == 3) {
    IntSums<kRows, kVectors>& low = kApart ? rest : first;
    if constexpr (!kApart) low.ShiftUp();
    low.Add(codes, x + kMatvecChunk, kStep);
    low.ShiftUp();
    low.Add(codes, x + 2 * kMatvecChunk, kStep);
  }
  QUANTRATURE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Float unit = hn::LoadU(kFloats, x_scale + v * kLanes);
    QUANTRATURE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Float sum = hn::ConvertTo(kFloats, first.of[r][v]);
      if constexpr (kApart)
        sum = hn::MulAdd(sum, hn::Set(kFloats, 65536.0f), hn::ConvertTo(kFloats, rest.of[r][v]));
      float* to = total + (r * kMatvecTile + v) * kLanes;
      hn::Store(hn::MulAdd(hn::Mul(sum, unit), scale[r], hn::Load(kFloats, to)), kFloats, to);
    }
  }
}

// Minus the sum of scale zero sums over the groups, in lanes.
HWY_INLINE Float Zeros(const float* HWY_RESTRICT scale, const float* HWY_RESTRICT zero,
                       const float* HWY_RESTRICT sums, int64_t groups) {
  Float total = hn::Zero(kFloats);
  for (int64_t g = 0; g < groups; g += kLanes) {
    const auto some = hn::FirstN(kFloats, static_cast<size_t>(groups - g));
    const Float shift =
        hn::Mul(hn::MaskedLoad(some, kFloats, scale + g), hn::MaskedLoad(some, kFloats, zero + g));
    total = hn::NegMulAdd(shift, hn::MaskedLoad(some, kFloats, sums + g), total);
  }
  return total;
}

template <int kBits, int kLimbs, int kRows>
void AddRows(const MatvecBytes& m, int64_t row) {
  const MatvecBlock& b = m.block;
  const int64_t vectors = b.vectors;
  alignas(64) float total[kRows][kMatvecTile][kLanes];
  for (int r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = (row + r) * b.groups;
      hn::Store(Zeros(b.scale + at, b.zero + at, b.sums + v * b.groups, b.groups), kFloats, total[r][v]);
    }
  const int64_t plane_step = (b.cols + 7) / 8;
  const int8_t* x = m.x;
  const float* x_scale = m.x_scale;
  for (int64_t chunk = 0; chunk < b.cols / kMatvecChunk; ++chunk) {
    const MatvecLanes& lanes = m.lanes[chunk];
    const auto some = hn::FirstN(kFloats, static_cast<size_t>(lanes.count));
    const auto order = hn::SetTableIndices(kFloats, lanes.group);
    Byte codes[kRows][kVectorsOfChunk];
    Float scale[kRows];
    QUANTRATURE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Fields<kBits> fields(b.codes + (row + r) * b.row_bytes, plane_step, chunk);
      codes[r][0] = fields.template Codes<0>();
      codes[r][1] = fields.template Codes<1>();
      codes[r][2] = fields.template Codes<2>();
      codes[r][3] = fields.template Codes<3>();
      const float* from = b.scale + (row + r) * b.groups + lanes.first;
      scale[r] = hn::TableLookupLanes(hn::MaskedLoad(some, kFloats, from), order);
    }
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2)
      AddChunk<kBits, kLimbs, kRows, 2>(codes, scale, x + v * kLimbs * kMatvecChunk, x_scale + v * kLanes,
                                        total[0][v]);
    if (v < vectors)
      AddChunk<kBits, kLimbs, kRows, 1>(codes, scale, x + v * kLimbs * kMatvecChunk, x_scale + v * kLanes,
                                        total[0][v]);
    x += vectors * kLimbs * kMatvecChunk;
    x_scale += vectors * kLanes;
  }
  for (int r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < vectors; ++v)
      b.y[v * b.y_stride + row + r] += hn::GetLane(hn::SumOfLanes(kFloats, hn::Load(kFloats, total[r][v])));
}

template <int kBits, int kLimbs>
void AddBlock(const MatvecBytes& m) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= m.block.rows; row += kRowsAtOnce) AddRows<kBits, kLimbs, kRowsAtOnce>(m, row);
  for (; row < m.block.rows; ++row) AddRows<kBits, kLimbs, 1>(m, row);
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
