// Plain loops over the eight lanes: the compiler makes one vector of them, and knows every shift.
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
HWY_INLINE void PackBlock(const uint8_t* HWY_RESTRICT codes, int shift, int numbers,
                          uint32_t* HWY_RESTRICT words) {
  constexpr uint32_t mask = (1u << P) - 1;
  for (int i = 0; i < kLanes; ++i) words[i] = 0;
  for (int k = 0; k < numbers; ++k)
    for (int i = 0; i < kLanes; ++i)
      words[i] |= (static_cast<uint32_t>(codes[kLanes * k + i]) >> shift & mask) << (P * k);
}

template <int P>
HWY_INLINE void UnpackBlock(const uint32_t* HWY_RESTRICT words, int shift, int numbers,
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
  PackBlock<P>(padded, shift, numbers, words);
  uint64_t stream = 0;
  int held = 0;
  for (uint32_t word : words) {
    stream |= static_cast<uint64_t>(word) << held;
    for (held += numbers * P; held >= 8; held -= 8, stream >>= 8) *plane++ = static_cast<uint8_t>(stream);
  }
}

template <int P>
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
  std::copy_n(codes, rest, padded);
  UnpackBlock<P>(words, shift, numbers, padded);
  std::copy_n(padded, rest, codes);
}

template <int P>
void PackPlane(const uint8_t* HWY_RESTRICT codes, int64_t n, int shift, uint8_t* HWY_RESTRICT plane) {
  constexpr int64_t size = 256 / P;
  for (; n >= size; n -= size, codes += size, plane += 32) {
    uint32_t words[kLanes];
    PackBlock<P>(codes, shift, 32 / P, words);
    std::memcpy(plane, words, sizeof(words));
  }
  if (n > 0) PackLast<P>(codes, n, shift, plane);
}

template <int P>
void UnpackPlane(const uint8_t* HWY_RESTRICT plane, int64_t n, int shift, uint8_t* HWY_RESTRICT codes) {
  constexpr int64_t size = 256 / P;
  for (; n >= size; n -= size, codes += size, plane += 32) {
    uint32_t words[kLanes];
    std::memcpy(words, plane, sizeof(words));
    UnpackBlock<P>(words, shift, 32 / P, codes);
  }
  if (n > 0) UnpackLast<P>(plane, n, shift, codes);
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
  if (plane.there) UnpackPlane<P>(row + plane.offset, s.end - s.begin, plane.shift, codes);
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
  std::fill_n(codes, s.end - s.begin, uint8_t{0});
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
