#include "bench.hpp"

namespace quantrature::bench {
namespace {

// One row, and as many as a task of each of two threads gets.
int registered = [] {
  for (int64_t rows : {1, 16})
    for_every_target("kmeans/16/rows " + std::to_string(rows), rows * kSide * 4, [=] {
      static std::vector<float> centroids(16 * 16);
      static std::vector<uint8_t> assignment(16 * kSide);
      kmeans({sizeof(KmeansArgs),
              {weights().data(), rows, kSide, kSide, QTR_F32},
              {},
              16,
              {centroids.data(), rows, 16, 16, QTR_F32},
              assignment.data()});
    });
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
