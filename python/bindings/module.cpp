#include <nanobind/nanobind.h>

#include "quantrature/quantrature.hpp"

namespace quantrature::bindings {

namespace nb = nanobind;

void bind_runtime(nb::module_& m);
void bind_allocation(nb::module_& m);
void bind_codebook(nb::module_& m);
void bind_gguf(nb::module_& m);
void bind_gptq(nb::module_& m);
void bind_grid(nb::module_& m);
void bind_hadamard(nb::module_& m);
void bind_hessian(nb::module_& m);
void bind_integral(nb::module_& m);
void bind_kmeans(nb::module_& m);
void bind_matvec(nb::module_& m);
void bind_moments(nb::module_& m);
void bind_outliers(nb::module_& m);
void bind_packing(nb::module_& m);
void bind_topk(nb::module_& m);
void bind_trellis(nb::module_& m);
void bind_viterbi(nb::module_& m);

NB_MODULE(_C, m) {
  m.doc() = "The core of quantrature. Use quantrature.ops, which checks arguments and allocates results.";

  // Each is also the built-in exception that Python programmers expect; translators run from the last to the
  // first.
  const nb::handle error = nb::exception<Error>(m, "QuantratureError", PyExc_Exception);
  const auto kind_of = [&](PyObject* builtin) { return nb::make_tuple(error, nb::handle(builtin)); };
  nb::exception<InvalidArgument>(m, "InvalidArgumentError", kind_of(PyExc_ValueError));
  nb::exception<Unsupported>(m, "UnsupportedError", kind_of(PyExc_NotImplementedError));
  nb::exception<DeviceError>(m, "DeviceError", kind_of(PyExc_RuntimeError));

  bind_runtime(m);
  bind_allocation(m);
  bind_codebook(m);
  bind_gguf(m);
  bind_gptq(m);
  bind_grid(m);
  bind_hadamard(m);
  bind_hessian(m);
  bind_integral(m);
  bind_kmeans(m);
  bind_matvec(m);
  bind_moments(m);
  bind_outliers(m);
  bind_packing(m);
  bind_topk(m);
  bind_trellis(m);
  bind_viterbi(m);
}

}  // namespace quantrature::bindings
