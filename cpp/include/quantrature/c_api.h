/// \defgroup c_api The C interface
///
/// The C interface, C99. One argument struct per op, shared by the C functions below, the C++ functions of
/// the `<op>.hpp` headers and the kernels; the contract of each op (formula, shapes, rounding, ties, NaN) is
/// in its header.
///
/// Every argument struct begins with struct_size, which the caller sets to sizeof(the struct). Later versions
/// append fields, whose zero means what there was before them, so that programs and libraries of different
/// versions fit together:
///
/// - struct_size below the library's: an older program. The fields that it does not know are taken as zero.
/// - struct_size above the library's: a newer program. This is fine while what the library does not know is
///   zero, else the call returns QTR_UNSUPPORTED.
/// - struct_size above 4096: QTR_INVALID_ARGUMENT. It was never set.
///
/// The structs that others hold by value (matrices, qtr_csr, qtr_moments) never change.
///
/// Functions return a status; on failure qtr_last_error() has the text for the calling thread, and outputs
/// are unspecified. Outputs are allocated by the caller, and nothing is kept after a call returns. All
/// functions may be called from several threads at once. No exception leaves a function.
///
/// Enumerations have the size of int32_t. Any value of it can be passed; a value without a name is refused.

#ifndef QUANTRATURE_C_API_H
#define QUANTRATURE_C_API_H

#include <stddef.h>
#include <stdint.h>

#include "quantrature/export.h"

#ifdef __cplusplus
#define QTR_INT32 : int32_t
extern "C" {
#else
#define QTR_INT32
#endif

/// \addtogroup c_api
/// \{

/// What a function returns.
typedef enum qtr_status QTR_INT32 {
  QTR_OK = 0,                ///< the call succeeded
  QTR_INVALID_ARGUMENT = 1,  ///< an argument breaks the contract of the op
  QTR_UNSUPPORTED = 2,       ///< this build or machine cannot do it
  QTR_DEVICE_ERROR = 3,      ///< a device or its driver failed
  QTR_INTERNAL_ERROR = 4     ///< any other failure, out of memory among them
} qtr_status;

/// Dtypes of elements.
typedef enum qtr_dtype QTR_INT32 {
  QTR_F32 = 0,  ///< float32
  QTR_F16 = 1,  ///< float16
  QTR_BF16 = 2  ///< bfloat16
} qtr_dtype;

/// A row-major matrix that an op reads; row_stride counts elements.
typedef struct qtr_matrix {
  const void* data;    ///< element (0, 0)
  int64_t rows;        ///< number of rows
  int64_t cols;        ///< number of columns
  int64_t row_stride;  ///< elements from the start of a row to the start of the next
  qtr_dtype dtype;     ///< dtype of the elements
} qtr_matrix;

/// A row-major matrix that an op writes; row_stride counts elements.
typedef struct qtr_mutable_matrix {
  void* data;          ///< element (0, 0)
  int64_t rows;        ///< number of rows
  int64_t cols;        ///< number of columns
  int64_t row_stride;  ///< elements from the start of a row to the start of the next
  qtr_dtype dtype;     ///< dtype of the elements
} qtr_mutable_matrix;

/// Kinds of devices.
typedef enum qtr_device_kind QTR_INT32 {
  QTR_CPU = 0,  ///< the CPU
  QTR_CUDA = 1  ///< a CUDA device
} qtr_device_kind;

/// Where the data of a call lies and its work is done; all zero: on the CPU. See device.hpp.
typedef struct qtr_device {
  qtr_device_kind kind;  ///< the CPU, or a CUDA device
  int32_t ordinal;       ///< number of the device, from 0; ignored on the CPU
  void* stream;          ///< a cudaStream_t; NULL: the default stream of the device
} qtr_device;

/// \}

/// \addtogroup runtime
/// \{

/// The version of the library, "MAJOR.MINOR.PATCH".
QTR_API const char* qtr_version(void);
/// The text of the last failure on the calling thread, "" when there was none. Valid until the next call.
QTR_API const char* qtr_last_error(void);
/// Sets the number of threads that ops use, at least 1.
QTR_API qtr_status qtr_set_num_threads(int32_t count);
/// Returns the number of threads that ops use.
QTR_API int32_t qtr_get_num_threads(void);
/// Chooses a kernel set by its name.
QTR_API qtr_status qtr_set_target(const char* name);
/// Returns the name of the kernel set in use.
QTR_API const char* qtr_get_target(void);

/// A thread pool of the embedding program. run must call task(task_context, i) once for every i in [0,
/// count), on any threads, and return when all calls have returned.
typedef struct qtr_executor {
  size_t struct_size;   ///< sizeof of this struct
  void* context;        ///< passed to run
  int32_t concurrency;  ///< number of threads of the pool, at least 1
  /// Runs the tasks of an op.
  void (*run)(void* context, int64_t count, void (*task)(void* task_context, int64_t index),
              void* task_context);
} qtr_executor;

/// Replaces the built-in pool; NULL brings it back. The struct is copied. Not while ops are running.
QTR_API qtr_status qtr_set_executor(const qtr_executor* executor);

/// Levels of messages.
typedef enum qtr_log_level QTR_INT32 {
  QTR_LOG_DEBUG = 0,    ///< details
  QTR_LOG_INFO = 1,     ///< which kernels run, how many threads were started
  QTR_LOG_WARNING = 2,  ///< the library goes on, but not as it was asked to
  QTR_LOG_ERROR = 3     ///< a call failed; qtr_last_error() has the text
} qtr_log_level;

/// Where messages go. write is called on the thread that has something to say, by one thread at a time; it
/// must not call the library. The message is UTF-8 without a newline, valid until write returns.
typedef struct qtr_log_hook {
  size_t struct_size;   ///< sizeof of this struct
  void* context;        ///< passed to write
  qtr_log_level level;  ///< the least level that is passed on
  /// Receives each message.
  void (*write)(void* context, qtr_log_level level, const char* message);
} qtr_log_hook;

/// NULL, as at the start: messages go nowhere. The struct is copied. When the call returns, the hook before
/// is no longer called.
QTR_API qtr_status qtr_set_log_hook(const qtr_log_hook* hook);

/// \}

/// \addtogroup moments
/// \{

/// Count, mean, sums of the second to fourth power of the distance to the mean, and extremes of a set of
/// numbers.
typedef struct qtr_moments {
  double count;    ///< n, the number of elements
  double mean;     ///< sum of x / n
  double m2;       ///< sum of (x - mean)^2
  double m3;       ///< sum of (x - mean)^3
  double m4;       ///< sum of (x - mean)^4
  double minimum;  ///< smallest element; NaN is passed over
  double maximum;  ///< largest element; NaN is passed over
} qtr_moments;

/// Which elements of a matrix make one result.
typedef enum qtr_moments_over QTR_INT32 {
  QTR_OVER_TENSOR = 0,  ///< the whole matrix
  QTR_OVER_ROWS = 1,    ///< each group of each row
  QTR_OVER_COLUMNS = 2  ///< each group of each column
} qtr_moments_over;

/// Arguments of qtr_compute_moments() and quantrature::compute_moments().
typedef struct qtr_moments_args {
  size_t struct_size;     ///< sizeof of this struct
  qtr_matrix x;           ///< the matrix
  qtr_moments_over over;  ///< which elements make one result
  int64_t group_size;     ///< along each row or column; -1: the whole of it; ignored over the tensor
  qtr_moments* out;       ///< results, in the order that moments.hpp gives; always in the memory of the host
  int64_t out_count;      ///< number of results, as quantrature::moments_count() gives it
  qtr_device device;      ///< where the data of the call lies; all zero: the CPU
} qtr_moments_args;

/// quantrature::compute_moments() for C.
QTR_API qtr_status qtr_compute_moments(const qtr_moments_args* args);

/// \}

/// \addtogroup integral
/// \{

/// Arguments of qtr_pqi_accumulate() and quantrature::pqi_accumulate().
typedef struct qtr_pqi_accumulate_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_mutable_matrix acc;  ///< float32, read and written
  qtr_matrix grad;         ///< gradient of the loss at a node, of the shape of acc
  double weight;           ///< weight c of the node
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
  int32_t* not_finite;     ///< may be null; where acc is: becomes 1 if grad has a NaN or an infinity
} qtr_pqi_accumulate_args;

/// Arguments of qtr_pqi_finalize() and quantrature::pqi_finalize().
typedef struct qtr_pqi_finalize_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix acc;          ///< float32
  qtr_matrix w;            ///< original weights
  qtr_matrix w_quantized;  ///< quantized weights
  int32_t keep_sign;       ///< 0: the absolute value
  qtr_mutable_matrix out;  ///< float32; may be acc
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_pqi_finalize_args;

/// Arguments of qtr_pqi_sum() and quantrature::pqi_sum().
typedef struct qtr_pqi_sum_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix acc;          ///< float32
  qtr_matrix w;            ///< original weights
  qtr_matrix w_quantized;  ///< quantized weights
  double* out;             ///< the sum; always in the memory of the host
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_pqi_sum_args;

/// Arguments of qtr_interpolate() and quantrature::interpolate().
typedef struct qtr_interpolate_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix w;            ///< original weights
  qtr_matrix w_quantized;  ///< quantized weights
  double t;                ///< position between w (0) and w_quantized (1)
  qtr_mutable_matrix out;  ///< may be w or w_quantized
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_interpolate_args;

/// quantrature::pqi_accumulate() for C.
QTR_API qtr_status qtr_pqi_accumulate(const qtr_pqi_accumulate_args* args);
/// quantrature::pqi_finalize() for C.
QTR_API qtr_status qtr_pqi_finalize(const qtr_pqi_finalize_args* args);
/// quantrature::pqi_sum() for C.
QTR_API qtr_status qtr_pqi_sum(const qtr_pqi_sum_args* args);
/// quantrature::interpolate() for C.
QTR_API qtr_status qtr_interpolate(const qtr_interpolate_args* args);

/// \}

/// \addtogroup packing
/// \{

/// Arguments of qtr_pack() and quantrature::pack().
typedef struct qtr_pack_args {
  size_t struct_size;    ///< sizeof of this struct
  const uint8_t* codes;  ///< one code a byte
  int64_t rows;          ///< number of rows
  int64_t cols;          ///< number of columns
  int64_t row_stride;    ///< bytes between rows of codes
  int32_t bits;          ///< bits of a code, 1 to 8
  uint8_t* packed;       ///< written, rows side by side
  int64_t row_bytes;     ///< bytes of a row of packed: quantrature::row_bytes()
  qtr_device device;     ///< where the data of the call lies; all zero: the CPU
} qtr_pack_args;

/// Arguments of qtr_unpack() and quantrature::unpack().
typedef struct qtr_unpack_args {
  size_t struct_size;     ///< sizeof of this struct
  const uint8_t* packed;  ///< rows side by side
  int64_t rows;           ///< number of rows
  int64_t row_bytes;      ///< bytes of a row of packed: quantrature::row_bytes()
  int32_t bits;           ///< bits of a code, 1 to 8
  uint8_t* codes;         ///< written, one code a byte
  int64_t cols;           ///< number of columns
  int64_t row_stride;     ///< bytes between rows of codes
  qtr_device device;      ///< where the data of the call lies; all zero: the CPU
} qtr_unpack_args;

/// quantrature::pack() for C.
QTR_API qtr_status qtr_pack(const qtr_pack_args* args);
/// quantrature::unpack() for C.
QTR_API qtr_status qtr_unpack(const qtr_unpack_args* args);

/// \}

/// \addtogroup topk
/// \{

/// What topk compares elements by.
typedef enum qtr_topk_key QTR_INT32 {
  QTR_KEY_ABS = 0,   ///< absolute value
  QTR_KEY_VALUE = 1  ///< value
} qtr_topk_key;

/// Arguments of qtr_topk() and quantrature::topk().
typedef struct qtr_topk_args {
  size_t struct_size;   ///< sizeof of this struct
  const qtr_matrix* x;  ///< x_count matrices of one dtype
  int64_t x_count;      ///< number of matrices
  int64_t k;  ///< number of elements of all matrices together; with per_row of each row of the only matrix
  qtr_topk_key key;   ///< what elements are compared by
  int32_t per_row;    ///< not 0: select from each row of the only matrix
  int64_t* indices;   ///< row * cols + column, ascending, matrix after matrix
  void* values;       ///< the elements there, in the dtype of x
  int64_t* counts;    ///< how many are in each matrix; may be null; always in the memory of the host
  qtr_device device;  ///< where the data of the call lies; all zero: the CPU
} qtr_topk_args;

/// quantrature::topk() for C.
QTR_API qtr_status qtr_topk(const qtr_topk_args* args);

/// \}

/// \addtogroup outliers
/// \{

/// A sparse matrix, row after row, columns ascending within each.
typedef struct qtr_csr {
  const void* values;       ///< nnz elements
  const void* columns;      ///< uint16_t where cols <= 65536, else int32_t
  const void* row_offsets;  ///< rows + 1 of int32_t where nnz < 2^31, else int64_t
  int64_t rows;             ///< number of rows
  int64_t cols;             ///< number of columns
  int64_t nnz;              ///< number of stored elements
  qtr_dtype dtype;          ///< dtype of values
} qtr_csr;

/// Arguments of qtr_extract_outliers() and quantrature::extract_outliers().
typedef struct qtr_outliers_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix w;            ///< the matrix
  int64_t count;           ///< number of outliers of the matrix, or with per_row of each row
  int32_t per_row;         ///< not 0: count outliers of each row
  const int64_t* indices;  ///< null: the largest; else count ascending row * cols + column to take instead
  qtr_mutable_matrix remainder;  ///< of the dtype of w; may be w
  void* values;                  ///< written: the outliers, of the dtype of w
  void* columns;                 ///< written, of the dtype that qtr_csr has
  void* row_offsets;             ///< written, of the dtype that qtr_csr has
  qtr_device device;             ///< where the data of the call lies; all zero: the CPU
} qtr_outliers_args;

/// Arguments of qtr_check_csr() and quantrature::check_csr().
typedef struct qtr_check_csr_args {
  size_t struct_size;  ///< sizeof of this struct
  qtr_csr csr;         ///< the matrix to check
} qtr_check_csr_args;

/// quantrature::extract_outliers() for C.
QTR_API qtr_status qtr_extract_outliers(const qtr_outliers_args* args);
/// quantrature::check_csr() for C.
QTR_API qtr_status qtr_check_csr(const qtr_check_csr_args* args);

/// \}

/// \addtogroup grid
/// \{

/// How the scale and zero of a group are found; grid.hpp has the formulas.
typedef enum qtr_grid_solver QTR_INT32 {
  QTR_MINMAX = 0,          ///< minmax: from the smallest to the largest element
  QTR_MSE = 1,             ///< mse: the range with the least squared error
  QTR_HQQ = 2,             ///< hqq: the half-quadratic solver
  QTR_HQQ_SCALE_FREE = 3,  ///< hqq-scale-free: hqq without its limits of scale
  QTR_GIVEN = 4            ///< nothing is fitted: scale and zero are read
} qtr_grid_solver;

/// Which numbers the scale of a group can be.
typedef enum qtr_scale_format QTR_INT32 {
  QTR_SCALE_F32 = 0,   ///< every float32
  QTR_SCALE_F16 = 1,   ///< IEEE half precision
  QTR_SCALE_BF16 = 2,  ///< bfloat16
  QTR_SCALE_E8M0 = 3   ///< powers of two, as the scales of microscaling formats
} qtr_scale_format;

/// Arguments of qtr_quantize() and quantrature::quantize().
typedef struct qtr_quantize_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix w;            ///< the matrix
  int32_t bits;            ///< bits of a code, 1 to 8
  int64_t group_size;      ///< -1: one group a row (axis 1) or a column (axis 0)
  int32_t axis;            ///< 1: groups along rows; 0: along the columns of the view that grid.hpp describes
  int32_t sym;             ///< not 0: symmetric grid, without stored zeros
  qtr_grid_solver solver;  ///< how scale and zero are found
  int32_t round_zero;      ///< not 0: round zeros to integers
  const int64_t* exclude_row_offsets;  ///< rows + 1 of them, or NULL: nothing is excluded
  const int32_t* exclude_columns;      ///< columns of the excluded positions, row after row
  uint8_t* codes;                      ///< packed, rows of the grid's view side by side
  int64_t codes_size;                  ///< bytes of codes
  float* scale;                        ///< written; read with QTR_GIVEN
  float* zero;                         ///< written; read with QTR_GIVEN; NULL if sym
  int64_t groups;                      ///< number of groups: length of scale and zero
  qtr_device device;                   ///< where the data of the call lies; all zero: the CPU
  int32_t integer_zero;                ///< not 0: zeros are codes, that is, integers from 0 to 2^bits - 1
  qtr_scale_format scale_format;       ///< scales are rounded to it before codes are computed
} qtr_quantize_args;

/// Arguments of qtr_dequantize() and quantrature::dequantize().
typedef struct qtr_dequantize_args {
  size_t struct_size;      ///< sizeof of this struct
  const uint8_t* codes;    ///< packed
  int64_t codes_size;      ///< bytes of codes
  int32_t bits;            ///< bits of a code, 1 to 8
  int64_t group_size;      ///< as in qtr_quantize_args
  int32_t axis;            ///< as in qtr_quantize_args
  qtr_matrix scale;        ///< one number per group, row-major without gaps
  qtr_matrix zero;         ///< one number per group; data NULL: the symmetric grid
  qtr_mutable_matrix out;  ///< the values, of the shape of the matrix
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_dequantize_args;

/// Arguments of qtr_round_to_half() and quantrature::round_to_half().
typedef struct qtr_round_to_half_args {
  size_t struct_size;   ///< sizeof of this struct
  const float* values;  ///< scales or zeros
  int64_t count;        ///< of values and of halves
  uint16_t* halves;     ///< written: bits of the float16 numbers
  float* smallest;      ///< smallest magnitude of a value that is not 0; infinity if there is none
  float* largest;       ///< largest magnitude of a value
} qtr_round_to_half_args;

/// quantrature::quantize() for C.
QTR_API qtr_status qtr_quantize(const qtr_quantize_args* args);
/// quantrature::dequantize() for C.
QTR_API qtr_status qtr_dequantize(const qtr_dequantize_args* args);
/// quantrature::round_to_half() for C.
QTR_API qtr_status qtr_round_to_half(const qtr_round_to_half_args* args);

/// \}

/// \addtogroup codebook
/// \{

/// Arguments of qtr_codebook_quantize() and quantrature::codebook_quantize().
typedef struct qtr_codebook_quantize_args {
  size_t struct_size;                  ///< sizeof of this struct
  qtr_matrix w;                        ///< the matrix
  int32_t bits;                        ///< bits of a code, 1 to 8
  int64_t group_size;                  ///< -1: one group a row; 0: no scales
  qtr_matrix table;                    ///< 2^bits entries, once or for each row
  const int64_t* exclude_row_offsets;  ///< rows + 1 of them, or NULL: nothing is excluded
  const int32_t* exclude_columns;      ///< columns of the excluded positions, row after row
  uint8_t* codes;                      ///< packed, rows side by side
  int64_t codes_size;                  ///< bytes of codes
  float* scale;                        ///< written, one for each group; NULL without scales
  int64_t groups;                      ///< length of scale
  qtr_device device;                   ///< where the data of the call lies; all zero: the CPU
} qtr_codebook_quantize_args;

/// Arguments of qtr_codebook_dequantize() and quantrature::codebook_dequantize().
typedef struct qtr_codebook_dequantize_args {
  size_t struct_size;      ///< sizeof of this struct
  const uint8_t* codes;    ///< packed, rows side by side
  int64_t codes_size;      ///< bytes of codes
  int32_t bits;            ///< bits of a code, 1 to 8
  int64_t group_size;      ///< -1: one group a row; 0: no scales
  qtr_matrix table;        ///< 2^bits entries, once or for each row
  qtr_matrix scale;        ///< one number per group, row-major without gaps; data NULL: no scales
  qtr_mutable_matrix out;  ///< the values
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_codebook_dequantize_args;

/// quantrature::codebook_quantize() for C.
QTR_API qtr_status qtr_codebook_quantize(const qtr_codebook_quantize_args* args);
/// quantrature::codebook_dequantize() for C.
QTR_API qtr_status qtr_codebook_dequantize(const qtr_codebook_dequantize_args* args);

/// \}

/// \addtogroup matvec
/// \{

/// A matrix on a grid of axis 1, or beside a table of codes of a codebook.
typedef struct qtr_grid_matrix {
  const uint8_t* codes;  ///< packed, rows side by side
  int64_t codes_size;    ///< bytes of codes
  int64_t rows;          ///< number of rows
  int64_t cols;          ///< number of columns
  int32_t bits;          ///< bits of a code, 1 to 8
  int64_t group_size;    ///< numbers that share a scale; -1: one group a row
  qtr_matrix scale;      ///< one number per group, row-major without gaps
  qtr_matrix zero;       ///< one number per group; data NULL: the symmetric grid, or a codebook
} qtr_grid_matrix;

/// Arguments of qtr_residuals() and quantrature::residuals().
typedef struct qtr_residuals_args {
  size_t struct_size;  ///< sizeof of this struct
  qtr_grid_matrix w;   ///< the matrix of codes
  qtr_csr outliers;    ///< the outliers, of the shape of w
  float* out;          ///< written, outliers.nnz numbers
  qtr_device device;   ///< where the data of the call lies; all zero: the CPU
  qtr_matrix table;    ///< data NULL: a grid; else as codebook_dequantize has it
} qtr_residuals_args;

/// What is done to the vectors before they are multiplied.
typedef enum qtr_activations QTR_INT32 {
  QTR_ACTIVATIONS_FLOAT32 = 0,  ///< x as it is
  QTR_ACTIVATIONS_INT8 = 1      ///< x is rounded to integers of 8 bits
} qtr_activations;

/// Arguments of qtr_matvec() and quantrature::matvec().
typedef struct qtr_matvec_args {
  size_t struct_size;           ///< sizeof of this struct
  qtr_grid_matrix w;            ///< the matrix of codes
  qtr_csr residuals;            ///< float32; row_offsets NULL: no residuals
  qtr_matrix x;                 ///< each row a vector
  qtr_mutable_matrix out;       ///< each row a result
  qtr_activations activations;  ///< whether x is rounded to integers of 8 bits
  qtr_device device;            ///< where the data of the call lies; all zero: the CPU
  qtr_matrix table;             ///< data NULL: a grid; else as codebook_dequantize has it
} qtr_matvec_args;

/// quantrature::residuals() for C.
QTR_API qtr_status qtr_residuals(const qtr_residuals_args* args);
/// quantrature::matvec() for C.
QTR_API qtr_status qtr_matvec(const qtr_matvec_args* args);

/// \}

/// \addtogroup allocation
/// \{

/// Arguments of qtr_allocate() and quantrature::allocate().
typedef struct qtr_allocate_args {
  size_t struct_size;             ///< sizeof of this struct
  const double* costs;            ///< of the options of all items, item after item
  const int64_t* sizes;           ///< of the options of all items, item after item
  const int64_t* option_offsets;  ///< items + 1: where the options of each item begin
  int64_t items;                  ///< number of items
  int64_t budget;                 ///< largest sum of sizes
  double relative_gap;            ///< 0: the optimum
  int64_t max_states;             ///< 0: 65536
  int64_t* chosen;                ///< written: the option of each item, counted from the item's first option
  double* cost;                   ///< of the choice; may be NULL
  int64_t* size;                  ///< of the choice; may be NULL
  double* bound;                  ///< no choice within the budget costs less; may be NULL
} qtr_allocate_args;

/// quantrature::allocate() for C.
QTR_API qtr_status qtr_allocate(const qtr_allocate_args* args);

/// \}

/// \addtogroup kmeans
/// \{

/// Arguments of qtr_kmeans() and quantrature::kmeans().
typedef struct qtr_kmeans_args {
  size_t struct_size;            ///< sizeof of this struct
  qtr_matrix x;                  ///< each row is clustered by itself
  qtr_matrix weights;            ///< of the shape of x; data NULL: all 1
  int32_t k;                     ///< number of centroids, 1 to 256
  qtr_mutable_matrix centroids;  ///< written, float32, k for each row
  uint8_t* assignment;           ///< written, rows x cols: index of the nearest centroid in its row
  qtr_device device;             ///< where the data of the call lies; all zero: the CPU
} qtr_kmeans_args;

/// quantrature::kmeans() for C.
QTR_API qtr_status qtr_kmeans(const qtr_kmeans_args* args);

/// \}

/// \addtogroup hadamard
/// \{

/// Arguments of qtr_random_signs() and quantrature::random_signs().
typedef struct qtr_random_signs_args {
  size_t struct_size;  ///< sizeof of this struct
  uint64_t seed;       ///< the same seed gives the same signs
  int64_t count;       ///< number of signs
  uint8_t* signs;      ///< (count + 7) / 8; a set bit is a minus, the lowest bit comes first
} qtr_random_signs_args;

/// Arguments of qtr_hadamard() and quantrature::hadamard().
typedef struct qtr_hadamard_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_matrix x;            ///< each row a vector
  const uint8_t* signs;    ///< signs of the columns, as qtr_random_signs makes them; null: all plus
  int32_t inverse;         ///< not 0: the inverse transform
  qtr_mutable_matrix out;  ///< may be x
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_hadamard_args;

/// quantrature::random_signs() for C.
QTR_API qtr_status qtr_random_signs(const qtr_random_signs_args* args);
/// quantrature::hadamard() for C.
QTR_API qtr_status qtr_hadamard(const qtr_hadamard_args* args);

/// \}

/// \addtogroup trellis
/// \{

/// How a state gives weights; trellis.hpp has the formulas.
typedef enum qtr_trellis_code QTR_INT32 {
  QTR_1MAD = 0,   ///< 1mad
  QTR_3INST = 1,  ///< 3inst
  QTR_HYB = 2     ///< hyb
} qtr_trellis_code;

/// A trellis code and its sizes.
typedef struct qtr_trellis {
  qtr_trellis_code code;  ///< how a state gives weights
  int32_t bits;           ///< bits of a weight, 1 to 4
  int32_t state_bits;     ///< L, bits of a state, at most 16
} qtr_trellis;

/// Arguments of qtr_trellis_values() and quantrature::trellis_values().
typedef struct qtr_trellis_values_args {
  size_t struct_size;     ///< sizeof of this struct
  qtr_trellis_code code;  ///< how a state gives weights
  int32_t state_bits;     ///< L, 2 to 16
  float* out;             ///< written, 2^state_bits x weights of a state
  int64_t out_count;      ///< length of out
} qtr_trellis_values_args;

/// Arguments of qtr_trellis_dequantize() and quantrature::trellis_dequantize().
typedef struct qtr_trellis_dequantize_args {
  size_t struct_size;      ///< sizeof of this struct
  const uint8_t* codes;    ///< streams side by side
  int64_t codes_size;      ///< bytes of codes
  qtr_trellis trellis;     ///< code and sizes
  float scale;             ///< root mean square of the weights over all states
  qtr_mutable_matrix out;  ///< each row from one stream
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_trellis_dequantize_args;

/// Arguments of qtr_trellis_matvec() and quantrature::trellis_matvec().
typedef struct qtr_trellis_matvec_args {
  size_t struct_size;      ///< sizeof of this struct
  const uint8_t* codes;    ///< a stream for each tile of 16 x 16, tiles row after row
  int64_t codes_size;      ///< bytes of codes
  int64_t rows;            ///< number of rows, a multiple of 16
  int64_t cols;            ///< number of columns, a multiple of 16
  qtr_trellis trellis;     ///< code and sizes
  float scale;             ///< root mean square of the weights over all states
  qtr_matrix x;            ///< each row a vector
  qtr_mutable_matrix out;  ///< float32; each row a result
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
} qtr_trellis_matvec_args;

/// quantrature::trellis_values() for C.
QTR_API qtr_status qtr_trellis_values(const qtr_trellis_values_args* args);
/// quantrature::trellis_dequantize() for C.
QTR_API qtr_status qtr_trellis_dequantize(const qtr_trellis_dequantize_args* args);
/// quantrature::trellis_matvec() for C.
QTR_API qtr_status qtr_trellis_matvec(const qtr_trellis_matvec_args* args);

/// \}

/// \addtogroup viterbi
/// \{

/// Arguments of qtr_trellis_quantize() and quantrature::trellis_quantize().
typedef struct qtr_trellis_quantize_args {
  size_t struct_size;   ///< sizeof of this struct
  qtr_matrix x;         ///< each row a sequence
  qtr_trellis trellis;  ///< code and sizes
  float scale;          ///< root mean square of the weights over all states, above 0
  uint8_t* codes;       ///< streams side by side
  int64_t codes_size;   ///< bytes of codes
  qtr_device device;    ///< where the data of the call lies; all zero: the CPU
} qtr_trellis_quantize_args;

/// quantrature::trellis_quantize() for C.
QTR_API qtr_status qtr_trellis_quantize(const qtr_trellis_quantize_args* args);

/// \}

/// \addtogroup hessian
/// \{

/// Arguments of qtr_hessian_accumulate() and quantrature::hessian_accumulate().
typedef struct qtr_hessian_accumulate_args {
  size_t struct_size;      ///< sizeof of this struct
  qtr_mutable_matrix sum;  ///< float32, read and written; square
  qtr_matrix x;            ///< each row the inputs of a token
} qtr_hessian_accumulate_args;

/// quantrature::hessian_accumulate() for C.
QTR_API qtr_status qtr_hessian_accumulate(const qtr_hessian_accumulate_args* args);

/// \}

/// \addtogroup gptq
/// \{

/// What gptq reports.
typedef struct qtr_gptq_result {
  double damp;   ///< damp that was used; infinite: none made the Hessian positive definite
  double loss;   ///< tr((w - v) (H + lambda I) (w - v)^T)
  int64_t dead;  ///< columns whose inputs are always 0
} qtr_gptq_result;

/// Arguments of qtr_gptq() and quantrature::gptq().
typedef struct qtr_gptq_args {
  size_t struct_size;    ///< sizeof of this struct
  qtr_matrix w;          ///< the matrix
  const float* hessian;  ///< cols x cols without gaps, always on the host; its lower triangle is read
  int64_t hessian_size;  ///< cols x cols
  int32_t bits;          ///< bits of a code, 1 to 8
  int64_t group_size;    ///< -1: one group a row
  qtr_matrix scale;      ///< one number per group, row-major without gaps
  qtr_matrix zero;       ///< one number per group; data NULL: the symmetric grid
  double damp;           ///< lambda over the mean of the diagonal of the Hessian
  int32_t ordered;       ///< not 0: take columns by falling diagonal of the Hessian
  const int64_t* exclude_row_offsets;  ///< rows + 1 of them, or NULL: nothing is excluded
  const int32_t* exclude_columns;      ///< columns of the excluded positions, row after row
  uint8_t* codes;                      ///< packed, rows side by side
  int64_t codes_size;                  ///< bytes of codes
  qtr_gptq_result* result;             ///< written; always in the memory of the host
  float* fitted_scale;     ///< written, one for each group, row-major; or NULL: the grid is scale, zero
  float* fitted_zero;      ///< written, one for each group, row-major; NULL: symmetric grids
  int64_t fitted_size;     ///< length of fitted_scale, and of fitted_zero
  qtr_grid_solver solver;  ///< solver of fitted grids
  int32_t half;            ///< not 0: round fitted scales and zeros to float16 before they are used
  qtr_device device;       ///< where the data of the call lies; all zero: the CPU
  /// A in panels, each of 8 columns and all rows j: A_jk at 8 (k / 8 cols + j) + k % 8, cols padded to a
  /// multiple of 8; or NULL: it is found from hessian, damp and ordered, which are not read otherwise
  const float* factor;
  const int64_t* order;  ///< with factor: the column that is taken at each place; on the host, as pivots
  const double* pivots;  ///< with factor: the squared diagonal of R
  int32_t integer_zero;  ///< of fitted grids, as in qtr_quantize_args
  qtr_scale_format scale_format;  ///< of fitted grids, as in qtr_quantize_args; not with half
} qtr_gptq_args;

/// quantrature::gptq() for C.
QTR_API qtr_status qtr_gptq(const qtr_gptq_args* args);

/// \}

/// \addtogroup gguf
/// \{

/// Block types of GGUF, with the numbers that they have in files; gguf.hpp has the formulas.
typedef enum qtr_gguf_type QTR_INT32 {
  QTR_GGUF_Q4_0 = 2,    ///< 4 bits, a scale for 32 numbers
  QTR_GGUF_Q4_1 = 3,    ///< 4 bits, a scale and an offset for 32 numbers
  QTR_GGUF_Q5_0 = 6,    ///< 5 bits, a scale for 32 numbers
  QTR_GGUF_Q5_1 = 7,    ///< 5 bits, a scale and an offset for 32 numbers
  QTR_GGUF_Q8_0 = 8,    ///< 8 bits, a scale for 32 numbers
  QTR_GGUF_Q2_K = 10,   ///< 2 bits, runs of 16 numbers with scale and minimum of 4 bits
  QTR_GGUF_Q3_K = 11,   ///< 3 bits, runs of 16 numbers with a scale of 6 bits
  QTR_GGUF_Q4_K = 12,   ///< 4 bits, runs of 32 numbers with scale and minimum of 6 bits
  QTR_GGUF_Q5_K = 13,   ///< 5 bits, runs of 32 numbers with scale and minimum of 6 bits
  QTR_GGUF_Q6_K = 14,   ///< 6 bits, runs of 16 numbers with a scale of 8 bits
  QTR_GGUF_IQ4_NL = 20  ///< 4 bits that stand for entries of a table, a scale for 32 numbers
} qtr_gguf_type;

/// Arguments of qtr_gguf_quantize() and quantrature::gguf_quantize().
typedef struct qtr_gguf_quantize_args {
  size_t struct_size;  ///< sizeof of this struct
  qtr_matrix w;        ///< the matrix
  qtr_gguf_type type;  ///< the block type
  qtr_matrix weights;  ///< float32, of one row or of the shape of w; data NULL: all 1
  uint8_t* data;       ///< written: blocks, rows side by side
  int64_t data_size;   ///< bytes of data
} qtr_gguf_quantize_args;

/// Arguments of qtr_gguf_dequantize() and quantrature::gguf_dequantize().
typedef struct qtr_gguf_dequantize_args {
  size_t struct_size;      ///< sizeof of this struct
  const uint8_t* data;     ///< blocks, rows side by side
  int64_t data_size;       ///< bytes of data
  qtr_gguf_type type;      ///< the block type
  qtr_mutable_matrix out;  ///< float32; the values
} qtr_gguf_dequantize_args;

/// quantrature::gguf_quantize() for C.
QTR_API qtr_status qtr_gguf_quantize(const qtr_gguf_quantize_args* args);
/// quantrature::gguf_dequantize() for C.
QTR_API qtr_status qtr_gguf_dequantize(const qtr_gguf_dequantize_args* args);

/// \}

#ifdef __cplusplus
}
#endif

#endif
