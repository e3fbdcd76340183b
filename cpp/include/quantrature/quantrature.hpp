/// \defgroup quantrature What holds for all operations
///
/// This header includes all others. For all operations:
///
/// Matrices that an op reads are float32, float16 or bfloat16, each on its own, unless its header names
/// dtypes; elements of 16 bits are widened to float32, which is exact. Every rounding, of results to 16 bits,
/// too, is to nearest, ties to even. NaN and infinities pass through arithmetic as in IEEE 754 unless the
/// header says that they are refused. Each header names the numeric class of its results:
///
/// - E: exact, the same bits on every CPU, with every kernel set and for every number of threads
/// - L: floating-point sums in a fixed order, element i in lane i mod 16, lanes added pairwise, chunks merged
///   in order: the same bits as well, beside a stated distance from the exact sum
/// - B: within a stated bound of the exact result
#pragma once

#include "quantrature/allocation.hpp"  // options for items under a budget
#include "quantrature/codebook.hpp"    // codes that stand for entries of a table
#include "quantrature/device.hpp"      // data on other devices than the CPU
#include "quantrature/error.hpp"       // what is thrown
#include "quantrature/gguf.hpp"        // block types of the files of llama.cpp
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
