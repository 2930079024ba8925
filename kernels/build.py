"""Compile the kernels at their first use and keep them: for the GPU by nvcc, for the CPU by g++.

The result lies in $FGSSL_CACHE/build (or ~/.cache/fgssl/build) under a hash of all it was made
from, so that a change of source, flag, torch or GPU builds anew and nothing stale is ever loaded.
The lock is one that the system frees when its holder dies: a killed build delays nobody.
"""
import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import atomic

HERE = Path(__file__).parent
KERNELS = ("nt_xent.cu", "nt_xent_mma.cu", "tile_shuffle.cu")
SOURCES = (*KERNELS, "bindings.cpp", "common.cuh", "nt_xent.cuh", "nt_xent_mma.cuh",
           "cuda_on_cpu.h", "cuda_words.h")
FLAGS = {"cuda": ["-O3", "-DWITH_CUDA"], "emulated": ["-O2", "-Wno-unknown-pragmas"]}
SUBJECT = {"cuda": "the CUDA kernels with nvcc, about a minute",
           "emulated": "the CUDA kernels for the CPU with g++, about half a minute"}
loaded, failed = set(), {}                       # kinds in this process; failed: kind -> reason


def cache():
    """The folder of all builds."""
    return Path(os.environ.get("FGSSL_CACHE") or "~/.cache/fgssl").expanduser() / "build"


@functools.cache
def toolkit():
    """(folder, version) of the CUDA toolkit, or None: $CUDA_HOME, else pip's beside torch, else
    what the nvcc on the PATH says of itself.

    That may be a wrapper script in another folder, so its own report is asked for, not its path.
    """
    home = os.environ.get("CUDA_HOME") or pip_toolkit()
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not Path(nvcc).exists():
        return None
    if not home:
        dry = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        top = re.search(r"TOP=(\S+)", subprocess.run(dry, capture_output=True, text=True).stderr)
        home = os.path.realpath(top[1]) if top else Path(nvcc).resolve().parent.parent
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    return (str(home), version[1]) if version else None


def pip_toolkit():
    """The folder into which pip installs CUDA 13 and its nvcc, or None."""
    spec = importlib.util.find_spec("nvidia")
    found = [Path(folder) / "cu13" for folder in spec.submodule_search_locations] if spec else []
    return next((str(home) for home in found if (home / "bin" / "nvcc").exists()), None)


def pip_command():
    """What installs the compiler that fits this torch, without root; "" for a torch of CUDA 12 or
    older, whose parts pip puts into folders of their own."""
    if int(torch.version.cuda.split(".")[0]) < 13:
        return ""
    names = "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl"
    return "pip install " + " ".join(f'"{name}=={torch.version.cuda}.*"' for name in names)


def architectures():
    """GPUs to compile for: $TORCH_CUDA_ARCH_LIST, else all that the kernels are tested for, so that
    one build serves every machine, and a visible one that is older."""
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    known = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]
    if [*map(int, (torch.version.cuda or "0").split("."))] >= [12, 8]:
        known += [(10, 0), (12, 0)]
    found = [*sorted(card for card in seen if card < known[0]), *known]
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or
            ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX")      # later cards


def obstacle(kind):
    """Why this kind cannot be built here, or None. Looks at the tools, never for a GPU."""
    if kind in failed:
        return failed[kind]
    if os.name == "nt":
        return "they are built on Linux and macOS only"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "there is no C++ compiler (g++, or $CXX)"
    if kind == "emulated":
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    found = toolkit()
    if found and found[1].split(".")[0] == torch.version.cuda.split(".")[0]:
        return None
    reason = (f"nvcc is of CUDA {found[1]}, torch of CUDA {torch.version.cuda}" if found else
              "there is no CUDA compiler (nvcc on the PATH, or $CUDA_HOME)")
    return "; ".join(filter(None, (reason, pip_command())))


def library(kind):
    """Where the compiled library of this kind lies, or would."""
    parts = [kind, torch.__version__, *FLAGS[kind], os.environ.get("CXX", "g++")]
    if kind == "cuda":
        parts += [architectures(), *toolkit()]
    parts += [(HERE / name).read_text() for name in SOURCES]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache() / f"{kind}-{digest}" / "kernels.so"


def load(kind):
    """Make torch.ops.fgssl run on CUDA tensors ("cuda") or CPU tensors ("emulated"); may build.

    Raises RuntimeError with the reason where that cannot be.
    """
    if kind in loaded:
        return
    reason = obstacle(kind)
    if reason:
        raise RuntimeError(f"the {kind} kernels cannot be built: {reason}. "
                           "impl='torch' always runs.")
    target = library(kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.lock(target.with_name("in_use"),
                         f"kernels: waiting for another process to build {target.parent}"):
            if not target.exists():
                with atomic.drafting(target.with_name("work"), is_folder=True) as work:
                    atomic.publish(compile_library(kind, work), target)
    except OSError as error:
        raise RuntimeError(f"the {kind} kernels need a folder to build in: {error}. Set "
                           "$FGSSL_CACHE to one that can be written.") from error
    torch.ops.load_library(target)
    loaded.add(kind)


def compile_library(kind, work):
    """Build in the folder `work`; returns the library's path there."""
    from torch.utils import cpp_extension
    with contextlib.suppress(ImportError):       # pip's ninja need not be on the PATH
        import ninja
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    print(f"kernels: building {SUBJECT[kind]}, once, in {work.parent}", file=sys.stderr)
    sources = [HERE / "bindings.cpp"]
    for name in KERNELS:                         # g++ knows a .cu by an including .cpp
        sources.append(HERE / name if kind == "cuda" else work / f"{name}.cpp")
        if kind == "emulated":
            sources[-1].write_text(f'#include "{HERE / name}"\n')
    if kind == "cuda":                           # without a visible GPU torch needs to be told
        os.environ["TORCH_CUDA_ARCH_LIST"], cpp_extension.CUDA_HOME = architectures(), toolkit()[0]
        runtimes = sorted(Path(toolkit()[0], "lib").glob("libcudart.so.*"))
        if runtimes:                             # pip's has no name for the linker
            (work / "libcudart.so").symlink_to(runtimes[0])
    try:
        cpp_extension.load(
            f"fgssl_{kind}", [str(source) for source in sources], build_directory=str(work),
            extra_cflags=FLAGS[kind], extra_cuda_cflags=FLAGS[kind], with_cuda=kind == "cuda",
            extra_ldflags=[f"-L{work}"] if kind == "cuda" else [], is_python_module=False)
    except Exception as error:
        failed[kind] = f"the compiler failed: {error}"
        raise RuntimeError(f"the {kind} kernels could not be built. {failed[kind]}") from error
    return work / f"fgssl_{kind}.so"
