#include "quantrature/c_api.h"

#include <cstring>
#include <string>

#include "common/check.hpp"
#include "quantrature/allocation.hpp"
#include "quantrature/codebook.hpp"
#include "quantrature/gguf.hpp"
#include "quantrature/gptq.hpp"
#include "quantrature/grid.hpp"
#include "quantrature/hadamard.hpp"
#include "quantrature/hessian.hpp"
#include "quantrature/integral.hpp"
#include "quantrature/kmeans.hpp"
#include "quantrature/matvec.hpp"
#include "quantrature/moments.hpp"
#include "quantrature/outliers.hpp"
#include "quantrature/packing.hpp"
#include "quantrature/runtime.hpp"
#include "quantrature/topk.hpp"
#include "quantrature/trellis.hpp"
#include "quantrature/viterbi.hpp"
#include "runtime/log.hpp"

namespace quantrature {
namespace {

thread_local std::string last_error;

// Runs body and turns what it throws into a status; nothing is thrown across the C boundary.
template <class Body>
qtr_status guard(Body&& body) noexcept {
  const auto failed = [](qtr_status status, const char* text) {
    try {
      last_error = text;
    } catch (...) {
      last_error.clear();
    }
    log(QTR_LOG_ERROR, text);
    return status;
  };
  try {
    body();
    last_error.clear();
    return QTR_OK;
  } catch (const InvalidArgument& e) {
    return failed(QTR_INVALID_ARGUMENT, e.what());
  } catch (const Unsupported& e) {
    return failed(QTR_UNSUPPORTED, e.what());
  } catch (const DeviceError& e) {
    return failed(QTR_DEVICE_ERROR, e.what());
  } catch (const std::exception& e) {
    return failed(QTR_INTERNAL_ERROR, e.what());
  } catch (...) {
    return failed(QTR_INTERNAL_ERROR, "unknown failure");
  }
}

constexpr size_t kLargestStruct = 4096;

// The caller's struct, whatever the version of its header: see the head of c_api.h.
template <class Args>
Args complete(const Args* args) {
  check_given(args != nullptr, "args", "args");
  const size_t size = args->struct_size;
  check(size >= sizeof(size_t) && size <= kLargestStruct,
        "[args] struct_size must be set to the size of the struct", "struct_size", size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(args);
  for (size_t i = sizeof(Args); i < size; ++i)
    if (bytes[i] != 0)
      throw Unsupported(complaint("[args] fields that this version does not know must be zero", "struct_size",
                                  size, "known", sizeof(Args), "version", version()));
  Args full{};
  std::memcpy(&full, args, size < sizeof(Args) ? size : sizeof(Args));
  return full;
}

template <class Args>
qtr_status call(void (*op)(const Args&), const Args* args) {
  return guard([&] { op(complete(args)); });
}

}  // namespace
}  // namespace quantrature

using namespace quantrature;

const char* qtr_version(void) {
  return version();
}
const char* qtr_last_error(void) {
  return last_error.c_str();
}
qtr_status qtr_set_num_threads(int32_t count) {
  return guard([&] { set_num_threads(count); });
}
int32_t qtr_get_num_threads(void) {
  return num_threads();
}
const char* qtr_get_target(void) {
  thread_local std::string name;
  name.clear();
  static_cast<void>(guard([&] { name = target(); }));
  return name.c_str();
}
qtr_status qtr_set_target(const char* name) {
  return guard([&] {
    check_given(name != nullptr, "set_target", "name");
    set_target(name);
  });
}
qtr_status qtr_set_executor(const qtr_executor* executor) {
  return guard([&] {
    if (executor == nullptr) return set_executor(nullptr);
    const qtr_executor full = complete(executor);
    set_executor(&full);
  });
}
qtr_status qtr_set_log_hook(const qtr_log_hook* hook) {
  return guard([&] {
    if (hook == nullptr) return set_log_hook(nullptr);
    const qtr_log_hook full = complete(hook);
    set_log_hook(&full);
  });
}
qtr_status qtr_compute_moments(const qtr_moments_args* args) {
  return call(compute_moments, args);
}
qtr_status qtr_pqi_accumulate(const qtr_pqi_accumulate_args* args) {
  return call(pqi_accumulate, args);
}
qtr_status qtr_pqi_finalize(const qtr_pqi_finalize_args* args) {
  return call(pqi_finalize, args);
}
qtr_status qtr_pqi_sum(const qtr_pqi_sum_args* args) {
  return call(pqi_sum, args);
}
qtr_status qtr_interpolate(const qtr_interpolate_args* args) {
  return call(interpolate, args);
}
qtr_status qtr_pack(const qtr_pack_args* args) {
  return call(pack, args);
}
qtr_status qtr_unpack(const qtr_unpack_args* args) {
  return call(unpack, args);
}
qtr_status qtr_topk(const qtr_topk_args* args) {
  return call(topk, args);
}
qtr_status qtr_extract_outliers(const qtr_outliers_args* args) {
  return call(extract_outliers, args);
}
qtr_status qtr_check_csr(const qtr_check_csr_args* args) {
  return guard([&] { check_csr(complete(args).csr); });
}
qtr_status qtr_quantize(const qtr_quantize_args* args) {
  return call(quantize, args);
}
qtr_status qtr_dequantize(const qtr_dequantize_args* args) {
  return call(dequantize, args);
}
qtr_status qtr_codebook_quantize(const qtr_codebook_quantize_args* args) {
  return call(codebook_quantize, args);
}
qtr_status qtr_codebook_dequantize(const qtr_codebook_dequantize_args* args) {
  return call(codebook_dequantize, args);
}
qtr_status qtr_round_to_half(const qtr_round_to_half_args* args) {
  return call(round_to_half, args);
}
qtr_status qtr_residuals(const qtr_residuals_args* args) {
  return call(residuals, args);
}
qtr_status qtr_matvec(const qtr_matvec_args* args) {
  return call(matvec, args);
}
qtr_status qtr_allocate(const qtr_allocate_args* args) {
  return call(allocate, args);
}
qtr_status qtr_kmeans(const qtr_kmeans_args* args) {
  return call(kmeans, args);
}
qtr_status qtr_random_signs(const qtr_random_signs_args* args) {
  return call(random_signs, args);
}
qtr_status qtr_hadamard(const qtr_hadamard_args* args) {
  return call(hadamard, args);
}
qtr_status qtr_trellis_values(const qtr_trellis_values_args* args) {
  return call(trellis_values, args);
}
qtr_status qtr_trellis_dequantize(const qtr_trellis_dequantize_args* args) {
  return call(trellis_dequantize, args);
}
qtr_status qtr_trellis_matvec(const qtr_trellis_matvec_args* args) {
  return call(trellis_matvec, args);
}
qtr_status qtr_trellis_quantize(const qtr_trellis_quantize_args* args) {
  return call(trellis_quantize, args);
}
qtr_status qtr_hessian_accumulate(const qtr_hessian_accumulate_args* args) {
  return call(hessian_accumulate, args);
}
qtr_status qtr_gptq(const qtr_gptq_args* args) {
  return call(gptq, args);
}
qtr_status qtr_gguf_quantize(const qtr_gguf_quantize_args* args) {
  return call(gguf_quantize, args);
}
qtr_status qtr_gguf_dequantize(const qtr_gguf_dequantize_args* args) {
  return call(gguf_dequantize, args);
}
