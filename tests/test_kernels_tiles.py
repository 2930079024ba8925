"""The tile shuffle against plain loops, and the kernel against the gather, to the bit."""
import math

import pytest
import torch

from kernels import build, tile_shuffle
from test_kernels_nt_xent import IMPLS, KERNELS, device

# grid, tile, H, W: one tile; square and not; a ragged edge; a gap; tiles as large as their cells.
KINDS = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 5, 5, 7), (2, 4, 9, 8), (3, 8, 31, 33), (3, 33, 99, 100), (5, 2, 11, 13),
          (7, 3, 22, 29)]


def inputs(grid, tile, height, width, channels=3, batch=2, kind=torch.float64, corners=False):
    """x, perm and offset; the offsets are random or at the far corners of the room they have."""
    rng = torch.Generator().manual_seed(grid * 100 + tile)
    x = torch.randint(0, 256, (batch, channels, height, width), generator=rng)
    perm = torch.stack([torch.randperm(grid * grid, generator=rng) for _ in range(batch)])
    room = torch.tensor([height // grid - tile, width // grid - tile])
    chance = torch.rand(batch, grid * grid, 2, generator=rng)
    offset = ((chance.round() if corners else chance) * (room + 1)).long().minimum(room)
    return x.to(kind), perm, offset


def by_loops(x, perm, grid, tile, offset, image=False):
    """One pixel at a time, from the definition."""
    b, c, height, width = x.shape
    out = x.new_empty(b, grid * grid, c, tile, tile)
    for n in range(b):
        for k in range(grid * grid):
            row, column = divmod(perm[n, k].item(), grid)
            dy, dx = offset[n, perm[n, k]].tolist()
            for y in range(tile):
                for xx in range(tile):
                    out[n, k, :, y, xx] = x[n, :, row * (height // grid) + dy + y,
                                            column * (width // grid) + dx + xx]
    if not image:
        return out
    rows = [torch.cat(list(out[:, r * grid:(r + 1) * grid].unbind(1)), 3) for r in range(grid)]
    return torch.cat(rows, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loops(impl, shape):
    """Rows and columns exchanged, 12 / 5 taken for 2.4, tiles that overlap: all differ."""
    grid, tile = shape[:2]
    for channels, corners, image in ((1, False, False), (3, True, True), (4, True, False)):
        x, perm, offset = inputs(*shape, channels=channels, corners=corners)
        at = device(impl)
        ours = tile_shuffle(x.to(at), perm.to(at), grid, tile, offset.to(at), image=image,
                            impl=impl)
        wanted = by_loops(x, perm, grid, tile, offset, image)
        assert ours.shape == wanted.shape, f"{tuple(ours.shape)}, wanted {tuple(wanted.shape)}"
        at = tuple((ours.cpu() != wanted).nonzero()[:1].flatten().tolist())
        assert not at, (
            f"{grid} x {grid} tiles of {tile} from {tuple(x.shape)}, image = {image}: the first "
            f"wrong pixel is {at}. Which cell does output tile k come from, and where in it?")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind)[6:])
def test_kernel_equals_the_gather(impl, kind):
    for shape, image in (((3, 8, 31, 33), False), ((2, 4, 9, 8), True)):
        x, perm, offset = (part.to(device(impl)) for part in inputs(*shape, kind=kind))
        settings = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), image=image)
        ours = tile_shuffle(x, perm, *shape[:2], offset, impl=impl, **settings)
        theirs = tile_shuffle(x, perm, *shape[:2], offset, impl="torch", **settings)
        assert ours.dtype == theirs.dtype == (torch.float32 if kind == torch.uint8 else kind)
        close = 2 * torch.finfo(ours.dtype).eps                # BLAS may fuse, or not
        assert torch.allclose(ours, theirs, rtol=close, atol=close * 2000), "(x - mean) / std"
        ours, theirs = (tile_shuffle(x, perm, *shape[:2], offset, image=image, impl=each)
                        for each in (impl, "torch"))
        assert torch.equal(ours, theirs), "a copy is exact"


@pytest.mark.parametrize("impl", IMPLS)
def test_normalised_values(impl):
    """uint8 is scaled to [0, 1] once, then (x - mean) / std: each channel with its own numbers."""
    x, perm, _ = (part.to(device(impl)) for part in inputs(1, 5, 5, 5, kind=torch.uint8))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    ours = tile_shuffle(x, perm, 1, 5, mean=mean, std=std, impl=impl)[:, 0].cpu()
    wanted = (x.cpu() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    # three float32 roundings of about 5
    assert torch.allclose(ours, wanted, atol=2e-6), (
        f"{(ours - wanted).abs().max():.2g} off: subtract the mean, then divide by the std")
    assert torch.allclose(tile_shuffle(x, perm, 1, 5, impl=impl)[:, 0].cpu(), x.cpu() / 255)


@pytest.mark.parametrize("impl", IMPLS)
def test_identity_and_inverse(impl):
    """The unshuffled tiles rebuild the image, and shuffling by the inverse undoes a shuffle."""
    x, perm, _ = (part.to(device(impl)) for part in inputs(3, 6, 18, 18))
    still = torch.arange(9, device=x.device).expand(2, 9)
    assert torch.equal(tile_shuffle(x, still, 3, 6, image=True, impl=impl), x)
    there = tile_shuffle(x, perm, 3, 6, image=True, impl=impl)
    assert torch.equal(tile_shuffle(there, perm.argsort(1), 3, 6, image=True, impl=impl), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_offset_defaults_to_the_centre(impl):
    x, perm, _ = (part.to(device(impl)) for part in inputs(2, 4, 14, 16))
    centre = torch.tensor([1, 2], device=x.device)              # cells are 7 x 8
    assert torch.equal(tile_shuffle(x, perm, 2, 4, impl=impl),
                       tile_shuffle(x, perm, 2, 4, centre.expand(2, 4, 2), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_the_adjoint(impl, shape):
    """<A x, y> = <x, A' y> for random y. Ones as y would hide a gradient on wrong pixels."""
    grid, tile = shape[:2]
    for image in (False, True):
        x, perm, offset = (part.to(device(impl)) for part in inputs(*shape))
        x.requires_grad_()
        out = tile_shuffle(x, perm, grid, tile, offset, std=(0.5, 2., 3.), image=image, impl=impl)
        y = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        grad, = torch.autograd.grad(out, x, y)
        left, right = (out * y).sum().item(), (x * grad).sum().item()
        assert math.isclose(left, right, rel_tol=1e-10), (
            f"<A x, y> = {left}, <x, A' y> = {right}: whose gradient goes where, times what?")
        assert (grad != 0).sum() == y.numel(), "gradient 0 under no tile, and only there"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS[1:4], ids=lambda kind: str(kind)[6:])
def test_gradient_type(impl, kind):
    """One product is rounded once: half a unit in the last place of the type."""
    x, perm, offset = (part.to(device(impl)) for part in inputs(3, 8, 31, 33, kind=kind))
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    grads = []
    for z, run in ((x, impl), (exact, "torch")):
        out = tile_shuffle(z, perm, 3, 8, offset, std=(0.2, 0.3, 0.1), impl=run)
        y = torch.linspace(-1, 1, out.numel(), device=x.device).to(kind).view_as(out)
        grads.append(torch.autograd.grad(out, z, y.to(z.dtype))[0])
    assert grads[0].dtype == kind, "a gradient has the type of what it is the gradient of"
    assert torch.allclose(grads[0].double(), grads[1], rtol=2 * torch.finfo(kind).eps, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl):
    """Channels last, sliced, expanded, misaligned; 32-bit tables; a cotangent with stride 0."""
    x, perm, offset = (part.to(device(impl)) for part in inputs(3, 8, 31, 33, kind=torch.uint8))
    wanted = tile_shuffle(x, perm, 3, 8, offset, impl="torch")
    wide = torch.zeros(2, 3, 31, 40, dtype=torch.uint8, device=x.device)
    wide[..., 5:38] = x
    flat = torch.zeros(x.numel() + 1, dtype=torch.uint8, device=x.device)[1:].view_as(x).copy_(x)
    for same in (x.to(memory_format=torch.channels_last), wide[..., 5:38], flat):
        assert torch.equal(tile_shuffle(same, perm.int(), 3, 8, offset.int(), impl=impl), wanted)
    one = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(tile_shuffle(one, perm, 3, 8, offset, impl=impl),
                       tile_shuffle(one.contiguous(), perm, 3, 8, offset, impl="torch"))
    z = x.float().requires_grad_()
    tile_shuffle(z, perm, 3, 8, offset, impl=impl).sum().backward()
    assert z.grad.sum() == wanted.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input(impl):
    x, perm, offset = (part.to(device(impl)) for part in inputs(3, 8, 31, 33))
    twice, beyond, below = perm.clone(), perm.clone(), perm.clone()
    twice[1, 0], beyond[0, 0], below[0, 0] = twice[1, 1], 9, -1
    if impl != "cuda":         # on a GPU the check is an assertion that ends the process's context
        for bad in (twice, beyond, below):
            with pytest.raises(RuntimeError, match="not a permutation"):
                tile_shuffle(x, bad, 3, 8, offset, impl=impl)
        for bad in (offset * 0 - 1, offset * 0 + 3):         # cells are 10 x 11: room for 2 and 3
            with pytest.raises(RuntimeError, match="leaves its cell"):
                tile_shuffle(x, perm, 3, 8, bad, impl=impl)
    for grid, tile in ((3, 11), (0, 8), (-1, 8), (3, 0), (32, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            tile_shuffle(x, perm, grid, tile, impl=impl)
    for bad in (perm[:1], perm[:, :8], perm.float(), perm[0]):
        with pytest.raises(ValueError, match="wanted integers"):
            tile_shuffle(x, bad, 3, 8, impl=impl)
    for bad in (x[0], x.long(), x[:0], x > 0):
        with pytest.raises(ValueError, match="wanted"):
            tile_shuffle(bad, perm, 3, 8, impl=impl)
    for bad in (offset.float(), offset[..., :1]):
        with pytest.raises(ValueError, match="wanted integers"):
            tile_shuffle(x, perm, 3, 8, bad, impl=impl)
    with pytest.raises(RuntimeError, match="requires_grad|require gradients"):
        x.byte().requires_grad_()      # PyTorch itself refuses: uint8 has no gradient


@pytest.mark.parametrize("impl", KERNELS)
def test_op_is_well_registered(impl):
    build.load(impl)
    x, perm, offset = (part.to(device(impl)) for part in inputs(2, 3, 8, 9, kind=torch.float32))
    color = torch.rand(2, 4, 3, 6, device=x.device)
    for image, matrix in ((False, None), (True, color)):
        torch.library.opcheck(torch.ops.fgssl.tile_shuffle.default,
                              (x.clone().requires_grad_(), perm, offset, matrix, 2, 3, image))
        grad = torch.rand((2, 3, 6, 6) if image else (2, 4, 3, 3, 3), device=x.device)
        torch.library.opcheck(torch.ops.fgssl.tile_shuffle_backward.default,
                              (grad, perm.argsort(1), offset, matrix, 2, 3, image, 8, 9))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64],
                         ids=lambda kind: str(kind)[6:])
def test_recolours_each_tile_then_normalises(impl, kind):
    """The clamp lies between: colours first, then [0, 1], then (v - mean) / std."""
    x, perm, offset = inputs(3, 8, 31, 33, kind=torch.uint8)
    x = x if kind == torch.uint8 else (x / 255).to(kind)
    rng = torch.Generator().manual_seed(1)
    matrix, gray, constant = (torch.randn(2, 9, 3, n, generator=rng) / 2 for n in (3, 3, 1))
    tiles = by_loops(x.double() / (255 if kind == torch.uint8 else 1), perm, 3, 8, offset)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
    for g, color in ((gray, (matrix, gray, constant)), (0 * gray, (matrix, constant))):
        wanted = (torch.einsum("bkcd,bkdyx->bkcyx", matrix.double(), tiles) + constant[..., None] +
                  torch.einsum("bkcd,bkd->bkc", g.double(), tiles.mean((3, 4)))[..., None, None])
        wanted = (wanted.clamp(0, 1) - mean) / std
        ours = tile_shuffle(x.to(device(impl)), perm, 3, 8, offset, torch.cat(color, 3),
                            mean.flatten(), std.flatten(), impl=impl)
        # float32: three products of about 1, divided by a std of 0.1; the tables of float64 too
        assert torch.allclose(ours.cpu().double(), wanted, atol=2e-5 if kind != torch.float64 else
                              1e-5), (ours.cpu() - wanted).abs().max()
    one = torch.eye(3, 4)                                       # the identity, for all tiles
    same = tile_shuffle(x.to(device(impl)), perm, 3, 8, offset, one, impl=impl)
    assert torch.allclose(same.cpu().double(), tiles, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_has_no_gradient_raises(impl):
    x, perm, offset = (part.to(device(impl)) for part in inputs(3, 8, 31, 33))
    x.requires_grad_()
    with pytest.raises(ValueError, match="it clamps"):
        tile_shuffle(x, perm, 3, 8, offset, torch.eye(3, 4), impl=impl)
    with pytest.raises(ValueError, match="color has shape"):
        tile_shuffle(x.detach(), perm, 3, 8, offset, torch.eye(3, 3), impl=impl)
    out = tile_shuffle(x, perm, 3, 8, offset, impl=impl)
    grad, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", KERNELS[:1])
def test_the_kernel_checks_the_tables_that_no_cpu_saw(impl):
    """Read by a wrong table, a tile would come from outside the image."""
    build.load(impl)
    x, perm, offset = inputs(3, 8, 31, 33, kind=torch.float32)
    for bad in (perm + 1, perm - 1):
        with pytest.raises(RuntimeError, match="perm names a tile that does not exist"):
            torch.ops.fgssl.tile_shuffle(x, bad, offset, None, 3, 8, False)
    for bad in (offset + 3, offset - 3):
        with pytest.raises(RuntimeError, match="an offset leaves its cell"):
            torch.ops.fgssl.tile_shuffle(x, perm, bad, None, 3, 8, False)


@pytest.mark.parametrize("impl", IMPLS)
def test_under_torch_compile(impl):
    x, perm, offset = (part.to(device(impl)) for part in inputs(2, 3, 8, 9, kind=torch.uint8))
    run = torch.compile(tile_shuffle, fullgraph=True, backend="aot_eager")
    wanted = tile_shuffle(x, perm, 2, 3, offset, impl=impl)
    assert torch.equal(run(x, perm, 2, 3, offset, impl=impl), wanted)
