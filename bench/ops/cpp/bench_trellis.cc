#include <cstring>

#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kTiles = kSide * kSide / 256;

// Any bits are the stream of some weights: here those of the mantissas of a matrix.
const std::vector<uint8_t>& streams() {
  static const std::vector<uint8_t> bytes = [] {
    std::vector<uint8_t> made(kSide * kSide / 2);
    for (size_t i = 0; i < made.size(); ++i) std::memcpy(&made[i], &weights()[i], 1);
    return made;
  }();
  return bytes;
}

int registered = [] {
  const auto reading = [](const std::string& name, const Trellis& trellis) {
    const int64_t bytes = kTiles * 32 * trellis.bits;
    for_every_target("trellis_dequantize/" + name, bytes + kSide * kSide * 4, [=] {
      static std::vector<float> out(kSide * kSide);
      trellis_dequantize({sizeof(TrellisDequantizeArgs),
                          streams().data(),
                          bytes,
                          trellis,
                          0.02f,
                          {out.data(), kTiles, 256, 256, QTR_F32}});
    });
    for (int64_t vectors : {1, 4})
      for_every_target("trellis_matvec/" + name + "/vectors " + std::to_string(vectors), bytes, [=] {
        static std::vector<float> out(4 * kSide);
        trellis_matvec({sizeof(TrellisMatvecArgs),
                        streams().data(),
                        bytes,
                        kSide,
                        kSide,
                        trellis,
                        0.02f,
                        {weights().data(), vectors, kSide, kSide, QTR_F32},
                        {out.data(), vectors, kSide, kSide, QTR_F32}});
      });
  };
  reading("1mad/2", {QTR_1MAD, 2, 16});
  reading("3inst/2", {QTR_3INST, 2, 16});
  reading("3inst/4", {QTR_3INST, 4, 16});
  reading("hyb/2", {QTR_HYB, 2, 16});
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
