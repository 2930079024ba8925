"""Which implementation of an operation runs, and that none has a second derivative."""
import functools
import sys

import torch

from . import build

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def status():
    """What impl="auto" runs for tensors on a CPU and on a GPU, and why; looks, but never builds."""
    reason = build.obstacle("cuda")
    if reason:
        return {"cpu": "torch", "cuda": "torch", "why": reason}
    built = "are built" if build.library("cuda").exists() else "will be built at the first call"
    return {"cpu": "torch", "cuda": "cuda", "why": f"the kernels {built}"}


def use_kernel(impl, x):
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
        say_once(f"kernels: PyTorch runs in place of the CUDA kernels: {error}")
    return kind in build.loaded


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


def no_second_derivative(ctx, *grads):
    """The autograd formula of the kernels' backward functions. Without it a second derivative would
    be silently wrong."""
    raise RuntimeError("the kernels have no second derivative. For nt_xent use nt_xent_dense, for "
                       "tile_shuffle indexing.")


def differentiable_once(function):
    """A function of tensors whose derivative raises; where torch.compile traces it, which cannot
    trace that, it is the function itself."""
    class Once(torch.autograd.Function):
        forward = staticmethod(function)
        setup_context = staticmethod(lambda ctx, inputs, output: None)
        backward = staticmethod(no_second_derivative)

    def call(*tensors):
        return (function if torch.compiler.is_compiling() else Once.apply)(*tensors)
    return call
