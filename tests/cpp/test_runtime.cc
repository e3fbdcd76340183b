#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "quantrature/quantrature.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {
namespace {

TEST(Runtime, ReferenceIsAlwaysThereAndFirst) {
  ASSERT_FALSE(available_targets().empty());
  EXPECT_EQ(available_targets().front(), "reference");
}

TEST(Runtime, EveryTargetHasEveryKernel) {
  // kernels.inc says why a target may lack these.
  const std::set<std::string> optional = {"matvec_blocks", "matvec_split", "matvec_bytes", "matvec_tables"};
  const std::string before = target();
  for (const std::string& name : available_targets()) {
    set_target(name);
    EXPECT_EQ(target(), name);
#define QUANTRATURE_OP(op)
#define QUANTRATURE_KERNEL(kernel, ...) \
  EXPECT_TRUE(kernels().kernel != nullptr || optional.count(#kernel) == 1) << #kernel << " on " << name;
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP
  }
  set_target(before);
}

TEST(Runtime, AnUnknownTargetIsAnErrorThatListsTheKnownOnes) {
  const std::string before = target();
  try {
    set_target("AVX99");
    FAIL() << "accepted";
  } catch (const InvalidArgument& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("AVX99"), std::string::npos);
    EXPECT_NE(message.find("reference"), std::string::npos);
  }
  EXPECT_EQ(target(), before);
}

}  // namespace
}  // namespace quantrature
