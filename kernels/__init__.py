"""The two hot paths of self-supervised training: the NT-Xent loss and the jigsaw tile shuffle.

    from kernels import nt_xent, tile_shuffle, status
    loss = nt_xent(z, temperature=0.2)               # z (2N, D): rows i and i+N are one image
    tiles = tile_shuffle(x, perm, grid=3, tile=64)   # x (B, C, H, W) -> (B, 9, C, 64, 64)

Each is written twice: here in PyTorch, short and exact, and in nt_xent.cu or tile_shuffle.cu as a
CUDA kernel. `impl` chooses: "torch" is this file; "cuda" the kernel, or an error; "emulated" the
kernel's source run on the CPU; "auto" the kernel for CUDA tensors where it builds, else this file.
Importing builds nothing; the first call that needs a kernel compiles it (build.py).
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import build

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ------------------------------------------------ which implementation runs

def _use_kernel(impl, x):
    """Whether a compiled kernel takes x; compiles it first. Raises where impl asks for too much."""
    if impl not in ("auto", "cuda", "torch", "emulated"):
        raise ValueError(f"impl is {impl!r}; wanted auto, cuda, torch or emulated.")
    if impl == "torch" or impl == "auto" and not x.is_cuda:
        return False
    kind = "emulated" if impl == "emulated" else "cuda"
    if x.is_cuda != (kind == "cuda"):
        raise ValueError(f"impl={impl!r} got a tensor on {x.device}.")
    if impl == "auto" and build.obstacle(kind):
        _say_once(f"kernels: PyTorch code runs in place of CUDA kernels: {build.obstacle(kind)}")
        return False
    try:
        build.load(kind)
    except RuntimeError as error:
        if impl != "auto":
            raise
        _say_once(f"kernels: PyTorch code runs in place of CUDA kernels: {error}")
    return kind in build.loaded


_said = set()


def _say_once(line):
    if line not in _said:
        print(line, file=sys.stderr)
        _said.add(line)


def status():
    """What impl="auto" runs for tensors on a CPU and on a GPU, and why; looks, but never builds."""
    reason = build.obstacle("cuda")
    if reason is None:
        built = build.library("cuda").exists()
        reason = "the kernels are built" if built else "the kernels will be built at the first call"
    return {"cpu": "torch", "cuda": "torch" if build.obstacle("cuda") else "cuda", "why": reason}


# ------------------------------------------------ NT-Xent: Chen et al. 2020, equation 1

def nt_xent(z, temperature, impl="auto", group=None):
    """Mean over 2N rows of -log softmax of the positive's similarity among all other rows.

    z (2N, D), any float type and any norm (normalise it for cosines); rows i and i+N are two views
    of one image. The result is a scalar, float32 (float64 for float64). With a torch.distributed
    `group` the columns are the rows of all its ranks, the mean is over this rank's rows, and the
    gradient is that of the sum over ranks, which DDP's averaging turns into the global mean's.
    Raises ValueError for an odd or zero number of rows, or a temperature that is not above zero.
    """
    if z.dim() != 2 or len(z) < 2 or len(z) % 2 or not z.shape[1]:
        raise ValueError(f"z has shape {tuple(z.shape)}; wanted (2N, D): rows i and i+N are a pair.")
    if z.dtype not in FLOATS:
        raise TypeError(f"z is {z.dtype}; wanted one of {', '.join(map(str, FLOATS))}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; wanted a number above 0, often 0.1 to 0.5.")
    columns, first, name = z.detach(), 0, ""
    if group is not None:
        first, name = len(z) * group.rank(), group.group_name
        columns = _gather(columns, name)
    rows_loss = torch.ops.fgssl.nt_xent if _use_kernel(impl, z) else Chunked.apply
    return rows_loss(z, columns, first, float(temperature), name)[0].mean()


def nt_xent_dense(z, temperature):
    """The specification of nt_xent, in the fewest words. Keeps several (2N, 2N) matrices."""
    sim = z @ z.T / temperature
    sim = sim.fill_diagonal_(-torch.inf)                       # a row is not its own negative
    positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(sim, positive)


def _blocks(rows, columns, first, temperature):
    """Yield (slice, sim): sim (b, M) = rows[slice] @ columns.T / temperature, diagonal -inf.

    A block of 16 MiB leaves few enough of them that threads seldom wait for each other. The buffer
    is used again, so sim may be changed but not kept.
    """
    block = max(1, 2**22 // len(columns))
    buffer = rows.new_empty(min(block, len(rows)), len(columns))
    for start in range(0, len(rows), block):
        here = slice(start, min(start + block, len(rows)))
        sim = torch.addmm(buffer[:here.stop - start], rows[here], columns.T, beta=0,
                          alpha=1 / temperature, out=buffer[:here.stop - start])
        sim.diagonal(first + start).fill_(-torch.inf)
        yield here, sim


def _positive(rows, here, first):
    """Column of each row's positive, (b, 1): the other half of this rank's rows."""
    i = torch.arange(here.start, here.stop, device=rows.device)
    return (first + (i + len(rows) // 2) % len(rows))[:, None]


def chunked_forward(rows, columns, first, temperature, group=""):
    """loss_i = log sum_{j != i} exp(s_ij) - s_i,pos(i); with top and log_sum, three vectors (R,).

    rows (R, D) are rows first .. first+R of columns (M, D). top is the row's greatest s_ij, so that
    no temperature overflows, and log_sum the rest of its log-sum-exp; they stay apart since at a low
    temperature their sum would round. `group` is for the backward pass.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, columns = rows.to(wide), columns.to(wide)
    loss, top, log_sum = rows.new_empty(3, len(rows))
    for here, sim in _blocks(rows, columns, first, temperature):
        positive = sim.gather(1, _positive(rows, here, first))[:, 0]
        top[here] = sim.amax(1)
        log_sum[here] = sim.sub_(top[here, None]).exp_().sum(1).log_()
        loss[here] = log_sum[here] + (top[here] - positive)
    return loss, top, log_sum


def chunked_backward(rows, columns, first, temperature, top, log_sum, grad):
    """d rows_i = 1/t sum_j (g_i P_ij + g_j P_ji - (g_i + g_j) [j = pos(i)]) columns_j.

    P_ij = exp(s_ij - top_i - log_sum_i). S is symmetric, so its row i gives P_ij and P_ji both.
    top, log_sum and grad (M,), the cotangent g of loss, are those of the columns.
    """
    kind, wide = rows.dtype, torch.promote_types(rows.dtype, torch.float32)
    rows, columns = rows.to(wide), columns.to(wide)
    d_rows, other = torch.empty_like(rows), None
    for here, sim in _blocks(rows, columns, first, temperature):
        i = slice(first + here.start, first + here.stop)
        other = torch.sub(sim, top, out=other if other is None else other[:len(sim)])
        other.sub_(log_sum).exp_().mul_(grad)
        sim.sub_(top[i, None]).sub_(log_sum[i, None]).exp_().mul_(grad[i, None]).add_(other)
        at = _positive(rows, here, first)
        sim.scatter_add_(1, at, -(grad[i, None] + grad[at]))
        torch.addmm(d_rows[here], sim, columns, beta=0, alpha=1 / temperature, out=d_rows[here])
    return d_rows.to(kind)


def _gather(x, group):
    """Rows of x of all ranks, one rank after the other; the group is given by its name."""
    from torch.distributed import all_gather, distributed_c10d
    group = distributed_c10d._resolve_process_group(group)
    out = x.new_empty(group.size(), *x.shape)
    all_gather(list(out), x.contiguous(), group)
    return out.flatten(0, 1)


def _save(ctx, inputs, output):
    rows, columns, first, temperature, group = inputs
    ctx.save_for_backward(rows, columns, *output[1:])
    ctx.first, ctx.temperature, ctx.group = first, temperature, group
    ctx.mark_non_differentiable(*output[1:])


def _backward(function):
    """Autograd formula around `function`, shared by the PyTorch form and the kernels."""
    def backward(ctx, grad, *_):
        rows, columns, top, log_sum = ctx.saved_tensors
        if ctx.group:
            top, log_sum, grad = _gather(torch.stack((top, log_sum, grad), 1), ctx.group).unbind(1)
        return (function(rows, columns, ctx.first, ctx.temperature, top, log_sum, grad),
                None, None, None, None)
    return backward


class Chunked(torch.autograd.Function):
    """nt_xent in PyTorch with O(M D) memory: the backward computes the blocks again."""
    forward = staticmethod(chunked_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(once_differentiable(_backward(chunked_backward)))


torch.library.define("fgssl::nt_xent", "(Tensor rows, Tensor columns, int first, float temperature, "
                     "str group) -> (Tensor, Tensor, Tensor)")
torch.library.define("fgssl::nt_xent_backward", "(Tensor rows, Tensor columns, int first, "
                     "float temperature, Tensor top, Tensor log_sum, Tensor grad) -> Tensor")


@torch.library.register_fake("fgssl::nt_xent")
def _(rows, columns, first, temperature, group):
    wide = torch.promote_types(rows.dtype, torch.float32)
    return tuple(rows.new_empty(len(rows), dtype=wide) for _ in range(3))


@torch.library.register_fake("fgssl::nt_xent_backward")
def _(rows, columns, first, temperature, top, log_sum, grad):
    return torch.empty_like(rows)


torch.library.register_autograd("fgssl::nt_xent", _backward(torch.ops.fgssl.nt_xent_backward),
                                setup_context=_save)


# ------------------------------------------------ tile shuffle: Noroozi & Favaro 2016

def tile_shuffle(x, perm, grid, tile, offset=None, mean=None, std=None, image=False, impl="auto"):
    """Cut one tile from each cell of a grid x grid division of x and put them in the order of perm.

    x (B, C, H, W), uint8 or float; cells are H // grid by W // grid pixels, numbered along rows.
    perm (B, grid*grid), integers: output tile k is source tile perm[b, k]. offset (..., 2), broadcast
    to (B, grid*grid, 2): the place (dy, dx) of each source tile in its cell, which makes the gap
    between tiles; None centres it. Values are (x - mean) / std for each channel, in x's type; uint8
    is divided by 255 first and gives float32. Result (B, grid*grid, C, tile, tile), or with
    image=True the tiles put together again: (B, C, grid*tile, grid*tile). Raises where a tile does not fit its cell, an offset leaves it, or a row of perm is no permutation.
    """
    mean, std = 0. if mean is None else mean, 1. if std is None else std
    perm, offset, shift, scale = _check_tiles(x, perm, grid, tile, offset, mean, std)
    shuffle = torch.ops.fgssl.tile_shuffle if _use_kernel(impl, x) else tile_shuffle_gather
    return shuffle(x, perm, offset, shift, scale, grid, tile, image)


def _check_tiles(x, perm, grid, tile, offset, mean, std):
    """Turn the public arguments into the kernels': int64 tables of full size, (x - shift) * scale."""
    if x.dim() != 4 or x.dtype not in (torch.uint8, *FLOATS) or not x.numel():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; wanted (B, C, H, W), uint8 or float.")
    (b, c, height, width), k = x.shape, grid * grid
    room = [height // grid - tile, width // grid - tile] if grid > 0 else [-1, -1]
    if tile < 1 or min(room) < 0:
        raise ValueError(f"a grid of {grid} and tiles of {tile} do not fit {height} x {width} pixels.")
    if perm.shape != (b, k) or perm.is_floating_point():
        raise ValueError(f"perm is {perm.dtype} {tuple(perm.shape)}; wanted integers ({b}, {k}).")
    perm = perm.to(x.device, torch.int64)
    limit = torch.tensor(room, device=x.device)
    offset = limit // 2 if offset is None else torch.as_tensor(offset, device=x.device)
    if offset.is_floating_point() or offset.shape[-1:] != (2,):
        raise ValueError(f"offset is {offset.dtype} {tuple(offset.shape)}; wanted integers (.., 2).")
    offset = offset.to(torch.int64).expand(b, k, 2)
    # On a GPU these two report at the next synchronisation, in place of stopping the stream for a look.
    whole = perm.sort(1).values == torch.arange(k, device=x.device)
    torch._assert_async(whole.all(), f"a row of perm is not a permutation of 0 .. {k - 1}")
    torch._assert_async(((offset >= 0) & (offset <= limit)).all(),
                        f"an offset leaves its cell: (dy, dx) must be between 0 and {room}")
    wide = torch.promote_types(x.dtype, torch.float32)
    unit = 255 if x.dtype == torch.uint8 else 1
    shift = torch.as_tensor(mean, dtype=wide, device=x.device).expand(c) * unit
    scale = 1 / (torch.as_tensor(std, dtype=wide, device=x.device).expand(c) * unit)
    return perm, offset, shift, scale


def tile_shuffle_gather(x, perm, offset, shift, scale, grid, tile, image):
    """tile_shuffle in PyTorch: one gather, whose autograd is the backward pass."""
    (b, c, height, width), wide = x.shape, shift.dtype
    kind = wide if x.dtype == torch.uint8 else x.dtype
    steps = torch.arange(tile, device=x.device)
    corner = offset.gather(1, perm[:, :, None].expand(-1, -1, 2))
    y = (perm // grid * (height // grid) + corner[:, :, 0])[:, :, None] + steps     # (B, K, tile)
    x0 = (perm % grid * (width // grid) + corner[:, :, 1])[:, :, None] + steps
    index = (y[:, :, :, None] * width + x0[:, :, None, :]).reshape(b, 1, -1)
    tiles = x.flatten(2).gather(2, index.expand(-1, c, -1))
    tiles = tiles.view(b, c, -1, tile, tile).transpose(1, 2)
    tiles = ((tiles.to(wide) - shift[:, None, None]) * scale[:, None, None]).to(kind)
    if not image:
        return tiles.contiguous()
    tiles = tiles.reshape(b, grid, grid, c, tile, tile).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(b, c, grid * tile, grid * tile)



torch.library.define("fgssl::tile_shuffle", "(Tensor x, Tensor perm, Tensor offset, Tensor shift, "
                     "Tensor scale, int grid, int tile, bool image) -> Tensor")
torch.library.define("fgssl::tile_shuffle_backward", "(Tensor grad, Tensor inverse, Tensor offset, "
                     "Tensor scale, int grid, int tile, bool image, int height, int width) -> Tensor")


@torch.library.register_fake("fgssl::tile_shuffle")
def _(x, perm, offset, shift, scale, grid, tile, image):
    kind, b, c = shift.dtype if x.dtype == torch.uint8 else x.dtype, x.shape[0], x.shape[1]
    shape = (b, c, grid * tile, grid * tile) if image else (b, grid * grid, c, tile, tile)
    return x.new_empty(shape, dtype=kind)


@torch.library.register_fake("fgssl::tile_shuffle_backward")
def _(grad, inverse, offset, scale, grid, tile, image, height, width):
    return grad.new_empty(len(grad), len(scale), height, width)


def _save_tiles(ctx, inputs, output):
    x, perm, offset, _, scale, *ctx.layout = inputs
    ctx.save_for_backward(perm, offset, scale)
    ctx.size = x.shape[2:]


def _backward_tiles(ctx, grad):
    perm, offset, scale = ctx.saved_tensors
    d_x = torch.ops.fgssl.tile_shuffle_backward(grad, perm.argsort(1), offset, scale, *ctx.layout,
                                                *ctx.size)
    return d_x, None, None, None, None, None, None, None


torch.library.register_autograd("fgssl::tile_shuffle", _backward_tiles, setup_context=_save_tiles)
