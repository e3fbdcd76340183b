#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using PackedRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;
using SparsePart = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig>;
using SparseResult = nb::ndarray<float, nb::ndim<1>, nb::c_contig>;

GridMatrix grid_of(const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
                   const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero) {
  return {codes.data(), static_cast<int64_t>(codes.size()), static_cast<int64_t>(codes.shape(0)), cols, bits,
          group_size,   scale ? view(*scale) : Matrix{},    zero ? view(*zero) : Matrix{}};
}

Csr csr_of(const SparsePart& values, const SparsePart& columns, const SparsePart& row_offsets, int64_t cols) {
  return {values.data(),
          columns.data(),
          row_offsets.data(),
          static_cast<int64_t>(row_offsets.shape(0)) - 1,
          cols,
          static_cast<int64_t>(values.shape(0)),
          dtype_of(values.dtype())};
}

}  // namespace

void bind_matvec(nb::module_& m) {
  m.def(
      "residuals",
      [](const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
         const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero,
         const std::optional<AnyInput>& table, const SparsePart& values, const SparsePart& columns,
         const SparsePart& row_offsets, const SparseResult& out, const Place& place) {
        const ResidualsArgs args{
            sizeof(ResidualsArgs),
            grid_of(codes, cols, bits, group_size, scale, zero),
            csr_of(values, columns, row_offsets, cols),
            out.data(),
            device_of(place, codes, scale, zero, table, values, columns, row_offsets, out),
            table ? view(*table) : Matrix{}};
        nb::gil_scoped_release release;
        residuals(args);
      },
      "codes"_a.noconvert(), "cols"_a, "bits"_a, "group_size"_a, "scale"_a.noconvert().none(),
      "zero"_a.noconvert().none(), "table"_a.noconvert().none(), "values"_a.noconvert(),
      "columns"_a.noconvert(), "row_offsets"_a.noconvert(), "out"_a.noconvert(),
      "place"_a.none() = nb::none());
  m.def(
      "matvec",
      [](const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
         const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero,
         const std::optional<AnyInput>& table, const std::optional<SparsePart>& values,
         const std::optional<SparsePart>& columns, const std::optional<SparsePart>& row_offsets,
         const AnyInput& x, const AnyOutput& out, int activations, const Place& place) {
        MatvecArgs args{};
        args.struct_size = sizeof(args);
        args.w = grid_of(codes, cols, bits, group_size, scale, zero);
        if (values && columns && row_offsets) args.residuals = csr_of(*values, *columns, *row_offsets, cols);
        args.x = view(x);
        args.out = view(out);
        args.activations = static_cast<qtr_activations>(activations);
        args.device = device_of(place, codes, scale, zero, table, x, out);
        if (table) args.table = view(*table);
        nb::gil_scoped_release release;
        matvec(args);
      },
      "codes"_a.noconvert(), "cols"_a, "bits"_a, "group_size"_a, "scale"_a.noconvert().none(),
      "zero"_a.noconvert().none(), "table"_a.noconvert().none(), "values"_a.noconvert().none(),
      "columns"_a.noconvert().none(), "row_offsets"_a.noconvert().none(), "x"_a.noconvert(),
      "out"_a.noconvert(), "activations"_a, "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
