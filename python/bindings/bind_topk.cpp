#include <vector>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Indices = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig>;
using Values = nb::ndarray<nb::ndim<1>, nb::c_contig>;
using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_topk(nb::module_& m) {
  m.def(
      "topk",
      [](const nb::list& x, int64_t k, bool by_abs, const Values& values, const Indices& indices,
         const Counts& counts, const Place& place) {
        std::vector<AnyInput> arrays;
        std::vector<Matrix> matrices;
        Device device{};
        for (nb::handle array : x) {
          arrays.push_back(nb::cast<AnyInput>(array, false));
          matrices.push_back(view(arrays.back()));
          device = device_of(place, arrays.back(), values, indices);
        }
        if (counts.shape(0) != arrays.size() || indices.shape(0) != values.shape(0) ||
            static_cast<int64_t>(indices.shape(0)) != k)
          throw nb::type_error("topk: outputs of another length");
        const TopkArgs args{sizeof(TopkArgs),
                            matrices.data(),
                            static_cast<int64_t>(matrices.size()),
                            k,
                            by_abs ? QTR_KEY_ABS : QTR_KEY_VALUE,
                            0,
                            indices.data(),
                            values.data(),
                            counts.data(),
                            device};
        nb::gil_scoped_release release;
        topk(args);
      },
      "x"_a, "k"_a, "by_abs"_a, "values"_a.noconvert(), "indices"_a.noconvert(), "counts"_a.noconvert(),
      "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
