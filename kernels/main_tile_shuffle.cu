// What `python -m kernels check tile_shuffle.cu` runs: each kernel on a few odd shapes, its result
// beside the formula written as a loop.
#include "tile_shuffle.cu"

#include "host.cuh"

namespace {

constexpr int B = 2, C = 3, H = 31, W = 34, G = 3, T = 8, K = G * G;

int64_t pixel(int b, int c, int y, int x) { return ((int64_t(b) * C + c) * H + y) * W + x; }

template <typename In> bool check_forward(bool image, int columns) {
    auto value = [](uint64_t i) { return In(sizeof(In) == 1 ? 127 + 127 * noise(i) : noise(i)); };
    Array<In> in("in", B * C * H * W, value);
    Array<int64_t> perm("perm", B * K, [](int i) { return (i * 4 + i / K) % K; });
    Array<int64_t> offset("offset", B * K * 2, [](int i) { return i % (i % 2 ? 4 : 3); });
    Array<float> colour("colour", B * K * C * columns, [&](int i) {
        int column = i % columns;
        return column == columns - 2 ? -0.5f : column == columns - 1 ? 0.5f : noise(i);
    });
    Array<float> out("out", B * K * C * T * T);
    tile_shuffle_forward(sizeof(In) == 1 ? 'u' : 'f', B, C, H, W, G, T, image, in, perm, offset,
                         colour, columns, out, nullptr);
    double reads = !columns ? 1 : columns > C + 3 ? C + 1 : C, tables = 24. * 256 * B * K;
    formula(columns ? "tiles_recolour" : "tiles_forward",
            reads * out.count * sizeof(In) + tables + 4. * colour.count, 4. * out.count);
    return expect(out, [&](int i) {
        int x = i % T, y = i / T % T, c = i / T / T % C, k = i / T / T / C % K;
        int b = i / T / T / C / K;
        if (image) {
            x = i % (G * T), y = i / (G * T) % (G * T), c = i / (G * T) / (G * T) % C;
            k = y / T * G + x / T, b = i / (G * T) / (G * T) / C, x %= T, y %= T;
        }
        int cell = perm[b * K + k], top = cell / G * (H / G) + offset[2 * (b * K + cell)],
            left = cell % G * (W / G) + offset[2 * (b * K + cell) + 1];
        const float* row = colour + ((b * K + k) * C + c) * columns;
        if (!columns) return in[pixel(b, c, top + y, left + x)] / (sizeof(In) == 1 ? 255.f : 1.f);
        double sum = row[columns - 3];
        for (int d = 0; d < C; d++) {
            double mean = 0;
            for (int n = 0; n < T * T && columns > C + 3; n++)
                mean += in[pixel(b, d, top + n / T, left + n % T)] / double(T * T);
            sum += row[d] * in[pixel(b, d, top + y, left + x)];
            if (columns > C + 3) sum += row[C + d] * mean;
        }
        return float(std::min(0.5, std::max(-0.5, sum)));
    }, 1e-5);  // sums of some ten numbers of size 1 in fp32
}

bool check_backward(int columns) {
    Array<float> d_out("d_out", B * K * C * T * T, noise), d_in("d_in", B * C * H * W);
    Array<int64_t> inverse("inverse", B * K, [](int i) { return (i * 4 + i / K) % K; });
    Array<int64_t> offset("offset", B * K * 2, [](int i) { return i % (i % 2 ? 4 : 3); });
    Array<float> colour("colour", B * K * C * columns, noise);
    tile_shuffle_backward('f', B, C, H, W, G, T, false, d_out, inverse, offset, colour, columns,
                          d_in, nullptr);
    double reads = columns ? 2 * C : 1;  // an element of A beside each of d_out
    formula("tiles_backward", reads * 4 * d_out.count + 24. * 256 * B * K, 4. * d_in.count);
    return expect(d_in, [&](int i) {
        int x = i % W, y = i / W % H, c = i / W / H % C, b = i / W / H / C;
        int cell = std::min(y / (H / G), G - 1) * G + std::min(x / (W / G), G - 1);
        int k = inverse[b * K + cell], top = cell / G * (H / G) + offset[2 * (b * K + cell)],
            left = cell % G * (W / G) + offset[2 * (b * K + cell) + 1];
        y -= top, x -= left;
        if (y < 0 || y >= T || x < 0 || x >= T) return 0.f;
        double sum = 0;
        for (int d = 0; d < C; d++) {
            double g = d_out[((b * K + k) * C + d) * T * T + y * T + x];
            sum += columns ? g * colour[((b * K + k) * C + d) * columns + c] : d == c ? g : 0;
        }
        return float(sum);
    }, 1e-5);
}

}  // namespace

int main() {
    bool right = check_backward(0) & check_forward<uint8_t>(true, 0);
    for (int columns : {0, C + 3, 2 * C + 3}) right &= check_forward<float>(false, columns);
    return !(right & check_backward(C + 3));
}
