// Marks functions that are compiled for CUDA devices and, by any other compiler, for the host.
#pragma once

#if defined(__CUDACC__)
#define TORCHCACHE_HD __host__ __device__ __forceinline__
#define TORCHCACHE_DEVICE __device__ __forceinline__  // what only runs on a device, or in a test of that
#define TORCHCACHE_APART __device__ __noinline__      // the same, with more code than is good to have many times
#define TORCHCACHE_UNROLL _Pragma("unroll")
#define TORCHCACHE_ROLLED _Pragma("unroll 1")
#else
#define TORCHCACHE_HD inline
#define TORCHCACHE_DEVICE inline
#define TORCHCACHE_APART inline
#define TORCHCACHE_UNROLL _Pragma("GCC unroll 16")
#define TORCHCACHE_ROLLED
#endif
