"""A GPU made of a CPU: tensors that say they are on cuda:0, hold real data, and refuse what CUDA
refuses. So each script runs as on a GPU, and what a step does to one can be counted.

    python tests/pretend_gpu.py RUNS.json    # [[script, [arguments]], ...]; prints a report as JSON

Refused: an op on tensors of both devices (0-dim CPU tensors and CPU indices are let pass, as CUDA
lets them), a random generator of the other device, `.numpy()`. Counted, each with the line of the
project that caused it, in training steps that are not logged, evaluations left out: launches (ops
on tensors of the GPU that are no views), waits (the host needs a value), copies to the GPU, and
among them those from pageable memory, which wait too. The kernels are the emulated ones. Not shown:
time, memory, what an op of PyTorch really launches, races between streams.
"""
import collections
import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def load_guard(folder):
    """Compile pretend_gpu.cpp and load it before torch asks whether there is a GPU."""
    guard = folder / "guard.so"
    if not guard.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", str(HERE / "pretend_gpu.cpp"),
                   f"-I{TORCH}/include", "-o", str(guard)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("libgomp*", "libc10.so", "libtorch_cpu.so"):
        for file in glob.glob(f"{TORCH}/lib/{name}"):
            ctypes.CDLL(file, ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_guard(Path(os.environ["FGSSL_CACHE"]))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VIEWS = set("""view slice select t transpose permute expand unsqueeze squeeze detach alias
    as_strided split split_with_sizes unbind _unsafe_view _reshape_alias diagonal unfold lift_fresh
    view_as set_ narrow _local_scalar_dense""".split())
WAITS = set("""_local_scalar_dense nonzero masked_select equal is_nonzero unique_dim _unique2
    unique_consecutive bincount""".split())
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_"}
KINDS = "launches", "waits", "copies", "kernels"
counts = {"steps": 0} | {kind: collections.Counter() for kind in KINDS}
counting = False


def count(kind, what):
    """Count an event, by the innermost line of the project's own."""
    if not counting:
        return
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__
                     or not frame.f_code.co_filename.startswith(f"{HERE.parent}/")):
        frame = frame.f_back
    at = "?"
    if frame:
        at = f"{os.path.relpath(frame.f_code.co_filename, HERE.parent)}:{frame.f_lineno}"
    counts[kind][f"{at} {what}"] += 1


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU; `inner` holds its data."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=GPU, requires_grad=False)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __repr__(self):
        return f"Pretended({self.inner!r})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        count("waits", "tolist")
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):                       # torch.save
        with _disable_current_modes():
            return self.inner.detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = Pretended(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


def refuse_mixed(function, name, gpu, cpu, generators, on_gpu):
    """Raise what CUDA raises."""
    for generator in generators:
        if (generator.device.type == "cuda") != on_gpu:
            raise RuntimeError(f"{function}: a generator on {generator.device} for tensors on "
                               f"{'cuda' if on_gpu else 'cpu'}")
    large = [tuple(x.shape) for x in cpu if x.dim()]
    if gpu and large and name not in COPIES | INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function} got cuda:0 "
                           f"and cpu, of shape {large}")
    if gpu and large and name in INDEXING:
        count("waits", f"{function} by an index on the CPU")


def record(function, name, args, kwargs, gpu, on_gpu):
    """Count what the op would do."""
    if name in COPIES:
        to, source = (on_gpu, args[0]) if name == "_to_copy" else (
            isinstance(args[0], Pretended), args[1])
        from_gpu = isinstance(source, Pretended)
        if from_gpu and not to:
            count("waits", "copy to the CPU")
        elif to and not from_gpu and (source.dim() or name == "_to_copy"):
            pinned = getattr(source, "pinned", False)
            waits = not pinned or not kwargs.get("non_blocking", name == "copy_")
            count("copies", f"{'PAGEABLE' if waits else 'pinned'} {source.dtype}")
        elif to:
            count("launches", name)
        return
    if on_gpu and name not in VIEWS:
        count("launches", name)
    if gpu and str(function).startswith("fgssl"):            # and what else chooses a CUDA kernel
        of = (f"D = {args[0].shape[1]}, t = {args[3]}" if name.startswith("nt_xent") else
              "a copy" if args[3] is None else "with colour")
        count("kernels", f"{name} {args[0].dtype} {of}")
    if gpu and name in WAITS:
        count("waits", name)
    if gpu and name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool
                                        for i in args[1]):
        count("waits", f"{name} by a mask")


def dispatch(function, args, kwargs):
    """Run an op on the inner tensors, once CUDA would have run it."""
    flat, spec = tree_flatten((args, kwargs))
    name = function._schema.name.split("::")[1]
    gpu = [x for x in flat if isinstance(x, Pretended)]
    cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Pretended)]
    device = kwargs.get("device")
    on_gpu = bool(gpu) if device is None else torch.device(device).type == "cuda"
    refuse_mixed(function, name, gpu, cpu, [x for x in flat if isinstance(x, torch.Generator)],
                 on_gpu)
    record(function, name, args, kwargs, gpu, on_gpu)
    inner = [x.inner if isinstance(x, Pretended) else
             CPU if isinstance(x, torch.device) and x.type == "cuda" else x for x in flat]
    args_in, kwargs_in = tree_unflatten(inner, spec)
    kwargs_in |= {key: False for key in ("pin_memory", "non_blocking") if kwargs_in.get(key)}
    with _disable_current_modes():
        out = function(*args_in, **kwargs_in)
        if name == "_to_copy" and out is args_in[0]:         # between the devices it is a copy
            out = out.clone()
    same = {id(x.inner): x for x in gpu}                     # what an in-place op returns

    def wrap(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, Pretended):
            return x
        return same.get(id(x)) or (Pretended(x) if on_gpu else x)

    return tree_map(lambda x: same[id(x)] if id(x) in same else wrap(x), out)


class Mode(TorchDispatchMode):
    """For ops without a pretended tensor among their arguments: torch.empty(device="cuda")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def pin_memory(self, *args):
    if isinstance(self, Pretended):
        raise RuntimeError("cannot pin a tensor on cuda:0")
    copy = self.clone()
    copy.pinned = True
    return copy


def install():
    """From here on there is a GPU, in this process."""
    import kernels
    from kernels import build
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *args: "pretended GPU"
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.max_memory_allocated = lambda *args: 0
    cuda.get_rng_state_all = lambda: [torch.zeros(16, dtype=torch.uint8)]
    for name in ("set_rng_state_all", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *args: None)
    torch.Tensor.pin_memory = pin_memory
    build.load("emulated")
    build.load = lambda kind: build.loaded.add("cuda")
    kernels.status = lambda: {"cpu": "torch", "cuda": "pretended"}
    Mode().__enter__()


def count_if(in_step):
    """Count what follows, a step, or do not."""
    global counting
    counting = in_step
    counts["steps"] += in_step


def count_steps():
    """Log the first, the third and the last step; count in the others."""
    import fgssl
    from evaluation import finetune
    run, learning_mode = fgssl.Run, finetune.learning_mode
    iterate, due = run.__iter__, run.due

    def steps(self):
        for item in iterate(self):
            count_if(self.step not in (1, 3, self.total))
            yield item
            count_if(False)

    def evaluates(self, also=False):                         # asked at the end of a step
        count_if(False)
        return also or self.step == self.total

    class Muon(finetune.Muon):
        def step(self):
            super().step()
            count_if(False)

    def begins(*args):
        count_if(True)
        learning_mode(*args)

    run.__iter__, run.evaluates = steps, evaluates
    run.due = lambda self: due(self) and self.step in (1, 3, self.total)
    finetune.learning_mode, finetune.Muon = begins, Muon


def main(file):
    install()
    count_steps()
    from evaluation import probe
    probe.L2 = probe.L2[:1]                                  # all are fitted by the same ops
    report = []
    for script, arguments in json.loads(Path(file).read_text()):
        counts["steps"] = 0
        for kind in KINDS:
            counts[kind].clear()
        error = None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(script).main(arguments)
        except BaseException:
            error = traceback.format_exc()
        count_if(False)
        report.append({"run": [script, *arguments], "error": error, "steps": counts["steps"],
                       **{kind: dict(counts[kind]) for kind in KINDS}})
    print(json.dumps(report))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main(sys.argv[1])
