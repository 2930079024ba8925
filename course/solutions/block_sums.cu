// Each warp by shuffles, then the first warp adds up the eight sums: one barrier.
__global__ void block_sums(int n, const float* x, float* out) {
    __shared__ float of_warp[THREADS / 32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = 0;
    int end = min(n, int(blockIdx.x + 1) * CHUNK);
    for (int i = blockIdx.x * CHUNK + threadIdx.x; i < end; i += THREADS) sum += x[i];
    for (int half = 16; half; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = lane < THREADS / 32 ? of_warp[lane] : 0;
    for (int half = 16; half; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
    if (lane == 0) out[blockIdx.x] = sum;
}
