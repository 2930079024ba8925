// What `python -m kernels check nt_xent.cu` runs: forward and backward of each version on a ragged
// problem, the results beside the formula written as a loop in double precision.
#include "nt_xent.cu"
#include "nt_xent_mma.cu"

#include "host.cuh"

namespace {

// What the header of nt_xent.cu says of the launches above.
void add_formula(char type, double m, double depth) {
    bool simt = type == 'd';
    double size = simt ? 8 : type == 'f' ? 4 : 2, number = simt ? 8 : 4, b = blocks(m, 64);
    double parts = type == 'f' ? 2 : 1, wide = blocks(depth, 16) * 16;
    bool narrow = type == 'f' && depth > 128;
    double tiles = blocks(m, narrow ? 32 : 64), f = narrow ? 64 : 128, slabs = blocks(depth, f);
    auto shards = [&](int slabs) {
        return std::max(1., std::min(tiles, std::floor(2 * multiprocessors() / (b * slabs))));
    };
    auto products = [&](double k) {
        return simt ? 2 * m * b * depth * size : parts * (k * m + m * b) * wide * 2;
    };
    double k = shards(1), found = (k > 1) * b * k * (simt ? 256 * 12 : 128 * 6) * number;
    formula(simt ? "forward_simt" : "forward_mma", products(k) + found + 2 * b * number,
            found + (2 * m + 2 * b + 1) * number);
    formula("prepare_parts", simt ? 0 : m * depth * size, simt ? 0 : parts * m * wide * 2);
    k = shards(slabs);
    double width = !simt && depth <= 64 ? 64 : f;
    found = (k > 1) * b * slabs * k * 64 * width * number;
    double statistics = slabs * (simt ? 48 * (k * m + m * b) : 12 * k * m + 3 * m * b) * number;
    formula(simt ? "backward_simt" : "backward_mma",
            slabs * products(k) + (simt ? m * b * depth * size : 0) + statistics + found,
            m * depth * size + found);
}

// On 1 multiprocessor a block walks over all columns, on 6 several share them.
template <typename T>
bool check(char type, int m, int depth, bool decoupled, const char* multiprocessors,
           double tolerance) {
    setenv("CUDA_ON_CPU_MULTIPROCESSORS", multiprocessors, 1);
    const double t = 0.5;
    using W = Wide<T>;
    int stride = blocks(depth, 16) * 16, parts_of = type == 'd' ? 0 : type == 'f' ? 2 : 1;
    int count = blocks(m, 64) * blocks(depth, 64) + 1, pair = m / 2;
    Array<T> z("z", m * depth, [&](int i) { return narrow<T>(noise(i) * std::sqrt(3.f / depth)); });
    Array<bfloat16> parts("parts", parts_of * m * stride);
    Array<unsigned> tickets("tickets", count);
    Array<W> room("room", nt_xent_room(type, m, m, depth) / sizeof(W)), loss("loss", 1),
        lse("lse", 2 * m), g("g", 1, [](int) { return 1; });
    Array<T> d_z("d_z", m * depth);
    nt_xent_forward(type, m, m, 0, depth, t, decoupled, z, parts, tickets, count, room, loss, lse,
                    nullptr);
    nt_xent_backward(type, m, m, 0, depth, t, decoupled, z, parts, tickets, room, lse, g, 1, d_z,
                     nullptr);
    add_formula(type, m, depth);

    std::vector<double> s(m * m), log_sum(m), gradient(m * depth);
    double mean = 0;
    for (int i = 0; i < m; i++) {
        double sum = 0;
        for (int j = 0; j < m; j++) {
            for (int d = 0; d < depth; d++)
                s[i * m + j] += widen(z[i * depth + d]) * widen(z[j * depth + d]) / t;
            if (i != j && !(decoupled && j == (i + pair) % m)) sum += std::exp(s[i * m + j]);
        }
        log_sum[i] = std::log(sum);
        mean += (log_sum[i] - s[i * m + (i + pair) % m]) / m;
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < m; j++) {
            bool positive = j == (i + pair) % m;
            double s_ij = s[i * m + j], weight = std::exp(s_ij - log_sum[i]) +
                                                 std::exp(s_ij - log_sum[j]);
            if (i == j || (positive && decoupled)) weight = 0;
            if (positive) weight -= 2;
            for (int d = 0; d < depth; d++)
                gradient[i * depth + d] += weight / (m * t) * widen(z[j * depth + d]);
        }
    bool right = expect(loss, [&](int) { return mean; }, tolerance);
    Array<W> ours("d_z", m * depth, [&](int i) { return widen(d_z[i]); });
    return right & expect(ours, [&](int i) { return gradient[i]; }, tolerance / m);
}

}  // namespace

int main() {
    bool right = check<double>('d', 70, 20, true, "6", 1e-12);
    right &= check<float>('f', 130, 24, true, "1", 1e-4);      // 16 bits of z, see nt_xent_mma.cu
    right &= check<bfloat16>('b', 66, 136, false, "6", 2e-2);  // 8 bits of the weights, of d_z
    return !right;
}
