// Kernels that are wrong in one way each, for test_kernels_watch.py: `python -m kernels check
// tests/mutants/faults.cu NAME` reports it. Most give the right result in every order of threads.
#include "host.cuh"

#define KERNEL(name) __global__ void name(float* x, int* n, float* unwritten, int size)

KERNEL(lost_update) {
    __shared__ float s[2];
    if (threadIdx.x == 0) s[1] = 0;
    __syncthreads();
    s[1] += 1;  // FAULT
    __syncthreads();
    if (threadIdx.x == 0) x[0] = s[1];
}
KERNEL(histogram) {
    x[threadIdx.x % 4] += 1;  // FAULT
}
KERNEL(across_blocks) {
    if (threadIdx.x == 0) x[5] += 1;  // FAULT
}
KERNEL(two_writers) {
    store_global(x + threadIdx.x / 2, 1.f);  // FAULT
}
KERNEL(no_syncwarp) {
    DYN_SMEM(float, s);
    s[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x < 32)
        for (int k = 16; k; k /= 2) s[threadIdx.x] += s[threadIdx.x + k];  // FAULT
}
KERNEL(shuffle_is_no_barrier) {
    __shared__ float s[64];
    s[threadIdx.x] = 1;
    float y = __shfl_xor_sync(~0u, 1.f, 1);
    x[threadIdx.x] = y + s[threadIdx.x ^ 1];  // FAULT
}
KERNEL(partial_syncwarp) {
    __shared__ float s[64];
    s[threadIdx.x] = 1;
    if (threadIdx.x < 16) __syncwarp(0xffff);
    if (threadIdx.x == 0) x[0] = s[15];
    if (threadIdx.x == 1) x[1] = s[16];  // FAULT
}
KERNEL(same_value) {
    __shared__ float s[64];
    for (int t = 0; t < 2; t++) {
        s[threadIdx.x] = 7;  // FAULT
        __syncthreads();
        x[threadIdx.x] = s[(threadIdx.x + 1) % 64];
    }
}
KERNEL(atomic_and_plain) {
    atomicAdd(n, 1);
    if (threadIdx.x == 40) n[1] = n[0];  // FAULT
}
KERNEL(byte_neighbours) {
    __shared__ unsigned char s[64];
    s[threadIdx.x] = 1;
    if (threadIdx.x == 3) s[threadIdx.x + 1] = 1;  // FAULT
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}
KERNEL(no_fence) {
    __shared__ bool last;
    x[64 * blockIdx.x + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(n, 1) == gridDim.x - 1;
    __syncthreads();
    if (last && threadIdx.x == 0) x[0] = x[64];  // FAULT
}
KERNEL(no_wait) {
    DYN_SMEM(float, s);
    if (threadIdx.x % 4 == 0) cp_async_16(s + threadIdx.x, x + threadIdx.x, 16);
    cp_async_commit();
    __syncthreads();
    x[64 + threadIdx.x] = s[threadIdx.x];  // FAULT
}
KERNEL(unwritten_shared) {
    __shared__ float s[64];
    if (threadIdx.x != 9) s[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];  // FAULT
}
KERNEL(unwritten_global) {
    if (threadIdx.x) unwritten[threadIdx.x] = 1;
    x[threadIdx.x] = unwritten[threadIdx.x];  // FAULT
}
KERNEL(no_tail) {
    x[blockIdx.x * size / 2 + threadIdx.x] = 1;  // FAULT
}
KERNEL(below) {
    x[int(threadIdx.x) - 1] = 1;  // FAULT
}
KERNEL(past_dynamic) {
    DYN_SMEM(float, s);
    s[threadIdx.x + 1] = 1;  // FAULT
}
KERNEL(past_static) {
    __shared__ float s[64];
    s[threadIdx.x + 1] = 1;  // FAULT
}
KERNEL(null_pointer) {
    x = nullptr;
    x[threadIdx.x] = 1;  // FAULT
}
KERNEL(misaligned) {
    *reinterpret_cast<float4*>(x + 8) = *reinterpret_cast<float4*>(x + 1);  // FAULT
}
KERNEL(spins) {
    if (threadIdx.x == 0)
        while (atomicAdd(n, 0) == 0) {  // FAULT
        }
}
KERNEL(waits_for_ever) {
    for (volatile int* flag = n; *flag == 0;) {  // FAULT
    }
}
KERNEL(computes_for_ever) {
    unsigned i = size;
    while (i != 7) i = i * 4 + 4;  // FAULT
    x[0] = i;
}
KERNEL(divergent_barrier) {
    if (threadIdx.x < 5)
        __syncthreads();  // FAULT
    else
        __syncthreads();
}
KERNEL(assertion) {
    assert(threadIdx.x < 40);  // FAULT
}
KERNEL(divides_by_zero) {
    n[threadIdx.x] = 5 / n[threadIdx.x];  // FAULT
}

// What is right.
KERNEL(well_behaved) {
    __shared__ float s[64];
    __shared__ unsigned char bytes[64];
    __shared__ bool last;
    s[threadIdx.x] = x[threadIdx.x], bytes[threadIdx.x] = 1;
    __syncwarp();
    float y = s[threadIdx.x ^ 1] + bytes[threadIdx.x ^ 1];
    __syncwarp();
    s[threadIdx.x] = y;
    __syncthreads();
    x[64 * blockIdx.x + 64 + threadIdx.x] = s[63 - threadIdx.x];
    atomicAdd(n + 1 + threadIdx.x % 4, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(n, 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    float sum = x[64 + threadIdx.x] + x[64 * gridDim.x + threadIdx.x];
    unwritten[threadIdx.x] = sum + n[1 + threadIdx.x % 4];
}
// 32 lanes 128 bytes apart; then a column of a tile of 32 x 32, and one of 32 x 33.
KERNEL(wasteful) {
    __shared__ float tile[32][32], padded[32][33];
    int lane = threadIdx.x % 32;
    float y = x[32 * lane];  // 32 SECTORS
    tile[lane][1] = y;  // 32 WAVEFRONTS
    padded[lane][1] = y;  // 1 WAVEFRONT
    float z = x[4 * lane];  // 16 SECTORS
    __syncwarp();
    z += tile[lane][1] + padded[lane][1];
    if (lane % 2) unwritten[lane] = z;  // 4 SECTORS, 16 LANES
}

#define RUN(name, blocks, threads) \
    if (which == #name) LAUNCH(name, blocks, threads, 256, nullptr, x, n, unwritten, 4096);

int main(int argc, char** argv) {
    std::string which = argv[1];
    Array<float> x("x", 4096, noise), unwritten("unwritten", 64);
    Array<int> n("n", 64, [](int) { return 0; });
    RUN(lost_update, 1, 64) RUN(histogram, 1, 64) RUN(across_blocks, 3, 64) RUN(two_writers, 1, 64)
    RUN(no_syncwarp, 1, 64) RUN(shuffle_is_no_barrier, 1, 64) RUN(partial_syncwarp, 1, 32)
    RUN(same_value, 1, 64) RUN(atomic_and_plain, 1, 64) RUN(byte_neighbours, 1, 64)
    RUN(no_fence, 3, 64) RUN(no_wait, 1, 64) RUN(unwritten_shared, 1, 64)
    RUN(unwritten_global, 1, 64) RUN(no_tail, 3, 1024) RUN(below, 1, 64) RUN(past_dynamic, 1, 64)
    RUN(past_static, 1, 64) RUN(null_pointer, 1, 64) RUN(misaligned, 1, 1) RUN(spins, 1, 64)
    RUN(waits_for_ever, 1, 64) RUN(computes_for_ever, 1, 64) RUN(divergent_barrier, 1, 64)
    RUN(assertion, 1, 64) RUN(divides_by_zero, 1, 64) RUN(well_behaved, 3, 64)
    RUN(wasteful, 1, 32)
    if (which == "host_pointer") {
        float mine[64];
        LAUNCH(below, 1, 64, 0, nullptr, mine + 1, n, unwritten, 64);
    }
    if (which == "output") return unwritten[3] == 1;
    if (which == "wrong") return !expect(x, [](int i) { return i == 2 ? 2 : noise(i); });
    if (which == "crash") return *reinterpret_cast<volatile int*>(8);
}
