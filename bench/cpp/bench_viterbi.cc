#include "bench.hpp"

namespace quantrature::bench {
namespace {

// Sequences of 256 normal numbers: the weights of two tiles and two threads' worth of work. Time divided by
// 512 is that of a weight.
int registered = [] { return 0; }();

}  // namespace
}  // namespace quantrature::bench
