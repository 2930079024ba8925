// NT-Xent, the contrastive loss of SimCLR, without ever storing the M x M similarities.
//
// Formula   s_ij = <z_i, z_j> / t,   pos(i) the other view of i
//           forward    loss_i = log sum_{j != i} exp(s_ij) - s_i,pos(i)
//           backward   P_ij = exp(s_ij - top_i - log_sum_i), g_i the cotangent of loss_i
//                      d z_i = 1/t sum_j (g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]) z_j
//           S is symmetric, so a row of it gives P_ij and P_ji both: one row-parallel kernel
//           returns the whole gradient with no atomics and no second pass.
// Shapes    columns (M, D): all rows of all ranks. rows (R, D): those of this rank, R even, which
//           are rows first .. first + R of columns; pos(i) = i + R/2 mod R. All contiguous.
//           loss, top (the row's greatest s_ij), log_sum (the rest of its log-sum-exp): Wide<T>,
//           (R). The backward takes top, log_sum and g of all columns, (M).
// Versions  simt: any type and D; read this one first. mma: bf16, D <= 256, on tensor cores.
// Owners    a block owns 64 rows and walks over all columns in tiles of 64.
//           simt: 16 x 16 threads; thread (tx, ty) owns rows 4 ty .. + 3, columns 4 tx .. + 3.
//           mma: 4 warps, a warp owns 16 rows; a row's 64 values lie in the 4 lanes of a quad. The
//           backward's P stays in registers: an accumulator has the layout of the next product's A.
//           Backward blocks own 128 features; above D = 128 others do the rest, S is made again.
// Work      2 M R D operations forward, 4 M R D backward (2 M R D more for each further 128
//           features), as in plain autograd: to recompute S is free.
//           Elements of T read from global memory, most of them from its L2 cache, with
//           B = ceil(R/64) blocks, C = ceil(M/64) tiles, S = ceil(D/128) slabs of features:
//             simt  forward (R C + M B) D; backward S times that + M B D, statistics 48 S (R + M B)
//             mma   forward (R   + M B) D; backward S times that,       statistics S (12 R + 3 M B)
//           At M = 8192, D = 128 PyTorch's composition moves 1.9 GB forward, 2.7 GB backward and
//           keeps several matrices of 256 MiB; here z and dz, 4 MiB each. Bound: arithmetic. A warp
//           tile of 16 x 64 is fed from shared memory at half the tensor cores' rate, and M/64
//           blocks fill an H100 only from M = 8192 on.
// Numerics  running maximum and sum in each thread, so any t > 0 is safe; fp32 accumulation (fp64
//           for fp64); fixed order, the same bits every run. Saved for the backward: top and
//           log_sum, not their sum, which at t = 0.001 is near 1000 and would carry an error of
//           3e-5 into P. mma rounds P to bf16 and uses __expf, 2 ulp + 2^-22 |x| off: nothing
//           beside bf16's 2^-9.
// Measured  nvcc 13.0 for sm_80 and sm_90: no spill, no stack frame; simt takes 64 to 172
//           registers, mma 79 to 213. Run on the CPU only, on no GPU yet.
#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace {

constexpr int TILE = 64, DEPTH = 16, PAD = TILE + 4, SLAB = 128;

template <typename T> struct Problem {
    const T *rows, *columns;
    int r, m, first, depth;
    Wide<T> inverse_t;

    __device__ bool diagonal(int i, int j) const { return j == first + i; }
    __device__ bool pair(int i, int j) const {
        return j == first + (i < r / 2 ? i + r / 2 : i - r / 2);
    }
};

template <typename W> struct Statistics {  // of the columns
    const W *top, *log_sum, *g;
};

template <typename W> struct Output {  // of the rows
    W *loss, *top, *log_sum;
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

__device__ inline float lowest(float) { return -FLT_MAX; }  // finite: lowest - lowest is 0, not NaN
__device__ inline double lowest(double) { return -DBL_MAX; }

// Running log-sum-exp of one row, as far as one thread has seen it.
template <typename W> struct Row {
    W top = lowest(W()), sum = 0, positive = 0;

    template <int N> __device__ void add(const W (&s)[N]) {
        W before = top;
        for (int c = 0; c < N; c++) top = s[c] > top ? s[c] : top;
        sum *= exponential(before - top);
        for (int c = 0; c < N; c++) sum += exponential(s[c] - top);
    }

    // Join with the other LANES - 1 threads that saw parts of this row; one of them stores row i.
    template <int LANES> __device__ void finish(int i, int count, const Output<W>& out) {
        W best = lane_max<LANES>(top);
        W log_sum = logarithm(lane_sum<LANES>(sum * exponential(top - best)));
        positive = lane_sum<LANES>(positive);  // one thread met it, the others hold 0
        if (threadIdx.x % LANES || i >= count) return;
        store_global(out.loss + i, log_sum + (best - positive));
        store_global(out.top + i, best);
        store_global(out.log_sum + i, log_sum);
    }
};

// ---------------------------------------- simt

// to[k][i] = z[first + i][d0 + k] for 64 rows and 16 features, 0 outside.
template <typename T>
__device__ void load_chunk(const T* z, int count, int depth, int first, int d0, Wide<T>* to) {
    for (int i = threadIdx.y; i < TILE; i += 16) {
        bool inside = first + i < count && d0 + int(threadIdx.x) < depth;
        const T* from = z + int64_t(first + i) * depth + d0 + threadIdx.x;
        to[threadIdx.x * PAD + i] = inside ? widen(load_global(from)) : Wide<T>(0);
    }
}

// s[r][c] = s_ij for i = i0 + 4 ty + r, j = j0 + 4 tx + c; -inf on the diagonal and past the end.
template <typename T>
__device__ void similarities(const Problem<T>& p, int i0, int j0, Wide<T>* shared,
                             Wide<T> (&s)[4][4]) {
    Wide<T>*a = shared, *b = shared + DEPTH * PAD;
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) s[r][c] = 0;
    for (int d0 = 0; d0 < p.depth; d0 += DEPTH) {
        load_chunk(p.rows, p.r, p.depth, i0, d0, a);
        load_chunk(p.columns, p.m, p.depth, j0, d0, b);
        __syncthreads();
        for (int k = 0; k < DEPTH; k++)  // s_ij += z_ik z_jk
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++)
                    s[r][c] += a[k * PAD + 4 * threadIdx.y + r] * b[k * PAD + 4 * threadIdx.x + c];
        __syncthreads();
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) {
            int i = i0 + 4 * threadIdx.y + r, j = j0 + 4 * threadIdx.x + c;
            bool counts = j < p.m && !p.diagonal(i, j);
            s[r][c] = counts ? s[r][c] * p.inverse_t : -Wide<T>(INFINITY);
        }
}

template <typename T>
__global__ void __launch_bounds__(256) forward_simt(Problem<T> p, Output<Wide<T>> out) {
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    int i0 = blockIdx.x * TILE;
    Row<W> row[4];
    for (int j0 = 0; j0 < p.m; j0 += TILE) {
        W s[4][4];
        similarities(p, i0, j0, shared, s);
        for (int r = 0; r < 4; r++) {
            row[r].add(s[r]);
            for (int c = 0; c < 4; c++)
                if (p.pair(i0 + 4 * threadIdx.y + r, j0 + 4 * threadIdx.x + c))
                    row[r].positive = s[r][c];
        }
    }
    for (int r = 0; r < 4; r++) row[r].template finish<16>(i0 + 4 * threadIdx.y + r, p.r, out);
}

template <typename T>
__global__ void __launch_bounds__(256)
    backward_simt(Problem<T> p, Statistics<Wide<T>> of, T* d_rows) {
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    constexpr int WIDE = SLAB + 4;
    W *z = shared, *weight = shared + 2 * DEPTH * PAD;  // z[k][d] takes the place of a and b
    int i0 = blockIdx.x * TILE, slab = blockIdx.y * SLAB;
    W sum[4][8] = {}, top[4], log_sum[4], g[4];
    for (int r = 0; r < 4; r++) {
        int i = i0 + 4 * threadIdx.y + r;
        top[r] = i < p.r ? load_global(of.top + p.first + i) : W(0);
        log_sum[r] = i < p.r ? load_global(of.log_sum + p.first + i) : W(0);
        g[r] = i < p.r ? load_global(of.g + p.first + i) : W(0);
    }
    for (int j0 = 0; j0 < p.m; j0 += TILE) {
        W s[4][4];
        similarities(p, i0, j0, shared, s);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            // weight = g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]
            int j = j0 + 4 * threadIdx.x + c;
            W top_j = j < p.m ? load_global(of.top + j) : W(0);
            W log_sum_j = j < p.m ? load_global(of.log_sum + j) : W(0);
            W g_j = j < p.m ? load_global(of.g + j) : W(0);
            for (int r = 0; r < 4; r++) {
                W value = g[r] * exponential(s[r][c] - top[r] - log_sum[r]) +
                          g_j * exponential(s[r][c] - top_j - log_sum_j);
                if (p.pair(i0 + 4 * threadIdx.y + r, j)) value -= g[r] + g_j;
                weight[(4 * threadIdx.x + c) * PAD + 4 * threadIdx.y + r] = value;
            }
        }
        for (int k0 = 0; k0 < TILE; k0 += DEPTH) {
            for (int d = threadIdx.x; d < SLAB; d += 16) {
                int j = j0 + k0 + threadIdx.y;
                bool inside = j < p.m && slab + d < p.depth;
                const T* from = p.columns + int64_t(j) * p.depth + slab + d;
                z[threadIdx.y * WIDE + d] = inside ? widen(load_global(from)) : W(0);
            }
            __syncthreads();
            for (int k = 0; k < DEPTH; k++)  // d z_id += weight_ij z_jd
                for (int r = 0; r < 4; r++)
                    for (int c = 0; c < 8; c++)
                        sum[r][c] += weight[(k0 + k) * PAD + 4 * threadIdx.y + r] *
                                     z[k * WIDE + threadIdx.x + 16 * c];
            __syncthreads();
        }
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 8; c++) {
            int i = i0 + 4 * threadIdx.y + r, d = slab + threadIdx.x + 16 * c;
            if (i >= p.r || d >= p.depth) continue;
            store_global(d_rows + int64_t(i) * p.depth + d, narrow<T>(sum[r][c] * p.inverse_t));
        }
}

// ---------------------------------------- mma

constexpr int LANES = 32, WARPS = TILE / 16, THREADS = WARPS * LANES;

// A tile of 64 rows of D features in shared memory. Its 16-byte chunks are permuted within the row
// by the row's number, so that the eight rows of an ldmatrix lie in different banks.
template <int D> __device__ bfloat16* chunk(bfloat16* tile, int row, int column) {
    return tile + row * D + (column ^ (row & 7)) * 8;
}

// Copy 16 bytes, `valid` elements of them real and the rest 0.
template <typename T> __device__ void copy_16(T* to, const T* from, int valid, bool aligned) {
    constexpr int COUNT = 16 / sizeof(T);
    valid = valid < 0 ? 0 : valid > COUNT ? COUNT : valid;
    if (aligned) return cp_async_16(to, from, valid * sizeof(T));
    for (int e = 0; e < COUNT; e++) to[e] = e < valid ? load_global(from + e) : narrow<T>(0);
}

template <int D>
__device__ void load_tile(const bfloat16* z, int count, int depth, int first, bool aligned,
                          bfloat16* to) {
    for (int n = threadIdx.x; n < TILE * D / 8; n += THREADS) {
        int row = n / (D / 8), column = n % (D / 8);
        int valid = first + row < count ? depth - 8 * column : 0;
        const bfloat16* from = valid > 0 ? z + int64_t(first + row) * depth + 8 * column : z;
        copy_16(chunk<D>(to, row, column), from, valid, aligned);
    }
}

// The warp's 16 rows of a tile as A operands, one for each 16 features.
template <int D> __device__ void load_rows(bfloat16* tile, uint32_t (&a)[D / 16][4]) {
    int lane = threadIdx.x % LANES, row = threadIdx.x / LANES * 16 + lane % 16;
    for (int k = 0; k < D / 16; k++) ldmatrix_x4(a[k], chunk<D>(tile, row, 2 * k + lane / 16));
}

// s[n] = the warp's 16 rows times columns 8 n .. 8 n + 7 of the tile.
template <int D>
__device__ void multiply(const uint32_t (&a)[D / 16][4], bfloat16* tile, int depth,
                         float (&s)[TILE / 8][4]) {
    int lane = threadIdx.x % LANES;
    for (int n = 0; n < TILE / 8; n++)
        for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        if (16 * k >= depth) break;
#pragma unroll
        for (int n = 0; n < TILE / 8; n += 2) {  // s_ij += z_ik z_jk
            uint32_t b[4];
            ldmatrix_x4(b, chunk<D>(tile, 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            mma_m16n8k16(s[n], a[k], b[0], b[1]);
            mma_m16n8k16(s[n + 1], a[k], b[2], b[3]);
        }
    }
}

// Row and column of element e of accumulator n: rows g, g + 8 of the warp; columns 2q, 2q + 1.
__device__ inline int row_of(int e) {
    return threadIdx.x / LANES * 16 + threadIdx.x % LANES / 4 + e / 2 * 8;
}
__device__ inline int column_of(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }

template <int D>
__global__ void __launch_bounds__(THREADS)
    forward_mma(Problem<bfloat16> p, bool aligned, Output<float> out) {
    DYN_SMEM(bfloat16, shared);
    constexpr int STAGE = TILE * D;
    int i0 = blockIdx.x * TILE;
    uint32_t a[D / 16][4];
    Row<float> row[2];
    load_tile<D>(p.rows, p.r, p.depth, i0, aligned, shared + STAGE);
    cp_async_commit();
    load_tile<D>(p.columns, p.m, p.depth, 0, aligned, shared);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    load_rows<D>(shared + STAGE, a);
    for (int j0 = 0; j0 < p.m; j0 += TILE) {
        __syncthreads();  // all are done with the stage that comes next
        bfloat16 *here = shared + j0 / TILE % 2 * STAGE, *next = shared + (STAGE - (here - shared));
        if (j0 + TILE < p.m) load_tile<D>(p.columns, p.m, p.depth, j0 + TILE, aligned, next);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        float s[TILE / 8][4];
        multiply<D>(a, here, p.depth, s);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float of_row[TILE / 4];
            int i = i0 + row_of(2 * h);
#pragma unroll
            for (int c = 0; c < TILE / 4; c++) {
                int j = j0 + column_of(c / 2, c % 2);
                bool counts = j < p.m && !p.diagonal(i, j);
                of_row[c] = counts ? s[c / 2][2 * h + c % 2] * p.inverse_t : -INFINITY;
                if (p.pair(i, j)) row[h].positive = of_row[c];
            }
            row[h].add(of_row);
        }
    }
    for (int h = 0; h < 2; h++) row[h].finish<4>(i0 + row_of(2 * h), p.r, out);
}

__device__ inline uint32_t pack(float low, float high) {
    bfloat16 pair[2] = {narrow<bfloat16>(low), narrow<bfloat16>(high)};
    uint32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return bits;
}

template <int D>
__global__ void __launch_bounds__(THREADS)
    backward_mma(Problem<bfloat16> p, Statistics<float> of, bool aligned, bfloat16* d_rows) {
    constexpr int WIDTH = D < SLAB ? D : SLAB;
    constexpr int STAGE = TILE * D + 3 * TILE * 2;  // a tile, and top, log_sum, g of its columns
    DYN_SMEM(bfloat16, shared);
    int i0 = blockIdx.x * TILE, slab = blockIdx.y * WIDTH, lane = threadIdx.x % LANES;
    auto load = [&](int j0, bfloat16* to) {
        load_tile<D>(p.columns, p.m, p.depth, j0, aligned, to);
        int array = threadIdx.x / 16, j = threadIdx.x % 16 * 4;
        if (array >= 3) return;
        const float* from = array == 0 ? of.top : array == 1 ? of.log_sum : of.g;
        float* statistics = reinterpret_cast<float*>(to + TILE * D) + array * TILE;
        copy_16(statistics + j, j0 + j < p.m ? from + j0 + j : from, p.m - j0 - j, aligned);
    };
    uint32_t a[D / 16][4];
    float sum[WIDTH / 8][4] = {}, top[2], log_sum[2], g[2];
    for (int h = 0; h < 2; h++) {
        int i = i0 + row_of(2 * h);
        top[h] = i < p.r ? load_global(of.top + p.first + i) : 0;
        log_sum[h] = i < p.r ? load_global(of.log_sum + p.first + i) : 0;
        g[h] = i < p.r ? load_global(of.g + p.first + i) : 0;
    }
    load_tile<D>(p.rows, p.r, p.depth, i0, aligned, shared + STAGE);
    cp_async_commit();
    load(0, shared);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    load_rows<D>(shared + STAGE, a);
    for (int j0 = 0; j0 < p.m; j0 += TILE) {
        __syncthreads();  // all are done with the stage that comes next
        bfloat16 *here = shared + j0 / TILE % 2 * STAGE, *next = shared + (STAGE - (here - shared));
        if (j0 + TILE < p.m) load(j0 + TILE, next);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const float* top_j = reinterpret_cast<const float*>(here + TILE * D);
        const float *log_sum_j = top_j + TILE, *g_j = top_j + 2 * TILE;
        float s[TILE / 8][4];
        multiply<D>(a, here, p.depth, s);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                // weight = g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]
                int h = e / 2, c = column_of(n, e), i = i0 + row_of(e), j = j0 + c;
                float sim = s[n][e] * p.inverse_t;
                float weight = g[h] * __expf(sim - top[h] - log_sum[h]) +
                               g_j[c] * __expf(sim - top_j[c] - log_sum_j[c]);
                if (p.pair(i, j)) weight -= g[h] + g_j[c];
                s[n][e] = j < p.m && !p.diagonal(i, j) ? weight : 0;
            }
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            float (&left)[4] = s[2 * k], (&right)[4] = s[2 * k + 1];
            uint32_t w[4] = {pack(left[0], left[1]), pack(left[2], left[3]),
                             pack(right[0], right[1]), pack(right[2], right[3])};
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n += 2) {  // d z_id += weight_ij z_jd
                uint32_t b[4];
                ldmatrix_x4_trans(b, chunk<D>(here, 16 * k + lane % 16, slab / 8 + n + lane / 16));
                mma_m16n8k16(sum[n], w, b[0], b[1]);
                mma_m16n8k16(sum[n + 1], w, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int i = i0 + row_of(e), d = slab + column_of(n, e);
            if (i >= p.r || d >= p.depth) continue;
            store_global(d_rows + int64_t(i) * p.depth + d,
                         narrow<bfloat16>(sum[n][e] * p.inverse_t));
        }
}

// ---------------------------------------- launchers

struct Arguments {
    int r, m, first, depth;
    double temperature;
    const void *rows, *columns;

    template <typename T> Problem<T> as() const {
        return {static_cast<const T*>(rows), static_cast<const T*>(columns), r, m, first, depth,
                Wide<T>(1 / temperature)};
    }
};

template <typename W> Output<W> output(void* loss, void* top, void* log_sum) {
    return {static_cast<W*>(loss), static_cast<W*>(top), static_cast<W*>(log_sum)};
}

template <typename W>
Statistics<W> statistics(const void* top, const void* log_sum, const void* g) {
    return {static_cast<const W*>(top), static_cast<const W*>(log_sum), static_cast<const W*>(g)};
}

int blocks(int count, int size) { return (count + size - 1) / size; }

template <typename... Pointers> bool multiples_of_16(Pointers... pointers) {
    return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

template <typename T>
void forward_by_simt(const Arguments& of, void* loss, void* top, void* log_sum, void* stream) {
    LAUNCH(forward_simt<T>, blocks(of.r, TILE), dim3(16, 16), 2 * DEPTH * PAD * sizeof(Wide<T>),
           stream, of.as<T>(), output<Wide<T>>(loss, top, log_sum));
}

template <int D>
void forward_by_mma(const Arguments& of, void* loss, void* top, void* log_sum, void* stream) {
    bool aligned = of.depth % 8 == 0 && multiples_of_16(of.rows, of.columns);
    LAUNCH(forward_mma<D>, blocks(of.r, TILE), THREADS, 2 * TILE * D * sizeof(bfloat16), stream,
           of.as<bfloat16>(), aligned, output<float>(loss, top, log_sum));
}

template <typename T>
void backward_by_simt(const Arguments& of, const void* top, const void* log_sum, const void* g,
                      void* d_rows, void* stream) {
    LAUNCH(backward_simt<T>, dim3(blocks(of.r, TILE), blocks(of.depth, SLAB)), dim3(16, 16),
           (2 * DEPTH + TILE) * PAD * sizeof(Wide<T>), stream, of.as<T>(),
           statistics<Wide<T>>(top, log_sum, g), static_cast<T*>(d_rows));
}

template <int D>
void backward_by_mma(const Arguments& of, const void* top, const void* log_sum, const void* g,
                     void* d_rows, void* stream) {
    bool aligned = of.depth % 8 == 0 && multiples_of_16(of.rows, of.columns, top, log_sum, g);
    LAUNCH(backward_mma<D>, dim3(blocks(of.r, TILE), blocks(of.depth, SLAB)), THREADS,
           2 * (TILE * D + 6 * TILE) * sizeof(bfloat16), stream, of.as<bfloat16>(),
           statistics<float>(top, log_sum, g), aligned, static_cast<bfloat16*>(d_rows));
}

}  // namespace

// `type` is that of rows and columns: h half, b bfloat16, f float, d double.
void nt_xent_forward(char type, int r, int m, int first, int depth, double temperature,
                     const void* rows, const void* columns, void* loss, void* top, void* log_sum,
                     void* stream) {
    bool mma = type == 'b' && depth <= 256 && has_bf16_mma();
    auto run = type == 'd'  ? forward_by_simt<double>
             : type == 'f'  ? forward_by_simt<float>
             : type == 'h'  ? forward_by_simt<half>
             : !mma         ? forward_by_simt<bfloat16>
             : depth <= 64  ? forward_by_mma<64>
             : depth <= 128 ? forward_by_mma<128>
                            : forward_by_mma<256>;
    run({r, m, first, depth, temperature, rows, columns}, loss, top, log_sum, stream);
}

void nt_xent_backward(char type, int r, int m, int first, int depth, double temperature,
                      const void* rows, const void* columns, const void* top, const void* log_sum,
                      const void* g, void* d_rows, void* stream) {
    bool mma = type == 'b' && depth <= 256 && has_bf16_mma();
    auto run = type == 'd'  ? backward_by_simt<double>
             : type == 'f'  ? backward_by_simt<float>
             : type == 'h'  ? backward_by_simt<half>
             : !mma         ? backward_by_simt<bfloat16>
             : depth <= 64  ? backward_by_mma<64>
             : depth <= 128 ? backward_by_mma<128>
                            : backward_by_mma<256>;
    run({r, m, first, depth, temperature, rows, columns}, top, log_sum, g, d_rows, stream);
}
