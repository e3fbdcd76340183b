#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using NewStreams = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_viterbi(nb::module_& m) {
  m.def(
      "trellis_quantize",
      [](const Input& x, int code, int bits, int state_bits, float scale, const NewStreams& codes) {
        const TrellisQuantizeArgs args{sizeof(TrellisQuantizeArgs),
                                       view(x),
                                       {static_cast<qtr_trellis_code>(code), bits, state_bits},
                                       scale,
                                       codes.data(),
                                       static_cast<int64_t>(codes.size())};
        nb::gil_scoped_release release;
        trellis_quantize(args);
      },
      "x"_a.noconvert(), "code"_a, "bits"_a, "state_bits"_a, "scale"_a, "codes"_a.noconvert());
}

}  // namespace quantrature::bindings
