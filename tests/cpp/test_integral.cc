#include <cstring>
#include <functional>

#include "cases.hpp"

namespace quantrature {
namespace {

Matrix readable(const MutableMatrix& m) {
  return Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype};
}

// A buffer of one dtype to write to, with the row stride of a sample.
struct Target {
  std::vector<float> values;
  std::vector<uint16_t> bits;
  MutableMatrix view;

  Target(const cases::Sample& like, DType dtype)
      : values(dtype == QTR_F32 ? like.values : std::vector<float>()),
        bits(dtype == QTR_F32 ? 0 : like.values.size()),
        view{dtype == QTR_F32 ? static_cast<void*>(values.data()) : bits.data(), like.rows, like.cols,
             like.stride, dtype} {}

  Target(const Target&) = delete;
  float at(int64_t row, int64_t col) const {
    const size_t i = static_cast<size_t>(row * view.row_stride + col);
    if (view.dtype == QTR_F32) return values[i];
    return view.dtype == QTR_F16 ? f32_from_f16(bits[i]) : f32_from_bf16(bits[i]);
  }
};

bool same_float(float a, float b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

// Runs body for samples of every kind, dtype and length, on every target.
void on_every_sample(const std::function<void(const cases::Sample& acc, const cases::Sample& w,
                                              const cases::Sample& image)>& body) {
  for (const std::string& kind : cases::kKinds) {
    for (DType dtype : cases::kDTypes) {
      std::vector<int64_t> lengths = cases::kLengths;
      if (kind == "normal") lengths.push_back(70001);  // more than a task takes
      for (int64_t cols : lengths) {
        SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype));
        const int64_t padding = cols % 3;
        const cases::Sample acc = cases::sample("normal", 3, cols, QTR_F32, padding, 1);
        const cases::Sample w = cases::sample(kind, 3, cols, dtype, padding, 2);
        const cases::Sample image = cases::sample(kind, 3, cols, dtype, padding, 3);
        cases::on_every_target([&] { body(acc, w, image); });
      }
    }
  }
}

template <class Expected>
void expect_elements(const Target& got, Expected&& expected) {
  for (int64_t row = 0; row < got.view.rows; ++row)
    for (int64_t col = 0; col < got.view.cols; ++col)
      ASSERT_TRUE(same_float(got.at(row, col), expected(row, col)))
          << "row " << row << ", col " << col << ": " << got.at(row, col) << " not " << expected(row, col);
}

TEST(PqiAccumulate, RoundsTheProductThenTheSum) {
  on_every_sample([](const cases::Sample& acc, const cases::Sample& grad, const cases::Sample&) {
    Target out(acc, QTR_F32);
    pqi_accumulate({sizeof(PqiAccumulateArgs), out.view, grad.view(), 0.3});
    expect_elements(out, [&](int64_t r, int64_t c) {
      const float product = 0.3f * grad.at(r, c);
      return acc.at(r, c) + product;
    });
    if (acc.stride > acc.cols) {
      EXPECT_EQ(out.values[static_cast<size_t>(acc.cols)], acc.values[static_cast<size_t>(acc.cols)]);
    }
  });
}

TEST(PqiAccumulate, StaysWithinTheDocumentedBound) {
  constexpr int64_t kCols = 500;
  constexpr int kCalls = 1000;
  std::vector<float> acc(kCols);
  std::vector<long double> exact(kCols), total(kCols);
  for (int call = 0; call < kCalls; ++call) {
    const cases::Sample grad = cases::sample("tails", 1, kCols, QTR_F32, 0, static_cast<unsigned>(call));
    const double weight = 1.0 / (3 + call);
    pqi_accumulate({sizeof(PqiAccumulateArgs), {acc.data(), 1, kCols, kCols, QTR_F32}, grad.view(), weight});
    for (size_t i = 0; i < acc.size(); ++i) {
      const long double term = static_cast<long double>(weight) * grad.values[i];
      exact[i] += term;
      total[i] += std::abs(term);
    }
  }
  const long double n = (kCalls + 1) * std::ldexp(1.0L, -24);
  for (size_t i = 0; i < acc.size(); ++i) EXPECT_LE(std::abs(acc[i] - exact[i]), n / (1 - n) * total[i]);
}

TEST(PqiFinalize, IsTheProductOrItsAbsoluteValue) {
  on_every_sample([](const cases::Sample& acc, const cases::Sample& w, const cases::Sample& image) {
    for (int keep_sign : {0, 1}) {
      Target out(acc, QTR_F32);
      const auto expected = [&](int64_t r, int64_t c) {
        const float moved = image.at(r, c) - w.at(r, c);
        const float share = moved * acc.at(r, c);
        return keep_sign ? share : std::abs(share);
      };
      pqi_finalize({sizeof(PqiFinalizeArgs), acc.view(), w.view(), image.view(), keep_sign, out.view});
      expect_elements(out, expected);
      Target in_place(acc, QTR_F32);
      pqi_finalize({sizeof(PqiFinalizeArgs), readable(in_place.view), w.view(), image.view(), keep_sign,
                    in_place.view});
      expect_elements(in_place, expected);
    }
  });
}

TEST(PqiSum, IsTheSameOnEveryTargetAndNearTheExactSum) {
  on_every_sample([](const cases::Sample& acc, const cases::Sample& w, const cases::Sample& image) {
    const auto sum = [&] {
      double out = 0;
      pqi_sum({sizeof(PqiSumArgs), acc.view(), w.view(), image.view(), &out});
      return out;
    };
    const double expected = cases::on_reference(sum);
    const double got = sum();
    EXPECT_EQ(std::memcmp(&got, &expected, sizeof(got)), 0) << got << " not " << expected;
    long double exact = 0, total = 0;
    for (int64_t r = 0; r < acc.rows; ++r) {
      for (int64_t c = 0; c < acc.cols; ++c) {
        const long double share =
            (static_cast<long double>(image.at(r, c)) - w.at(r, c)) * static_cast<long double>(acc.at(r, c));
        exact += share;
        total += std::abs(share);
      }
    }
    if (std::isfinite(total)) {
      EXPECT_LE(std::abs(got - exact), 1e-13L * total);
    }
  });
}

TEST(PqiSum, OfAnArrayDoesNotDependOnItsShape) {
  const cases::Sample acc = cases::sample("normal", 1, 6000, QTR_F32, 0, 1),
                      w = cases::sample("tails", 1, 6000, QTR_F32);
  double wide = 0, tall = 1;
  const auto shaped = [](const cases::Sample& s, int64_t rows) {
    return Matrix{s.values.data(), rows, 6000 / rows, 6000 / rows, QTR_F32};
  };
  pqi_sum({sizeof(PqiSumArgs), shaped(acc, 1), shaped(w, 1), shaped(acc, 1), &wide});
  pqi_sum({sizeof(PqiSumArgs), shaped(acc, 60), shaped(w, 60), shaped(acc, 60), &tall});
  EXPECT_EQ(wide, tall);
}

TEST(Interpolate, FormsThePointInFloat32AndRounds) {
  on_every_sample([](const cases::Sample&, const cases::Sample& w, const cases::Sample& image) {
    for (DType dtype : cases::kDTypes) {
      for (float t : {0.0f, 0.37f, 1.0f, -0.5f}) {
        Target out(w, dtype);
        interpolate({sizeof(InterpolateArgs), w.view(), image.view(), t, out.view});
        expect_elements(out, [&](int64_t r, int64_t c) {
          const float moved = t * (image.at(r, c) - w.at(r, c));
          const float point = t == 0 ? w.at(r, c) : t == 1 ? image.at(r, c) : w.at(r, c) + moved;
          return dtype == QTR_F32   ? point
                 : dtype == QTR_F16 ? f32_from_f16(f16_from_f32(point))
                                    : f32_from_bf16(bf16_from_f32(point));
        });
      }
    }
  });
}

TEST(Interpolate, OverTheWeightsThemselves) {
  const cases::Sample w = cases::sample("normal", 3, 5000, QTR_F32, 2),
                      image = cases::sample("ties", 3, 5000, QTR_F32, 2);
  Target apart(w, QTR_F32), over(w, QTR_F32);
  interpolate({sizeof(InterpolateArgs), w.view(), image.view(), 0.25, apart.view});
  interpolate({sizeof(InterpolateArgs), readable(over.view), image.view(), 0.25, over.view});
  EXPECT_EQ(apart.values, over.values);
}

template <class Args>
void refused(void (*op)(const Args&), const Args& args, const char* message) {
  try {
    op(args);
    ADD_FAILURE() << "accepted, expected: " << message;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
  }
}

TEST(Integral, RefusesWhatBreaksTheContract) {
  float x[6] = {};
  const Matrix m{x, 2, 2, 2, QTR_F32}, other{x, 2, 3, 3, QTR_F32}, half{x, 2, 2, 2, QTR_F16},
      none{x, 0, 2, 2, QTR_F32};
  const MutableMatrix out{x, 2, 2, 2, QTR_F32}, half_out{x, 2, 2, 2, QTR_F16};
  const double inf = std::numeric_limits<double>::infinity();
  double sum;
  constexpr size_t kA = sizeof(PqiAccumulateArgs), kF = sizeof(PqiFinalizeArgs), kS = sizeof(PqiSumArgs),
                   kI = sizeof(InterpolateArgs);
  refused(pqi_accumulate, {kA, out, other, 1},
          "[pqi_accumulate] grad must have the shape of acc: got rows=2, cols=3, expected_rows=2, "
          "expected_cols=2");
  refused(pqi_accumulate, {kA, out, none, 1}, "[pqi_accumulate] grad must not be empty");
  refused(pqi_accumulate, {kA, half_out, m, 1}, "[pqi_accumulate] acc must be float32: got dtype=1");
  refused(pqi_accumulate, {kA, out, m, inf},
          "[pqi_accumulate] weight must be finite in float32: got weight=inf");
  refused(pqi_accumulate, {kA, out, m, 1e39},
          "[pqi_accumulate] weight must be finite in float32: got weight=1e+39");
  refused(pqi_finalize, {kF, m, other, m, 0, out}, "[pqi_finalize] w must have the shape of acc");
  refused(pqi_finalize, {kF, m, m, other, 0, out}, "[pqi_finalize] w_quantized must have the shape of acc");
  refused(pqi_finalize, {kF, half, m, m, 0, out}, "[pqi_finalize] acc must be float32");
  refused(pqi_finalize, {kF, m, m, m, 0, half_out}, "[pqi_finalize] out must be float32");
  refused(pqi_sum, {kS, half, m, m, &sum}, "[pqi_sum] acc must be float32");
  refused(pqi_sum, {kS, m, m, other, &sum}, "[pqi_sum] w_quantized must have the shape of acc");
  refused(pqi_sum, {kS, m, m, m, nullptr}, "[pqi_sum] out must not be null");
  refused(interpolate, {kI, m, other, 0.5, out}, "[interpolate] w_quantized must have the shape of w");
  refused(interpolate, {kI, m, m, inf, out}, "[interpolate] t must be finite in float32: got t=inf");
}

}  // namespace
}  // namespace quantrature
