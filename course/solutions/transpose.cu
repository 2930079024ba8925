// A row of the tile is 33 words: the words of a column lie in banks x, x + 1, ..., all different.
__global__ void transpose(int height, int width, const float* in, float* out) {
    __shared__ float tile[TILE][TILE + 1];
    int x0 = blockIdx.x * TILE, y0 = blockIdx.y * TILE, lane = threadIdx.x;
    for (int line = threadIdx.y; line < TILE; line += LINES)
        if (y0 + line < height && x0 + lane < width)
            tile[line][lane] = in[(y0 + line) * width + x0 + lane];
    __syncthreads();
    for (int line = threadIdx.y; line < TILE; line += LINES)
        if (x0 + line < width && y0 + lane < height)
            out[(x0 + line) * height + y0 + lane] = tile[lane][line];
}
