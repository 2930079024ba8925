// What the two versions of NT-Xent share: the problem, the running log-sum-exp of a row, and how
// blocks that saw different columns of the same rows put their results together.
#pragma once
#include <cfloat>
#include <cmath>

#include "common.cuh"

constexpr int TILE = 64, SLAB = 128;  // rows, and at most this many features, of a block

inline int blocks(int count, int size) { return (count + size - 1) / size; }

template <typename T> struct Problem {
    const T* z;  // (M, D): simt reads it
    int r, m, first, depth;
    bool decoupled;
    Wide<T> inverse_t;

    __device__ int self(int i) const { return first + i; }  // the columns of row i, of its positive
    __device__ int positive(int i) const { return first + (i < r / 2 ? i + r / 2 : i - r / 2); }
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

__device__ inline float lowest(float) { return -FLT_MAX; }  // finite: lowest - lowest is 0, not NaN
__device__ inline double lowest(double) { return -DBL_MAX; }

// ---------------------------------------- blocks that share rows

__device__ inline int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

// This block's shard of the columns: it is shard blockIdx.y of gridDim.y, in whole tiles.
__device__ inline int shard_begin(int m, int tile, int shard) {
    int tiles = (m + tile - 1) / tile;
    int64_t begin = int64_t(tiles) * shard / gridDim.y * tile;
    return begin < m ? int(begin) : m;
}

// Whether this is the last of the `count` blocks that come here with this ticket; if so, it sees
// what the others stored. The ticket is 0 before and afterwards.
__device__ inline bool is_last(unsigned* ticket, unsigned count, void* shared) {
    volatile bool* last = static_cast<bool*>(shared);
    __threadfence();
    __syncthreads();
    if (thread_of_block() == 0) {
        *last = atomicAdd(ticket, 1u) == count - 1;
        if (*last) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    return *last;
}

// What each thread of a block that saw one shard of the columns found, kept for the last of them.
template <typename W> struct Shards {
    W* found;
    unsigned* ticket;

    template <int A, int B> __device__ W* place(int shard) const {
        int64_t block = (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * gridDim.y + shard;
        return found + block * A * B * blockDim.x * blockDim.y + thread_of_block();
    }
    template <int A, int B> __device__ void put(const W (&mine)[A][B]) const {
        W* to = place<A, B>(blockIdx.y);
#pragma unroll
        for (int n = 0; n < A * B; n++)
            store_global(to + n * blockDim.x * blockDim.y, mine[n / B][n % B]);
    }
    template <int A, int B> __device__ void take(int shard, W (&theirs)[A][B]) const {
        const W* from = place<A, B>(shard);
#pragma unroll
        for (int n = 0; n < A * B; n++)
            theirs[n / B][n % B] = load_fresh(from + n * blockDim.x * blockDim.y);
    }
    __device__ bool all_came(void* shared) const {
        return is_last(ticket + blockIdx.z * gridDim.x + blockIdx.x, gridDim.y, shared);
    }

    // sum = its sum over the shards, in their order; false if another block will do it.
    template <int A, int B> __device__ bool add_up(W (&sum)[A][B], void* shared) const {
        if (gridDim.y == 1) return true;
        put(sum);
        if (!all_came(shared)) return false;
#pragma unroll
        for (int n = 0; n < A * B; n++) sum[n / B][n % B] = 0;
        for (int shard = 0; shard < int(gridDim.y); shard++) {
            W theirs[A][B];
            take(shard, theirs);
#pragma unroll
            for (int n = 0; n < A * B; n++) sum[n / B][n % B] += theirs[n / B][n % B];
        }
        return true;
    }
};

// ---------------------------------------- the log-sum-exp of a row

template <typename W> struct Output {
    W *loss, *lse, *sums;  // (), (R, 2), and room for two numbers a block of rows
    Shards<W> shards;
    unsigned* ticket;  // of all blocks of rows
};

// Running log-sum-exp of one row, as far as one thread has seen it.
template <typename W> struct Row {
    W top = lowest(W()), sum = 0, positive = 0;

    template <int N, typename Exp> __device__ void add(const W (&s)[N], Exp exponential_of) {
        W before = top;
#pragma unroll
        for (int c = 0; c < N; c++) top = s[c] > top ? s[c] : top;
        sum *= exponential(before - top);
#pragma unroll
        for (int c = 0; c < N; c++) sum += exponential_of(s[c] - top);
    }

    // Add what another thread saw of the row.
    __device__ void join(W other_top, W other_sum, W other_positive) {
        W best = other_top > top ? other_top : top;
        sum = sum * exponential(top - best) + other_sum * exponential(other_top - best);
        top = best;
        positive += other_positive;  // one thread met it, the others hold 0
    }
};

// Put together what LANES threads of each shard saw of ROWS rows, row[n] of row_of_block(n) in the
// block; store lse and, when the rows of all blocks are done, the mean loss.
template <int LANES, typename W, int ROWS, typename Place>
__device__ void finish(Row<W> (&row)[ROWS], int r, const Output<W>& out, void* shared,
                       Place row_of_block) {
    if (gridDim.y > 1) {
        W mine[ROWS][3];
#pragma unroll
        for (int n = 0; n < ROWS; n++)
            mine[n][0] = row[n].top, mine[n][1] = row[n].sum, mine[n][2] = row[n].positive;
        out.shards.put(mine);
        if (!out.shards.all_came(shared)) return;
#pragma unroll
        for (int n = 0; n < ROWS; n++) row[n] = Row<W>();
        for (int shard = 0; shard < int(gridDim.y); shard++) {
            out.shards.take(shard, mine);
#pragma unroll
            for (int n = 0; n < ROWS; n++) row[n].join(mine[n][0], mine[n][1], mine[n][2]);
        }
    }
    W* loss = static_cast<W*>(shared);  // of the block's rows
    __syncthreads();                    // all are done with what was in shared memory
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        int at = row_of_block(n), i = blockIdx.x * TILE + at;
        W best = lane_max<LANES>(row[n].top);
        W log_sum = logarithm(lane_sum<LANES>(row[n].sum * exponential(row[n].top - best)));
        W positive = lane_sum<LANES>(row[n].positive);
        if (threadIdx.x % LANES) continue;
        loss[at] = i < r ? log_sum + (best - positive) : W(0);
        if (i >= r) continue;
        store_global(out.lse + 2 * int64_t(i), best);
        store_global(out.lse + 2 * int64_t(i) + 1, log_sum);
    }
    __syncthreads();
    int thread = thread_of_block();
    if (thread < TILE) {
        W sum = lane_sum<32>(loss[thread]);
        if (thread % 32 == 0) store_global(out.sums + 2 * blockIdx.x + thread / 32, sum);
    }
    if (!is_last(out.ticket, gridDim.x, shared) || thread >= 32) return;
    W sum = 0;
    for (int n = thread; n < 2 * int(gridDim.x); n += 32) sum += load_fresh(out.sums + n);
    sum = lane_sum<32>(sum);
    if (thread == 0) store_global(out.loss, sum / r);
}

// ---------------------------------------- the backward's inputs

template <typename W> struct Statistics {
    const W *lse, *g;  // (M, 2) and (G): the cotangents of the means of G equal shards of the rows
    int each;          // M / G

    __device__ W top(int j) const { return load_global(lse + 2 * int64_t(j)); }
    __device__ W log_sum(int j) const { return load_global(lse + 2 * int64_t(j) + 1); }
    __device__ W cotangent(int j) const { return load_global(g + j / each) / each; }
};

// ---------------------------------------- launchers

struct Arguments {
    int r, m, first, depth;
    double temperature;
    bool decoupled;
    const void* z;
    void *parts, *room, *stream;  // parts: z in bf16, see nt_xent_mma.cu
    unsigned* tickets;

    int row_blocks() const { return blocks(r, TILE); }
    int slabs(int width) const { return blocks(depth, width); }

    // Shards of the columns: as many as bring two blocks to each multiprocessor.
    int shards(int tile, int width) const {
        int full = 2 * multiprocessors() / (row_blocks() * slabs(width)), most = blocks(m, tile);
        return full < 1 ? 1 : full < most ? full : most;
    }
    template <typename T> Problem<T> as() const {
        return {static_cast<const T*>(z), r, m, first, depth, decoupled, Wide<T>(1 / temperature)};
    }
    template <typename W> Output<W> output(void* loss, void* lse) const {
        W* sums = static_cast<W*>(room);
        return {static_cast<W*>(loss), static_cast<W*>(lse), sums,
                {sums + 2 * row_blocks(), tickets}, tickets + row_blocks()};
    }
    template <typename W> Shards<W> gradient_shards() const {
        return {static_cast<W*>(room), tickets};
    }
    template <typename W>
    Statistics<W> statistics(const void* lse, const void* g, int count) const {
        return {static_cast<const W*>(lse), static_cast<const W*>(g), m / count};
    }
};

// Defined in nt_xent_mma.cu. T: float or bfloat16.
template <typename T> void prepare(const Arguments& of, bool split, int tickets);
template <typename T> void forward_by_mma(const Arguments& of, void* loss, void* lse);
template <typename T>
void backward_by_mma(const Arguments& of, const void* lse, const void* g, int count, void* d_rows);
