"""Wrong kernels that the checks must reject, and the checks that watch memory: bounds and traffic.

Each patch in mutants/ breaks a kernel in one way. To see one by hand:
    git apply tests/mutants/one_p_term.patch && python -m pytest tests/test_kernels_nt_xent.py
"""
import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from test_kernels_emulator import CXX, ROOT, compiled
from test_kernels_nt_xent import dense_rows, error, views
from test_kernels_tiles import by_loops, inputs

MUTANTS = Path(__file__).parent / "mutants"
pytestmark = pytest.mark.skipif(not CXX, reason="there is no g++ to compile the kernels with")


class Kernels:
    """The launchers of one build, on tensors. Outputs start as NaN; a refusal is a RuntimeError."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def call(self, name, *args):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        kinds = {float: ctypes.c_double, int: ctypes.c_int, bool: ctypes.c_bool,
                 bytes: ctypes.c_char}
        said = function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor)
                          else kinds[type(x)](x) for x in args))
        if said:
            raise RuntimeError(said.decode())

    def nt_xent(self, z, t, g, r=None, first=0):
        """Losses of rows first .. first + r, and the gradient of all rows' weighed losses there."""
        m, d = z.shape
        r = r or m
        letter = {torch.float32: b"f", torch.bfloat16: b"b"}[z.dtype]
        out = torch.full((3, m), math.nan)
        for start in range(0, m, r):
            self.call("forward", letter, r, m, start, d, t, z[start:], z, *(x[start:] for x in out))
        d_rows = torch.full_like(z[:r], math.nan)
        self.call("backward", letter, r, m, first, d, t, z[first:], z, out[1], out[2], g, d_rows)
        return out[0], d_rows

    def tiles(self, x, perm, grid, tile, offset, image):
        b, c, h, w = x.shape
        size = (b, c, grid * tile, grid * tile) if image else (b, grid**2, c, tile, tile)
        out, shape = torch.full(size, math.nan), (b, c, h, w, grid, tile, image)
        self.call("tiles", *shape, x, perm, offset, torch.zeros(c), torch.ones(c), out)
        return out

    def tiles_back(self, y, perm, grid, tile, offset, image, shape):
        d_x = torch.full(shape, math.nan)
        self.call("tiles_back", *shape, grid, tile, image, y, perm.argsort(1), offset,
                  torch.ones(shape[1]), d_x)
        return d_x


def nt_xent_checks(kernels):
    """Yield (name, whether it passes). A temperature of 5 makes every column count, padding too.

    132 rows are three tiles, the last one ragged; 24 features are copied by cp.async.
    """
    for kind, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        for t in (5., 0.1):
            z, name = views(132, 24).to(kind), f"of {kind} at temperature {t}"
            exact = z.double().requires_grad_()
            g = torch.randn(132, generator=torch.Generator().manual_seed(1))
            wanted = dense_rows(exact, t)
            grad, = torch.autograd.grad(wanted, exact, g.double())
            loss, ours = kernels.nt_xent(z, t, g)
            yield f"loss {name}", error(loss, wanted.detach()) <= limit
            yield f"gradient {name}", error(ours, grad) <= limit
        ranks = z.view(2, 2, 33, 24).transpose(0, 1).reshape(132, 24)     # as two ranks hold them
        loss, ours = kernels.nt_xent(ranks, t, torch.ones(132), r=66, first=66)
        loss_of = wanted.view(2, 2, 33).transpose(0, 1).reshape(132)
        yield f"loss of one rank's rows {name}", error(loss, loss_of.detach()) <= limit


def tile_checks(kernels):
    for image in (False, True):
        x, perm, offset = inputs(3, 8, 31, 34, kind=torch.float32)
        x.requires_grad_()
        wanted = by_loops(x, perm, 3, 8, offset, image)
        out = kernels.tiles(x, perm, 3, 8, offset, image)
        yield f"tiles, image={image}", torch.equal(out, wanted)
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grad, = torch.autograd.grad(wanted, x, y)
        ours = kernels.tiles_back(y, perm, 3, 8, offset, image, x.shape)
        yield f"gradient of tiles, image={image}", torch.equal(ours, grad)


def first_failure(kernels, checks, monkeypatch):
    """Name of the first check that fails in any order of threads, or None."""
    for order in ("forward", "reverse", "random:1"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        try:
            for name, passes in checks(kernels):
                if not passes:
                    return f"{name}, threads in order {order}"
        except RuntimeError as refusal:
            return str(refusal)
    return None


def address_error(headers, folder):
    """What AddressSanitizer says of the kernels in `headers`, on buffers of just the right size."""
    flags = "-DMAIN", "-O1", "-g", "-fsanitize=address"
    program = compiled(MUTANTS / "driver.cpp", folder / "bounds", *flags, headers=headers)
    run = subprocess.run([program], capture_output=True, text=True)
    found = [line for line in run.stderr.splitlines() if "ERROR" in line]
    return found[0] if found else None if run.returncode == 0 else run.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    out = tmp_path_factory.mktemp("driver") / "driver.so"
    return Kernels(compiled(MUTANTS / "driver.cpp", out, "-O1", "-shared"))


def test_the_true_kernels_pass(kernels, monkeypatch):
    """Without this a check that always fails would reject every mutant."""
    assert first_failure(kernels, nt_xent_checks, monkeypatch) is None
    assert first_failure(kernels, tile_checks, monkeypatch) is None


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git to apply the patches with")
@pytest.mark.parametrize("patch", sorted(MUTANTS.glob("*.patch")), ids=lambda patch: patch.stem)
def test_mutant_is_rejected(patch, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tmp_path, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
    library = compiled(MUTANTS / "driver.cpp", tmp_path / "driver.so", "-O0", "-shared",
                       headers=tmp_path / "kernels")
    checks = tile_checks if "tile_shuffle.cu" in patch.read_text() else nt_xent_checks
    caught = (first_failure(Kernels(library), checks, monkeypatch) or
              address_error(tmp_path / "kernels", tmp_path))
    print(f"{patch.stem}: caught by {caught or 'nothing'}")
    assert caught, f"every check accepts {patch.name}: one of them is blind"


def test_no_access_outside_a_buffer(tmp_path):
    """Garbage times zero is not zero when the garbage is NaN, and a page's end is a crash."""
    assert address_error(ROOT / "kernels", tmp_path) is None


def moved(kernels, *call):
    """Bytes of global memory read and written by one call."""
    for count in (kernels.library.read_bytes, kernels.library.written_bytes):
        count.restype = ctypes.c_longlong
        count()
    kernels.call(*call)
    return kernels.library.read_bytes(), kernels.library.written_bytes()


@pytest.mark.parametrize("d", [24, 136])
@pytest.mark.parametrize("m", [64, 130])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nt_xent_moves_the_bytes_of_its_header(kernels, kind, m, d):
    """A tile loaded twice, or a matrix that spills to memory, shows here and nowhere else."""
    z, g, out = views(m, d).to(kind), torch.ones(m), torch.empty(3, m)
    blocks, slabs, simt = math.ceil(m / 64), math.ceil(d / 128), kind == torch.float32
    letter, size = b"f" if simt else b"b", kind.itemsize
    read, written = moved(kernels, "forward", letter, m, m, 0, d, 0.5, z, z, *out)
    products = ((m * blocks if simt else m) + m * blocks) * d
    assert (read, written) == (products * size, 3 * m * 4)

    d_z = torch.empty_like(z)
    read, written = moved(kernels, "backward", letter, m, m, 0, d, 0.5, z, z, *out[1:], g, d_z)
    statistics = slabs * (48 * (m + m * blocks) if simt else 12 * m + 3 * m * blocks)
    second = m * blocks * d if simt else 0
    assert (read, written) == ((slabs * products + second) * size + statistics * 4, m * d * size)


def test_tile_shuffle_moves_the_bytes_of_its_header(kernels):
    x, perm, offset = inputs(3, 8, 31, 34, kind=torch.float32)
    out, one = torch.empty(2, 9, 3, 8, 8), torch.ones(3)
    shape = *x.shape, 3, 8, False
    tables = 2 * 9 * 256 * 24
    read, written = moved(kernels, "tiles", *shape, x, perm, offset, one, one, out)
    assert (read, written) == (4 * out.numel() + tables + 2 * 9 * 256 * 3 * 8, 4 * out.numel())
    read, written = moved(kernels, "tiles_back", *shape, out, perm.argsort(1), offset, one, x)
    assert (read, written) == (4 * out.numel() + tables + 2 * 9 * 256 * 3 * 4, 4 * x.numel())
