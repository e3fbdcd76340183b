/* matvec FOLDER LAYER: multiplies the weight of one layer of a quantized checkpoint by x[j] = cos(j) and
 * prints the results, one a line; quantrature.ops.matvec gives the same.
 *
 * A checkpoint is a folder with config.json, whose quantization_config.modules describes every matrix, and
 * safetensors files: 8 bytes with the length of a JSON header, the header, and the tensors it tells the
 * places of. See docs/reference/checkpoint.md; what is stored in another way than that page's "grid" is refused.
 */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantrature/c_api.h"

static void stop(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vfprintf(stderr, format, values);
  va_end(values);
  fputc('\n', stderr);
  exit(1);
}

static void* get(size_t size) {
  void* memory = calloc(size ? size : 1, 1);
  if (memory == NULL) stop("out of memory");
  return memory;
}

static void succeed(qtr_status status) {
  if (status != QTR_OK) stop("%s", qtr_last_error());
}

/* A whole file; its size comes back, and a zero byte is behind it. */
static char* contents(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  long end;
  char* data;
  if (file == NULL) stop("cannot open %s", path);
  if (fseek(file, 0, SEEK_END) != 0 || (end = ftell(file)) < 0) stop("cannot read %s", path);
  rewind(file);
  data = get((size_t)end + 1);
  if (fread(data, 1, (size_t)end, file) != (size_t)end) stop("cannot read %s", path);
  fclose(file);
  *size = (size_t)end;
  return data;
}

typedef struct checkpoint {
  cJSON* modules; /* of the configuration */
  cJSON* header;  /* of the safetensors file */
  char* tensors;  /* what the offsets in the header count from */
  size_t size;
} checkpoint;

static const cJSON* field(const cJSON* object, const char* name) {
  const cJSON* found = cJSON_GetObjectItemCaseSensitive(object, name);
  if (found == NULL) stop("there is no %s", name);
  return found;
}

static const char* text(const cJSON* string) {
  if (!cJSON_IsString(string)) stop("something must be a string");
  return string->valuestring;
}

/* -1 is for groups that are whole rows. */
static int64_t whole(const cJSON* number, int64_t most) {
  if (!cJSON_IsNumber(number) || number->valuedouble < -1 || number->valuedouble > (double)most)
    stop("something must be a number up to %lld", (long long)most);
  return (int64_t)number->valuedouble;
}

enum { kLargest = 1 << 30 }; /* of sizes, so that bytes of products of two of them fit into int64_t */

static int64_t size_of(const cJSON* number) {
  const int64_t size = whole(number, kLargest);
  if (size < 1) stop("a size must be at least 1");
  return size;
}

static int64_t groups_of(int64_t rows, int64_t cols, int64_t group_size) {
  if (group_size == 0) stop("group_size must not be 0");
  return rows * (group_size == -1 ? 1 : (cols + group_size - 1) / group_size);
}

static checkpoint open_checkpoint(const char* folder) {
  checkpoint c;
  char path[4096];
  size_t size;
  char* data;
  cJSON* config;
  const cJSON* quantization;
  uint64_t header = 0;
  int i;

  snprintf(path, sizeof path, "%s/config.json", folder);
  data = contents(path, &size);
  config = cJSON_Parse(data);
  if (config == NULL) stop("%s is not JSON", path);
  quantization = field(config, "quantization_config");
  if (strcmp(text(field(quantization, "quant_method")), "quantrature") != 0)
    stop("%s is of no checkpoint of quantrature", path);
  c.modules = cJSON_DetachItemFromObjectCaseSensitive((cJSON*)quantization, "modules");

  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  data = contents(path, &size);
  if (size < 8) stop("%s is no safetensors file", path);
  for (i = 0; i < 8; ++i) header |= (uint64_t)(unsigned char)data[i] << (8 * i);
  if (header > size - 8) stop("%s is truncated", path);
  c.header = cJSON_ParseWithLength(data + 8, (size_t)header);
  if (c.header == NULL) stop("the header of %s is not JSON", path);
  c.tensors = data + 8 + header;
  c.size = size - 8 - (size_t)header;
  return c;
}

/* The bytes of a tensor, which must be as many as expected. safetensors does not align them, so they are
 * copied. */
static void* tensor(const checkpoint* c, const char* layer, const char* name, const char* dtype,
                    int64_t bytes) {
  char full[1024];
  const cJSON *about, *offsets;
  int64_t begin, end;
  void* copy;
  snprintf(full, sizeof full, "%s.%s", layer, name);
  about = field(c->header, full);
  offsets = field(about, "data_offsets");
  begin = whole(cJSON_GetArrayItem(offsets, 0), (int64_t)c->size);
  end = whole(cJSON_GetArrayItem(offsets, 1), (int64_t)c->size);
  if (strcmp(text(field(about, "dtype")), dtype) != 0) stop("%s is not of dtype %s", full, dtype);
  if (begin < 0 || end - begin != bytes)
    stop("%s has %lld bytes, not %lld", full, (long long)(end - begin), (long long)bytes);
  copy = get((size_t)bytes);
  memcpy(copy, c->tensors + begin, (size_t)bytes);
  return copy;
}

/* Scales or zeros: floats, or codes on a grid of their own. As many as count, in row. */
static qtr_matrix numbers(const checkpoint* c, const char* layer, const char* name, const cJSON* kind,
                          int64_t count) {
  qtr_matrix result = {NULL, 1, count, count, QTR_F32};
  if (cJSON_IsString(kind)) {
    const int half = strcmp(kind->valuestring, "float16") == 0;
    result.dtype = half ? QTR_F16 : QTR_F32;
    result.data = tensor(c, layer, name, half ? "F16" : "F32", count * (half ? 2 : 4));
  } else {
    char inner[256];
    const cJSON* shape = field(kind, "shape");
    const int64_t bits = whole(field(kind, "bits"), 8), group = whole(field(kind, "group_size"), kLargest);
    const int64_t rows = cJSON_GetArraySize(shape) == 2 ? size_of(cJSON_GetArrayItem(shape, 0)) : 1;
    const int64_t cols = size_of(cJSON_GetArrayItem(shape, cJSON_GetArraySize(shape) - 1));
    const int64_t groups = groups_of(rows, cols, group);
    qtr_dequantize_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.codes_size = rows * bits * ((cols + 7) / 8);
    args.codes = tensor(c, layer, name, "U8", args.codes_size);
    args.bits = (int32_t)bits;
    args.group_size = group;
    args.axis = 1;
    snprintf(inner, sizeof inner, "%s_scale", name);
    args.scale = numbers(c, layer, inner, field(kind, "scale"), groups);
    snprintf(inner, sizeof inner, "%s_zero", name);
    if (!cJSON_IsNull(field(kind, "zero"))) args.zero = numbers(c, layer, inner, field(kind, "zero"), groups);
    if (rows * cols != count)
      stop("%s has %lld numbers, not %lld", name, (long long)(rows * cols), (long long)count);
    args.out.data = get((size_t)count * sizeof(float));
    args.out.rows = rows;
    args.out.cols = args.out.row_stride = cols;
    succeed(qtr_dequantize(&args));
    result.data = args.out.data;
  }
  return result;
}

/* Stored in two bytes each where those suffice; the library wants four. */
static const int32_t* row_offsets(const checkpoint* c, const char* layer, int64_t rows, int64_t outliers) {
  const char* name = "outlier_row_offsets";
  int32_t* wide;
  const uint16_t* narrow;
  int64_t i;
  if (outliers >= 65536) return tensor(c, layer, name, "I32", (rows + 1) * 4);
  narrow = tensor(c, layer, name, "U16", (rows + 1) * 2);
  wide = get((size_t)(rows + 1) * sizeof *wide);
  for (i = 0; i <= rows; ++i) wide[i] = narrow[i];
  return wide;
}

int main(int argc, char** argv) {
  checkpoint c;
  const cJSON *matrix, *shape, *form;
  int64_t rows, cols, bits, group, groups, outliers, i;
  qtr_matvec_args product;
  float *x, *y;

  if (argc != 3) stop("usage: matvec FOLDER LAYER");
  c = open_checkpoint(argv[1]);
  matrix = field(c.modules, argv[2]);
  form = cJSON_GetObjectItemCaseSensitive(matrix, "kind");
  if (form != NULL && strcmp(text(form), "grid") != 0) stop("%s is stored on no grid", argv[2]);
  if (cJSON_GetObjectItemCaseSensitive(matrix, "input_scale") != NULL) stop("%s scales its inputs", argv[2]);
  shape = field(matrix, "shape");
  rows = size_of(cJSON_GetArrayItem(shape, 0));
  cols = size_of(cJSON_GetArrayItem(shape, 1));
  bits = whole(field(matrix, "bits"), 8);
  group = whole(field(matrix, "group_size"), kLargest);
  groups = groups_of(rows, cols, group);
  outliers = whole(field(matrix, "outliers"), kLargest);

  memset(&product, 0, sizeof product);
  product.struct_size = sizeof product;
  product.w.rows = rows;
  product.w.cols = cols;
  product.w.bits = (int32_t)bits;
  product.w.group_size = group;
  product.w.codes_size = rows * bits * ((cols + 7) / 8);
  product.w.codes = tensor(&c, argv[2], "weight", "U8", product.w.codes_size);
  product.w.scale = numbers(&c, argv[2], "scale", field(matrix, "scale"), groups);
  if (!cJSON_IsNull(field(matrix, "zero")))
    product.w.zero = numbers(&c, argv[2], "zero", field(matrix, "zero"), groups);

  if (outliers >
      0) { /* what each adds to the value of the grid at its place, which also checks the positions */
    const char* dtype = text(field(matrix, "dtype"));
    const int narrow = strcmp(dtype, "float32") != 0;
    qtr_residuals_args args;
    memset(&args, 0, sizeof args);
    args.struct_size = sizeof args;
    args.w = product.w;
    args.outliers.rows = rows;
    args.outliers.cols = cols;
    args.outliers.nnz = outliers;
    args.outliers.dtype = !narrow ? QTR_F32 : strcmp(dtype, "float16") == 0 ? QTR_F16 : QTR_BF16;
    args.outliers.values = tensor(&c, argv[2], "outlier_values",
                                  !narrow                         ? "F32"
                                  : strcmp(dtype, "float16") == 0 ? "F16"
                                                                  : "BF16",
                                  outliers * (narrow ? 2 : 4));
    args.outliers.columns = tensor(&c, argv[2], "outlier_columns", cols <= 65536 ? "U16" : "I32",
                                   outliers * (cols <= 65536 ? 2 : 4));
    args.outliers.row_offsets = row_offsets(&c, argv[2], rows, outliers);
    args.out = get((size_t)outliers * sizeof(float));
    succeed(qtr_residuals(&args));
    product.residuals = args.outliers;
    product.residuals.values = args.out;
    product.residuals.dtype = QTR_F32;
  }

  x = get((size_t)cols * sizeof *x);
  y = get((size_t)rows * sizeof *y);
  for (i = 0; i < cols; ++i) x[i] = (float)cos((double)i);
  product.x.data = x;
  product.x.rows = 1;
  product.x.cols = product.x.row_stride = cols;
  product.out.data = y;
  product.out.rows = 1;
  product.out.cols = product.out.row_stride = rows;
  succeed(qtr_matvec(&product));
  for (i = 0; i < rows; ++i) printf("%.9g\n", (double)y[i]);
  return 0;
}
