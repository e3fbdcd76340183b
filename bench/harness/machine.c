/* The machine's own time for a matrix, beside which peers.py puts every op; peers.py compiles it when it runs.
 *
 * Threads are started and waiting before the clock is: what is measured is memory alone. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

typedef uint64_t Words __attribute__((vector_size(64), aligned(1), may_alias));

enum { kReadPlain, kReadStreams, kCopyPlain, kCopyPastCache, kWrite };

static volatile uint64_t sink;

/* Whole words of `streams` equal parts in turn. */
static void read_part(const char* from, int64_t bytes, int64_t streams) {
  Words sums[4] = {{0}};
  const int64_t length = bytes / streams / 256 * 256;
  for (int64_t i = 0; i < length; i += 256)
    for (int64_t s = 0; s < streams; ++s)
      for (int k = 0; k < 4; ++k) sums[k] ^= *(const Words*)(from + s * length + i + 64 * k);
  const Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  for (int k = 0; k < 8; ++k) sink += all[k];
}

static void copy_plain(const char* from, char* to, int64_t bytes) {
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) *(Words*)(to + i) = *(const Words*)(from + i);
  memcpy(to + i, from + i, (size_t)(bytes - i));
}

static void copy_past_cache(const char* from, char* to, int64_t bytes) {
#if defined(__AVX512F__)
  int64_t i = (64 - (int64_t)((uintptr_t)to % 64)) % 64;
  copy_plain(from, to, i);
  for (; i + 64 <= bytes; i += 64) _mm512_stream_si512((void*)(to + i), _mm512_loadu_si512(from + i));
  _mm_sfence();
  copy_plain(from + i, to + i, bytes - i);
#elif defined(__SSE2__)
  int64_t i = (16 - (int64_t)((uintptr_t)to % 16)) % 16;
  copy_plain(from, to, i);
  for (; i + 16 <= bytes; i += 16) _mm_stream_si128((void*)(to + i), _mm_loadu_si128((const void*)(from + i)));
  _mm_sfence();
  copy_plain(from + i, to + i, bytes - i);
#else
  copy_plain(from, to, bytes);
#endif
}

static void write_part(char* to, int64_t bytes) {
  const Words ones = {1, 1, 1, 1, 1, 1, 1, 1};
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) *(Words*)(to + i) = ones;
}

typedef struct {
  int kind;
  const char* from;
  char* to;
  int64_t bytes;
  atomic_int* ready;
  atomic_int* go;
  atomic_int* done;
} Part;

static void run_part(const Part* p) {
  switch (p->kind) {
    case kReadPlain: read_part(p->from, p->bytes, 1); break;
    case kReadStreams: read_part(p->from, p->bytes, 4); break;
    case kCopyPlain: copy_plain(p->from, p->to, p->bytes); break;
    case kCopyPastCache: copy_past_cache(p->from, p->to, p->bytes); break;
    default: write_part(p->to, p->bytes);
  }
}

static void* wait_and_run(void* argument) {
  const Part* p = argument;
  atomic_fetch_add(p->ready, 1);
  while (!atomic_load(p->go)) {
  }
  run_part(p);
  atomic_fetch_add(p->done, 1);
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds that reading, copying or writing so many bytes takes on so many threads, each with a share of them. */
double machine_seconds(int kind, const char* from, char* to, int64_t bytes, int threads) {
  enum { kMostThreads = 256 };
  pthread_t others[kMostThreads];
  Part parts[kMostThreads];
  atomic_int ready = 0, go = 0, done = 0;
  if (threads > kMostThreads) threads = kMostThreads;
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = bytes / 64 * t / threads * 64;
    const int64_t end = t + 1 == threads ? bytes : bytes / 64 * (t + 1) / threads * 64;
    parts[t] = (Part){kind, from + begin, to + begin, end - begin, &ready, &go, &done};
    if (t > 0 && pthread_create(&others[t], NULL, wait_and_run, &parts[t]) != 0) return -1;
  }
  while (atomic_load(&ready) != threads - 1) {
  }
  const double start = now();
  atomic_store(&go, 1);
  run_part(&parts[0]);
  while (atomic_load(&done) != threads - 1) {
  }
  const double seconds = now() - start;
  for (int t = 1; t < threads; ++t) pthread_join(others[t], NULL);
  return seconds;
}
