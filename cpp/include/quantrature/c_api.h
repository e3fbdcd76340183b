/* The C interface, C99. One argument struct per op, shared by the C functions below, the C++ functions of the
 * <op>.hpp headers and the kernels; the contract of each op (formula, shapes, rounding, ties, NaN) is in its
 * header.
 *
 * Every argument struct begins with struct_size, which the caller sets to sizeof(the struct). Later versions
 * append fields, whose zero means what there was before them, so that programs and libraries of different
 * versions fit together:
 *
 *   struct_size below the library's   an older program: the fields that it does not know are taken as zero
 *   struct_size above the library's   a newer program: fine while what the library does not know is zero,
 *                                     else QTR_UNSUPPORTED
 *   struct_size above 4096            QTR_INVALID_ARGUMENT: it was never set
 *
 * The structs that others hold by value (matrices, qtr_csr, qtr_moments) never change.
 *
 * Functions return a status; on failure qtr_last_error() has the text for the calling thread, and outputs are
 * unspecified. Outputs are allocated by the caller, and nothing is kept after a call returns. All functions
 * may be called from several threads at once. No exception leaves a function.
 */
#ifndef QUANTRATURE_C_API_H
#define QUANTRATURE_C_API_H

#include <stddef.h>
#include <stdint.h>

#include "quantrature/export.h"

/* Enumerations have the size of int32_t; any value of it can be passed; those that are none are refused. */
#ifdef __cplusplus
#define QTR_INT32 : int32_t
extern "C" {
#else
#define QTR_INT32
#endif

typedef enum qtr_status QTR_INT32 {
  QTR_OK = 0,
  QTR_INVALID_ARGUMENT = 1,
  QTR_UNSUPPORTED = 2,
  QTR_DEVICE_ERROR = 3,
  QTR_INTERNAL_ERROR = 4
} qtr_status;

typedef enum qtr_dtype QTR_INT32 { QTR_F32 = 0, QTR_F16 = 1, QTR_BF16 = 2 } qtr_dtype;

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

typedef enum qtr_device_kind QTR_INT32 { QTR_CPU = 0, QTR_CUDA = 1 } qtr_device_kind;

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

typedef enum qtr_log_level QTR_INT32 {
  QTR_LOG_DEBUG = 0,
  QTR_LOG_INFO = 1,    /* which kernels run, how many threads were started */
  QTR_LOG_WARNING = 2, /* the library goes on, but not as it was asked to */
  QTR_LOG_ERROR = 3    /* a call failed; the text is that of qtr_last_error() */
} qtr_log_level;

/* Where messages go. write is called on the thread that has something to say, by one thread at a time; it
 * must not call the library. The message is UTF-8 without a newline, valid until write returns. */
typedef struct qtr_log_hook {
  size_t struct_size;
  void* context;
  qtr_log_level level; /* the least that is passed on */
  void (*write)(void* context, qtr_log_level level, const char* message);
} qtr_log_hook;

/* NULL, as at the start: messages go nowhere. The struct is copied. When the call returns, the hook before is
 * no longer called. */
QTR_API qtr_status qtr_set_log_hook(const qtr_log_hook* hook);

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

typedef enum qtr_moments_over QTR_INT32 {
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
  int32_t* not_finite; /* may be null; where acc is: becomes 1 if grad has a NaN or an infinity */
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

typedef enum qtr_topk_key QTR_INT32 { QTR_KEY_ABS = 0, QTR_KEY_VALUE = 1 } qtr_topk_key;

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

typedef struct qtr_check_csr_args {
  size_t struct_size;
  qtr_csr csr;
} qtr_check_csr_args;

QTR_API qtr_status qtr_extract_outliers(const qtr_outliers_args* args);
QTR_API qtr_status qtr_check_csr(const qtr_check_csr_args* args);

/* ---- grid (grid.hpp) ---- */

typedef enum qtr_grid_solver QTR_INT32 {
  QTR_MINMAX = 0,
  QTR_MSE = 1,
  QTR_HQQ = 2,
  QTR_HQQ_SCALE_FREE = 3,
  QTR_GIVEN = 4 /* nothing is fitted: scale and zero are read */
} qtr_grid_solver;

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
  float* scale; /* written; read with QTR_GIVEN */
  float* zero;  /* the same; NULL if sym */
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

typedef struct qtr_round_to_half_args {
  size_t struct_size;
  const float* values;
  int64_t count;
  uint16_t* halves;
  float* smallest; /* magnitude of a value that is not 0; infinity if there is none */
  float* largest;
} qtr_round_to_half_args;

QTR_API qtr_status qtr_quantize(const qtr_quantize_args* args);
QTR_API qtr_status qtr_dequantize(const qtr_dequantize_args* args);
QTR_API qtr_status qtr_round_to_half(const qtr_round_to_half_args* args);

/* ---- codebook (codebook.hpp) ---- */

typedef struct qtr_codebook_quantize_args {
  size_t struct_size;
  qtr_matrix w;
  int32_t bits;
  int64_t group_size;                 /* -1: one group a row; 0: no scales */
  qtr_matrix table;                   /* 2^bits entries, once or for each row */
  const int64_t* exclude_row_offsets; /* rows + 1 of them, or NULL: nothing is excluded */
  const int32_t* exclude_columns;
  uint8_t* codes; /* packed, rows side by side */
  int64_t codes_size;
  float* scale; /* NULL without scales */
  int64_t groups;
  qtr_device device;
} qtr_codebook_quantize_args;

typedef struct qtr_codebook_dequantize_args {
  size_t struct_size;
  const uint8_t* codes;
  int64_t codes_size;
  int32_t bits;
  int64_t group_size;
  qtr_matrix table;
  qtr_matrix scale; /* as many numbers as groups, row-major without gaps; data NULL: no scales */
  qtr_mutable_matrix out;
  qtr_device device;
} qtr_codebook_dequantize_args;

QTR_API qtr_status qtr_codebook_quantize(const qtr_codebook_quantize_args* args);
QTR_API qtr_status qtr_codebook_dequantize(const qtr_codebook_dequantize_args* args);

/* ---- matvec (matvec.hpp) ---- */

/* A matrix on a grid of axis 1, or beside a table of codes of a codebook. */
typedef struct qtr_grid_matrix {
  const uint8_t* codes; /* packed, rows side by side */
  int64_t codes_size;
  int64_t rows;
  int64_t cols;
  int32_t bits;
  int64_t group_size;
  qtr_matrix scale; /* as many numbers as groups, row-major without gaps */
  qtr_matrix zero;  /* the same; data NULL: the symmetric grid, or a codebook */
} qtr_grid_matrix;

typedef struct qtr_residuals_args {
  size_t struct_size;
  qtr_grid_matrix w;
  qtr_csr outliers;
  float* out; /* outliers.nnz */
  qtr_device device;
  qtr_matrix table; /* data NULL: a grid; else as codebook_dequantize has it */
} qtr_residuals_args;

typedef enum qtr_activations QTR_INT32 {
  QTR_ACTIVATIONS_FLOAT32 = 0,
  QTR_ACTIVATIONS_INT8 = 1 /* x is rounded to integers of 8 bits */
} qtr_activations;

typedef struct qtr_matvec_args {
  size_t struct_size;
  qtr_grid_matrix w;
  qtr_csr residuals;      /* float32; row_offsets NULL: there are none */
  qtr_matrix x;           /* each row a vector */
  qtr_mutable_matrix out; /* each row a result */
  qtr_activations activations;
  qtr_device device;
  qtr_matrix table; /* as above */
} qtr_matvec_args;

QTR_API qtr_status qtr_residuals(const qtr_residuals_args* args);
QTR_API qtr_status qtr_matvec(const qtr_matvec_args* args);

/* ---- allocation (allocation.hpp) ---- */

typedef struct qtr_allocate_args {
  size_t struct_size;
  const double* costs;           /* of the options of all items, item after item */
  const int64_t* sizes;          /* the same */
  const int64_t* option_offsets; /* items + 1: where the options of each item begin */
  int64_t items;
  int64_t budget;
  double relative_gap; /* 0: the optimum */
  int64_t max_states;  /* 0: 65536 */
  int64_t* chosen;     /* items: the option of each, counted from its first */
  double* cost;        /* of the choice; may be NULL */
  int64_t* size;       /* the same */
  double* bound;       /* no choice within the budget costs less; may be NULL */
} qtr_allocate_args;

QTR_API qtr_status qtr_allocate(const qtr_allocate_args* args);

/* ---- kmeans (kmeans.hpp) ---- */

typedef struct qtr_kmeans_args {
  size_t struct_size;
  qtr_matrix x;
  qtr_matrix weights; /* of the shape of x; data NULL: all 1 */
  int32_t k;
  qtr_mutable_matrix centroids; /* float32, k for each row */
  uint8_t* assignment;          /* rows x cols */
  qtr_device device;
} qtr_kmeans_args;

QTR_API qtr_status qtr_kmeans(const qtr_kmeans_args* args);

/* ---- hadamard (hadamard.hpp) ---- */

typedef struct qtr_random_signs_args {
  size_t struct_size;
  uint64_t seed;
  int64_t count;
  uint8_t* signs; /* (count + 7) / 8; a set bit is a minus, the lowest bit comes first */
} qtr_random_signs_args;

typedef struct qtr_hadamard_args {
  size_t struct_size;
  qtr_matrix x;         /* each row a vector */
  const uint8_t* signs; /* of the columns, as qtr_random_signs makes them; null: all plus */
  int32_t inverse;
  qtr_mutable_matrix out; /* may be x */
  qtr_device device;
} qtr_hadamard_args;

QTR_API qtr_status qtr_random_signs(const qtr_random_signs_args* args);
QTR_API qtr_status qtr_hadamard(const qtr_hadamard_args* args);

/* ---- trellis (trellis.hpp) ---- */

typedef enum qtr_trellis_code QTR_INT32 { QTR_1MAD = 0, QTR_3INST = 1, QTR_HYB = 2 } qtr_trellis_code;

typedef struct qtr_trellis {
  qtr_trellis_code code;
  int32_t bits;       /* of a weight, 1 to 4 */
  int32_t state_bits; /* at most 16 */
} qtr_trellis;

typedef struct qtr_trellis_values_args {
  size_t struct_size;
  qtr_trellis_code code;
  int32_t state_bits;
  float* out; /* 2^state_bits x weights of a state */
  int64_t out_count;
} qtr_trellis_values_args;

typedef struct qtr_trellis_dequantize_args {
  size_t struct_size;
  const uint8_t* codes; /* streams side by side */
  int64_t codes_size;
  qtr_trellis trellis;
  float scale;
  qtr_mutable_matrix out; /* each row from one stream */
  qtr_device device;
} qtr_trellis_dequantize_args;

typedef struct qtr_trellis_matvec_args {
  size_t struct_size;
  const uint8_t* codes; /* a stream for each tile of 16 x 16, tiles row after row */
  int64_t codes_size;
  int64_t rows;
  int64_t cols;
  qtr_trellis trellis;
  float scale;
  qtr_matrix x;           /* each row a vector */
  qtr_mutable_matrix out; /* float32; each row a result */
  qtr_device device;
} qtr_trellis_matvec_args;

QTR_API qtr_status qtr_trellis_values(const qtr_trellis_values_args* args);
QTR_API qtr_status qtr_trellis_dequantize(const qtr_trellis_dequantize_args* args);
QTR_API qtr_status qtr_trellis_matvec(const qtr_trellis_matvec_args* args);

/* ---- viterbi (viterbi.hpp) ---- */

typedef struct qtr_trellis_quantize_args {
  size_t struct_size;
  qtr_matrix x; /* each row a sequence */
  qtr_trellis trellis;
  float scale;
  uint8_t* codes; /* streams side by side */
  int64_t codes_size;
  qtr_device device;
} qtr_trellis_quantize_args;

QTR_API qtr_status qtr_trellis_quantize(const qtr_trellis_quantize_args* args);

/* ---- hessian (hessian.hpp) ---- */

typedef struct qtr_hessian_accumulate_args {
  size_t struct_size;
  qtr_mutable_matrix sum; /* float32, read and written; square */
  qtr_matrix x;           /* each row the inputs of a token */
} qtr_hessian_accumulate_args;

QTR_API qtr_status qtr_hessian_accumulate(const qtr_hessian_accumulate_args* args);

/* ---- gptq (gptq.hpp) ---- */

typedef struct qtr_gptq_result {
  double damp;  /* that was used; infinite: none made the Hessian positive definite */
  double loss;  /* tr((w - v) (H + lambda I) (w - v)^T) */
  int64_t dead; /* columns whose inputs are always 0 */
} qtr_gptq_result;

typedef struct qtr_gptq_args {
  size_t struct_size;
  qtr_matrix w;
  const float* hessian; /* cols x cols without gaps, always on the host; its lower triangle is read */
  int64_t hessian_size;
  int32_t bits;
  int64_t group_size; /* -1: one group a row */
  qtr_matrix scale;   /* as many numbers as groups, row-major without gaps */
  qtr_matrix zero;    /* the same; data NULL: the symmetric grid */
  double damp;
  int32_t ordered;
  const int64_t* exclude_row_offsets; /* rows + 1 of them, or NULL: nothing is excluded */
  const int32_t* exclude_columns;
  uint8_t* codes; /* packed, rows side by side */
  int64_t codes_size;
  qtr_gptq_result* result;
  float* fitted_scale;    /* written, one for each group, row-major; or NULL: the grid is scale, zero */
  float* fitted_zero;     /* the same; NULL: symmetric grids */
  int64_t fitted_size;    /* of each */
  qtr_grid_solver solver; /* of fitted grids */
  int32_t half;           /* round fitted scales and zeros to float16 before they are used */
  qtr_device device;
  const float* factor;  /* A in panels, each of 8 columns and all rows j: A_jk at 8 (k / 8 cols + j) + k % 8,
                         * cols padded to a multiple of 8; or NULL: it is found from hessian, damp and ordered,
                         * which are not read otherwise */
  const int64_t* order; /* with factor: the column that is taken at each place; on the host, as pivots */
  const double* pivots; /* with factor: the squared diagonal of R */
} qtr_gptq_args;

QTR_API qtr_status qtr_gptq(const qtr_gptq_args* args);

#ifdef __cplusplus
}
#endif

#endif
