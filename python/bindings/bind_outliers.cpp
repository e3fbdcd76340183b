#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using ChosenIndices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig>;
using InputVector = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutputVector = nb::ndarray<nb::ndim<1>, nb::c_contig>;

void bind_outliers(nb::module_& m) {
  m.def(
      "extract_outliers",
      [](const AnyInput& w, int64_t count, bool per_row, const std::optional<ChosenIndices>& indices,
         const AnyOutput& remainder, const OutputVector& values, const OutputVector& columns,
         const OutputVector& row_offsets, const Place& place) {
        if (indices) static_cast<void>(device_of(place, *indices));
        const OutliersArgs args{sizeof(OutliersArgs),
                                view(w),
                                count,
                                per_row,
                                indices ? indices->data() : nullptr,
                                view(remainder),
                                values.data(),
                                columns.data(),
                                row_offsets.data(),
                                device_of(place, w, remainder, values, columns, row_offsets)};
        nb::gil_scoped_release release;
        extract_outliers(args);
      },
      "w"_a.noconvert(), "count"_a, "per_row"_a, "indices"_a.noconvert().none(), "remainder"_a.noconvert(),
      "values"_a.noconvert(), "columns"_a.noconvert(), "row_offsets"_a.noconvert(),
      "place"_a.none() = nb::none());
  m.def(
      "check_csr",
      [](const InputVector& values, const InputVector& columns, const InputVector& row_offsets, int64_t rows,
         int64_t cols) {
        const Csr csr{values.data(),
                      columns.data(),
                      row_offsets.data(),
                      rows,
                      cols,
                      static_cast<int64_t>(values.shape(0)),
                      dtype_of(values.dtype())};
        nb::gil_scoped_release release;
        check_csr(csr);
      },
      "values"_a.noconvert(), "columns"_a.noconvert(), "row_offsets"_a.noconvert(), "rows"_a, "cols"_a);
}

}  // namespace quantrature::bindings
