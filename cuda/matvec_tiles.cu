// Products of packed codes and vectors by tensor cores, which multiply codes, exact in bfloat16, and vectors
// that are one, two or three bfloat16 apart (bfloat16, float16, float32). Products and sums are of float32;
// scales and zeros come in after each 32 or 64 columns, so that nothing is rounded that is not rounded
// without them.
//
// A block has 16 rows, a warp every eighth chunk of 256 columns of them. In the words of a plane, fields 16
// bits apart are codes of columns half a unit apart; one instruction makes both bfloat16, as the mantissas of
// a power of two, another takes that off. So that these pairs meet theirs, the block lays out the vectors in
// pairs, too.
#include "constants.cuh"
#include "mma.cuh"
#include "product.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;
constexpr int kChunk = 256;
constexpr int64_t kSliceBytes = 64 << 10;  // of shared memory, about, for a slice of the vectors

// Widths of the planes of codes of kBits bits.
constexpr bool has_plane(int bits, int plane) {
  return bits == 8 ? plane == 8 : (bits & plane) != 0;
}
constexpr int planes_of(int bits) {
  return has_plane(bits, 8) + has_plane(bits, 4) + has_plane(bits, 2) + has_plane(bits, 1);
}
constexpr int least_plane(int bits) {
  return bits == 8 ? 8 : bits & -bits;
}
// The width of the planes before one.
constexpr int before_plane(int bits, int plane) {
  return bits & ~(2 * plane - 1);
}
// How many planes that is.
constexpr int number_of_plane(int bits, int plane) {
  return planes_of(before_plane(bits, plane));
}

// Calls body with each width, from the highest bits to the lowest.
template <int kBits, int kPlane = 8, class Body>
__device__ __forceinline__ void for_planes(const Body& body) {
  if constexpr (has_plane(kBits, kPlane)) body(std::integral_constant<int, kPlane>{});
  if constexpr (kPlane > 1) for_planes<kBits, kPlane / 2>(body);
}

// A unit of a plane: the columns whose codes are words of 8 lanes. Fields i of the two halves of a word are
// those of columns 8 i + lane and half a unit further.
constexpr int unit_of(int plane) {
  return kChunk / plane;
}

// Some vectors as columns of the right factor: the bfloat16 parts of each side by side.
struct Panel {
  int64_t first;       // vector
  int vectors, limbs;  // limbs: parts of a number
  int columns;         // of the factor
  int chunks;          // of a slice, a multiple of kWarps
  int64_t of_row;      // chunks, the last of which may be a part
};

// Words of a chunk of a row that a thread has: lanes 2 t and 2 t + 1 of each unit, plane after plane.
template <int kBits>
struct ChunkWords {
  uint2 of_unit[kBits];

  __device__ __forceinline__ void read(const uint8_t* row, int64_t cols, int64_t whole, int64_t chunk,
                                       int t) {
    for_planes<kBits>([&](auto plane) {
      constexpr int kPlane = plane.value, kBefore = before_plane(kBits, kPlane);
      const uint8_t* from = row + kBefore * ((cols + 7) / 8) + chunk * (32 * kPlane) + 8 * t;
#pragma unroll
      for (int u = 0; u < kPlane; ++u)
        of_unit[kBefore + u] = kPlane < 4 || chunk * kChunk + u * unit_of(kPlane) < whole
                                   ? __ldg(reinterpret_cast<const uint2*>(from + 32 * u))
                                   : make_uint2(0, 0);
    });
  }
};

// A number as it lies in memory, so that nothing waits for it before it is needed.
__device__ __forceinline__ uint32_t raw(const void* data, qtr_dtype dtype, int64_t i) {
  return dtype == QTR_F32 ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}
__device__ __forceinline__ float number_of(uint32_t raw, qtr_dtype dtype) {
  if (dtype == QTR_F32) return std::bit_cast<float>(raw);
  const auto bits = static_cast<uint16_t>(raw);
  return dtype == QTR_F16 ? f32_from_f16(bits) : f32_from_bf16(bits);
}

// Scales and zeros of two rows of a chunk that a thread has: those of 64 columns from 64 t on.
template <int kSegment>
struct ChunkLines {
  static constexpr int kCount = 64 / kSegment;
  uint32_t scale[2][kCount], zero[2][kCount];

  __device__ __forceinline__ void read(const Product& p, const int64_t (&rows)[2], int64_t chunk, int t) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int64_t column = chunk * kChunk + 64 * t + k * kSegment;
      const auto group = static_cast<uint32_t>(column) / static_cast<uint32_t>(p.group);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r][k] = zero[r][k] = 0;
        if (column >= p.whole) continue;
        const int64_t at = rows[r] * p.groups + group;
        scale[r][k] = raw(p.w.scale.data, p.w.scale.dtype, at);
        if (p.w.zero.data != nullptr) zero[r][k] = raw(p.w.zero.data, p.w.zero.dtype, at);
      }
    }
  }
};

// Numbers of eight columns of a vector; zeros past those of the chunks.
__device__ __forceinline__ void eight_of(const Product& p, int64_t vector, int64_t column, float (&x)[8]) {
  const int64_t at = vector * p.x.row_stride + column;
  if (column >= p.whole) {
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = 0;
  } else if (p.by_four) {
    const Four low = load4(p.x.data, p.x.dtype, at / 4), high = load4(p.x.data, p.x.dtype, at / 4 + 1);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = k < 4 ? low.v[k] : high.v[k - 4];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = load(p.x.data, p.x.dtype, at + k);
  }
}

// Words of the right factor: for each plane, chunk, two neighbouring fields and column, four of each thread t
// of four: field by field, lanes 2 t and 2 t + 1. totals: for each 32 columns, the sum of each column of the
// factor.
template <int kBits, int kTiles>
__device__ void lay_out(const Product& p, const Panel& panel, int64_t first_chunk, uint32_t* words,
                        float* totals) {
  const int64_t left = panel.of_row - first_chunk;
  const int chunks = static_cast<int>(left < panel.chunks ? left : panel.chunks);
  const int pieces = chunks * 16, tasks = panel.vectors * pieces;
  for_planes<kBits>([&](auto plane) {
    constexpr int kPlane = plane.value, kUnit = unit_of(kPlane), kPairs = kUnit / 16;
    constexpr int kNumber = number_of_plane(kBits, kPlane);
    constexpr bool kFirst = kNumber == 0,
                   kWhole = kPlane == 8;  // whether both halves of a unit are of 32 columns
    for (int base = 0; base < tasks; base += kThreads) {
      const int task = base + static_cast<int>(threadIdx.x);
      const bool mine = task < tasks;
      const int vector = mine ? task / pieces : 0, piece = mine ? task % pieces : 0;
      const int chunk = piece / 16, field = piece % 16;
      const int at = chunk * kChunk + field / kPairs * kUnit + field % kPairs * 8;
      const int64_t column = first_chunk * kChunk + at;
      float low[8], high[8];
      eight_of(p, panel.first + vector, column, low);
      eight_of(p, panel.first + vector, column + kUnit / 2, high);
      for (int limb = 0; limb < panel.limbs; ++limb) {
        const int to = vector * panel.limbs + limb;
        uint32_t pairs[8];
        float sum[2] = {};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const uint16_t a = bf16_from_f32(low[k]), b = bf16_from_f32(high[k]);
          pairs[k] = a | static_cast<uint32_t>(b) << 16;
          low[k] -= f32_from_bf16(a);
          high[k] -= f32_from_bf16(b);
          sum[0] += f32_from_bf16(a);
          sum[1] += f32_from_bf16(b);
        }
        if (mine) {
          uint32_t* out = words +
                          (((kNumber * panel.chunks + chunk) * 8 + field / 2) * panel.columns + to) * 16 +
                          field % 2 * 2;
#pragma unroll
          for (int t = 0; t < 4; ++t)
            *reinterpret_cast<uint2*>(out + 4 * t) = make_uint2(pairs[2 * t], pairs[2 * t + 1]);
        }
        if constexpr (kFirst) {
          if constexpr (kWhole) sum[0] += sum[1];
#pragma unroll
          for (int apart = 1; apart < (kWhole ? 2 : 4); apart *= 2)
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], apart);
          if (mine && field % (kWhole ? 2 : 4) == 0) {
            totals[at / 32 * 8 * kTiles + to] = sum[0];
            if (!kWhole) totals[(at + kUnit / 2) / 32 * 8 * kTiles + to] = sum[1];
          }
        }
      }
    }
  });
}

// What codes of a chunk add to the 16 rows; sum as multiply_add() has it. chunk: of the slice.
template <int kBits, int kTiles, int kSegment>
__device__ __forceinline__ void add_chunk(const Product& p, const Panel& panel,
                                          const ChunkWords<kBits> (&codes)[2],
                                          const ChunkLines<kSegment>& lines, int chunk, const uint32_t* words,
                                          const float* totals, float (&sum)[kTiles][4]) {
  // Columns that are multiplied before scales come in: whole units of each plane.
  constexpr int kSpan = kBits == 8 || least_plane(kBits) == 4 ? 64 : unit_of(least_plane(kBits));
  constexpr int kSegments = kSpan / kSegment, kCount = 64 / kSegment;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  float scale[2][kCount], zero[2][kCount];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      scale[r][k] = number_of(lines.scale[r][k], p.w.scale.dtype);
      zero[r][k] =
          p.w.zero.data == nullptr ? symmetric_zero(kBits) : number_of(lines.zero[r][k], p.w.zero.dtype);
    }
#pragma unroll
  for (int span = 0; span < kChunk / kSpan; ++span) {
    float dot[kTiles][kSegments][4] = {};
    for_planes<kBits>([&](auto plane) {
      constexpr int kPlane = plane.value, kUnit = unit_of(kPlane), kPairs = kUnit / 16;
      constexpr int kNumber = number_of_plane(kBits, kPlane), kParts = kPlane == 8 ? 2 : 1;
      constexpr int kField = kPlane / kParts;  // bits that are taken at a time
#pragma unroll
      for (int two = span * kSpan / 16; two < (span + 1) * kSpan / 16; two += 2) {
        uint4 right[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int column = 8 * tile + g < panel.columns ? 8 * tile + g : panel.columns - 1;
          right[tile] = *reinterpret_cast<const uint4*>(
              words + (((kNumber * panel.chunks + chunk) * 8 + two / 2) * panel.columns + column) * 16 +
              4 * t);
        }
#pragma unroll
        for (int field = two; field < two + 2; ++field) {
          const int unit = field / kPairs, i = field % kPairs;
          const int low = (unit * kUnit + 8 * i - span * kSpan) / kSegment;
          const int high = (unit * kUnit + kUnit / 2 + 8 * i - span * kSpan) / kSegment;
          const uint2 of_row[2] = {codes[0].of_unit[before_plane(kBits, kPlane) + unit],
                                   codes[1].of_unit[before_plane(kBits, kPlane) + unit]};
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int at = kPlane * i + kField * part;
            const int left = kPlane == 8 ? kField * part : kBits & (kPlane - 1);
            const uint32_t a[4] = {
                two_fields<kField>(of_row[0].x, at, left), two_fields<kField>(of_row[1].x, at, left),
                two_fields<kField>(of_row[0].y, at, left), two_fields<kField>(of_row[1].y, at, left)};
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const uint32_t b[2] = {field == two ? right[tile].x : right[tile].z,
                                     field == two ? right[tile].y : right[tile].w};
              if (low == high) {
                multiply_add(dot[tile][low], a, b);
              } else {
                const uint32_t of_low[2] = {b[0] & 0xFFFFu, b[1] & 0xFFFFu};
                const uint32_t of_high[2] = {b[0] & 0xFFFF0000u, b[1] & 0xFFFF0000u};
                multiply_add(dot[tile][low], a, of_low);
                multiply_add(dot[tile][high], a, of_high);
              }
            }
          }
        }
      }
    });
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      const int column = span * kSpan + segment * kSegment;  // of the chunk
      const int owner = (lane & ~3) | column / 64, k = column % 64 / kSegment;
      float of_row[2], zero_of[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        of_row[r] = __shfl_sync(0xffffffffu, scale[r][k], owner);
        zero_of[r] = __shfl_sync(0xffffffffu, zero[r][k], owner);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float total[2] = {};
#pragma unroll
        for (int part = 0; part < kSegment / 32; ++part) {
          const float2 two = *reinterpret_cast<const float2*>(
              totals + (chunk * 8 + column / 32 + part) * 8 * kTiles + 8 * tile + 2 * t);
          total[0] += two.x;
          total[1] += two.y;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[tile][i] = __fmaf_rn(
              of_row[i / 2], __fmaf_rn(-zero_of[i / 2], total[i % 2], dot[tile][segment][i]), sum[tile][i]);
      }
    }
  }
}

template <int kBits, int kTiles, int kSegment>
__global__ void __launch_bounds__(kThreads, 2) multiply_tiles(Product p, Panel panel) {
  constexpr int kMany = 8 * kTiles, kAtOnce = 4;  // vectors of outliers at once
  __shared__ float of_warp[kWarps][kRows][kMany], rest[kRows][kMany];
  auto* words = static_cast<uint32_t*>(dynamic_shared());
  auto* totals =
      reinterpret_cast<float*>(words + int64_t{planes_of(kBits)} * panel.chunks * 128 * panel.columns);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t row_bytes = packed_row_bytes(kBits, p.w.cols);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.w.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t last = p.w.rows - 1;  // stands for those past it
    const int64_t rows[2] = {first + g < last ? first + g : last,
                             first + g + 8 < last ? first + g + 8 : last};
    ChunkWords<kBits> codes[2];
    ChunkLines<kSegment> lines;
    const auto read = [&](int64_t chunk) {
#pragma unroll
      for (int r = 0; r < 2; ++r) codes[r].read(p.w.codes + rows[r] * row_bytes, p.w.cols, p.whole, chunk, t);
      lines.read(p, rows, chunk, t);
    };
    if (warp < panel.of_row) read(warp);

    float sum[kTiles][4] = {};
    for (int64_t slice = 0; slice < panel.of_row; slice += panel.chunks) {
      if (slice > 0) __syncthreads();
      lay_out<kBits, kTiles>(p, panel, slice, words, totals);
      if (slice == 0) {  // while codes are on their way
        for (int r = warp; r < kRows && first + r < p.w.rows; r += kWarps)
          for (int v = 0; v < panel.vectors; v += kAtOnce) {
            const int many = panel.vectors - v < kAtOnce ? panel.vectors - v : kAtOnce;
            float of_row[kAtOnce] = {};
            add_rest(p, kBits, first + r, lane, panel.first + v, many, of_row);
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
              const float all = add_warp(of_row[k]);
              if (lane == 0 && k < many) rest[r][v + k] = all;
            }
          }
      }
      __syncthreads();
      for (int chunk = warp; chunk < panel.chunks && slice + chunk < panel.of_row; chunk += kWarps) {
        const ChunkWords<kBits> now[2] = {codes[0], codes[1]};
        const ChunkLines<kSegment> of_now = lines;
        if (slice + chunk + kWarps < panel.of_row) read(slice + chunk + kWarps);
        add_chunk<kBits, kTiles, kSegment>(p, panel, now, of_now, chunk, words, totals, sum);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_warp[warp][g + i / 2 * 8][8 * tile + 2 * t + i % 2] = sum[tile][i];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * panel.vectors; i += kThreads) {
      const int r = i % kRows, v = i / kRows;
      if (first + r >= p.w.rows) continue;
      float y = rest[r][v];
      for (int limb = panel.limbs - 1; limb >= 0; --limb)
        for (int w = 0; w < kWarps; ++w) y += of_warp[w][r][v * panel.limbs + limb];
      store(p.y.data, p.y.dtype, (panel.first + v) * p.y.row_stride + first + r, y);
    }
    __syncthreads();
  }
}

template <int kBits, int kTiles, int kSegment>
void multiply_panel(const Product& p, Panel panel, cudaStream_t stream) {
  constexpr auto kernel = &multiply_tiles<kBits, kTiles, kSegment>;
  const int64_t of_chunk = kChunk * (2 * planes_of(kBits) * panel.columns + kTiles);  // bytes
  const int64_t chunks =
      std::clamp(kSliceBytes / of_chunk / kWarps, int64_t{1}, ceil_div(panel.of_row, kWarps));
  panel.chunks = static_cast<int>(chunks) * kWarps;
  const int64_t shared = panel.chunks * of_chunk;
  if (shared > 32 << 10)  // with what the kernel has anyway, more than a kernel may take unasked
    expect(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "asking for shared memory");
  launch(kernel, blocks_for(ceil_div(p.w.rows, kRows)), kThreads, static_cast<size_t>(shared), stream, p,
         panel);
}

template <int kBits, int kTiles>
void multiply_panel(const Product& p, const Panel& panel, cudaStream_t stream) {
  if (p.group % 64 == 0 || p.groups == 1)
    multiply_panel<kBits, kTiles, 64>(p, panel, stream);
  else
    multiply_panel<kBits, kTiles, 32>(p, panel, stream);
}

template <int kBits>
void multiply_bits(const Product& p, cudaStream_t stream) {
  // Shared memory holds the vectors once for each plane.
  constexpr int kMostTiles = planes_of(kBits) == 1 ? 2 : 1;
  Panel panel{};
  panel.limbs = p.x.dtype == QTR_BF16 ? 1 : p.x.dtype == QTR_F16 ? 2 : 3;
  panel.of_row = ceil_div(p.whole, kChunk);
  const int64_t most = 8 * kMostTiles / panel.limbs;
  for (panel.first = 0; panel.first < p.x.rows; panel.first += most) {
    panel.vectors = static_cast<int>(std::min(most, p.x.rows - panel.first));
    panel.columns = panel.vectors * panel.limbs;
    if (panel.columns <= 8)
      multiply_panel<kBits, 1>(p, panel, stream);
    else
      multiply_panel<kBits, kMostTiles>(p, panel, stream);
  }
}

}  // namespace

int64_t columns_of_tiles(const qtr_grid_matrix& w, int64_t group) {
  const bool by_words = w.cols % 64 == 0 && reinterpret_cast<uintptr_t>(w.codes) % 8 == 0 &&
                        (group % 32 == 0 || group == w.cols) && w.cols <= INT32_MAX;
  // Units of the planes of one and two bits are larger than 64 columns.
  return !by_words ? 0 : w.bits % 4 == 0 ? w.cols : w.cols / kChunk * kChunk;
}

void multiply_by_tiles(const Product& p, cudaStream_t stream) {
  with_bits(p.w.bits, [&](auto bits) { multiply_bits<bits.value>(p, stream); });
}

}  // namespace quantrature::cuda
