// Each word of CUDA that cuda_words.h has, beside its definition in plain C++. Says which differ.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cassert>

#include "host.cuh"

namespace cg = cooperative_groups;
constexpr int N = 70, WIDTHS[] = {32, 16, 8, 2};  // threads: two warps and six lanes

__constant__ float coefficients[3];
__device__ int counter;

__device__ int value_of(int thread) { return (thread * 37 + 11) % 101 - 40; }

// What `source` says each lane reads, if that is in its segment of `width` lanes; else its own.
template <typename Source>
bool shuffled(const Array<int>& got, int first, int width, Source source) {
    for (int i = 0; i < 64; i++) {
        int from = source(i % 32), start = i % 32 / width * width;
        bool inside = from >= start && from < start + width;
        if (got[first + i] != value_of(inside ? i / 32 * 32 + from : i)) return false;
    }
    return true;
}

__global__ void shuffles(int* out) {
    int i = threadIdx.x, x = value_of(i);
    if (i >= 64) return;
    int* to = out + i;
    for (int width : {32, 16, 8, 2}) {
        to[0] = __shfl_sync(~0u, x, 5, width);
        to[64] = __shfl_up_sync(~0u, x, 3, width);
        to[128] = __shfl_down_sync(~0u, x, 3, width);
        to[192] = __shfl_xor_sync(0xffffffff, x, 1, width);
        to += 256;
    }
}

__global__ void votes(unsigned* out) {
    int i = threadIdx.x, x = value_of(i);
    unsigned mask = i < 64 ? ~0u : 0x3f;
    unsigned* to = out + 16 * i;
    to[0] = __ballot_sync(mask, x > 0);
    to[1] = __any_sync(mask, x == 50);
    to[2] = __all_sync(mask, x > -41);
    to[3] = __reduce_add_sync(mask, x);
    to[4] = __reduce_max_sync(mask, x);
    to[5] = __reduce_min_sync(mask, x);
    to[6] = __reduce_or_sync(mask, unsigned(x));
    to[7] = __match_any_sync(mask, x / 20);
    to[8] = __activemask();
    to[9] = 0;
    if (i % 3 == 0) to[9] = __activemask();
    to[10] = __syncthreads_count(x > 0);
    to[11] = __syncthreads_or(x == 50);
    to[12] = __syncthreads_and(x > 0);
    to[13] = warpSize;
}

__global__ void atomics(int* out, unsigned* bits, float* sums, double* sum,
                        unsigned long long* big) {
    __shared__ int shared[2];
    int x = value_of(threadIdx.x);
    if (threadIdx.x < 2) shared[threadIdx.x] = 0;
    __syncthreads();
    atomicAdd(&shared[0], x);
    atomicMax(&shared[1], x);
    atomicAdd(out, x), atomicSub(out + 1, x), atomicMin(out + 2, x), atomicMax(out + 3, x);
    atomicAnd(bits, ~(1u << threadIdx.x % 32)), atomicOr(bits + 1, 1u << threadIdx.x % 20);
    atomicXor(bits + 2, threadIdx.x), atomicInc(bits + 3, 50), atomicDec(bits + 4, 50);
    atomicAdd(sums, x), atomicAdd(sum, x / 2.), atomicAdd(big, 1ull << 33);
    int seen, old = atomicCAS(out + 4, 0, 0);
    do {  // an addition by hand
        seen = old;
        old = atomicCAS(out + 4, seen, seen + x);
    } while (old != seen);
    atomicAdd(&counter, 2);
    __syncthreads();
    if (threadIdx.x < 2) out[6 + threadIdx.x] = shared[threadIdx.x];
    if (threadIdx.x == 0) out[8] = atomicExch(out + 9, 77);
}

__global__ void numbers(float* out, float4* vectors, const float* in, int* whole) {
    cg::thread_block block = cg::this_thread_block();
    int i = block.thread_rank();
    float x = __ldg(in + i), *to = out + 16 * i;
    to[0] = rsqrtf(x), to[1] = min(x, 2.f), to[2] = max(x, 2.f), to[3] = __saturatef(x - 1);
    to[4] = __fdividef(x, 3), to[5] = __logf(x), to[6] = __powf(x, 2), to[7] = __fmaf_rn(x, x, 1);
    to[8] = fmaf(x, x, 1), to[9] = __sinf(x), to[10] = __cosf(x), to[11] = coefficients[i % 3];
    to[12] = __int_as_float(__float_as_int(x)), to[13] = fmaxf(x, 1), to[14] = rsqrt(double(x));
    to[15] = __expf(x);
    whole[i * 8] = __popc(i), whole[i * 8 + 1] = __clz(i), whole[i * 8 + 2] = __ffs(i);
    whole[i * 8 + 3] = __brev(i), whole[i * 8 + 4] = min(i, blockDim.x);
    whole[i * 8 + 5] = max(3, i), whole[i * 8 + 6] = block.size(), whole[i * 8 + 7] = block.thread_index().x;
    float2 pair = make_float2(x, 2 * x);
    vectors[i] = make_float4(pair.x, pair.y, 3 * x, 4 * x);
    block.sync();
    cg::sync(block);
    float4 next = vectors[(i + 1) % blockDim.x];
    assert(next.y == 2 * next.x);
    if (i == 69 && blockIdx.x == 0) printf("block %d thread %d\n", blockIdx.x, threadIdx.x);
}

int main() {
    bool right = true;
    auto check = [&](const char* word, bool holds) {
        if (!holds) printf("wrong: %s\n", word);
        right &= holds;
    };
    Array<int> s("s", 4 * 256);
    LAUNCH(shuffles, 1, N, 0, nullptr, s);
    for (int k = 0; k < 4; k++) {
        int w = WIDTHS[k], at = 256 * k;
        check("__shfl_sync", shuffled(s, at, w, [=](int l) { return l / w * w + 5 % w; }));
        check("__shfl_up_sync", shuffled(s, at + 64, w, [](int l) { return l - 3; }));
        check("__shfl_down_sync", shuffled(s, at + 128, w, [](int l) { return l + 3; }));
        check("__shfl_xor_sync", shuffled(s, at + 192, w, [](int l) { return l ^ 1; }));
    }

    Array<unsigned> v("v", 16 * N);
    LAUNCH(votes, 1, N, 0, nullptr, v);
    int positive = 0, fifty = 0;
    for (int i = 0; i < N; i++) positive += value_of(i) > 0, fifty += value_of(i) == 50;
    for (int i = 0; i < N; i++) {
        unsigned ballot = 0, any = 0, all = 1, bits = 0, same = 0, thirds = 0, mask = 0;
        int sum = 0, most = -99, least = 99;
        for (int j = i / 32 * 32; j < std::min(N, i / 32 * 32 + 32); j++) {
            int x = value_of(j);
            unsigned bit = 1u << j % 32;
            mask |= bit, ballot |= x > 0 ? bit : 0, any |= x == 50, all &= x > -41, bits |= x;
            same |= x / 20 == value_of(i) / 20 ? bit : 0, thirds |= j % 3 == 0 ? bit : 0;
            sum += x, most = std::max(most, x), least = std::min(least, x);
        }
        const unsigned* got = v + 16 * i;
        check("__ballot_sync", got[0] == ballot), check("__any_sync", got[1] == any);
        check("__all_sync", got[2] == all), check("__reduce_add_sync", int(got[3]) == sum);
        check("__reduce_max_sync", int(got[4]) == most);
        check("__reduce_min_sync", int(got[5]) == least), check("__reduce_or_sync", got[6] == bits);
        check("__match_any_sync", got[7] == same), check("__activemask", got[8] == mask);
        check("__activemask in a branch", got[9] == (i % 3 ? 0 : thirds));
        check("__syncthreads_count", int(got[10]) == positive);
        check("__syncthreads_or", got[11] == (fifty > 0));
        check("__syncthreads_and", got[12] == (positive == N)), check("warpSize", got[13] == 32);
    }

    auto zero = [](int) { return 0; };
    Array<int> a("a", 10, zero);
    Array<unsigned> b("b", 5, [](int i) { return i == 0 ? ~0u : 0; });
    Array<float> f("f", 1, zero);
    Array<double> d("d", 1, zero);
    Array<unsigned long long> big("big", 1, zero);
    LAUNCH(atomics, 1, N, 0, nullptr, a, b, f, d, big);
    int sum = 0, most = 0, least = 0;
    unsigned xored = 0, up = 0, down = 0;
    for (int i = 0; i < N; i++) {
        int x = value_of(i);
        sum += x, most = std::max(most, x), least = std::min(least, x), xored ^= i;
        up = up >= 50 ? 0 : up + 1, down = down == 0 || down > 50 ? 50 : down - 1;
    }
    check("atomicAdd", a[0] == sum && f[0] == sum && d[0] == sum / 2. && big[0] == (70ull << 33));
    check("atomicSub", a[1] == -sum), check("atomicMin", a[2] == least);
    check("atomicMax", a[3] == most), check("atomicCAS", a[4] == sum);
    check("atomics on __shared__", a[6] == sum && a[7] == most);
    check("atomicExch", a[8] == 0 && a[9] == 77), check("atomicAnd", b[0] == 0);
    check("atomicOr", b[1] == (1u << 20) - 1), check("atomicXor", b[2] == xored);
    check("atomicInc", b[3] == up), check("atomicDec", b[4] == down);
    int counted;
    cudaMemcpyFromSymbol(&counted, counter, sizeof(counted));
    check("__device__ int", counted == 2 * N);

    float three[] = {1, 4, 9};
    cudaMemcpyToSymbol(coefficients, three, sizeof(three));
    Array<float> in("in", N, [](int i) { return 0.25f + i / 16.f; }), out("out", 16 * N);
    Array<float4> vectors("vectors", N);
    Array<int> whole("whole", 8 * N);
    LAUNCH(numbers, 1, N, 0, nullptr, out, vectors, in, whole);
    for (int i = 0; i < N; i++) {
        double x = 0.25 + i / 16.;
        double wanted[] = {1 / std::sqrt(x), x < 2 ? x : 2, x > 2 ? x : 2,
                           x < 1 ? 0 : x > 2 ? 1 : x - 1, x / 3, std::log(x), x * x, x * x + 1,
                           x * x + 1, std::sin(x), std::cos(x), three[i % 3], x, x > 1 ? x : 1,
                           1 / std::sqrt(x), std::exp(x)};
        const char* words[] = {"rsqrtf", "min", "max", "__saturatef", "__fdividef", "__logf",
                               "__powf", "__fmaf_rn", "fmaf", "__sinf", "__cosf", "__constant__",
                               "__int_as_float", "fmaxf", "rsqrt", "__expf"};
        for (int k = 0; k < 16; k++)  // a few ulp of fp32; __expf is 2^-22 |x| off
            check(words[k], std::abs(out[16 * i + k] - wanted[k]) <=
                                2e-6 * std::max(1., std::abs(wanted[k])));
        int ones = 0, leading = 32, lowest = 0;
        unsigned mirrored = 0;
        for (int bit = 31; bit >= 0; bit--)
            if (i >> bit & 1) {
                ones++, lowest = bit + 1, mirrored |= 1u << (31 - bit);
                if (leading == 32) leading = 31 - bit;
            }
        const int* got = whole + 8 * i;
        check("__popc", got[0] == ones), check("__clz", got[1] == leading);
        check("__ffs", got[2] == lowest), check("__brev", unsigned(got[3]) == mirrored);
        check("min of int and unsigned", got[4] == std::min(i, N));
        check("max of int", got[5] == std::max(3, i)), check("thread_block.size", got[6] == N);
        check("thread_block.thread_index", got[7] == i);
        float4 four = vectors[i];
        float X = x;
        check("float4", four.x == X && four.y == 2 * X && four.z == 3 * X && four.w == 4 * X);
    }
    check("float2", alignof(float2) == 8 && sizeof(float3) == 12 && alignof(float4) == 16);
    return !right;
}
