// Lesson 4: reduction. About 45 minutes.
//
// Question  When may a thread read what another one wrote?
// Formula   out[b] = sum of x[i], 1024 b <= i < 1024 (b + 1), i < n
// Owners    block b of 256 threads owns out[b]; a thread adds up four elements, then the block
//           adds up its 256 sums in a tree: 128 pairs, then 64, and so on.
// Mend      The body of block_sums. In each level of the tree a thread reads what another one wrote
//           in the level before, and nothing makes it wait. Put the barrier in: where may it
//           stand, when not all threads take the branch? Then do without most of them: the 32
//           lanes of a warp exchange registers by __shfl_down_sync or __shfl_xor_sync, with no
//           shared memory and no barrier. Shared memory is needed once, for a sum from each warp.
// Passes    right sums; no fault in three orders of threads; at most 16 requests of shared memory a
//           block, a request being what a warp asks for at once. The tree needs 45.
// On a GPU  16.8 M floats are 67 MB, 22 us at 3 TB/s. A level of the tree costs a barrier and two
//           trips to shared memory, about 80 cycles, and a shuffle 25: 640 cycles become 300. With
//           8 blocks at a time on each of 132 multiprocessors, 16,384 blocks take 6 us, or 3, and
//           most of it hides behind the memory. It counts where a block reduces often: lesson 5.
// Next      `lane_sum` in common.cuh; `finish` in nt_xent.cuh.
//
//     python -m kernels check kernels/lessons/4_reduction.cu
//     python -m kernels profile kernels/lessons/4_reduction.cu
#include "host.cuh"

constexpr int THREADS = 256, CHUNK = 1024;

__global__ void block_sums(int n, const float* x, float* out) {
    __shared__ float sum[THREADS];
    float mine = 0;
    int end = min(n, int(blockIdx.x + 1) * CHUNK);
    for (int i = blockIdx.x * CHUNK + threadIdx.x; i < end; i += THREADS) mine += x[i];
    sum[threadIdx.x] = mine;
    for (int half = THREADS / 2; half; half /= 2)
        if (threadIdx.x < half) sum[threadIdx.x] += sum[threadIdx.x + half];
    if (threadIdx.x == 0) out[blockIdx.x] = sum[0];
}

// ---------------------------------------- test

int main() {
    bool right = true;
    for (int n : {5000, 1024, 33, 1}) {
        auto whole = [](int i) { return float(i % 101 - 30); };  // exact in any order of additions
        Array<float> x("x", n, whole), out("out", blocks_of(n, CHUNK));
        LAUNCH(block_sums, blocks_of(n, CHUNK), THREADS, 0, nullptr, n, x, out);
        right = expect(out, [&](int b) {
            float sum = 0;
            for (int i = b * CHUNK; i < std::min(n, (b + 1) * CHUNK); i++) sum += x[i];
            return sum;
        }) && right;
    }
    return !right;
}
