#include "bindings/arrays.hpp"

namespace quantrature::bindings {

void bind_hessian(nb::module_& m) {
  m.def(
      "hessian_accumulate",
      [](const Output& sum, const Input& x) {
        const HessianAccumulateArgs args{sizeof(HessianAccumulateArgs), view(sum), view(x)};
        nb::gil_scoped_release release;
        hessian_accumulate(args);
      },
      "sum"_a.noconvert(), "x"_a.noconvert());
}

}  // namespace quantrature::bindings
