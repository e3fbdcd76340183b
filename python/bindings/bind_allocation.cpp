#include <nanobind/stl/tuple.h>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Costs = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Sizes = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Chosen = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_allocation(nb::module_& m) {
  m.def(
      "allocate",
      [](const Costs& costs, const Sizes& sizes, const Sizes& option_offsets, int64_t budget,
         double relative_gap, int64_t max_states, const Chosen& chosen) {
        double cost = 0, bound = 0;
        int64_t size = 0;
        const AllocateArgs args{sizeof(AllocateArgs),
                                costs.data(),
                                sizes.data(),
                                option_offsets.data(),
                                static_cast<int64_t>(chosen.size()),
                                budget,
                                relative_gap,
                                max_states,
                                chosen.data(),
                                &cost,
                                &size,
                                &bound};
        {
          nb::gil_scoped_release release;
          allocate(args);
        }
        return std::make_tuple(cost, size, bound);
      },
      "costs"_a.noconvert(), "sizes"_a.noconvert(), "option_offsets"_a.noconvert(), "budget"_a,
      "relative_gap"_a, "max_states"_a, "chosen"_a.noconvert());
}

}  // namespace quantrature::bindings
