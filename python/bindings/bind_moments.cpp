#include "bindings/arrays.hpp"

namespace quantrature::bindings {

static_assert(sizeof(Moments) == 7 * sizeof(double), "a row of seven doubles is one Moments");
using MomentsArray = nb::ndarray<double, nb::shape<-1, 7>, nb::c_contig, nb::device::cpu>;
using MomentsInput = nb::ndarray<const double, nb::shape<-1, 7>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_moments(nb::module_& m) {
  m.def(
      "compute_moments",
      [](const AnyInput& x, int over, int64_t group_size, const MomentsArray& out, const Place& place) {
        const MomentsArgs args{sizeof(MomentsArgs),
                               view(x),
                               static_cast<qtr_moments_over>(over),
                               group_size,
                               reinterpret_cast<Moments*>(out.data()),
                               static_cast<int64_t>(out.shape(0)),
                               device_of(place, x)};
        nb::gil_scoped_release release;
        compute_moments(args);
      },
      "x"_a.noconvert(), "over"_a, "group_size"_a, "out"_a.noconvert(), "place"_a.none() = nb::none());
  m.def(
      "merge_moments",
      [](const MomentsInput& a, const MomentsInput& b, const MomentsArray& out) {
        for (size_t i = 0; i < out.shape(0); ++i)
          reinterpret_cast<Moments*>(out.data())[i] = merge_moments(
              reinterpret_cast<const Moments*>(a.data())[i], reinterpret_cast<const Moments*>(b.data())[i]);
      },
      "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert());
  m.def(
      "kurtosis",
      [](const MomentsInput& moments, bool fisher, bool bias, const Doubles& out) {
        for (size_t i = 0; i < out.shape(0); ++i)
          out.data()[i] = kurtosis(reinterpret_cast<const Moments*>(moments.data())[i], fisher, bias);
      },
      "moments"_a.noconvert(), "fisher"_a, "bias"_a, "out"_a.noconvert());
}

}  // namespace quantrature::bindings
