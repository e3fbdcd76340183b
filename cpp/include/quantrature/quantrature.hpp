// Everything, in the order in which it is best read.
#pragma once

#include "quantrature/allocation.hpp"  // options for items under a budget
#include "quantrature/codebook.hpp"    // codes that stand for entries of a table
#include "quantrature/device.hpp"      // data on other devices than the CPU
#include "quantrature/error.hpp"       // what is thrown
#include "quantrature/gptq.hpp"        // codes that make up for the errors of those before
#include "quantrature/grid.hpp"        // quantization grids: quantize, dequantize
#include "quantrature/hadamard.hpp"    // random orthogonal transforms
#include "quantrature/hessian.hpp"     // sums of x x^T
#include "quantrature/integral.hpp"    // the Post-quantization Integral
#include "quantrature/kmeans.hpp"      // centroids of numbers
#include "quantrature/matvec.hpp"      // products of a packed matrix and vectors
#include "quantrature/moments.hpp"     // mean, variance, kurtosis: the op to read first
#include "quantrature/outliers.hpp"    // dense remainder and sparse outliers
#include "quantrature/packing.hpp"     // codes of 1 to 8 bits, side by side
#include "quantrature/runtime.hpp"     // kernel sets, threads
#include "quantrature/topk.hpp"        // exact selection of the largest
#include "quantrature/trellis.hpp"     // values and products of trellis codes
#include "quantrature/types.hpp"       // dtypes and matrices
#include "quantrature/viterbi.hpp"     // the best trellis codes for given numbers
