"""cuda_on_cpu.h: what it refuses, what it counts, and that it runs a warp as the manual says."""
import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(not CXX, reason="there is no g++ to compile the kernels with")


def compiled(source, out, *flags, headers=ROOT / "kernels"):
    """Compile one file against a folder of kernel sources; returns the path of the result."""
    command = [CXX, "-std=c++17", "-w", "-fPIC", f"-I{headers}", *flags, "-x", "c++", str(source),
               "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out


@pytest.fixture(scope="module")
def provoke(tmp_path_factory):
    source = Path(__file__).parent / "mutants" / "provoke.cu"
    out = tmp_path_factory.mktemp("provoke") / "provoke.so"
    return ctypes.CDLL(str(compiled(source, out, "-O1", "-shared")))


def run(library, name):
    """Run one of provoke.cu's kernels on x = 0 .. 63; returns what was said, and x."""
    x = torch.arange(64.)
    function = getattr(library, f"run_{name}")
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return function(x.data_ptr()).decode(), x


@pytest.mark.parametrize("name, thread, words", [
    ("different_barriers", "(5, 0, 0)", "waits at the barrier"),
    ("exited_lane", "", "names lane 7, which has exited"),
    ("absent_lane", "(0, 0, 0)", "names lane 20, which does not exist"),
    ("absent_caller", "(8, 0, 0)", "leaves the caller out"),
    ("lane_outside", "(0, 0, 0)", "reads lane 9, which is outside its mask"),
    ("lane_elsewhere", "(0, 0, 0)", "for lanes that never come"),
    ("misaligned_copy", "(0, 0, 0)", "not multiples of 16"),
    ("too_many_threads", "", "at most"),
    ("too_much_memory", "", "102400 bytes of shared memory"),
])
def test_refusals_name_kernel_block_and_thread(provoke, name, thread, words):
    said, _ = run(provoke, name)
    assert words in said and f"kernel {name}" in said, said
    assert thread == "" or f"block (0, 0, 0), thread {thread}" in said, said


def test_unwritten_shared_memory_is_nan(provoke):
    _, x = run(provoke, "unwritten_memory")
    assert math.isnan(x[0]) and not x[1:].isnan().any()


def test_an_order_shows_a_missing_barrier(provoke, monkeypatch):
    """Thread 0 first: all find what they look for. The other way round they find nothing."""
    wanted = (torch.arange(64.) - 1).clamp_min(0)
    for order, right in (("forward", True), ("reverse", False), ("random:1", False)):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        _, x = run(provoke, "missing_barrier")
        assert torch.equal(x, wanted) == right, f"order {order}: {x}"


def test_an_order_shows_a_missing_wait(provoke, monkeypatch):
    for order, right in (("forward", False), ("reverse", True)):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        _, x = run(provoke, "missing_wait")
        assert torch.equal(x, torch.arange(64.)) == right and x.isnan().any() != right


def test_random_order_repeats_by_seed(provoke, monkeypatch):
    results = []
    for seed in (1, 1, 2):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", f"random:{seed}")
        results.append(run(provoke, "missing_barrier")[1].nan_to_num(-1))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_unknown_order(provoke, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "sideways")
    assert "wanted forward, reverse or random:SEED" in run(provoke, "well_behaved")[0]


@pytest.mark.parametrize("order", ["forward", "reverse", "random:5"])
def test_partial_masks_early_exits_atomics_and_counts(provoke, monkeypatch, order):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    provoke.read_bytes(), provoke.written_bytes()
    said, x = run(provoke, "well_behaved")
    wanted = torch.arange(64.)
    wanted[:8] = wanted[:8].flip(0)
    wanted[63] += 40
    assert said == "" and torch.equal(x, wanted), (said, x)
    assert (provoke.read_bytes(), provoke.written_bytes()) == (48 * 4, 48 * 4)


class Fragments(ctypes.Structure):
    _fields_ = [("a", ctypes.c_uint32 * 128), ("b", ctypes.c_uint32 * 64),
                ("loaded", ctypes.c_uint32 * 128), ("transposed", ctypes.c_uint32 * 128),
                ("d", ctypes.c_float * 128), ("tile", ctypes.c_uint16 * 256)]


def bits(x):
    """bfloat16 matrix as uint16 NumPy array."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def test_tensor_core_twins_follow_the_ptx_manual(provoke):
    """The fragment tables of the manual for mma.m16n8k16 and ldmatrix, element by element.

    g = lane / 4, q = lane % 4. A twin that is wrong in the way its kernel is wrong would pass every
    other test here and fail on a GPU.
    """
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    start = torch.randn(16, 8)
    of = Fragments()
    tile = bits(a)
    of.tile[:] = tile.flatten().tolist()
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(8):                               # a_i of the manual, two to a register
            row = g if i in (0, 1, 4, 5) else g + 8
            column = 2 * q + i % 2 + (8 if i >= 4 else 0)
            of.a[4 * lane + i // 2] |= int(bits(a)[row, column]) << 16 * (i % 2)
        for i in range(4):
            row = 2 * q + i % 2 + (8 if i >= 2 else 0)
            of.b[2 * lane + i // 2] |= int(bits(b)[row, g]) << 16 * (i % 2)
        for i in range(4):
            of.d[4 * lane + i] = start[g + 8 * (i // 2), 2 * q + i % 2]
    provoke.run_tensor_core(ctypes.byref(of))

    wanted = start.double() + a.double() @ b.double()
    parts = [tile[:8, :8], tile[8:, :8], tile[:8, 8:], tile[8:, 8:]]
    for lane in range(32):
        g, q = divmod(lane, 4)
        for i in range(4):
            exact = wanted[g + 8 * (i // 2), 2 * q + i % 2].item()
            assert math.isclose(of.d[4 * lane + i], exact, rel_tol=1e-5, abs_tol=1e-5), (lane, i)
            part = parts[i].astype(np.uint32)
            assert of.loaded[4 * lane + i] == part[g, 2 * q] | part[g, 2 * q + 1] << 16, (lane, i)
            column = part[2 * q, g] | part[2 * q + 1, g] << 16
            assert of.transposed[4 * lane + i] == column, (lane, i)
