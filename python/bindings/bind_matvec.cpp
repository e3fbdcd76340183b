#include "bindings/arrays.hpp"

namespace quantrature::bindings {
namespace {

using PackedRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;
using SparsePart = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig>;
using SparseResult = nb::ndarray<float, nb::ndim<1>, nb::c_contig>;

GridMatrix grid_of(const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
                   const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero) {
  return {codes.data(), static_cast<int64_t>(codes.size()), static_cast<int64_t>(codes.shape(0)), cols, bits,
          group_size,   scale ? view(*scale) : Matrix{},    zero ? view(*zero) : Matrix{}};
}

Csr csr_of(const SparsePart& values, const SparsePart& columns, const SparsePart& row_offsets, int64_t cols) {
  return {values.data(),
          columns.data(),
          row_offsets.data(),
          static_cast<int64_t>(row_offsets.shape(0)) - 1,
          cols,
          static_cast<int64_t>(values.shape(0)),
          dtype_of(values.dtype())};
}

// The product with one matrix, whose arrays are converted once and kept alive. Vectors and results are given
// by their addresses: to convert arrays takes longer than to multiply a small matrix.
class Product {
 public:
  Product(const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
          const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero,
          const std::optional<AnyInput>& table, const std::optional<SparsePart>& values,
          const std::optional<SparsePart>& columns, const std::optional<SparsePart>& row_offsets)
      : codes_(codes),
        scale_(scale),
        zero_(zero),
        table_(table),
        values_(values),
        columns_(columns),
        row_offsets_(row_offsets) {
    args_.struct_size = sizeof(args_);
    args_.w = grid_of(codes, cols, bits, group_size, scale, zero);
    if (values && columns && row_offsets) args_.residuals = csr_of(*values, *columns, *row_offsets, cols);
    if (table) args_.table = view(*table);
  }

  // vectors x cols numbers at x, and vectors x rows at out; both contiguous, and where the matrix is.
  void multiply(uintptr_t x, int x_dtype, uintptr_t out, int out_dtype, int64_t vectors, int activations,
                const Place& place) const {
    MatvecArgs args = args_;
    args.device = device_of(place, codes_, scale_, zero_, table_, values_, columns_, row_offsets_);
    const int64_t rows = args.w.rows, cols = args.w.cols;
    args.x = {reinterpret_cast<const void*>(x), vectors, cols, cols, static_cast<DType>(x_dtype)};
    args.out = {reinterpret_cast<void*>(out), vectors, rows, rows, static_cast<DType>(out_dtype)};
    args.activations = static_cast<qtr_activations>(activations);
    nb::gil_scoped_release release;
    matvec(args);
  }

 private:
  PackedRows codes_;
  std::optional<AnyInput> scale_, zero_, table_;
  std::optional<SparsePart> values_, columns_, row_offsets_;
  MatvecArgs args_{};
};

}  // namespace

void bind_matvec(nb::module_& m) {
  m.def(
      "residuals",
      [](const PackedRows& codes, int64_t cols, int bits, int64_t group_size,
         const std::optional<AnyInput>& scale, const std::optional<AnyInput>& zero,
         const std::optional<AnyInput>& table, const SparsePart& values, const SparsePart& columns,
         const SparsePart& row_offsets, const SparseResult& out, const Place& place) {
        const ResidualsArgs args{
            sizeof(ResidualsArgs),
            grid_of(codes, cols, bits, group_size, scale, zero),
            csr_of(values, columns, row_offsets, cols),
            out.data(),
            device_of(place, codes, scale, zero, table, values, columns, row_offsets, out),
            table ? view(*table) : Matrix{}};
        nb::gil_scoped_release release;
        residuals(args);
      },
      "codes"_a.noconvert(), "cols"_a, "bits"_a, "group_size"_a, "scale"_a.noconvert().none(),
      "zero"_a.noconvert().none(), "table"_a.noconvert().none(), "values"_a.noconvert(),
      "columns"_a.noconvert(), "row_offsets"_a.noconvert(), "out"_a.noconvert(),
      "place"_a.none() = nb::none());
  m.def(
      "address", [](const AnyInput& array) { return reinterpret_cast<uintptr_t>(array.data()); },
      "array"_a.noconvert());
  nb::class_<Product>(m, "Product")
      .def(nb::init<const PackedRows&, int64_t, int, int64_t, const std::optional<AnyInput>&,
                    const std::optional<AnyInput>&, const std::optional<AnyInput>&,
                    const std::optional<SparsePart>&, const std::optional<SparsePart>&,
                    const std::optional<SparsePart>&>(),
           "codes"_a.noconvert(), "cols"_a, "bits"_a, "group_size"_a, "scale"_a.noconvert().none(),
           "zero"_a.noconvert().none(), "table"_a.noconvert().none(), "values"_a.noconvert().none(),
           "columns"_a.noconvert().none(), "row_offsets"_a.noconvert().none())
      .def("multiply", &Product::multiply, "x"_a, "x_dtype"_a, "out"_a, "out_dtype"_a, "vectors"_a,
           "activations"_a = 0, "place"_a.none() = nb::none());
}

}  // namespace quantrature::bindings
