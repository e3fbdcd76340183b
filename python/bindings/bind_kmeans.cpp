#include <optional>

#include <nanobind/stl/optional.h>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Assignment = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;

void bind_kmeans(nb::module_& m) {
  m.def(
      "kmeans",
      [](const Input& x, const std::optional<Input>& weights, int k, const Output& centroids,
         const Assignment& assignment) {
        const KmeansArgs args{sizeof(KmeansArgs), view(x),          weights ? view(*weights) : Matrix{}, k,
                              view(centroids),    assignment.data()};
        nb::gil_scoped_release release;
        kmeans(args);
      },
      "x"_a.noconvert(), "weights"_a.noconvert().none(), "k"_a, "centroids"_a.noconvert(),
      "assignment"_a.noconvert());
}

}  // namespace quantrature::bindings
