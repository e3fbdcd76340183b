#include <algorithm>

#include "layout/planes.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

// Calls body(p, shift, offset) for each plane: p bits wide, shift bits of the code below it, offset bytes of
// the row before it.
template <class Body>
void for_planes(const PackedSpan& s, Body&& body) {
  int left = s.bits;
  int64_t offset = 0;
  for (int p : {8, 4, 2, 1}) {
    if (left < p) continue;
    left -= p;
    body(p, left, offset);
    offset += p * ((s.cols + 7) / 8);
  }
}

uint8_t pack_span(const uint8_t* codes, const PackedSpan& s, uint8_t* row) noexcept {
  uint8_t used = 0;
  for (int64_t j = s.begin; j < s.end; ++j) used |= codes[j - s.begin];
  for_planes(s, [&](int p, int shift, int64_t offset) {
    uint8_t* plane = row + offset;
    std::fill(plane + p * s.begin / 8, plane + p * ((s.end + 7) / 8), uint8_t{0});
    for (int64_t j = s.begin; j < s.end; ++j) {
      const int field = codes[j - s.begin] >> shift & ((1 << p) - 1);
      const int64_t bit = first_bit(j, p, s.cols);
      plane[bit / 8] = static_cast<uint8_t>(plane[bit / 8] | field << bit % 8);
    }
  });
  return used;
}

void unpack_span(const uint8_t* row, const PackedSpan& s, uint8_t* codes) noexcept {
  std::fill(codes, codes + (s.end - s.begin), uint8_t{0});
  for_planes(s, [&](int p, int shift, int64_t offset) {
    for (int64_t j = s.begin; j < s.end; ++j) {
      const int64_t bit = first_bit(j, p, s.cols);
      const int field = row[offset + bit / 8] >> bit % 8 & ((1 << p) - 1);
      codes[j - s.begin] = static_cast<uint8_t>(codes[j - s.begin] | field << shift);
    }
  });
}

}  // namespace

void fill_packing(KernelTable& table) {
  table.pack_span = pack_span;
  table.unpack_span = unpack_span;
}

}  // namespace quantrature::reference
