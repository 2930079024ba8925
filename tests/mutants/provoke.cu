// Kernels that are wrong in one way each, of which CUDA would say nothing. Each function runs one
// on 64 values and returns what cuda_on_cpu.h said, "" where it can only give a wrong result.
#include "common.cuh"

#include <string>

#define FUNCTION(name, threads, smem) \
    extern "C" const char* run_##name(float* x) { \
        static std::string said; \
        said.clear(); \
        try { \
            LAUNCH(name, dim3(1, 1, 1), threads, smem, nullptr, x); \
        } catch (const std::exception& error) { said = error.what(); } \
        return said.c_str(); \
    }

__global__ void different_barriers(float* x) {
    if (threadIdx.x < 5)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 1;
}
FUNCTION(different_barriers, 64, 0)

__global__ void exited_lane(float* x) {
    if (threadIdx.x == 7) return;
    x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}
FUNCTION(exited_lane, 32, 0)

__global__ void absent_lane(float* x) { x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1); }
FUNCTION(absent_lane, 20, 0)

__global__ void absent_caller(float* x) { x[threadIdx.x] = __shfl_sync(0xff, x[threadIdx.x], 0); }
FUNCTION(absent_caller, 32, 0)

__global__ void lane_outside(float* x) {
    if (threadIdx.x < 8) x[threadIdx.x] = __shfl_sync(0xff, x[threadIdx.x], 9);
}
FUNCTION(lane_outside, 32, 0)

__global__ void lane_elsewhere(float* x) {
    if (threadIdx.x == 3)
        __syncthreads();
    else
        x[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 0);
}
FUNCTION(lane_elsewhere, 32, 0)

__global__ void too_many_threads(float*) {}
FUNCTION(too_many_threads, dim3(32, 33), 0)

__global__ void too_much_memory(float*) {}
FUNCTION(too_much_memory, 32, 100 * 1024)

__global__ void unwritten_memory(float* x) {
    DYN_SMEM(float, shared);
    if (threadIdx.x) shared[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = shared[threadIdx.x];
}
FUNCTION(unwritten_memory, 64, 256)

// Each thread hands its value to the thread before it: right only where that one runs later.
__global__ void missing_barrier(float* x) {
    DYN_SMEM(float, shared);
    shared[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = threadIdx.x ? shared[threadIdx.x - 1] : 0;
}
FUNCTION(missing_barrier, 64, 256)

__global__ void missing_wait(float* x) {
    DYN_SMEM(float, shared);
    if (threadIdx.x % 4 == 0) cp_async_16(shared + threadIdx.x, x + threadIdx.x, 16);
    cp_async_commit();
    __syncthreads();
    x[threadIdx.x] = shared[threadIdx.x];
}
FUNCTION(missing_wait, 64, 256)

__global__ void misaligned_copy(float* x) {
    DYN_SMEM(float, shared);
    cp_async_16(shared, x + 1, 16);
}
FUNCTION(misaligned_copy, 1, 256)

// What is right must stay right: partial masks, threads that left before a barrier, atomics,
// counts.
__global__ void well_behaved(float* x) {
    if (threadIdx.x >= 48) return;
    __syncthreads();
    float mine = load_global(x + threadIdx.x);
    if (threadIdx.x < 8) mine = __shfl_sync(0xff, mine, 7 - threadIdx.x);
    __syncthreads();
    store_global(x + threadIdx.x, mine);
    __syncthreads();
    if (threadIdx.x >= 8) atomicAdd(x + 63, 1.f);
}
FUNCTION(well_behaved, 64, 0)

extern "C" long long read_bytes() { return cuda_on_cpu::bytes_read.exchange(0); }
extern "C" long long written_bytes() { return cuda_on_cpu::bytes_written.exchange(0); }

// One mma on fragments given lane by lane, and the fragments that ldmatrix takes from a 16 x 16
// tile.
struct Fragments {
    uint32_t a[32][4], b[32][2], loaded[32][4], transposed[32][4];
    float d[32][4];
    uint16_t tile[16][16];
};

__global__ void tensor_core(Fragments* of) {
    DYN_SMEM(uint16_t, shared);
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) shared[i] = of->tile[i / 16][i % 16];
    __syncwarp();
    mma_m16n8k16(of->d[lane], of->a[lane], of->b[lane][0], of->b[lane][1]);
    const uint16_t* row = shared + lane % 16 * 16 + lane / 16 * 8;
    ldmatrix_x4(of->loaded[lane], row);
    ldmatrix_x4_trans(of->transposed[lane], row);
}

extern "C" void run_tensor_core(Fragments* of) {
    LAUNCH(tensor_core, dim3(1, 1, 1), 32, 512, nullptr, of);
}
