#include <string>
#include <tuple>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Blocks = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BlocksInput = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void bind_gguf(nb::module_& m) {
  m.def("gguf_types", [] {
    std::vector<std::tuple<std::string, int, int, int>> types;
    for (int32_t i = 0; i < gguf_type_count(); ++i) {
      const GgufTypeInfo type = gguf_type(i);
      types.emplace_back(type.name, type.type, type.block_size, type.block_bytes);
    }
    return types;
  });
  m.def(
      "gguf_row_bytes",
      [](int type, int64_t cols) { return gguf_row_bytes(static_cast<qtr_gguf_type>(type), cols); }, "type"_a,
      "cols"_a);
  m.def(
      "gguf_quantize",
      [](const Input& w, int type, const std::optional<Input>& weights, const Blocks& data) {
        const GgufQuantizeArgs args{sizeof(GgufQuantizeArgs),
                                    view(w),
                                    static_cast<qtr_gguf_type>(type),
                                    weights ? view(*weights) : Matrix{},
                                    data.data(),
                                    static_cast<int64_t>(data.size())};
        nb::gil_scoped_release release;
        gguf_quantize(args);
      },
      "w"_a.noconvert(), "type"_a, "weights"_a.noconvert().none(), "data"_a.noconvert());
  m.def(
      "gguf_dequantize",
      [](const BlocksInput& data, int type, const Output& out) {
        const GgufDequantizeArgs args{sizeof(GgufDequantizeArgs), data.data(),
                                      static_cast<int64_t>(data.size()), static_cast<qtr_gguf_type>(type),
                                      view(out)};
        nb::gil_scoped_release release;
        gguf_dequantize(args);
      },
      "data"_a.noconvert(), "type"_a, "out"_a.noconvert());
}

}  // namespace quantrature::bindings
