#include <algorithm>
#include <cstring>
#include <numeric>

#include "cases.hpp"

namespace quantrature {
namespace {

struct Selected {
  std::vector<int64_t> indices;
  std::vector<uint32_t> values;  // the bits of each, whatever the dtype
  std::vector<int64_t> counts;

  bool operator==(const Selected&) const = default;
};

Selected run(const std::vector<Matrix>& x, int64_t k, qtr_topk_key key, bool per_row = false) {
  const size_t n = static_cast<size_t>(per_row ? k * x[0].rows : k);
  Selected out{std::vector<int64_t>(n), std::vector<uint32_t>(n), std::vector<int64_t>(x.size())};
  std::vector<uint16_t> half(n);
  const bool wide = x[0].dtype == QTR_F32;
  topk({sizeof(TopkArgs), x.data(), static_cast<int64_t>(x.size()), k, key, per_row, out.indices.data(),
        wide ? static_cast<void*>(out.values.data()) : half.data(), out.counts.data()});
  if (!wide) std::copy(half.begin(), half.end(), out.values.begin());
  return out;
}

// The definition: a stable sort.
std::vector<int64_t> by_sorting(const std::vector<float>& x, int64_t k, qtr_topk_key key) {
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int64_t i) {
    const float value = x[static_cast<size_t>(i)];
    return key == QTR_KEY_ABS ? std::abs(value) : value;
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score(a) > score(b); });
  order.resize(static_cast<size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<float> without_padding(const cases::Sample& s) {
  std::vector<float> x;
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < s.cols; ++c) x.push_back(s.at(r, c));
  return x;
}

void expect_selection(const cases::Sample& s, int64_t k, qtr_topk_key key,
                      const std::vector<int64_t>& expected) {
  const Selected got = run({s.view()}, k, key);
  ASSERT_EQ(got.indices, expected);
  ASSERT_EQ(got.counts[0], k);
  for (size_t i = 0; i < got.indices.size(); ++i) {
    const size_t at = static_cast<size_t>(got.indices[i] / s.cols * s.stride + got.indices[i] % s.cols);
    uint32_t bits = s.dtype == QTR_F32 ? 0u : s.bits[at];
    if (s.dtype == QTR_F32) std::memcpy(&bits, &s.values[at], sizeof(bits));
    ASSERT_EQ(got.values[i], bits);
  }
}

// On every target, for both keys and each k.
void expect_selections(const cases::Sample& s, const std::vector<int64_t>& ks) {
  for (qtr_topk_key key : {QTR_KEY_ABS, QTR_KEY_VALUE}) {
    for (int64_t k : ks) {
      SCOPED_TRACE("k " + std::to_string(k) + ", key " + std::to_string(key));
      const std::vector<int64_t> expected = by_sorting(without_padding(s), k, key);
      cases::on_every_target([&] { expect_selection(s, k, key, expected); });
    }
  }
}

TEST(Topk, IsAStableSortOnEveryTarget) {
  for (const std::string& kind : cases::kKinds) {
    for (DType dtype : cases::kDTypes) {
      for (int64_t cols : {1, 2, 7, 8, 9, 31, 32, 33, 65, 129, 1000, 4097}) {
        SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype));
        const cases::Sample s = cases::sample(kind, 3, cols, dtype, cols % 3);
        expect_selections(s, {1, 3 * cols / 5, 3 * cols});
      }
    }
  }
}

// Long enough for the sampled bound; ties and a large k take the way by digits.
TEST(Topk, OfManyElements) {
  for (const std::string& kind : cases::kKinds) {
    for (DType dtype : {QTR_F32, QTR_BF16}) {
      SCOPED_TRACE(kind + ", dtype " + std::to_string(dtype));
      const cases::Sample s = cases::sample(kind, 41, 3000, dtype, 3);
      expect_selections(s, {1, 600, 100000});
    }
  }
}

TEST(Topk, OfSeveralMatricesIsThatOfAllTheirElements) {
  const std::vector<cases::Sample> parts = {cases::sample("ties", 5, 777, QTR_F16, 1),
                                            cases::sample("ties", 1, 1, QTR_F16),
                                            cases::sample("ties", 90, 999, QTR_F16)};
  std::vector<Matrix> views;
  std::vector<float> all;
  for (const cases::Sample& part : parts) {
    views.push_back(part.view());
    const std::vector<float> own = without_padding(part);
    all.insert(all.end(), own.begin(), own.end());
  }
  cases::on_every_target([&] {
    for (int64_t k : {1, 20, 4000, 93796}) {
      const Selected got = run(views, k, QTR_KEY_ABS);
      std::vector<int64_t> joined;
      int64_t first = 0, at = 0;
      for (size_t m = 0; m < views.size(); ++m) {
        for (int64_t i = 0; i < got.counts[m]; ++i)
          joined.push_back(first + got.indices[static_cast<size_t>(at++)]);
        first += views[m].rows * views[m].cols;
      }
      EXPECT_EQ(joined, by_sorting(all, k, QTR_KEY_ABS));
    }
  });
}

TEST(Topk, OfEachRowIsThatOfTheRowAlone) {
  for (const std::string& kind : cases::kKinds) {
    for (int64_t cols : {1, 33, 5000}) {
      SCOPED_TRACE(kind + ", cols " + std::to_string(cols));
      const cases::Sample s = cases::sample(kind, 17, cols, QTR_BF16, 1);
      cases::on_every_target([&] {
        for (qtr_topk_key key : {QTR_KEY_ABS, QTR_KEY_VALUE}) {
          for (int64_t k : {int64_t{1}, (cols + 9) / 10, cols}) {
            const Selected got = run({s.view()}, k, key, true);
            EXPECT_EQ(got.counts[0], 17 * k);
            for (int64_t row = 0; row < s.rows; ++row) {
              Matrix one = s.view();
              one.data = static_cast<const uint16_t*>(one.data) + row * s.stride;
              one.rows = 1;
              const Selected alone = run({one}, k, key);
              for (int64_t i = 0; i < k; ++i) {
                const size_t from = static_cast<size_t>(i), to = static_cast<size_t>(row * k + i);
                ASSERT_EQ(got.indices[to], alone.indices[from] + row * cols);
                ASSERT_EQ(got.values[to], alone.values[from]);
              }
            }
          }
        }
      });
    }
  }
}

void refused(const TopkArgs& args, const std::string& message) {
  try {
    topk(args);
    ADD_FAILURE() << "accepted, expected: " << message;
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(std::string(e.what()).rfind(message, 0), 0u) << e.what();
  }
}

TEST(Topk, RefusesTheFirstNotANumber) {
  cases::Sample s = cases::sample("normal", 30, 5000, QTR_F32);
  s.values[17 * 5000 + 4000] = s.values[20 * 5000] = -std::numeric_limits<float>::quiet_NaN();
  const Matrix x = s.view();
  std::vector<int64_t> indices(150000);
  std::vector<float> values(150000);
  cases::on_every_target([&] {
    for (qtr_topk_key key : {QTR_KEY_ABS, QTR_KEY_VALUE}) {
      for (int64_t k : {1, 700, 100000})
        refused({sizeof(TopkArgs), &x, 1, k, key, 0, indices.data(), values.data(), nullptr},
                "[topk] x must have no NaN: got row=17, column=4000");
      refused({sizeof(TopkArgs), &x, 1, 5, key, 1, indices.data(), values.data(), nullptr},
              "[topk] x must have no NaN: got row=17, column=4000");
    }
  });
  topk({sizeof(TopkArgs), &x, 1, 0, QTR_KEY_ABS, 0, nullptr, nullptr, nullptr});
}

TEST(Topk, RefusesWhatBreaksTheContract) {
  const float x[4] = {};
  float values[4];
  int64_t indices[4];
  const Matrix m{x, 2, 2, 2, QTR_F32};
  const Matrix mixed[2] = {m, Matrix{x, 2, 2, 2, QTR_F16}};
  const TopkArgs good{sizeof(TopkArgs), &m, 1, 1, QTR_KEY_ABS, 0, indices, values, nullptr};
  topk(good);
  TopkArgs bad = good;
  bad.x_count = 0;
  refused(bad, "[topk] x must hold at least one matrix: got x_count=0");
  bad = good, bad.x = mixed, bad.x_count = 2;
  refused(bad, "[topk] x must be of one dtype: got array=1, dtype=1, expected=0");
  bad.per_row = 1;
  refused(bad, "[topk] per_row takes one matrix: got x_count=2");
  bad = good, bad.k = 5;
  refused(bad, "[topk] k must not exceed the number of elements: got k=5, elements=4");
  bad = good, bad.k = 3, bad.per_row = 1;
  refused(bad, "[topk] k must not exceed the length of a row: got k=3, cols=2");
  bad = good, bad.k = -1;
  refused(bad, "[topk] k must be at least 0: got k=-1");
  bad = good, bad.key = static_cast<qtr_topk_key>(2);
  refused(bad, "[topk] key must be abs or value: got key=2");
  bad = good, bad.indices = nullptr;
  refused(bad, "[topk] indices must not be null: got indices=null");
}

}  // namespace
}  // namespace quantrature
