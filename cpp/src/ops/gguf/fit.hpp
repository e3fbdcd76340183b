// The search for the block that is nearest to given numbers. What it computes for many lines at once it
// leaves to the kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ops/gguf/layout.hpp"
#include "ops/gguf/lines.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {

class GgufFit {
 public:
  explicit GgufFit(const GgufLayout& layout)
      : layout_(layout), top_(static_cast<float>(layout.largest_code())) {
    const auto zero = static_cast<float>(layout.zero);
    low_ = layout.is_table() ? kGgufTable.front() : -zero;
    high_ = layout.is_table() ? kGgufTable.back() : top_ - zero;
  }

  // x has the numbers of one block, up to 65504 in magnitude. weights has one weight for each: none is below
  // 0, and one is above. block is written.
  void fit(const float* x, const float* weights, uint8_t* block) {
    x_ = x;
    const float most = *std::max_element(weights, weights + layout_.info.block_size);
    for (int r = 0; r < layout_.runs(); ++r) {
      const int at = r * layout_.run;
      const bool any = *std::max_element(weights + at, weights + at + layout_.run) > 0;
      for (int i = at; i < at + layout_.run; ++i)
        weights_[static_cast<size_t>(i)] = any ? weights[i] / most : kNoWeight;
    }
    if (layout_.scales != GgufScales::kNone)
      fit_runs();
    else if (layout_.m < 0)
      fit_scale();
    else
      fit_line();
    write(block);
  }

 private:
  static constexpr float kNever = std::numeric_limits<float>::infinity();

  // Of the numbers of a run without weight, over the largest weight of the block: it hardly counts beside
  // others.
  static constexpr float kNoWeight = 1e-10f;
  // Numbers of less weight than this, over the largest weight of the run, may lie outside the range of
  // values.
  static constexpr float kImportant = 1e-3f;
  // Scales without an offset: from 1 / 0.74 of the one whose codes span the range, in equal steps of 1 /
  // scale.
  static constexpr float kFirstScale = 0.74f;
  // Lines are started from the ends of kEnds x kEnds ranges, and solved kLineSteps times.
  static constexpr int kEnds = 8, kLineSteps = 3;
  static_assert(kEnds * kEnds % kGgufLines == 0);
  // Times that d and dmin are solved for, at most.
  static constexpr int kTurns = 6;
  // Multiples that are tried for each run.
  static constexpr int kMostChoices = 256;

  struct Line {
    float scale = 0, offset = 0, error = kNever;
  };

  struct Range {
    float lowest, highest;

    bool operator==(const Range&) const = default;
  };

  // Numbers from `first` to `last`, `count` of them.
  struct Steps {
    int count;
    float first, last;

    float at(int i) const {
      return count == 1 ? first
                        : first + (last - first) * static_cast<float>(i) / static_cast<float>(count - 1);
    }
  };

  GgufRun run(int r) const {
    const int at = r * layout_.run;
    return {x_ + at,     weights_.data() + at,
            layout_.run, low_,
            high_,       layout_.is_table() ? kGgufTable.data() : nullptr};
  }

  static float rounded(float value) {
    return f32_from_f16(f16_from_f32(std::min(std::max(value, -65504.0f), 65504.0f)));
  }

  // The float16 number that lies `steps` further from zero than `half`, with the sign of `half`.
  static float further(float half, int steps) {
    const int bits = f16_from_f32(half), magnitude = std::clamp((bits & 0x7FFF) + steps, 0, 0x7BFF);
    return f32_from_f16(static_cast<uint16_t>((bits & 0x8000) | magnitude));
  }

  static int nearest(float value, int least, int largest) {
    return static_cast<int>(
        std::lrint(std::min(std::max(value, static_cast<float>(least)), static_cast<float>(largest))));
  }

  static void keep_best(const GgufRun& of, const GgufLines& lines, Line& best) {
    float errors[kGgufLines];
    kernels().gguf_errors(of, lines, errors);
    for (int i = 0; i < kGgufLines; ++i)
      if (errors[i] < best.error) best = {lines.scale[i], lines.offset[i], errors[i]};
  }

  // Of the numbers that have at least a share of the largest weight.
  static Range range_of(const GgufRun& of, float share) {
    const float least = share * *std::max_element(of.weights, of.weights + of.n);
    Range range{kNever, -kNever};
    for (int i = 0; i < of.n; ++i)
      if (of.weights[i] >= least) range = {std::min(range.lowest, of.x[i]), std::max(range.highest, of.x[i])};
    return range;
  }

  // Calls body with the range of all numbers, and then with the range of the important ones if it differs.
  template <class Body>
  static void for_ranges(const GgufRun& of, Body&& body) {
    const Range all = range_of(of, 0), important = range_of(of, kImportant);
    body(all);
    if (!(important == all)) body(important);
  }

  // --- Values without an offset ---

  // The scale, of one sign, whose codes just span the range.
  float spanning(const Range& range, float sign) const {
    const float lowest = std::min(range.lowest, 0.0f), highest = std::max(range.highest, 0.0f);
    return sign > 0 ? std::max(highest / high_, lowest / low_) : -std::max(highest / -low_, -lowest / high_);
  }

  // The last of the scales that are tried, as kFirstScale: fewer codes lose less where the numbers far out
  // are cut off.
  float last_scale() const { return top_ > 100 ? 1.1f : top_ > 15 ? 1.7f : 2.0f; }

  void search_scales(const GgufRun& of, float sign, int parts, bool half, Line& best) const {
    const Steps divisors{parts * kGgufLines, kFirstScale, last_scale()};
    for_ranges(of, [&](const Range& range) {
      const float span = spanning(range, sign);
      for (int first = 0; first < divisors.count; first += kGgufLines) {
        GgufLines lines{};
        for (int i = 0; i < kGgufLines; ++i) lines.scale[i] = span / divisors.at(first + i);
        kernels().gguf_solve(of, GgufOffset::kNone, lines);
        if (half)
          for (float& scale : lines.scale) scale = rounded(scale);
        keep_best(of, lines, best);
      }
    });
  }

  void fit_scale() {
    const GgufRun of = run(0);
    const int parts = top_ > 100 ? 8 : top_ > 15 ? 6 : 4;
    Line best;
    for (float sign : {1.0f, -1.0f}) search_scales(of, sign, parts, true, best);
    GgufLines near{};
    for (int i = 0; i < kGgufLines; ++i) near.scale[i] = further(best.scale, i - kGgufLines / 2);
    keep_best(of, near, best);
    block_.d = best.scale;
    kernels().gguf_codes(of, best.scale, 0, codes_.data());
  }

  // --- Values with an offset ---

  Line search_lines(const GgufRun& of, GgufOffset how, bool half) const {
    // How far the ends of the first ranges lie inside the range of the numbers, over its width.
    const Steps inside = top_ < 4 ? Steps{kEnds, -0.1f, 0.3f} : Steps{kEnds, -0.06f, 0.16f};
    Line best;
    for_ranges(of, [&](Range range) {
      if (how == GgufOffset::kNotAbove0) range.lowest = std::min(range.lowest, 0.0f);
      const float width = range.highest - range.lowest;
      for (int first = 0; first < kEnds * kEnds; first += kGgufLines) {
        GgufLines lines{};
        for (int i = 0; i < kGgufLines; ++i) {
          const float from = range.lowest + width * inside.at((first + i) % kEnds);
          const float to = range.highest - width * inside.at((first + i) / kEnds);
          lines.scale[i] = (to - from) / top_;
          lines.offset[i] = how == GgufOffset::kNotAbove0 ? std::min(from, 0.0f) : from;
        }
        for (int step = 0; step < kLineSteps; ++step) kernels().gguf_solve(of, how, lines);
        for (int i = 0; half && i < kGgufLines; ++i) {
          lines.scale[i] = rounded(lines.scale[i]);
          lines.offset[i] = rounded(lines.offset[i]);
        }
        keep_best(of, lines, best);
      }
    });
    return best;
  }

  void fit_line() {
    const GgufRun of = run(0);
    Line best = search_lines(of, GgufOffset::kAny, true);
    GgufLines near{};
    for (int i = 0; i < kGgufLines; ++i) {
      near.scale[i] = further(best.scale, i / 4 - 2);
      near.offset[i] = further(best.offset, i % 4 - 2);
    }
    keep_best(of, near, best);
    block_.d = best.scale, block_.m = best.offset;
    kernels().gguf_codes(of, best.scale, best.offset, codes_.data());
  }

  // --- K types: the scales of runs are multiples of d, their minimums of dmin ---

  struct Block {
    float d = 0, m = 0;
    GgufMultiples of{};
    double error = std::numeric_limits<double>::infinity();
  };

  // The line that a run would have for its codes, whatever the multiples.
  struct Wish {
    float scale, minimum;
    float mean_code, mean;  // weighted: these lie on the line
    float other;            // without minimums: the best scale of the other sign
  };

  // How far from the wish multiples are tried: of the scale, and of the minimum for each scale.
  struct Reach {
    int scale, minimum;
  };

  struct Choices {
    int count = 0;
    int scales[kMostChoices], minimums[kMostChoices];

    void add(int scale, int minimum) {
      scales[count] = scale;
      minimums[count++] = minimum;
    }
  };

  bool with_minimums() const { return layout_.m >= 0; }
  int least_multiple() const {
    return layout_.scales == GgufScales::kSixBits ? -32 : layout_.scales == GgufScales::kBytes ? -128 : 0;
  }
  int largest_multiple() const {
    if (least_multiple() < 0) return -least_multiple() - 1;
    return layout_.scales == GgufScales::kNibbles ? 15 : 63;
  }

  void fit_runs() {
    // Of the largest scale and the largest minimum over their largest multiples.
    const Steps ds = !with_minimums() ? Steps{16, 0.96f, 1.1f}
                     : top_ < 4       ? Steps{8, 0.9f, 1.1f}
                                      : Steps{8, 0.97f, 1.08f};
    const Steps ms = !with_minimums() ? Steps{1, 0, 0}
                     : top_ < 4       ? Steps{4, 0.95f, 1.1f}
                                      : Steps{4, 1.0f, 1.1f};
    const Reach near = with_minimums() ? Reach{2, 1} : Reach{3, 0};
    const Reach far = with_minimums() ? Reach{8, 5} : Reach{12, 0};

    const int runs = layout_.runs();
    float scale = 0, minimum = 0;
    for (int r = 0; r < runs; ++r) {
      wishes_[r] = with_minimums() ? wish_of_line(r) : wish_of_scales(r);
      if (std::abs(wishes_[r].scale) > std::abs(scale)) scale = wishes_[r].scale;
      minimum = std::max(minimum, wishes_[r].minimum);
    }
    scale /= static_cast<float>(with_minimums() ? largest_multiple() : least_multiple());
    minimum /= static_cast<float>(largest_multiple());

    Block best;
    for (int i = 0; i < ds.count; ++i)
      for (int j = 0; j < ms.count; ++j) {
        Block start;
        start.d = rounded(scale * ds.at(i));
        start.m = rounded(minimum * ms.at(j));
        choose(start, near, false);
        if (start.error < best.error) best = start;
      }
    for (const Reach& reach : {near, far, near}) improve(best, reach);
    block_ = best;
    for (int r = 0; r < runs; ++r) {
      const Line line = line_of(best, best.of.scale[r], best.of.minimum[r]);
      kernels().gguf_codes(run(r), line.scale, line.offset, codes_.data() + r * layout_.run);
    }
  }

  Line line_of(const Block& b, int scale, int minimum) const {
    return {b.d * static_cast<float>(scale), with_minimums() ? -(b.m * static_cast<float>(minimum)) : 0.0f};
  }

  Wish wish_of_line(int r) const {
    const GgufRun of = run(r);
    const Line line = search_lines(of, GgufOffset::kNotAbove0, false);
    uint8_t codes[32];
    kernels().gguf_codes(of, line.scale, line.offset, codes);
    float w = 0, wq = 0, wx = 0;
    for (int i = 0; i < of.n; ++i) {
      w += of.weights[i];
      wq += of.weights[i] * static_cast<float>(codes[i]);
      wx += of.weights[i] * of.x[i];
    }
    return {line.scale, -line.offset, w > 0 ? wq / w : 0, w > 0 ? wx / w : 0, 0};
  }

  Wish wish_of_scales(int r) const {
    Line best, other;
    search_scales(run(r), 1, 2, false, best);
    search_scales(run(r), -1, 2, false, other);
    if (other.error < best.error) std::swap(best, other);
    return {best.scale, 0, 0, 0, other.scale};
  }

  void add_scales(const Block& b, float wish, int reach, Choices& choices) const {
    const int centre = nearest(b.d == 0 ? 0 : wish / b.d, least_multiple(), largest_multiple());
    const int last = std::min(largest_multiple(), centre + reach);
    for (int scale = std::max(least_multiple(), centre - reach); scale <= last; ++scale)
      choices.add(scale, 0);
  }

  // For each scale the minimums near the one with which the line goes through the mean of the run.
  void add_lines(const Block& b, const Wish& wish, const Reach& reach, Choices& choices) const {
    const float by_m = b.m == 0 ? 0 : 1 / b.m;
    Choices scales;
    add_scales(b, wish.scale, reach.scale, scales);
    for (int i = 0; i < scales.count; ++i) {
      const int scale = scales.scales[i];
      const float minimum = b.d * static_cast<float>(scale) * wish.mean_code - wish.mean;
      const int centre = nearest(minimum * by_m, 0, largest_multiple());
      const int last = std::min(largest_multiple(), centre + reach.minimum);
      for (int t = std::max(0, centre - reach.minimum); t <= last; ++t) choices.add(scale, t);
    }
    choices.add(0, nearest(-wish.mean * by_m, 0, largest_multiple()));
  }

  // Takes for each run the multiples with the least error, among those near its wish; with `keep`, those that
  // the run has already may stay.
  void choose(Block& b, const Reach& reach, bool keep) const {
    b.error = 0;
    for (int r = 0; r < layout_.runs(); ++r) {
      Choices choices;
      if (keep) choices.add(b.of.scale[r], b.of.minimum[r]);
      if (with_minimums()) {
        add_lines(b, wishes_[r], reach, choices);
      } else {
        add_scales(b, wishes_[r].scale, reach.scale, choices);
        add_scales(b, wishes_[r].other, reach.scale, choices);
      }
      while (choices.count % kGgufLines != 0) choices.add(choices.scales[0], choices.minimums[0]);
      float least = kNever;
      for (int first = 0; first < choices.count; first += kGgufLines) {
        GgufLines lines{};
        for (int i = 0; i < kGgufLines; ++i) {
          const Line line = line_of(b, choices.scales[first + i], choices.minimums[first + i]);
          lines.scale[i] = line.scale, lines.offset[i] = line.offset;
        }
        float errors[kGgufLines];
        kernels().gguf_errors(run(r), lines, errors);
        for (int i = 0; i < kGgufLines; ++i) {
          if (!(errors[i] < least)) continue;
          least = errors[i];
          b.of.scale[r] = choices.scales[first + i], b.of.minimum[r] = choices.minimums[first + i];
        }
      }
      b.error += static_cast<double>(least);
    }
  }

  // Solves for d and dmin with the codes and multiples that the block has, chooses multiples with these, and
  // so on while the error becomes smaller.
  void improve(Block& best, const Reach& reach) {
    for (int turn = 0; turn < kTurns; ++turn) {
      Block next = best;
      solve(next);
      choose(next, reach, true);
      if (!(next.error < best.error)) return;
      best = next;
    }
  }

  // Least squares for d and dmin, and the wishes of the runs, with the codes that the block has.
  void solve(Block& b) {
    double uu = 0, uv = 0, vv = 0, ux = 0, vx = 0;  // over the block: x is near d u + dmin v
    for (int r = 0; r < layout_.runs(); ++r) {
      const GgufRun of = run(r);
      const Line line = line_of(b, b.of.scale[r], b.of.minimum[r]);
      uint8_t codes[32];
      kernels().gguf_codes(of, line.scale, line.offset, codes);
      double w = 0, wq = 0, wqq = 0, wx = 0, wxq = 0;
      for (int i = 0; i < of.n; ++i) {
        const double weight = of.weights[i], q = codes[i] - layout_.zero, x = of.x[i];
        w += weight, wq += weight * q, wqq += weight * q * q, wx += weight * x, wxq += weight * x * q;
      }
      const double s = b.of.scale[r], t = -b.of.minimum[r];
      uu += s * s * wqq, uv += s * t * wq, vv += t * t * w, ux += s * wxq, vx += t * wx;
      const double determinant = w * wqq - wq * wq;
      Wish& wish = wishes_[r];
      if (!with_minimums() && wqq > 0) {
        wish.scale = static_cast<float>(wxq / wqq);
      } else if (with_minimums() && determinant > kLeastDeterminant * w * wqq) {
        wish.scale = static_cast<float>((w * wxq - wx * wq) / determinant);
        wish.mean_code = static_cast<float>(wq / w);
        wish.mean = static_cast<float>(wx / w);
      }
    }
    const double determinant = uu * vv - uv * uv;
    if (determinant > kLeastDeterminant * uu * vv) {
      b.d = rounded(static_cast<float>((ux * vv - vx * uv) / determinant));
      b.m = rounded(static_cast<float>((vx * uu - ux * uv) / determinant));
    } else if (uu > 0) {
      b.d = rounded(static_cast<float>((ux - uv * static_cast<double>(b.m)) / uu));
    }
  }

  void write(uint8_t* block) const {
    std::fill_n(block, layout_.info.block_bytes, uint8_t{0});
    gguf_set_half(block, layout_.d, block_.d);
    if (layout_.m >= 0) gguf_set_half(block, layout_.m, block_.m);
    gguf_set_multiples(layout_, block_.of, block);
    gguf_set_plane(layout_, layout_.low, 0, codes_.data(), block);
    gguf_set_plane(layout_, layout_.high, layout_.low.bits, codes_.data(), block);
  }

  static constexpr double kLeastDeterminant = 1e-9;

  const GgufLayout& layout_;
  float top_, low_, high_;  // the largest code; the least and the largest factor of the scale
  const float* x_ = nullptr;
  std::array<float, kGgufMostNumbers> weights_{};
  std::array<uint8_t, kGgufMostNumbers> codes_{};
  Wish wishes_[kGgufMostRuns] = {};
  Block block_{};
};

}  // namespace quantrature
