// The kernels' launchers behind plain C functions, for tests that compile the sources without
// torch.
//
// As a shared library: each function returns "" or what the emulator refused. As a program (MAIN):
// runs both kernels on buffers of exactly the right size, for AddressSanitizer to watch.
#include "nt_xent.cu"
#include "tile_shuffle.cu"

#include <cstdio>

template <typename Run> const char* caught(Run run) {
    static std::string message;
    message.clear();
    try {
        run();
    } catch (const std::exception& error) { message = error.what(); }
    return message.c_str();
}

extern "C" {

const char* forward(char type, int r, int m, int first, int depth, double t, const void* rows,
                    const void* columns, void* loss, void* top, void* log_sum) {
    return caught([&] {
        nt_xent_forward(type, r, m, first, depth, t, rows, columns, loss, top, log_sum, nullptr);
    });
}

const char* backward(char type, int r, int m, int first, int depth, double t, const void* rows,
                     const void* columns, const void* top, const void* log_sum, const void* g,
                     void* d_rows) {
    return caught([&] {
        nt_xent_backward(type, r, m, first, depth, t, rows, columns, top, log_sum, g, d_rows,
                         nullptr);
    });
}

const char* tiles(int b, int c, int h, int w, int grid, int tile, bool image, const float* in,
                  const int64_t* perm, const int64_t* offset, const float* shift,
                  const float* scale, float* out) {
    return caught([&] {
        tile_shuffle_forward('f', b, c, h, w, grid, tile, image, in, perm, offset, shift, scale,
                             out, nullptr);
    });
}

const char* tiles_back(int b, int c, int h, int w, int grid, int tile, bool image,
                       const float* d_out, const int64_t* inverse, const int64_t* offset,
                       const float* scale, float* d_in) {
    return caught([&] {
        tile_shuffle_backward('f', b, c, h, w, grid, tile, image, d_out, inverse, offset, scale,
                              d_in, nullptr);
    });
}

long long read_bytes() { return cuda_on_cpu::bytes_read.exchange(0); }
long long written_bytes() { return cuda_on_cpu::bytes_written.exchange(0); }
}

#ifdef MAIN
int main() {
    for (char type : {'d', 'f', 'h', 'b'})
        for (int m : {2, 66})
            for (int depth : {1, 24, 130}) {
                size_t size = type == 'd' ? 8 : type == 'f' ? 4 : 2, wide = type == 'd' ? 8 : 4;
                std::vector<char> z(m * depth * size), d_z(m * depth * size), loss(m * wide),
                    top(m * wide), log_sum(m * wide), g(m * wide);
                nt_xent_forward(type, m, m, 0, depth, 0.5, z.data(), z.data(), loss.data(),
                                top.data(), log_sum.data(), nullptr);
                nt_xent_backward(type, m, m, 0, depth, 0.5, z.data(), z.data(), top.data(),
                                 log_sum.data(), g.data(), d_z.data(), nullptr);
            }
    std::vector<float> x(2 * 3 * 13 * 17), out(2 * 9 * 3 * 4 * 4), ones(3, 1.f);
    std::vector<int64_t> perm(2 * 9), offset(2 * 9 * 2);
    for (int i = 0; i < 18; i++) perm[i] = i % 9, offset[2 * i + 1] = i % 2;
    for (bool image : {false, true}) {
        tile_shuffle_forward('f', 2, 3, 13, 17, 3, 4, image, x.data(), perm.data(), offset.data(),
                             ones.data(), ones.data(), out.data(), nullptr);
        tile_shuffle_backward('f', 2, 3, 13, 17, 3, 4, image, out.data(), perm.data(),
                              offset.data(), ones.data(), x.data(), nullptr);
    }
    puts("no access outside a buffer");
}
#endif
