// Tiles of bf16 for the tensor cores: how they come to shared memory, and products of them. Used by
// nt_xent_mma.cu, whose header says which warp owns what.
#pragma once
#include "nt_xent.cuh"

constexpr int LANES = 32, WARPS = TILE / 16, THREADS = WARPS * LANES;

template <typename T> constexpr int PARTS = sizeof(T) == 4 ? 2 : 1;
template <int D, typename T> constexpr int COLUMNS = D * PARTS<T> > 256 ? 32 : 64;  // of a tile
// Features that a backward block owns: as many as the registers hold.
template <int D, typename T>
constexpr int WIDTH = D * PARTS<T> > 256 ? 64 : D < SLAB ? D : SLAB;
template <int D, typename T> constexpr int PART = COLUMNS<D, T> * D;  // elements of a tile's part
template <int D, typename T> constexpr int STAGE = PARTS<T> * PART<D, T>;

__device__ inline float quick(float x) { return __expf(x); }

// z in bf16: (PARTS, M, stride), the features padded with zeros.
struct Parts {
    const bfloat16* z;
    int m, stride;

    __device__ const bfloat16* row(int part, int j) const {
        return z + (int64_t(part) * m + j) * stride;
    }
};

// A tile of rows of D features in shared memory. Its 16-byte chunks are permuted within the row by
// the row's number, so that the eight rows of an ldmatrix lie in different banks.
template <int D> __device__ bfloat16* chunk(bfloat16* tile, int row, int column) {
    return tile + row * D + (column ^ (row & 7)) * 8;
}

// Start copying columns j0 .. of all parts to shared memory; past the last column and feature, 0.
template <int D, typename T>
__device__ void load_tile(const Parts& of, int j0, bfloat16* to) {
    constexpr int STEP = THREADS / (D / 8);  // rows that the block copies at a time
    int row = threadIdx.x / (D / 8), column = threadIdx.x % (D / 8);
#pragma unroll
    for (int part = 0; part < PARTS<T>; part++) {
        const bfloat16* from = of.row(part, j0 + row) + 8 * column;
#pragma unroll
        for (int j = 0; j < COLUMNS<D, T>; j += STEP) {
            bool inside = j0 + row + j < of.m && 8 * column < of.stride;
            cp_async_16(chunk<D>(to + part * PART<D, T>, row + j, column),
                        inside ? from + j * of.stride : of.z, inside ? 16 : 0);
        }
    }
}

// Row and column of element e of accumulator n: rows g, g + 8 of the warp; columns 2q, 2q + 1.
__device__ inline int row_of(int e) {
    return threadIdx.x / LANES * 16 + threadIdx.x % LANES / 4 + e / 2 * 8;
}
__device__ inline int column_of(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }

// The warp's 16 rows as A operands, one for each part and each 16 features.
template <int D, int P>
__device__ void load_rows(const Parts& of, int first, int r, int i0, uint32_t (&a)[P][D / 16][4]) {
#pragma unroll
    for (int part = 0; part < P; part++)
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) {  // two registers of rows g and g + 8, then 8 columns on
                int i = i0 + row_of(e % 2 * 2), d = 16 * k + column_of(e / 2, 0);
                bool inside = i < r && d < of.stride;
                const bfloat16* from = of.row(part, first + i) + d;
                a[part][k][e] =
                    inside ? load_global(reinterpret_cast<const uint32_t*>(from)) : 0;
            }
}

// s[n] = the warp's 16 rows times columns 8 n .. 8 n + 7 of the tile.
template <int D, typename T>
__device__ void multiply(const uint32_t (&a)[PARTS<T>][D / 16][4], bfloat16* tile, int depth,
                         float (&s)[COLUMNS<D, T> / 8][4]) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int n = 0; n < COLUMNS<D, T> / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        if (16 * k >= depth) break;
#pragma unroll
        for (int n = 0; n < COLUMNS<D, T> / 8; n += 2) {  // s_ij += z_ik z_jk
#pragma unroll
            for (int part = PARTS<T> - 1; part >= 0; part--) {  // what is small comes first
                uint32_t b[4];
                int row = 8 * n + lane / 16 * 8 + lane % 8, column = 2 * k + lane / 8 % 2;
                ldmatrix_x4(b, chunk<D>(tile + part * PART<D, T>, row, column));
#pragma unroll
                for (int mine = PARTS<T> - 1 - part; mine >= 0; mine--) {
                    mma_m16n8k16(s[n], a[mine][k], b[0], b[1]);
                    mma_m16n8k16(s[n + 1], a[mine][k], b[2], b[3]);
                }
            }
        }
    }
}

// The weights w[k], one A operand for each part: as bf16, and what that leaves over.
template <int P>
__device__ void split(const float (&left)[4], const float (&right)[4], uint32_t (&w)[P][4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        float x = (n < 2 ? left : right)[n % 2 * 2], y = (n < 2 ? left : right)[n % 2 * 2 + 1];
        w[0][n] = pack(x, y);
        if (P == 2) w[P - 1][n] = pack(x - half_of(w[0][n], 0), y - half_of(w[0][n], 1));
    }
}
