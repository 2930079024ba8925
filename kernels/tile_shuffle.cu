// Tile shuffle: cut one tile from each cell of an image, recolour, put the tiles in a new order.
//
// Formula   forward    out[b, k, c, y, x] = v_c, the pixel v = in[b, :, Y + y, X + x]; with colour
//                      clamp(sum_d A_cd v_d + sum_d G_cd mean_d + o_c, low_c, high_c), mean the
//                      tile's mean pixel. s = perm[b, k] is the source cell, (Y, X) = cell corner +
//                      offset[b, s]. Normalising is A = diag(1 / std), o = -mean / std.
//           backward   d in[b, c, Y + y, X + x] = sum_d A_dc d out[b, inverse[b, s], d, y, x],
//                      0 where no tile was cut; there is no G here, and no clamp
// Shapes    in (B, C, H, W), uint8 or float; perm, inverse (B, g*g) and offset (B, g*g, 2) int64;
//           colour (B, g*g, C, 2C + 3) = [A | G | o | low | high] of each output tile, in Wide<T>,
//           G may be left out; or none; out (B, g*g, C, t, t), or the image (B, C, g*t, g*t). Cells
//           are H/g by W/g pixels; all is contiguous; uint8 gives float, without colour over 255.
// Owners    forward: a block owns an output tile, a warp its rows in turn, a lane each 32nd pixel.
//           backward: a block owns one cell of the image (the last ones take the ragged edge too),
//           so each pixel has one writer: no atomics, nothing to zero beforehand.
// Traffic   each output is written once and each source pixel under a tile read once: B g^2 C t^2
//           (sizeof in + sizeof out) bytes; for each of a block's 256 threads 24 bytes of tables.
//           With colour, C times as often (C + 1 with G), but from the L1 cache, and the
//           colour once a block. 256 x 3 x 225 x 225 uint8 -> fp32 is 194 MB, 65 us at 3 TB/s, and
//           that is the bound. PyTorch's composition writes and reads the fp32 tiles again for the
//           cast, the mean, the product, the clamp and the transposition.
// Numerics  without colour a copy, equal to reference.py to the bit. Nothing but the tables is
//           saved for the backward.
// Measured  nvcc 13.0 for sm_75, 80, 86, 89, 90, 100 and 120: no spill, no stack frame. Run on the
//           CPU only, on no GPU yet.
#include "common.cuh"

namespace {

constexpr int LINES = 8;  // rows of pixels that a block treats at a time, one a warp

struct Layout {
    int channels, height, width, grid, tile;
    bool image;   // the tiles are put back in a grid, in place of a list of tiles
    int columns;  // of a colour matrix; 0: there is none

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

    // Offset in a channel of the first pixel of the tile that output tile k of image b is cut from.
    __device__ int64_t source(int64_t b, int k, const int64_t* perm, const int64_t* offset) const {
        int64_t tiles = grid * grid, cell = load_global(perm + b * tiles + k);
        require(cell >= 0 && cell < tiles, "perm names a tile that does not exist");
        const int64_t* corner = offset + 2 * (b * tiles + cell);
        int64_t dy = load_global(corner), dx = load_global(corner + 1);
        require(dy >= 0 && dy <= height / grid - tile && dx >= 0 && dx <= width / grid - tile,
                "an offset leaves its cell");
        return (top(cell) + dy) * width + left(cell) + dx;
    }
};

template <typename In, typename Out>
__global__ void __launch_bounds__(256, 2)
    tiles_forward(Layout at, const In* in, const int64_t* perm, const int64_t* offset, Out* out) {
    int tiles = at.grid * at.grid, k = blockIdx.x % tiles;
    int64_t b = blockIdx.x / tiles, corner = at.source(b, k, perm, offset);
    const Wide<In> unit = sizeof(In) == 1 ? Wide<In>(1) / 255 : Wide<In>(1);
    for (int c = 0; c < at.channels; c++) {
        const In* from = in + at.in(b, c) + corner;
        Out* to = out + at.out(b, k, c);
        for (int y = threadIdx.y; y < at.tile; y += blockDim.y)
            for (int x = threadIdx.x; x < at.tile; x += blockDim.x) {
                Wide<In> value = widen(load_global(from + int64_t(y) * at.width + x));
                store_global(to + int64_t(y) * at.out_stride() + x, narrow<Out>(value * unit));
            }
    }
}

// The same with colour. Shared memory: the block's matrix; then, a channel each, o + G mean.
template <typename In, typename Out>
__global__ void __launch_bounds__(256, 2)
    tiles_recolour(Layout at, const In* in, const int64_t* perm, const int64_t* offset,
                   const Wide<In>* colour, Out* out) {
    using W = Wide<In>;
    DYN_SMEM(W, shared);
    int tiles = at.grid * at.grid, k = blockIdx.x % tiles, channels = at.channels;
    int columns = at.columns, size = channels * columns;
    int64_t b = blockIdx.x / tiles, corner = at.source(b, k, perm, offset);
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    W *matrix = shared, *constant = shared + size, *part = constant + channels;
    for (int n = thread; n < size; n += 32 * LINES)
        matrix[n] = load_global(colour + (b * tiles + k) * size + n);
    __syncthreads();
    for (int c = thread; c < channels; c += 32 * LINES)
        constant[c] = matrix[(c + 1) * columns - 3];
    for (int d = 0; d < columns - 3 - channels; d++) {
        W sum = 0;
        const In* from = in + at.in(b, d) + corner;
        for (int y = threadIdx.y; y < at.tile; y += LINES)
            for (int x = threadIdx.x; x < at.tile; x += 32)
                sum += widen(load_global(from + int64_t(y) * at.width + x));
        sum = lane_sum<32>(sum);
        if (threadIdx.x == 0) part[threadIdx.y] = sum;
        __syncthreads();
        for (int c = thread; c < channels; c += 32 * LINES) {
            W mean = 0;
            for (int warp = 0; warp < LINES; warp++) mean += part[warp];
            constant[c] += matrix[c * columns + channels + d] * mean / (at.tile * at.tile);
        }
        __syncthreads();
    }
    __syncthreads();
    for (int c = 0; c < channels; c++) {
        const W *row = matrix + c * columns, low = row[columns - 2], high = row[columns - 1];
        Out* to = out + at.out(b, k, c);
        for (int y = threadIdx.y; y < at.tile; y += LINES)
            for (int x = threadIdx.x; x < at.tile; x += 32) {
                const In* pixel = in + at.in(b, 0) + corner + int64_t(y) * at.width + x;
                W value = constant[c];
                for (int d = 0; d < channels; d++)  // v_c += A_cd v_d
                    value += row[d] * widen(load_global(pixel + at.in(0, d)));
                value = value < low ? low : value > high ? high : value;  // a NaN stays
                store_global(to + int64_t(y) * at.out_stride() + x, narrow<Out>(value));
            }
    }
}

template <typename T>
__global__ void __launch_bounds__(256, 2)
    tiles_backward(Layout at, const T* d_out, const int64_t* inverse, const int64_t* offset,
                   const Wide<T>* colour, T* d_in) {
    int tiles = at.grid * at.grid, cell = blockIdx.x % tiles, columns = at.columns;
    int64_t b = blockIdx.x / tiles;
    int k = load_global(inverse + b * tiles + cell);
    const Wide<T>* matrix = colour + (b * tiles + k) * at.channels * columns;
    const int64_t* corner = offset + 2 * (b * tiles + cell);
    int top = at.top(cell) + load_global(corner), left = at.left(cell) + load_global(corner + 1);
    int bottom = cell / at.grid == at.grid - 1 ? at.height : at.top(cell) + at.height / at.grid;
    int right = cell % at.grid == at.grid - 1 ? at.width : at.left(cell) + at.width / at.grid;
    for (int c = 0; c < at.channels; c++) {
        T* to = d_in + at.in(b, c);
        for (int y = at.top(cell) + threadIdx.y; y < bottom; y += blockDim.y)
            for (int x = at.left(cell) + threadIdx.x; x < right; x += blockDim.x) {
                bool inside = y >= top && y < top + at.tile && x >= left && x < left + at.tile;
                int64_t pixel = int64_t(y - top) * at.out_stride() + x - left;
                Wide<T> value = 0;
                if (inside && !columns) value = widen(load_global(d_out + at.out(b, k, c) + pixel));
                for (int d = 0; d < at.channels && inside && columns; d++)  // d v_c += A_dc d out_d
                    value += load_global(matrix + d * columns + c) *
                             widen(load_global(d_out + at.out(b, k, d) + pixel));
                store_global(to + int64_t(y) * at.width + x, narrow<T>(value));
            }
    }
}

template <typename In, typename Out>
void forward(const Layout& at, int batch, const void* in, const int64_t* perm,
             const int64_t* offset, const void* colour, void* out, void* stream) {
    auto *from = static_cast<const In*>(in);
    auto *to = static_cast<Out*>(out);
    auto *matrix = static_cast<const Wide<In>*>(colour);
    int count = batch * at.grid * at.grid;
    if (!at.columns) {
        LAUNCH((tiles_forward<In, Out>), count, dim3(32, LINES), 0, stream, at, from, perm, offset,
               to);
        return;
    }
    size_t room = (at.channels * (at.columns + 1) + LINES) * sizeof(Wide<In>);
    LAUNCH((tiles_recolour<In, Out>), count, dim3(32, LINES), room, stream, at, from, perm, offset,
           matrix, to);
}

template <typename T>
void backward(const Layout& at, int batch, const void* d_out, const int64_t* inverse,
              const int64_t* offset, const void* colour, void* d_in, void* stream) {
    LAUNCH(tiles_backward<T>, batch * at.grid * at.grid, dim3(32, LINES), 0, stream, at,
           static_cast<const T*>(d_out), inverse, offset, static_cast<const Wide<T>*>(colour),
           static_cast<T*>(d_in));
}

}  // namespace

// `type` is the element type of the image: u uint8, h half, b bfloat16, f float, d double.
void tile_shuffle_forward(char type, int batch, int channels, int height, int width, int grid,
                          int tile, bool image, const void* in, const int64_t* perm,
                          const int64_t* offset, const void* colour, int columns, void* out,
                          void* stream) {
    Layout at{channels, height, width, grid, tile, image, columns};
    auto run = type == 'u' ? forward<uint8_t, float>
             : type == 'h' ? forward<half, half>
             : type == 'b' ? forward<bfloat16, bfloat16>
             : type == 'f' ? forward<float, float>
                           : forward<double, double>;
    run(at, batch, in, perm, offset, colour, out, stream);
}

void tile_shuffle_backward(char type, int batch, int channels, int height, int width, int grid,
                           int tile, bool image, const void* d_out, const int64_t* inverse,
                           const int64_t* offset, const void* colour, int columns, void* d_in,
                           void* stream) {
    Layout at{channels, height, width, grid, tile, image, columns};
    auto run = type == 'h' ? backward<half>
             : type == 'b' ? backward<bfloat16>
             : type == 'f' ? backward<float>
                           : backward<double>;
    run(at, batch, d_out, inverse, offset, colour, d_in, stream);
}
