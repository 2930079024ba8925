// Three phases, a barrier between them: zero the block's counts, count, add them up.
__global__ void histogram(int n, const uint8_t* pixel, int* count) {
    __shared__ int mine[LEVELS];
    for (int v = threadIdx.x; v < LEVELS; v += THREADS) mine[v] = 0;
    __syncthreads();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += BLOCKS * THREADS)
        atomicAdd(&mine[pixel[i]], 1);
    __syncthreads();
    for (int v = threadIdx.x; v < LEVELS; v += THREADS) atomicAdd(&count[v], mine[v]);
}
