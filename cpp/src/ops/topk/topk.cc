#include "quantrature/topk.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "common/half.hpp"
#include "common/ordered_key.hpp"
#include "ops/topk/select.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kSpan = 4096;  // elements that a kernel sees at once
constexpr int64_t kTaskSpans = 16;
constexpr int64_t kSmall = 1 << 16;  // up to here all elements are candidates
constexpr int64_t kSampleLines = 1024;
constexpr int64_t kLine = 16;  // neighbours that a sample takes at one place: a cache line

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Up to kSpan elements that lie side by side; base is the flat index of the first in its matrix.
struct Span {
  const Matrix* m;
  int64_t matrix;
  int64_t row;
  int64_t begin;
  int64_t n;
  int64_t base;
};

const float* read(const Span& s, float* buffer) {
  return float_row(*s.m, s.row, s.begin, s.n, buffer);
}

// Rows without gaps between them are one row.
Matrix joined(const Matrix& m) {
  return m.row_stride == m.cols ? Matrix{m.data, 1, m.rows * m.cols, m.rows * m.cols, m.dtype} : m;
}

void append_spans(std::vector<Span>& spans, const Matrix& m, int64_t matrix) {
  for (int64_t row = 0; row < m.rows; ++row)
    for (int64_t begin = 0; begin < m.cols; begin += kSpan)
      spans.push_back({&m, matrix, row, begin, std::min(kSpan, m.cols - begin), row * m.cols + begin});
}

void put_value(void* values, DType dtype, int64_t at, float value) {
  if (dtype == QTR_F32)
    static_cast<float*>(values)[at] = value;
  else
    static_cast<uint16_t*>(values)[at] = dtype == QTR_F16 ? f16_from_f32(value) : bf16_from_f32(value);
}

[[noreturn]] void refuse_nan(const TopkArgs& a, const Asker& asker, int64_t matrix, int64_t index) {
  const std::string rule = std::string("[") + asker.op + "] " + asker.name + " must have no NaN";
  const int64_t row = index / a.x[matrix].cols, column = index % a.x[matrix].cols;
  throw InvalidArgument(a.x_count == 1
                            ? complaint(rule.c_str(), "row", row, "column", column)
                            : complaint(rule.c_str(), "array", matrix, "row", row, "column", column));
}

// What selects k of a set: all elements of a larger key than threshold, and the first `ties` of an equal one.
struct Cut {
  uint32_t threshold;
  int64_t ties;
  bool has_nan;
};

constexpr uint32_t kNanKey = 0xFFFFFFFFu;
constexpr uint32_t kBins = 4096;

struct Keys {
  const uint32_t* keys;
  uint32_t operator()(int64_t i) const { return keys[i]; }
};

struct KeysOfValues {
  const float* values;
  bool by_abs;
  uint32_t operator()(int64_t i) const { return ordered_key(score_of(values[i], by_abs)); }
};

// The k-th largest of n keys, 1 <= k <= n. counts holds kBins; kept is scratch, and may be the keys.
template <class KeyAt>
Cut cut_keys(const KeyAt& key_at, int64_t n, int64_t k, uint32_t* counts, std::vector<uint32_t>& kept) {
  uint32_t low = key_at(0), high = low;
  for (int64_t i = 1; i < n; ++i) {
    const uint32_t key = key_at(i);
    low = std::min(low, key);
    high = std::max(high, key);
  }
  if (high == kNanKey) return {0, 0, true};
  const uint32_t bins = static_cast<uint32_t>(std::clamp<int64_t>(n, 16, kBins));
  uint32_t shift = 0;
  while ((high - low) >> shift >= bins) ++shift;
  const uint32_t used = ((high - low) >> shift) + 1;
  std::fill_n(counts, used, 0u);
  for (int64_t i = 0; i < n; ++i) ++counts[(key_at(i) - low) >> shift];
  uint32_t bin = used - 1;
  while (counts[bin] < k) k -= counts[bin--];
  if (shift == 0) return {low + bin, k, false};
  const int64_t in_bin = counts[bin];
  if (kept.size() <= static_cast<size_t>(in_bin)) kept.resize(static_cast<size_t>(in_bin) + 1);
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_at(i);
    kept[static_cast<size_t>(at)] = key;
    at += (key - low) >> shift == bin;
  }
  return cut_keys(Keys{kept.data()}, in_bin, k, counts, kept);
}

// Candidates that a span contributed: [start, start + count) of the buffers.
struct Batch {
  int64_t start;
  int64_t count;
};

struct Candidates {
  int64_t capacity;
  std::unique_ptr<float[]> values;
  std::unique_ptr<uint16_t[]> offsets;
  std::vector<Batch> of_span;
  std::atomic<int64_t> used{0};

  Candidates(int64_t spans, int64_t room)
      : capacity(room),
        values(new float[static_cast<size_t>(room)]),
        offsets(new uint16_t[static_cast<size_t>(room)]),
        of_span(static_cast<size_t>(spans)) {}
};

struct Selection {
  const TopkArgs& args;
  const Asker& asker;
  std::vector<Span> spans;
  int64_t total;
  char* remainder;  // of select_and_empty, else null

  bool by_abs() const { return args.key == QTR_KEY_ABS; }
  int64_t span_count() const { return static_cast<int64_t>(spans.size()); }
  const Span& span(int64_t i) const { return spans[static_cast<size_t>(i)]; }

  uint32_t key_of(float x) const { return ordered_key(score_of(x, by_abs())); }
};

// A score which about k elements, and with great likelihood at least k, reach; and how many to expect.
struct Bound {
  float low;
  int64_t expected;
};

Bound sample_bound(const Selection& s, uint32_t* counts) {
  struct Place {
    const Span* span;
    int64_t begin;
  };
  std::vector<Place> places(kSampleLines);
  uint64_t state = 0x9E3779B97F4A7C15u;
  const auto draw = [&](int64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(below));
  };
  for (Place& place : places) {
    place.span = &s.span(draw(s.span_count()));
    place.begin = place.span->begin + draw(place.span->n - std::min(kLine, place.span->n) + 1);
    const Matrix& m = *place.span->m;
    __builtin_prefetch(static_cast<const char*>(m.data) +
                       (place.span->row * m.row_stride + place.begin) * element_size(m.dtype));
  }
  std::vector<uint32_t> keys;
  keys.reserve(kSampleLines * kLine);
  for (const Place& place : places) {
    const int64_t n = std::min(kLine, place.span->n);
    float buffer[kLine];
    const float* x = float_row(*place.span->m, place.span->row, place.begin, n, buffer);
    for (int64_t i = 0; i < n; ++i) keys.push_back(s.key_of(x[i]));
  }
  const double size = static_cast<double>(keys.size());
  const double likely = static_cast<double>(s.args.k) / static_cast<double>(s.total) * size;
  const int64_t rank = static_cast<int64_t>(likely + 4 * std::sqrt(likely) + 4);
  if (rank >= static_cast<int64_t>(keys.size())) return {kLowest, s.total};
  const Cut cut = cut_keys(Keys{keys.data()}, static_cast<int64_t>(keys.size()), rank, counts, keys);
  if (cut.has_nan) return {kLowest, 0};
  const double expected = static_cast<double>(rank) / size * static_cast<double>(s.total);
  return {score_of_key(cut.threshold), static_cast<int64_t>(expected)};
}

// What was gathered from one span, in order; and room for it.
struct Found {
  const float* values;
  const uint16_t* offsets;
  int64_t count;
};

struct Scratch {
  float wide[kSpan];
  float values[kSpan];
  uint16_t offsets[kSpan];
};

Found gather_span(const Selection& s, int64_t i, float low, Scratch& scratch) {
  const int64_t count = kernels().topk_gather(read(s.span(i), scratch.wide), s.span(i).n, s.by_abs(), low,
                                              scratch.values, scratch.offsets);
  return {scratch.values, scratch.offsets, count};
}

const char* bytes_of(const Span& s) {
  return static_cast<const char*>(s.m->data) + s.base * element_size(s.m->dtype);
}

// A copy of the span, with 0 at the candidates: all but a fifth of them will be selected.
void empty_span(const Selection& s, const Span& span, const Found& found) {
  const int64_t size = element_size(span.m->dtype);
  alignas(64) char piece[kSpan * sizeof(float)];
  std::memcpy(piece, bytes_of(span), static_cast<size_t>(span.n * size));
  for (int64_t c = 0; c < found.count; ++c)
    std::memset(piece + found.offsets[c] * size, 0, static_cast<size_t>(size));
  kernels().copy_past_cache(piece, s.remainder + span.base * size, span.n * size,
                            bytes_of(span) + span.n * size);
}

// What was a candidate and is not selected goes back.
void refill_span(const Selection& s, const Span& span, const Found& found, float reached, int64_t ties) {
  const size_t size = static_cast<size_t>(element_size(span.m->dtype));
  for (int64_t c = 0; c < found.count; ++c) {
    const float score = score_of(found.values[c], s.by_abs());
    if (score > reached || (score == reached && ties-- > 0)) continue;
    const size_t at = found.offsets[c] * size;
    std::memcpy(s.remainder + static_cast<size_t>(span.base) * size + at, bytes_of(span) + at, size);
  }
}

// Gathers everything from low up; false where that is more than there is room for.
bool gather(const Selection& s, float low, Candidates& candidates) {
  parallel_for_pieces(s.span_count(), kTaskSpans, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t i = first; i < last; ++i) {
      const Found found = gather_span(s, i, low, scratch);
      const int64_t start = candidates.used.fetch_add(found.count);
      candidates.of_span[static_cast<size_t>(i)] = {start, found.count};
      if (s.remainder != nullptr) empty_span(s, s.span(i), found);
      if (start + found.count > candidates.capacity) continue;
      std::copy_n(found.values, found.count, candidates.values.get() + start);
      std::copy_n(found.offsets, found.count, candidates.offsets.get() + start);
    }
  });
  return candidates.used <= candidates.capacity;
}

// Writes what the cut selects, in order. found_in(i, scratch) has at least that of span i.
template <class FoundIn>
void write_selected(const Selection& s, Cut cut, FoundIn&& found_in) {
  const float reached = score_of_key(cut.threshold);
  const bool by_abs = s.by_abs();
  struct Share {
    int64_t above, ties, start;
  };
  std::vector<Share> shares(s.spans.size());
  parallel_for_pieces(s.span_count(), kTaskSpans, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t i = first; i < last; ++i) {
      const Found found = found_in(i, scratch);
      Share& share = shares[static_cast<size_t>(i)];
      for (int64_t c = 0; c < found.count; ++c) {
        const float score = score_of(found.values[c], by_abs);
        share.above += score > reached;
        share.ties += score == reached;
      }
    }
  });
  int64_t at = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    shares[i].start = at;
    shares[i].ties = std::min(shares[i].ties, cut.ties);
    cut.ties -= shares[i].ties;
    const int64_t selected = shares[i].above + shares[i].ties;
    at += selected;
    if (s.args.counts != nullptr) s.args.counts[s.spans[i].matrix] += selected;
  }
  parallel_for_pieces(s.span_count(), kTaskSpans, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t i = first; i < last; ++i) {
      const Share& share = shares[static_cast<size_t>(i)];
      int64_t to = share.start, ties = share.ties;
      const int64_t end = to + share.above + ties;
      if (to == end && s.remainder == nullptr) continue;
      const Found found = found_in(i, scratch);
      const Span& span = s.span(i);
      if (s.remainder != nullptr) refill_span(s, span, found, reached, ties);
      // Written whether selected or not, and then kept or not, because which are is not to be predicted.
      for (int64_t c = 0; to < end; ++c) {
        const float score = score_of(found.values[c], by_abs);
        const bool tie = score == reached && ties > 0;
        s.args.indices[to] = span.base + found.offsets[c];
        put_value(s.args.values, span.m->dtype, to, found.values[c]);
        ties -= tie;
        to += score > reached || tie;
      }
    }
  });
}

// One pass over the data; false where the candidates are too few or too many, or NaN is among them.
bool select_among_candidates(const Selection& s, uint32_t* counts) {
  Bound bound{kLowest, s.total};
  if (s.total > kSmall) {
    if (s.args.k > s.total / 8) return false;
    bound = sample_bound(s, counts);
  }
  Candidates candidates(s.span_count(), std::min(s.total, 2 * bound.expected + kSpan));
  if (!gather(s, bound.low, candidates) || candidates.used < s.args.k) return false;
  std::vector<uint32_t> kept;
  const Cut cut =
      cut_keys(KeysOfValues{candidates.values.get(), s.by_abs()}, candidates.used, s.args.k, counts, kept);
  if (cut.has_nan) return false;
  write_selected(s, cut, [&](int64_t i, Scratch&) {
    const Batch batch = candidates.of_span[static_cast<size_t>(i)];
    return Found{candidates.values.get() + batch.start, candidates.offsets.get() + batch.start, batch.count};
  });
  return true;
}

[[noreturn]] void refuse_first_nan(const Selection& s) {
  float wide[kSpan];
  for (const Span& span : s.spans) {
    const float* x = read(span, wide);
    for (int64_t i = 0; i < span.n; ++i)
      if (std::isnan(x[i])) refuse_nan(s.args, s.asker, span.matrix, span.base + i);
  }
  throw InvalidArgument("[topk] x changed during the call");
}

// Digit after digit, from the highest: three passes, and two more to write what is selected.
void select_by_digits(const Selection& s) {
  const int64_t per_piece = std::max<int64_t>(1, (s.span_count() + 63) / 64);
  const int64_t pieces = (s.span_count() + per_piece - 1) / per_piece;
  std::vector<uint32_t> counts(static_cast<size_t>(pieces) * kBins);
  Cut cut{0, s.args.k, false};
  KeyDigit digit{20, 12, 0};
  for (;;) {
    std::fill(counts.begin(), counts.end(), 0u);
    parallel_for_pieces(s.span_count(), per_piece, [&](int64_t first, int64_t last) {
      float wide[kSpan];
      uint32_t* own = counts.data() + first / per_piece * kBins;
      for (int64_t i = first; i < last; ++i)
        kernels().topk_histogram(read(s.span(i), wide), s.span(i).n, s.by_abs(), digit, own);
    });
    const auto count_of = [&](uint32_t bin) {
      int64_t sum = 0;
      for (int64_t p = 0; p < pieces; ++p) sum += counts[static_cast<size_t>(p * kBins + bin)];
      return sum;
    };
    uint32_t bin = (1u << digit.bits) - 1;
    if (digit.shift == 20 && count_of(bin) != 0) refuse_first_nan(s);
    for (int64_t count; (count = count_of(bin)) < cut.ties; --bin) cut.ties -= count;
    cut.threshold = digit.higher << digit.bits | bin;
    if (digit.shift == 0) break;
    digit = {digit.shift - 10, 10, cut.threshold};
  }

  const float low = score_of_key(cut.threshold);
  write_selected(s, cut, [&](int64_t i, Scratch& scratch) { return gather_span(s, i, low, scratch); });
}

// The same within each row on its own; row by row the bound comes from the row before.
void select_rows(const TopkArgs& a, const Asker& asker) {
  const Matrix& m = a.x[0];
  const bool by_abs = a.key == QTR_KEY_ABS;
  const size_t cols = static_cast<size_t>(m.cols);
  const int64_t pieces = std::min<int64_t>(m.rows, 4 * num_threads());
  const int64_t per_piece = (m.rows + pieces - 1) / pieces;
  struct RowScratch {
    std::vector<float> values;
    std::vector<uint32_t> columns, kept, counts;
  };
  std::vector<RowScratch> scratch(static_cast<size_t>(pieces));
  for (RowScratch& s : scratch)
    s = {std::vector<float>(cols), std::vector<uint32_t>(cols), std::vector<uint32_t>(cols + 1),
         std::vector<uint32_t>(kBins)};
  std::atomic<int64_t> first_nan = m.rows * m.cols;

  parallel_for_pieces(m.rows, per_piece, [&](int64_t first, int64_t last) {
    RowScratch& own = scratch[static_cast<size_t>(first / per_piece)];
    float wide[kSpan];
    uint16_t offsets[kSpan];
    float low = kLowest;
    const auto gather_row = [&](int64_t row) {
      int64_t found = 0;
      for (int64_t begin = 0; begin < m.cols; begin += kSpan) {
        const int64_t n = std::min(kSpan, m.cols - begin);
        const int64_t count = kernels().topk_gather(float_row(m, row, begin, n, wide), n, by_abs, low,
                                                    own.values.data() + found, offsets);
        for (int64_t c = 0; c < count; ++c)
          own.columns[static_cast<size_t>(found + c)] = static_cast<uint32_t>(begin + offsets[c]);
        found += count;
      }
      return found;
    };
    for (int64_t row = first; row < last; ++row) {
      int64_t n = gather_row(row);
      if (n < a.k) {
        low = kLowest;
        n = gather_row(row);
      }
      Cut cut = cut_keys(KeysOfValues{own.values.data(), by_abs}, n, a.k, own.counts.data(), own.kept);
      if (cut.has_nan) {
        const auto nan =
            std::find_if(own.values.begin(), own.values.end(), [](float x) { return std::isnan(x); });
        const int64_t at = row * m.cols + own.columns[static_cast<size_t>(nan - own.values.begin())];
        for (int64_t before = first_nan; at < before && !first_nan.compare_exchange_weak(before, at);) {
        }
        return;
      }
      const float reached = score_of_key(cut.threshold);
      const int64_t end = (row + 1) * a.k;
      int64_t to = row * a.k;
      for (size_t c = 0; to < end; ++c) {
        const float score = score_of(own.values[c], by_abs);
        const bool tie = score == reached && cut.ties > 0;
        a.indices[to] = row * m.cols + own.columns[c];
        put_value(a.values, m.dtype, to, own.values[c]);
        cut.ties -= tie;
        to += score > reached || tie;
      }
      low = reached > 0 ? 0.8f * reached : kLowest;
    }
  });
  if (first_nan < m.rows * m.cols) refuse_nan(a, asker, 0, first_nan);
  if (a.counts != nullptr) a.counts[0] = m.rows * a.k;
}

}  // namespace

void select_largest(const TopkArgs& a, const Asker& asker) {
  if (a.counts != nullptr) std::fill_n(a.counts, a.x_count, 0);
  if (a.k == 0) return;
  if (a.per_row) return select_rows(a, asker);

  std::vector<Matrix> rows;
  rows.reserve(static_cast<size_t>(a.x_count));
  Selection s{a, asker, {}, 0, nullptr};
  for (int64_t i = 0; i < a.x_count; ++i) {
    rows.push_back(joined(a.x[i]));
    append_spans(s.spans, rows.back(), i);
    s.total += a.x[i].rows * a.x[i].cols;
  }
  std::vector<uint32_t> counts(kBins);
  if (!select_among_candidates(s, counts.data())) select_by_digits(s);
}

bool select_and_empty(const TopkArgs& a, const Asker& asker, void* remainder) {
  const Matrix row = joined(a.x[0]);
  Selection s{a, asker, {}, row.cols, static_cast<char*>(remainder)};
  append_spans(s.spans, row, 0);
  std::vector<uint32_t> counts(kBins);
  if (select_among_candidates(s, counts.data())) return true;
  s.remainder = nullptr;
  select_by_digits(s);
  return false;
}

void topk(const TopkArgs& a) {
  check_given(a.x != nullptr, "topk", "x");
  check(a.x_count >= 1, "[topk] x must hold at least one matrix", "x_count", a.x_count);
  check(a.key == QTR_KEY_ABS || a.key == QTR_KEY_VALUE, "[topk] key must be abs or value", "key",
        static_cast<int>(a.key));
  check(!a.per_row || a.x_count == 1, "[topk] per_row takes one matrix", "x_count", a.x_count);
  int64_t total = 0;
  for (int64_t i = 0; i < a.x_count; ++i) {
    check_matrix(a.x[i], "topk", "x");
    check(a.x[i].dtype == a.x[0].dtype, "[topk] x must be of one dtype", "array", i, "dtype",
          static_cast<int>(a.x[i].dtype), "expected", static_cast<int>(a.x[0].dtype));
    total += a.x[i].rows * a.x[i].cols;
  }
  check(a.k >= 0, "[topk] k must be at least 0", "k", a.k);
  if (a.per_row)
    check(a.k <= a.x[0].cols, "[topk] k must not exceed the length of a row", "k", a.k, "cols", a.x[0].cols);
  else
    check(a.k <= total, "[topk] k must not exceed the number of elements", "k", a.k, "elements", total);
  check_given(a.k == 0 || a.indices != nullptr, "topk", "indices");
  check_given(a.k == 0 || a.values != nullptr, "topk", "values");
  if (done_on_device(a, "topk", &qtr_backend::topk)) return;
  select_largest(a, {"topk", "x"});
}

}  // namespace quantrature
