#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kGroup = 64;

struct Buffers {
  std::vector<uint8_t> codes = std::vector<uint8_t>(kSide * kSide);
  std::vector<float> scale = std::vector<float>(kSide * kSide / kGroup);
  std::vector<float> zero = std::vector<float>(kSide * kSide / kGroup);
  std::vector<float> values = std::vector<float>(kSide * kSide);
};

Buffers& buffers() {
  static Buffers made;
  return made;
}

Matrix half_weights() {
  static const std::vector<uint16_t> halves = [] {
    std::vector<uint16_t> made(weights().size());
    float smallest, largest;
    round_to_half(
        {sizeof(RoundToHalfArgs), weights().data(), kSide * kSide, made.data(), &smallest, &largest});
    return made;
  }();
  return Matrix{halves.data(), kSide, kSide, kSide, QTR_F16};
}

void run_round_to_half() {
  static std::vector<uint16_t> halves(weights().size());
  float smallest, largest;
  round_to_half(
      {sizeof(RoundToHalfArgs), weights().data(), kSide * kSide, halves.data(), &smallest, &largest});
}

void run_quantize(int bits, GridSolver solver, int axis, Matrix (*matrix)() = weight_matrix) {
  QuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = matrix();
  args.bits = bits;
  args.group_size = kGroup;
  args.axis = axis;
  args.solver = solver;
  args.codes = buffers().codes.data();
  args.codes_size =
      axis == 1 ? kSide * row_bytes(kSide, bits) : kGroup * row_bytes(kSide * kSide / kGroup, bits);
  args.scale = buffers().scale.data();
  args.zero = buffers().zero.data();
  args.groups = kSide * kSide / kGroup;
  quantize(args);
}

void run_dequantize(int bits) {
  const int64_t groups = kSide * kSide / kGroup;
  dequantize({sizeof(DequantizeArgs), buffers().codes.data(), kSide * row_bytes(kSide, bits), bits, kGroup, 1,
              Matrix{buffers().scale.data(), 1, groups, groups, QTR_F32},
              Matrix{buffers().zero.data(), 1, groups, groups, QTR_F32},
              MutableMatrix{buffers().values.data(), kSide, kSide, kSide, QTR_F32}});
}

constexpr int64_t kBytes = kSide * kSide * 4;
int minmax4 = for_every_target("quantize/minmax/4", kBytes, [] { run_quantize(4, QTR_MINMAX, 1); });
int minmax4_half = for_every_target("quantize/minmax/4/float16", kBytes / 2,
                                    [] { run_quantize(4, QTR_MINMAX, 1, half_weights); });
int halves = for_every_target("round_to_half", kBytes * 3 / 2, run_round_to_half);
int minmax3 = for_every_target("quantize/minmax/3", kBytes, [] { run_quantize(3, QTR_MINMAX, 1); });
int minmax4_axis0 =
    for_every_target("quantize/minmax/4/axis0", kBytes, [] { run_quantize(4, QTR_MINMAX, 0); });
int mse4 = for_every_target("quantize/mse/4", kBytes, [] { run_quantize(4, QTR_MSE, 1); });
int hqq4 = for_every_target("quantize/hqq/4", kBytes, [] { run_quantize(4, QTR_HQQ, 1); });
int hqq3_axis0 = for_every_target("quantize/hqq/3/axis0", kBytes, [] { run_quantize(3, QTR_HQQ, 0); });
int decode4 = for_every_target("dequantize/4", kBytes + kBytes / 8, [] { run_dequantize(4); });
int decode3 = for_every_target("dequantize/3", kBytes + kBytes * 3 / 32, [] { run_dequantize(3); });

}  // namespace
}  // namespace quantrature::bench
