// Lesson 7: a tile on the tensor cores. About 90 minutes.
//
// Question  Which lane holds which numbers of a matrix?
// Formula   s[i][j] = sum over d of a[i][d] b[j][d], 0 <= j, d < 64; a (m, 64), b (64, 64) in bf16
// Owners    a warp a block; block n owns rows 16 n .. 16 n + 15. mma_m16n8k16 multiplies 16 x 16
//           by 16 x 8 numbers, spread over the registers of the warp: its twin in common.cuh says
//           how, and how ldmatrix_x4 takes four 8 x 8 matrices out of shared memory.
// Mend      The body of mma_tile. The registers of a are in the wrong order, so that rows meet the
//           wrong columns; draw the 16 x 16 numbers and who holds them. Then the tile of b: its
//           rows are 128 bytes, once around all banks, so that the eight rows of a matrix lie in
//           the same four banks and are read in eight turns. Put chunk c (16 bytes) of row j in
//           the place of chunk c ^ (j % 8), in writing and in reading, or pad the rows.
// Passes    right; no fault in three orders of threads; at most 140 wavefronts of shared memory a
//           block. 64 write the tile and 64 read it; as it stands, 64 and 512.
// On a GPU  An H100 does 67 TFLOP/s in fp32 and 989 in bf16 on tensor cores, mma.sync about 610:
//           4096^3 takes 2.1 ms or 0.23 ms. Per 16 columns of a, a warp reads the tile of b by 4
//           ldmatrix, 16 cycles of shared memory for the multiprocessor's four warps each, 64 in
//           all, and the tensor cores work for 51. With eight turns it is 512: 8 times slower.
// Next      `multiply` and `forward_mma` in nt_xent_mma.cu: this tile, with softmax behind it.
//
//     python -m kernels check kernels/lessons/7_mma.cu
//     python -m kernels profile kernels/lessons/7_mma.cu
#include "host.cuh"

constexpr int COLUMNS = 64, DEPTH = 64;

__global__ void mma_tile(const bfloat16* a, const bfloat16* b, float* s) {
    __shared__ __align__(16) bfloat16 tile[COLUMNS * DEPTH];
    int lane = threadIdx.x, g = lane / 4, q = lane % 4, i0 = 16 * blockIdx.x;
    for (int n = lane; n < COLUMNS * DEPTH / 8; n += 32) {  // 16 bytes at a time
        int j = n / 8, c = n % 8;
        *reinterpret_cast<float4*>(tile + j * DEPTH + 8 * c) =
            *reinterpret_cast<const float4*>(b + j * DEPTH + 8 * c);
    }
    __syncthreads();
    float sum[COLUMNS / 8][4] = {};
    for (int k = 0; k < DEPTH / 16; k++) {
        uint32_t of_a[4], of_b[4];
        for (int e = 0; e < 4; e++) {  // registers: rows g, g + 8; columns 2q, 2q + 1 and + 8
            int i = i0 + g + e / 2 * 8, d = 16 * k + 2 * q + e % 2 * 8;
            of_a[e] = *reinterpret_cast<const uint32_t*>(a + i * DEPTH + d);
        }
        for (int n = 0; n < COLUMNS / 8; n += 2) {  // two tiles of 8 columns, two halves of d
            int j = 8 * n + lane / 16 * 8 + lane % 8, c = 2 * k + lane / 8 % 2;
            ldmatrix_x4(of_b, tile + j * DEPTH + 8 * c);
            mma_m16n8k16(sum[n], of_a, of_b[0], of_b[1]);
            mma_m16n8k16(sum[n + 1], of_a, of_b[2], of_b[3]);
        }
    }
    for (int n = 0; n < COLUMNS / 8; n++)
        for (int e = 0; e < 4; e++) {
            int i = i0 + g + e / 2 * 8, j = 8 * n + 2 * q + e % 2;
            s[i * COLUMNS + j] = sum[n][e];
        }
}

// ---------------------------------------- test

int main() {
    const int m = 32;
    auto whole = [](int i) { return __float2bfloat16(i * 37 % 31 - 15); };  // exact in bf16
    Array<bfloat16> a("a", m * DEPTH, whole), b("b", COLUMNS * DEPTH, whole);
    Array<float> s("s", m * COLUMNS);
    LAUNCH(mma_tile, m / 16, 32, 0, nullptr, a, b, s);
    return !expect(s, [&](int i) {
        float sum = 0;
        for (int d = 0; d < DEPTH; d++)
            sum += __bfloat162float(a[i / COLUMNS * DEPTH + d]) *
                   __bfloat162float(b[i % COLUMNS * DEPTH + d]);
        return sum;
    });
}
