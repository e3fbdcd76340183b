/* The C interface, C99. One argument struct per op, shared by the C functions below, the C++ functions of the
 * <op>.hpp headers and the kernels; the contract of each op (formula, shapes, rounding, ties, NaN) is in its
 * header.
 *
 * Every argument struct begins with struct_size, which the caller sets to sizeof(the struct): later versions
 * append fields, and fields beyond the caller's size read as zero. Every function returns a status; on
 * failure qtr_last_error() has the text for the calling thread, and outputs are unspecified. Outputs are
 * allocated by the caller, and nothing is kept after a call returns. All functions may be called from several
 * threads at once.
 */
#ifndef QUANTRATURE_C_API_H
#define QUANTRATURE_C_API_H

#include <stddef.h>
#include <stdint.h>

#include "quantrature/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qtr_status {
  QTR_OK = 0,
  QTR_INVALID_ARGUMENT = 1,
  QTR_UNSUPPORTED = 2,
  QTR_DEVICE_ERROR = 3,
  QTR_INTERNAL_ERROR = 4
} qtr_status;

typedef enum qtr_dtype { QTR_F32 = 0, QTR_F16 = 1, QTR_BF16 = 2 } qtr_dtype;

/* A row-major matrix that an op reads; row_stride counts elements. */
typedef struct qtr_matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  qtr_dtype dtype;
} qtr_matrix;

/* The same, for an op to write. */
typedef struct qtr_mutable_matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  qtr_dtype dtype;
} qtr_mutable_matrix;

typedef enum qtr_device_kind { QTR_CPU = 0, QTR_CUDA = 1 } qtr_device_kind;

/* Where the data of a call lies and its work is done; all zero: on the CPU. See device.hpp. */
typedef struct qtr_device {
  qtr_device_kind kind;
  int32_t ordinal;
  void* stream; /* a cudaStream_t; NULL: the default stream of the device */
} qtr_device;

/* ---- runtime (runtime.hpp) ---- */

/* "MAJOR.MINOR.PATCH" */
QTR_API const char* qtr_version(void);
/* The text of the last failure on the calling thread, "" when there was none. Valid until the next call. */
QTR_API const char* qtr_last_error(void);
QTR_API qtr_status qtr_set_num_threads(int32_t count);
QTR_API int32_t qtr_get_num_threads(void);
QTR_API qtr_status qtr_set_target(const char* name);
QTR_API const char* qtr_get_target(void);

/* A thread pool of the embedding program. run must call task(task_context, i) once for every i in [0, count),
 * on any threads, and return when all calls have returned. */
typedef struct qtr_executor {
  size_t struct_size;
  void* context;
  int32_t concurrency;
  void (*run)(void* context, int64_t count, void (*task)(void* task_context, int64_t index),
              void* task_context);
} qtr_executor;

/* Replaces the built-in pool; NULL brings it back. The struct is copied. Not while ops are running. */
QTR_API qtr_status qtr_set_executor(const qtr_executor* executor);

/* ---- moments (moments.hpp) ---- */

/* Count, mean, sums of the second to fourth power of the distance to the mean, and extremes of a set of
 * numbers. */
typedef struct qtr_moments {
  double count;
  double mean;
  double m2;
  double m3;
  double m4;
  double minimum;
  double maximum;
} qtr_moments;

typedef enum qtr_moments_over {
  QTR_OVER_TENSOR = 0,
  QTR_OVER_ROWS = 1,
  QTR_OVER_COLUMNS = 2
} qtr_moments_over;

typedef struct qtr_moments_args {
  size_t struct_size;
  qtr_matrix x;
  qtr_moments_over over;
  int64_t group_size; /* along each row or column; -1: the whole of it; ignored over the tensor */
  qtr_moments* out;
  int64_t out_count;
  qtr_device device;
} qtr_moments_args;

QTR_API qtr_status qtr_compute_moments(const qtr_moments_args* args);

/* ---- integral (integral.hpp) ---- */

typedef struct qtr_pqi_accumulate_args {
  size_t struct_size;
  qtr_mutable_matrix acc; /* float32, read and written */
  qtr_matrix grad;
  double weight;
  qtr_device device;
} qtr_pqi_accumulate_args;

typedef struct qtr_pqi_finalize_args {
  size_t struct_size;
  qtr_matrix acc; /* float32 */
  qtr_matrix w;
  qtr_matrix w_quantized;
  int32_t keep_sign;      /* 0: the absolute value */
  qtr_mutable_matrix out; /* float32; may be acc */
  qtr_device device;
} qtr_pqi_finalize_args;

typedef struct qtr_pqi_sum_args {
  size_t struct_size;
  qtr_matrix acc; /* float32 */
  qtr_matrix w;
  qtr_matrix w_quantized;
  double* out;
  qtr_device device;
} qtr_pqi_sum_args;

typedef struct qtr_interpolate_args {
  size_t struct_size;
  qtr_matrix w;
  qtr_matrix w_quantized;
  double t;
  qtr_mutable_matrix out; /* may be w or w_quantized */
  qtr_device device;
} qtr_interpolate_args;

QTR_API qtr_status qtr_pqi_accumulate(const qtr_pqi_accumulate_args* args);
QTR_API qtr_status qtr_pqi_finalize(const qtr_pqi_finalize_args* args);
QTR_API qtr_status qtr_pqi_sum(const qtr_pqi_sum_args* args);
QTR_API qtr_status qtr_interpolate(const qtr_interpolate_args* args);

/* ---- packing (packing.hpp) ---- */

typedef struct qtr_pack_args {
  size_t struct_size;
  const uint8_t* codes;
  int64_t rows;
  int64_t cols;
  int64_t row_stride; /* bytes between rows of codes */
  int32_t bits;
  uint8_t* packed;   /* rows side by side */
  int64_t row_bytes; /* of packed */
  qtr_device device;
} qtr_pack_args;

typedef struct qtr_unpack_args {
  size_t struct_size;
  const uint8_t* packed;
  int64_t rows;
  int64_t row_bytes;
  int32_t bits;
  uint8_t* codes;
  int64_t cols;
  int64_t row_stride; /* bytes between rows of codes */
  qtr_device device;
} qtr_unpack_args;

QTR_API qtr_status qtr_pack(const qtr_pack_args* args);
QTR_API qtr_status qtr_unpack(const qtr_unpack_args* args);

/* ---- topk (topk.hpp) ---- */

typedef enum qtr_topk_key { QTR_KEY_ABS = 0, QTR_KEY_VALUE = 1 } qtr_topk_key;

typedef struct qtr_topk_args {
  size_t struct_size;
  const qtr_matrix* x; /* x_count matrices of one dtype */
  int64_t x_count;
  int64_t k; /* of all matrices together; with per_row of each row of the only matrix */
  qtr_topk_key key;
  int32_t per_row;
  int64_t* indices; /* row * cols + column, ascending, matrix after matrix */
  void* values;     /* the elements there, in the dtype of x */
  int64_t* counts;  /* how many are in each matrix; may be null */
  qtr_device device;
} qtr_topk_args;

QTR_API qtr_status qtr_topk(const qtr_topk_args* args);

/* ---- outliers (outliers.hpp) ---- */

/* A sparse matrix, row after row, columns ascending within each. */
typedef struct qtr_csr {
  const void* values;
  const void* columns;     /* uint16_t where cols <= 65536, else int32_t */
  const void* row_offsets; /* rows + 1 of int32_t where nnz < 2^31, else int64_t */
  int64_t rows;
  int64_t cols;
  int64_t nnz;
  qtr_dtype dtype;
} qtr_csr;

typedef struct qtr_outliers_args {
  size_t struct_size;
  qtr_matrix w;
  int64_t count; /* of the matrix, or with per_row of each row */
  int32_t per_row;
  const int64_t* indices; /* null: the largest; else count ascending row * cols + column to take instead */
  qtr_mutable_matrix remainder; /* of the dtype of w; may be w */
  void* values;
  void* columns;
  void* row_offsets;
  qtr_device device;
} qtr_outliers_args;

QTR_API qtr_status qtr_extract_outliers(const qtr_outliers_args* args);
QTR_API qtr_status qtr_check_csr(const qtr_csr* csr);

/* ---- grid (grid.hpp) ---- */

typedef enum qtr_grid_solver { QTR_MINMAX = 0, QTR_MSE = 1, QTR_HQQ = 2 } qtr_grid_solver;

typedef struct qtr_quantize_args {
  size_t struct_size;
  qtr_matrix w;
  int32_t bits;
  int64_t group_size; /* -1: one group a row (axis 1) or a column (axis 0) */
  int32_t axis;
  int32_t sym;
  qtr_grid_solver solver;
  int32_t round_zero;
  const int64_t* exclude_row_offsets; /* rows + 1 of them, or NULL: nothing is excluded */
  const int32_t* exclude_columns;
  uint8_t* codes; /* packed, rows of the grid's view side by side */
  int64_t codes_size;
  float* scale;
  float* zero; /* NULL if sym */
  int64_t groups;
  qtr_device device;
} qtr_quantize_args;

typedef struct qtr_dequantize_args {
  size_t struct_size;
  const uint8_t* codes;
  int64_t codes_size;
  int32_t bits;
  int64_t group_size;
  int32_t axis;
  qtr_matrix scale; /* as many numbers as groups, row-major without gaps */
  qtr_matrix zero;  /* the same; data NULL: the symmetric grid */
  qtr_mutable_matrix out;
  qtr_device device;
} qtr_dequantize_args;

QTR_API qtr_status qtr_quantize(const qtr_quantize_args* args);
QTR_API qtr_status qtr_dequantize(const qtr_dequantize_args* args);

/* ---- matvec (matvec.hpp) ---- */

/* A matrix on a grid of axis 1. */
typedef struct qtr_grid_matrix {
  const uint8_t* codes; /* packed, rows side by side */
  int64_t codes_size;
  int64_t rows;
  int64_t cols;
  int32_t bits;
  int64_t group_size;
  qtr_matrix scale; /* as many numbers as groups, row-major without gaps */
  qtr_matrix zero;  /* the same; data NULL: the symmetric grid */
} qtr_grid_matrix;

typedef struct qtr_residuals_args {
  size_t struct_size;
  qtr_grid_matrix w;
  qtr_csr outliers;
  float* out; /* outliers.nnz */
  qtr_device device;
} qtr_residuals_args;

typedef struct qtr_matvec_args {
  size_t struct_size;
  qtr_grid_matrix w;
  qtr_csr residuals;      /* float32; row_offsets NULL: there are none */
  qtr_matrix x;           /* each row a vector */
  qtr_mutable_matrix out; /* float32; each row a result */
  qtr_device device;
} qtr_matvec_args;

QTR_API qtr_status qtr_residuals(const qtr_residuals_args* args);
QTR_API qtr_status qtr_matvec(const qtr_matvec_args* args);

/* ---- kmeans (kmeans.hpp) ---- */

typedef struct qtr_kmeans_args {
  size_t struct_size;
  qtr_matrix x;
  qtr_matrix weights; /* of the shape of x; data NULL: all 1 */
  int32_t k;
  qtr_mutable_matrix centroids; /* float32, k for each row */
  uint8_t* assignment;          /* rows x cols */
} qtr_kmeans_args;

QTR_API qtr_status qtr_kmeans(const qtr_kmeans_args* args);

#ifdef __cplusplus
}
#endif

#endif
