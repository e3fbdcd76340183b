#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings/arrays.hpp"
#include "bindings/exclude.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodesInput = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void bind_codebook(nb::module_& m) {
  m.def(
      "codebook_quantize",
      [](const Input& w, int bits, int64_t group_size, const Input& table,
         const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const Codes& codes,
         const std::optional<Floats>& scale) {
        CodebookQuantizeArgs args{};
        args.struct_size = sizeof(args);
        args.w = view(w);
        args.bits = bits;
        args.group_size = group_size;
        args.table = view(table);
        exclude(row_offsets, columns, "codebook", args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.scale = scale ? scale->data() : nullptr;
        args.groups = scale ? static_cast<int64_t>(scale->size()) : 0;
        nb::gil_scoped_release release;
        codebook_quantize(args);
      },
      "w"_a.noconvert(), "bits"_a, "group_size"_a, "table"_a.noconvert(), "row_offsets"_a.noconvert().none(),
      "columns"_a.noconvert().none(), "codes"_a.noconvert(), "scale"_a.noconvert().none());
  m.def(
      "codebook_dequantize",
      [](const CodesInput& codes, int bits, int64_t group_size, const Input& table,
         const std::optional<Input>& scale, const Output& out) {
        CodebookDequantizeArgs args{};
        args.struct_size = sizeof(args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.bits = bits;
        args.group_size = group_size;
        args.table = view(table);
        if (scale) args.scale = view(*scale);
        args.out = view(out);
        nb::gil_scoped_release release;
        codebook_dequantize(args);
      },
      "codes"_a.noconvert(), "bits"_a, "group_size"_a, "table"_a.noconvert(), "scale"_a.noconvert().none(),
      "out"_a.noconvert());
}

}  // namespace quantrature::bindings
