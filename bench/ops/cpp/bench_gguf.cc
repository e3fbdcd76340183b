#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kRows = 64;

std::vector<uint8_t>& blocks(int64_t size) {
  static std::vector<uint8_t> made;
  made.resize(static_cast<size_t>(size));
  return made;
}

void quantize(qtr_gguf_type type) {
  const int64_t size = kRows * gguf_row_bytes(type, kSide);
  gguf_quantize({sizeof(GgufQuantizeArgs), Matrix{weights().data(), kRows, kSide, kSide, QTR_F32}, type,
                 Matrix{}, blocks(size).data(), size});
}

void dequantize(qtr_gguf_type type) {
  static std::vector<float> values(kSide * kSide);
  const int64_t size = kSide * gguf_row_bytes(type, kSide);
  gguf_dequantize({sizeof(GgufDequantizeArgs), blocks(size).data(), size, type,
                   MutableMatrix{values.data(), kSide, kSide, kSide, QTR_F32}});
}

int registered = [] {
  for (int32_t i = 0; i < gguf_type_count(); ++i) {
    const GgufTypeInfo type = gguf_type(i);
    const std::string name = type.name;
    for_every_target("gguf/quantize/" + name, kRows * kSide * 4, [=] { quantize(type.type); });
    for_every_target("gguf/dequantize/" + name,
                     kSide * kSide * 4 + kSide * kSide / type.block_size * type.block_bytes,
                     [=] { dequantize(type.type); });
  }
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
