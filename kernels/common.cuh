// What the kernels share: types, global memory, sums over lanes, and the five PTX instructions.
//
// Under nvcc every word here is CUDA's own. Under g++ cuda_on_cpu.h gives the words their meaning,
// and each instruction has its twin in plain C++ beside it; the twins say, lane by lane, what the
// instruction does, and are the place to read about it.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

inline void check(cudaError_t error, const char* kernel) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// More than 48 KiB of shared memory must be asked for.
#define LAUNCH(kernel, grid, block, smem, stream, ...)                                         \
    do {                                                                                       \
        if ((smem) > 48 * 1024)                                                                \
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),\
                  #kernel);                                                                    \
        kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);         \
        check(cudaGetLastError(), #kernel);                                                    \
    } while (0)
#define WATCH(...)  // the CPU's affair
#define DYN_SMEM(type, name)                                  \
    extern __shared__ __align__(16) unsigned char shared_[];  \
    type* name = reinterpret_cast<type*>(shared_)
#else
#include "cuda_on_cpu.h"
#endif

// ---------------------------------------- types: computing is done in Wide<T>

using bfloat16 = __nv_bfloat16;
using half = __half;

template <typename T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <typename T> using Wide = typename WideOf<T>::type;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(half x) { return __half2float(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(uint8_t x) { return x; }

template <typename T> __device__ inline T narrow(Wide<T> x) { return x; }
template <> __device__ inline half narrow<half>(float x) { return __float2half(x); }
template <> __device__ inline bfloat16 narrow<bfloat16>(float x) { return __float2bfloat16(x); }

// ---------------------------------------- global memory: all access is through these, and counts

template <typename T> __device__ __forceinline__ T load_global(const T* from) {
#ifndef __CUDACC__
    cuda_on_cpu::self->block->read += sizeof(T);
#endif
    return *from;
}

template <typename T> __device__ __forceinline__ void store_global(T* to, T value) {
#ifndef __CUDACC__
    cuda_on_cpu::self->block->written += sizeof(T);
#endif
    *to = value;
}

// What another block of the same launch stored: from the L2 cache, for an L1 may be out of date.
template <typename T> __device__ __forceinline__ T load_fresh(const T* from) {
#ifdef __CUDACC__
    return __ldcg(from);
#else
    return load_global(from);
#endif
}

// Stop where a table that no CPU has seen is wrong: reading by it would leave the tensor.
__device__ inline void require(bool holds, const char* what) {
#ifdef __CUDACC__
    if (!holds) __trap();
#else
    if (!holds) cuda_on_cpu::refuse(what);
#endif
}

// ---------------------------------------- sums over aligned groups of lanes; all 32 must come

template <int LANES, typename T> __device__ inline T lane_sum(T value) {
    for (int bit = LANES / 2; bit; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
    return value;
}

template <int LANES, typename T> __device__ inline T lane_max(T value) {
    for (int bit = LANES / 2; bit; bit /= 2) {
        T other = __shfl_xor_sync(~0u, value, bit);
        value = value > other ? value : other;
    }
    return value;
}

// Half i, 0 the low one, of two bf16 in a register.
__device__ inline float half_of(uint32_t pair, int i) {
    uint32_t bits = i ? pair & 0xffff0000u : pair << 16;  // a bf16 is the upper half of a float
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// ---------------------------------------- PTX, with its twins
#ifdef __CUDACC__
inline bool has_bf16_mma() {
    int device, major;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    return major >= 8;
}

inline int multiprocessors() {
    int device, count;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    return count;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PTX(...) __trap()  // bf16 tensor cores came with sm_80; the launcher looks before it leaps
#else
#define PTX(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a b: a is 16 x 16, b 16 x 8, d 16 x 8, spread over the warp as the twin says.
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of bf16 from shared memory; lane i gives the address of row i % 8 of the
// matrix i / 8.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Start copying 16 aligned bytes from global to shared memory: the first `valid`, then zeros.
__device__ inline void cp_async_16(void* to, const void* from, int valid) {
    PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
}

// Two numbers as bf16, the first in the low half.
__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

__device__ inline void cp_async_commit() { PTX("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `pending` of the groups committed by this thread are under way.
template <int pending> __device__ inline void cp_async_wait() {
    PTX("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}

#else

inline bool has_bf16_mma() { return true; }
inline int multiprocessors() { return cuda_on_cpu::multiprocessors(); }

inline uint32_t pack(float low, float high) {
    return narrow<bfloat16>(low).bits | uint32_t(narrow<bfloat16>(high).bits) << 16;
}

// With g = lane / 4 and q = lane % 4 a lane holds, two to a register,
//   a: rows g, g+8, g, g+8 at columns 2q, 2q+1 (first two registers) and 2q+8, 2q+9 (last two);
//   b: column g at rows 2q, 2q+1 (b0) and 2q+8, 2q+9 (b1);    d: row g, then g+8, columns 2q, 2q+1.
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1}, all[32][6];
    cuda_on_cpu::exchange(CUDA_ON_CPU_SITE, ~0u, mine, all, sizeof(mine));
    int g = cuda_on_cpu::self->rank % 32 / 4, q = cuda_on_cpu::self->rank % 4;
    for (int i = 0; i < 4; i++) {
        int row = i / 2, column = 2 * q + i % 2;            // row: 0 for g, 1 for g + 8
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            int lane = k % 8 / 2, high = k / 8;
            sum += half_of(all[4 * g + lane][row + 2 * high], k % 2) *
                   half_of(all[4 * column + lane][4 + high], k % 2);
        }
        d[i] += sum;
    }
}

// Register m holds, of matrix m, row g at columns 2q, 2q+1; transposed: column g at rows 2q, 2q+1.
__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const uint16_t* rows[32];
    cuda_on_cpu::matrix_rows(CUDA_ON_CPU_SITE, row, rows);
    cuda_on_cpu::Quiet quiet;
    int g = cuda_on_cpu::self->rank % 32 / 4, q = cuda_on_cpu::self->rank % 4;
    for (int m = 0; m < 4; m++) memcpy(&r[m], rows[8 * m + g] + 2 * q, 4);
}

__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    const uint16_t* rows[32];
    cuda_on_cpu::matrix_rows(CUDA_ON_CPU_SITE, row, rows);
    cuda_on_cpu::Quiet quiet;
    int g = cuda_on_cpu::self->rank % 32 / 4, q = cuda_on_cpu::self->rank % 4;
    for (int m = 0; m < 4; m++) r[m] = rows[8 * m + 2 * q][g] | rows[8 * m + 2 * q + 1][g] << 16;
}

__forceinline__ void cp_async_16(void* to, const void* from, int valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        cuda_on_cpu::refuse("cp.async between addresses that are not multiples of 16");
    cuda_on_cpu::copy({to, from, valid, 0});
}

inline void cp_async_commit() { cuda_on_cpu::self->group++; }

template <int pending> void cp_async_wait() { cuda_on_cpu::copy_wait(pending); }
#endif
