// NT-Xent, the contrastive loss of SimCLR, without ever storing the M x M similarities.
//
// Formula   s_ij = <z_i, z_j> / t,   pos(i) the other view of i
//           forward    lse_i = log sum_{j != i} exp(s_ij),   loss = 1/R sum_i (lse_i - s_i,pos(i))
//           backward   P_ij = exp(s_ij - lse_i), g_i the cotangent of row i's term
//                      d z_i = 1/t sum_j (g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]) z_j
//           S is symmetric, so a row of it gives P_ij and P_ji both: one row-parallel kernel
//           returns the whole gradient with no atomic sums and no second pass.
//           decoupled: the sum of lse_i leaves pos(i) out, so that P_i,pos(i) is 0.
// Shapes    z (M, D): all rows of all ranks, contiguous. This rank's are rows first .. first + R, R
//           even; pos(i) = i + R/2 mod R among them. loss () and lse (R, 2), in Wide<T>: the row's
//           greatest s_ij, and the rest of its log-sum-exp. The backward takes lse (M, 2) of all
//           rows, and g (G), M a multiple of G: the cotangents of the means of G equal shards.
// Versions  simt, in this file: any type and D; read it first. mma, in nt_xent_mma.cu: fp32 and
//           bf16 on tensor cores. The launchers below choose; what both share is in nt_xent.cuh.
// Owners    a block owns 64 rows and walks over columns in tiles of 64. While there are fewer than
//           two blocks a multiprocessor, several share the columns of the same rows (blockIdx.y);
//           the last of them to finish puts the parts together in their order. Threads: 16 x 16;
//           thread (tx, ty) owns rows 4 ty .. + 3, columns 4 tx .. + 3 of a tile. Backward blocks
//           own 128 features; above D = 128 others do the rest, S is made again.
// Work      2 M R D operations forward, 4 M R D backward (2 M R D more for each further slab of
//           features), as in plain autograd: to recompute S is free. Elements read from global
//           memory, most of them from its L2 cache, with B = ceil(R/64) blocks, C = ceil(M/64)
//           tiles, S slabs of F features (128; mma: 64 where D > 128 in fp32), K shards, D' = D
//           rounded up to 16, P parts (2 of fp32, else 1; T: 2 bytes) of mma:
//             simt  forward (R C + M B) D; backward S times that + M B D,
//                   statistics 48 S (K R + M B)
//             mma   prepare M D in T; forward P (K R + M B) D'; backward S times that,
//                   statistics S (12 K R + 3 M B)
//           and, where K > 1, what the shards found: forward 12 numbers (mma: 6) of each thread,
//           backward 64 F of each block. Launches: `prepare` and one forward, one backward. At M =
//           8192, D = 128 PyTorch's composition moves 1.9 GB forward, 2.7 GB backward and keeps
//           several matrices of 256 MiB; here z, its parts and dz, 4 MiB each. Bound: arithmetic.
// Numerics  running maximum and sum in each thread, so any t > 0 is safe; fp32 accumulation (fp64
//           for fp64); fixed order, the same bits every run on the same GPU. Saved for the
//           backward: the maximum and the rest, not their sum, which at t = 0.001 is near 1000 and
//           would carry an error of 3e-5 into P.
// Measured  nvcc 13.0 for sm_75, 80, 86, 89, 90, 100 and 120: no spill, no stack frame. Run on the
//           CPU only, on no GPU yet.
#include <algorithm>

#include "nt_xent.cuh"

namespace {

constexpr int DEPTH = 16, PAD = TILE + 4;

// to[k][i] = z[first + i][d0 + k] for 64 rows, 16 features; 0 from row `end`, feature `depth` on.
template <typename T>
__device__ void load_chunk(const T* z, int end, int depth, int first, int d0, Wide<T>* to) {
#pragma unroll
    for (int n = 0; n < TILE / 16; n++) {  // a fixed count, so that all loads are under way at once
        int i = threadIdx.y + 16 * n;
        bool inside = first + i < end && d0 + int(threadIdx.x) < depth;
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
        load_chunk(p.z, p.first + p.r, p.depth, p.first + i0, d0, a);
        load_chunk(p.z, p.m, p.depth, j0, d0, b);
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
            bool counts = j < p.m && j != p.self(i);
            s[r][c] = counts ? s[r][c] * p.inverse_t : -Wide<T>(INFINITY);
        }
}

template <typename T>
__global__ void __launch_bounds__(256) forward_simt(Problem<T> p, Output<Wide<T>> out) {
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    int i0 = blockIdx.x * TILE, end = shard_begin(p.m, TILE, blockIdx.y + 1);
    Row<W> row[4];
    for (int j0 = shard_begin(p.m, TILE, blockIdx.y); j0 < end; j0 += TILE) {
        W s[4][4];
        similarities(p, i0, j0, shared, s);
        for (int r = 0; r < 4; r++) {
            for (int c = 0; c < 4; c++)
                if (j0 + 4 * int(threadIdx.x) + c == p.positive(i0 + 4 * threadIdx.y + r)) {
                    row[r].positive = s[r][c];
                    if (p.decoupled) s[r][c] = -W(INFINITY);
                }
            row[r].add(s[r], [](W x) { return exponential(x); });
        }
    }
    finish<16>(row, p.r, out, shared, [](int r) { return 4 * threadIdx.y + r; });
}

template <typename T>
__global__ void __launch_bounds__(256)
    backward_simt(Problem<T> p, Statistics<Wide<T>> of, Shards<Wide<T>> shards, T* d_rows) {
    using W = Wide<T>;
    DYN_SMEM(W, shared);
    constexpr int WIDE = SLAB + 4;
    W *z = shared, *weight = shared + 2 * DEPTH * PAD;  // z[k][d] takes the place of a and b
    int i0 = blockIdx.x * TILE, slab = blockIdx.z * SLAB;
    int end = shard_begin(p.m, TILE, blockIdx.y + 1);
    W sum[4][8] = {}, top[4], log_sum[4], g[4];
    for (int r = 0; r < 4; r++) {
        int i = i0 + 4 * threadIdx.y + r;
        top[r] = i < p.r ? of.top(p.first + i) : W(0);
        log_sum[r] = i < p.r ? of.log_sum(p.first + i) : W(0);
        g[r] = i < p.r ? of.cotangent(p.first + i) : W(0);
    }
    for (int j0 = shard_begin(p.m, TILE, blockIdx.y); j0 < end; j0 += TILE) {
        W s[4][4];
        similarities(p, i0, j0, shared, s);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            // weight = g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]
            int j = j0 + 4 * threadIdx.x + c;
            W top_j = j < p.m ? of.top(j) : W(0);
            W log_sum_j = j < p.m ? of.log_sum(j) : W(0);
            W g_j = j < p.m ? of.cotangent(j) : W(0);
            for (int r = 0; r < 4; r++) {
                W value = g[r] * exponential(s[r][c] - top[r] - log_sum[r]) +
                          g_j * exponential(s[r][c] - top_j - log_sum_j);
                if (j == p.positive(i0 + 4 * threadIdx.y + r))
                    value = (p.decoupled ? W(0) : value) - (g[r] + g_j);
                weight[(4 * threadIdx.x + c) * PAD + 4 * threadIdx.y + r] = value;
            }
        }
        for (int k0 = 0; k0 < TILE; k0 += DEPTH) {
#pragma unroll
            for (int n = 0; n < SLAB / 16; n++) {
                int j = j0 + k0 + threadIdx.y, d = threadIdx.x + 16 * n;
                bool inside = j < p.m && slab + d < p.depth;
                const T* from = p.z + int64_t(j) * p.depth + slab + d;
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
    if (!shards.add_up(sum, shared)) return;
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 8; c++) {
            int i = i0 + 4 * threadIdx.y + r, d = slab + threadIdx.x + 16 * c;
            if (i >= p.r || d >= p.depth) continue;
            store_global(d_rows + int64_t(i) * p.depth + d, narrow<T>(sum[r][c] * p.inverse_t));
        }
}

template <typename T> void forward_by_simt(const Arguments& of, void* loss, void* lse) {
    LAUNCH(forward_simt<T>, dim3(of.row_blocks(), of.shards(TILE, of.depth)), dim3(16, 16),
           2 * DEPTH * PAD * sizeof(Wide<T>), of.stream, of.as<T>(),
           of.output<Wide<T>>(loss, lse));
}

template <typename T>
void backward_by_simt(const Arguments& of, const void* lse, const void* g, int count,
                      void* d_rows) {
    LAUNCH(backward_simt<T>,
           dim3(of.row_blocks(), of.shards(TILE, SLAB), of.slabs(SLAB)), dim3(16, 16),
           (2 * DEPTH + TILE) * PAD * sizeof(Wide<T>), of.stream, of.as<T>(),
           of.statistics<Wide<T>>(lse, g, count), of.gradient_shards<Wide<T>>(),
           static_cast<T*>(d_rows));
}

}  // namespace

// Whether the tensor cores take it. Below t = 0.02 the split of fp32 into two bf16 is too coarse.
static bool by_mma(char type, const Arguments& of) {
    bool fits = type == 'b' || (type == 'f' && of.temperature >= 0.02);
    return fits && of.depth <= 256 && has_bf16_mma();
}

// Bytes of `room`, for what shards of the columns find: at most a slab's gradient a block.
int64_t nt_xent_room(char type, int r, int m, int depth) {
    int64_t rows = blocks(r, TILE), most = 2 * multiprocessors();
    int64_t sharing = rows > most ? 0 : std::min(most, rows * blocks(m, 32) * blocks(depth, 64));
    return (2 * rows + sharing * TILE * SLAB) * (type == 'd' ? sizeof(double) : sizeof(float));
}

// `type` is that of z: h half, b bfloat16, f float, d double. parts: bf16 (P, M, D'), or null.
// tickets: `count` of them, at least B ceil(D / 64) + 1, set here and left at 0.
void nt_xent_forward(char type, int r, int m, int first, int depth, double temperature,
                     bool decoupled, const void* z, void* parts, unsigned* tickets, int count,
                     void* room, void* loss, void* lse, void* stream) {
    Arguments of{r, m, first, depth, temperature, decoupled, z, parts, room, stream, tickets};
    bool mma = by_mma(type, of);
    (type == 'b' ? prepare<bfloat16> : prepare<float>)(of, mma, count);
    auto run = type == 'd'   ? forward_by_simt<double>
               : type == 'h' ? forward_by_simt<half>
               : type == 'f' ? (mma ? forward_by_mma<float> : forward_by_simt<float>)
                             : (mma ? forward_by_mma<bfloat16> : forward_by_simt<bfloat16>);
    run(of, loss, lse);
}

// parts and tickets are those that the forward left.
void nt_xent_backward(char type, int r, int m, int first, int depth, double temperature,
                      bool decoupled, const void* z, void* parts, unsigned* tickets,
                      void* room, const void* lse, const void* g, int count, void* d_rows,
                      void* stream) {
    Arguments of{r, m, first, depth, temperature, decoupled, z, parts, room, stream, tickets};
    bool mma = by_mma(type, of);
    auto run = type == 'd'   ? backward_by_simt<double>
               : type == 'h' ? backward_by_simt<half>
               : type == 'f' ? (mma ? backward_by_mma<float> : backward_by_simt<float>)
                             : (mma ? backward_by_mma<bfloat16> : backward_by_simt<bfloat16>);
    run(of, lse, g, count, d_rows);
}
