/// \defgroup allocation Options for items under a budget
///
/// One option for each item, so that costs add up to the least and sizes to at most a budget: bits for the
/// matrices of a model, given what each way of storing each of them costs.
///
/// With costs c and sizes s of the options j of each item i, and one choice j(i) for each,
///
/// ```text
/// minimise  sum_i c[i, j(i)]   subject to   sum_i s[i, j(i)] <= budget,
/// ```
///
/// the multiple-choice knapsack problem. Costs are any finite doubles, sizes whole numbers of at least 0.
///
/// Options that another one of the item beats in cost and size are set aside. The linear relaxation, solved
/// along the lower convex hulls of the items (Sinha & Zoltners 1979), gives a first choice, a bound, and a
/// price of size at which options are priced out. What is left is a dynamic program over the undominated
/// partial choices, item after item, that drops those whose bound, by the relaxation of the items to come, is
/// no better than the best choice so far (Pisinger 1995).
///
/// With a relative_gap of 0 the choice is optimal, up to the rounding of sums of doubles: no choice within
/// the budget costs less than cost - 2^-40 sum_i max_j |c|. A positive relative_gap ends the search as soon
/// as the choice is proved to be within relative_gap |cost| of the least. After an item at most max_states
/// partial choices are kept, those of the least bounds; where this limit drops some that might have led to a
/// better choice, bound says how much better it could be. bound <= cost always, and no choice costs less than
/// bound, up to the same rounding.
///
/// Of equally good choices the one that is found first is taken, on one thread and in one order: numeric
/// class E. Memory: 8 bytes for each kept partial choice, at most 8 max_states items bytes.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup allocation
/// \{

/// Arguments of allocate().
using AllocateArgs = qtr_allocate_args;

/// Chooses one option for each item. Throws InvalidArgument for no items, option_offsets that do not begin
/// with 0 and rise, costs that are not finite, sizes below 0 or adding up to more than 2^62, a relative_gap
/// that is negative or not finite, a max_states below 0 or above 2^24, and a budget below the smallest
/// choice, naming the item.
QTR_API void allocate(const AllocateArgs& args);

/// \}

}  // namespace quantrature
