"""The further views (--view), from their definitions: what moves, what stays, how often."""

import pytest
import torch

import fgssl
import train_simclr
from methods import views
from methods.views import VIEWS, distort_one_view


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, size, seed=0):
    return torch.rand(n, 3, size, size, generator=seeded(seed))


def numbered(n, grid, tile=2):
    """Images whose tiles are flat and hold their own number, over grid * grid."""
    flat = torch.arange(grid ** 2).view(1, 1, grid, grid) / grid ** 2
    return flat.repeat_interleave(tile, 2).repeat_interleave(tile, 3).repeat(n, 3, 1, 1)


def places(x, grid):
    """Which tile of `numbered` lies where: (n, grid, grid); tiles must be whole."""
    tile = x.shape[-1] // grid
    tiles = x.unfold(2, tile, tile).unfold(3, tile, tile)    # (n, 3, grid, grid, tile, tile)
    assert torch.equal(tiles, tiles[:, :1, :, :, :1, :1].expand_as(tiles)), "a tile was cut"
    return (tiles[:, 0, :, :, 0, 0] * grid ** 2).round().long()


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_keeps_shape_range_and_input_and_follows_the_seed(name):
    x = images(5, 29)                                        # 29: no grid divides it
    before = x.clone()
    y = VIEWS[name](x, seeded(1))
    assert y.shape == x.shape and y.dtype == torch.float32
    assert y.min() >= 0 and y.max() <= 1
    assert torch.equal(x, before), "the input is another step's, too"
    assert torch.equal(y, VIEWS[name](x, seeded(1)))
    if name != "region":                                     # which draws nothing
        assert not torch.equal(y, VIEWS[name](x, seeded(2))), "written once: always the same"
    assert (y != x).flatten(1).any(1).all(), "an image was left as it was"


def test_gamma_is_one_power_an_image_uniform_in_its_range():
    x = images(4000, 2).clamp(0.1, 0.9)
    power = views.gamma(x, seeded()).log() / x.log()
    spread = power.amax((1, 2, 3)) - power.amin((1, 2, 3))
    assert spread.max() < 1e-3, "one g for all of an image's pixels"
    g = power[:, 0, 0, 0]
    assert 0.5 <= g.min() < 0.51 and 2.49 < g.max() <= 2.5
    assert abs(g.mean() - 1.5) < 0.037, "4,000 draws of deviation 0.58: within 4 errors"
    ends = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, 3, 2, 1)
    assert torch.equal(views.gamma(ends, seeded()), ends), "black and white stay"
    assert torch.equal(views.gamma(x, seeded(), 1, 1), x), "power 1 is the identity"


def test_dropout_cuts_rectangles_of_the_stated_number_and_size():
    one = views.dropout(torch.ones(300, 3, 64, 64), seeded(), fewest=1, most=1)
    for hole in (one == 0).all(1):
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns), "one hole is one rectangle"
        for span in (rows, columns):                         # 1/16 to 1/8 of 64 pixels: 4 to 8
            assert 4 <= span.sum() <= 8 and span.nonzero()[:, 0].diff().eq(1).all()
    covered = (one == 0).float().mean((0, 1))
    assert (covered[8:-8, 8:-8].mean() - 6 * 6 / 58 ** 2).abs() < 0.003, "anywhere, equally often"
    many = views.dropout(torch.ones(2000, 3, 32, 32), seeded())
    share = (many == 0).float().mean((1, 2, 3))
    expected = 1 - (1 - 3 * 3 / 32 ** 2) ** 12.5             # mean side 3 of 32, holes overlap
    assert abs(share.mean() - expected) < 0.004, "5 to 20 holes, 12.5 on average"
    x = images(3, 16)
    assert torch.equal(views.dropout(x, seeded(), 0, 0), x), "no hole is the identity"


def test_swap_exchanges_two_tiles_and_leaves_fourteen():
    where = places(views.swap(numbered(3000, 4), seeded()), 4).flatten(1)
    moved = where != torch.arange(16)
    assert (moved.sum(1) == 2).all()
    assert (where.sort(1).values == torch.arange(16)).all(), "none is lost or doubled"
    share = moved.float().mean(0)
    assert (share - 2 / 16).abs().max() < 0.03, "every tile equally often: within 5 errors"


def test_jigsaw_orders_are_uniform():
    """Made of swaps with the first tile, no tile would ever stay."""
    where = places(views.jigsaw(numbered(6000, 4), seeded()), 4).flatten(1)
    assert (where.sort(1).values == torch.arange(16)).all(), "none is lost or doubled"
    count = torch.stack([(where == tile).float().mean(0) for tile in range(16)])
    assert (count - 1 / 16).abs().max() < 0.0157, "each tile in each place: within 5 errors"
    small = places(views.jigsaw(numbered(4800, 2), seeded(), grid=2), 2).flatten(1)
    _, times = small.unique(dim=0, return_counts=True)
    assert len(times) == 24 and (times - 200).abs().max() < 70, "all 24 orders of 4 tiles"


def test_region_confusion_keeps_tiles_near_home():
    reach = 2
    where = places(views.dcl(numbered(2000, 7), seeded(), reach=reach), 7)
    assert (where.flatten(1).sort(1).values == torch.arange(49)).all(), "none is lost or doubled"
    rows, columns = where // 7, where % 7
    for now, home in ((rows, torch.arange(7)[:, None]), (columns, torch.arange(7))):
        distance = (now - home).abs()
        assert distance.max() < 2 * reach, "the paper's bound"
        assert (distance.max() > reach - 1) and (distance == 0).float().mean() > 0.2
    drift = (rows - torch.arange(7)[:, None]).float().mean((1, 2))
    assert drift.abs().max() < 1e-6, "as many move up as down"
    assert (rows != torch.arange(7)[:, None]).any() and (columns != torch.arange(7)).any()
    still = places(views.dcl(numbered(3, 7), seeded(), reach=0), 7)
    assert (still.flatten(1) == torch.arange(49)).all(), "reach 0 is the identity"


def test_a_margin_that_the_grid_does_not_divide_stays():
    x = images(4, 31)                                        # 4 x 7 pixels move, 3 stay
    for view in (views.swap, views.jigsaw):
        y = view(x, seeded())
        assert torch.equal(y[:, :, 28:], x[:, :, 28:]) and torch.equal(y[..., 28:], x[..., 28:])


def test_the_region_is_where_the_edges_are():
    for top, left in ((4, 4), (4, 30), (30, 8), (20, 20)):
        x = torch.full((1, 3, 64, 64), 0.5)
        x[:, :, top:top + 30, left:left + 30] = images(1, 30)
        y = views.region(x, seeded())
        textured = (fgssl.luma(y) - 0.5).abs() > 0.02
        assert textured.float().mean() > 0.8 * 30 ** 2 / 40 ** 2, "the crop of 40 holds the 30"
    whole = images(2, 33)
    torch.testing.assert_close(views.region(whole, seeded(), side=1), whole,
                               atol=1e-5, rtol=0)            # the share 1 is the identity


def test_one_of_two_views_is_changed_either_equally_often():
    """Only ever the first view distorted: the encoder learns which is which."""
    x = images(2000, 4).repeat(2, 1, 1, 1)
    y = distort_one_view(x, "gamma", seeded())
    first, second = (y != x).flatten(1).any(1).chunk(2)
    assert (first ^ second).all(), "exactly one of each pair"
    assert abs(first.float().mean() - 0.5) < 0.056, "2,000 draws: within 5 errors"
    rest = torch.where(first.view(-1, 1, 1, 1), y[2000:], y[:2000])
    assert torch.equal(rest, x[:2000]), "its partner still shows the same image"
    args = train_simclr.arguments(["--out", "nowhere", "--size", "16"])
    x = torch.zeros(4, 3, 20, 20, dtype=torch.uint8)
    plain = train_simclr.random_view(x.repeat(2, 1, 1, 1), args, seeded())
    assert torch.equal(train_simclr.two_views(x, args, seeded()), plain), "--view original"
