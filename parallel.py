"""Several processes that train as one: all that the trainers need of torch.distributed.

    torchrun --nproc-per-node 2 train_simclr.py      # gloo between CPUs, NCCL between GPUs

Each of R processes, a *rank*, holds the whole network and takes every R-th image of each batch;
gradients are averaged (DistributedDataParallel). --batch is the batch of all ranks together, and
random draws are those of one process, so that the number of ranks changes rounding and little else.
Rank 0 alone prints and writes. In a process by itself every function here does nothing.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# ------------------------------------------------------------------------------------------------
# Who is who
# ------------------------------------------------------------------------------------------------


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def group():
    """All ranks, for an op that wants them by that name; None where there is one."""
    return dist.group.WORLD if ranks() > 1 else None


def run(main):
    """Run main(), as one rank of several where torchrun started this process.

    What ranks other than 0 print goes nowhere. When one fails, all end; the first to fail shows its
    error, and the others, which fail with it or for want of it, are silent.
    """
    if not dist.is_torchelastic_launched():
        return main()
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            sys.exit(f"process {local + 1} on a machine of {gpus} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local)                         # "cuda" is this one from here on
    store, number, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        with contextlib.ExitStack() as silence:
            if number > 0:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            main()
    except (Exception, KeyboardInterrupt) as error:
        if store.add("failed", 1) > 1:
            sys.exit(1)
        error.add_note(f"(rank {number} of {count})")
        raise
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Data and random draws, divided
# ------------------------------------------------------------------------------------------------


def share(rows):
    """This rank's rows of a batch: every R-th."""
    return rows[rank()::ranks()]


class Generator(torch.Generator):
    """A random generator that all ranks hold in the same state.

    `fgssl.uniform` and `fgssl.integers` draw from it for the images of all ranks, and keep their
    own rank's. An image so has the same view whatever the number of ranks (but for the order in
    `fgssl.in_pieces`), and the one state in a checkpoint suits any number.
    """

    def __init__(self):
        super().__init__()
        self.share = rank(), ranks()


def share_of(rng):
    """(r, R): draws from rng are those of rank r of R; (0, 1) for torch's own generators."""
    return getattr(rng, "share", (0, 1))


# ------------------------------------------------------------------------------------------------
# Exchanges: all ranks must make the same ones in the same order
# ------------------------------------------------------------------------------------------------


def mean(value):
    """The mean over ranks of a number or tensor (), as a float. Waits for the GPU."""
    value = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach() / ranks()
    if ranks() > 1:
        dist.all_reduce(value)
    return value.item()


def gather(x):
    """The rows of all ranks, without gradient, in the order that they have in one process."""
    if ranks() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def either(*wishes):
    """Of each wish, whether any rank has it. On CPUs, so that no GPU is waited for."""
    if ranks() == 1:
        return wishes
    wishes = torch.tensor(wishes, dtype=torch.int32)
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return wishes.bool().tolist()


def wait():
    """Until all ranks are here."""
    either(False)


@contextlib.contextmanager
def one_first():
    """The others of a machine begin this block when the first is through: what that has drawn or
    decoded, they find."""
    first = ranks() == 1 or os.environ["LOCAL_RANK"] == "0"
    if not first:
        wait()
    yield
    if first:
        wait()


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


def averaged(*modules):
    """The modules, to be called where they learn: the backward pass then averages their gradients
    over ranks. The parameters are the same, and so are those modules' names for them."""
    if ranks() == 1:
        return modules
    return [nn.parallel.DistributedDataParallel(module) for module in modules]


class Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) for each channel, over the images of all ranks.

    x (n, C, ...) -> y, mean (C,), var (C,). The backward pass is batch-norm's,
    dx = (dy - mean(dy) - y mean(dy y)) / sqrt(var + eps), with both means over all ranks again.
    """

    @staticmethod
    def forward(ctx, x, eps):
        over = [0, *range(2, x.dim())]
        local = torch.stack(torch.var_mean(x, over, correction=0))
        variances, means = gather(local[None]).unbind(1)     # (R, C) each; ranks have as many each
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)  # Chan et al. 1979: no cancellation
        ctx.over, ctx.shape = over, (1, -1) + (1,) * (x.dim() - 2)
        scale = (var + eps).rsqrt().view(ctx.shape)
        y = (x - mean.view(ctx.shape)) * scale
        ctx.save_for_backward(y, scale)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        y, scale = ctx.saved_tensors
        means = torch.stack((dy.mean(ctx.over), (dy * y).mean(ctx.over)))
        means = gather(means[None]).mean(0)
        mean_dy, mean_dy_y = means.view(2, *ctx.shape)
        return (dy - mean_dy - y * mean_dy_y) * scale, None


class SyncBatchNorm(_BatchNorm):
    """Batch-norm that normalises by the images of all ranks: two small exchanges a layer and step.

    torch.nn.SyncBatchNorm, for GPUs alone, is fused; this one runs anywhere and can be read.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y, mean, var = Normalize.apply(wide, self.eps)
        n = ranks() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        weight, bias = (v.view(1, -1, *[1] * (x.dim() - 2)) for v in (self.weight, self.bias))
        return (y * weight + bias).to(x.dtype)


def synchronise(*networks):
    """Make each batch-norm in them a SyncBatchNorm: with the same parameters, under their names."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, _BatchNorm) and ranks() > 1:
                module.__class__ = SyncBatchNorm
