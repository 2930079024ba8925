"""The two hot paths of self-supervised training: the NT-Xent loss and the jigsaw tile shuffle.

    from kernels import nt_xent, tile_shuffle, status
    loss = nt_xent(z, temperature=0.2)               # z (2N, D): rows i and i+N are one image
    tiles = tile_shuffle(x, perm, grid=3, tile=64)   # x (B, C, H, W) -> (B, 9, C, 64, 64)

Each is written twice: in PyTorch, short and exact (reference.py), and as a CUDA kernel (nt_xent.cu,
tile_shuffle.cu). `impl` chooses: "torch"; "cuda", or an error; "emulated", the kernel's source run
on the CPU; "auto", the kernel for CUDA tensors where it builds and PyTorch everywhere else.
Importing builds nothing; the first call that needs a kernel compiles it (build.py).
"""
import math
import sys

import torch

from . import build, reference
from .reference import nt_xent_dense  # noqa: F401  (part of what this package offers)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_said = set()


# ------------------------------------------------ which implementation runs

def status():
    """What impl="auto" runs for tensors on a CPU and on a GPU, and why; looks, but never builds."""
    reason = build.obstacle("cuda")
    if reason:
        return {"cpu": "torch", "cuda": "torch", "why": reason}
    built = "are built" if build.library("cuda").exists() else "will be built at the first call"
    return {"cpu": "torch", "cuda": "cuda", "why": f"the kernels {built}"}


def _use_kernel(impl, x):
    """Whether a compiled kernel takes x; compiles it first. Raises where impl asks for too much."""
    if impl not in ("auto", "cuda", "torch", "emulated"):
        raise ValueError(f"impl is {impl!r}; wanted auto, cuda, torch or emulated.")
    if impl == "torch" or impl == "auto" and not x.is_cuda:
        return False
    kind = "emulated" if impl == "emulated" else "cuda"
    if x.is_cuda != (kind == "cuda"):
        raise ValueError(f"impl={impl!r} got a tensor on {x.device}.")
    try:
        build.load(kind)
    except RuntimeError as error:
        if impl != "auto":
            raise
        _say_once(f"kernels: PyTorch runs in place of the CUDA kernels: {error}")
    return kind in build.loaded


def _say_once(line):
    if line not in _said:
        print(line, file=sys.stderr)
        _said.add(line)


# ------------------------------------------------ NT-Xent

def nt_xent(z, temperature, impl="auto", group=None):
    """Mean over 2N rows of -log softmax of the positive's similarity among all other rows.

    z (2N, D), any float type and any norm (normalise it for cosines); rows i and i+N are two views
    of one image. The result is a scalar, float32 (float64 for float64). With a torch.distributed
    `group` the columns are the rows of all its ranks, the mean is over this rank's rows, and the
    gradient is that of the sum over ranks, which DDP's averaging turns into the global mean's.
    Raises ValueError for an odd or zero number of rows, or a temperature that is not above zero.
    Chen et al. 2020, equation 1.
    """
    if z.dim() != 2 or len(z) < 2 or len(z) % 2 or not z.shape[1]:
        raise ValueError(f"z has shape {tuple(z.shape)}; wanted (2N, D): rows i, i+N are a pair.")
    if z.dtype not in FLOATS:
        raise TypeError(f"z is {z.dtype}; wanted one of {', '.join(map(str, FLOATS))}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; wanted a number above 0, often 0.1 to 0.5")
    columns, first, name = z.detach(), 0, ""
    if group is not None:
        first, name = len(z) * group.rank(), group.group_name
        columns = _gather(columns, name)
    run = torch.ops.fgssl.nt_xent if _use_kernel(impl, z) else Chunked.apply
    return run(z, columns, first, float(temperature), name)[0]


def _gather(x, group):
    """Rows of x of all ranks, one rank after the other; the group is given by its name."""
    from torch.distributed import all_gather, distributed_c10d
    group = distributed_c10d._resolve_process_group(group)
    out = x.new_empty(group.size(), *x.shape)
    all_gather(list(out), x.contiguous(), group)
    return out.flatten(0, 1)


def _save_rows(ctx, inputs, output):
    rows, columns, *ctx.settings, ctx.group = inputs
    ctx.save_for_backward(rows, columns, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_rows(function):
    """The autograd formula around `function`: PyTorch's backward or the kernel's."""
    def backward(ctx, grad, *_):
        rows, columns, lse, *left = ctx.saved_tensors        # left: by the kernel's forward
        grad = grad.view(1)
        if ctx.group:
            lse, grad = _gather(lse, ctx.group), _gather(grad, ctx.group)
        d_rows = function(rows, columns, *ctx.settings, lse, grad, *left)
        return d_rows, None, None, None, None
    return backward


def _no_second_derivative(ctx, *grads):
    """The autograd formula of the kernels' backward functions. Without it a second derivative would
    be silently wrong."""
    raise RuntimeError("the kernels have no second derivative. For nt_xent use nt_xent_dense, for "
                       "tile_shuffle indexing.")


def _differentiable_once(function):
    """A function of tensors whose derivative raises; where torch.compile traces it, which cannot
    trace that, it is the function itself."""
    class Once(torch.autograd.Function):
        forward = staticmethod(function)
        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(_no_second_derivative)

    def call(*tensors):
        return (function if torch.compiler.is_compiling() else Once.apply)(*tensors)
    return call


class Chunked(torch.autograd.Function):
    """nt_xent in PyTorch with O(M D) memory: the backward computes the similarities again."""
    forward = staticmethod(reference.chunked_forward)
    setup_context = staticmethod(_save_rows)
    backward = staticmethod(_backward_rows(_differentiable_once(reference.chunked_backward)))


torch.library.define("fgssl::nt_xent", "(Tensor rows, Tensor columns, int first, "
                     "float temperature, str group) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("fgssl::nt_xent_backward", "(Tensor rows, Tensor columns, int first, "
                     "float temperature, Tensor lse, Tensor grad, Tensor parts, Tensor tickets) "
                     "-> Tensor")
torch.library.register_autograd(
    "fgssl::nt_xent", _backward_rows(torch.ops.fgssl.nt_xent_backward), setup_context=_save_rows)
torch.library.register_autograd("fgssl::nt_xent_backward", _no_second_derivative)


@torch.library.register_fake("fgssl::nt_xent")
def _(rows, columns, first, temperature, group):
    (r, depth), m = rows.shape, len(columns)
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = {torch.float32: 2, torch.bfloat16: 1}.get(rows.dtype, 0) if depth <= 256 else 0
    return (rows.new_empty((), dtype=wide), rows.new_empty(r, 2, dtype=wide),
            rows.new_empty(parts, m, -(-depth // 16) * 16, dtype=torch.bfloat16),
            rows.new_empty(-(-r // 64) * -(-depth // 64) + 1, dtype=torch.int32))


@torch.library.register_fake("fgssl::nt_xent_backward")
def _(rows, columns, first, temperature, lse, grad, parts, tickets):
    return rows.new_empty(rows.shape)


# ------------------------------------------------ tile shuffle

def tile_shuffle(x, perm, grid, tile, offset=None, color=None, mean=None, std=None, image=False,
                 impl="auto"):
    """Cut one tile from each cell of a grid x grid division of x; put them in the order of perm.

    x (B, C, H, W), uint8 or float; cells are H // grid by W // grid pixels, numbered along rows.
    perm (B, grid*grid), integers: output tile k is source tile perm[b, k]. offset (..., 2) is
    broadcast to (B, grid*grid, 2): the place (dy, dx) of each source tile in its cell, which makes
    the gap between tiles; None centres it. uint8 is divided by 255 first and gives float32.
    color (..., C, C + 1) or (..., C, 2C + 1), broadcast to (B, grid*grid, ...), recolours output
    tile k: pixel v becomes clamp(A v + o, 0, 1), or clamp(A v + G m + o, 0, 1) with the tile's mean
    pixel m, where color = [A | o] or [A | G | o]; it has no gradient. Then (v - mean) / std for
    each channel. Result (B, grid*grid, C, tile, tile), or with image=True the tiles put together
    again, (B, C, grid*tile, grid*tile).
    Raises where a tile does not fit its cell, an offset leaves it, or a row of perm is no
    permutation. Of perm and offset on a GPU the kernel checks only that they stay within the image;
    it stops there, and the next synchronisation raises. Noroozi & Favaro 2016, section 3.
    """
    if color is not None and x.requires_grad:
        raise ValueError("x requires a gradient, and color has none: it clamps. Detach x.")
    tables = _check_tiles(x, perm, grid, tile, offset), _color_table(x, grid, color, mean, std)
    shuffle = torch.ops.fgssl.tile_shuffle if _use_kernel(impl, x) else Gathered.apply
    return shuffle(x, *tables[0], tables[1], grid, tile, image)


def _beside(table, x):
    """A table, often made on the CPU, where x is. By way of pinned memory no GPU is waited for."""
    if x.is_cuda and not table.is_cuda:
        table = table.pin_memory()
    return table.to(x.device, non_blocking=True)


def _check_tiles(x, perm, grid, tile, offset):
    """The tables perm and offset at full size, int64 and beside x; checked where they are CPU's."""
    if x.dim() != 4 or x.dtype not in (torch.uint8, *FLOATS) or not x.numel():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; wanted (B, C, H, W), uint8 or float.")
    (b, _, height, width), k = x.shape, grid * grid
    room = [height // grid - tile, width // grid - tile] if grid > 0 else [-1, -1]
    if tile < 1 or min(room) < 0:
        raise ValueError(f"a grid of {grid}, tiles of {tile} do not fit {height} x {width} pixels")
    if perm.shape != (b, k) or perm.is_floating_point():
        raise ValueError(f"perm is {perm.dtype} {tuple(perm.shape)}; wanted integers ({b}, {k}).")
    limit = torch.tensor(room)
    offset = limit // 2 if offset is None else torch.as_tensor(offset)
    if offset.is_floating_point() or offset.shape[-1:] != (2,):
        raise ValueError(f"offset is {offset.dtype} {tuple(offset.shape)}; wanted integers (.., 2)")
    perm, offset = perm.long(), offset.long().expand(b, k, 2)
    if not perm.is_cuda:
        whole = perm.sort(1).values == torch.arange(k)
        torch._assert_async(whole.all(), f"a row of perm is not a permutation of 0 .. {k - 1}")
    if not offset.is_cuda:
        torch._assert_async(((offset >= 0) & (offset <= limit)).all(),
                            f"an offset leaves its cell: (dy, dx) must be between 0 and {room}")
    return _beside(perm, x), _beside(offset.contiguous(), x)


def _color_table(x, grid, color, mean, std):
    """color, then the normalisation, as one affine map a tile, see
    reference.gather_forward: (B, K, C, C + 3 or 2C + 3), or None where there is neither."""
    if color is None and mean is None and std is None:
        return None
    b, c, k = *x.shape[:2], grid * grid
    wide = torch.promote_types(x.dtype, torch.float32)
    at = "cpu" if color is None else color.device
    mean, std = (torch.as_tensor(value, dtype=wide, device=at).expand(c)[:, None]
                 for value in (0. if mean is None else mean, 1. if std is None else std))
    low, high = (torch.full((c, 1), value, dtype=wide, device=at)
                 for value in ((-math.inf, math.inf) if color is None else (0., 1.)))
    if color is None:
        color = torch.cat((torch.eye(c, dtype=wide), torch.zeros(c, 1, dtype=wide)), 1)
    if color.shape[-2:] not in ((c, c + 1), (c, 2 * c + 1)):
        raise ValueError(f"color has shape {tuple(color.shape)}; wanted (..., {c}, {c + 1}) or "
                         f"(..., {c}, {2 * c + 1}).")
    unit = 255 if x.dtype == torch.uint8 else 1
    color = color.to(wide).expand(b, k, -1, -1)
    parts = (color[..., :-1] / (std * unit),
             *((v.expand(b, k, c, 1) - mean) / std for v in (color[..., -1:], low, high)))
    return _beside(torch.cat(parts, -1), x)


def _save_tiles(ctx, inputs, output):
    x, perm, offset, color, *ctx.settings = inputs
    ctx.save_for_backward(perm, offset, color)
    ctx.size = x.shape[2:]


def _backward_tiles(function):
    def backward(ctx, grad):
        perm, offset, color = ctx.saved_tensors
        d_x = function(grad, perm.argsort(1), offset, color, *ctx.settings, *ctx.size)
        return d_x, *[None] * 6
    return backward


class Gathered(torch.autograd.Function):
    """tile_shuffle in PyTorch."""
    forward = staticmethod(reference.gather_forward)
    setup_context = staticmethod(_save_tiles)
    backward = staticmethod(_backward_tiles(_differentiable_once(reference.gather_backward)))


torch.library.define("fgssl::tile_shuffle", "(Tensor x, Tensor perm, Tensor offset, Tensor? color, "
                     "int grid, int tile, bool image) -> Tensor")
torch.library.define("fgssl::tile_shuffle_backward", "(Tensor grad, Tensor inverse, Tensor offset, "
                     "Tensor? color, int grid, int tile, bool image, int height, int width) "
                     "-> Tensor")
torch.library.register_autograd(
    "fgssl::tile_shuffle", _backward_tiles(torch.ops.fgssl.tile_shuffle_backward),
    setup_context=_save_tiles)
torch.library.register_autograd("fgssl::tile_shuffle_backward", _no_second_derivative)


@torch.library.register_fake("fgssl::tile_shuffle")
def _(x, perm, offset, color, grid, tile, image):
    kind, (b, c) = torch.float32 if x.dtype == torch.uint8 else x.dtype, x.shape[:2]
    shape = (b, c, grid * tile, grid * tile) if image else (b, grid * grid, c, tile, tile)
    return x.new_empty(shape, dtype=kind)


@torch.library.register_fake("fgssl::tile_shuffle_backward")
def _(grad, inverse, offset, color, grid, tile, image, height, width):
    return grad.new_empty(len(grad), grad.shape[1 if image else 2], height, width)
