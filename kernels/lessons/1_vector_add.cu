// Lesson 1: vector add. About 20 minutes.
//
// Question  Which thread owns which element, and what do the threads past the end do?
// Formula   out[i] = x[i] + y[i], 0 <= i < n
// Owners    ceil(n / 256) blocks of 256 threads; each thread is to own one element.
// Mend      The body of vector_add. It forgets the block, so that all blocks write the same 256
//           elements: two threads write one word, and the rest is never written. Mend that, and
//           `check` shows a second fault. Why was it not there for n = 256?
// Passes    right sums; no fault in three orders; at most 4.5 sectors a request. A sector
//           is 32 bytes, the least that a GPU moves: 32 floats side by side are four of them.
// On a GPU  12 bytes and one addition an element: 16.8 M elements are 201 MB, 67 us at 3 TB/s,
//           whatever the additions cost. With i = threadIdx.x * gridDim.x + blockIdx.x the sums are
//           right as well, but each lane's float comes with 28 bytes that its warp does not want:
//           8 times the traffic, and up to 8 times the time.
// Next      `tiles_forward` in tile_shuffle.cu: who owns which pixel, and ragged ends.
//
//     python -m kernels check kernels/lessons/1_vector_add.cu
//     python -m kernels profile kernels/lessons/1_vector_add.cu
#include "host.cuh"

constexpr int THREADS = 256;

__global__ void vector_add(int n, const float* x, const float* y, float* out) {
    int i = threadIdx.x;
    out[i] = x[i] + y[i];
}

// ---------------------------------------- test

int main() {
    bool right = true;
    for (int n : {2048, 1000, 256}) {
        Array<float> x("x", n, noise), y("y", n, noise), out("out", n);
        LAUNCH(vector_add, blocks_of(n, THREADS), THREADS, 0, nullptr, n, x, y, out);
        right = expect(out, [&](int i) { return x[i] + y[i]; }) && right;
    }
    return !right;
}
