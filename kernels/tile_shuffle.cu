// Tile shuffle: cut one tile from each cell of an image, normalise, put the tiles in a new order.
//
// Formula   forward    out[b, k, c, y, x] = (in[b, c, Y + y, X + x] - shift[c]) * scale[c]
//                      s = perm[b, k] is the source cell, (Y, X) = cell corner + offset[b, s]
//           backward   d in[b, c, Y + y, X + x] = d out[b, inverse[b, s], c, y, x] * scale[c]
//                      and 0 where no tile was cut
// Shapes    in (B, C, H, W), uint8 or float; perm, inverse (B, g*g) and offset (B, g*g, 2) int64;
//           shift, scale (C) in Wide<T>; out (B, g*g, C, t, t), or the image (B, C, g*t, g*t).
//           A cell is H/g by W/g pixels; all is contiguous, in any type; uint8 gives float.
// Owners    forward: a block owns an output tile, a warp its rows in turn, a lane each 32nd pixel.
//           backward: a block owns one cell of the image (the last ones take the ragged edge too),
//           so each pixel has one writer: no atomics, nothing to zero beforehand.
// Traffic   each output is written once and each source pixel under a tile read once: B g^2 C t^2
//           (sizeof in + sizeof out) bytes; and from the cache, for each of a block's 256 threads,
//           24 bytes of tables and 2 C numbers (backward C). 256 x 3 x 225 x 225 uint8 -> fp32 is
//           194 MB, 65 us at 3 TB/s, and that is the bound. PyTorch's composition writes and reads
//           the fp32 tiles again for the cast, the subtraction, the product and the transposition.
// Numerics  subtract, then multiply: no fused multiply-add can change a bit, so the PyTorch form in
//           reference.py is equal to the bit. Nothing but the tables is saved for the backward.
// Measured  nvcc 13.0 for sm_80 and sm_90: no spill, no stack frame, 28 to 38 registers. Run on the
//           CPU only, on no GPU yet.
#include "common.cuh"

namespace {

struct Layout {
    int channels, height, width, grid, tile;
    bool image;  // the tiles are put back in a grid, in place of a list of tiles

    // Offset of pixel (0, 0) of channel c of tile k of image b in the output, and from row to row.
    __device__ int64_t out(int64_t b, int k, int c) const {
        if (!image) return ((b * grid * grid + k) * channels + c) * tile * tile;
        int64_t line = (b * channels + c) * grid * tile + k / grid * tile;
        return (line * grid + k % grid) * tile;
    }
    __device__ int out_stride() const { return image ? grid * tile : tile; }
    __device__ int64_t in(int64_t b, int c) const { return (b * channels + c) * height * width; }
    __device__ int top(int cell) const { return cell / grid * (height / grid); }
    __device__ int left(int cell) const { return cell % grid * (width / grid); }
};

template <typename In, typename Out>
__global__ void __launch_bounds__(256)
    tiles_forward(Layout at, const In* in, const int64_t* perm, const int64_t* offset,
                  const Wide<In>* shift, const Wide<In>* scale, Out* out) {
    int tiles = at.grid * at.grid, k = blockIdx.x % tiles;
    int64_t b = blockIdx.x / tiles;
    int cell = load_global(perm + b * tiles + k);
    const int64_t* corner = offset + 2 * (b * tiles + cell);
    int top = at.top(cell) + load_global(corner), left = at.left(cell) + load_global(corner + 1);
    for (int c = 0; c < at.channels; c++) {
        const In* from = in + at.in(b, c) + int64_t(top) * at.width + left;
        Out* to = out + at.out(b, k, c);
        Wide<In> minus = load_global(shift + c), times = load_global(scale + c);
        for (int y = threadIdx.y; y < at.tile; y += blockDim.y) {
            const In* source = from + int64_t(y) * at.width;
            Out* target = to + int64_t(y) * at.out_stride();
            for (int x = threadIdx.x; x < at.tile; x += blockDim.x) {
                Wide<In> value = widen(load_global(source + x));
                store_global(target + x, narrow<Out>((value - minus) * times));
            }
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    tiles_backward(Layout at, const T* d_out, const int64_t* inverse, const int64_t* offset,
                   const Wide<T>* scale, T* d_in) {
    int tiles = at.grid * at.grid, cell = blockIdx.x % tiles;
    int64_t b = blockIdx.x / tiles;
    int k = load_global(inverse + b * tiles + cell);
    const int64_t* corner = offset + 2 * (b * tiles + cell);
    int top = at.top(cell) + load_global(corner), left = at.left(cell) + load_global(corner + 1);
    int bottom = cell / at.grid == at.grid - 1 ? at.height : at.top(cell) + at.height / at.grid;
    int right = cell % at.grid == at.grid - 1 ? at.width : at.left(cell) + at.width / at.grid;
    for (int c = 0; c < at.channels; c++) {
        const T* from = d_out + at.out(b, k, c);
        T* to = d_in + at.in(b, c);
        Wide<T> times = load_global(scale + c);
        for (int y = at.top(cell) + threadIdx.y; y < bottom; y += blockDim.y) {
            const T* source = from + int64_t(y - top) * at.out_stride() - left;
            T* target = to + int64_t(y) * at.width;
            for (int x = at.left(cell) + threadIdx.x; x < right; x += blockDim.x) {
                bool inside = y >= top && y < top + at.tile && x >= left && x < left + at.tile;
                Wide<T> value = inside ? widen(load_global(source + x)) * times : Wide<T>(0);
                store_global(target + x, narrow<T>(value));
            }
        }
    }
}

template <typename In, typename Out>
void forward(const Layout& at, int batch, const void* in, const int64_t* perm,
             const int64_t* offset, const void* shift, const void* scale, void* out, void* stream) {
    auto* minus = static_cast<const Wide<In>*>(shift);
    auto* times = static_cast<const Wide<In>*>(scale);
    LAUNCH((tiles_forward<In, Out>), batch * at.grid * at.grid, dim3(32, 8), 0, stream, at,
           static_cast<const In*>(in), perm, offset, minus, times, static_cast<Out*>(out));
}

template <typename T>
void backward(const Layout& at, int batch, const void* d_out, const int64_t* inverse,
              const int64_t* offset, const void* scale, void* d_in, void* stream) {
    LAUNCH(tiles_backward<T>, batch * at.grid * at.grid, dim3(32, 8), 0, stream, at,
           static_cast<const T*>(d_out), inverse, offset, static_cast<const Wide<T>*>(scale),
           static_cast<T*>(d_in));
}

}  // namespace

// `type` is the element type of the image: u uint8, h half, b bfloat16, f float, d double.
void tile_shuffle_forward(char type, int batch, int channels, int height, int width, int grid,
                          int tile, bool image, const void* in, const int64_t* perm,
                          const int64_t* offset, const void* shift, const void* scale, void* out,
                          void* stream) {
    Layout at{channels, height, width, grid, tile, image};
    auto run = type == 'u' ? forward<uint8_t, float>
             : type == 'h' ? forward<half, half>
             : type == 'b' ? forward<bfloat16, bfloat16>
             : type == 'f' ? forward<float, float>
                           : forward<double, double>;
    run(at, batch, in, perm, offset, shift, scale, out, stream);
}

void tile_shuffle_backward(char type, int batch, int channels, int height, int width, int grid,
                           int tile, bool image, const void* d_out, const int64_t* inverse,
                           const int64_t* offset, const void* scale, void* d_in, void* stream) {
    Layout at{channels, height, width, grid, tile, image};
    auto run = type == 'h' ? backward<half>
             : type == 'b' ? backward<bfloat16>
             : type == 'f' ? backward<float>
                           : backward<double>;
    run(at, batch, d_out, inverse, offset, scale, d_in, stream);
}
