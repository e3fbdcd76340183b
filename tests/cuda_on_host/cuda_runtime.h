// Stands in for the CUDA runtime, so that the kernels of cuda/ are compiled by the host compiler and run on
// the host. The threads of a block are fibers that take turns; they switch where a kernel synchronises, so
// that every barrier, shuffle and vote means what it means on a device. Blocks run one after the other, in a
// third of the launches some at a time, which take turns, too. The order of threads and blocks changes from
// launch to launch (forwards, backwards, shuffled), so that results which depend on it differ. Under
// AddressSanitizer, reads and writes past the end of an array are found. What this cannot show: races within
// an order that was not tried, memory alignment, speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define QUANTRATURE_CUDA_ON_HOST 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // of a block, since blocks that take turns have a thread each
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
  return {x, y, z, w};
}

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr uint64_t kTurns = 200;   // of all threads of a block, until another block has its own
constexpr unsigned kTogether = 3;  // blocks that take turns

// A meeting of the threads of a mask within a warp: each brings a value, and leaves when all have come.
struct Warp {
  uint64_t brought[2][kWarp] = {};
  uint32_t here[2] = {};  // of the meeting in progress, and the one before
  uint64_t meetings = 0;  // finished ones
};

// A context starts a fiber; from then on it is left and entered by jumps, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  void* sanitized = nullptr;
  bool started = false;
  bool done = false;
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> dynamic_shared;
  std::vector<unsigned> order;  // in which the threads take turns
  jmp_buf scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned current = 0;
  unsigned running = 0;
  unsigned at_barrier = 0;
  uint64_t barriers = 0;
  int barrier_votes = 0, last_votes = 0;
  const std::function<void()>* body = nullptr;
  std::function<void()> pause = [] {};  // called from time to time between turns of the threads
};

inline Block*& block() {
  static thread_local Block* now = nullptr;
  return now;
}

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer is told which stack is in use.
inline void leaves(void** kept, const void* to, size_t size) {
  __sanitizer_start_switch_fiber(kept, to, size);
}
inline void arrived(void* kept, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(kept, from, size);
}
#else
inline void leaves(void**, const void*, size_t) {}
inline void arrived(void*, const void**, size_t*) {}
#endif

inline void yield() {
  Block& b = *block();
  Fiber& f = b.fibers[b.current];
  leaves(&f.sanitized, b.scheduler_stack, b.scheduler_stack_size);
  if (_setjmp(f.place) == 0) _longjmp(b.scheduler, 1);
  arrived(f.sanitized, nullptr, nullptr);
}

inline void start() {
  Block& b = *block();
  arrived(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
  (*b.body)();
  b.fibers[b.current].done = true;
  --b.running;
  leaves(nullptr, b.scheduler_stack, b.scheduler_stack_size);
  _longjmp(b.scheduler, 1);
}

// Runs the current fiber until it yields or ends.
inline void enter() {
  Block& b = *block();
  Fiber& f = b.fibers[b.current];
  void* sanitized = nullptr;
  leaves(&sanitized, f.stack.get(), kStack);
  if (_setjmp(b.scheduler) == 0) {
    if (f.started) _longjmp(f.place, 1);
    f.started = true;
    setcontext(&f.context);
  }
  arrived(sanitized, nullptr, nullptr);
}

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

inline void run_block(Block& b) {
  const unsigned threads = b.size.x * b.size.y * b.size.z;
  block() = &b;
  b.running = threads;
  b.at_barrier = 0;
  b.barriers = 0;
  b.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  if (b.fibers.size() < threads) b.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.started = f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  for (uint64_t idle = 0; b.running > 0; ++idle) {
    if (idle > 200'000'000) broken("the threads of a block wait for each other for ever");
    if (idle % kTurns == kTurns - 1) b.pause();
    for (const unsigned i : b.order) {
      if (b.fibers[i].done) continue;
      b.current = i;
      enter();
    }
  }
  block() = nullptr;
}

inline dim3 thread_index() {
  const Block& b = *block();
  return {b.current % b.size.x, b.current / b.size.x % b.size.y, b.current / (b.size.x * b.size.y)};
}

// Waits for all threads that have not ended; the sum of what they brought.
inline int barrier(int vote) {
  Block& b = *block();
  const uint64_t mine = b.barriers;
  b.barrier_votes += vote;
  ++b.at_barrier;
  while (b.barriers == mine) {
    if (b.at_barrier == b.running) {
      b.at_barrier = 0;
      b.last_votes = std::exchange(b.barrier_votes, 0);
      ++b.barriers;
      break;
    }
    yield();
  }
  return b.last_votes;
}

// Brings value to the meeting of mask; read(other lane) gives what the others brought.
template <class Read>
auto meet(unsigned mask, uint64_t value, Read&& read) {
  Block& b = *block();
  const unsigned lane = b.current % kWarp;
  Warp& w = b.warps[b.current / kWarp];
  if (!(mask >> lane & 1)) broken("a thread is not in its own mask");
  const unsigned threads = b.size.x * b.size.y * b.size.z;
  const unsigned in_warp = std::min<unsigned>(kWarp, threads - b.current / kWarp * kWarp);
  if (in_warp < kWarp) mask &= (1u << in_warp) - 1;
  const uint64_t meeting = w.meetings;
  const int side = static_cast<int>(meeting % 2);
  w.brought[side][lane] = value;
  w.here[side] |= 1u << lane;
  while (w.meetings == meeting) {
    if ((w.here[side] & mask) == mask) {
      w.here[1 - side] = 0;
      ++w.meetings;
      break;
    }
    yield();
  }
  return read(w.brought[side]);
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T of_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  return of_bits<T>(meet(mask, bits_of(value), [&](const uint64_t* all) { return all[from % kWarp]; }));
}

inline unsigned lane() {
  return block()->current % kWarp;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_index())
#define blockIdx (cuda_on_host::block()->index)
#define blockDim (cuda_on_host::block()->size)
#define gridDim (cuda_on_host::block()->grid)

inline void __syncthreads() {
  cuda_on_host::barrier(0);
}
inline int __syncthreads_count(int vote) {
  return cuda_on_host::barrier(vote != 0);
}
inline int __syncthreads_or(int vote) {
  return cuda_on_host::barrier(vote != 0) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::meet(mask, 0, [](const uint64_t*) { return 0; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(mask, value, lane / width * width + static_cast<unsigned>(from) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  static_cast<void>(width);
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ static_cast<unsigned>(other));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(mask, value,
                               lane % width + by < static_cast<unsigned>(width) ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(mask, value, lane % width >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cuda_on_host::meet(mask, vote != 0, [&](const uint64_t* all) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1 && all[i] == 1) votes |= 1u << i;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int vote) {
  return __ballot_sync(mask, vote) != 0;
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i)
    chosen |= static_cast<unsigned>(bytes >> (selectors >> (4 * i) & 7) * 8 & 255) << (8 * i);
  return chosen;
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline void __threadfence() {}

template <class T>
T atomicAdd(T* at, T by) {
  return std::exchange(*at, static_cast<T>(*at + by));
}
template <class T>
T atomicMin(T* at, T value) {
  return std::exchange(*at, std::min(*at, value));
}
template <class T>
T atomicMax(T* at, T value) {
  return std::exchange(*at, std::max(*at, value));
}
template <class T>
T atomicOr(T* at, T value) {
  return std::exchange(*at, static_cast<T>(*at | value));
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline const char* cudaGetErrorString(cudaError_t) {
  return "out of memory";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const char* shared = std::getenv("CUDA_ON_HOST_SHARED_BYTES");  // of a block of another device
  *value = which == cudaDevAttrMultiProcessorCount ? 4 : shared != nullptr ? std::atoi(shared) : 227 << 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
using cudaMemPool_t = void*;
enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
struct cudaMemLocation {
  cudaMemLocationType type;
  int id;
};
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  cudaMemLocation location;
};
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
  *free = *all = size_t{1} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t*, const cudaMemPoolProps*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
inline cudaError_t cudaMallocFromPoolAsync(void** at, size_t bytes, cudaMemPool_t, cudaStream_t) {
  // Filled, so that a kernel which reads what it has not written does not find zeros there.
  *at = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*at == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*at, 0xA5, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* at, cudaStream_t) {
  std::free(at);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    std::memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                 width);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

namespace cuda_on_host {

// Runs blocks, as many at a time as there are, of which one has its turn.
inline void run_in_turns(std::vector<std::unique_ptr<Block>>& blocks, const std::vector<dim3>& indices) {
  std::mutex mutex;
  std::vector<std::condition_variable> changed(blocks.size());
  std::vector<bool> runs(blocks.size(), true);
  size_t turn = 0, next = 0;
  const auto pass_on = [&](size_t from) {  // with the mutex
    do turn = (turn + 1) % blocks.size();
    while (!runs[turn] && turn != from);
    changed[turn].notify_one();
  };
  std::vector<std::thread> threads;
  for (size_t i = 0; i < blocks.size(); ++i)
    threads.emplace_back([&, i] {
      std::unique_lock lock(mutex);
      const auto wait = [&] { changed[i].wait(lock, [&] { return turn == i; }); };
      blocks[i]->pause = [&] {
        pass_on(i);
        wait();
      };
      for (wait(); next < indices.size(); blocks[i]->pause()) {
        blocks[i]->index = indices[next++];
        run_block(*blocks[i]);
      }
      blocks[i]->pause = [] {};
      runs[i] = false;
      pass_on(i);
    });
  for (std::thread& thread : threads) thread.join();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
            Arguments&&... arguments) {
  static std::vector<std::unique_ptr<Block>> together;
  static uint64_t launches = 0;
  static std::mt19937 random;
  const std::function<void()> body = [&] { kernel(arguments...); };
  const auto arrange = [](std::vector<unsigned>& order, unsigned count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (launches % 3 == 1) std::reverse(order.begin(), order.end());
    if (launches % 3 == 2) std::shuffle(order.begin(), order.end(), random);
  };
  std::vector<unsigned> order;
  arrange(order, grid.x * grid.y * grid.z);
  std::vector<dim3> indices;
  for (const unsigned i : order) indices.push_back({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)});
  together.resize(launches % 3 == 2 ? std::min<size_t>(kTogether, indices.size()) : 1);
  for (std::unique_ptr<Block>& b : together) {
    if (!b) b = std::make_unique<Block>();
    b->body = &body;
    b->grid = grid;
    b->size = size;
    b->dynamic_shared.assign(shared_bytes + 16, '\x5A');
    arrange(b->order, size.x * size.y * size.z);
  }
  ++launches;
  if (together.size() > 1) return run_in_turns(together, indices);
  for (const dim3& index : indices) {
    together[0]->index = index;
    run_block(*together[0]);
  }
}

// mma.m16n8k16 of bfloat16, as PTX lays out its operands.
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto wide = [](uint64_t pair, int which) {
    return std::bit_cast<float>(static_cast<uint32_t>(pair >> (16 * which)) << 16);
  };
  const auto join = [](uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; };
  const unsigned all = 0xffffffffu, g = lane() / 4, t = lane() % 4;
  float left[2][16], right[2][16];  // rows g and g + 8 of a; columns 2 t and 2 t + 1 of b
  const auto take_a = [&](int columns) {
    return [&, columns](const uint64_t* of) {
      for (unsigned i = 0; i < 4; ++i)
        for (int k = 0; k < 2; ++k)
          for (int row = 0; row < 2; ++row)
            left[row][columns + static_cast<int>(2 * i) + k] = wide(of[4 * g + i], 2 * row + k);
      return 0;
    };
  };
  meet(all, join(a[0], a[1]), take_a(0));
  meet(all, join(a[2], a[3]), take_a(8));
  meet(all, join(b[0], b[1]), [&](const uint64_t* of) {
    for (unsigned i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k)
        for (unsigned column = 0; column < 2; ++column)
          right[column][2 * i + static_cast<unsigned>(k % 2 + k / 2 * 8)] =
              wide(of[4 * (2 * t + column) + i], k);
    return 0;
  });
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += left[i / 2][k] * right[i % 2][k];
}

inline void* dynamic_shared() {
  char* at = block()->dynamic_shared.data();
  return at + (16 - reinterpret_cast<uintptr_t>(at) % 16) % 16;
}

}  // namespace cuda_on_host
