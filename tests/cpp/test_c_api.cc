#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "quantrature/c_api.h"

namespace {

TEST(CApi, AGoodCallSucceedsAndClearsTheError) {
  const float x[3] = {1, 2, 6};
  qtr_moments out;
  qtr_moments_args args{};
  args.struct_size = sizeof(args);
  args.x = qtr_matrix{x, 1, 3, 3, QTR_F32};
  args.out = &out;
  args.out_count = 1;
  EXPECT_EQ(qtr_compute_moments(&args), QTR_OK);
  EXPECT_EQ(out.mean, 3.0);
  EXPECT_STREQ(qtr_last_error(), "");
}

TEST(CApi, ABadCallGivesACodeAndAText) {
  qtr_moments_args args{};
  args.struct_size = sizeof(args);
  EXPECT_EQ(qtr_compute_moments(&args), QTR_INVALID_ARGUMENT);
  EXPECT_NE(std::string(qtr_last_error()).find("[moments] x must not be empty"), std::string::npos);
  EXPECT_EQ(qtr_compute_moments(nullptr), QTR_INVALID_ARGUMENT);
  args.struct_size = 0;
  EXPECT_EQ(qtr_compute_moments(&args), QTR_INVALID_ARGUMENT);
  EXPECT_NE(std::string(qtr_last_error()).find("struct_size"), std::string::npos);
}

// A caller compiled against a shorter struct: what lies behind its end is not read.
TEST(CApi, FieldsBeyondTheCallersSizeReadAsZero) {
  const float x[2] = {1, 3};
  qtr_moments_args args{};
  args.struct_size = offsetof(qtr_moments_args, out);
  args.x = qtr_matrix{x, 1, 2, 2, QTR_F32};
  args.out = reinterpret_cast<qtr_moments*>(1);
  args.out_count = 1;
  EXPECT_EQ(qtr_compute_moments(&args), QTR_INVALID_ARGUMENT);
  EXPECT_NE(std::string(qtr_last_error()).find("out must hold one result"), std::string::npos);
}

TEST(CApi, Runtime) {
  EXPECT_EQ(std::count(qtr_version(), qtr_version() + std::strlen(qtr_version()), '.'), 2);
  EXPECT_EQ(qtr_set_target("nothing"), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_target(nullptr), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_target(std::string(qtr_get_target()).c_str()), QTR_OK);
  EXPECT_EQ(qtr_set_num_threads(0), QTR_INVALID_ARGUMENT);
  EXPECT_EQ(qtr_set_num_threads(qtr_get_num_threads()), QTR_OK);
  EXPECT_EQ(qtr_set_executor(nullptr), QTR_OK);
}

}  // namespace
