#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using Signs = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig>;
using NewSigns = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_hadamard(nb::module_& m) {
  m.def("hadamard_order", &hadamard_order, "n"_a);
  m.def(
      "random_signs",
      [](uint64_t seed, int64_t count, const NewSigns& signs) {
        random_signs({sizeof(RandomSignsArgs), seed, count, signs.data()});
      },
      "seed"_a, "count"_a, "signs"_a.noconvert());
  m.def(
      "hadamard",
      [](const AnyInput& x, const std::optional<Signs>& signs, bool inverse, const AnyOutput& out,
         const Place& place) {
        const HadamardArgs args{sizeof(HadamardArgs),
                                view(x),
                                signs ? signs->data() : nullptr,
                                inverse,
                                view(out),
                                signs ? device_of(place, x, *signs, out) : device_of(place, x, out)};
        nb::gil_scoped_release release;
        hadamard(args);
      },
      "x"_a.noconvert(), "signs"_a.noconvert().none(), "inverse"_a, "out"_a.noconvert(),
      "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
