// Lesson 5: softmax by an online maximum. About 60 minutes.
//
// Question  How does one take a softmax of a row that is never whole?
// Formula   p[j] = exp(x[j] - m) / s,  m = max x[j],  s = sum of exp(x[j] - m), for each row of n
// Owners    a warp owns a row, four warps a block; lane l takes the elements l, l + 32, ...
// Mend      The body of softmax. It leaves m out, so that exp(x) overflows above 88 and the row
//           becomes NaN. To find m first would read the row three times. Read it twice: keep a
//           running m and s in each lane; an element above m raises m, and s, which was a sum of
//           exp(x - old m), is multiplied by exp(old m - new m). Two lanes put theirs together in
//           the same way. What are m and s of a lane that has seen nothing, or only -infinity?
// Passes    right within 1e-5; rows with -infinity in them; no fault in three orders of threads;
//           at most 8.1 bytes an element read from global memory: twice a float.
// On a GPU  8192 x 4096 floats are 134 MB. Three readings and a writing take 179 us at 3 TB/s, two
//           readings 134 us; a row kept in registers is read once, 89 us. In a loss like NT-Xent
//           the row is computed as it goes, a tile at a time, and only m and s are kept:
//           there is no second reading, and no matrix.
// Next      `Row<W>` in nt_xent.cuh, and `forward_simt` in nt_xent.cu, which is this lesson with
//           the row made by a matrix product.
//
//     python -m kernels check kernels/lessons/5_softmax.cu
//     python -m kernels profile kernels/lessons/5_softmax.cu
#include <algorithm>

#include "host.cuh"

constexpr int WARPS = 4;

__global__ void softmax(int rows, int n, const float* x, float* p) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += row * n, p += row * n;
    float s = 0;
    for (int j = lane; j < n; j += 32) s += expf(x[j]);
    for (int bit = 16; bit; bit /= 2) s += __shfl_xor_sync(~0u, s, bit);
    for (int j = lane; j < n; j += 32) p[j] = expf(x[j]) / s;
}

// ---------------------------------------- test

// Each row has another difficulty: what exp(x) does to it, or how often the maximum changes.
float score(int row, int j, int n) {
    float s = 5 * noise(j + 1000 * row);
    return row == 0 ? s : row == 1 ? s + 1000 : row == 2 ? s - 1000 : row == 3 ? 2 * j
         : row == 4 ? -2 * j : j < n - 1 ? -INFINITY : s;
}

int main() {
    bool right = true;
    const int rows = 6;
    for (int n : {200, 64, 5, 1}) {
        Array<float> x("x", rows * n, [&](int i) { return score(i / n, i % n, n); });
        Array<float> p("p", rows * n);
        LAUNCH(softmax, blocks_of(rows, WARPS), WARPS * 32, 0, nullptr, rows, n, x, p);
        right = expect(p, [&](int i) {
            const float* row = x + i / n * n;
            double m = *std::max_element(row, row + n), s = 0;
            for (int j = 0; j < n; j++) s += std::exp(row[j] - m);
            return std::exp(x[i] - m) / s;
        }, 1e-5) && right;
    }
    return !right;
}
