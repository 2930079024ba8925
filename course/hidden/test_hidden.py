"""Tests that are not handed out: other shapes for each student, against the project's own bodies.

test_NAME... grades exercise NAME. `draw` is a random.Random of the student's name. A body that
knows the answers of the handed-out tests, or another student's, fails here.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fgssl
import kernels
import train_jigsaw
from course import seam
from evaluation import explain
from kernels import reference
from methods import super_resolution


def rng_of(draw):
    return torch.Generator().manual_seed(draw.randrange(2**31))


def tensor(draw, *shape, kind=torch.float32):
    return torch.randn(*shape, dtype=kind, generator=rng_of(draw))


def close(name, ours, function, *args, rtol=1e-5, atol=1e-6, ask=""):
    """Compare with the project's own result. float32 sums of a few hundred terms: 1e-5."""
    with seam.solution():
        wanted = function(*args)
    shape = getattr(ours, "shape", None)
    assert isinstance(ours, torch.Tensor), f"{name} returns a {type(ours).__name__}, not a tensor"
    assert shape == wanted.shape, f"shape {tuple(shape)}, wanted {tuple(wanted.shape)}. {ask}"
    assert ours.dtype == wanted.dtype, f"type {ours.dtype}, wanted {wanted.dtype}"
    worst = (ours.double() - wanted.double()).abs().max().item()
    assert torch.allclose(ours, wanted, rtol=rtol, atol=atol, equal_nan=True), (
        f"{worst:.2g} away from the right value. {ask}")


def test_cosine_lr_of_other_runs(draw):
    for _ in range(20):
        total = draw.randrange(2, 5000)
        warmup, peak = draw.randrange(total), draw.uniform(1e-4, 2)
        step = draw.randrange(total + 1)
        ours = fgssl.cosine_lr(step, total, warmup, peak)
        with seam.solution():
            wanted = fgssl.cosine_lr(step, total, warmup, peak)
        assert ours == pytest.approx(wanted, rel=1e-9, abs=1e-12), (
            f"step {step} of {total}, warm-up {warmup}, peak {peak:.4g}: {ours:.6g}, wanted "
            f"{wanted:.6g}. Which part of the schedule is this step in?")


def test_hflip_of_other_shapes(draw):
    for _ in range(3):
        h, w, p = draw.randrange(1, 9), draw.randrange(2, 9), draw.uniform(0.2, 0.8)
        x, seed = tensor(draw, 800, 3, h, w), draw.randrange(2**31)
        before = x.clone()
        y = fgssl.hflip(x, torch.Generator().manual_seed(seed), p)
        assert torch.equal(x, before), "the images that came in were changed: make new ones"
        flipped = (y != x).flatten(1).any(1)
        wanted = torch.where(flipped.view(-1, 1, 1, 1), torch.flip(x, (3,)), x)
        assert torch.equal(y, wanted), f"images of {h} x {w}: left and right exchanged, no more"
        share = flipped.double().mean().item()               # 4.5 sd: once in 100,000 too strict
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / 800), f"{share:.3f} flipped, not {p}"
        again = fgssl.hflip(x, torch.Generator().manual_seed(seed), p)
        assert torch.equal(y, again), "the same rng, other flips: is every draw from rng?"


def test_crop_boxes_of_other_images(draw):
    h, w = draw.randrange(40, 200), draw.randrange(40, 200)
    low = draw.uniform(0.05, 0.2)
    seed = draw.randrange(2**31)
    boxes = [fgssl.crop_boxes(torch.Generator().manual_seed(seed), 500, h, w, (low, 0.4),
                              (3 / 4, 4 / 3)) for _ in range(2)]
    assert all(map(torch.equal, *boxes)), "the same rng, other boxes: is every draw from rng?"
    top, left, height, width = boxes[0]
    assert (top >= 0).all() and (left >= 0).all(), "a box begins outside the image"
    assert (top + height <= h).all() and (left + width <= w).all(), "a box leaves the image"
    area, ratio = height * width / (h * w), width / height
    slack = 1 + 1.2 / min(height.min(), width.min()).item()  # sides are rounded by half a pixel
    assert low / slack < area.min() and area.max() < 0.4 * slack, "an area out of `scale`"
    assert 3 / 4 / slack < ratio.min() and ratio.max() < 4 / 3 * slack, "ratio is width / height"
    one = fgssl.crop_boxes(rng_of(draw), 50, h, w, (0.25, 0.25), (2, 2))
    assert (one[3] >= one[2]).all(), "a ratio of 2 is twice as wide as tall"


def test_crop_resize_of_other_boxes(draw):
    for size in (draw.randrange(3, 20), 1):
        h, w, n = draw.randrange(8, 40), draw.randrange(8, 40), 5
        x = tensor(draw, n, draw.randrange(1, 4), h, w)
        tops = [draw.randrange(h - 2) for _ in range(n)]
        lefts = [draw.randrange(w - 2) for _ in range(n)]
        hs = [draw.randrange(1, h - top + 1) for top in tops]
        ws = [draw.randrange(1, w - left + 1) for left in lefts]
        args = x, *map(torch.tensor, (tops, lefts, hs, ws)), size
        close("crop_resize", fgssl.crop_resize(*args), fgssl.crop_resize, *args, atol=2e-4,
              ask=f"Boxes of {list(zip(hs, ws))} pixels at size {size}: where does pixel i lie?")


def test_knn_of_other_features(draw):
    n, dim, classes = draw.randrange(20, 60), draw.randrange(2, 9), draw.randrange(3, 7)
    train, h = 3 * tensor(draw, n, dim), tensor(draw, 40, dim)
    labels = torch.tensor([draw.randrange(classes) for _ in range(n)])
    k = draw.randrange(2, n)
    ours = fgssl.knn(train, labels, h, k, classes)
    with seam.solution():
        wanted = fgssl.knn(train, labels, h, k, classes)
    assert torch.equal(torch.as_tensor(ours), wanted), (
        f"{(torch.as_tensor(ours) != wanted).sum()} of 40 differ, k = {k} of {n}: whose vote "
        "counts, and how much?")


def test_nt_xent_dense_of_any_norm(draw):
    m, d, t = 2 * draw.randrange(2, 12), draw.randrange(2, 9), draw.uniform(0.1, 1)
    for scale in (1, 2):
        z = scale * tensor(draw, m, d, kind=torch.float64)
        ask = ("Rows are taken as they are, not normalised. Which columns are below the "
               "fraction's line?")
        args = z, t
        close("nt_xent_dense", reference.nt_xent_dense(*args), reference.nt_xent_dense, *args,
              rtol=1e-9, ask=f"z {m} x {d} of length about {scale * d ** 0.5:.2g}. {ask}")
    before = z.clone()
    reference.nt_xent_dense(z, t)
    assert torch.equal(z, before), "z itself was changed"


def test_chunked_forward_of_large_m(draw):
    m, d = 20_000 + 2 * draw.randrange(500), 2
    z = F.normalize(tensor(draw, m, d))
    first = 2 * draw.randrange(100)
    args = z[first:first + 12_000], z, first, 0.5, draw.random() < 0.5
    ours = reference.chunked_forward(*args)                  # 12,000 x 20,000 floats are 0.9 GB:
    with seam.solution():                                    # five of them do not fit
        wanted = reference.chunked_forward(*args)
    assert torch.allclose(ours[0], wanted[0], rtol=1e-4), "another loss for a large M"
    assert torch.allclose(ours[1].sum(1), wanted[1].sum(1), rtol=1e-4), (
        "the two terms must add to the row's log-sum-exp")


def test_chunked_backward_of_large_m(draw):
    m = 20_000 + 4 * draw.randrange(250)
    z, grad = F.normalize(tensor(draw, m, 2)), tensor(draw, 2)
    with seam.solution():
        how = z, 0, 0.5, draw.random() < 0.5
        lse = reference.chunked_forward(z, *how)[1]
        args = z[:12_000], *how, lse, grad
        wanted = reference.chunked_backward(*args)
    ours = reference.chunked_backward(*args)
    error = ((ours - wanted).norm() / wanted.norm()).item()
    assert error < 1e-4, f"off by {error:.1g} of its size for M = {m}"   # float32, 20,000 terms


def tiles(draw):
    """x, perm, offset, grid, tile of some image."""
    grid, tile = draw.randrange(1, 4), draw.randrange(1, 6)
    h, w = (grid * (tile + draw.randrange(3)) + draw.randrange(grid) for _ in range(2))
    b, c = draw.randrange(1, 4), draw.randrange(1, 5)
    perm = torch.stack([torch.randperm(grid**2, generator=rng_of(draw)) for _ in range(b)])
    room = torch.tensor([h // grid - tile, w // grid - tile])
    chance = torch.rand(b, grid**2, 2, generator=rng_of(draw))
    offset = (chance * (room + 1)).long().minimum(room)
    return tensor(draw, b, c, h, w), perm, offset, grid, tile


def colors(draw, x, perm, gray, low, high):
    """A table of recolouring; with gray a matrix for the mean, too."""
    c = x.shape[1]
    color = tensor(draw, *perm.shape, c, c * (1 + gray) + 3)
    color[..., -2], color[..., -1] = low, high
    return color


def test_gather_forward_of_other_grids(draw):
    for case in range(8):
        x, perm, offset, grid, tile = tiles(draw)
        color = colors(draw, x, perm, case % 2, -0.5, 0.5) if case < 6 else None
        args = x, perm, offset, color, grid, tile, case % 4 > 1
        ask = (f"{grid} x {grid} tiles of {tile} from {tuple(x.shape)}, "
               f"{'recoloured' if case < 6 else 'colours as they are'}.")
        close("gather_forward", reference.gather_forward(*args), reference.gather_forward, *args,
              ask=ask)


def test_gather_backward_of_other_grids(draw):
    for case in range(8):
        x, perm, offset, grid, tile = tiles(draw)
        color = colors(draw, x, perm, 0, -math.inf, math.inf) if case < 6 else None
        image = case % 4 > 1
        with seam.solution():
            grad = reference.gather_forward(x, perm, offset, color, grid, tile, image)
        args = grad, perm.argsort(1), offset, color, grid, tile, image, *x.shape[2:]
        close("gather_backward", reference.gather_backward(*args), reference.gather_backward,
              *args, ask="Whose gradient goes to which pixel?")


def test_permutation_set_of_other_counts(draw):
    grid, count, seed = draw.choice((2, 3)), draw.randrange(5, 24), draw.randrange(10**6)
    ours = train_jigsaw.permutation_set(grid, count, seed)
    assert isinstance(ours, np.ndarray) and ours.shape == (count, grid**2), "(count, tiles) wanted"
    assert len({tuple(row) for row in ours.tolist()}) == count, "a permutation comes twice"
    with seam.solution():
        wanted = train_jigsaw.permutation_set(grid, count, seed)

    def least(perms):
        return min((a != b).sum() for i, a in enumerate(perms) for b in perms[:i])
    assert least(ours) >= least(wanted) - 1, (               # ties are broken by chance
        f"two of {count} differ in {least(ours)} places of {grid**2}; {least(wanted)} is possible")


def test_psnr_and_ssim_of_other_images(draw):
    h, w = draw.randrange(11, 30), draw.randrange(11, 30)
    x = 255 * torch.rand(3, 1, h, w, dtype=torch.float64, generator=rng_of(draw))
    y = (x + 20 * tensor(draw, 3, 1, h, w, kind=torch.float64)).clamp(0, 255)
    for name in ("psnr", "ssim"):
        function = getattr(super_resolution, name)
        close(name, function(x, y), function, x, y, rtol=1e-6,
              ask=f"Three pairs of {h} x {w} in 0 to 255, one number each.")


def test_grad_cam_of_other_scores(draw):
    b, c, h, w = (draw.randrange(2, 6) for _ in range(4))
    maps, slope = tensor(draw, b, c, h, w), tensor(draw, b, c, h, w)
    args = maps, lambda m: (m * slope).flatten(1).sum(1) + (m * m).mean((1, 2, 3))
    close("grad_cam", explain.grad_cam(*args), explain.grad_cam, *args,
          ask="One weight a channel: its gradient's mean. Then what is done with negative sums?")


def test_tiles_forward_of_other_grids(draw):
    x, perm, offset, grid, tile = tiles(draw)
    ours = kernels.tile_shuffle(x, perm, grid, tile, offset, impl="emulated")
    wanted = kernels.tile_shuffle(x, perm, grid, tile, offset, impl="torch")
    assert torch.equal(ours, wanted), f"{grid} x {grid} tiles of {tile} from {tuple(x.shape)}"


def test_forward_simt_of_other_sizes(draw):
    z = F.normalize(tensor(draw, 2 * draw.randrange(1, 80), draw.randrange(1, 140)))
    ours, wanted = (kernels.nt_xent(z, 0.2, impl) for impl in ("emulated", "torch"))
    assert torch.allclose(ours, wanted, rtol=1e-5), (
        f"{ours:.6g} for z {tuple(z.shape)}, wanted {wanted:.6g}: which columns count?")
