// Lesson 6: a tiled matrix product. About 90 minutes.
//
// Question  How often is a number fetched, and from where?
// Formula   out[i][j] = sum over l of a[i][l] b[l][j];  a (m, k), b (k, n), out (m, n)
// Owners    a block of 16 x 16 threads owns a tile of 64 x 64 of out; thread (tx, ty) owns 16 of
//           them, rows ty, ty + 16, ... and columns tx, tx + 16, ...
// Mend      The body of matmul. It is right, and fetches two numbers from global memory for each
//           multiply-add. First, shared memory: walk over l in steps of 16; the block loads
//           64 x 16 numbers of a and 16 x 64 of b together, waits, uses them, and waits again.
//           Why again? Then, registers: a thread that takes 4 numbers of a and 4 of b out of
//           shared memory into local variables can do 16 multiply-adds with them.
// Passes    right within 1e-5; no fault in three orders of threads; at most 0.25 bytes
//           a multiply-add from global memory (as it stands, 8); at most 1.1 wavefronts of
//           shared memory for a multiply-add of a warp (without registers 2, and some).
// On a GPU  m = n = k = 4096: 69 G multiply-adds, 2.1 G of a warp. A multiprocessor does 4 of these
//           and one wavefront a cycle. So 2.4 ms for the arithmetic, on 132 at 1.7 GHz; but 19 ms
//           at 2 wavefronts each, from shared or from L1; 4.8 ms at 0.5; and 2.4 ms where a
//           thread owns 8 x 8, at 0.25. Global memory, 8 bytes each at 3 TB/s: 183 ms, unless the
//           caches help; a 64th of that with tiles of 64.
// Next      `similarities` in nt_xent.cu is this kernel, with b = a transposed.
//
//     python -m kernels check kernels/lessons/6_matmul.cu
//     python -m kernels profile kernels/lessons/6_matmul.cu
#include "host.cuh"

constexpr int TILE = 64, DEPTH = 16;

__global__ void matmul(int m, int n, int k, const float* a, const float* b, float* out) {
    for (int row = blockIdx.y * TILE + threadIdx.y; row < min(m, int(blockIdx.y + 1) * TILE);
         row += 16)
        for (int column = blockIdx.x * TILE + threadIdx.x;
             column < min(n, int(blockIdx.x + 1) * TILE); column += 16) {
            float sum = 0;
            for (int l = 0; l < k; l++) sum += a[row * k + l] * b[l * n + column];
            out[row * n + column] = sum;
        }
}

// ---------------------------------------- test

bool test(int m, int n, int k) {
    Array<float> a("a", m * k, noise), b("b", k * n, noise), out("out", m * n);
    LAUNCH(matmul, dim3(blocks_of(n, TILE), blocks_of(m, TILE)), dim3(16, 16), 0, nullptr, m, n, k,
           a, b, out);
    return expect(out, [&](int i) {
        double sum = 0;
        for (int l = 0; l < k; l++) sum += double(a[i / n * k + l]) * b[l * n + i % n];
        return sum;
    }, 1e-5);
}

int main() {
    bool large = test(128, 128, 64), odd = test(67, 3, 17);
    return !(large && odd);
}
