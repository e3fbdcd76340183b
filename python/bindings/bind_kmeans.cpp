#include <optional>

#include <nanobind/stl/optional.h>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Assignment = nb::ndarray<uint8_t, nb::c_contig>;

void bind_kmeans(nb::module_& m) {
  m.def(
      "kmeans",
      [](const AnyInput& x, const std::optional<AnyInput>& weights, int k, const AnyOutput& centroids,
         const Assignment& assignment, const Place& place) {
        const Device device = weights ? device_of(place, x, *weights, centroids, assignment)
                                      : device_of(place, x, centroids, assignment);
        const KmeansArgs args{
            sizeof(KmeansArgs), view(x), weights ? view(*weights) : Matrix{}, k, view(centroids),
            assignment.data(),  device};
        nb::gil_scoped_release release;
        kmeans(args);
      },
      "x"_a.noconvert(), "weights"_a.noconvert().none(), "k"_a, "centroids"_a.noconvert(),
      "assignment"_a.noconvert(), "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
