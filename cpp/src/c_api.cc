#include "quantrature/c_api.h"

#include <cstring>
#include <string>

#include "common/check.hpp"
#include "quantrature/gptq.hpp"
#include "quantrature/grid.hpp"
#include "quantrature/hessian.hpp"
#include "quantrature/integral.hpp"
#include "quantrature/kmeans.hpp"
#include "quantrature/matvec.hpp"
#include "quantrature/moments.hpp"
#include "quantrature/outliers.hpp"
#include "quantrature/packing.hpp"
#include "quantrature/runtime.hpp"
#include "quantrature/topk.hpp"

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

// The caller's struct, with the fields that an older caller does not know as zero.
template <class Args>
Args complete(const Args* args) {
  check(args != nullptr, "[args] the argument struct must not be null");
  check(args->struct_size >= sizeof(size_t), "[args] struct_size must be set to the size of the struct",
        "struct_size", args->struct_size);
  Args full{};
  std::memcpy(&full, args, args->struct_size < sizeof(Args) ? args->struct_size : sizeof(Args));
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
    check(name != nullptr, "[set_target] name must not be null");
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
qtr_status qtr_check_csr(const qtr_csr* csr) {
  return guard([&] {
    check(csr != nullptr, "[csr] the matrix must not be null");
    check_csr(*csr);
  });
}
qtr_status qtr_quantize(const qtr_quantize_args* args) {
  return call(quantize, args);
}
qtr_status qtr_dequantize(const qtr_dequantize_args* args) {
  return call(dequantize, args);
}
qtr_status qtr_residuals(const qtr_residuals_args* args) {
  return call(residuals, args);
}
qtr_status qtr_matvec(const qtr_matvec_args* args) {
  return call(matvec, args);
}
qtr_status qtr_kmeans(const qtr_kmeans_args* args) {
  return call(kmeans, args);
}
qtr_status qtr_hessian_accumulate(const qtr_hessian_accumulate_args* args) {
  return call(hessian_accumulate, args);
}
qtr_status qtr_gptq(const qtr_gptq_args* args) {
  return call(gptq, args);
}
