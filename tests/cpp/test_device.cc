// Every op on a device against the same op on the CPU, by numeric class. Built twice: with kernels that run
// on the host (tests/cuda_on_host), and, where the CUDA backend is built, for a GPU.
#include <cmath>
#include <numeric>
#include <tuple>

#include "device_fixture.hpp"

namespace quantrature {
namespace {

struct Shape {
  int64_t rows, cols, padding;
};
const std::vector<Shape> kShapes = {{1, 1, 0},   {1, 7, 0},    {3, 33, 0},   {5, 255, 3},
                                    {4, 256, 0}, {2, 1000, 8}, {3, 4097, 0}, {70, 64, 0}};

void expect_close(double device, double host, double size) {
  if (std::isnan(host))
    EXPECT_TRUE(std::isnan(device));
  else
    EXPECT_NEAR(device, host, 1e-12 * std::max(size, std::abs(host)));
}

void expect_moments(const Moments& device, const Moments& host) {
  const double n = host.count, sd = std::sqrt(std::max(0.0, host.m2 / n));
  const double spread = sd + 1e-4 * std::abs(host.mean);  // of the rounding of the mean
  EXPECT_EQ(device.count, n);
  expect_close(device.mean, host.mean, sd);
  expect_close(device.m2, host.m2, n * spread * spread);
  expect_close(device.m3, host.m3, n * std::pow(spread, 3) + std::pow(host.m4 / n, 0.75) * n);
  expect_close(device.m4, host.m4, n * std::pow(spread, 4));
  EXPECT_EQ(device.minimum, host.minimum);
  EXPECT_EQ(device.maximum, host.maximum);
}

TEST_F(OnDevice, Moments) {
  for (const Shape& shape : kShapes)
    for (DType dtype : cases::kDTypes)
      for (const char* kind : {"normal", "offset", "tails", "constant", "tiny"}) {
        if (dtype != QTR_F32 && std::string(kind) != "normal") continue;  // tails of float16 are infinite
        if (shape.cols > 1000 && std::string(kind) != "offset") continue;
        const cases::Sample s = cases::sample(kind, shape.rows, shape.cols, dtype, shape.padding);
        const Input x(s);
        for (auto over : {QTR_OVER_TENSOR, QTR_OVER_ROWS, QTR_OVER_COLUMNS})
          for (int64_t group : {int64_t{-1}, int64_t{5}, int64_t{64}}) {
            SCOPED_TRACE(std::string(kind) + " " + std::to_string(shape.rows) + "x" +
                         std::to_string(shape.cols));
            MomentsArgs args{sizeof(MomentsArgs), s.view(), over, group, nullptr, 0};
            const int64_t count = moments_count(args);
            std::vector<Moments> host(static_cast<size_t>(count)), device(host), again(host);
            args.out = host.data();
            args.out_count = count;
            compute_moments(args);
            args.x = x.m;
            args.device = kDevice;
            args.out = device.data();
            compute_moments(args);
            args.out = again.data();
            compute_moments(args);
            expect_same(again, device);
            for (size_t i = 0; i < host.size(); ++i) expect_moments(device[i], host[i]);
          }
      }
}

TEST_F(OnDevice, MomentsOfManyRuns) {
  const cases::Sample s = cases::sample("tails", 40, 5000, QTR_F32, 4);
  const Input x(s);
  Moments host{}, device{};
  MomentsArgs args{sizeof(MomentsArgs), s.view(), QTR_OVER_TENSOR, -1, &host, 1};
  compute_moments(args);
  args.x = x.m;
  args.out = &device;
  args.device = kDevice;
  compute_moments(args);
  EXPECT_NEAR(kurtosis(device, true, false), kurtosis(host, true, false),
              1e-12 * kurtosis(host, true, false));
}

// The numbers that come first are far from the mean of all, on runs of every kind: of four threads, a warp
// and a block, and of columns in several slices. Rows begin at 16 bytes, and do not.
TEST_F(OnDevice, MomentsOfAStep) {
  struct Form {
    int64_t rows, cols, group;
    qtr_moments_over over;
  };
  for (const Form& form : {Form{1, 70000, -1, QTR_OVER_TENSOR},
                           {3, 20000, -1, QTR_OVER_ROWS},
                           {5, 4096, -1, QTR_OVER_ROWS},
                           {2, 5001, -1, QTR_OVER_ROWS},
                           {3, 1000, 128, QTR_OVER_ROWS},
                           {3, 1000, 77, QTR_OVER_ROWS},
                           {700, 40, -1, QTR_OVER_COLUMNS},
                           {700, 3, 300, QTR_OVER_COLUMNS}})
    for (DType dtype : {QTR_F32, QTR_BF16})
      for (int64_t start : {0, 1}) {
        SCOPED_TRACE(std::to_string(form.rows) + "x" + std::to_string(form.cols) + ", group " +
                     std::to_string(form.group) + ", start " + std::to_string(start));
        cases::Sample s = cases::sample("normal", form.rows, form.cols + start, dtype);
        for (int64_t row = 0; row < form.rows; ++row)
          for (int64_t col = 0; col < s.cols; ++col) {
            const int64_t along = form.over == QTR_OVER_COLUMNS ? row : col;
            const size_t at = static_cast<size_t>(row * s.stride + col);
            if (along >= 512 || (form.over == QTR_OVER_COLUMNS && along >= 16)) s.values[at] += 1000;
            if (dtype == QTR_F32) continue;
            s.bits[at] = bf16_from_f32(s.values[at]);
            s.values[at] = f32_from_bf16(s.bits[at]);
          }
        const Input x(s);
        MomentsArgs args{sizeof(MomentsArgs), s.view(), form.over, form.group, nullptr, 0};
        const auto part = [&](const Matrix& m) {  // without the first column
          const char* data = static_cast<const char*>(m.data) + start * (dtype == QTR_F32 ? 4 : 2);
          return Matrix{data, m.rows, form.cols, m.row_stride, dtype};
        };
        args.x = part(s.view());
        args.out_count = moments_count(args);
        std::vector<Moments> host(static_cast<size_t>(args.out_count)), device(host);
        args.out = host.data();
        compute_moments(args);
        args.x = part(x.m);
        args.device = kDevice;
        args.out = device.data();
        compute_moments(args);
        for (size_t i = 0; i < host.size(); ++i) expect_moments(device[i], host[i]);
      }
}

TEST_F(OnDevice, MomentsPassOverNan) {
  cases::Sample s = cases::sample("normal", 2, 700, QTR_F32);
  s.values[0] = s.values[698] = NAN;
  s.values[3] = 50;
  s.values[666] = -60;  // the same thread comes to a NaN after it
  const Input x(s);
  std::vector<Moments> m(2);
  compute_moments({sizeof(MomentsArgs), x.m, QTR_OVER_ROWS, -1, m.data(), 2, kDevice});
  EXPECT_TRUE(std::isnan(m[0].mean) && std::isnan(m[0].m2) && std::isnan(m[0].m4));
  EXPECT_EQ(m[0].minimum, -60);
  EXPECT_EQ(m[0].maximum, 50);
  EXPECT_FALSE(std::isnan(m[1].m4));
}

TEST_F(OnDevice, Integral) {
  for (const Shape& shape : kShapes)
    for (DType dtype : cases::kDTypes) {
      const int64_t cells = shape.rows * (shape.cols + shape.padding);
      const cases::Sample acc = cases::sample("normal", shape.rows, shape.cols, QTR_F32, shape.padding, 1);
      const cases::Sample grad = cases::sample("outlier", shape.rows, shape.cols, dtype, shape.padding, 2);
      const cases::Sample w = cases::sample("normal", shape.rows, shape.cols, dtype, shape.padding, 3);
      const cases::Sample image = cases::sample("ties", shape.rows, shape.cols, QTR_F32, shape.padding, 4);
      const Input d_acc(acc), d_grad(grad), d_w(w), d_image(image);
      const auto writable = [&](void* data, DType of) {
        return MutableMatrix{data, shape.rows, shape.cols, shape.cols + shape.padding, of};
      };
      std::vector<float> host = acc.values;
      pqi_accumulate({sizeof(PqiAccumulateArgs), writable(host.data(), QTR_F32), grad.view(), 0.3});
      pqi_accumulate(
          {sizeof(PqiAccumulateArgs), writable(d_acc.memory.data(), QTR_F32), d_grad.m, 0.3, kDevice});
      std::vector<uint8_t> bytes = d_acc.memory.read();
      EXPECT_EQ(std::memcmp(bytes.data(), host.data(), bytes.size()), 0);
      for (float last : {1.0f, INFINITY, NAN}) {
        std::vector<float> odd(static_cast<size_t>(cells), 1);
        odd[static_cast<size_t>(cells - 1 - shape.padding)] = last;
        const DeviceArray<float> d_odd(odd), d_sums(std::vector<float>(odd.size(), INFINITY));
        const DeviceArray<int32_t> flag(std::vector<int32_t>{0});
        Matrix wrong{d_odd.data(), shape.rows, shape.cols, shape.cols + shape.padding, QTR_F32};
        pqi_accumulate(
            {sizeof(PqiAccumulateArgs), writable(d_sums.data(), QTR_F32), wrong, 0.3, kDevice, flag.data()});
        expect_same(flag.read(), std::vector<int32_t>{std::isfinite(last) ? 0 : 1});
      }

      const Matrix sums{host.data(), shape.rows, shape.cols, shape.cols + shape.padding, QTR_F32};
      double total = 0, on_device = 0, again = 0;
      pqi_sum({sizeof(PqiSumArgs), sums, w.view(), image.view(), &total});
      pqi_sum({sizeof(PqiSumArgs), d_acc.m, d_w.m, d_image.m, &on_device, kDevice});
      pqi_sum({sizeof(PqiSumArgs), d_acc.m, d_w.m, d_image.m, &again, kDevice});
      EXPECT_EQ(on_device, again);
      double size = 0;
      for (int64_t r = 0; r < shape.rows; ++r)
        for (int64_t c = 0; c < shape.cols; ++c)
          size += std::abs((image.at(r, c) - w.at(r, c)) * host[static_cast<size_t>(r * acc.stride + c)]);
      expect_close(on_device, total, size);

      for (int keep_sign : {0, 1}) {
        std::vector<float> out(static_cast<size_t>(cells), 0);
        const DeviceArray<float> d_out(out);
        pqi_finalize({sizeof(PqiFinalizeArgs), sums, w.view(), image.view(), keep_sign,
                      writable(out.data(), QTR_F32)});
        pqi_finalize({sizeof(PqiFinalizeArgs), d_acc.m, d_w.m, d_image.m, keep_sign,
                      writable(d_out.data(), QTR_F32), kDevice});
        expect_same(d_out.read(), out);
      }
      for (double t : {0.0, 0.25, 1.0}) {
        std::vector<uint16_t> out(static_cast<size_t>(cells), 0);
        const DeviceArray<uint16_t> d_out(out);
        interpolate({sizeof(InterpolateArgs), w.view(), image.view(), t, writable(out.data(), QTR_BF16)});
        interpolate(
            {sizeof(InterpolateArgs), d_w.m, d_image.m, t, writable(d_out.data(), QTR_BF16), kDevice});
        expect_same(d_out.read(), out);
      }
    }
}

TEST_F(OnDevice, Packing) {
  std::mt19937 generator(5);
  std::vector<Shape> shapes = kShapes;
  // Whole blocks, the last of which are 256 codes alone; with strides that are multiples of 16, and not.
  shapes.insert(shapes.end(), {{3, 512, 16}, {9, 768, 0}, {2, 1280, 8}, {2, 1024, 48}});
  for (const Shape& shape : shapes)
    for (int bits = 1; bits <= 8; ++bits)
      for (const size_t start : {0, 1}) {  // of codes and packed rows, in bytes
        if (start == 1 && shape.cols % 256 != 0) continue;
        SCOPED_TRACE(std::to_string(shape.cols) + " columns, " + std::to_string(bits) + " bits, start " +
                     std::to_string(start));
        const int64_t stride = shape.cols + shape.padding, bytes = row_bytes(shape.cols, bits);
        std::vector<uint8_t> codes(start + static_cast<size_t>(shape.rows * stride));
        for (uint8_t& code : codes) code = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
        std::vector<uint8_t> packed(start + static_cast<size_t>(shape.rows * bytes), 0x5A);
        pack({sizeof(PackArgs), codes.data() + start, shape.rows, shape.cols, stride, bits,
              packed.data() + start, bytes});
        const DeviceArray<uint8_t> d_codes(codes), d_packed(packed.size());
        std::vector<uint8_t> back(codes.size(), 0xEE), unpacked = back;
        const DeviceArray<uint8_t> d_back(back);
        pack({sizeof(PackArgs), d_codes.data() + start, shape.rows, shape.cols, stride, bits,
              d_packed.data() + start, bytes, kDevice});
        expect_same(d_packed.read(), packed);
        unpack({sizeof(UnpackArgs), packed.data() + start, shape.rows, bytes, bits, unpacked.data() + start,
                shape.cols, stride});
        unpack({sizeof(UnpackArgs), d_packed.data() + start, shape.rows, bytes, bits, d_back.data() + start,
                shape.cols, stride, kDevice});
        expect_same(d_back.read(), unpacked);
      }
}

TEST_F(OnDevice, PackingNamesTheFirstCodeThatDoesNotFit) {
  for (const int64_t cols : {300, 768}) {  // the second by whole blocks
    std::vector<uint8_t> codes(static_cast<size_t>(2 * cols), 3);
    for (const int64_t at : {cols + 1, 2 * cols - 9}) codes.at(static_cast<size_t>(at)) = 9;
    const DeviceArray<uint8_t> d_codes(codes), d_packed(static_cast<size_t>(2 * row_bytes(cols, 3)));
    const auto call = [&] {
      pack(
          {sizeof(PackArgs), d_codes.data(), 2, cols, cols, 3, d_packed.data(), row_bytes(cols, 3), kDevice});
    };
    EXPECT_THROW(call(), InvalidArgument);
    try {
      call();
    } catch (const InvalidArgument& e) {
      EXPECT_STREQ(e.what(), "[pack] codes must fit into bits: got code=9, row=1, col=1, bits=3");
    }
  }
}

TEST_F(OnDevice, Topk) {
  for (DType dtype : cases::kDTypes)
    for (const char* kind : {"normal", "ties", "zero", "tails"}) {
      if (dtype != QTR_F32 && std::string(kind) != "ties") continue;
      const cases::Sample a = cases::sample(kind, 3, 4097, dtype),
                          b = cases::sample(kind, 9, 2000, dtype, 7, 1);
      const Input d_a(a), d_b(b);
      const Matrix host[] = {a.view(), b.view()}, device[] = {d_a.m, d_b.m};
      const int64_t total = a.rows * a.cols + b.rows * b.cols;
      for (auto key : {QTR_KEY_ABS, QTR_KEY_VALUE})
        for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{150}, total / 3, total}) {
          if (key == QTR_KEY_VALUE && (k == 0 || k == total)) continue;
          SCOPED_TRACE(std::string(kind) + " k " + std::to_string(k));
          std::vector<int64_t> indices(static_cast<size_t>(k)), counts(2), d_counts(2);
          std::vector<uint8_t> values(static_cast<size_t>(k) * (dtype == QTR_F32 ? 4 : 2));
          const DeviceArray<int64_t> d_indices(indices.size());
          const DeviceArray<uint8_t> d_values(values.size());
          topk({sizeof(TopkArgs), host, 2, k, key, 0, indices.data(), values.data(), counts.data()});
          topk({sizeof(TopkArgs), device, 2, k, key, 0, d_indices.data(), d_values.data(), d_counts.data(),
                kDevice});
          if (k > 0) {
            expect_same(d_indices.read(), indices);
            expect_same(d_values.read(), values);
          }
          EXPECT_EQ(d_counts, counts);
        }
      for (int64_t k : {int64_t{1}, int64_t{37}, int64_t{2000}}) {
        std::vector<int64_t> indices(static_cast<size_t>(b.rows * k));
        std::vector<uint8_t> values(indices.size() * (dtype == QTR_F32 ? 4 : 2));
        const DeviceArray<int64_t> d_indices(indices.size());
        const DeviceArray<uint8_t> d_values(values.size());
        topk({sizeof(TopkArgs), host + 1, 1, k, QTR_KEY_ABS, 1, indices.data(), values.data(), nullptr});
        topk({sizeof(TopkArgs), device + 1, 1, k, QTR_KEY_ABS, 1, d_indices.data(), d_values.data(), nullptr,
              kDevice});
        expect_same(d_indices.read(), indices);
        expect_same(d_values.read(), values);
      }
    }
}

// Where few elements are taken, a sample gives the key from which on they are gathered. Here it has the
// largest ones, as many as it looks for, and so has too few candidates; and in the second matrix, it has none
// of the large ones.
TEST_F(OnDevice, TopkWhereASampleMisleads) {
  for (DType dtype : {QTR_F32, QTR_BF16})
    for (const bool has_largest : {true, false}) {
      cases::Sample s = cases::sample("normal", 1, 40960, dtype);
      for (size_t i = has_largest ? 0 : 128; i < 256; ++i) {
        if (has_largest && i == 128) break;
        s.values[i] *= 1024;
        if (dtype == QTR_BF16) s.bits[i] = bf16_from_f32(s.values[i]);
      }
      const Input x(s);
      const Matrix host = s.view();
      for (int64_t k : {5, 200, 2560}) {
        SCOPED_TRACE("k " + std::to_string(k));
        std::vector<int64_t> indices(static_cast<size_t>(k));
        std::vector<uint8_t> values(indices.size() * (dtype == QTR_F32 ? 4 : 2));
        const DeviceArray<int64_t> d_indices(indices.size());
        const DeviceArray<uint8_t> d_values(values.size());
        topk({sizeof(TopkArgs), &host, 1, k, QTR_KEY_ABS, 0, indices.data(), values.data(), nullptr});
        topk({sizeof(TopkArgs), &x.m, 1, k, QTR_KEY_ABS, 0, d_indices.data(), d_values.data(), nullptr,
              kDevice});
        expect_same(d_indices.read(), indices);
        expect_same(d_values.read(), values);
      }
    }
}

TEST_F(OnDevice, TopkRefusesNan) {
  cases::Sample s = cases::sample("normal", 4, 500, QTR_F32);
  s.values[3 * 500 + 17] = std::nanf("");
  const Input x(s);
  const DeviceArray<int64_t> indices(20);
  const DeviceArray<float> values(20);
  for (int per_row : {0, 1}) {
    try {
      topk({sizeof(TopkArgs), &x.m, 1, 5, QTR_KEY_ABS, per_row, indices.data(), values.data(), nullptr,
            kDevice});
      ADD_FAILURE() << "a NaN was taken";
    } catch (const InvalidArgument& e) {
      EXPECT_STREQ(e.what(), "[topk] x must have no NaN: got row=3, column=17");
    }
  }
}

// A matrix apart from its outliers, on either side.
struct Split {
  std::vector<uint8_t> remainder, values;
  std::vector<uint16_t> columns;
  std::vector<int32_t> offsets;
};

TEST_F(OnDevice, Outliers) {
  for (const Shape& shape : kShapes)
    for (DType dtype : cases::kDTypes) {
      const cases::Sample s = cases::sample("ties", shape.rows, shape.cols, dtype, shape.padding);
      const Input x(s);
      const int64_t cells = shape.rows * shape.cols;
      std::vector<int64_t> given;
      for (int64_t i = 0; i < cells; i += 5) given.push_back(i);
      const DeviceArray<int64_t> d_given(given);
      const size_t size = dtype == QTR_F32 ? 4 : 2;
      struct Way {
        int64_t count;
        bool per_row, chosen;
      };
      for (const Way& way : {Way{cells / 7, false, false}, Way{shape.cols / 3, true, false},
                             Way{0, false, false}, Way{static_cast<int64_t>(given.size()), false, true}}) {
        const size_t nnz = static_cast<size_t>(way.per_row ? way.count * shape.rows : way.count);
        Split h{Input::bytes_of(s), std::vector<uint8_t>(nnz * size), std::vector<uint16_t>(nnz),
                std::vector<int32_t>(static_cast<size_t>(shape.rows + 1))};
        const DeviceArray<uint8_t> remainder(h.remainder), values(h.values);
        const DeviceArray<uint16_t> columns(nnz);
        const DeviceArray<int32_t> offsets(h.offsets.size());
        const auto out = [&](void* data) { return MutableMatrix{data, s.rows, s.cols, s.stride, dtype}; };
        extract_outliers({sizeof(OutliersArgs), s.view(), way.count, way.per_row,
                          way.chosen ? given.data() : nullptr, out(h.remainder.data()), h.values.data(),
                          h.columns.data(), h.offsets.data()});
        extract_outliers({sizeof(OutliersArgs), x.m, way.count, way.per_row,
                          way.chosen ? d_given.data() : nullptr, out(remainder.data()), values.data(),
                          columns.data(), offsets.data(), kDevice});
        expect_same(remainder.read(), h.remainder);
        expect_same(offsets.read(), h.offsets);
        if (nnz > 0) {
          expect_same(values.read(), h.values);
          expect_same(columns.read(), h.columns);
        }
      }
    }
}

TEST_F(OnDevice, OutliersRefuseIndices) {
  const cases::Sample s = cases::sample("normal", 2, 10, QTR_F32);
  const Input x(s);
  const DeviceArray<float> remainder(20), values(3);
  const DeviceArray<uint16_t> columns(3);
  const DeviceArray<int32_t> offsets(3);
  for (const std::vector<int64_t>& bad : {std::vector<int64_t>{1, 1, 2}, {0, 5, 20}, {-1, 3, 4}, {4, 3, 5}}) {
    const DeviceArray<int64_t> indices(bad);
    EXPECT_THROW(extract_outliers({sizeof(OutliersArgs), x.m, 3, 0, indices.data(),
                                   MutableMatrix{remainder.data(), 2, 10, 10, QTR_F32}, values.data(),
                                   columns.data(), offsets.data(), kDevice}),
                 InvalidArgument);
  }
}

// A sample on a grid, on either side.
struct Grid {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
};

QuantizeArgs grid_args(const Matrix& w, int bits, int64_t group, int axis, bool sym, qtr_grid_solver solver,
                       bool round_zero) {
  QuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = w;
  args.bits = bits;
  args.group_size = group;
  args.axis = axis;
  args.sym = sym;
  args.solver = solver;
  args.round_zero = round_zero;
  args.groups = group_count(w.rows, w.cols, group, axis);
  const int64_t rows = axis == 1 ? w.rows : group == -1 ? w.rows : group;
  args.codes_size = rows * row_bytes(w.rows * w.cols / rows, bits);
  return args;
}

Grid on_host(QuantizeArgs args) {
  Grid g{std::vector<uint8_t>(static_cast<size_t>(args.codes_size)),
         std::vector<float>(static_cast<size_t>(args.groups)),
         std::vector<float>(static_cast<size_t>(args.sym ? 0 : args.groups))};
  args.codes = g.codes.data();
  args.scale = g.scale.data();
  args.zero = args.sym ? nullptr : g.zero.data();
  quantize(args);
  return g;
}

void expect_grid(QuantizeArgs args, const Matrix& on_device, const Grid& host) {
  const DeviceArray<uint8_t> codes(host.codes.size());
  const DeviceArray<float> scale(host.scale.size()), zero(host.scale.size());
  args.w = on_device;
  args.device = kDevice;
  args.codes = codes.data();
  args.scale = scale.data();
  args.zero = args.sym ? nullptr : zero.data();
  quantize(args);
  expect_same(codes.read(), host.codes);
  expect_same(scale.read(), host.scale);
  if (!args.sym) expect_same(zero.read(), host.zero);

  for (DType dtype : cases::kDTypes) {
    const size_t cells = static_cast<size_t>(args.w.rows * args.w.cols), size = dtype == QTR_F32 ? 4 : 2;
    std::vector<uint8_t> dense(cells * size);
    const DeviceArray<uint8_t> d_dense(dense.size());
    DequantizeArgs back{};
    back.struct_size = sizeof(back);
    back.codes_size = args.codes_size;
    back.bits = args.bits;
    back.group_size = args.group_size;
    back.axis = args.axis;
    const auto with = [&](const uint8_t* c, const float* s, const float* z, void* out, Device device) {
      back.codes = c;
      back.scale = {s, 1, args.groups, args.groups, QTR_F32};
      back.zero = {args.sym ? nullptr : z, 1, args.groups, args.groups, QTR_F32};
      back.out = {out, args.w.rows, args.w.cols, args.w.cols, dtype};
      back.device = device;
      dequantize(back);
    };
    with(host.codes.data(), host.scale.data(), host.zero.data(), dense.data(), Device{});
    with(codes.data(), scale.data(), zero.data(), d_dense.data(), kDevice);
    expect_same(d_dense.read(), dense);
  }
}

TEST_F(OnDevice, GridsByRows) {
  for (const Shape& shape : {Shape{3, 33, 0}, Shape{2, 256, 4}, Shape{2, 768, 0}, Shape{1, 2304, 0}})
    for (int bits : {1, 3, 4, 8})
      for (int64_t group : {int64_t{-1}, int64_t{32}, int64_t{48}, int64_t{256}}) {
        const char* kind = group == 32    ? "tails"
                           : group == 256 ? "outlier"
                           : bits == 8    ? "constant"
                                          : "normal";
        SCOPED_TRACE(std::string(kind) + " " + std::to_string(shape.cols) + " columns, bits " +
                     std::to_string(bits) + ", group " + std::to_string(group));
        const DType dtype = bits == 3 ? QTR_BF16 : bits == 1 ? QTR_F16 : QTR_F32;
        const cases::Sample s =
            cases::sample(dtype == QTR_F16 ? "normal" : kind, shape.rows, shape.cols, dtype, shape.padding);
        const Input x(s);
        for (const bool sym : {false, true}) {
          const QuantizeArgs args = grid_args(s.view(), bits, group, 1, sym, QTR_MINMAX, false);
          expect_grid(args, x.m, on_host(args));
        }
        if (shape.cols > 300 || bits == 8) continue;
        for (const qtr_grid_solver solver : {QTR_MSE, QTR_HQQ, QTR_HQQ_SCALE_FREE}) {
          QuantizeArgs args = grid_args(s.view(), bits, group, 1, false, solver, bits == 4);
          expect_grid(args, x.m, on_host(args));
          args.integer_zero = 1;
          args.scale_format = dtype == QTR_F32 ? QTR_SCALE_E8M0 : QTR_SCALE_BF16;
          expect_grid(args, x.m, on_host(args));
        }
      }
}

// Rows of whole blocks whose groups have a power of two numbers: fitted, encoded and packed at once.
TEST_F(OnDevice, GridsByBlocks) {
  const std::vector<std::string> kinds = {"normal", "tails", "zero",   "constant",
                                          "ties",   "tiny",  "offset", "outlier"};
  for (int64_t group : {16, 32, 64, 128, 256, 512})
    for (DType dtype : cases::kDTypes)
      for (int bits = 1; bits <= 8; ++bits) {
        // Half of a warp's numbers are left at the end of a row; rows that begin at 16 bytes, and others.
        const int64_t cols = group == 512 ? 1536 : 768, padding = bits % 3 == 0 ? 2 : bits % 3 == 1 ? 0 : 8;
        std::string kind = kinds[static_cast<size_t>(bits - 1 + group / 16) % kinds.size()];
        if (dtype == QTR_F16 && kind == "tails") kind = "normal";
        SCOPED_TRACE(kind + ", bits " + std::to_string(bits) + ", group " + std::to_string(group));
        const cases::Sample s = cases::sample(kind, 3, cols, dtype, padding);
        const Input x(s);
        const QuantizeArgs args =
            grid_args(s.view(), bits, group, 1, bits % 2 == 0, QTR_MINMAX, group == 64 && bits % 2 == 1);
        expect_grid(args, x.m, on_host(args));
        if (group > 64 || bits % 2 == 0) continue;
        const QuantizeArgs shrunk = grid_args(s.view(), bits, group, 1, false, QTR_MSE, false);
        expect_grid(shrunk, x.m, on_host(shrunk));
      }
}

// The squares of such errors are infinite: no shrunk range is better than the whole one.
TEST_F(OnDevice, GridsOfHugeNumbers) {
  const cases::Sample s = cases::sample("huge", 2, 256, QTR_F32);
  const Input x(s);
  for (int64_t group : {32, 50}) {
    const QuantizeArgs args = grid_args(s.view(), 2, group, 1, false, QTR_MSE, false);
    expect_grid(args, x.m, on_host(args));
  }
}

// The best range is far from the whole one, or no other is worth a look.
TEST_F(OnDevice, GridsOfLeastSquaredError) {
  for (const char* kind : {"normal", "tails", "outlier"})
    for (int bits : {1, 2, 3, 6})
      for (int64_t group : {1, 16, 33, 64}) {
        SCOPED_TRACE(std::string(kind) + ", bits " + std::to_string(bits) + ", group " +
                     std::to_string(group));
        const cases::Sample s = cases::sample(kind, 3, 256, QTR_F32, 0, static_cast<unsigned>(bits));
        const Input x(s);
        for (const bool sym : {false, true}) {
          const QuantizeArgs args = grid_args(s.view(), bits, group, 1, sym, QTR_MSE, false);
          expect_grid(args, x.m, on_host(args));
        }
      }
}

TEST_F(OnDevice, GridsByColumns) {
  const cases::Sample s = cases::sample("tails", 24, 96, QTR_F32);
  const Input x(s);
  for (int bits : {2, 3, 8})
    for (int64_t group : {int64_t{-1}, int64_t{8}, int64_t{9}, int64_t{36}})  // with 9, 256 columns
      for (const qtr_grid_solver solver : {QTR_MINMAX, QTR_MSE, QTR_HQQ}) {
        const QuantizeArgs args = grid_args(s.view(), bits, group, 0, false, solver, false);
        expect_grid(args, x.m, on_host(args));
      }
}

// Every width of codes, with groups that are read at once and others that are not, rows that come in fours
// and others, and memory that is aligned and not.
TEST_F(OnDevice, Dequantize) {
  std::mt19937 generator(9);
  struct Form {
    int64_t rows, cols, group;
    int axis;
    int64_t padding, start;
  };
  for (const Form& form : {Form{5, 256, 64, 1, 0, 0},
                           {8, 512, -1, 1, 8, 0},
                           {3, 768, 12, 1, 0, 0},
                           {2, 512, 24, 1, 16, 1},
                           {4, 512, 5, 1, 0, 0},
                           {3, 300, 64, 1, 2, 0},
                           {24, 256, 8, 0, 0, 0},
                           {6, 128, 3, 0, 0, 0},
                           {5, 512, -1, 0, 0, 0},
                           {24, 256, 8, 0, 0, 1}})
    for (int bits = 1; bits <= 8; ++bits)
      for (DType dtype : cases::kDTypes)
        for (const bool sym : {false, true}) {
          SCOPED_TRACE(std::to_string(form.rows) + "x" + std::to_string(form.cols) + ", group " +
                       std::to_string(form.group) + ", axis " + std::to_string(form.axis) + ", bits " +
                       std::to_string(bits));
          const int64_t groups = group_count(form.rows, form.cols, form.group, form.axis);
          const int64_t view_rows = form.axis == 1 ? form.rows : form.group == -1 ? form.rows : form.group;
          const int64_t view_cols = form.rows * form.cols / view_rows;
          std::vector<uint8_t> codes(static_cast<size_t>(view_rows * row_bytes(view_cols, bits)));
          for (uint8_t& byte : codes) byte = static_cast<uint8_t>(generator());
          // Of a 16-bit dtype some results are infinite, some subnormal.
          const DType of_lines = sym ? QTR_F16 : QTR_F32;
          cases::Sample scale = cases::sample("tails", 1, groups, QTR_F32);
          const cases::Sample zero = cases::sample("normal", 1, groups, of_lines, 0, 1);
          const cases::Sample steps =
              of_lines == QTR_F32 ? scale : cases::sample("normal", 1, groups, QTR_F16, 0, 2);
          const Input d_scale(steps), d_zero(zero);
          const DeviceArray<uint8_t> d_codes(codes);
          const int64_t stride = form.cols + form.padding;
          const size_t size = dtype == QTR_F32 ? 4 : 2;
          std::vector<uint8_t> dense((static_cast<size_t>(form.rows * stride + form.start)) * size, 0x77);
          const DeviceArray<uint8_t> d_dense(dense);
          DequantizeArgs args{};
          args.struct_size = sizeof(args);
          args.codes_size = static_cast<int64_t>(codes.size());
          args.bits = bits;
          args.group_size = form.group;
          args.axis = form.axis;
          const auto with = [&](const uint8_t* c, const Matrix& s, const Matrix& z, uint8_t* out,
                                Device device) {
            args.codes = c;
            args.scale = s;
            args.zero = sym ? Matrix{nullptr, 1, groups, groups, of_lines} : z;
            args.out = {out + static_cast<size_t>(form.start) * size, form.rows, form.cols, stride, dtype};
            args.device = device;
            dequantize(args);
          };
          with(codes.data(), steps.view(), zero.view(), dense.data(), Device{});
          with(d_codes.data(), d_scale.m, d_zero.m, d_dense.data(), kDevice);
          expect_same(d_dense.read(), dense);
        }
}

TEST_F(OnDevice, GridsWithWeightsLeftOut) {
  const cases::Sample s = cases::sample("outlier", 5, 300, QTR_F32, 4);
  const Input x(s);
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> columns;
  for (int row = 0; row < 5; ++row) {
    for (int col = row; col < 300; col += 11) columns.push_back(col);
    offsets.push_back(static_cast<int64_t>(columns.size()));
  }
  const DeviceArray<int64_t> d_offsets(offsets);
  const DeviceArray<int32_t> d_columns(columns);
  for (const qtr_grid_solver solver : {QTR_MINMAX, QTR_MSE, QTR_HQQ}) {
    QuantizeArgs args = grid_args(s.view(), 3, 64, 1, false, solver, false);
    args.exclude_row_offsets = offsets.data();
    args.exclude_columns = columns.data();
    const Grid host = on_host(args);
    args.exclude_row_offsets = d_offsets.data();
    args.exclude_columns = d_columns.data();
    expect_grid(args, x.m, host);
  }
}

TEST_F(OnDevice, CodesOnGivenGrids) {
  const cases::Sample s = cases::sample("tails", 6, 96, QTR_F32);
  const Input x(s);
  for (const bool sym : {false, true})
    for (int axis : {0, 1}) {
      QuantizeArgs args = grid_args(s.view(), 3, 32, axis, sym, QTR_MSE, false);
      Grid host = on_host(args);
      for (float& step : host.scale) step *= 0.75f;
      args.solver = QTR_GIVEN;
      args.codes = host.codes.data();
      args.scale = host.scale.data();
      args.zero = sym ? nullptr : host.zero.data();
      quantize(args);
      const DeviceArray<uint8_t> codes(host.codes.size());
      const DeviceArray<float> scale(host.scale), zero(host.zero);
      args.w = x.m;
      args.device = kDevice;
      args.codes = codes.data();
      args.scale = scale.data();
      args.zero = sym ? nullptr : zero.data();
      quantize(args);
      expect_same(codes.read(), host.codes);
      expect_same(scale.read(), host.scale);
    }
}

TEST_F(OnDevice, GridsRefuseWhatIsNotFinite) {
  for (const auto& [group, value, shown] :
       {std::tuple{64, INFINITY, "inf"}, {64, -INFINITY, "-inf"}, {64, NAN, "nan"}, {50, INFINITY, "inf"}}) {
    cases::Sample s = cases::sample("normal", 4, 256, QTR_F32);
    s.values[2 * 256 + 70] = value;
    const Input x(s);
    const DeviceArray<uint8_t> codes(static_cast<size_t>(4 * row_bytes(256, 4)));
    QuantizeArgs args = grid_args(x.m, 4, group, 1, false, QTR_MINMAX, false);
    const DeviceArray<float> scale(static_cast<size_t>(args.groups)), zero(static_cast<size_t>(args.groups));
    args.codes = codes.data();
    args.scale = scale.data();
    args.zero = zero.data();
    args.device = kDevice;
    try {
      quantize(args);
      ADD_FAILURE() << "infinity was taken";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.what(), std::string("[quantize] w must be finite: got value=") + shown + ", row=2, col=70");
    }
  }
}

TEST_F(OnDevice, GridsRefuseRangesThatAreNotFinite) {
  for (int64_t group : {64, 50}) {
    cases::Sample s = cases::sample("normal", 4, 256, QTR_F32);
    s.values[2 * 256 + 3] = 3e38f;
    s.values[2 * 256 + 4] = -3e38f;
    const Input x(s);
    const DeviceArray<uint8_t> codes(static_cast<size_t>(4 * row_bytes(256, 4)));
    QuantizeArgs args = grid_args(x.m, 4, group, 1, false, QTR_MINMAX, false);
    const DeviceArray<float> scale(static_cast<size_t>(args.groups)), zero(static_cast<size_t>(args.groups));
    args.codes = codes.data();
    args.scale = scale.data();
    args.zero = zero.data();
    args.device = kDevice;
    try {
      quantize(args);
      ADD_FAILURE() << "an infinite range was taken";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.what(), "[quantize] the range of a group must be finite in float32: got group=" +
                              std::to_string(group == 64 ? 8 : 12));
    }
  }
}

TEST_F(OnDevice, Matvec) {
  for (const Shape& shape :
       {Shape{5, 33, 0}, Shape{19, 256, 0}, Shape{6, 896, 0}, Shape{3, 1500, 0}, Shape{3, 2304, 0}})
    for (int bits = 1; bits <= 8; ++bits)
      for (int64_t group : {int64_t{-1}, int64_t{32}, int64_t{48}, int64_t{64}}) {
        const bool common = bits == 2 || bits == 3 || bits == 4 || bits == 8;
        if (!common && (group < 32 || group == 48 || shape.cols < 2304)) continue;
        SCOPED_TRACE(std::to_string(shape.cols) + " columns, bits " + std::to_string(bits) + ", group " +
                     std::to_string(group));
        const cases::Sample w = cases::sample("outlier", shape.rows, shape.cols, QTR_F32);
        QuantizeArgs args = grid_args(w.view(), bits, group, 1, false, QTR_MINMAX, false);
        const Grid g = on_host(args);
        std::vector<uint16_t> columns;
        std::vector<float> values;
        std::vector<int32_t> offsets{0};
        for (int64_t row = 0; row < shape.rows; ++row) {
          for (int64_t col = row; col < shape.cols; col += 9) {
            columns.push_back(static_cast<uint16_t>(col));
            values.push_back(w.at(row, col));
          }
          offsets.push_back(static_cast<int32_t>(columns.size()));
        }
        const int64_t nnz = static_cast<int64_t>(values.size()), per_row = args.groups / shape.rows;
        const DeviceArray<uint8_t> codes(g.codes);
        const DeviceArray<float> scale(g.scale), zero(g.zero), d_values(values), d_residual(values.size());
        const DeviceArray<uint16_t> d_columns(columns);
        const DeviceArray<int32_t> d_offsets(offsets);
        const auto grid = [&](const uint8_t* c, const float* s, const float* z) {
          return GridMatrix{c,
                            args.codes_size,
                            shape.rows,
                            shape.cols,
                            bits,
                            group,
                            {s, shape.rows, per_row, per_row, QTR_F32},
                            {z, shape.rows, per_row, per_row, QTR_F32}};
        };
        const auto csr = [&](const float* v, const uint16_t* c, const int32_t* o) {
          return Csr{v, c, o, shape.rows, shape.cols, nnz, QTR_F32};
        };
        std::vector<float> residual(values.size());
        const GridMatrix host_grid = grid(g.codes.data(), g.scale.data(), g.zero.data());
        const GridMatrix device_grid = grid(codes.data(), scale.data(), zero.data());
        residuals({sizeof(ResidualsArgs), host_grid, csr(values.data(), columns.data(), offsets.data()),
                   residual.data()});
        residuals({sizeof(ResidualsArgs), device_grid,
                   csr(d_values.data(), d_columns.data(), d_offsets.data()), d_residual.data(), kDevice});
        expect_same(d_residual.read(), residual);

        for (DType dtype : cases::kDTypes)
          for (int64_t vectors : {1, 2, 3, 7, 20}) {
            if ((dtype == QTR_F32) != (vectors == 2) && group != 64) continue;
            const cases::Sample x = cases::sample("normal", vectors, shape.cols, dtype, 3);
            const Input d_x(x);
            std::vector<float> y(static_cast<size_t>(vectors * shape.rows));
            const DeviceArray<float> d_y(y.size());
            matvec({sizeof(MatvecArgs), host_grid, csr(residual.data(), columns.data(), offsets.data()),
                    x.view(), MutableMatrix{y.data(), vectors, shape.rows, shape.rows, QTR_F32}});
            matvec({sizeof(MatvecArgs), device_grid,
                    csr(d_residual.data(), d_columns.data(), d_offsets.data()), d_x.m,
                    MutableMatrix{d_y.data(), vectors, shape.rows, shape.rows, QTR_F32},
                    QTR_ACTIVATIONS_FLOAT32, kDevice});
            const std::vector<float> got = d_y.read();
            for (int64_t v = 0; v < vectors; ++v)
              for (int64_t row = 0; row < shape.rows; ++row) {
                double size = 0;
                for (int64_t col = 0; col < shape.cols; ++col) {
                  const int64_t of = group == -1 ? shape.cols : group;
                  const size_t at = static_cast<size_t>(row * per_row + col / of);
                  size += ((1 << bits) + std::abs(g.zero[at])) * std::abs(g.scale[at] * x.at(v, col));
                }
                for (int32_t i = offsets[static_cast<size_t>(row)]; i < offsets[static_cast<size_t>(row + 1)];
                     ++i)
                  size +=
                      std::abs(residual[static_cast<size_t>(i)] * x.at(v, columns[static_cast<size_t>(i)]));
                const double bound = 2 * std::ldexp(static_cast<double>(shape.cols) / 8 + 32, -23) * size;
                EXPECT_NEAR(got[static_cast<size_t>(v * shape.rows + row)],
                            y[static_cast<size_t>(v * shape.rows + row)], bound);
              }
          }
      }
}

TEST_F(OnDevice, ResidualsRefuseUnsoundOutliers) {
  const cases::Sample w = cases::sample("normal", 3, 64, QTR_F32);
  const QuantizeArgs args = grid_args(w.view(), 4, 64, 1, false, QTR_MINMAX, false);
  const Grid g = on_host(args);
  const DeviceArray<uint8_t> codes(g.codes);
  const DeviceArray<float> scale(g.scale), zero(g.zero), values(4), out(4);
  const GridMatrix grid{codes.data(),
                        args.codes_size,
                        3,
                        64,
                        4,
                        64,
                        {scale.data(), 3, 1, 1, QTR_F32},
                        {zero.data(), 3, 1, 1, QTR_F32}};
  const auto refused = [&](const std::vector<int32_t>& o, const std::vector<uint16_t>& c) {
    const DeviceArray<int32_t> offsets(o);
    const DeviceArray<uint16_t> columns(c);
    EXPECT_THROW(residuals({sizeof(ResidualsArgs), grid,
                            Csr{values.data(), columns.data(), offsets.data(), 3, 64, 4, QTR_F32}, out.data(),
                            kDevice}),
                 InvalidArgument);
  };
  refused({0, 2, 1, 4}, {1, 2, 3, 4});
  refused({0, 2, 3, 3}, {1, 2, 3, 4});
  refused({1, 2, 3, 4}, {1, 2, 3, 4});
  refused({0, 2, 3, 4}, {2, 2, 3, 4});
  refused({0, 2, 3, 4}, {1, 64, 3, 4});
}

TEST_F(OnDevice, DevicesThatThereAreNot) {
  const cases::Sample s = cases::sample("normal", 2, 8, QTR_F32);
  const Input x(s);
  Moments out{};
  MomentsArgs args{sizeof(MomentsArgs), x.m, QTR_OVER_TENSOR, -1, &out, 1, {QTR_CUDA, 999, nullptr}};
  EXPECT_THROW(compute_moments(args), InvalidArgument);
  args.device.kind = static_cast<qtr_device_kind>(7);
  EXPECT_THROW(compute_moments(args), InvalidArgument);
}

}  // namespace
}  // namespace quantrature
