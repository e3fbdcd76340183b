#include "bench.hpp"

namespace quantrature::bench {
namespace {

// Rows of a power of two, and of sizes with a factor of Paley's (12) and of cosines (43).
int registered = [] {
  for (int64_t cols : {4096, 3072, 11008})
    for_every_target("hadamard/" + std::to_string(cols), 64 * cols * 8, [=] {
      static std::vector<float> out(64 * 11008);
      hadamard({sizeof(HadamardArgs),
                {weights().data(), 64, cols, cols, QTR_F32},
                nullptr,
                0,
                {out.data(), 64, cols, cols, QTR_F32}});
    });
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
