#include "bindings/arrays.hpp"
#include "bindings/exclude.hpp"

namespace quantrature::bindings {

using Codes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig>;
using CodesInput = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig>;
using Floats = nb::ndarray<float, nb::c_contig>;
using FloatsInput = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

void bind_grid(nb::module_& m) {
  m.def(
      "quantize",
      [](const AnyInput& w, int bits, int64_t group_size, int axis, bool sym, int solver, bool round_zero,
         bool integer_zero, int scale_format, const std::optional<Offsets>& row_offsets,
         const std::optional<Columns>& columns, const Codes& codes, const Floats& scale,
         const std::optional<Floats>& zero, const Place& place) {
        QuantizeArgs args{};
        args.struct_size = sizeof(args);
        args.w = view(w);
        args.bits = bits;
        args.group_size = group_size;
        args.axis = axis;
        args.sym = sym;
        args.solver = static_cast<qtr_grid_solver>(solver);
        args.round_zero = round_zero;
        args.integer_zero = integer_zero;
        args.scale_format = static_cast<qtr_scale_format>(scale_format);
        args.device = zero ? device_of(place, w, codes, scale, *zero) : device_of(place, w, codes, scale);
        exclude(row_offsets, columns, "quantize", args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.scale = scale.data();
        args.zero = zero ? zero->data() : nullptr;
        args.groups = static_cast<int64_t>(scale.size());
        nb::gil_scoped_release release;
        quantize(args);
      },
      "w"_a.noconvert(), "bits"_a, "group_size"_a, "axis"_a, "sym"_a, "solver"_a, "round_zero"_a,
      "integer_zero"_a, "scale_format"_a, "row_offsets"_a.noconvert().none(), "columns"_a.noconvert().none(),
      "codes"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert().none(),
      "place"_a.none() = nb::none());
  m.def(
      "dequantize",
      [](const CodesInput& codes, int bits, int64_t group_size, int axis, const AnyInput& scale,
         const std::optional<AnyInput>& zero, const AnyOutput& out, const Place& place) {
        DequantizeArgs args{};
        args.struct_size = sizeof(args);
        args.codes = codes.data();
        args.codes_size = static_cast<int64_t>(codes.size());
        args.bits = bits;
        args.group_size = group_size;
        args.axis = axis;
        args.scale = view(scale);
        if (zero) args.zero = view(*zero);
        args.out = view(out);
        args.device = zero ? device_of(place, codes, scale, *zero, out) : device_of(place, codes, scale, out);
        nb::gil_scoped_release release;
        dequantize(args);
      },
      "codes"_a.noconvert(), "bits"_a, "group_size"_a, "axis"_a, "scale"_a.noconvert(),
      "zero"_a.noconvert().none(), "out"_a.noconvert(), "place"_a.none() = nb::none());
  m.def(
      "round_to_half",
      [](const FloatsInput& values, const Output& out) {
        const MutableMatrix halves = view(out);
        if (halves.dtype != QTR_F16 || out.size() != values.size())
          throw nb::type_error("expected as many float16 numbers as values");
        float smallest, largest;
        const RoundToHalfArgs args{sizeof(args),
                                   values.data(),
                                   static_cast<int64_t>(values.size()),
                                   static_cast<uint16_t*>(halves.data),
                                   &smallest,
                                   &largest};
        {
          nb::gil_scoped_release release;
          round_to_half(args);
        }
        return std::pair(smallest, largest);
      },
      "values"_a.noconvert(), "out"_a.noconvert());
}

}  // namespace quantrature::bindings
