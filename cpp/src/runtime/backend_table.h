/* What a backend for devices is to the core: a shared library with the function qtr_backend_query, which
 * gives a table of functions over the argument structs of c_api.h. The core has checked the arguments, all
 * but the numbers that lie on the device; pointers are to memory of the device, except where device.hpp says
 * that results go to the host.
 *
 * A function returns QTR_OK, or another status and a text in message; nothing is thrown out of it.
 */
#ifndef QUANTRATURE_RUNTIME_BACKEND_TABLE_H
#define QUANTRATURE_RUNTIME_BACKEND_TABLE_H

#include "quantrature/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QTR_BACKEND_ABI 2

typedef struct qtr_failure {
  char message[512];
} qtr_failure;

/* gptq once the Hessian has been factored; what is beside `of` lies in the memory of the host. */
typedef struct qtr_gptq_columns_args {
  qtr_gptq_args of;    /* but for hessian, damp and ordered; scale and zero in one row */
  const float* panels; /* NULL where `of` has the factor. A: panel p has rows j < 8 (p + 1) of columns k = 8 p
                        * to 8 p + 7 */
  const int64_t* order; /* the column that is taken at each place */
  const double* pivots; /* R_kk squared */
  qtr_device device;    /* as of `of` */
} qtr_gptq_columns_args;

/* Every op of the table: its name in c_api.h, qtr_<name>_args, or above. */
#define QTR_BACKEND_OPS(OP) \
  OP(moments)               \
  OP(pqi_accumulate)        \
  OP(pqi_finalize)          \
  OP(pqi_sum)               \
  OP(interpolate)           \
  OP(pack)                  \
  OP(unpack)                \
  OP(topk)                  \
  OP(outliers)              \
  OP(quantize)              \
  OP(dequantize)            \
  OP(residuals)             \
  OP(matvec)                \
  OP(codebook_quantize)     \
  OP(codebook_dequantize)   \
  OP(hadamard)              \
  OP(trellis_dequantize)    \
  OP(trellis_matvec)        \
  OP(trellis_quantize)      \
  OP(kmeans)                \
  OP(gptq_columns)

typedef struct qtr_backend {
  uint32_t abi;
  const char* version; /* of quantrature */
  /* How many devices there are; with none, why. */
  int32_t (*device_count)(qtr_failure* why);
#define QTR_BACKEND_OP(name) qtr_status (*name)(const qtr_##name##_args*, qtr_failure*);
  QTR_BACKEND_OPS(QTR_BACKEND_OP)
#undef QTR_BACKEND_OP
} qtr_backend;

/* NULL for an ABI that the library does not have. */
typedef const qtr_backend* (*qtr_backend_query_function)(uint32_t abi);

#ifdef __cplusplus
}
#endif

#endif
