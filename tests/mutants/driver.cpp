// The kernels' launchers behind plain C functions, for tests that compile the sources without
// torch.
//
// As a shared library: each function returns "" or what the emulator refused. As a program (MAIN):
// runs both kernels on buffers of exactly the right size, for AddressSanitizer to watch.
#include "nt_xent.cu"
#include "nt_xent_mma.cu"
#include "tile_shuffle.cu"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

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

int64_t room_bytes(char type, int r, int m, int depth) { return nt_xent_room(type, r, m, depth); }

const char* forward(char type, int r, int m, int first, int depth, double t, bool decoupled,
                    const void* z, void* parts, unsigned* tickets, int count, void* room,
                    void* loss, void* lse) {
    return caught([&] {
        nt_xent_forward(type, r, m, first, depth, t, decoupled, z, parts, tickets, count, room,
                        loss, lse, nullptr);
    });
}

const char* backward(char type, int r, int m, int first, int depth, double t, bool decoupled,
                     const void* z, void* parts, unsigned* tickets, void* room, const void* lse,
                     const void* g, int count, void* d_rows) {
    return caught([&] {
        nt_xent_backward(type, r, m, first, depth, t, decoupled, z, parts, tickets, room, lse, g,
                         count, d_rows, nullptr);
    });
}

const char* tiles(int b, int c, int h, int w, int grid, int tile, bool image, const float* in,
                  const int64_t* perm, const int64_t* offset, const float* colour, int columns,
                  float* out) {
    return caught([&] {
        tile_shuffle_forward('f', b, c, h, w, grid, tile, image, in, perm, offset, colour, columns,
                             out, nullptr);
    });
}

const char* tiles_back(int b, int c, int h, int w, int grid, int tile, bool image,
                       const float* d_out, const int64_t* inverse, const int64_t* offset,
                       const float* colour, int columns, float* d_in) {
    return caught([&] {
        tile_shuffle_backward('f', b, c, h, w, grid, tile, image, d_out, inverse, offset, colour,
                              columns, d_in, nullptr);
    });
}

// Where the kernels read beyond 2^31 elements. What is wrong may crash, so a process runs it.
bool apart(const std::function<bool()>& run) {
    pid_t child = fork();
    if (!child) {
        signal(SIGSEGV, SIG_DFL);
        _exit(run() ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    return status == 0;
}
}

__global__ void far_chunk(const float* base, int depth, float* out) {
    DYN_SMEM(float, shared);
    load_chunk(base, TILE, depth, TILE - 1, 0, shared);  // one row, TILE - 1, lies inside
    __syncthreads();
    if (threadIdx.y == 0) out[threadIdx.x] = shared[threadIdx.x * PAD];
}

extern "C" {
// A row of z that lies 2^32 elements after a base address that is not there.
bool far_row() {
    return apart([] {
        std::vector<float> last(16), out(16);
        std::iota(last.begin(), last.end(), 1.f);
        int depth = (1 << 26) + 16;
        auto base = reinterpret_cast<uintptr_t>(last.data()) - sizeof(float) * (TILE - 1ll) * depth;
        LAUNCH(far_chunk, 1, dim3(16, 16), DEPTH * PAD * sizeof(float), nullptr,
               reinterpret_cast<const float*>(base), depth, out.data());
        return out == last;
    });
}

// The row of a part, of which no address is used.
bool far_part() {
    Parts parts{nullptr, 1 << 24, 256};
    auto offset = reinterpret_cast<uintptr_t>(parts.row(1, (1 << 24) - 1)) / sizeof(bfloat16);
    return offset == ((1ull << 25) - 1) * 256;
}

// The last pixels of two images of 46400 x 46400 bytes, of which but two pages are ever touched.
bool far_tile() {
    return apart([] {
        int64_t side = 46400, size = 2 * side * side, still[2] = {0, 0};
        int64_t corner[4] = {side - 2, side - 2, side - 2, side - 2};
        void* room = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) return true;
        auto* image = static_cast<uint8_t*>(room);
        image[size - 1] = 255;
        float out[8];
        tile_shuffle_forward('u', 2, 1, side, side, 1, 2, false, image, still, corner, nullptr, 0,
                             out, nullptr);
        return out[7] == 1 && out[6] == 0 && out[3] == 0;
    });
}

// Where tiles and images lie whose places do not fit 32 bits.
bool far_layout() {
    Layout list{3, 5000, 5000, 4, 1024, false, 0}, image{3, 5000, 5000, 4, 1024, true, 0};
    return list.out(100, 15, 2) == ((100ll * 16 + 15) * 3 + 2) * 1024 * 1024 &&
           image.out(100, 15, 2) == ((302ll * 4 + 3) * 1024 * 4 + 3) * 1024 &&
           list.in(100, 2) == 302ll * 5000 * 5000;
}

long long launches() { return cuda_on_cpu::launches.exchange(0); }
long long conflicts() { return cuda_on_cpu::bank_conflicts.exchange(0); }
long long read_bytes() { return cuda_on_cpu::bytes_read.exchange(0); }
long long written_bytes() { return cuda_on_cpu::bytes_written.exchange(0); }
}

#ifdef MAIN
int main() {
    for (char type : {'d', 'f', 'h', 'b'})
        for (int m : {2, 66})
            for (int depth : {1, 24, 130}) {
                size_t size = type == 'd' ? 8 : type == 'f' ? 4 : 2, wide = type == 'd' ? 8 : 4;
                int stride = (depth + 15) / 16 * 16;
                int count = (m + 63) / 64 * ((depth + 63) / 64) + 1;
                std::vector<char> z(m * depth * size), d_z(m * depth * size), loss(wide),
                    lse(2 * m * wide), g(m * wide), room(nt_xent_room(type, m, m, depth)),
                    parts((type == 'f') * 4 * m * stride + (type == 'b') * 2 * m * stride);
                std::vector<unsigned> tickets(count);
                nt_xent_forward(type, m, m, 0, depth, 0.5, m > 2, z.data(), parts.data(),
                                tickets.data(), count, room.data(), loss.data(), lse.data(),
                                nullptr);
                nt_xent_backward(type, m, m, 0, depth, 0.5, m > 2, z.data(), parts.data(),
                                 tickets.data(), room.data(), lse.data(), g.data(), m,
                                 d_z.data(), nullptr);
            }
    std::vector<float> x(2 * 3 * 13 * 17), out(2 * 9 * 3 * 4 * 4), colour(2 * 9 * 3 * 9, 1.f);
    std::vector<int64_t> perm(2 * 9), offset(2 * 9 * 2);
    for (int i = 0; i < 18; i++) perm[i] = i % 9, offset[2 * i + 1] = i % 2;
    for (bool image : {false, true})
        for (int columns : {0, 6, 9}) {
            tile_shuffle_forward('f', 2, 3, 13, 17, 3, 4, image, x.data(), perm.data(),
                                 offset.data(), colour.data(), columns, out.data(), nullptr);
            tile_shuffle_backward('f', 2, 3, 13, 17, 3, 4, image, out.data(), perm.data(),
                                  offset.data(), colour.data(), columns, x.data(), nullptr);
        }
    puts("no access outside a buffer");
}
#endif
