#include "quantrature/integral.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kChunk = 2048;  // elements; four buffers of it fit a first-level cache, and pqi_sum's order
                                  // depends on it
constexpr int64_t kTask = 1 << 16;

Matrix readable(const MutableMatrix& m) {
  return Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype};
}

struct Named {
  const char* name;
  Matrix m;
};

void check_float32(const char* op, const Named& x) {
  check_for(op, x.m.dtype == QTR_F32, (std::string(x.name) + " must be float32").c_str(), "dtype",
            static_cast<int>(x.m.dtype));
}

// Throws unless all matrices are sound and have one shape; whether all have their rows one after the other.
bool check_alike(const char* op, std::initializer_list<Named> all) {
  const Matrix& first = all.begin()->m;
  bool joined = true;
  for (const Named& x : all) {
    check_matrix(x.m, op, x.name);
    check_for(op, x.m.rows == first.rows && x.m.cols == first.cols,
              (std::string(x.name) + " must have the shape of " + all.begin()->name).c_str(), "rows",
              x.m.rows, "cols", x.m.cols, "expected_rows", first.rows, "expected_cols", first.cols);
    joined = joined && (x.m.rows == 1 || x.m.row_stride == x.m.cols);
  }
  return joined;
}

template <class View>
View flat(View m) {
  return View{m.data, 1, m.rows * m.cols, m.rows * m.cols, m.dtype};
}

int64_t chunks_of(int64_t rows, int64_t cols) {
  return rows * ((cols + kChunk - 1) / kChunk);
}

// Calls body(chunk, row, begin, n) for every chunk of so many elements, on all threads.
template <class Body>
void over_chunks(int64_t rows, int64_t cols, int64_t chunk_size, Body&& body) {
  const int64_t per_row = (cols + chunk_size - 1) / chunk_size;
  const int64_t chunks_of_task = std::max<int64_t>(1, kTask / chunk_size);
  parallel_for_pieces(rows * per_row, chunks_of_task, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk % per_row * chunk_size;
      body(chunk, chunk / per_row, begin, std::min(chunk_size, cols - begin));
    }
  });
}

template <class Body>
void over_chunks(int64_t rows, int64_t cols, Body&& body) {
  over_chunks(rows, cols, kChunk, body);
}

// Of what is computed element by element: chunks are for the buffers that other dtypes than float32 are
// widened into.
int64_t chunk_size_of(std::initializer_list<Matrix> widened) {
  for (const Matrix& m : widened)
    if (m.dtype != QTR_F32) return kChunk;
  return kTask;
}

// A copy, rounded to another dtype where out has one.
void convert(const Matrix& in, const MutableMatrix& out) {
  over_chunks(in.rows, in.cols, [&](int64_t, int64_t row, int64_t begin, int64_t n) {
    if (in.dtype == out.dtype) {
      const int64_t size = element_size(in.dtype);
      std::memmove(static_cast<char*>(out.data) + (row * out.row_stride + begin) * size,
                   static_cast<const char*>(in.data) + (row * in.row_stride + begin) * size,
                   static_cast<size_t>(n * size));
      return;
    }
    float wide[kChunk];
    float* target = float_row_target(out, row, begin, wide);
    const float* source = float_row(in, row, begin, n, target);
    store_float_row(out, row, begin, n, source);
  });
}

}  // namespace

void pqi_accumulate(const PqiAccumulateArgs& a) {
  const char* op = "pqi_accumulate";
  const Named acc{"acc", readable(a.acc)};
  const bool joined = check_alike(op, {acc, {"grad", a.grad}});
  check_float32(op, acc);
  const float weight = static_cast<float>(a.weight);
  check(std::isfinite(weight), "[pqi_accumulate] weight must be finite in float32", "weight", a.weight);
  if (done_on_device(a, op, &qtr_backend::pqi_accumulate)) return;
  const MutableMatrix out = joined ? flat(a.acc) : a.acc;
  const Matrix grad = joined ? flat(a.grad) : a.grad;
  std::atomic<bool> finite{true};
  over_chunks(out.rows, out.cols, chunk_size_of({grad}), [&](int64_t, int64_t row, int64_t begin, int64_t n) {
    float wide[kChunk];
    const float* g = float_row(grad, row, begin, n, wide);
    if (a.not_finite != nullptr && !std::all_of(g, g + n, [](float x) { return std::isfinite(x); }))
      finite = false;
    kernels().pqi_accumulate(float_row_target(out, row, begin, nullptr), g, weight, n);
  });
  if (!finite) *a.not_finite = 1;
}

void pqi_finalize(const PqiFinalizeArgs& a) {
  const char* op = "pqi_finalize";
  const Named acc{"acc", a.acc}, target{"out", readable(a.out)};
  const bool joined = check_alike(op, {acc, {"w", a.w}, {"w_quantized", a.w_quantized}, target});
  check_float32(op, acc);
  check_float32(op, target);
  if (done_on_device(a, op, &qtr_backend::pqi_finalize)) return;
  const Matrix sums = joined ? flat(a.acc) : a.acc, w = joined ? flat(a.w) : a.w,
               image = joined ? flat(a.w_quantized) : a.w_quantized;
  const MutableMatrix out = joined ? flat(a.out) : a.out;
  const int64_t chunk_size = chunk_size_of({w, image});
  over_chunks(out.rows, out.cols, chunk_size, [&](int64_t, int64_t row, int64_t begin, int64_t n) {
    float wide_w[kChunk], wide_image[kChunk];
    kernels().pqi_finalize(float_row(sums, row, begin, n, nullptr), float_row(w, row, begin, n, wide_w),
                           float_row(image, row, begin, n, wide_image), a.keep_sign != 0,
                           float_row_target(out, row, begin, nullptr), n);
  });
}

void pqi_sum(const PqiSumArgs& a) {
  const char* op = "pqi_sum";
  const Named acc{"acc", a.acc};
  const bool joined = check_alike(op, {acc, {"w", a.w}, {"w_quantized", a.w_quantized}});
  check_float32(op, acc);
  check_given(a.out != nullptr, op, "out");
  if (done_on_device(a, op, &qtr_backend::pqi_sum)) return;
  const Matrix sums = joined ? flat(a.acc) : a.acc, w = joined ? flat(a.w) : a.w,
               image = joined ? flat(a.w_quantized) : a.w_quantized;
  std::vector<double> parts(static_cast<size_t>(chunks_of(sums.rows, sums.cols)));
  over_chunks(sums.rows, sums.cols, [&](int64_t chunk, int64_t row, int64_t begin, int64_t n) {
    float wide_w[kChunk], wide_image[kChunk];
    parts[static_cast<size_t>(chunk)] =
        kernels().pqi_sum(float_row(sums, row, begin, n, nullptr), float_row(w, row, begin, n, wide_w),
                          float_row(image, row, begin, n, wide_image), n);
  });
  *a.out = 0;
  for (double part : parts) *a.out += part;
}

void interpolate(const InterpolateArgs& a) {
  const bool joined =
      check_alike("interpolate", {{"w", a.w}, {"w_quantized", a.w_quantized}, {"out", readable(a.out)}});
  const float t = static_cast<float>(a.t);
  check(std::isfinite(t), "[interpolate] t must be finite in float32", "t", a.t);
  if (done_on_device(a, "interpolate", &qtr_backend::interpolate)) return;
  const Matrix w = joined ? flat(a.w) : a.w, image = joined ? flat(a.w_quantized) : a.w_quantized;
  const MutableMatrix out = joined ? flat(a.out) : a.out;
  if (t == 0 || t == 1) return convert(t == 0 ? w : image, out);
  over_chunks(out.rows, out.cols, [&](int64_t, int64_t row, int64_t begin, int64_t n) {
    float wide_w[kChunk], wide_image[kChunk], wide_out[kChunk];
    float* target = float_row_target(out, row, begin, wide_out);
    kernels().interpolate(float_row(w, row, begin, n, wide_w), float_row(image, row, begin, n, wide_image), t,
                          target, n);
    store_float_row(out, row, begin, n, target);
  });
}

}  // namespace quantrature
