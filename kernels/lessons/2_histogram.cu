// Lesson 2: histogram. About 40 minutes.
//
// Question  What becomes of count[v] += 1 when many threads do it at once?
// Formula   count[v] = how many of the n pixels have the gray level v, 0 <= v < 256
// Owners    4 blocks of 256 threads; a thread takes each 1024th pixel. No thread owns a count.
// Mend      The body of histogram. += is a load, an addition and a store: two threads load the same
//           count, and one of the two additions is lost. Make it one operation that nobody can
//           interrupt. Then let each block count in shared memory first, and add its 256 counts
//           to the global ones at the end.
// Passes    right counts; no fault in three orders of threads; at most one atomic operation on
//           global memory for each block and gray level, 1024 in all.
// On a GPU  Atomic operations on one address of global memory wait for each other in the L2 cache,
//           about one a clock: a white image of 16.8 M pixels takes 10 ms at 1.7 GHz. In shared
//           memory 132 multiprocessors do this side by side: 75 us. To read the image: 6 us.
// Next      `is_last` in nt_xent.cuh: blocks that draw a ticket by an atomic operation.
//
//     python -m kernels check kernels/lessons/2_histogram.cu
//     python -m kernels profile kernels/lessons/2_histogram.cu
#include <vector>

#include "host.cuh"

constexpr int THREADS = 256, BLOCKS = 4, LEVELS = 256;

__global__ void histogram(int n, const uint8_t* pixel, int* count) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += BLOCKS * THREADS)
        count[pixel[i]] += 1;
}

// ---------------------------------------- test

bool test(int n, int levels) {
    Array<uint8_t> pixel("pixel", n, [&](int i) { return i * 37 % levels; });
    Array<int> count("count", LEVELS, [](int) { return 0; });
    std::vector<int> wanted(LEVELS);
    for (int i = 0; i < n; i++) wanted[pixel[i]]++;
    LAUNCH(histogram, BLOCKS, THREADS, 0, nullptr, n, pixel, count);
    return expect(count, [&](int v) { return wanted[v]; });
}

int main() {
    bool noisy = test(10000, 256), dark = test(3000, 4), black = test(1001, 1), dot = test(1, 256);
    return !(noisy && dark && black && dot);
}
