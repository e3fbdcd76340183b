#include <cmath>

#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kGroup = 64;

struct Buffers {
  std::vector<uint8_t> codes = std::vector<uint8_t>(kSide * kSide);
  std::vector<float> scale = std::vector<float>(kSide * kSide / kGroup);
  std::vector<float> values = std::vector<float>(kSide * kSide);
  std::vector<float> tables = std::vector<float>(kSide * 256);
};

Buffers& buffers() {
  static Buffers made;
  return made;
}

// Tables denser in the middle; one for the matrix with scales, or one for each row without.
Matrix table(int bits, bool per_row) {
  const int64_t entries = int64_t{1} << bits, rows = per_row ? kSide : 1;
  for (int64_t i = 0; i < rows * entries; ++i) {
    const float at = (static_cast<float>(i % entries) + 0.5f) * 2 / static_cast<float>(entries) - 1;
    buffers().tables[static_cast<size_t>(i)] = std::copysign(at * at, at) * (per_row ? 0.08f : 1.0f);
  }
  return Matrix{buffers().tables.data(), rows, entries, entries, QTR_F32};
}

void run_quantize(int bits, bool per_row) {
  CodebookQuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = weight_matrix();
  args.bits = bits;
  args.group_size = per_row ? 0 : kGroup;
  args.table = table(bits, per_row);
  args.codes = buffers().codes.data();
  args.codes_size = kSide * row_bytes(kSide, bits);
  args.scale = per_row ? nullptr : buffers().scale.data();
  args.groups = per_row ? 0 : kSide * kSide / kGroup;
  codebook_quantize(args);
}

void run_dequantize(int bits, bool per_row) {
  const int64_t groups = kSide * kSide / kGroup;
  codebook_dequantize({sizeof(CodebookDequantizeArgs), buffers().codes.data(), kSide * row_bytes(kSide, bits),
                       bits, per_row ? 0 : kGroup, table(bits, per_row),
                       per_row ? Matrix{} : Matrix{buffers().scale.data(), 1, groups, groups, QTR_F32},
                       MutableMatrix{buffers().values.data(), kSide, kSide, kSide, QTR_F32}});
}

constexpr int64_t kBytes = kSide * kSide * 4;
int encode4 = for_every_target("codebook/quantize/4", kBytes, [] { run_quantize(4, false); });
int encode3_rows = for_every_target("codebook/quantize/3/rows", kBytes, [] { run_quantize(3, true); });
int encode8 = for_every_target("codebook/quantize/8", kBytes, [] { run_quantize(8, false); });
int decode4 =
    for_every_target("codebook/dequantize/4", kBytes + kBytes / 8, [] { run_dequantize(4, false); });
int decode3_rows =
    for_every_target("codebook/dequantize/3/rows", kBytes + kBytes * 3 / 32, [] { run_dequantize(3, true); });
int decode8 =
    for_every_target("codebook/dequantize/8", kBytes + kBytes / 4, [] { run_dequantize(8, false); });

}  // namespace
}  // namespace quantrature::bench
