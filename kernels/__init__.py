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

import torch

from . import reference
from .dispatch import FLOATS, differentiable_once, no_second_derivative, status, use_kernel
from .reference import nt_xent_dense
from .tiles import tile_shuffle

__all__ = ["nt_xent", "nt_xent_dense", "status", "tile_shuffle"]


def nt_xent(z, temperature, impl="auto", group=None, decoupled=False):
    """Mean over 2N rows of -log softmax of the positive's similarity among all other rows.

    z (2N, D), any float type and any norm (normalise it for cosines); rows i and i+N are two views
    of one image. The result is a scalar, float32 (float64 for float64). With a torch.distributed
    `group` the columns are the rows of all its ranks, the mean is over this rank's rows, and the
    gradient is that of the sum over ranks, which DDP's averaging turns into the global mean's.
    Raises ValueError for an odd or zero number of rows, or a temperature that is not above zero.
    Chen et al. 2020, equation 1.

    decoupled: the softmax's sum leaves the positive out, so that views which are alike already
    teach no less, and the loss has no lower bound; it takes four rows or more. Yeh et al. 2022.
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
    if decoupled and len(columns) < 4:
        raise ValueError("one pair has no negatives; decoupled wants two or more")
    run = torch.ops.fgssl.nt_xent if use_kernel(impl, z) else Chunked.apply
    return run(z, columns, first, float(temperature), decoupled, name)[0]


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
        return d_rows, None, None, None, None, None
    return backward


class Chunked(torch.autograd.Function):
    """nt_xent in PyTorch with O(M D) memory: the backward computes the similarities again."""
    forward = staticmethod(reference.chunked_forward)
    setup_context = staticmethod(_save_rows)
    backward = staticmethod(_backward_rows(differentiable_once(reference.chunked_backward)))


torch.library.define("fgssl::nt_xent", "(Tensor rows, Tensor columns, int first, "
                     "float temperature, bool decoupled, str group) "
                     "-> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("fgssl::nt_xent_backward", "(Tensor rows, Tensor columns, int first, "
                     "float temperature, bool decoupled, Tensor lse, Tensor grad, Tensor parts, "
                     "Tensor tickets) -> Tensor")
torch.library.register_autograd(
    "fgssl::nt_xent", _backward_rows(torch.ops.fgssl.nt_xent_backward), setup_context=_save_rows)
torch.library.register_autograd("fgssl::nt_xent_backward", no_second_derivative)


@torch.library.register_fake("fgssl::nt_xent")
def _(rows, columns, first, temperature, decoupled, group):
    (r, depth), m = rows.shape, len(columns)
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = {torch.float32: 2, torch.bfloat16: 1}.get(rows.dtype, 0) if depth <= 256 else 0
    return (rows.new_empty((), dtype=wide), rows.new_empty(r, 2, dtype=wide),
            rows.new_empty(parts, m, -(-depth // 16) * 16, dtype=torch.bfloat16),
            rows.new_empty(-(-r // 64) * -(-depth // 64) + 1, dtype=torch.int32))


@torch.library.register_fake("fgssl::nt_xent_backward")
def _(rows, columns, first, temperature, decoupled, lse, grad, parts, tickets):
    return rows.new_empty(rows.shape)
