"""The tile shuffle of the jigsaw as an operation of PyTorch's: checks, tables and derivative."""
import math

import torch

from . import reference
from .dispatch import FLOATS, differentiable_once, no_second_derivative, use_kernel


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
    shuffle = torch.ops.fgssl.tile_shuffle if use_kernel(impl, x) else Gathered.apply
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
    backward = staticmethod(_backward_tiles(differentiable_once(reference.gather_backward)))


torch.library.define("fgssl::tile_shuffle", "(Tensor x, Tensor perm, Tensor offset, Tensor? color, "
                     "int grid, int tile, bool image) -> Tensor")
torch.library.define("fgssl::tile_shuffle_backward", "(Tensor grad, Tensor inverse, Tensor offset, "
                     "Tensor? color, int grid, int tile, bool image, int height, int width) "
                     "-> Tensor")
torch.library.register_autograd(
    "fgssl::tile_shuffle", _backward_tiles(torch.ops.fgssl.tile_shuffle_backward),
    setup_context=_save_tiles)
torch.library.register_autograd("fgssl::tile_shuffle_backward", no_second_derivative)


@torch.library.register_fake("fgssl::tile_shuffle")
def _(x, perm, offset, color, grid, tile, image):
    kind, (b, c) = torch.float32 if x.dtype == torch.uint8 else x.dtype, x.shape[:2]
    shape = (b, c, grid * tile, grid * tile) if image else (b, grid * grid, c, tile, tile)
    return x.new_empty(shape, dtype=kind)


@torch.library.register_fake("fgssl::tile_shuffle_backward")
def _(grad, inverse, offset, color, grid, tile, image, height, width):
    return grad.new_empty(len(grad), grad.shape[1 if image else 2], height, width)
