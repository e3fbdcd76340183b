#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kMatrix = 2048;

// Of the inputs that the first rows of the shared weights are.
const std::vector<float>& hessian() {
  static const std::vector<float> sum = [] {
    std::vector<float> h(kMatrix * kMatrix);
    hessian_accumulate({sizeof(HessianAccumulateArgs),
                        {h.data(), kMatrix, kMatrix, kMatrix, QTR_F32},
                        {weights().data(), kSide, kMatrix, kSide, QTR_F32}});
    return h;
  }();
  return sum;
}

int registered = [] {
  for_every_target("hessian_accumulate/2048 x 2048", kMatrix * kMatrix * 8, [] {
    static std::vector<float> sum(kMatrix * kMatrix);
    hessian_accumulate({sizeof(HessianAccumulateArgs),
                        {sum.data(), kMatrix, kMatrix, kMatrix, QTR_F32},
                        {weights().data(), kMatrix, kMatrix, kSide, QTR_F32}});
  });
  for_every_target("gptq/4/2048 x 2048", kMatrix * kMatrix * 8, [] {
    static const std::vector<float> scale(kMatrix * kMatrix / 128, 0.01f);
    static std::vector<uint8_t> codes(static_cast<size_t>(kMatrix * row_bytes(kMatrix, 4)));
    GptqResult result;
    GptqArgs args{};
    args.struct_size = sizeof(args);
    args.w = {weights().data(), kMatrix, kMatrix, kSide, QTR_F32};
    args.hessian = hessian().data();
    args.hessian_size = kMatrix * kMatrix;
    args.bits = 4;
    args.group_size = 128;
    args.scale = {scale.data(), 1, static_cast<int64_t>(scale.size()), static_cast<int64_t>(scale.size()),
                  QTR_F32};
    args.damp = 0.01;
    args.ordered = 1;
    args.codes = codes.data();
    args.codes_size = static_cast<int64_t>(codes.size());
    args.result = &result;
    gptq(args);
  });
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
