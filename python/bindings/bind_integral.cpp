#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using Flag = nb::ndarray<int32_t, nb::shape<1>, nb::c_contig>;

}  // namespace

void bind_integral(nb::module_& m) {
  m.def(
      "pqi_accumulate",
      [](const AnyOutput& acc, const AnyInput& grad, double weight, const std::optional<Flag>& not_finite,
         const Place& place) {
        const PqiAccumulateArgs args{sizeof(PqiAccumulateArgs),
                                     view(acc),
                                     view(grad),
                                     weight,
                                     device_of(place, acc, grad, not_finite),
                                     not_finite ? not_finite->data() : nullptr};
        nb::gil_scoped_release release;
        pqi_accumulate(args);
      },
      "acc"_a.noconvert(), "grad"_a.noconvert(), "weight"_a, "not_finite"_a.noconvert().none() = nb::none(),
      "place"_a.none() = nb::none());
  m.def(
      "pqi_finalize",
      [](const AnyInput& acc, const AnyInput& w, const AnyInput& w_quantized, bool keep_sign,
         const AnyOutput& out, const Place& place) {
        const PqiFinalizeArgs args{sizeof(PqiFinalizeArgs),
                                   view(acc),
                                   view(w),
                                   view(w_quantized),
                                   keep_sign,
                                   view(out),
                                   device_of(place, acc, w, w_quantized, out)};
        nb::gil_scoped_release release;
        pqi_finalize(args);
      },
      "acc"_a.noconvert(), "w"_a.noconvert(), "w_quantized"_a.noconvert(), "keep_sign"_a, "out"_a.noconvert(),
      "place"_a.none() = nb::none());
  m.def(
      "pqi_sum",
      [](const AnyInput& acc, const AnyInput& w, const AnyInput& w_quantized, const Place& place) {
        double sum = 0;
        const PqiSumArgs args{sizeof(PqiSumArgs), view(acc), view(w),
                              view(w_quantized),  &sum,      device_of(place, acc, w, w_quantized)};
        nb::gil_scoped_release release;
        pqi_sum(args);
        return sum;
      },
      "acc"_a.noconvert(), "w"_a.noconvert(), "w_quantized"_a.noconvert(), "place"_a.none() = nb::none());
  m.def(
      "interpolate",
      [](const AnyInput& w, const AnyInput& w_quantized, double t, const AnyOutput& out, const Place& place) {
        const InterpolateArgs args{sizeof(InterpolateArgs),
                                   view(w),
                                   view(w_quantized),
                                   t,
                                   view(out),
                                   device_of(place, w, w_quantized, out)};
        nb::gil_scoped_release release;
        interpolate(args);
      },
      "w"_a.noconvert(), "w_quantized"_a.noconvert(), "t"_a, "out"_a.noconvert(),
      "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
