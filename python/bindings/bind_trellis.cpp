#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using Streams = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;
using Values = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_trellis(nb::module_& m) {
  m.def(
      "trellis_step_weights",
      [](int code) { return trellis_step_weights(static_cast<qtr_trellis_code>(code)); }, "code"_a);
  m.def(
      "trellis_values",
      [](int code, int state_bits, const Values& out) {
        trellis_values({sizeof(TrellisValuesArgs), static_cast<qtr_trellis_code>(code), state_bits,
                        out.data(), static_cast<int64_t>(out.size())});
      },
      "code"_a, "state_bits"_a, "out"_a.noconvert());
  m.def(
      "trellis_dequantize",
      [](const Streams& codes, int code, int bits, int state_bits, float scale, const AnyOutput& out,
         const Place& place) {
        const TrellisDequantizeArgs args{sizeof(TrellisDequantizeArgs),
                                         codes.data(),
                                         static_cast<int64_t>(codes.size()),
                                         {static_cast<qtr_trellis_code>(code), bits, state_bits},
                                         scale,
                                         view(out),
                                         device_of(place, codes, out)};
        nb::gil_scoped_release release;
        trellis_dequantize(args);
      },
      "codes"_a.noconvert(), "code"_a, "bits"_a, "state_bits"_a, "scale"_a, "out"_a.noconvert(),
      "place"_a.none() = nb::none());
  m.def(
      "trellis_matvec",
      [](const Streams& codes, int64_t rows, int64_t cols, int code, int bits, int state_bits, float scale,
         const AnyInput& x, const AnyOutput& out, const Place& place) {
        const TrellisMatvecArgs args{sizeof(TrellisMatvecArgs),
                                     codes.data(),
                                     static_cast<int64_t>(codes.size()),
                                     rows,
                                     cols,
                                     {static_cast<qtr_trellis_code>(code), bits, state_bits},
                                     scale,
                                     view(x),
                                     view(out),
                                     device_of(place, codes, x, out)};
        nb::gil_scoped_release release;
        trellis_matvec(args);
      },
      "codes"_a.noconvert(), "rows"_a, "cols"_a, "code"_a, "bits"_a, "state_bits"_a, "scale"_a,
      "x"_a.noconvert(), "out"_a.noconvert(), "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
