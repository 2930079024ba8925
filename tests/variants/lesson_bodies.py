"""Right and wrong bodies of the lessons: what their tests must accept, and must refuse.

RIGHT has whole bodies in other styles than course/solutions. WRONG has (what is wrong, text of the
solution, what stands there instead): the mistakes that students make.
"""

RIGHT = {
    "vector_add": ["""
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        out[i] = x[i] + y[i];
""", """
    const int i = THREADS * blockIdx.x + threadIdx.x;
    if (i >= n) return;
    float sum = x[i];
    sum += y[i];
    out[i] = sum;
"""],
    "histogram": ["""
    __shared__ int mine[LEVELS];
    mine[threadIdx.x] = 0;
    __syncthreads();
    int step = gridDim.x * blockDim.x;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step)
        atomicAdd(mine + pixel[i], 1);
    __syncthreads();
    if (mine[threadIdx.x]) atomicAdd(count + threadIdx.x, mine[threadIdx.x]);
""", """
    // each thread owns a level and looks at the pixels of its block: no atomic in shared memory
    __shared__ uint8_t some[THREADS];
    int mine = 0;
    for (int first = blockIdx.x * THREADS; first < n; first += BLOCKS * THREADS) {
        __syncthreads();
        if (first + int(threadIdx.x) < n) some[threadIdx.x] = pixel[first + threadIdx.x];
        __syncthreads();
        for (int i = 0; i < min(THREADS, n - first); i++) mine += some[i] == threadIdx.x;
    }
    if (mine) atomicAdd(&count[threadIdx.x], mine);
"""],
    "transpose": ["""
    __shared__ float tile[32 * 33];
    int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
    if (x < width)
        for (int k = 0; k < 32 && y + k < height; k += 8)
            tile[(threadIdx.y + k) * 33 + threadIdx.x] = in[(y + k) * width + x];
    __syncthreads();
    x = blockIdx.y * 32 + threadIdx.x, y = blockIdx.x * 32 + threadIdx.y;
    if (x >= height) return;
    for (int k = 0; k < 32 && y + k < width; k += 8)
        out[(y + k) * height + x] = tile[threadIdx.x * 33 + threadIdx.y + k];
""", """
    // swizzled in place of padded: column c of row r lies at c ^ r
    __shared__ float tile[TILE][TILE];
    int lane = threadIdx.x, x0 = blockIdx.x * TILE, y0 = blockIdx.y * TILE;
    for (int k = 0; k < TILE / LINES; k++) {
        int r = threadIdx.y + LINES * k;
        if (x0 + lane < width && y0 + r < height)
            tile[r][lane ^ r] = in[(y0 + r) * width + x0 + lane];
    }
    __syncthreads();
    for (int k = 0; k < TILE / LINES; k++) {
        int r = threadIdx.y + LINES * k;
        if (y0 + lane < height && x0 + r < width)
            out[(x0 + r) * height + y0 + lane] = tile[lane][r ^ lane];
    }
"""],
    "block_sums": ["""
    // the first lane of each warp adds to one number
    __shared__ float total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    float mine = 0;
    for (int k = 0; k < CHUNK / THREADS; k++) {
        int i = blockIdx.x * CHUNK + k * THREADS + threadIdx.x;
        if (i < n) mine += x[i];
    }
    for (int bit = 1; bit < 32; bit *= 2) mine += __shfl_xor_sync(0xffffffff, mine, bit);
    if (threadIdx.x % 32 == 0) atomicAdd(&total, mine);
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = total;
""", """
    __shared__ float of_warp[8];
    float mine = 0;
    for (int i = blockIdx.x * CHUNK + threadIdx.x, k = 0; k < 4; k++, i += 256)
        mine += i < n ? x[i] : 0.f;
    mine = lane_sum<32>(mine);
    if (!(threadIdx.x & 31)) of_warp[threadIdx.x >> 5] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = of_warp[0];
        for (int warp = 1; warp < 8; warp++) sum += of_warp[warp];
        out[blockIdx.x] = sum;
    }
"""],
    "softmax": ["""
    // the lanes' maxima first, then their sums, all on the way of m
    int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float* from = x + row * n;
    float m = -INFINITY, s = 0;
    for (int j = lane; j < n; j += 32) {
        float value = from[j];
        if (value == -INFINITY) continue;
        if (value > m) s = s * expf(m - value) + 1, m = value;
        else s += expf(value - m);
    }
    float best = m;
    for (int bit = 16; bit; bit /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, bit));
    s = m == -INFINITY ? 0 : s * expf(m - best);
    for (int bit = 16; bit; bit /= 2) s += __shfl_xor_sync(~0u, s, bit);
    for (int j = lane; j < n; j += 32) p[row * n + j] = expf(from[j] - best) / s;
""", """
    // in parts of 256 elements that stay in registers: the maximum changes once a part
    struct State {
        float m = -1e38f, s = 0;
        __device__ void join(float other_m, float other_s) {
            float best = max(m, other_m);
            s = s * expf(m - best) + other_s * expf(other_m - best);
            m = best;
        }
    } state;
    int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    for (int first = 0; first < n; first += 256) {
        float some[8], m = -1e38f, s = 0;
        for (int k = 0; k < 8; k++) {
            int j = first + 32 * k + lane;
            some[k] = j < n ? x[row * n + j] : -INFINITY;
            m = max(m, some[k]);
        }
        for (int k = 0; k < 8; k++) s += expf(some[k] - m);
        state.join(m, s);
    }
    for (int bit = 1; bit < 32; bit *= 2) {
        float m = __shfl_xor_sync(~0u, state.m, bit), s = __shfl_xor_sync(~0u, state.s, bit);
        state.join(m, s);
    }
    for (int j = lane; j < n; j += 32) p[row * n + j] = expf(x[row * n + j] - state.m) / state.s;
"""],
    "matmul": ["""
    // each thread loads by its number in the block; rows of a as they are, padded
    __shared__ float x[TILE][DEPTH + 1], y[DEPTH][TILE];
    int thread = threadIdx.y * 16 + threadIdx.x;
    int i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    float sum[16] = {};
    for (int l0 = 0; l0 < k; l0 += DEPTH) {
        __syncthreads();
        for (int e = thread; e < TILE * DEPTH; e += 256) {
            int i = e / DEPTH, l = e % DEPTH;
            x[i][l] = i0 + i < m && l0 + l < k ? a[(i0 + i) * k + l0 + l] : 0;
            l = e / TILE;
            int j = e % TILE;
            y[l][j] = l0 + l < k && j0 + j < n ? b[(l0 + l) * n + j0 + j] : 0;
        }
        __syncthreads();
        for (int l = 0; l < DEPTH; l++) {
            float of_y[4];
            for (int c = 0; c < 4; c++) of_y[c] = y[l][threadIdx.x + 16 * c];
            for (int r = 0; r < 4; r++) {
                float of_x = x[threadIdx.y + 16 * r][l];
                for (int c = 0; c < 4; c++) sum[4 * r + c] += of_x * of_y[c];
            }
        }
    }
    for (int e = 0; e < 16; e++) {
        int i = i0 + threadIdx.y + e / 4 * 16, j = j0 + threadIdx.x + e % 4 * 16;
        if (i < m && j < n) out[i * n + j] = sum[e];
    }
""", """
    // a thread owns 4 x 4 neighbours, and takes four numbers of shared memory at a time
    __shared__ __align__(16) float x[DEPTH][TILE + 4], y[DEPTH][TILE];
    int tx = threadIdx.x, ty = threadIdx.y, i0 = blockIdx.y * TILE, j0 = blockIdx.x * TILE;
    float sum[4][4] = {};
    for (int l0 = 0; l0 < k; l0 += DEPTH) {
        for (int e = 0; e < 4; e++) {
            bool inside = i0 + ty + 16 * e < m && l0 + tx < k;
            x[tx][ty + 16 * e] = inside ? a[(i0 + ty + 16 * e) * k + l0 + tx] : 0;
            inside = l0 + ty < k && j0 + tx + 16 * e < n;
            y[ty][tx + 16 * e] = inside ? b[(l0 + ty) * n + j0 + tx + 16 * e] : 0;
        }
        __syncthreads();
        for (int l = 0; l < DEPTH; l++) {
            float4 of_x = *reinterpret_cast<float4*>(&x[l][4 * ty]);
            float4 of_y = *reinterpret_cast<float4*>(&y[l][4 * tx]);
            float u[4] = {of_x.x, of_x.y, of_x.z, of_x.w}, v[4] = {of_y.x, of_y.y, of_y.z, of_y.w};
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++) sum[r][c] += u[r] * v[c];
        }
        __syncthreads();
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++)
            if (i0 + 4 * ty + r < m && j0 + 4 * tx + c < n)
                out[(i0 + 4 * ty + r) * n + j0 + 4 * tx + c] = sum[r][c];
"""],
    "mma_tile": ["""
    // rows padded by 16 bytes in place of the permutation
    __shared__ __align__(16) bfloat16 tile[COLUMNS][DEPTH + 8];
    int lane = threadIdx.x, g = lane / 4, q = lane % 4;
    for (int n = lane; n < COLUMNS * DEPTH / 8; n += 32)
        *reinterpret_cast<float4*>(&tile[n / 8][n % 8 * 8]) =
            reinterpret_cast<const float4*>(b)[n];
    __syncwarp();
    auto pair = [&](int row, int d) {
        return *reinterpret_cast<const uint32_t*>(a + (16 * blockIdx.x + row) * DEPTH + d);
    };
    float sum[8][4] = {};
    for (int d = 0; d < DEPTH; d += 16) {
        uint32_t rows[4] = {pair(g, d + 2 * q), pair(g + 8, d + 2 * q), pair(g, d + 2 * q + 8),
                            pair(g + 8, d + 2 * q + 8)};
        for (int n = 0; n < 8; n += 2) {
            uint32_t columns[4];
            ldmatrix_x4(columns, &tile[8 * n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
            mma_m16n8k16(sum[n], rows, columns[0], columns[1]);
            mma_m16n8k16(sum[n + 1], rows, columns[2], columns[3]);
        }
    }
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++)
            s[(16 * blockIdx.x + g + 8 * (e / 2)) * COLUMNS + 8 * n + 2 * q + e % 2] = sum[n][e];
""", """
    // without ldmatrix: each lane reads its two registers of b itself, from padded rows
    __shared__ __align__(16) bfloat16 tile[COLUMNS * (DEPTH + 8)];
    int lane = threadIdx.x, g = lane / 4, q = lane % 4, i0 = 16 * blockIdx.x;
    for (int j = lane / 8; j < COLUMNS; j += 4)
        *reinterpret_cast<float4*>(tile + j * 72 + lane % 8 * 8) =
            *reinterpret_cast<const float4*>(b + j * DEPTH + lane % 8 * 8);
    __syncthreads();
    for (int n = 0; n < 8; n++) {
        float sum[4] = {0, 0, 0, 0};
        for (int k = 0; k < 4; k++) {
            uint32_t of_a[4];
            for (int e = 0; e < 4; e++)
                of_a[e] = *reinterpret_cast<const uint32_t*>(
                    a + (i0 + g + (e & 1) * 8) * DEPTH + 16 * k + 2 * q + (e >> 1) * 8);
            const bfloat16* row = tile + (8 * n + g) * 72 + 16 * k + 2 * q;
            mma_m16n8k16(sum, of_a, *reinterpret_cast<const uint32_t*>(row),
                         *reinterpret_cast<const uint32_t*>(row + 8));
        }
        float* to = s + (i0 + g) * COLUMNS + 8 * n + 2 * q;
        to[0] = sum[0], to[1] = sum[1], to[8 * COLUMNS] = sum[2], to[8 * COLUMNS + 1] = sum[3];
    }
"""],
}

WRONG = {
    "vector_add": [
        ("no tail", "if (i < n) ", ""),
        ("one past the end", "i < n", "i <= n"),
        ("not coalesced", "blockIdx.x * blockDim.x + threadIdx.x",
         "threadIdx.x * gridDim.x + blockIdx.x"),
        ("the last block is left out", "i < n", "i < n / THREADS * THREADS"),
        ("two threads write a sum", "int i = blockIdx.x * blockDim.x + threadIdx.x;",
         "int i = (blockIdx.x * blockDim.x + threadIdx.x) / 2;\n    if (i < n) out[i] = x[i] + "
         "y[i];\n    i += n / 2;"),
    ],
    "histogram": [
        ("no atomic in shared memory", "atomicAdd(&mine[pixel[i]], 1)", "mine[pixel[i]] += 1"),
        ("no atomic at the end", "atomicAdd(&count[v], mine[v])", "count[v] += mine[v]"),
        ("counts begin at anything", "mine[v] = 0", ";"),
        ("no barrier before counting", "mine[v] = 0;\n    __syncthreads();", "mine[v] = 0;"),
        ("no barrier after counting", "1);\n    __syncthreads();", "1);"),
        ("one warp's pixels are left out", "i < n", "i < n - 31"),
        ("each pixel goes to global memory", "atomicAdd(&mine[pixel[i]], 1)",
         "atomicAdd(&count[pixel[i]], 1)"),
    ],
    "transpose": [
        ("no barrier", "    __syncthreads();\n", ""),
        ("no padding", "TILE + 1", "TILE"),
        ("padded to an even width", "TILE + 1", "TILE + 2"),
        ("writes columns", "out[(x0 + line) * height + y0 + lane] = tile[lane][line]",
         "out[(x0 + lane) * height + y0 + line] = tile[line][lane]"),
        ("height and width exchanged at the end", "x0 + line < width && y0 + lane < height",
         "x0 + lane < width && y0 + line < height"),
        ("a tile is not turned", "tile[lane][line]", "tile[line][lane]"),
        ("no tail", "        if (y0 + line < height && x0 + lane < width)\n", ""),
    ],
    "block_sums": [
        ("no barrier", "    __syncthreads();\n", ""),
        ("one shuffle too few", "int half = 16; half; half /= 2) sum += __shfl_down_sync(~0u, sum, "
         "half);\n    if (lane == 0) of_warp", "int half = 16; half > 1; half /= 2) sum += "
         "__shfl_down_sync(~0u, sum, half);\n    if (lane == 0) of_warp"),
        ("all lanes write", "if (lane == 0) of_warp[warp] = sum", "of_warp[warp] = sum"),
        ("all warps write", "if (warp > 0) return;", ""),
        ("the last lanes read what nobody wrote", "lane < THREADS / 32 ? of_warp[lane] : 0",
         "of_warp[lane]"),
        ("half of the warp exchanges",
         "if (warp > 0) return;\n    sum = lane < THREADS / 32 ? of_warp[lane] : 0;",
         "if (warp > 0 || lane >= THREADS / 32) return;\n    sum = of_warp[lane];"),
        ("no tail", "min(n, int(blockIdx.x + 1) * CHUNK)", "int(blockIdx.x + 1) * CHUNK"),
    ],
    "softmax": [
        ("begins at -infinity", "float m = -3.4e38f", "float m = -INFINITY"),
        ("begins at 0", "float m = -3.4e38f", "float m = 0"),
        ("the sum is not rescaled", "s * expf(before - m) + expf", "s + expf"),
        ("rescaled the other way", "s * expf(before - m)", "s * expf(m - before)"),
        ("lanes join without rescaling", "s * expf(m - best) + other_s * expf(other_m - best)",
         "s + other_s"),
        ("the other lane's maximum is lost", "        m = best;\n", ""),
        ("three readings", "float m = -3.4e38f, s = 0;",
         "float m = -3.4e38f, s = 0;\n    for (int j = lane; j < n; j += 32) m = fmaxf(m, x[j]);"),
        ("half of the lanes do not join", "int bit = 16; bit", "int bit = 8; bit"),
    ],
    "matmul": [
        ("no barrier before use", "        __syncthreads();\n        for (int l = 0",
         "        for (int l = 0"),
        ("no barrier before the next step", "        }\n        __syncthreads();\n    }\n",
         "        }\n    }\n"),
        ("no zeros past k", "i0 + i < m && l0 + tx < k", "i0 + i < m"),
        ("the last step is left out", "l0 < k; l0", "l0 + DEPTH <= k; l0"),
        ("no registers", """
            float x[4], y[4];
            for (int r = 0; r < 4; r++) x[r] = of_a[l][ty + 16 * r], y[r] = of_b[l][tx + 16 * r];
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++) sum[r][c] += x[r] * y[c];
        }""", """}
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < 4; c++)
                for (int l = 0; l < DEPTH; l++)
                    sum[r][c] += of_a[l][ty + 16 * r] * of_b[l][tx + 16 * c];"""),
        ("no tail", "if (i < m && j < n) ", ""),
    ],
    "mma_tile": [
        ("registers in the wrong order", "g + e % 2 * 8, d = 16 * k + 2 * q + e / 2 * 8",
         "g + e / 2 * 8, d = 16 * k + 2 * q + e % 2 * 8"),
        ("no permutation", "(c ^ j % 8)", "c"),
        ("written as it is, read permuted", "8 * (c ^ j % 8)) =", "8 * c) ="),
        ("no barrier", "    __syncthreads();\n", ""),
        ("halves of b exchanged", "of_a, of_b[0], of_b[1]", "of_a, of_b[1], of_b[0]"),
        ("a step of d is left out", "k < DEPTH / 16", "k < DEPTH / 16 - 1"),
    ],
}
