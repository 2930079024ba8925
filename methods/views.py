"""Six further views for subtle classes, after Al Breiki et al. 2021: train_simclr.py --view.

Each takes images x (B, 3, S, S) in [0, 1] and returns the same shape. `distort_one_view` applies
one of them to one of the two views of each image.
"""

import torch
import torch.nn.functional as F

import fgssl
import kernels


def gamma(x, rng, low=0.5, high=2.5):
    """Gamma correction, x ** g with g uniform: black and white stay as they are."""
    return x ** fgssl.to_device(fgssl.uniform(rng, low, high, len(x), 1, 1, 1), x.device)


def dropout(x, rng, fewest=5, most=20, side=(1 / 16, 1 / 8)):
    """Coarse dropout: 5 to 20 black rectangles, each side 1/16 to 1/8 of the image's."""
    n, size = len(x), x.shape[-1]

    def pair(low, high):                                     # for rows and for columns
        return torch.stack([fgssl.uniform(rng, low, high, n, most, 1) for _ in range(2)])

    length = pair(*side) * size
    start = pair(0, 1) * (size - length)
    centre = torch.arange(size) + 0.5
    rows, columns = ((start <= centre) & (centre < start + length)).float()  # (n, most, size) each
    holes = fgssl.integers(rng, fewest, most + 1, n, 1, 1)
    covered = (rows * (torch.arange(most)[:, None] < holes)).mT @ columns > 0
    return x.masked_fill(fgssl.to_device(covered[:, None], x.device), 0)


def rearrange(x, perm, grid, impl):
    """Cut into grid x grid tiles and put them together in the order perm (B, grid * grid). A margin
    of fewer than `grid` pixels, right and below, stays."""
    tile = x.shape[-1] // grid
    moved = kernels.tile_shuffle(x, perm, grid, tile, torch.zeros(2, dtype=torch.long), image=True,
                                 impl=impl)
    x = x.clone()
    x[:, :, :grid * tile, :grid * tile] = moved
    return x


def swap(x, rng, grid=4, impl="auto"):
    """Two tiles of a 4 x 4 grid change places."""
    perm = torch.arange(grid ** 2).repeat(len(x), 1)
    pair = fgssl.uniform(rng, 0, 1, len(x), grid ** 2).argsort(1)[:, :2]
    return rearrange(x, perm.scatter(1, pair, pair.flip(1)), grid, impl)


def jigsaw(x, rng, grid=4, impl="auto"):
    """The tiles of a 4 x 4 grid in any order, all equally likely."""
    return rearrange(x, fgssl.uniform(rng, 0, 1, len(x), grid ** 2).argsort(1), grid, impl)


def dcl(x, rng, grid=7, reach=2, impl="auto"):
    """Region confusion: the tiles of a 7 x 7 grid, each moved a few places.

    Chen et al., CVPR 2019, section 3.1: within each row, tile i gets the key i + r, r uniform in
    [-reach, reach], and the row is sorted by the keys; then the same within each column. So a tile
    moves fewer than 2 reach places along either side.
    """
    def order():  # (n, grid, grid): for each row or column, the tile at each place
        keys = torch.arange(grid) + fgssl.uniform(rng, -reach, reach, len(x), grid, grid)
        return keys.argsort(2)

    home = torch.arange(grid ** 2).view(1, grid, grid).expand(len(x), -1, -1)
    by_rows = home.gather(2, order())
    return rearrange(x, by_rows.gather(1, order().mT).flatten(1), grid, impl)


def region(x, rng, side=5 / 8):
    """A crop around the salient part: the square of 5/8 of the side that holds most gradient.

    No detector: the subject is taken to be where the edges are. Edges near the middle count more,
    because photographers aim there. Deterministic; rng is not used.
    """
    size = x.shape[-1]
    side, y = round(side * size), fgssl.luma(x)
    edges = F.pad(y.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(y.diff(dim=3).abs(), (0, 1))
    from_middle = torch.linspace(-1, 1, size, device=x.device).square()
    edges = edges * torch.exp(-(from_middle[:, None] + from_middle))
    energy = F.avg_pool2d(edges, side, 1)[:, 0]              # of the square at each top left corner
    best = energy.flatten(1).argmax(1)
    top, left = best // energy.shape[2], best % energy.shape[2]
    whole = torch.full_like(top, side)
    return fgssl.crop_resize(x, top, left, whole, whole, size)


REARRANGED = {"swap": swap, "jigsaw": jigsaw, "dcl": dcl}    # by kernels.tile_shuffle
VIEWS = {"gamma": gamma, "dropout": dropout, **REARRANGED, "region": region}


def distort_one_view(x, view, rng, impl="auto"):
    """Apply one of VIEWS to one of the two views of each image, the first as often as the second.

    x (2N, 3, S, S): rows i and i + N are two views of one image. impl: of kernels.tile_shuffle.
    """
    options = {"impl": impl} if view in REARRANGED else {}
    n = len(x) // 2
    rows = fgssl.to_device(torch.arange(n) + n * (fgssl.uniform(rng, 0, 1, n) < 0.5), x.device)
    return x.index_copy(0, rows, VIEWS[view](x[rows], rng, **options))
