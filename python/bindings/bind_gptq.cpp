#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include "bindings/arrays.hpp"
#include "bindings/exclude.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::c_contig>;
using Hessian = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<const float, nb::ndim<3>, nb::c_contig>;
using Order = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pivots = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Fitted = nb::ndarray<float, nb::c_contig>;

void bind_gptq(nb::module_& m) {
  m.def(
      "gptq",
      [](const AnyInput& w, const std::optional<Hessian>& hessian, int bits, int64_t group_size,
         const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero, double damp, bool ordered,
         const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const Codes& codes,
         const std::optional<Fitted>& fitted_scale, const std::optional<Fitted>& fitted_zero, int solver,
         bool half, bool integer_zero, int scale_format, const std::optional<Panels>& factor,
         const std::optional<Order>& order, const std::optional<Pivots>& pivots, const Place& place) {
        GptqResult result{};
        GptqArgs args{};
        args.struct_size = sizeof(args);
        args.w = view(w);
        if (hessian) {
          args.hessian = hessian->data();
          args.hessian_size = static_cast<int64_t>(hessian->size());
        }
        args.bits = bits;
        args.group_size = group_size;
        if (scale) args.scale = view(*scale);
        if (zero) args.zero = view(*zero);
        args.damp = damp;
        args.ordered = ordered;
        args.device = device_of(place, w, scale, zero, codes, fitted_scale, fitted_zero, factor);
        exclude(row_offsets, columns, "gptq", args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.result = &result;
        if (factor && order && pivots) {
          const auto cols = static_cast<size_t>(args.w.cols);
          if (factor->shape(0) != (cols + 7) / 8 || factor->shape(1) != cols || factor->shape(2) != 8 ||
              order->size() != cols || pivots->size() != cols)
            throw InvalidArgument("[gptq] factor must be of a Hessian of as many columns as w has");
          args.factor = factor->data();
          args.order = order->data();
          args.pivots = pivots->data();
        }
        if (fitted_scale) {
          if (fitted_zero && fitted_zero->size() != fitted_scale->size())
            throw InvalidArgument("[gptq] fitted_zero must be of the size of fitted_scale");
          args.fitted_scale = fitted_scale->data();
          args.fitted_zero = fitted_zero ? fitted_zero->data() : nullptr;
          args.fitted_size = static_cast<int64_t>(fitted_scale->size());
          args.solver = static_cast<qtr_grid_solver>(solver);
          args.integer_zero = integer_zero;
          args.scale_format = static_cast<qtr_scale_format>(scale_format);
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
      "w"_a.noconvert(), "hessian"_a.noconvert().none(), "bits"_a, "group_size"_a,
      "scale"_a.noconvert().none(), "zero"_a.noconvert().none(), "damp"_a, "ordered"_a,
      "row_offsets"_a.noconvert().none(), "columns"_a.noconvert().none(), "codes"_a.noconvert(),
      "fitted_scale"_a.noconvert().none() = nb::none(), "fitted_zero"_a.noconvert().none() = nb::none(),
      "solver"_a = 0, "half"_a = false, "integer_zero"_a = false, "scale_format"_a = 0,
      "factor"_a.noconvert().none() = nb::none(), "order"_a.noconvert().none() = nb::none(),
      "pivots"_a.noconvert().none() = nb::none(), "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
