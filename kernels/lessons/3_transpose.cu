// Lesson 3: transpose. About 45 minutes.
//
// Question  In which order should a warp read and write memory, and where can it change the order?
// Formula   out[x][y] = in[y][x]; in (height, width), out (width, height), rows contiguous
// Owners    a block of 32 x 8 threads owns a tile of 32 x 32; a thread owns four of its elements.
// Mend      The body of transpose. It is right, and slow: a warp reads 32 floats side by side, 4
//           sectors of 32 bytes, and writes each to another row, which touches 32 sectors. Let the
//           block put its tile into shared memory, wait, and write rows of `out`. `profile` then
//           shows the next cost: shared memory has 32 banks, word i in bank i % 32, and lanes
//           that want different words of one bank take turns ("wavefronts"). How wide must a row
//           of the tile be, so that the words of a column lie in 32 banks?
// Passes    right elements; no fault in three orders of threads; at most 4.5 sectors a request;
//           at most 1.1 times the least wavefronts.
// On a GPU  4096 x 4096 floats are 134 MB read and written, 45 us at 3 TB/s. As it stands eight
//           times as many bytes are written: 604 MB, 200 us, unless the L2 cache merges sectors. A
//           tile read with 32 wavefronts for one takes 1024 cycles; 16,384 tiles on 132
//           multiprocessors at 1.7 GHz take 75 us, more than the memory; padded, 2.3 us.
// Next      `load_chunk` in nt_xent.cu, whose PAD is this one.
//
//     python -m kernels check kernels/lessons/3_transpose.cu
//     python -m kernels profile kernels/lessons/3_transpose.cu
#include "host.cuh"

constexpr int TILE = 32, LINES = 8;

__global__ void transpose(int height, int width, const float* in, float* out) {
    int x = blockIdx.x * TILE + threadIdx.x;
    for (int line = threadIdx.y; line < TILE; line += LINES) {
        int y = blockIdx.y * TILE + line;
        if (x < width && y < height) out[x * height + y] = in[y * width + x];
    }
}

// ---------------------------------------- test

bool test(int height, int width) {
    Array<float> in("in", height * width, noise), out("out", width * height);
    LAUNCH(transpose, dim3(blocks_of(width, TILE), blocks_of(height, TILE)), dim3(TILE, LINES), 0,
           nullptr, height, width, in, out);
    return expect(out, [&](int i) { return in[i % height * width + i / height]; });
}

int main() {
    bool large = test(104, 136), odd = test(5, 33), column = test(33, 1);
    return !(large && odd && column);
}
