/* Quantizes a matrix, dequantizes it and looks at the errors; provokes a failure and reads its text. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantrature/c_api.h"

enum { kRows = 4, kCols = 40, kGroup = 16, kBits = 3, kGroups = 3, kRowBytes = kBits * ((kCols + 7) / 8) };

static void expect(int ok, const char* what) {
  if (!ok) {
    fprintf(stderr, "%s: %s\n", what, qtr_last_error());
    exit(1);
  }
}

int main(void) {
  float w[kRows * kCols], image[kRows * kCols], scale[kRows * kGroups], zero[kRows * kGroups];
  uint8_t codes[kRows * kRowBytes];
  qtr_quantize_args quantize;
  qtr_dequantize_args dequantize;
  int i;

  for (i = 0; i < kRows * kCols; ++i) w[i] = (float)sin(i * 0.7) * (float)(1 + i / kCols);
  memset(&quantize, 0, sizeof quantize);
  quantize.struct_size = sizeof quantize;
  quantize.w.data = w;
  quantize.w.rows = kRows;
  quantize.w.cols = quantize.w.row_stride = kCols;
  quantize.w.dtype = QTR_F32;
  quantize.bits = kBits;
  quantize.group_size = kGroup;
  quantize.axis = 1;
  quantize.solver = QTR_MINMAX;
  quantize.codes = codes;
  quantize.codes_size = sizeof codes;
  quantize.scale = scale;
  quantize.zero = zero;
  quantize.groups = kRows * kGroups;
  expect(qtr_quantize(&quantize) == QTR_OK, "quantize");

  memset(&dequantize, 0, sizeof dequantize);
  dequantize.struct_size = sizeof dequantize;
  dequantize.codes = codes;
  dequantize.codes_size = sizeof codes;
  dequantize.bits = kBits;
  dequantize.group_size = kGroup;
  dequantize.axis = 1;
  dequantize.scale.data = scale;
  dequantize.scale.rows = kRows;
  dequantize.scale.cols = dequantize.scale.row_stride = kGroups;
  dequantize.zero = dequantize.scale;
  dequantize.zero.data = zero;
  dequantize.out.data = image;
  dequantize.out.rows = kRows;
  dequantize.out.cols = dequantize.out.row_stride = kCols;
  expect(qtr_dequantize(&dequantize) == QTR_OK, "dequantize");
  for (i = 0; i < kRows * kCols; ++i) {
    const float step = scale[i / kCols * kGroups + i % kCols / kGroup];
    expect(fabs(image[i] - w[i]) <= 0.501 * step, "the error is above half a step");
  }

  quantize.bits = 9;
  expect(qtr_quantize(&quantize) == QTR_INVALID_ARGUMENT, "bits=9 was accepted");
  expect(strstr(qtr_last_error(), "bits") != NULL, "the message does not name bits");
  printf("%s\n", qtr_version());
  return 0;
}
