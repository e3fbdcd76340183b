// The allocation of options under a budget: what is accepted is within the budget, and no better than its
// bound.
#include <cmath>

#include "arguments.hpp"

using fuzz::accepted;
using fuzz::Arguments;
using fuzz::call;
using fuzz::expect;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Arguments in(data, size);
  const int64_t items = in.within<int64_t>(0, 12), options = in.within<int64_t>(0, 60);
  int64_t* offsets = in.array<int64_t>(items + 1);
  const bool regular = in.coin();
  for (int64_t i = 0; i <= items; ++i) {  // an array has an end, which the offsets must not pass
    if (regular) offsets[i] = items > 0 ? options * i / items : 0;
    if (offsets[i] > options) offsets[i] = options;
  }
  double* costs = in.array<double>(options);
  int64_t* sizes = in.array<int64_t>(options);
  if (in.coin())
    for (int64_t i = 0; i < options; ++i) {
      costs[i] = in.any<int16_t>() / 8.0;
      sizes[i] = in.any<uint8_t>();
    }
  double cost = 0, bound = 0;
  int64_t total = 0;
  qtr_allocate_args args{};
  args.costs = costs;
  args.sizes = sizes;
  args.option_offsets = offsets;
  args.items = items;
  args.budget = in.coin() ? in.any<uint16_t>() : in.any<int64_t>();
  args.relative_gap = in.within(0, 7) == 0 ? std::nan("") : in.any<uint8_t>() / 4096.0;
  args.max_states = in.coin() ? 0 : in.any<int8_t>();
  args.chosen = in.array<int64_t>(items);
  args.cost = &cost;
  args.size = &total;
  args.bound = &bound;
  if (!accepted(call(qtr_allocate, args, in)) || args.struct_size < sizeof(args)) return 0;
  expect(total <= args.budget, "the budget is exceeded");
  expect(bound <= cost, "the choice is better than its bound");
  for (int64_t i = 0; i < items; ++i)
    expect(args.chosen[i] >= 0 && args.chosen[i] < offsets[i + 1] - offsets[i], "an option that is none");
  return 0;
}
