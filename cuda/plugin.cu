// The one symbol that the shared library exports.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

#include "backend.cuh"
#include "launch.cuh"

namespace quantrature::cuda {
namespace {

template <class Args>
qtr_status guarded(void (*op)(const Args&), const char* name, const Args* args,
                   qtr_failure* failure) noexcept {
  const auto failed = [&](qtr_status status, const char* prefix, const char* what) {
    std::snprintf(failure->message, sizeof(failure->message), "%s%s%s%s", prefix, *prefix ? name : "",
                  *prefix ? "] " : "", what);
    return status;
  };
  try {
    const CurrentDevice device(args->device.ordinal);
    op(*args);
    return QTR_OK;
  } catch (const Refused& e) {
    return failed(QTR_INVALID_ARGUMENT, "", e.what());
  } catch (const std::exception& e) {
    return failed(QTR_DEVICE_ERROR, "[", e.what());
  } catch (...) {
    return failed(QTR_INTERNAL_ERROR, "[", "unknown failure");
  }
}

int32_t device_count(qtr_failure* why) noexcept {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    std::snprintf(why->message, sizeof(why->message), "%s", cudaGetErrorString(error));
    return 0;
  }
  if (count == 0) std::snprintf(why->message, sizeof(why->message), "the driver reports no device");
  return count;
}

#define QTR_BACKEND_OP(name)                                                            \
  qtr_status run_##name(const qtr_##name##_args* args, qtr_failure* failure) noexcept { \
    return guarded(&name, #name, args, failure);                                        \
  }
QTR_BACKEND_OPS(QTR_BACKEND_OP)
#undef QTR_BACKEND_OP

const qtr_backend kBackend = {QTR_BACKEND_ABI, QUANTRATURE_VERSION, &device_count,
#define QTR_BACKEND_OP(name) &run_##name,
                              QTR_BACKEND_OPS(QTR_BACKEND_OP)
#undef QTR_BACKEND_OP
};

}  // namespace
}  // namespace quantrature::cuda

extern "C" __attribute__((visibility("default"))) const qtr_backend* qtr_backend_query(uint32_t abi) {
  return abi == QTR_BACKEND_ABI ? &quantrature::cuda::kBackend : nullptr;
}
