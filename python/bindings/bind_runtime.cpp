#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/openmp.hpp"
#include "quantrature/quantrature.hpp"

namespace quantrature::bindings {

namespace nb = nanobind;
using namespace nb::literals;

void bind_runtime(nb::module_& m) {
  m.def("version", &version);
  m.def("available_targets", &available_targets);
  m.def("target", &target);
  m.def("set_target", &set_target, "name"_a);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_threads, "count"_a);
  m.def("cuda_device_count", [] {
    std::string why_not;
    nb::gil_scoped_release release;
    const int count = cuda_device_count(&why_not);
    return std::pair(count, why_not);
  });
  m.def("run_on_openmp_of", &run_on_openmp_of, "library"_a);
}

}  // namespace quantrature::bindings
