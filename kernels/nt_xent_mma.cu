// NT-Xent on the tensor cores: mma.sync.m16n8k16 on bf16, with fp32 accumulation. D <= 256, sm_80.
//
// fp32 input is split, z = hi + lo, both bf16, which keeps 16 bits of each coordinate; a product
// is hi hi + hi lo + lo hi, three mma. The backward's weights are split likewise. bf16 input is its
// own hi; there is no lo. Formula, shapes and the simt version: nt_xent.cu.
//
// Owners    a block is 4 warps; a warp owns 16 rows, and the block walks over a shard of the
//           columns in tiles of 64 (32 where hi and lo have 256 features each). A row's values lie
//           in the 4 lanes of a quad. The warp's rows stay in registers as the A operands of s;
//           the weights stay there too: an accumulator has the layout of the next product's A.
// Memory    `prepare` writes hi and lo once, rows padded to a multiple of 16 features, so all tiles
//           are copied 16 bytes at a time, whatever the alignment of z. Two stages of tiles: 64 KiB
//           at D = 128 for fp32, half that for bf16. 16-byte chunks are permuted against bank
//           conflicts.
// Work      per warp and tile of 64 columns, D = 128, fp32: forward 192 mma, 64 ldmatrix, 32
//           exponentials a lane; backward 384, 128, 64. A tensor core takes 6.4 cycles for an mma
//           (mma.sync reaches 62 % of an H100's peak), so the backward's exponentials, 512 cycles
//           of the special function unit, hide behind 2,500 of the tensor core. That is why there
//           are two of them and not one times a quotient, which would overflow for small t.
// Numerics  16 bits of z leave an error of about 4e-7 |z|^2 / t in the gradient, TF32 30e-6 |z|^2
//           / t. __expf is 2 ulp + 2^-22 |x| off, where exp(x) is then small.
#include "nt_xent_mma.cuh"

namespace {

template <typename T>
__global__ void __launch_bounds__(256)
    prepare_parts(const T* z, int m, int depth, int stride, bfloat16* parts, unsigned* tickets,
                  int count) {
    int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (n < count) tickets[n] = 0;
    if (!parts || n >= int64_t(m) * stride) return;
    int64_t row = n / stride;
    int d = n % stride;
    float x = d < depth ? widen(load_global(z + row * depth + d)) : 0;
    bfloat16 high = narrow<bfloat16>(x);
    store_global(parts + n, high);
    if (PARTS<T> == 1) return;
    float rest = x - widen(high);
    if (rest != rest) rest = 0;  // of infinity; a NaN is in `high`
    store_global(parts + int64_t(m) * stride + n, narrow<bfloat16>(rest));
}

template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    forward_mma(Problem<T> p, Parts of, Output<float> out) {
    DYN_SMEM(bfloat16, shared);
    constexpr int WIDE = COLUMNS<D, T>;
    int i0 = blockIdx.x * TILE, end = shard_begin(p.m, WIDE, blockIdx.y + 1);
    int j0 = shard_begin(p.m, WIDE, blockIdx.y);
    uint32_t a[PARTS<T>][D / 16][4];
    Row<float> row[2];
    load_tile<D, T>(of, j0, shared);
    cp_async_commit();
    load_rows<D>(of, p.first, p.r, i0, a);
    for (int stage = 0; j0 < end; j0 += WIDE, stage ^= 1) {
        __syncthreads();  // all are done with the stage that comes next
        if (j0 + WIDE < end)
            load_tile<D, T>(of, j0 + WIDE, shared + (stage ^ 1) * STAGE<D, T>);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        float s[WIDE / 8][4];
        multiply<D, T>(a, shared + stage * STAGE<D, T>, p.depth, s);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float of_row[WIDE / 4];
            int i = i0 + row_of(2 * h), self = p.self(i), positive = p.positive(i);
#pragma unroll
            for (int c = 0; c < WIDE / 4; c++) {
                int j = j0 + column_of(c / 2, c % 2);
                bool counts = j < p.m && j != self;
                of_row[c] = counts ? s[c / 2][2 * h + c % 2] * p.inverse_t : -INFINITY;
                if (j != positive) continue;
                row[h].positive = of_row[c];
                if (p.decoupled) of_row[c] = -INFINITY;
            }
            row[h].add(of_row, quick);
        }
    }
    finish<4>(row, p.r, out, shared, [](int h) { return row_of(2 * h); });
}

template <int D, typename T>
__global__ void __launch_bounds__(THREADS, 2)
    backward_mma(Problem<T> p, Parts of, Statistics<float> by, Shards<float> shards, T* d_rows) {
    constexpr int WIDE = COLUMNS<D, T>, STATISTICS = 3 * WIDE;
    DYN_SMEM(bfloat16, shared);
    float* statistics = reinterpret_cast<float*>(shared + 2 * STAGE<D, T>);
    int i0 = blockIdx.x * TILE, slab = blockIdx.z * WIDTH<D, T>, lane = threadIdx.x % LANES;
    int j0 = shard_begin(p.m, WIDE, blockIdx.y), end = shard_begin(p.m, WIDE, blockIdx.y + 1);
    uint32_t a[PARTS<T>][D / 16][4];
    float sum[WIDTH<D, T> / 8][4] = {}, top[2], log_sum[2], g[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = i0 + row_of(2 * h);
        top[h] = i < p.r ? by.top(p.first + i) : 0;
        log_sum[h] = i < p.r ? by.log_sum(p.first + i) : 0;
        g[h] = i < p.r ? by.cotangent(p.first + i) : 0;
    }
    float next[3] = {};  // top, log_sum and g of the next tile's column threadIdx.x
    auto load = [&](int j0, int stage) {
        load_tile<D, T>(of, j0, shared + stage * STAGE<D, T>);
        int j = j0 + threadIdx.x;
        if (int(threadIdx.x) >= WIDE) return;
        next[0] = j < p.m ? by.top(j) : 0;
        next[1] = j < p.m ? by.log_sum(j) : 0;
        next[2] = j < p.m ? by.cotangent(j) : 0;
    };
    auto keep = [&](int stage) {
        for (int n = 0; n < 3 && int(threadIdx.x) < WIDE; n++)
            statistics[stage * STATISTICS + n * WIDE + threadIdx.x] = next[n];
    };
    load(j0, 0);
    cp_async_commit();
    load_rows<D>(of, p.first, p.r, i0, a);
    keep(0);
    for (int stage = 0; j0 < end; j0 += WIDE, stage ^= 1) {
        __syncthreads();  // all are done with the stage that comes next
        if (j0 + WIDE < end) load(j0 + WIDE, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        bfloat16* here = shared + stage * STAGE<D, T>;
        const float* top_j = statistics + stage * STATISTICS;
        const float *log_sum_j = top_j + WIDE, *g_j = top_j + 2 * WIDE;
        float s[WIDE / 8][4];
        multiply<D, T>(a, here, p.depth, s);
        keep(stage ^ 1);  // by now it has come
#pragma unroll
        for (int n = 0; n < WIDE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                // weight = g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]
                int h = e / 2, c = column_of(n, e), i = i0 + row_of(e), j = j0 + c;
                float sim = s[n][e] * p.inverse_t;
                float weight = g[h] * quick(sim - top[h] - log_sum[h]) +
                               g_j[c] * quick(sim - top_j[c] - log_sum_j[c]);
                if (j == p.positive(i)) weight = (p.decoupled ? 0 : weight) - (g[h] + g_j[c]);
                s[n][e] = j < p.m && j != p.self(i) ? weight : 0;
            }
#pragma unroll
        for (int k = 0; k < WIDE / 16; k++) {
            uint32_t w[PARTS<T>][4];
            split(s[2 * k], s[2 * k + 1], w);
#pragma unroll
            for (int n = 0; n < WIDTH<D, T> / 8; n += 2) {  // d z_id += weight_ij z_jd
#pragma unroll
                for (int part = PARTS<T> - 1; part >= 0; part--) {
                    uint32_t b[4];
                    int row = 16 * k + lane % 16, column = slab / 8 + n + lane / 16;
                    ldmatrix_x4_trans(b, chunk<D>(here + part * PART<D, T>, row, column));
#pragma unroll
                    for (int mine = PARTS<T> - 1 - part; mine >= 0; mine--) {
                        mma_m16n8k16(sum[n], w[mine], b[0], b[1]);
                        mma_m16n8k16(sum[n + 1], w[mine], b[2], b[3]);
                    }
                }
            }
        }
    }
    if (!shards.add_up(sum, shared)) return;
#pragma unroll
    for (int n = 0; n < WIDTH<D, T> / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int i = i0 + row_of(e), d = slab + column_of(n, e);
            if (i >= p.r || d >= p.depth) continue;
            store_global(d_rows + int64_t(i) * p.depth + d, narrow<T>(sum[n][e] * p.inverse_t));
        }
}

int stride_of(int depth) { return blocks(depth, 16) * 16; }

Parts parts_of(const Arguments& of) {
    return {static_cast<const bfloat16*>(of.parts), of.m, stride_of(of.depth)};
}

template <int D, typename T> void launch_forward(const Arguments& of, void* loss, void* lse) {
    dim3 grid(of.row_blocks(), of.shards(COLUMNS<D, T>, of.depth));
    constexpr int BYTES = 2 * STAGE<D, T> * sizeof(bfloat16);
    LAUNCH((forward_mma<D, T>), grid, THREADS, BYTES, of.stream, of.as<T>(), parts_of(of),
           of.output<float>(loss, lse));
}

template <int D, typename T>
void launch_backward(const Arguments& of, const void* lse, const void* g, int count,
                     void* d_rows) {
    dim3 grid(of.row_blocks(), of.shards(COLUMNS<D, T>, WIDTH<D, T>), of.slabs(WIDTH<D, T>));
    constexpr int BYTES =
        2 * (STAGE<D, T> * sizeof(bfloat16) + 3 * COLUMNS<D, T> * sizeof(float));
    LAUNCH((backward_mma<D, T>), grid, THREADS, BYTES, of.stream, of.as<T>(), parts_of(of),
           of.statistics<float>(lse, g, count), of.gradient_shards<float>(),
           static_cast<T*>(d_rows));
}

}  // namespace

template <typename T> void prepare(const Arguments& of, bool split, int tickets) {
    int64_t count = split ? int64_t(of.m) * stride_of(of.depth) : tickets;
    LAUNCH(prepare_parts<T>, (count > tickets ? count : tickets) / 256 + 1, 256, 0, of.stream,
           static_cast<const T*>(of.z), of.m, of.depth, stride_of(of.depth),
           split ? static_cast<bfloat16*>(of.parts) : nullptr, of.tickets, tickets);
}

template <typename T> void forward_by_mma(const Arguments& of, void* loss, void* lse) {
    auto run = of.depth <= 64    ? launch_forward<64, T>
               : of.depth <= 128 ? launch_forward<128, T>
                                 : launch_forward<256, T>;
    run(of, loss, lse);
}

template <typename T>
void backward_by_mma(const Arguments& of, const void* lse, const void* g, int count, void* d_rows) {
    auto run = of.depth <= 64    ? launch_backward<64, T>
               : of.depth <= 128 ? launch_backward<128, T>
                                 : launch_backward<256, T>;
    run(of, lse, g, count, d_rows);
}

template void prepare<float>(const Arguments&, bool, int);
template void prepare<bfloat16>(const Arguments&, bool, int);
template void forward_by_mma<float>(const Arguments&, void*, void*);
template void forward_by_mma<bfloat16>(const Arguments&, void*, void*);
template void backward_by_mma<float>(const Arguments&, const void*, const void*, int, void*);
template void backward_by_mma<bfloat16>(const Arguments&, const void*, const void*, int, void*);
