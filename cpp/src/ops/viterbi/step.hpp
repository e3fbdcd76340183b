// What the kernel of viterbi.hpp is called with.
#pragma once

#include <cstdint>

namespace quantrature {

// Overlaps that a vector of costs may have; values are laid out for it.
inline constexpr int kViterbiBlock = 32;

// A step from costs to the next costs. The state that begins with step_bits bits j and goes on with the
// overlap u is number (j << overlap_bits) + u.
struct ViterbiStep {
  int overlap_bits;
  int step_bits;
  int per_step;
  const int16_t* values[2];  // of all states, of the sign that x had, in the order of viterbi_place
  int16_t x[2];              // magnitudes
  const uint16_t* from;      // 2^overlap_bits costs, with room for kViterbiBlock more
  uint16_t* to;
  uint16_t common;  // subtracted from every cost
};

// Where the value of a state lies: in the order in which they are read, blocks of overlaps of all j, then of
// all weights of a step; values[v] begins v blocks late.
inline uint32_t viterbi_place(const ViterbiStep& s, uint32_t j, uint32_t u) {
  const uint32_t block = s.overlap_bits < 5 ? 1u << s.overlap_bits : uint32_t{kViterbiBlock};
  return (((u / block) << s.step_bits) + j) * static_cast<uint32_t>(s.per_step) * block + u % block;
}

}  // namespace quantrature
