// Registers of a: rows g, g + 8 at columns 2q, 2q + 1, then both rows 8 columns on. Chunk c of row
// j is put at c ^ (j % 8): eight rows of one column of chunks then lie in all 32 banks.
__global__ void mma_tile(const bfloat16* a, const bfloat16* b, float* s) {
    __shared__ __align__(16) bfloat16 tile[COLUMNS * DEPTH];
    int lane = threadIdx.x, g = lane / 4, q = lane % 4, i0 = 16 * blockIdx.x;
    for (int n = lane; n < COLUMNS * DEPTH / 8; n += 32) {
        int j = n / 8, c = n % 8;
        *reinterpret_cast<float4*>(tile + j * DEPTH + 8 * (c ^ j % 8)) =
            *reinterpret_cast<const float4*>(b + j * DEPTH + 8 * c);
    }
    __syncthreads();
    float sum[COLUMNS / 8][4] = {};
    for (int k = 0; k < DEPTH / 16; k++) {
        uint32_t of_a[4], of_b[4];
        for (int e = 0; e < 4; e++) {
            int i = i0 + g + e % 2 * 8, d = 16 * k + 2 * q + e / 2 * 8;
            of_a[e] = *reinterpret_cast<const uint32_t*>(a + i * DEPTH + d);
        }
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            int j = 8 * n + lane / 16 * 8 + lane % 8, c = 2 * k + lane / 8 % 2;
            ldmatrix_x4(of_b, tile + j * DEPTH + 8 * (c ^ j % 8));
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
