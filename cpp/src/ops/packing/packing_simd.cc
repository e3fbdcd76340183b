// A block is read and written as B, the transpose of its 8 words of 4 bytes: byte j of every word lies in
// B[j], eight bytes. B[j] has the codes 8 k to 8 k + 7 for the 8 / p values of k from j 8 / p on, one above
// the other in the bits of its bytes: so eight codes are shifted at once wherever they go, and a block takes
// one transposition by two shuffles. Left to the compiler, loops over the words take two to four times as
// long. The scalar target, where Highway has no vectors, keeps those loops.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/packing/packing_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

static_assert(std::endian::native == std::endian::little, "blocks are loaded and stored as words");

constexpr int kLanes = 8;

template <int P>
HWY_INLINE void PackWords(const uint8_t* HWY_RESTRICT codes, int shift, int numbers,
                          uint32_t* HWY_RESTRICT words) {
  constexpr uint32_t mask = (1u << P) - 1;
  for (int i = 0; i < kLanes; ++i) words[i] = 0;
  for (int k = 0; k < numbers; ++k)
    for (int i = 0; i < kLanes; ++i)
      words[i] |= (static_cast<uint32_t>(codes[kLanes * k + i]) >> shift & mask) << (P * k);
}

template <int P>
HWY_INLINE void UnpackWords(const uint32_t* HWY_RESTRICT words, int shift, int numbers,
                            uint8_t* HWY_RESTRICT codes) {
  constexpr uint32_t mask = (1u << P) - 1;
  for (int k = 0; k < numbers; ++k)
    for (int i = 0; i < kLanes; ++i)
      codes[kLanes * k + i] =
          static_cast<uint8_t>(codes[kLanes * k + i] | (words[i] >> (P * k) & mask) << shift);
}

// A short last block: `numbers` codes a lane, the fields of the lanes one after the other.
template <int P>
void PackLast(const uint8_t* codes, int64_t rest, int shift, uint8_t* plane) {
  uint8_t padded[256 / P] = {};
  std::copy_n(codes, rest, padded);
  const int numbers = static_cast<int>((rest + kLanes - 1) / kLanes);
  uint32_t words[kLanes];
  PackWords<P>(padded, shift, numbers, words);
  uint64_t stream = 0;
  int held = 0;
  for (uint32_t word : words) {
    stream |= static_cast<uint64_t>(word) << held;
    for (held += numbers * P; held >= 8; held -= 8, stream >>= 8) *plane++ = static_cast<uint8_t>(stream);
  }
}

template <int P, bool kFirst>
void UnpackLast(const uint8_t* plane, int64_t rest, int shift, uint8_t* codes) {
  const int numbers = static_cast<int>((rest + kLanes - 1) / kLanes);
  uint32_t words[kLanes];
  uint64_t stream = 0;
  int held = 0;
  for (uint32_t& word : words) {
    for (; held < numbers * P; held += 8) stream |= static_cast<uint64_t>(*plane++) << held;
    word = static_cast<uint32_t>(stream);
    stream >>= numbers * P;
    held -= numbers * P;
  }
  uint8_t padded[256 / P] = {};
  if (!kFirst) std::copy_n(codes, rest, padded);
  UnpackWords<P>(words, shift, numbers, padded);
  std::copy_n(padded, rest, codes);
}

#if HWY_TARGET == HWY_SCALAR

template <int P>
HWY_INLINE void PackBlock(const uint8_t* HWY_RESTRICT codes, int shift, uint8_t* HWY_RESTRICT block) {
  uint32_t words[kLanes];
  PackWords<P>(codes, shift, 32 / P, words);
  std::memcpy(block, words, sizeof(words));
}

template <int P, bool kFirst>
HWY_INLINE void UnpackBlock(const uint8_t* HWY_RESTRICT block, int shift, uint8_t* HWY_RESTRICT codes) {
  uint32_t words[kLanes];
  std::memcpy(words, block, sizeof(words));
  if (kFirst) std::fill_n(codes, 256 / P, uint8_t{0});
  UnpackWords<P>(words, shift, 32 / P, codes);
}

#else

namespace hn = hwy::HWY_NAMESPACE;

using Bytes = hn::FixedTag<uint8_t, 16>;
using Byte = hn::Vec<Bytes>;
constexpr hn::RepartitionToWide<Bytes> kPairs;  // uint16
constexpr hn::FixedTag<uint32_t, 4> kWords;
constexpr hn::FixedTag<uint64_t, 2> kHalves;

// Bits move within a byte when what would leave it is masked away before or after.
template <int kBits>
HWY_INLINE Byte Up(Byte x) {
  return hn::BitCast(Bytes(), hn::ShiftLeft<kBits>(hn::BitCast(kPairs, x)));
}
template <int kBits>
HWY_INLINE Byte Down(Byte x) {
  return hn::BitCast(Bytes(), hn::ShiftRight<kBits>(hn::BitCast(kPairs, x)));
}
HWY_INLINE Byte LowHalves(Byte a, Byte b) {
  return hn::BitCast(Bytes(), hn::InterleaveLower(kHalves, hn::BitCast(kHalves, a), hn::BitCast(kHalves, b)));
}
HWY_INLINE Byte HighHalves(Byte a, Byte b) {
  return hn::BitCast(Bytes(), hn::InterleaveUpper(kHalves, hn::BitCast(kHalves, a), hn::BitCast(kHalves, b)));
}
// Bytes of a 4 x 4 matrix by columns.
HWY_INLINE Byte Transposed(Byte x) {
  alignas(16) static constexpr uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return hn::TableLookupBytes(x, hn::Load(Bytes(), order));
}

// B[j] and B[j + 1] out of codes: number s of a byte is in bits [P s, P s + P).
template <int P, int S>
HWY_INLINE Byte Gathered(const uint8_t* HWY_RESTRICT codes, int shift, Byte mask) {
  constexpr int kPerByte = 8 / P;
  constexpr int64_t kNext = kLanes * kPerByte;  // codes of B[j]
  const Bytes d;
  const auto field = [&](Byte x) HWY_ATTR {
    return hn::And(hn::BitCast(d, hn::ShiftRightSame(hn::BitCast(kPairs, x), shift)), mask);
  };
  if constexpr (P == 8) {
    return hn::LoadU(d, codes);
  } else {
    const Byte first = hn::LoadU(d, codes + kLanes * S), second = hn::LoadU(d, codes + kNext + kLanes * S);
    const Byte low = Up<P * S>(field(LowHalves(first, second)));
    const Byte both = hn::Or(low, Up<P*(S + 1)>(field(HighHalves(first, second))));
    if constexpr (S + 2 < kPerByte)
      return hn::Or(both, Gathered<P, S + 2>(codes, shift, mask));
    else
      return both;
  }
}

template <int P>
HWY_INLINE void PackBlock(const uint8_t* HWY_RESTRICT codes, int shift, uint8_t* HWY_RESTRICT block) {
  const Bytes d;
  const Byte mask = hn::Set(d, static_cast<uint8_t>((1 << P) - 1));
  const auto b01 = hn::BitCast(kWords, Gathered<P, 0>(codes, shift, mask));
  const auto b23 = hn::BitCast(kWords, Gathered<P, 0>(codes + 128 / P, shift, mask));
  hn::StoreU(Transposed(hn::BitCast(d, hn::ConcatEven(kWords, b23, b01))), d, block);
  hn::StoreU(Transposed(hn::BitCast(d, hn::ConcatOdd(kWords, b23, b01))), d, block + 16);
}

template <int P, bool kFirst, int S>
HWY_INLINE void Scattered(Byte b, int shift, Byte mask, uint8_t* HWY_RESTRICT codes) {
  constexpr int kPerByte = 8 / P;
  constexpr int64_t kNext = kLanes * kPerByte;
  const Bytes d;
  const auto field = [&](Byte x) HWY_ATTR {
    return hn::BitCast(d, hn::ShiftLeftSame(hn::BitCast(kPairs, hn::And(x, mask)), shift));
  };
  const auto add = [&](Byte x, uint8_t* to)
                       HWY_ATTR { hn::StoreU(kFirst ? x : hn::Or(x, hn::LoadU(d, to)), d, to); };
  if constexpr (P == 8) {
    hn::StoreU(b, d, codes);
  } else {
    const Byte low = field(Down<P * S>(b)), high = field(Down<P*(S + 1)>(b));
    add(LowHalves(low, high), codes + kLanes * S);
    add(HighHalves(low, high), codes + kNext + kLanes * S);
    if constexpr (S + 2 < kPerByte) Scattered<P, kFirst, S + 2>(b, shift, mask, codes);
  }
}

template <int P, bool kFirst>
HWY_INLINE void UnpackBlock(const uint8_t* HWY_RESTRICT block, int shift, uint8_t* HWY_RESTRICT codes) {
  const Bytes d;
  const Byte mask = hn::Set(d, static_cast<uint8_t>((1 << P) - 1));
  const auto low = hn::BitCast(kWords, Transposed(hn::LoadU(d, block)));
  const auto high = hn::BitCast(kWords, Transposed(hn::LoadU(d, block + 16)));
  Scattered<P, kFirst, 0>(hn::BitCast(d, hn::InterleaveLower(kWords, low, high)), shift, mask, codes);
  Scattered<P, kFirst, 0>(hn::BitCast(d, hn::InterleaveUpper(kWords, low, high)), shift, mask,
                          codes + 128 / P);
}

#endif

template <int P>
void PackPlane(const uint8_t* HWY_RESTRICT codes, int64_t n, int shift, uint8_t* HWY_RESTRICT plane) {
  constexpr int64_t size = 256 / P;
  for (; n >= size; n -= size, codes += size, plane += 32) PackBlock<P>(codes, shift, plane);
  if (n > 0) PackLast<P>(codes, n, shift, plane);
}

// The first plane of a code sets it, the others add to it.
template <int P, bool kFirst>
void UnpackPlane(const uint8_t* HWY_RESTRICT plane, int64_t n, int shift, uint8_t* HWY_RESTRICT codes) {
  constexpr int64_t size = 256 / P;
  for (; n >= size; n -= size, codes += size, plane += 32) UnpackBlock<P, kFirst>(plane, shift, codes);
  if (n > 0) UnpackLast<P, kFirst>(plane, n, shift, codes);
}

// Of the plane of P bits, if codes of s.bits have one: what lies below it in a code and before it in a row.
template <int P>
struct Plane {
  bool there;
  int shift;
  int64_t offset;
  explicit Plane(const PackedSpan& s)
      : there(s.bits & P),
        shift(s.bits & (P - 1)),
        offset((s.bits - (s.bits & (2 * P - 1))) * ((s.cols + 7) / 8) + P * s.begin / 8) {}
};

template <int P>
HWY_INLINE void PackIfThere(const uint8_t* codes, const PackedSpan& s, uint8_t* row) {
  const Plane<P> plane(s);
  if (plane.there) PackPlane<P>(codes, s.end - s.begin, plane.shift, row + plane.offset);
}

template <int P>
HWY_INLINE void UnpackIfThere(const uint8_t* row, const PackedSpan& s, uint8_t* codes) {
  const Plane<P> plane(s);
  if (!plane.there) return;
  (s.bits < 2 * P ? UnpackPlane<P, true> : UnpackPlane<P, false>)(row + plane.offset, s.end - s.begin,
                                                                  plane.shift, codes);
}

uint8_t PackSpan(const uint8_t* codes, const PackedSpan& s, uint8_t* row) {
  PackIfThere<8>(codes, s, row);
  PackIfThere<4>(codes, s, row);
  PackIfThere<2>(codes, s, row);
  PackIfThere<1>(codes, s, row);
  uint8_t used = 0;
  for (int64_t j = 0; j < s.end - s.begin; ++j) used |= codes[j];
  return used;
}

void UnpackSpan(const uint8_t* row, const PackedSpan& s, uint8_t* codes) {
  UnpackIfThere<8>(row, s, codes);
  UnpackIfThere<4>(row, s, codes);
  UnpackIfThere<2>(row, s, codes);
  UnpackIfThere<1>(row, s, codes);
}

void FillKernels(KernelTable& table) {
  table.pack_span = PackSpan;
  table.unpack_span = UnpackSpan;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(packing)
#endif
