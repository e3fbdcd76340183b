#include "bindings/arrays.hpp"
#include "bindings/exclude.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig>;
using CodesInput = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;
using Floats = nb::ndarray<float, nb::c_contig>;

void bind_codebook(nb::module_& m) {
  m.def(
      "codebook_quantize",
      [](const AnyInput& w, int bits, int64_t group_size, const AnyInput& table,
         const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const Codes& codes,
         const std::optional<Floats>& scale, const Place& place) {
        CodebookQuantizeArgs args{};
        args.struct_size = sizeof(args);
        args.w = view(w);
        args.bits = bits;
        args.group_size = group_size;
        args.table = view(table);
        args.device = device_of(place, w, table, codes, scale);
        exclude(row_offsets, columns, "codebook", args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.scale = scale ? scale->data() : nullptr;
        args.groups = scale ? static_cast<int64_t>(scale->size()) : 0;
        nb::gil_scoped_release release;
        codebook_quantize(args);
      },
      "w"_a.noconvert(), "bits"_a, "group_size"_a, "table"_a.noconvert(), "row_offsets"_a.noconvert().none(),
      "columns"_a.noconvert().none(), "codes"_a.noconvert(), "scale"_a.noconvert().none(),
      "place"_a.none() = nb::none());
  m.def(
      "codebook_dequantize",
      [](const CodesInput& codes, int bits, int64_t group_size, const AnyInput& table,
         const std::optional<AnyInput>& scale, const AnyOutput& out, const Place& place) {
        CodebookDequantizeArgs args{};
        args.struct_size = sizeof(args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.bits = bits;
        args.group_size = group_size;
        args.table = view(table);
        if (scale) args.scale = view(*scale);
        args.out = view(out);
        args.device = device_of(place, codes, table, scale, out);
        nb::gil_scoped_release release;
        codebook_dequantize(args);
      },
      "codes"_a.noconvert(), "bits"_a, "group_size"_a, "table"_a.noconvert(), "scale"_a.noconvert().none(),
      "out"_a.noconvert(), "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
