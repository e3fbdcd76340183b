#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kGroups = kSide / kGroup;

struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero, residuals;
  std::vector<uint16_t> columns;
  std::vector<int32_t> row_offsets;
  std::vector<float> x, y;

  // With one outlier in 200 weights.
  explicit Quantized(int bits)
      : codes(static_cast<size_t>(kSide * row_bytes(kSide, bits))),
        scale(kSide * kGroups),
        zero(kSide * kGroups),
        row_offsets(1),
        x(weights().begin(), weights().begin() + 4 * kSide),
        y(4 * kSide) {
    QuantizeArgs args{};
    args.struct_size = sizeof(args);
    args.w = weight_matrix();
    args.bits = bits;
    args.group_size = kGroup;
    args.axis = 1;
    args.codes = codes.data();
    args.codes_size = static_cast<int64_t>(codes.size());
    args.scale = scale.data();
    args.zero = zero.data();
    args.groups = kSide * kGroups;
    quantize(args);
    std::mt19937 generator(0);
    for (int64_t row = 0; row < kSide; ++row) {
      for (int64_t column = row % 200; column < kSide; column += 200) {
        columns.push_back(static_cast<uint16_t>(column));
        residuals.push_back(static_cast<float>(generator() % 100) * 1e-3f);
      }
      row_offsets.push_back(static_cast<int32_t>(columns.size()));
    }
  }

  void multiply(int bits, int64_t vectors, bool outliers, bool codebook = false) {
    MatvecArgs args{};
    args.struct_size = sizeof(args);
    const Matrix none{nullptr, kSide, kGroups, kGroups, QTR_F32};
    args.w = {codes.data(), static_cast<int64_t>(codes.size()), kSide, kSide, bits, kGroup, none, none};
    args.w.scale.data = scale.data();
    if (codebook)
      args.table = {zero.data(), 1, 1 << bits, 1 << bits, QTR_F32};  // any numbers
    else
      args.w.zero.data = zero.data();
    if (outliers)
      args.residuals = {residuals.data(),
                        columns.data(),
                        row_offsets.data(),
                        kSide,
                        kSide,
                        static_cast<int64_t>(residuals.size()),
                        QTR_F32};
    args.x = {x.data(), vectors, kSide, kSide, QTR_F32};
    args.out = {y.data(), vectors, kSide, kSide, QTR_F32};
    matvec(args);
  }
};

Quantized& quantized(int bits) {
  static std::vector<Quantized*> made(9);
  Quantized*& q = made[static_cast<size_t>(bits)];
  if (q == nullptr) q = new Quantized(bits);
  return *q;
}

int registered = [] {
  for (int bits : {2, 3, 4, 8}) {
    const int64_t bytes = kSide * (row_bytes(kSide, bits) + 8 * kGroups);
    const std::string name = "matvec/" + std::to_string(bits);
    for_every_target(name, bytes, [=] { quantized(bits).multiply(bits, 1, false); });
    for_every_target(name + "/outliers", bytes, [=] { quantized(bits).multiply(bits, 1, true); });
    for_every_target(name + "/4 vectors", bytes, [=] { quantized(bits).multiply(bits, 4, false); });
    const int64_t without_zeros = kSide * (row_bytes(kSide, bits) + 4 * kGroups);
    for_every_target(name + "/codebook", without_zeros,
                     [=] { quantized(bits).multiply(bits, 1, false, true); });
    for_every_target(name + "/codebook, 4 vectors", without_zeros,
                     [=] { quantized(bits).multiply(bits, 4, false, true); });
  }
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
