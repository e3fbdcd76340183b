#include "bench.hpp"

namespace quantrature::bench {
namespace {

// One sequence of a tile, on one thread: the time divided by 256 is that of a weight.
int registered = [] {
  const auto searched = [](const char* name, const Trellis& trellis) {
    for_every_target(name, 256 * 4, [=] {
      static std::vector<uint8_t> codes(128);
      trellis_quantize({sizeof(TrellisQuantizeArgs),
                        {weights().data(), 1, 256, 256, QTR_F32},
                        trellis,
                        0.02f,
                        codes.data(),
                        256 * trellis.bits / 8});
    });
  };
  searched("viterbi/3inst/2 bits/10 state bits", {QTR_3INST, 2, 10});
  searched("viterbi/3inst/2 bits/12 state bits", {QTR_3INST, 2, 12});
  searched("viterbi/3inst/2 bits/16 state bits", {QTR_3INST, 2, 16});
  searched("viterbi/3inst/3 bits/16 state bits", {QTR_3INST, 3, 16});
  searched("viterbi/3inst/4 bits/16 state bits", {QTR_3INST, 4, 16});
  searched("viterbi/hyb/2 bits/16 state bits", {QTR_HYB, 2, 16});
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench
