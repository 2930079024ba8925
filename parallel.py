"""Several processes that train as one: all that the project needs of torch.distributed.

    torchrun --nproc-per-node 2 train_simclr.py      # gloo between CPUs, NCCL between GPUs

Each of R processes, a *rank*, holds the whole network and takes every R-th image of each batch;
DistributedDataParallel averages the gradients. --batch is the batch of all ranks together, and
random draws are those of one process: the number of ranks changes rounding and little else.
Rank 0 alone prints and writes. In a single process every function here does nothing.
"""

import contextlib
import datetime
import itertools
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# ------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------


store, turns = None, itertools.count()                       # what all processes see; see `run`


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def group():
    """The process group of all ranks; None for a single process."""
    return dist.group.WORLD if ranks() > 1 else None


def run(main):
    """Run main(), as one rank of several where torchrun started this process.

    Output of ranks other than 0 is dropped. When one rank fails, all end; the first to fail shows
    its error, the others, which fail because of it, are silent.
    """
    if not dist.is_torchelastic_launched():
        return main()
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            sys.exit(f"process {local + 1} on a machine of {gpus} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local)                         # "cuda" is this one from here on
    global store
    store, number, count = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_RANK"] == "0":
        store.set(first_of_machine(), str(os.getpid()))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count,
                            timeout=datetime.timedelta(days=7))  # a rank that dies ends all anyway
    try:
        with contextlib.ExitStack() as silence:
            if number > 0:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            main()
    except (Exception, KeyboardInterrupt):
        if store.add("failed", 1) > 1:
            sys.exit(1)
        print(f"rank {number} of {count} failed:", file=sys.stderr)
        raise
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Random draws
# ------------------------------------------------------------------------------------------------


class Generator(torch.Generator):
    """A random generator that all ranks hold in the same state.

    `fgssl.uniform` and `fgssl.integers` draw from it for the images of all ranks and keep those of
    their own shard (r, R), every R-th. So an image has the same view whatever the number of ranks
    (but for the order in `fgssl.map_chunks`), and the one state in a checkpoint suits any number.
    """

    def __init__(self):
        super().__init__()
        self.shard = rank(), ranks()


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


def any_rank(*flags):
    """Of each flag, whether any rank has it set. On CPUs, so that no GPU is waited for."""
    if ranks() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def wait():
    """Until all ranks are here."""
    any_rank(False)


@contextlib.contextmanager
def local_rank0_first():
    """Local rank 0 of each machine goes through this block first; the others reuse its files.

    It may download for a day. The others look into the store whether it is done, for as long as
    its process lives; a collective would wait for a fixed time. ChildProcessError if it died.
    """
    if ranks() > 1:
        first, turn = first_of_machine(), f"{first_of_machine()}, turn {next(turns)}"
        while os.environ["LOCAL_RANK"] != "0" and not store.check([turn]):
            if store.check(["failed"]) or not lives(int(store.get(first))):
                raise ChildProcessError("the first process of this machine ended")
            time.sleep(0.1)
    yield
    if ranks() > 1:
        store.set(turn, "done")


def first_of_machine():
    """The key under which the store has the process id of this machine's local rank 0."""
    return f"local rank 0 of machine {os.environ.get('GROUP_RANK', 0)}"


def lives(process):
    """Whether there is a process of this id on this machine."""
    if os.name == "posix":                                   # elsewhere signal 0 ends a process
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


def wrap_ddp(*modules):
    """The modules, wrapped so that the backward pass averages their gradients over ranks. Their
    parameters, and those parameters' names in the modules themselves, are the same."""
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
    """Batch-norm with the statistics of all ranks, on CPUs, where torch.nn.SyncBatchNorm does not
    run: two small exchanges a layer and step."""

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


def convert_sync_batchnorm(*networks):
    """Make each batch-norm of the networks one of all ranks, in place; parameters keep their names.

    On GPUs it is PyTorch's, which is fused; on CPUs, SyncBatchNorm above.
    """
    if ranks() == 1:
        return
    for network in networks:
        if next(network.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            continue
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncBatchNorm
