// The search for the block that is nearest to given numbers. What it computes for many lines at once it leaves to
// the kernels.
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
      : layout_(layout), levels_(static_cast<float>(layout.largest_code())) {
    const auto zero = static_cast<float>(layout.zero);
    low_ = layout.is_table() ? kGgufTable.front() : -zero;
    high_ = layout.is_table() ? kGgufTable.back() : levels_ - zero;
  }

  // x: of one block; weights: as many, at least 0, some above 0; block: written.
  void fit(const float* x, const float* weights, uint8_t* block) {
    const float most = *std::max_element(weights, weights + layout_.info.block_size);
    for (int i = 0; i < layout_.info.block_size; ++i) weights_[i] = weights[i] / most;
    x_ = x;
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

  struct Line {
    float scale = 0, offset = 0, error = kNever;
  };

  // d, m or dmin, the multiples of each run, and the errors that they lead to.
  struct Block {
    float d = 0, m = 0;
    GgufMultiples of{};
    float errors[kGgufMostRuns] = {};
    double error = std::numeric_limits<double>::infinity();
  };

  GgufRun run(int r) const {
    const int at = r * layout_.run;
    return {x_ + at,
            weights_.data() + at,
            layout_.run,
            low_,
            high_,
            layout_.is_table() ? kGgufTable.data() : nullptr};
  }

  static float rounded(float value) {
    return f32_from_f16(f16_from_f32(std::min(std::max(value, -65504.0f), 65504.0f)));
  }

  // The float16 number `steps` further from zero than a float16 number, with its sign.
  static float further(float half, int steps) {
    const int bits = f16_from_f32(half), magnitude = std::clamp((bits & 0x7FFF) + steps, 0, 0x7BFF);
    return f32_from_f16(static_cast<uint16_t>((bits & 0x8000) | magnitude));
  }

  static void keep_best(const GgufRun& of, const GgufLines& lines, Line& best) {
    float errors[kGgufLines];
    kernels().gguf_errors(of, lines, errors);
    for (int i = 0; i < kGgufLines; ++i)
      if (errors[i] < best.error) best = {lines.scale[i], lines.offset[i], errors[i]};
  }

  struct Range {
    float lowest, highest;
  };

  // Of the numbers whose weight is more than `share` of the largest.
  static Range range_of(const GgufRun& of, float share) {
    float most = 0;
    for (int i = 0; i < of.n; ++i) most = std::max(most, of.weights[i]);
    Range range{kNever, -kNever};
    for (int i = 0; i < of.n; ++i) {
      if (of.weights[i] < share * most) continue;
      range = {std::min(range.lowest, of.x[i]), std::max(range.highest, of.x[i])};
    }
    return range;
  }

  // --- Values without an offset ---

  // Lines of one sign from codes that span the range down to codes that span a part of it.
  GgufLines scales_of(const Range& range, float sign) const {
    const float lowest = std::min(range.lowest, 0.0f), highest = std::max(range.highest, 0.0f);
    const float whole = sign > 0 ? std::max(highest / high_, lowest / low_)
                                 : -std::max(highest / -low_, -lowest / high_);
    const float reach = layout_.is_table() ? 0.4f : std::min(0.4f, 4.0f / levels_);
    GgufLines lines{};
    for (int i = 0; i < kGgufLines; ++i)
      lines.scale[i] = whole * (1 + reach * (1 - static_cast<float>(i)) / (kGgufLines - 1) * 1.0f);
    return lines;
  }

  void search_scales(const GgufRun& of, float sign, bool half, Line& best) const {
    const Range all = range_of(of, 0), important = range_of(of, kImportant);
    const bool same = all.lowest == important.lowest && all.highest == important.highest;
    for (const Range& range : {all, important}) {
      GgufLines lines = scales_of(range, sign);
      for (int i = 0; i < kScaleSteps; ++i) {
        kernels().gguf_solve(of, GgufOffset::kNone, lines);
      }
      if (half)
        for (float& scale : lines.scale) scale = rounded(scale);
      keep_best(of, lines, best);
      if (same) break;
    }
  }

  void fit_scale() {
    const GgufRun of = run(0);
    Line best{0, 0, kNever};
    for (float sign : {1.0f, -1.0f}) search_scales(of, sign, true, best);
    GgufLines near{};
    for (int i = 0; i < kGgufLines; ++i) near.scale[i] = further(best.scale, i - kGgufLines / 2);
    keep_best(of, near, best);
    block_.d = best.scale;
    kernels().gguf_codes(of, best.scale, 0, codes_.data());
  }

  // --- Values with an offset ---

  Line search_lines(const GgufRun& of, GgufOffset how, bool half) const {
    Line best;
    const Range all = range_of(of, 0), important = range_of(of, kImportant);
    const bool same = all.lowest == important.lowest && all.highest == important.highest;
    for (Range range : {all, important}) {
      if (how == GgufOffset::kNotAbove0) range.lowest = std::min(range.lowest, 0.0f);
      range.highest = std::max(range.highest, range.lowest);
      const float width = range.highest - range.lowest;
      for (int part = 0; part < kLineParts; ++part) {
        GgufLines lines{};
        for (int i = 0; i < kGgufLines; ++i) {
          const float step = shrink() * width;
          const float from = range.lowest + step * (static_cast<float>(i % 4) - 0.5f + 0.5f * static_cast<float>(part));
          const float to = range.highest - step * (static_cast<float>(i / 4) - 0.5f + 0.5f * static_cast<float>(part));
          lines.scale[i] = (to - from) / levels_;
          lines.offset[i] = how == GgufOffset::kNotAbove0 ? std::min(from, 0.0f) : from;
        }
        for (int i = 0; i < kLineSteps; ++i) kernels().gguf_solve(of, how, lines);
        if (half)
          for (int i = 0; i < kGgufLines; ++i) {
            lines.scale[i] = rounded(lines.scale[i]);
            lines.offset[i] = rounded(lines.offset[i]);
          }
        keep_best(of, lines, best);
      }
      if (same) break;
    }
    return best;
  }

  // Of the width of the range, that the ends of lines are apart.
  float shrink() const { return levels_ < 4 ? 0.08f : levels_ < 16 ? 0.04f : 0.02f; }

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

  // --- K types: the scales of runs are multiples of d ---

  int least_multiple() const {
    return layout_.scales == GgufScales::kSixBits ? -32 : layout_.scales == GgufScales::kBytes ? -128 : 0;
  }
  int largest_multiple() const {
    switch (layout_.scales) {
      case GgufScales::kNibbles: return 15;
      case GgufScales::kSixBits: return 31;
      case GgufScales::kSixBitsTwo: return 63;
      default: return 127;
    }
  }
  bool with_minimums() const { return layout_.m >= 0; }

  // What a run would have alone.
  struct Wish {
    float scale, minimum;
    float mean_code, mean;  // weighted, on the line
    float other;            // without minimums: the best scale of the other sign
  };

  void fit_runs() {
    const int runs = layout_.runs();
    for (int r = 0; r < runs; ++r) wish_[r] = with_minimums() ? wish_of_line(r) : wish_of_scales(r);
    float scale = 0, minimum = 0;
    for (int r = 0; r < runs; ++r) {
      if (std::abs(wish_[r].scale) > std::abs(scale)) scale = wish_[r].scale;
      minimum = std::max(minimum, wish_[r].minimum);
    }
    const int most = with_minimums() ? largest_multiple() : least_multiple();
    Block best;
    for (float f : kScaleStarts)
      for (float g : kMinimumStarts) {
        if (!with_minimums() && g != kMinimumStarts[0]) continue;
        Block start;
        start.d = rounded(scale / static_cast<float>(most) * f);
        start.m = with_minimums() ? rounded(minimum / static_cast<float>(largest_multiple()) * g) : 0;
        select(start, false);
        if (start.error < best.error) best = start;
      }
    improve(best);
    block_ = best;
    for (int r = 0; r < runs; ++r) {
      const Line line = line_of(best, r);
      kernels().gguf_codes(run(r), line.scale, line.offset, codes_.data() + r * layout_.run);
    }
  }

  Line line_of(const Block& b, int r) const { return line_of(b, b.of.scale[r], b.of.minimum[r]); }
  Line line_of(const Block& b, int scale, int minimum) const {
    return {b.d * static_cast<float>(scale), with_minimums() ? -(b.m * static_cast<float>(minimum)) : 0.0f};
  }

  Wish wish_of_line(int r) const {
    const Line line = search_lines(run(r), GgufOffset::kNotAbove0, false);
    return wish_on(r, line);
  }

  Wish wish_of_scales(int r) const {
    Line best, other;
    search_scales(run(r), 1, false, best);
    search_scales(run(r), -1, false, other);
    if (other.error < best.error) std::swap(best, other);
    return {best.scale, 0, 0, 0, other.scale};
  }

  Wish wish_on(int r, const Line& line) const {
    const GgufRun of = run(r);
    uint8_t codes[32];
    kernels().gguf_codes(of, line.scale, line.offset, codes);
    float w = 0, wq = 0, wx = 0;
    for (int i = 0; i < of.n; ++i) {
      w += of.weights[i];
      wq += of.weights[i] * static_cast<float>(codes[i]);
      wx += of.weights[i] * of.x[i];
    }
    const bool any = w > 0;
    return {line.scale, -line.offset, any ? wq / w : 0, any ? wx / w : 0, 0};
  }

  static int nearest(float value, int least, int largest) {
    return static_cast<int>(
        std::nearbyint(std::min(std::max(value, static_cast<float>(least)), static_cast<float>(largest))));
  }

  // Chooses the multiples of each run among those near its wish, and those it has if `given`.
  void select(Block& b, bool given) const {
    const float by_d = b.d == 0 ? 0 : 1 / b.d, by_m = b.m == 0 ? 0 : 1 / b.m;
    const int least = least_multiple(), largest = largest_multiple();
    b.error = 0;
    for (int r = 0; r < layout_.runs(); ++r) {
      const Wish& wish = wish_[r];
      int scales[kGgufLines], minimums[kGgufLines] = {};
      const int centre = nearest(wish.scale * by_d, least, largest);
      if (with_minimums()) {
        for (int i = 0; i < 15; ++i) {
          scales[i] = std::clamp(centre + i / 3 - 2, 0, largest);
          const float minimum = b.d * static_cast<float>(scales[i]) * wish.mean_code - wish.mean;
          minimums[i] = std::clamp(nearest(minimum * by_m, 0, largest) + i % 3 - 1, 0, largest);
        }
        scales[15] = given ? b.of.scale[r] : 0;
        minimums[15] = given ? b.of.minimum[r] : nearest(-wish.mean * by_m, 0, largest);
      } else {
        const int other = nearest(wish.other * by_d, least, largest);
        for (int i = 0; i < 8; ++i) {
          scales[i] = std::clamp(centre + i - 4, least, largest);
          scales[8 + i] = std::clamp(other + i - 4, least, largest);
        }
        if (given) scales[8] = b.of.scale[r];
      }
      GgufLines lines{};
      for (int i = 0; i < kGgufLines; ++i) {
        const Line line = line_of(b, scales[i], minimums[i]);
        lines.scale[i] = line.scale, lines.offset[i] = line.offset;
      }
      float errors[kGgufLines];
      kernels().gguf_errors(run(r), lines, errors);
      const auto at = std::min_element(errors, errors + kGgufLines) - errors;
      b.of.scale[r] = scales[at], b.of.minimum[r] = minimums[at];
      b.errors[r] = errors[at];
      b.error += static_cast<double>(errors[at]);
    }
  }

  // Solves for d and dmin with the codes and multiples that the block has, chooses the multiples anew, and
  // so on while that makes the error smaller.
  void improve(Block& best) {
    for (int turn = 0; turn < kTurns; ++turn) {
      Block next = best;
      solve(next);
      select(next, true);
      if (!(next.error < best.error)) break;
      best = next;
    }
  }

  void solve(Block& b) {
    double uu = 0, uv = 0, vv = 0, ux = 0, vx = 0;
    for (int r = 0; r < layout_.runs(); ++r) {
      const GgufRun of = run(r);
      const Line line = line_of(b, r);
      uint8_t codes[32];
      kernels().gguf_codes(of, line.scale, line.offset, codes);
      double w = 0, wq = 0, wqq = 0, wx = 0, wxq = 0;
      for (int i = 0; i < of.n; ++i) {
        const double weight = of.weights[i], q = codes[i] - layout_.zero, x = of.x[i];
        w += weight, wq += weight * q, wqq += weight * q * q, wx += weight * x, wxq += weight * x * q;
      }
      const double s = b.of.scale[r], t = -b.of.minimum[r];
      uu += s * s * wqq, uv += s * t * wq, vv += t * t * w, ux += s * wxq, vx += t * wx;
      if (!with_minimums()) {
        if (wqq > 0) wish_[r].scale = static_cast<float>(wxq / wqq);
        continue;
      }
      const double determinant = w * wqq - wq * wq;
      if (!(determinant > 1e-9 * w * wqq)) continue;
      const double scale = (w * wxq - wx * wq) / determinant;
      wish_[r] = {static_cast<float>(scale), 0, static_cast<float>(wq / w), static_cast<float>(wx / w), 0};
    }
    const double determinant = uu * vv - uv * uv;
    if (determinant > 1e-9 * uu * vv) {
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

  static constexpr float kImportant = 1e-3f;
  static constexpr int kScaleSteps = 2, kLineSteps = 3, kLineParts = 2, kTurns = 6;
  static constexpr float kScaleStarts[] = {1.0f, 0.96f, 0.92f, 1.05f, 1.1f};
  static constexpr float kMinimumStarts[] = {1.0f, 0.95f, 1.05f};

  const GgufLayout& layout_;
  float levels_, low_, high_;
  const float* x_ = nullptr;
  std::array<float, kGgufMostNumbers> weights_{};
  std::array<uint8_t, kGgufMostNumbers> codes_{};
  Wish wish_[kGgufMostRuns] = {};
  Block block_{};
};

}  // namespace quantrature
