#include <random>

#include "cases.hpp"

namespace quantrature {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes random_codes(int64_t n, int bits) {
  std::mt19937 generator(static_cast<unsigned>(n * 8 + bits));
  Bytes codes(static_cast<size_t>(n));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  return codes;
}

Bytes packed(const Bytes& codes, int64_t rows, int64_t cols, int64_t stride, int bits) {
  Bytes out(static_cast<size_t>(rows * row_bytes(cols, bits)), 0xAA);
  pack({sizeof(PackArgs), codes.data(), rows, cols, stride, bits, out.data(), row_bytes(cols, bits)});
  return out;
}

Bytes unpacked(const Bytes& bytes, int64_t rows, int64_t cols, int bits) {
  Bytes out(static_cast<size_t>(rows * cols), 0xAA);
  unpack({sizeof(UnpackArgs), bytes.data(), rows, row_bytes(cols, bits), bits, out.data(), cols, cols});
  return out;
}

TEST(Packing, EveryTargetAgreesWithTheReference) {
  std::vector<int64_t> lengths = cases::kLengths;
  for (int64_t cols : {191, 193, 257, 511, 513, 65537, 140000}) lengths.push_back(cols);
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t cols : lengths) {
      SCOPED_TRACE("bits " + std::to_string(bits) + ", cols " + std::to_string(cols));
      const int64_t stride = cols + cols % 3;
      const Bytes codes = random_codes(3 * stride, bits);
      const Bytes expected = cases::on_reference([&] { return packed(codes, 3, cols, stride, bits); });
      Bytes dense;
      for (int64_t row = 0; row < 3; ++row)
        dense.insert(dense.end(), codes.begin() + row * stride, codes.begin() + row * stride + cols);
      EXPECT_EQ(cases::on_reference([&] { return unpacked(expected, 3, cols, bits); }), dense);
      cases::on_every_target([&] {
        EXPECT_EQ(packed(codes, 3, cols, stride, bits), expected);
        EXPECT_EQ(unpacked(expected, 3, cols, bits), dense);
      });
    }
  }
}

// The bytes of checkpoints: worked out by hand from packing.hpp.
TEST(Packing, IsTheLayoutOfCheckpoints) {
  cases::on_every_target([] {
    Bytes codes(64);
    for (size_t j = 0; j < 64; ++j) codes[j] = static_cast<uint8_t>(j / 8);
    const Bytes word = {0x10, 0x32, 0x54, 0x76};
    Bytes block;
    for (int i = 0; i < 8; ++i) block.insert(block.end(), word.begin(), word.end());
    EXPECT_EQ(packed(codes, 1, 64, 64, 4), block);

    // Ten codes of four bits: two numbers a lane, so a byte a lane.
    EXPECT_EQ(packed({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 1, 10, 10, 4), (Bytes{0x91, 0xA2, 3, 4, 5, 6, 7, 8}));
    // Three codes of three bits: a plane of two bits with fields 2, 1, 3, then one of one bit with 1, 1, 0.
    EXPECT_EQ(packed({5, 3, 6}, 1, 3, 3, 3), (Bytes{0x36, 0x00, 0x03}));
    // 7 = 4 + 2 + 1.
    EXPECT_EQ(packed({0x55}, 1, 1, 1, 7), (Bytes{0x0A, 0, 0, 0, 0x02, 0, 0x01}));
    // A block of bytes: numbers of a lane side by side.
    Bytes bytes(32);
    for (size_t j = 0; j < 32; ++j) bytes[j] = static_cast<uint8_t>(j);
    const Bytes transposed = packed(bytes, 1, 32, 32, 8);
    EXPECT_EQ(Bytes(transposed.begin(), transposed.begin() + 5), (Bytes{0, 8, 16, 24, 1}));
  });
}

TEST(Packing, RefusesWhatBreaksTheContract) {
  const auto refused = [](auto call, const char* message) {
    try {
      call();
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  const uint8_t codes[4] = {0, 1, 9, 3};
  uint8_t out[8];
  const PackArgs good{sizeof(PackArgs), codes, 2, 2, 2, 4, out, 4};
  const UnpackArgs fine{sizeof(UnpackArgs), codes, 1, 4, 4, out, 8, 8};
  pack(good);
  unpack(fine);
  PackArgs bad = good;
  bad.rows = 0;
  refused([&] { pack(bad); }, "[pack] codes must not be empty: got rows=0, cols=2");
  bad = good, bad.codes = nullptr;
  refused([&] { pack(bad); }, "[pack] codes must not be null");
  bad = good, bad.bits = 9;
  refused([&] { pack(bad); }, "[pack] bits must be 1 to 8: got bits=9");
  bad = good, bad.row_stride = 1;
  refused([&] { pack(bad); }, "[pack] codes has rows that overlap: got row_stride=1, cols=2");
  bad = good, bad.row_bytes = 3;
  refused([&] { pack(bad); },
          "[pack] packed must have row_bytes(cols, bits) bytes a row: got row_bytes=3, expected=4");
  bad = good, bad.bits = 3, bad.row_bytes = 3;
  cases::on_every_target([&] {
    refused([&] { pack(bad); }, "[pack] codes must fit into bits: got code=9, row=1, col=0, bits=3");
  });
  UnpackArgs wrong = fine;
  wrong.row_bytes = 5;
  refused([&] { unpack(wrong); }, "[unpack] packed must have row_bytes(cols, bits) bytes a row");
  refused([] { row_bytes(8, 0); }, "[row_bytes] bits must be 1 to 8: got bits=0");
  refused([] { row_bytes(0, 4); }, "[row_bytes] cols must be at least 1: got cols=0");
}

}  // namespace
}  // namespace quantrature
