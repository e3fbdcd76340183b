#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;
using Hessian = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Fitted = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_gptq(nb::module_& m) {
  m.def(
      "gptq",
      [](const Input& w, const Hessian& hessian, int bits, int64_t group_size,
         const std::optional<Input>& scale, const std::optional<Input>& zero, double damp, bool ordered,
         const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const Codes& codes,
         const std::optional<Fitted>& fitted_scale, const std::optional<Fitted>& fitted_zero, int solver,
         bool half) {
        GptqResult result{};
        GptqArgs args{};
        args.struct_size = sizeof(args);
        args.w = view(w);
        args.hessian = hessian.data();
        args.hessian_size = static_cast<int64_t>(hessian.size());
        args.bits = bits;
        args.group_size = group_size;
        if (scale) args.scale = view(*scale);
        if (zero) args.zero = view(*zero);
        args.damp = damp;
        args.ordered = ordered;
        if (row_offsets && columns) {
          // The core trusts the sizes, which it cannot see.
          const auto rows = static_cast<size_t>(args.w.rows);
          if (row_offsets->shape(0) != rows + 1)
            throw InvalidArgument("[gptq] exclude must have one row_offset more than w has rows");
          if (row_offsets->data()[rows] != static_cast<int64_t>(columns->shape(0)))
            throw InvalidArgument("[gptq] exclude must have as many columns as its last row_offset says");
          args.exclude_row_offsets = row_offsets->data();
          args.exclude_columns = columns->data();
        }
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.result = &result;
        if (fitted_scale) {
          if (fitted_zero && fitted_zero->size() != fitted_scale->size())
            throw InvalidArgument("[gptq] fitted_zero must be of the size of fitted_scale");
          args.fitted_scale = fitted_scale->data();
          args.fitted_zero = fitted_zero ? fitted_zero->data() : nullptr;
          args.fitted_size = static_cast<int64_t>(fitted_scale->size());
          args.solver = static_cast<qtr_grid_solver>(solver);
          args.half = half;
        } else if (!scale) {
          throw InvalidArgument("[gptq] scale must be given where no grid is fitted");
        }
        {
          nb::gil_scoped_release release;
          gptq(args);
        }
        return std::make_tuple(result.damp, result.loss, result.dead);
      },
      "w"_a.noconvert(), "hessian"_a.noconvert(), "bits"_a, "group_size"_a, "scale"_a.noconvert().none(),
      "zero"_a.noconvert().none(), "damp"_a, "ordered"_a, "row_offsets"_a.noconvert().none(),
      "columns"_a.noconvert().none(), "codes"_a.noconvert(), "fitted_scale"_a.noconvert().none() = nb::none(),
      "fitted_zero"_a.noconvert().none() = nb::none(), "solver"_a = 0, "half"_a = false);
}

}  // namespace quantrature::bindings
