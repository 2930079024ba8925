// Further words of CUDA for cuda_on_cpu.h: the part of the runtime that a small main() uses.
#pragma once
#include <cstdio>

#define __shared__ static thread_local  // a thread of the CPU runs one block at a time
#define __constant__
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                      cudaMemcpyDeviceToDevice, cudaMemcpyDefault };

namespace cuda_on_cpu {
inline void name_memory(const void*, const char*, size_t) {}
inline void formula(const char*, double, double) {}
}

template <typename T> cudaError_t cudaMalloc(T** at, size_t bytes) {
    *at = static_cast<T*>(malloc(bytes));
    memset(static_cast<void*>(*at), 0xff, bytes);
    return cudaSuccess;
}
template <typename T> cudaError_t cudaMallocManaged(T** at, size_t bytes) {
    return cudaMalloc(at, bytes);
}
inline cudaError_t cudaFree(void* at) { free(at); return cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
