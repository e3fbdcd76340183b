#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings/arrays.hpp"
#include "bindings/exclude.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::c_contig>;
using Hessian = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Fitted = nb::ndarray<float, nb::c_contig>;

void bind_gptq(nb::module_& m) {
  m.def(
      "gptq",
      [](const AnyInput& w, const Hessian& hessian, int bits, int64_t group_size,
         const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero, double damp, bool ordered,
         const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const Codes& codes,
         const std::optional<Fitted>& fitted_scale, const std::optional<Fitted>& fitted_zero, int solver,
         bool half, const Place& place) {
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
        args.device = device_of(place, w, scale, zero, codes, fitted_scale, fitted_zero);
        exclude(row_offsets, columns, "gptq", args);
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
      "fitted_zero"_a.noconvert().none() = nb::none(), "solver"_a = 0, "half"_a = false,
      "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
