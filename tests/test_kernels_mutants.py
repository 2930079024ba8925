"""Wrong kernels that the checks must reject, and the checks that watch memory: bounds and traffic.

Each patch in mutants/ breaks a kernel in one way. To see one by hand:
    git apply tests/mutants/one_p_term.patch && python -m pytest tests/test_kernels_nt_xent.py
"""
import ctypes
import math
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernels.reference import (chunked_backward, chunked_forward, gather_backward,
                               gather_forward)
from test_kernels_emulator import CXX, ROOT, compiled
from test_kernels_nt_xent import dense_rows, error, views
from test_kernels_tiles import by_loops, inputs

MUTANTS = Path(__file__).parent / "mutants"
LETTERS = {torch.float64: b"d", torch.float32: b"f", torch.bfloat16: b"b"}
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

    def buffers(self, z, r):
        """z's letter and, with NaN for numbers, room for parts, tickets and shards."""
        (m, d), letter = z.shape, LETTERS[z.dtype]
        parts = torch.full((2, m, -(-d // 16) * 16), math.nan, dtype=torch.bfloat16)
        tickets = torch.full((-(-r // 64) * -(-d // 64) + 1,), -1, dtype=torch.int32)
        self.library.room_bytes.restype = ctypes.c_int64
        room = self.library.room_bytes(ctypes.c_char(letter), r, m, d)
        return letter, parts, tickets, torch.full((room,), -1, dtype=torch.int8)

    def forward(self, z, t, r, first, decoupled=False):
        letter, parts, tickets, room = self.buffers(z, r)
        wide = torch.promote_types(z.dtype, torch.float32)
        loss, lse = torch.full((1,), math.nan, dtype=wide), torch.full((r, 2), math.nan, dtype=wide)
        self.call("forward", letter, r, *z.shape[:1], first, z.shape[1], t, decoupled, z,
                  parts, tickets, len(tickets), room, loss, lse)
        return loss, lse, parts, tickets

    def backward(self, z, t, r, first, lse, g, parts, tickets, decoupled=False):
        letter, _, _, room = self.buffers(z, r)
        d_rows = torch.full_like(z[:r], math.nan)
        self.call("backward", letter, r, len(z), first, z.shape[1], t, decoupled, z, parts,
                  tickets, room, lse, g.to(lse), len(g), d_rows)
        return d_rows

    def nt_xent(self, z, t, g, r=None, first=0, decoupled=False):
        """Mean losses of each r rows, lse, and the gradient of all rows' weighed losses in rows
        first .. first + r."""
        r = r or len(z)
        runs = {start: self.forward(z, t, r, start, decoupled) for start in range(0, len(z), r)}
        loss, lse, *_ = map(torch.cat, list(zip(*runs.values()))[:2])
        return loss, lse, self.backward(z, t, r, first, lse, g, *runs[first][2:], decoupled)

    def tiles(self, x, perm, grid, tile, offset, image, color=None):
        b, c, h, w = x.shape
        color = torch.empty(b, grid ** 2, c, 0) if color is None else color
        size = (b, c, grid * tile, grid * tile) if image else (b, grid**2, c, tile, tile)
        out, shape = torch.full(size, math.nan), (b, c, h, w, grid, tile, image)
        self.call("tiles", *shape, x, perm, offset, color, color.shape[3], out)
        return out

    def tiles_back(self, y, perm, grid, tile, offset, image, shape, color=None):
        d_x = torch.full(shape, math.nan)
        color = torch.empty(*perm.shape, shape[1], 0) if color is None else color
        self.call("tiles_back", *shape, grid, tile, image, y, perm.argsort(1), offset, color,
                  color.shape[3], d_x)
        return d_x

    def far(self, name):
        function = getattr(self.library, name)
        function.restype = ctypes.c_bool
        return function()

    def count(self, name):
        function = getattr(self.library, name)
        function.restype = ctypes.c_longlong
        return function()


def nt_xent_checks(kernels):
    """Yield (name, whether it passes). A temperature of 5 makes every column count, padding too.

    132 rows are three tiles, the last one ragged; 24 features are copied by cp.async. 578 columns
    and 336 features are beyond every tile and shard. fp64, and fp32 above 256 features, are simt.
    """
    for kind, m, d, limit in ((torch.float64, 132, 24, 1e-12), (torch.float32, 132, 24, 2e-5),
                              (torch.bfloat16, 132, 24, 3e-3), (torch.float64, 578, 5, 1e-12),
                              (torch.float64, 66, 336, 1e-12)):
        kernels.count("conflicts")
        for t, decoupled in ((5., False), (5., True), (0.1, False)):
            z = views(m, d).to(kind)
            name = f"of {kind} {m} x {d} at temperature {t}, decoupled={decoupled}"
            exact = z.double().requires_grad_()
            g = torch.randn(m, generator=torch.Generator().manual_seed(1))
            wanted = dense_rows(exact, t, decoupled)
            grad, = torch.autograd.grad(wanted, exact, g.double())
            loss, lse, ours = kernels.nt_xent(z, t, g, decoupled=decoupled)
            yield f"loss {name}", error(loss, wanted.mean().detach()[None]) <= limit
            lse_of = (wanted + (exact * exact.roll(m // 2, 0)).sum(1) / t).detach()
            yield f"log-sum-exp {name}", error(lse.sum(1), lse_of) <= limit
            yield f"gradient {name}", error(ours, grad) <= limit
        yield f"bank conflicts of {kind}", kernels.count("conflicts") == 0
        ranks = z.view(2, 2, m // 4, d).transpose(0, 1).reshape(-1, d) if m == 132 else z
        if m != 132:
            continue                                             # as two ranks hold them:
        g = torch.ones(m) / m
        loss, lse, ours = kernels.nt_xent(ranks, t, g, r=m // 2, first=m // 2)
        loss_of = wanted.view(2, 2, m // 4).mean((0, 2))
        yield f"loss of one rank's rows {name}", error(loss, loss_of.detach()) <= limit
    z = torch.eye(2, 320).repeat(2, 1)       # s is 8 for the pair, 0 for the two others, exactly
    _, _, ours = kernels.nt_xent(z, 0.125, torch.ones(1))
    exact = 8 * math.exp(-8) / (1 + 2 * math.exp(-8))          # z_ik = 0 gets 4 P / 4 / t
    yield "exp of simt", abs(ours[0, 1].item() / exact - 1) < 8e-7      # 3e-7; __expf: 1.5e-6
    # 40 shards, where one GPU's SimCLR has 16 at most: rows 4 and 5, one pair of 1280.
    z = views(2560, 3)
    loss, lse, *left = kernels.forward(z, 0.5, 2, 4)
    yield "loss of 40 shards", error(loss[0], chunked_forward(z[4:6], z, 4, 0.5)[0]) <= 1e-12
    lse = torch.logsumexp((z @ z.T / 0.5).fill_diagonal_(-torch.inf), 1)
    lse, g = torch.stack((lse, 0 * lse), 1), torch.ones(1, dtype=z.dtype)
    wanted = chunked_backward(z[4:6], z, 4, 0.5, False, lse, g)
    ours = kernels.backward(z, 0.5, 2, 4, lse, g, *left)
    yield "gradient of 40 shards", error(ours, wanted) <= 1e-12
    yield "a row far away", kernels.far("far_row")
    yield "a part far away", kernels.far("far_part")


def tile_checks(kernels):
    for shape, image in (((3, 8, 31, 34), False), ((3, 8, 31, 34), True), ((7, 2, 22, 16), False)):
        grid, tile = shape[:2]
        x, perm, offset = inputs(*shape, kind=torch.float32)
        x.requires_grad_()
        wanted = by_loops(x, perm, grid, tile, offset, image)
        out = kernels.tiles(x, perm, grid, tile, offset, image)
        yield f"tiles, image={image}", torch.equal(out, wanted)
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        grad, = torch.autograd.grad(wanted, x, y)
        ours = kernels.tiles_back(y, perm, grid, tile, offset, image, x.shape)
        yield f"gradient of tiles, image={image}", torch.equal(ours, grad)
    # 3 channels; then 12, and tiles, beyond every loop: 256 numbers of a matrix, 32 pixels, 8 rows
    for shape, c, batch, atol in (((3, 8, 31, 34), 3, 2, 1e-3), ((2, 34, 70, 71), 12, 3, 1e-2)):
        (grid, tile, *size), rng = shape, torch.Generator().manual_seed(4)
        x, perm, offset = inputs(*shape, channels=c, batch=batch, kind=torch.float32)
        x[0, 0, 10, 10] = math.nan
        color = torch.randn(*perm.shape, c, 2 * c + 3, generator=rng)
        color[..., -2:] = torch.tensor([-80., 120.])
        wanted = gather_forward(x, perm, offset, color, grid, tile, False)
        ours = kernels.tiles(x, perm, grid, tile, offset, False, color)
        close = torch.allclose(ours, wanted, atol=atol, equal_nan=True)   # sums of thousands
        yield f"recoloured tiles of {c} channels", close
        y = torch.randn(ours.shape, generator=rng)
        color = torch.cat((color[..., :c], color[..., -3:]), 3)
        wanted = gather_backward(y, perm.argsort(1), offset, color, grid, tile, False, *size)
        ours = kernels.tiles_back(y, perm, grid, tile, offset, False, x.shape, color)
        close = torch.allclose(ours, wanted, atol=1e-5)
        yield f"gradient of recoloured tiles of {c} channels", close
    yield "tiles far away", kernels.far("far_layout")
    yield "images of 2^31 pixels", kernels.far("far_tile")


# What each instruction says, with the operands that its twin in C++ names; see the PTX manual.
PTX = {
    "mma_m16n8k16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};",
                     "d[0] d[1] d[2] d[3] a[0] a[1] a[2] a[3] b0 b1"),
    "ldmatrix_x4": ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];",
                    "r[0] r[1] r[2] r[3] shared_address(row)"),
    "ldmatrix_x4_trans": ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];",
                          "r[0] r[1] r[2] r[3] shared_address(row)"),
    "cp_async_16": ("cp.async.cg.shared.global [%0], [%1], 16, %2;",
                    "shared_address(to) from valid"),
    "cp_async_commit": ("cp.async.commit_group;", ""),
    "cp_async_wait": ("cp.async.wait_group %0;", "pending"),
}


# What else nvcc alone reads: g++ has other lines in their place.
CUDA_ONLY = {
    "common.cuh": [
        "if ((smem) > 48 * 1024) check(cudaFuncSetAttribute(kernel, "
        "cudaFuncAttributeMaxDynamicSharedMemorySize, smem), #kernel);",
        "kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);",
        "check(cudaGetLastError(), #kernel);",
        "#ifdef __CUDACC__ return __ldcg(from); #else",
        "if (!holds) __trap();",
        '"cudaDeviceGetAttribute"); return major >= 8;',
        '"cudaDeviceGetAttribute"); return count;',
        "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800 #define PTX(...) __trap()",
        "return static_cast<uint32_t>(__cvta_generic_to_shared(p));",
        "__nv_bfloat162 pair = __floats2bfloat162_rn(low, high);"],
    "bindings.cpp": [
        "c10::cuda::CUDAGuard guard((tensor).device());",
        "void* stream = c10::cuda::getCurrentCUDAStream().stream()"],
}


def source_error(headers):
    """The first wrong word where the emulator cannot look: PTX, what nvcc alone reads, and products
    that are too large for an int before they are for a test."""
    text = (headers / "common.cuh").read_text()
    for name, (instruction, operands) in PTX.items():
        body = re.search(rf"void {name}\([^{{]*?\{{(.*?)\n?}}\n", text, re.S)[1]
        words = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"(?!\s*\()', body.split(":")[0]))
        if words != instruction:
            return f"{name} is {words}"
        given = re.findall(r'"(?:\+f|=r|r|l|n)"\(((?:[^()]|\([^()]*\))*)\)', body)
        if " ".join(given) != operands:
            return f"{name} takes {given}"
    for name, lines in CUDA_ONLY.items():
        text = re.sub(r"//.*", "", (headers / name).read_text())
        text = "".join(text.replace("\\\n", " ").split())
        for line in lines:
            if "".join(line.split()) not in text:
                return f"{name} no longer says: {line}"
    for name in ("nt_xent.cu", "nt_xent_mma.cu", "nt_xent_mma.cuh"):
        text = (headers / name).read_text()
        for product in re.findall(r".* \* (?:p\.)?(?:depth|stride)\b.*", text):
            if not re.search(r"int64_t|\brow \* depth", product):
                return f"{name}: 32 bits for {product.strip()}"
    return None


def first_failure(kernels, checks, monkeypatch):
    """Name of the first check that fails in any order of threads, or None.

    On one multiprocessor a block walks over all columns, on an H100's 132 it has a tile of them.
    """
    for order, multiprocessors in (("forward", "132"), ("reverse", "1"), ("random:1", "2")):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", multiprocessors)
        try:
            for name, passes in checks(kernels):
                if not passes:
                    return f"{name}, threads in order {order}"
        except RuntimeError as refusal:
            return str(refusal)
    return None


def address_error(headers, folder):
    """What AddressSanitizer says of the kernels in `headers`, on buffers of just the right size."""
    flags = "-DMAIN", "-Og", "-fsanitize=address"
    program = compiled(MUTANTS / "driver.cpp", folder / "bounds", *flags, headers=headers)
    run = subprocess.run([program], capture_output=True, text=True)
    found = [line for line in run.stderr.splitlines() if "ERROR" in line]
    return found[0] if found else None if run.returncode == 0 else run.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    out = tmp_path_factory.mktemp("driver") / "driver.so"
    return Kernels(compiled(MUTANTS / "driver.cpp", out, "-Og", "-shared"))


def broken(patch, folder):
    """Break a copy of the kernels; returns its folder, what its source shows, or its library."""
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=folder, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    caught = source_error(folder / "kernels")
    return folder, caught, caught or compiled(MUTANTS / "driver.cpp", folder / "driver.so", "-Og",
                                              "-shared", headers=folder / "kernels")


@pytest.fixture(scope="module")
def mutants(request, tmp_path_factory):
    """{patch: future of `broken`} of those that will be tested, two at a time."""
    patches = [item.callspec.params["patch"] for item in request.session.items
               if item.function is test_mutant_is_rejected]
    pool = ThreadPoolExecutor(2)
    yield {patch: pool.submit(broken, patch, tmp_path_factory.mktemp("mutant"))
           for patch in patches}
    pool.shutdown(cancel_futures=True)


def test_the_true_kernels_pass(kernels, monkeypatch):
    """Without this a check that always fails would reject every mutant."""
    assert first_failure(kernels, nt_xent_checks, monkeypatch) is None
    assert first_failure(kernels, tile_checks, monkeypatch) is None
    assert source_error(ROOT / "kernels") is None


@pytest.mark.mutants
@pytest.mark.skipif(not shutil.which("git"), reason="there is no git to apply the patches with")
@pytest.mark.parametrize("patch", sorted(MUTANTS.glob("*.patch")), ids=lambda patch: patch.stem)
def test_mutant_is_rejected(patch, mutants, tmp_path, monkeypatch):
    folder, caught, library = mutants[patch].result()
    if not caught:
        checks = tile_checks if "tile_shuffle.cu" in patch.read_text() else nt_xent_checks
        caught = (first_failure(Kernels(library), checks, monkeypatch) or
                  address_error(folder / "kernels", tmp_path))
    print(f"{patch.stem}: caught by {caught or 'nothing'}")
    assert caught, f"every check accepts {patch.name}: one of them is blind"


def test_no_access_outside_a_buffer(tmp_path):
    """Garbage times zero is not zero when the garbage is NaN, and a page's end is a crash."""
    assert address_error(ROOT / "kernels", tmp_path) is None


def moved(kernels, run, *args):
    """Bytes of global memory read and written by one call, and what it returns."""
    kernels.count("read_bytes"), kernels.count("written_bytes")
    result = run(*args)
    return kernels.count("read_bytes"), kernels.count("written_bytes"), result


@pytest.mark.parametrize("d", [24, 136])
@pytest.mark.parametrize("m", [64, 130])
@pytest.mark.parametrize("kind", LETTERS, ids=lambda kind: str(kind)[6:])
def test_nt_xent_moves_the_bytes_of_its_header(kernels, kind, m, d, monkeypatch):
    """A tile loaded twice, or a matrix that spills to memory, shows here and nowhere else."""
    monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", "6")
    z, g, b = views(m, d).to(kind), torch.ones(m), math.ceil(m / 64)
    simt, size, number = kind == torch.float64, kind.itemsize, 8 if kind == torch.float64 else 4
    parts = {torch.float64: 0, torch.float32: 2, torch.bfloat16: 1}[kind]
    narrow = parts == 2 and d > 128          # tiles of 32 columns, slabs of 64 features
    tiles, f = math.ceil(m / (32 if narrow else 64)), 64 if narrow else 128
    slabs, wide, threads = math.ceil(d / f), -(-d // 16) * 16, 256 if simt else 128

    def shards(slabs):
        return max(1, min(tiles, 12 // (b * slabs)))

    def products(k):
        return (m * b + m * b) * d * size if simt else parts * (k * m + m * b) * wide * 2

    k = shards(1)
    found = (k > 1) * b * k * threads * (12 if simt else 6) * number
    read, written, (loss, lse, *left) = moved(kernels, kernels.forward, z, 0.5, m, 0)
    prepared = (0 if simt else m * d * size, 0 if simt else parts * m * wide * 2)
    assert read == prepared[0] + products(k) + found + 2 * b * number
    assert written == prepared[1] + found + (2 * m + 2 * b + 1) * number

    k = shards(slabs)
    width = min(f, 64) if not simt and d <= 64 else f
    found = (k > 1) * b * slabs * k * 64 * width * number
    read, written, _ = moved(kernels, kernels.backward, z, 0.5, m, 0, lse, g, *left)
    statistics = slabs * (48 * (k * m + m * b) if simt else 12 * k * m + 3 * m * b)
    second = m * b * d * size if simt else 0
    assert read == slabs * products(k) + second + statistics * number + found
    assert written == m * d * size + found


@pytest.mark.parametrize("kind", LETTERS, ids=lambda kind: str(kind)[6:])
def test_the_loss_is_three_launches_and_a_shuffle_one(kernels, kind):
    """At 512 views a launch takes as long as the work: none for sums, zeros or copies."""
    kernels.count("launches")
    kernels.nt_xent(views(130, 24).to(kind), 0.5, torch.ones(130))
    assert kernels.count("launches") == 3, "z in parts, forward, backward"
    x, perm, offset = inputs(3, 8, 31, 34, kind=torch.float32)
    out = kernels.tiles(x, perm, 3, 8, offset, False)
    assert kernels.count("launches") == 1
    kernels.tiles_back(out, perm, 3, 8, offset, False, x.shape)
    assert kernels.count("launches") == 1


def test_tile_shuffle_moves_the_bytes_of_its_header(kernels):
    x, perm, offset = inputs(3, 8, 31, 34, kind=torch.float32)
    tables = 2 * 9 * 256 * 24
    read, written, out = moved(kernels, kernels.tiles, x, perm, 3, 8, offset, False)
    assert (read, written) == (4 * out.numel() + tables, 4 * out.numel())
    color = torch.rand(2, 9, 3, 9)
    read, written, _ = moved(kernels, kernels.tiles, x, perm, 3, 8, offset, False, color)
    assert (read, written) == (4 * 4 * out.numel() + tables + 4 * color.numel(), 4 * out.numel())
    read, written, _ = moved(kernels, kernels.tiles_back, out, perm, 3, 8, offset, False, x.shape)
    assert (read, written) == (4 * out.numel() + tables, 4 * x.numel())
