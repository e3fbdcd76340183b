#include "bindings/arrays.hpp"

namespace quantrature::bindings {

void bind_integral(nb::module_& m) {
  m.def(
      "pqi_accumulate",
      [](const Output& acc, const Input& grad, double weight) {
        const PqiAccumulateArgs args{sizeof(PqiAccumulateArgs), view(acc), view(grad), weight};
        nb::gil_scoped_release release;
        pqi_accumulate(args);
      },
      "acc"_a.noconvert(), "grad"_a.noconvert(), "weight"_a);
  m.def(
      "pqi_finalize",
      [](const Input& acc, const Input& w, const Input& w_quantized, bool keep_sign, const Output& out) {
        const PqiFinalizeArgs args{sizeof(PqiFinalizeArgs), view(acc), view(w),
                                   view(w_quantized),       keep_sign, view(out)};
        nb::gil_scoped_release release;
        pqi_finalize(args);
      },
      "acc"_a.noconvert(), "w"_a.noconvert(), "w_quantized"_a.noconvert(), "keep_sign"_a,
      "out"_a.noconvert());
  m.def(
      "pqi_sum",
      [](const Input& acc, const Input& w, const Input& w_quantized) {
        double sum = 0;
        const PqiSumArgs args{sizeof(PqiSumArgs), view(acc), view(w), view(w_quantized), &sum};
        nb::gil_scoped_release release;
        pqi_sum(args);
        return sum;
      },
      "acc"_a.noconvert(), "w"_a.noconvert(), "w_quantized"_a.noconvert());
  m.def(
      "interpolate",
      [](const Input& w, const Input& w_quantized, double t, const Output& out) {
        const InterpolateArgs args{sizeof(InterpolateArgs), view(w), view(w_quantized), t, view(out)};
        nb::gil_scoped_release release;
        interpolate(args);
      },
      "w"_a.noconvert(), "w_quantized"_a.noconvert(), "t"_a, "out"_a.noconvert());
}

}  // namespace quantrature::bindings
