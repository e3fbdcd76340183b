#include "quantrature/allocation.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "common/check.hpp"

namespace quantrature {
namespace {

constexpr int64_t kDefaultStates = 1 << 16;
constexpr int64_t kMostStates = 1 << 24;
constexpr int64_t kLargestSum = int64_t{1} << 62;
constexpr double kRounding = 0x1p-40;  // of the sum of the largest costs: what counts as no difference

struct Option {
  double cost;
  int64_t extra;  // size above that of the smallest option of the item
  int64_t index;  // among the options as they were given
};

// Sizes ascend and costs descend.
struct Item {
  int64_t index;
  std::vector<Option> options;
};

// From one corner of the hull of an item to the next: the cost falls by slope for each unit of size.
struct Step {
  size_t item;
  size_t to;  // option
  int64_t extra;
  double cost;
  double slope;
};

Item undominated(const AllocateArgs& a, int64_t i) {
  const int64_t begin = a.option_offsets[i], end = a.option_offsets[i + 1];
  std::vector<Option> sorted;
  for (int64_t j = begin; j < end; ++j) sorted.push_back({a.costs[j], a.sizes[j], j - begin});
  std::sort(sorted.begin(), sorted.end(), [](const Option& x, const Option& y) {
    if (x.extra != y.extra) return x.extra < y.extra;
    return x.cost != y.cost ? x.cost < y.cost : x.index < y.index;
  });
  Item item{i, {}};
  const int64_t least = sorted.front().extra;
  for (const Option& option : sorted)
    if (item.options.empty() || option.cost < item.options.back().cost)
      item.options.push_back({option.cost, option.extra - least, option.index});
  return item;
}

// The steps of all items from number `first` on, the steepest first; those of an item keep their order.
std::vector<Step> hull_steps(const std::vector<Item>& items, size_t first) {
  std::vector<Step> steps;
  for (size_t i = first; i < items.size(); ++i) {
    const std::vector<Option>& options = items[i].options;
    const size_t start = steps.size();
    for (size_t j = 1; j < options.size(); ++j) {
      Step step{i, j, 0, 0, 0};
      for (;;) {
        const Option& from = options[steps.size() > start ? steps.back().to : 0];
        step.extra = options[j].extra - from.extra;
        step.cost = options[j].cost - from.cost;
        step.slope = step.cost / static_cast<double>(step.extra);
        if (steps.size() == start || steps.back().slope < step.slope) break;
        steps.pop_back();
      }
      steps.push_back(step);
    }
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& x, const Step& y) { return x.slope < y.slope; });
  return steps;
}

struct Origin {
  int32_t parent;  // among the states kept after the item before
  int32_t option;
};

// A partial choice, and how it came about.
struct State {
  int64_t extra;
  double cost;
  Origin origin;
};

class Search {
 public:
  Search(std::vector<Item> items, int64_t room, double relative_gap, double rounding, int64_t max_states)
      : items_(std::move(items)),
        room_(room),
        relative_gap_(relative_gap),
        rounding_(rounding),
        max_states_(static_cast<size_t>(max_states)) {}

  // Leaves in chosen() an option for each item, and in bound() what no choice costs less than.
  void run() {
    fixed_.resize(items_.size(), 0);
    relax();
    if (optimal()) return;
    price_out();
    if (!items_.empty()) explore();
  }

  double bound() const { return std::min(best_, bound_); }

  // Pairs of item and option index as they were given.
  std::vector<std::pair<int64_t, int64_t>> chosen() const {
    std::vector<std::pair<int64_t, int64_t>> pairs = settled_;
    for (size_t i = 0; i < items_.size(); ++i)
      pairs.emplace_back(items_[i].index, items_[i].options[fixed_[i]].index);
    return pairs;
  }

 private:
  double goal() const { return best_ - std::max(rounding_, relative_gap_ * std::abs(best_)); }
  bool optimal() const { return bound_ >= goal(); }

  // The linear relaxation, and a first choice from it.
  void relax() {
    const std::vector<Step> steps = hull_steps(items_, 0);
    double cost = 0;
    for (const Item& item : items_) cost += item.options[0].cost;
    int64_t left = room_;
    size_t next = 0;
    for (; next < steps.size() && steps[next].extra <= left; ++next) {
      cost += steps[next].cost;
      left -= steps[next].extra;
      fixed_[steps[next].item] = steps[next].to;
    }
    price_ = next < steps.size() ? -steps[next].slope : 0;
    bound_ = cost - price_ * static_cast<double>(left);
    best_ = cost - improve(left);
  }

  // Takes the best single change that still fits, while there is one; says how much was gained.
  double improve(int64_t left) {
    double total = 0;
    for (;;) {
      double gain = 0;
      size_t which = 0, to = 0;
      for (size_t i = 0; i < items_.size(); ++i) {
        const std::vector<Option>& options = items_[i].options;
        const Option& now = options[fixed_[i]];
        // Costs descend: the largest that fits is the best.
        size_t j = options.size() - 1;
        while (options[j].extra - now.extra > left) --j;
        if (now.cost - options[j].cost > gain) {
          gain = now.cost - options[j].cost;
          which = i;
          to = j;
        }
      }
      if (gain <= 0) return total;
      left -= items_[which].options[to].extra - items_[which].options[fixed_[which]].extra;
      fixed_[which] = to;
      total += gain;
    }
  }

  // Options that cost too much at the price of the relaxation cannot be part of a better choice. Items with
  // one option left are settled; of the others those with the dearest alternatives come first.
  void price_out() {
    std::vector<std::pair<double, size_t>> order;
    std::vector<Item> open;
    std::vector<size_t> open_choice;
    for (size_t i = 0; i < items_.size(); ++i) {
      const std::vector<Option>& options = items_[i].options;
      const auto priced = [&](const Option& o) { return o.cost + price_ * static_cast<double>(o.extra); };
      double least = std::numeric_limits<double>::infinity();
      for (const Option& o : options) least = std::min(least, priced(o));
      Item kept{items_[i].index, {}};
      double nearest = std::numeric_limits<double>::infinity();
      size_t choice = 0;
      for (size_t j = 0; j < options.size(); ++j) {
        const double dearer = priced(options[j]) - least;
        // The choice so far stays within reach, so that it can be told from the items alone.
        if (j == fixed_[i])
          choice = kept.options.size();
        else if (bound_ + dearer >= goal()) {
          excluded(bound_ + dearer);
          continue;
        }
        if (dearer > 0) nearest = std::min(nearest, dearer);
        kept.options.push_back(options[j]);
      }
      if (kept.options.size() == 1) {
        settled_.emplace_back(kept.index, kept.options[0].index);
        settled_cost_ += kept.options[0].cost;
        room_ -= kept.options[0].extra;
      } else {
        const int64_t base = kept.options[0].extra;
        room_ -= base;
        for (Option& option : kept.options) option.extra -= base;
        order.emplace_back(nearest, open.size());
        open.push_back(std::move(kept));
        open_choice.push_back(choice);
      }
    }
    std::stable_sort(order.begin(), order.end(),
                     [](const auto& x, const auto& y) { return x.first > y.first; });
    items_.clear();
    fixed_.clear();
    for (const auto& [nearest, i] : order) {
      items_.push_back(std::move(open[i]));
      fixed_.push_back(open_choice[i]);
    }
    bound_ = excluded_;  // what is left is searched; explore() adds what it drops
  }

  void excluded(double bound) { excluded_ = std::min(excluded_, bound); }

  void explore() {
    std::vector<std::vector<Origin>> origins;
    std::vector<State> states{{0, settled_cost_, {-1, -1}}};
    std::vector<double> bounds;
    bool found = false;
    size_t found_depth = 0, found_steps = 0;
    Origin found_origin{-1, -1};
    for (size_t depth = 0;; ++depth) {
      // What the items to come can bring, for each amount of room: whole steps, then a part of the next one.
      const std::vector<Step> steps = hull_steps(items_, depth);
      std::vector<int64_t> sizes{0};
      std::vector<double> costs{0};
      for (size_t i = depth; i < items_.size(); ++i) costs[0] += items_[i].options[0].cost;
      for (const Step& step : steps) {
        sizes.push_back(sizes.back() + step.extra);
        costs.push_back(costs.back() + step.cost);
      }
      size_t taken = steps.size();
      bounds.clear();
      for (const State& state : states) {
        const int64_t left = room_ - state.extra;
        while (sizes[taken] > left) --taken;
        const double whole = state.cost + costs[taken];
        if (whole < best_ - rounding_) {
          best_ = whole;
          found = true;
          found_depth = depth;
          found_origin = state.origin;
          found_steps = taken;
        }
        const auto part = static_cast<double>(left - sizes[taken]);
        bounds.push_back(taken < steps.size() ? whole + part * steps[taken].slope : whole);
      }
      const std::vector<size_t> kept = keep(bounds);
      if (kept.empty()) break;  // at the latest behind the last item, where bounds are costs
      origins.emplace_back();
      for (size_t k = 0; k < kept.size(); ++k) {
        states[k] = states[kept[k]];
        origins.back().push_back(states[k].origin);
      }
      states.resize(kept.size());
      states = extended(states, items_[depth]);
    }
    bound_ = excluded_;
    if (!found) return;
    for (size_t i = found_depth; i < items_.size(); ++i) fixed_[i] = 0;
    const std::vector<Step> steps = hull_steps(items_, found_depth);
    for (size_t k = 0; k < found_steps; ++k) fixed_[steps[k].item] = steps[k].to;
    for (size_t depth = found_depth; depth > 0; --depth) {
      fixed_[depth - 1] = static_cast<size_t>(found_origin.option);
      found_origin = origins[depth - 1][static_cast<size_t>(found_origin.parent)];
    }
  }

  // Numbers of the states that may lead to a better choice, the most promising max_states of them.
  std::vector<size_t> keep(const std::vector<double>& bounds) {
    std::vector<size_t> kept;
    for (size_t s = 0; s < bounds.size(); ++s) {
      if (bounds[s] < goal())
        kept.push_back(s);
      else
        excluded(bounds[s]);
    }
    if (kept.size() > max_states_) {
      const auto at = kept.begin() + static_cast<std::ptrdiff_t>(max_states_);
      std::nth_element(kept.begin(), at, kept.end(), [&](size_t x, size_t y) {
        return bounds[x] != bounds[y] ? bounds[x] < bounds[y] : x < y;
      });
      for (auto i = at; i != kept.end(); ++i) excluded(bounds[*i]);
      kept.erase(at, kept.end());
      std::sort(kept.begin(), kept.end());
    }
    return kept;
  }

  // Each of the states with each option of one more item, without those that another one beats.
  std::vector<State> extended(const std::vector<State>& states, const Item& item) const {
    std::vector<State> all;
    for (size_t j = 0; j < item.options.size(); ++j) {
      const Option& option = item.options[j];
      const auto middle = static_cast<std::ptrdiff_t>(all.size());
      for (size_t s = 0; s < states.size() && states[s].extra <= room_ - option.extra; ++s)
        all.push_back({states[s].extra + option.extra,
                       states[s].cost + option.cost,
                       {static_cast<int32_t>(s), static_cast<int32_t>(j)}});
      // Stable: of equals the one with the lower option and the lower state comes first.
      std::inplace_merge(all.begin(), all.begin() + middle, all.end(), [](const State& x, const State& y) {
        return x.extra != y.extra ? x.extra < y.extra : x.cost < y.cost;
      });
    }
    std::vector<State> best;
    for (const State& state : all)
      if (best.empty() || state.cost < best.back().cost) best.push_back(state);
    return best;
  }

  std::vector<Item> items_;
  int64_t room_;
  double relative_gap_;
  double rounding_;
  size_t max_states_;
  std::vector<size_t> fixed_;  // the option of each item in the best choice so far
  std::vector<std::pair<int64_t, int64_t>> settled_;
  double settled_cost_ = 0;
  double price_ = 0;
  double best_ = 0;
  double bound_ = 0;
  double excluded_ = std::numeric_limits<double>::infinity();
};

int64_t checked_least(const AllocateArgs& a) {
  check(a.items > 0, "[allocate] items must be at least 1", "items", a.items);
  check_given(a.costs != nullptr, "allocate", "costs");
  check_given(a.sizes != nullptr, "allocate", "sizes");
  check_given(a.option_offsets != nullptr, "allocate", "option_offsets");
  check_given(a.chosen != nullptr, "allocate", "chosen");
  check(a.relative_gap >= 0 && std::isfinite(a.relative_gap),
        "[allocate] relative_gap must be finite and at least 0", "relative_gap", a.relative_gap);
  check(a.max_states >= 0 && a.max_states <= kMostStates, "[allocate] max_states must be 0 to 2^24",
        "max_states", a.max_states);
  check(a.option_offsets[0] == 0, "[allocate] option_offsets must begin with 0", "option_offsets[0]",
        a.option_offsets[0]);
  int64_t least = 0, most = 0;
  for (int64_t i = 0; i < a.items; ++i) {
    const int64_t begin = a.option_offsets[i], end = a.option_offsets[i + 1];
    check(begin < end && end - begin <= INT32_MAX,
          "[allocate] option_offsets must rise, since each item has an option", "item", i, "from", begin,
          "to", end);
    int64_t smallest = a.sizes[begin], largest = a.sizes[begin];
    for (int64_t j = begin; j < end; ++j) {
      check(std::isfinite(a.costs[j]), "[allocate] costs must be finite", "item", i, "option", j - begin,
            "cost", a.costs[j]);
      check(a.sizes[j] >= 0, "[allocate] sizes must be at least 0", "item", i, "option", j - begin, "size",
            a.sizes[j]);
      smallest = std::min(smallest, a.sizes[j]);
      largest = std::max(largest, a.sizes[j]);
    }
    check(largest <= kLargestSum - most, "[allocate] sizes must add up to at most 2^62", "item", i, "size",
          largest);
    least += smallest;
    most += largest;
  }
  check(least <= a.budget, "[allocate] the smallest choice must be within the budget", "smallest", least,
        "budget", a.budget);
  return least;
}

}  // namespace

void allocate(const AllocateArgs& a) {
  const int64_t least = checked_least(a);
  std::vector<Item> items;
  double largest = 0;
  for (int64_t i = 0; i < a.items; ++i) {
    items.push_back(undominated(a, i));
    largest +=
        std::max(std::abs(items.back().options.front().cost), std::abs(items.back().options.back().cost));
  }
  check(std::isfinite(4 * largest), "[allocate] costs must add up to a finite number", "sum", largest);
  Search search(std::move(items), a.budget - least, a.relative_gap, kRounding * largest,
                a.max_states == 0 ? kDefaultStates : a.max_states);
  search.run();
  for (const auto& [item, option] : search.chosen()) a.chosen[item] = option;
  double cost = 0;
  int64_t size = 0;
  for (int64_t i = 0; i < a.items; ++i) {
    cost += a.costs[a.option_offsets[i] + a.chosen[i]];
    size += a.sizes[a.option_offsets[i] + a.chosen[i]];
  }
  if (a.cost != nullptr) *a.cost = cost;
  if (a.size != nullptr) *a.size = size;
  if (a.bound != nullptr) *a.bound = std::min(cost, search.bound());
}

}  // namespace quantrature
