#include "ops/viterbi/cost.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {

void fill_viterbi(KernelTable& table) {
  table.viterbi_step = [](const ViterbiStep& step) { return plain_step(step); };
}

}  // namespace quantrature::reference
