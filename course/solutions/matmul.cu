// The second barrier: nobody may load the next step while others still use this one.
__global__ void matmul(int m, int n, int k, const float* a, const float* b, float* out) {
    __shared__ float of_a[DEPTH][TILE + 4], of_b[DEPTH][TILE];
    int tx = threadIdx.x, ty = threadIdx.y, i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    float sum[4][4] = {};
    for (int l0 = 0; l0 < k; l0 += DEPTH) {
        for (int r = 0; r < 4; r++) {
            int i = ty + 16 * r;                       // 16 threads read 16 numbers of a row
            of_a[tx][i] = i0 + i < m && l0 + tx < k ? a[(i0 + i) * k + l0 + tx] : 0;
            int j = tx + 16 * r;
            of_b[ty][j] = l0 + ty < k && j0 + j < n ? b[(l0 + ty) * n + j0 + j] : 0;
        }
        __syncthreads();
        for (int l = 0; l < DEPTH; l++) {
            float x[4], y[4];
            for (int r = 0; r < 4; r++) x[r] = of_a[l][ty + 16 * r], y[r] = of_b[l][tx + 16 * r];
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++) sum[r][c] += x[r] * y[c];
        }
        __syncthreads();
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) {
            int i = i0 + ty + 16 * r, j = j0 + tx + 16 * c;
            if (i < m && j < n) out[i * n + j] = sum[r][c];
        }
}
