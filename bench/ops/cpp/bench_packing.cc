#include "bench.hpp"

namespace quantrature::bench {
namespace {

const std::vector<uint8_t>& codes(int bits) {
  static std::vector<std::vector<uint8_t>> made(9);
  std::vector<uint8_t>& c = made[static_cast<size_t>(bits)];
  if (c.empty()) {
    c.resize(kSide * kSide);
    std::mt19937 generator(0);
    for (uint8_t& code : c) code = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  }
  return c;
}

std::vector<uint8_t>& buffer() {
  static std::vector<uint8_t> bytes(kSide * kSide);
  return bytes;
}

int registered = [] {
  for (int bits = 1; bits <= 8; ++bits) {
    const int64_t width = row_bytes(kSide, bits);
    for_every_target("pack/" + std::to_string(bits), kSide * (kSide + width), [=] {
      pack({sizeof(PackArgs), codes(bits).data(), kSide, kSide, kSide, bits, buffer().data(), width});
    });
    for_every_target("unpack/" + std::to_string(bits), kSide * (kSide + width), [=] {
      static std::vector<uint8_t> packed(kSide * kSide);
      unpack({sizeof(UnpackArgs), packed.data(), kSide, width, bits, buffer().data(), kSide, kSide});
    });
  }
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
