#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using NewStreams = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig>;

}  // namespace

void bind_viterbi(nb::module_& m) {
  m.def(
      "trellis_quantize",
      [](const AnyInput& x, int code, int bits, int state_bits, float scale, const NewStreams& codes,
         const Place& place) {
        const TrellisQuantizeArgs args{sizeof(TrellisQuantizeArgs),
                                       view(x),
                                       {static_cast<qtr_trellis_code>(code), bits, state_bits},
                                       scale,
                                       codes.data(),
                                       static_cast<int64_t>(codes.size()),
                                       device_of(place, x, codes)};
        nb::gil_scoped_release release;
        trellis_quantize(args);
      },
      "x"_a.noconvert(), "code"_a, "bits"_a, "state_bits"_a, "scale"_a, "codes"_a.noconvert(),
      "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
