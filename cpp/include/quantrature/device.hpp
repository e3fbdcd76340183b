/// \defgroup device Data on devices other than the CPU
///
/// Ops on devices other than the CPU.
///
/// The device field of an argument struct says where the data of a call lies. All arrays are then in the
/// memory of that device, except what is few numbers for the caller to look at, which goes to the memory of
/// the host: the results of moments, pqi_sum and gptq, and the counts of topk; the structs of matrices are
/// read on the host, and so are the Hessian of gptq, whose factor is found there, and the order and pivots of
/// a given factor. Work is queued on the stream of the call. Ops that write such numbers, or look at the data
/// before they accept it (topk, extract_outliers, pack, quantize, residuals, kmeans, trellis_quantize, gptq),
/// wait for the stream; the others return when the work is queued.
///
/// Numeric classes are those of each op's header. E: the same bits as on the CPU. L: the same bits from run
/// to run, and within 1e-12 relative of the CPU. B: within the same bound.
///
/// The CUDA backend is a shared library, found when it is first needed: QUANTRATURE_CUDA_PLUGIN if that is
/// set, else libquantrature_cuda.so beside the core, else where the system's loader looks.
#pragma once

#include <string>

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup device
/// \{

/// qtr_device under its C++ name.
using Device = qtr_device;

/// How many CUDA devices can be used. With none, why not has the reason where it is not null. Does not throw.
QTR_API int cuda_device_count(std::string* why_not = nullptr);

/// \}

}  // namespace quantrature
