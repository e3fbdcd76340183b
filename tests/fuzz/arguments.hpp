// Arguments out of fuzzed bytes. Arrays have exactly the memory that their sizes say, so that
// AddressSanitizer sees every read or write beyond; sizes that no memory has come with a null or a small
// array, and must be refused.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "quantrature/c_api.h"

namespace fuzz {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s; last error: %s\n", what, qtr_last_error());
  std::abort();
}

inline void expect(bool ok, const char* what) {
  if (!ok) fail(what);
}

class Arguments {
 public:
  Arguments(const uint8_t* data, size_t size) : bytes_(data, size) {}

  template <class T>
  T any() {
    return bytes_.ConsumeIntegral<T>();
  }
  template <class T>
  T within(T low, T high) {
    return bytes_.ConsumeIntegralInRange<T>(low, high);
  }
  bool coin() { return bytes_.ConsumeBool(); }
  // Mostly a size that arrays have, now and then one that they cannot have.
  int64_t extent(int64_t most) {
    switch (within(0, 15)) {
      case 0:
        return within<int64_t>(-2, 0);
      case 1:
        return within<int64_t>(int64_t{1} << 57, INT64_MAX);
      default:
        return within<int64_t>(1, most);
    }
  }
  template <class T>
  T choice(T low, T high) {
    return static_cast<T>(within(0, 15) == 0 ? any<int32_t>() : within<int32_t>(low, high));
  }

  // Memory of exactly count elements, filled from the input and then with zeros.
  template <class T>
  T* array(int64_t count) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    memory_.emplace_back(new uint8_t[bytes]);
    std::memset(memory_.back().get(), 0, bytes);
    bytes_.ConsumeData(memory_.back().get(), bytes);
    return reinterpret_cast<T*>(memory_.back().get());
  }

  template <class Matrix>
  Matrix matrix(int64_t rows, int64_t cols, bool float32 = false) {
    Matrix m{};
    m.rows = rows;
    m.cols = cols;
    m.row_stride = within(0, 7) == 0 ? extent(64) : cols;
    m.dtype = float32 ? QTR_F32 : choice(QTR_F32, QTR_BF16);
    m.data = memory_for(rows, rows == 1 ? cols : m.row_stride, cols, m.dtype == QTR_F32 ? 4 : 2);
    return m;
  }

  // Of the right size mostly; row_offsets and columns are as hostile as the input.
  qtr_csr csr(int64_t rows, int64_t cols) {
    qtr_csr m{};
    m.rows = rows;
    m.cols = cols;
    m.nnz = within<int64_t>(-1, 40);
    m.dtype = choice(QTR_F32, QTR_BF16);
    const int64_t held = m.nnz < 0 ? 0 : m.nnz;
    m.values = array<float>(held);
    m.columns = memory_for(1, held, held, cols <= 65536 ? 2 : 4);
    const bool fits = rows > 0 && rows <= 4096;
    int32_t* offsets = array<int32_t>(fits ? rows + 1 : 1);
    if (fits && coin()) {  // valid offsets are rare otherwise
      for (int64_t i = 0; i <= rows; ++i) offsets[i] = static_cast<int32_t>(held * i / rows);
      auto* columns = static_cast<uint16_t*>(const_cast<void*>(m.columns));
      if (columns != nullptr && cols <= 65536 && coin())
        for (int64_t row = 0; row < rows; ++row)
          for (int32_t i = offsets[row]; i < offsets[row + 1]; ++i)
            columns[i] = static_cast<uint16_t>(i - offsets[row]);
    }
    m.row_offsets = offsets;
    return m;
  }

 private:
  void* memory_for(int64_t rows, int64_t stride, int64_t cols, int64_t size) {
    if (within(0, 31) == 0) return nullptr;
    const bool fits = rows > 0 && stride > 0 && cols > 0 && rows <= 4096 && stride <= 4096 && cols <= 4096;
    // The last row need not have the gap behind it.
    return array<uint8_t>(fits ? size * ((rows - 1) * stride + cols) : 1);
  }

  FuzzedDataProvider bytes_;
  std::vector<std::unique_ptr<uint8_t[]>> memory_;
};

// As the library of an older, of the same or of a newer program would be called; args says which.
template <class Args>
qtr_status call(qtr_status (*function)(const Args*), Args& args, Arguments& in) {
  args.struct_size = sizeof(Args);
  switch (in.within(0, 31)) {
    case 0: {
      // No version of the struct ends in the middle of a field, which such a size would cut in two.
      const size_t size = in.any<size_t>();
      if (size < sizeof(size_t) || size > sizeof(Args)) args.struct_size = size;
      break;
    }
    case 1:
      return function(nullptr);
    default:
      break;
  }
  if (args.struct_size <= sizeof(Args) || args.struct_size > 4096) return function(&args);
  std::vector<uint8_t> larger(args.struct_size);
  std::memcpy(larger.data(), &args, sizeof(Args));
  return function(reinterpret_cast<const Args*>(larger.data()));
}

template <class Args>
qtr_status call(qtr_status (*function)(const Args*), Args&& args, Arguments& in) {
  return call(function, args, in);
}

// Whatever the status, the text goes with it, and nothing is a fault of the library.
inline bool accepted(qtr_status status) {
  expect(status != QTR_INTERNAL_ERROR, "an internal error");
  expect((status == QTR_OK) == (*qtr_last_error() == '\0'), "status and text disagree");
  return status == QTR_OK;
}

}  // namespace fuzz
