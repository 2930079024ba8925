// m begins at the lowest number, not at -infinity: -inf - -inf would be NaN. A lane that has seen
// nothing has s = 0, and joins with weight exp(lowest - m) = 0.
__global__ void softmax(int rows, int n, const float* x, float* p) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += row * n, p += row * n;
    float m = -3.4e38f, s = 0;
    for (int j = lane; j < n; j += 32) {
        float value = x[j], before = m;
        m = fmaxf(m, value);
        s = s * expf(before - m) + expf(value - m);
    }
    for (int bit = 16; bit; bit /= 2) {
        float other_m = __shfl_xor_sync(~0u, m, bit), other_s = __shfl_xor_sync(~0u, s, bit);
        float best = fmaxf(m, other_m);
        s = s * expf(m - best) + other_s * expf(other_m - best);
        m = best;
    }
    for (int j = lane; j < n; j += 32) p[j] = expf(x[j] - m) / s;
}
