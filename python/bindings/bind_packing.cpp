#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig>;
using BytesInput = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;

void bind_packing(nb::module_& m) {
  m.def("row_bytes", &row_bytes, "cols"_a, "bits"_a);
  m.def(
      "pack",
      [](const BytesInput& codes, int bits, const Bytes& out, const Place& place) {
        const int64_t rows = static_cast<int64_t>(codes.shape(0)),
                      cols = static_cast<int64_t>(codes.shape(1));
        if (static_cast<int64_t>(out.shape(0)) != rows) throw nb::value_error("rows of codes and out differ");
        const PackArgs args{sizeof(PackArgs),
                            codes.data(),
                            rows,
                            cols,
                            cols,
                            bits,
                            out.data(),
                            static_cast<int64_t>(out.shape(1)),
                            device_of(place, codes, out)};
        nb::gil_scoped_release release;
        pack(args);
      },
      "codes"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "place"_a.none() = nb::none());
  m.def(
      "unpack",
      [](const BytesInput& packed, int bits, const Bytes& out, const Place& place) {
        const int64_t rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
        if (static_cast<int64_t>(packed.shape(0)) != rows)
          throw nb::value_error("rows of packed and out differ");
        const UnpackArgs args{
            sizeof(UnpackArgs), packed.data(), rows, static_cast<int64_t>(packed.shape(1)), bits,
            out.data(),         cols,          cols, device_of(place, packed, out)};
        nb::gil_scoped_release release;
        unpack(args);
      },
      "packed"_a.noconvert(), "bits"_a, "out"_a.noconvert(), "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
