#include "quantrature/viterbi.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/trellis/reader.hpp"
#include "ops/viterbi/cost.hpp"
#include "ops/viterbi/step.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

// The values of all states in units, with both signs, in the order of viterbi_place.
class Values {
 public:
  Values(const TrellisReader& reader, double unit) : size_(size_t(reader.per_step) << reader.state_bits) {
    all_.resize(2 * size_);
    shape_.overlap_bits = reader.state_bits - reader.step_bits;
    shape_.step_bits = reader.step_bits;
    shape_.per_step = reader.per_step;
    for (uint32_t state = 0; state < 1u << reader.state_bits; ++state) {
      float raw[2];
      raw_values(reader, state, raw);
      const uint32_t u = state & ((1u << shape_.overlap_bits) - 1);
      const uint32_t place = viterbi_place(shape_, state >> shape_.overlap_bits, u);
      for (int v = 0; v < reader.per_step; ++v) {
        const int16_t value = in_units(unit * (static_cast<double>(raw[v]) / reader.rms));
        all_[begin(v) + place] = value;
        all_[size_ + begin(v) + place] = static_cast<int16_t>(-value);
      }
    }
  }

  // A step whose weights are to be near to x.
  ViterbiStep step(const int16_t* x, const uint16_t* from, uint16_t* to) const {
    ViterbiStep s = shape_;
    for (int v = 0; v < s.per_step; ++v) {
      s.values[v] = all_.data() + (x[v] < 0 ? size_ : 0) + begin(v);
      s.x[v] = static_cast<int16_t>(std::abs(x[v]));
    }
    s.from = from;
    s.to = to;
    return s;
  }

 private:
  size_t begin(int v) const {
    return static_cast<size_t>(v) * std::min(size_t{kViterbiBlock}, size_t{1} << shape_.overlap_bits);
  }

  size_t size_;
  std::vector<int16_t> all_;
  ViterbiStep shape_{};
};

// Memory of a search: the costs after every step, from which the walk is found again.
struct Scratch {
  std::vector<uint16_t> costs;
  std::vector<int16_t> x;
  std::vector<uint32_t> states;
  std::vector<float> row;
};

// Scratches that are not in use; as many come into being as threads search at once.
class Scratches {
 public:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    std::unique_ptr<Scratch> taken = std::move(free_.back());
    free_.pop_back();
    return taken;
  }

  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

class Search {
 public:
  Search(const TrellisReader& reader, const Values& values, int64_t weights, Scratch& scratch)
      : reader_(reader),
        values_(values),
        steps_(weights / reader.per_step),
        shift_(reader.state_bits - reader.step_bits),
        overlaps_(size_t{1} << shift_),
        stride_(overlaps_ + kViterbiBlock),
        scratch_(scratch) {
    scratch_.costs.resize(stride_ * static_cast<size_t>(steps_ + 1));
    scratch_.states.resize(static_cast<size_t>(steps_));
  }

  // The states of the best walk.
  const std::vector<uint32_t>& run() {
    const int64_t turn = steps_ / 2;
    std::fill_n(costs(0), overlaps_, uint16_t{0});
    forward(steps_ - turn);
    const uint16_t* last = costs(steps_);
    uint32_t seam = static_cast<uint32_t>(std::min_element(last, last + overlaps_) - last);
    for (int64_t t = steps_ - 1; t >= turn; --t)
      seam = back(step(t, steps_ - turn), seam, 0, 0) >> reader_.step_bits;

    std::fill_n(costs(0), overlaps_, uint16_t{65535});
    costs(0)[seam] = 0;
    forward(0);
    uint32_t overlap = seam;
    for (int64_t t = steps_ - 1; t >= 0; --t) {
      // What the beginning of the stream shares with its end is settled.
      const int64_t settled = std::clamp<int64_t>(shift_ - t * reader_.step_bits, 0, reader_.step_bits);
      const int64_t rest = shift_ - t * reader_.step_bits - settled;
      const uint32_t bits = settled > 0 ? seam >> rest & ((1u << settled) - 1) : 0;
      const uint32_t state = back(step(t, 0), overlap, static_cast<int>(settled), bits);
      scratch_.states[static_cast<size_t>(t)] = state;
      overlap = state >> reader_.step_bits;
    }
    return scratch_.states;
  }

 private:
  uint16_t* costs(int64_t t) { return scratch_.costs.data() + static_cast<size_t>(t) * stride_; }

  // Step t of the sequence that begins with step `first`.
  ViterbiStep step(int64_t t, int64_t first) {
    const int16_t* x = scratch_.x.data() + (t + first) % steps_ * reader_.per_step;
    return values_.step(x, costs(t), costs(t + 1));
  }

  void forward(int64_t first) {
    uint16_t least = 0;
    for (int64_t t = 0; t < steps_; ++t) {
      ViterbiStep s = step(t, first);
      s.common = least;
      least = kernels().viterbi_step(s);
    }
  }

  // The state of step t on the best walk to an overlap, among those that begin with so many settled bits.
  uint32_t back(const ViterbiStep& s, uint32_t overlap, int settled, uint32_t bits) const {
    const int open = reader_.step_bits - settled;
    uint32_t best = 0;
    uint32_t least = UINT32_MAX;
    for (uint32_t j = bits << open; j < (bits + 1) << open; ++j) {
      const uint32_t cost = cost_over(s, j, overlap);
      if (cost < least) best = (j << shift_) + overlap, least = cost;
    }
    return best;
  }

  const TrellisReader& reader_;
  const Values& values_;
  int64_t steps_;
  int shift_;
  size_t overlaps_, stride_;
  Scratch& scratch_;
};

void write_stream(const std::vector<uint32_t>& states, const TrellisReader& reader, uint8_t* stream,
                  int64_t bytes) {
  std::memset(stream, 0, static_cast<size_t>(bytes));
  int64_t at = 0;
  for (const uint32_t state : states)
    for (int i = 1; i <= reader.step_bits; ++i, ++at)
      stream[at / 8] =
          static_cast<uint8_t>(stream[at / 8] | (state >> (reader.state_bits - i) & 1u) << (7 - at % 8));
}

}  // namespace

void trellis_quantize(const TrellisQuantizeArgs& a) {
  constexpr const char* op = "trellis_quantize";
  const TrellisReader reader = trellis_reader(a.trellis, op);
  check_matrix(a.x, op, "x");
  const int64_t bytes = trellis_stream_bytes(reader, a.x.cols, op);
  check_given(a.codes != nullptr, "trellis_quantize", "codes");
  check(a.codes_size == a.x.rows * bytes, "[trellis_quantize] codes must hold a stream for each row",
        "codes_size", a.codes_size, "expected", a.x.rows * bytes);
  check(std::isfinite(a.scale) && a.scale > 0, "[trellis_quantize] scale must be positive", "scale", a.scale);
  if (done_on_device(a, op, &qtr_backend::trellis_quantize)) return;
  const auto cols = static_cast<size_t>(a.x.cols);
  std::vector<float> buffer(cols);
  for (int64_t row = 0; row < a.x.rows; ++row) {
    const float* x = float_row(a.x, row, 0, a.x.cols, buffer.data());
    for (size_t i = 0; i < cols; ++i)
      check(std::isfinite(x[i]), "[trellis_quantize] x must be finite", "value", x[i], "row", row, "column",
            i);
  }
  const double unit = viterbi_unit(reader.bits);
  const Values values(reader, unit);
  Scratches scratches;
  parallel_for(a.x.rows, [&](int64_t row) {
    std::unique_ptr<Scratch> scratch = scratches.take();
    scratch->row.resize(cols);
    scratch->x.resize(cols);
    const float* x = float_row(a.x, row, 0, a.x.cols, scratch->row.data());
    for (size_t i = 0; i < cols; ++i)
      scratch->x[i] = in_units(unit * (static_cast<double>(x[i]) / static_cast<double>(a.scale)));
    write_stream(Search(reader, values, a.x.cols, *scratch).run(), reader, a.codes + row * bytes, bytes);
    scratches.give(std::move(scratch));
  });
}

}  // namespace quantrature
