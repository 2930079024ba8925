// Checks the tensors and hands their pointers to the launchers. Schemas: __init__.py, tiles.py.
//
// The same file serves both builds: CUDA tensors where nvcc compiled the kernels (WITH_CUDA), CPU
// tensors where g++ compiled them against cuda_on_cpu.h. There outputs start as NaN, so that a
// value nobody wrote is seen.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

int64_t nt_xent_room(char type, int r, int m, int depth);
void nt_xent_forward(char type, int r, int m, int first, int depth, double temperature,
                     bool decoupled, const void* z, void* parts, unsigned* tickets, int count,
                     void* room, void* loss, void* lse, void* stream);
void nt_xent_backward(char type, int r, int m, int first, int depth, double temperature,
                      bool decoupled, const void* z, void* parts, unsigned* tickets,
                      void* room, const void* lse, const void* g, int count, void* d_rows,
                      void* stream);
void tile_shuffle_forward(char type, int batch, int channels, int height, int width, int grid,
                          int tile, bool image, const void* in, const int64_t* perm,
                          const int64_t* offset, const void* colour, int columns, void* out,
                          void* stream);
void tile_shuffle_backward(char type, int batch, int channels, int height, int width, int grid,
                           int tile, bool image, const void* d_out, const int64_t* inverse,
                           const int64_t* offset, const void* colour, int columns, void* d_in,
                           void* stream);

namespace {

using at::Tensor;

#ifdef WITH_CUDA
#define DEVICE_AND_STREAM(tensor)                                                                  \
    c10::cuda::CUDAGuard guard((tensor).device());                                                 \
    void* stream = c10::cuda::getCurrentCUDAStream().stream()
Tensor output(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return at::empty(sizes, options);
}
#else
#define DEVICE_AND_STREAM(tensor) void* stream = nullptr
Tensor output(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor out = at::empty(sizes, options);
    memset(out.mutable_data_ptr(), 0xff, out.nbytes());
    return out;
}
#endif

char letter(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kByte: return 'u';
        case at::kHalf: return 'h';
        case at::kBFloat16: return 'b';
        case at::kFloat: return 'f';
        case at::kDouble: return 'd';
        default:
            TORCH_CHECK_TYPE(false, "the kernels take uint8 and float types, not ",
                             x.scalar_type());
    }
}

at::ScalarType wide(const Tensor& x) {
    return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// x, contiguous, after a look at its device, type and shape.
Tensor take(const char* name, const Tensor& x, const Tensor& like, at::ScalarType type,
            at::IntArrayRef sizes) {
    TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", the others on ",
                like.device());
    TORCH_CHECK(x.scalar_type() == type, name, " is ", x.scalar_type(), "; wanted ", type);
    TORCH_CHECK(x.sizes() == sizes, name, " has shape ", x.sizes(), "; wanted ", sizes);
    return x.contiguous();
}

void check_nt_xent(const Tensor& rows, const Tensor& columns, int64_t first, double temperature) {
    TORCH_CHECK(rows.dim() == 2 && columns.dim() == 2, "rows and columns must be matrices");
    TORCH_CHECK(rows.size(0) > 0 && rows.size(0) % 2 == 0 && rows.size(1) > 0, "rows has shape ",
                rows.sizes(), "; wanted (2N, D)");
    TORCH_CHECK(rows.is_floating_point(), "rows is ", rows.scalar_type(), "; wanted a float type");
    TORCH_CHECK(first >= 0 && first + rows.size(0) <= columns.size(0) && columns.size(0) < 1 << 30,
                "rows ", first, " .. ", first + rows.size(0), " are not among ", columns.size(0),
                " columns");
    TORCH_CHECK(temperature > 0, "temperature is ", temperature, "; wanted a number above 0");
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Room for what blocks that share rows leave for the last of them.
Tensor room(const Tensor& rows, const Tensor& z) {
    int64_t bytes = nt_xent_room(letter(z), rows.size(0), z.size(0), z.size(1));
    return output({bytes}, z.options().dtype(at::kByte));
}

// Shapes of what the forward leaves for the backward: z in bf16 (parts), counters at 0 (tickets).
std::vector<int64_t> parts_shape(const Tensor& z) {
    int64_t depth = z.size(1);
    int64_t count = depth > 256 ? 0 : z.scalar_type() == at::kFloat ? 2
                                  : z.scalar_type() == at::kBFloat16;
    return {count, z.size(0), blocks(depth, 16) * 16};
}
std::vector<int64_t> tickets_shape(const Tensor& rows) {
    return {blocks(rows.size(0), 64) * blocks(rows.size(1), 64) + 1};
}

// The loss; lse; and for the backward parts and tickets. `rows` is for autograd: its values are
// those of columns first .. first + R.
std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent(const Tensor& rows, const Tensor& columns,
                                                   int64_t first, double temperature,
                                                   bool decoupled,
                                                   std::string /* the backward's */) {
    check_nt_xent(rows, columns, first, temperature);
    DEVICE_AND_STREAM(rows);
    int64_t r = rows.size(0), m = columns.size(0), depth = rows.size(1);
    Tensor z = take("columns", columns, rows, rows.scalar_type(), {m, depth});
    auto options = z.options().dtype(wide(z));
    Tensor loss = output({}, options), lse = output({r, 2}, options);
    Tensor parts = output(parts_shape(z), z.options().dtype(at::kBFloat16));
    Tensor tickets = output(tickets_shape(rows), z.options().dtype(at::kInt));
    nt_xent_forward(letter(z), r, m, first, depth, temperature, decoupled, z.const_data_ptr(),
                    parts.mutable_data_ptr(), static_cast<unsigned*>(tickets.mutable_data_ptr()),
                    tickets.size(0), room(rows, z).mutable_data_ptr(), loss.mutable_data_ptr(),
                    lse.mutable_data_ptr(), stream);
    return {loss, lse, parts, tickets};
}

Tensor nt_xent_gradient(const Tensor& rows, const Tensor& columns, int64_t first,
                        double temperature, bool decoupled, const Tensor& lse,
                        const Tensor& grad, const Tensor& parts, const Tensor& tickets) {
    check_nt_xent(rows, columns, first, temperature);
    DEVICE_AND_STREAM(rows);
    int64_t r = rows.size(0), m = columns.size(0), depth = rows.size(1);
    Tensor z = take("columns", columns, rows, rows.scalar_type(), {m, depth});
    Tensor lse_of = take("lse", lse, z, wide(z), {m, 2});
    TORCH_CHECK(grad.dim() == 1 && grad.size(0) > 0 && m % grad.size(0) == 0, "grad has shape ",
                grad.sizes(), "; wanted (G), ", m, " rows a multiple of G");
    Tensor g = take("grad", grad, z, wide(z), grad.sizes());
    Tensor split = take("parts", parts, z, at::kBFloat16, parts_shape(z));
    Tensor counters = take("tickets", tickets, z, at::kInt, tickets_shape(rows));
    Tensor d_rows = output({r, depth}, z.options());
    nt_xent_backward(letter(z), r, m, first, depth, temperature, decoupled, z.const_data_ptr(),
                     split.data_ptr(), static_cast<unsigned*>(counters.data_ptr()),
                     room(rows, z).mutable_data_ptr(), lse_of.const_data_ptr(), g.const_data_ptr(),
                     g.size(0), d_rows.mutable_data_ptr(), stream);
    return d_rows;
}

void check_tiles(int64_t height, int64_t width, int64_t grid, int64_t tile) {
    TORCH_CHECK(grid > 0 && tile > 0 && grid * tile <= height && grid * tile <= width, "a grid of ",
                grid, " and tiles of ", tile, " do not fit ", height, " x ", width, " pixels");
}

// The colour matrices (B, K, C, columns) of tiles of C channels; without colour, of no columns.
Tensor take_colour(const c10::optional<Tensor>& colour, const Tensor& like, int64_t b, int64_t k,
                   int64_t c) {
    if (!colour) return output({b, k, c, 0}, like.options().dtype(wide(like)));
    int64_t columns = colour->dim() == 4 && colour->size(3) == c + 3 ? c + 3 : 2 * c + 3;
    return take("colour", *colour, like, wide(like), {b, k, c, columns});
}

// perm and offset are checked by the kernel: looking here would wait for the GPU.
Tensor tile_shuffle(const Tensor& x, const Tensor& perm, const Tensor& offset,
                    const c10::optional<Tensor>& colour, int64_t grid, int64_t tile, bool image) {
    TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x has shape ", x.sizes(), "; wanted (B, C, H, W)");
    check_tiles(x.size(2), x.size(3), grid, tile);
    DEVICE_AND_STREAM(x);
    int64_t b = x.size(0), c = x.size(1), k = grid * grid;
    Tensor in = x.contiguous(), matrix = take_colour(colour, x, b, k, c);
    Tensor order = take("perm", perm, x, at::kLong, {b, k});
    Tensor corner = take("offset", offset, x, at::kLong, {b, k, 2});
    auto options = x.options().dtype(x.scalar_type() == at::kByte ? at::kFloat : x.scalar_type());
    Tensor out = image ? output({b, c, grid * tile, grid * tile}, options)
                       : output({b, k, c, tile, tile}, options);
    tile_shuffle_forward(letter(x), b, c, x.size(2), x.size(3), grid, tile, image,
                         in.const_data_ptr(), order.const_data_ptr<int64_t>(),
                         corner.const_data_ptr<int64_t>(), matrix.const_data_ptr(), matrix.size(3),
                         out.mutable_data_ptr(), stream);
    return out;
}

Tensor tile_shuffle_gradient(const Tensor& grad, const Tensor& inverse, const Tensor& offset,
                             const c10::optional<Tensor>& colour, int64_t grid, int64_t tile,
                             bool image, int64_t height, int64_t width) {
    check_tiles(height, width, grid, tile);
    DEVICE_AND_STREAM(grad);
    TORCH_CHECK(grad.dim() == (image ? 4 : 5), "grad has shape ", grad.sizes());
    int64_t b = grad.size(0), c = grad.size(image ? 1 : 2), k = grid * grid;
    Tensor matrix = take_colour(colour, grad, b, k, c);
    Tensor d_out =
        image ? take("grad", grad, grad, grad.scalar_type(), {b, c, grid * tile, grid * tile})
              : take("grad", grad, grad, grad.scalar_type(), {b, k, c, tile, tile});
    Tensor order = take("inverse", inverse, grad, at::kLong, {b, k});
    Tensor corner = take("offset", offset, grad, at::kLong, {b, k, 2});
    Tensor d_in = output({b, c, height, width}, grad.options());
    tile_shuffle_backward(letter(grad), b, c, height, width, grid, tile, image,
                          d_out.const_data_ptr(), order.const_data_ptr<int64_t>(),
                          corner.const_data_ptr<int64_t>(), matrix.const_data_ptr(),
                          matrix.size(3), d_in.mutable_data_ptr(), stream);
    return d_in;
}

}  // namespace

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(fgssl, CUDA, library) {
#else
TORCH_LIBRARY_IMPL(fgssl, CPU, library) {
#endif
    library.impl("nt_xent", nt_xent);
    library.impl("nt_xent_backward", nt_xent_gradient);
    library.impl("tile_shuffle", tile_shuffle);
    library.impl("tile_shuffle_backward", tile_shuffle_gradient);
}
