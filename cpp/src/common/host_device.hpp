// For functions that the host and devices share.
#pragma once

// Must be inlined: the callers are compiled for several targets, and for devices.
#ifdef __CUDACC__
#define QUANTRATURE_INLINE __host__ __device__ __forceinline__
#else
#define QUANTRATURE_INLINE [[gnu::always_inline]] inline
#endif
