"""Augmentations against slow references from their definitions, and their draws against their laws.

What was drawn is read off the output (of ramps, impulses, gentle colours), not off the code.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fgssl
import train_simclr

Y = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, low=0.0, high=1.0, seed=0):
    return low + (high - low) * torch.rand(*shape, generator=seeded(seed))


def assert_law(sample, cdf, what):
    """Kolmogorov-Smirnov: for the right law the distance exceeds 1.95 / sqrt(n) once in 1000."""
    sample = np.sort(np.asarray(sample, float))
    n, wanted = len(sample), cdf(sample)
    distance = max((np.arange(1, n + 1) / n - wanted).max(), (wanted - np.arange(n) / n).max())
    assert distance < 1.95 / math.sqrt(n), (
        f"{what}: of {n} draws a share of {distance:.3f} lies on the wrong side of some value. "
        "What law does the docstring ask for: is it uniform in this, or in its logarithm?")


def flat(low, high):
    return lambda v: np.clip((v - low) / (high - low), 0, 1)


def assert_share(hits, p, what):
    """A share of n draws lies within 3.3 standard deviations of p, but once in 1000."""
    share, n = hits.double().mean().item(), len(hits)
    assert abs(share - p) <= 3.3 * math.sqrt(p * (1 - p) / n), (
        f"{what}: in {share:.3f} of the cases, wanted {p}. Which draw decides it, and has "
        "each image one?")


# ------------------------------------------------------------------------------------------------
# Crop and resize
# ------------------------------------------------------------------------------------------------


BOXES = [(0, 0, 33, 97), (0, 0, 1, 1), (32, 96, 1, 1), (5, 0, 1, 97), (0, 50, 33, 1),
         (3, 7, 29, 13), (30, 2, 3, 90), (1, 1, 31, 31), (32, 0, 1, 2), (10, 60, 20, 37)]


@pytest.mark.parametrize("size", [1, 2, 31, 40])
@pytest.mark.parametrize("kind", ["uint8", "float", "not contiguous"])
def test_crop_resize_never_looks_outside_its_box(size, kind):
    x = torch.randint(0, 256, (len(BOXES), 3, 33, 97), dtype=torch.uint8, generator=seeded())
    exact = x.double() / 255
    if kind != "uint8":
        x = exact.float()
    if kind == "not contiguous":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    wanted = torch.cat([F.interpolate(exact[i:i + 1, :, top:top + h, left:left + w], (size, size),
                                      mode="bilinear", align_corners=False)
                        for i, (top, left, h, w) in enumerate(BOXES)])
    got = fgssl.crop_resize(x, *torch.tensor(BOXES).T, size)
    assert got.dtype == torch.float32, f"the views are {got.dtype}, wanted torch.float32"
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    off = (got - wanted).abs().amax((1, 2, 3))
    i = int((off >= 3e-5).int().argmax())
    # float32 places in [-1, 1], times 97 / 2 pixels, times steps of up to 1 between pixels
    assert off[i] < 3e-5, (
        f"box (top, left, h, w) = {BOXES[i]} of a {kind} image at size {size}: {off[i]:.2g} off. "
        "Is uint8 scaled to [0, 1]? Pixel i of n shows place (i + 0.5) / n of the box: what may "
        "it see beyond the box's edge?")


def shown(view):
    """(left, width, top, height) of the box in a 2 x 2 view of a ramp: its quarter points."""
    first, last = view[:, :, 0, 0].double(), view[:, :, 1, 1].double()
    side = 2 * (last - first)
    start = (first + last - side) / 2
    return start[:, 0], side[:, 0], start[:, 1], side[:, 1]


def ramp(n, height, width):
    """Channel 0 holds each pixel's x, channel 1 its y, in pixels from the image's corner."""
    x = (torch.arange(width) + 0.5).expand(height, width)
    y = (torch.arange(height) + 0.5)[:, None].expand(height, width)
    return torch.stack([x, y]).expand(n, 2, height, width)


def test_crops_have_uniform_area_log_uniform_ratio_and_uniform_place():
    left, w, top, h = shown(fgssl.random_resized_crop(ramp(1500, 90, 90), 2, seeded(1), (0.1, 0.5)))
    # side below sqrt(0.5 * 4 / 3) * 90: every first try fits, so that the laws are the plain ones;
    # rounded to whole pixels they shift by less than 0.5 / 28, well below the test's 0.05
    assert_law(w * h / 90 ** 2, flat(0.1, 0.5), "share of the area")
    assert_law((w / h).log(), flat(math.log(3 / 4), math.log(4 / 3)), "log of the ratio")
    for start, side in ((left, w), (top, h)):
        assert_law((start + 0.5) / (91 - side), flat(0, 1), "place")
    law = np.corrcoef(np.stack([w * h, w / h, left / (91 - w), top / (91 - h)]))
    assert np.abs(law - np.eye(4)).max() < 0.09, "area, ratio and place must be drawn apart"
    for v in (left, w, top, h):
        assert (v - v.round()).abs().max() < 1e-3, "boxes are whole pixels"
    assert len(set(zip(left.round().tolist(), top.round().tolist()))) > 750, "one draw an image"


def test_crops_reach_every_place_alike_the_last_row_and_column_too():
    top, left, h, w = fgssl.crop_boxes(seeded(), 4000, 8, 11, (1 / 4, 1 / 4), (1, 1))
    assert (h == 5).all() and (w == 5).all(), "a quarter of 88 pixels is 22: 4.7 a side, rounded"
    for name, start, places in (("top", top, 4), ("left", left, 7)):
        for place in range(places):
            assert_share(start == place, 1 / places, f"{name} {place}")


def test_crops_that_may_not_fit_follow_the_ten_tries_of_torchvision():
    """Near the whole image few ratios fit: what is kept is neither uniform nor log-uniform."""
    height, width, scale, ratio = 60, 90, (0.2, 1.0), (0.6, 4 / 3)
    drawn, dice = [], random.Random(0)
    for _ in range(6000):
        box = height, round(height * 4 / 3)  # 3:2 is too wide: the fallback is cut to 4:3
        for _ in range(10):
            area = height * width * dice.uniform(*scale)
            aspect = math.exp(dice.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                box = h, w
                break
        drawn.append(box)
    _, _, h, w = fgssl.crop_boxes(seeded(), 6000, height, width, scale, ratio)
    wanted_h, wanted_w = np.array(drawn).T
    for name, ours, wanted in (("height", h, wanted_h), ("width", w, wanted_w),
                               ("area", h * w, wanted_h * wanted_w)):
        places = np.unique(np.concatenate([ours, wanted]))
        ours, wanted = (np.searchsorted(np.sort(v), places, "right") / 6000 for v in (ours, wanted))
        off = np.abs(ours - wanted).max()                    # Kolmogorov-Smirnov, of two samples
        assert off < 1.95 * math.sqrt(2 / 6000), (
            f"{name}: {off:.3f} from the law of ten tries in an image of {height} x {width}. Which "
            "of the tries that fit is taken, and what if none does?")


@pytest.mark.parametrize("height, width, scale, box", [
    (10, 300, (0.2, 1.0), (0, 143, 10, 13)),     # too wide: 4:3 of the height, in the middle
    (300, 10, (0.2, 1.0), (143, 0, 13, 10)),     # too tall: 3:4
    (40, 50, (3.0, 4.0), (0, 0, 40, 50)),        # never fits, its ratio is in range: the whole
    (1, 1, (0.2, 1.0), (0, 0, 1, 1)),
])
def test_a_crop_that_cannot_fit_is_the_largest_centred_one(height, width, scale, box):
    got = torch.stack(fgssl.crop_boxes(seeded(), 50, height, width, scale, (3 / 4, 4 / 3)), 1)
    assert got.dtype == torch.int64 and (got == torch.tensor(box)).all(), (
        f"{got[0].tolist()}: if no try fits, the largest box with a ratio in range, centred")


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (2, 3), (33, 97), (300, 12), (8, 8)])
def test_no_crop_leaves_the_image_or_is_empty(height, width):
    top, left, h, w = fgssl.crop_boxes(seeded(), 3000, height, width, (0.01, 1.0), (0.5, 2.0))
    assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height and (left + w).max() <= width


def test_evaluation_view_is_the_centre_and_draws_nothing():
    x, state = images(2, 3, 256, 256), torch.get_rng_state()
    view = fgssl.evaluation_view(x, 224)
    assert torch.equal(view, fgssl.evaluation_view(x, 224)), "the same image, twice the same view"
    assert torch.equal(state, torch.get_rng_state())
    assert (view - x[:, :, 16:240, 16:240]).abs().max() < 1e-4  # places in float32, 256 pixels
    for height, width in ((61, 97), (50, 33)):
        view = fgssl.evaluation_view(ramp(1, height, width), 9)[0].double()
        side = 7 / 8 * min(height, width)
        at = (torch.arange(9) + 0.5) * side / 9
        assert (view[0] - (at + (width - side) / 2)).abs().max() < 1e-4
        assert (view[1] - (at + (height - side) / 2)[:, None]).abs().max() < 1e-4


@pytest.mark.parametrize("p", [0, 0.3, 0.5, 1])
def test_hflip_mirrors_columns_exactly_in_a_share_p(p):
    for shape, order in (((3, 2, 5), [4, 3, 2, 1, 0]), ((3, 3, 3), [2, 1, 0])):
        x = images(3000, *shape)
        before = x.clone()
        y = fgssl.hflip(x, seeded(3), p)
        assert torch.equal(x, before), "the images that came in were changed: make new ones"
        assert y.shape == x.shape, f"shape {tuple(y.shape)}, wanted {tuple(x.shape)}"
        flipped = (y != x).flatten(1).any(1)
        assert torch.equal(y[flipped], x[flipped][..., order]), (
            f"an image of {shape[1]} x {shape[2]} is neither kept nor mirrored: columns are "
            "reversed, rows kept. Which axis holds the columns?")
        assert_share(flipped, p, "flipped")


# ------------------------------------------------------------------------------------------------
# Colour
# ------------------------------------------------------------------------------------------------

# Luma and two colour differences, U = 0.492 (B - Y) and V = 0.877 (R - Y). I and Q of YIQ are U
# and V turned by 33 degrees, so that a rotation in YIQ is the same rotation of (U, V).
YUV = np.array([Y, 0.492111 * (np.array([0, 0, 1]) - Y), 0.877283 * (np.array([1, 0, 0]) - Y)])


def brightness(x, factor):
    return x * factor


def contrast(x, factor):
    return factor * x + (1 - factor) * np.mean([Y @ pixel for pixel in x])


def saturation(x, factor):
    return np.array([factor * pixel + (1 - factor) * (Y @ pixel) for pixel in x])


def hue(x, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return np.array([np.linalg.solve(YUV, turn @ (YUV @ pixel)) for pixel in x])


def drawn(n, seed=0, **strengths):
    """(brightness, contrast, saturation, angle of hue) that a seed draws for each of n images.

    Read off from what it does to dull pixels, which no factor takes to a clamp: a linear map and
    an offset by least squares, then the map in luma and colour differences.
    """
    x = images(n, 3, 3, 4, low=0.2, high=0.3, seed=99)
    y = fgssl.color_jitter(x, seeded(seed), **strengths)
    x, y = (v.flatten(2).transpose(1, 2).double().numpy() for v in (x, y))
    factors = []
    for before, after in zip(x, y):
        fit = np.linalg.lstsq(np.c_[before, np.ones(len(before))], after, rcond=None)[0]
        turn, offset = YUV @ fit[:3].T @ np.linalg.inv(YUV), fit[3]
        # 1e-3: pixels are rounded at 1e-8 and spread over 0.1; the fit magnifies that up to 1e4
        assert np.abs([turn[0, 1:], turn[1:, 0]]).max() < 1e-3, "luma or grey is not kept"
        assert np.ptp(offset) < 1e-3, "the offset is tinted"
        both, cos, sin = turn[0, 0], turn[1, 1] + turn[2, 2], turn[2, 1] - turn[1, 2]
        bright = both + offset.mean() / (before @ Y).mean()
        colour = math.hypot(cos, sin) / 2
        factors.append((bright, both / bright, colour / both, math.atan2(sin, cos)))
    return np.array(factors)


STRONG = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=1)
STEPS = brightness, contrast, saturation, hue


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))),
                         ids=lambda order: "-".join(STEPS[i].__name__[0] for i in order))
def test_color_jitter_is_its_four_steps_in_any_order(order):
    x = images(4, 3, 5, 3, seed=5)
    got = fgssl.color_jitter(x, seeded(7), **STRONG)
    wanted = x.flatten(2).transpose(1, 2).double().numpy()
    for i, factors in enumerate(drawn(4, 7, **STRONG)):
        for step in order:
            wanted[i] = STEPS[step](wanted[i], factors[step])
    got = got.flatten(2).transpose(1, 2).double().numpy()
    assert ((got == 0) | (got == 1)).any(), "colours are extreme enough that some are clamped"
    assert np.abs(got - wanted.clip(0, 1)).max() < 2e-3  # the factors are known to about 1e-3


def test_each_factor_of_jitter_has_its_own_range_and_law():
    b, c, s, angle = drawn(1500, brightness=0.4, contrast=0.3, saturation=0.6, hue=0.1, p=1).T
    for name, sample, strength in (("brightness", b, 0.4), ("contrast", c, 0.3),
                                   ("saturation", s, 0.6)):
        assert_law(sample, flat(1 - strength, 1 + strength), name)
    assert_law(angle / (2 * math.pi), flat(-0.1, 0.1), "hue, in turns")
    assert np.abs(np.corrcoef([b, c, s, angle]) - np.eye(4)).max() < 0.09, "drawn apart"
    x = torch.full((1500, 3, 1, 1), 0.25)  # a strength above 1 must not make factors below 0
    b = fgssl.color_jitter(x, seeded(1), 1.25, 0, 0, 0, p=1)[:, 0, 0, 0] / 0.25
    assert_law(b, flat(0, 2.25), "brightness of strength 1.25")


def test_jitter_of_strength_0_or_probability_0_changes_nothing():
    x = images(64, 3, 7, 5)
    for settings in ((0, 0, 0, 0, 1), (0.8, 0.8, 0.8, 0.2, 0)):
        # 1e-6: a 3 x 3 product in float32 whose matrix is the identity to rounding
        assert (fgssl.color_jitter(x, seeded(), *settings) - x).abs().max() < 1e-6
    y = fgssl.color_jitter(images(2000, 3, 2, 2), seeded(1), p=0.8)
    assert_share((y - images(2000, 3, 2, 2)).abs().amax((1, 2, 3)) > 1e-4, 0.8, "jittered")


def test_hue_keeps_grey_and_luma():
    grey = images(20, 1, 5, 5).expand(-1, 3, -1, -1)
    assert (fgssl.color_jitter(grey, seeded(), 0, 0, 0, 0.5, p=1) - grey).abs().max() < 1e-6
    x = images(20, 3, 5, 5, low=0.4, high=0.6)
    y = fgssl.color_jitter(x, seeded(), 0, 0, 0, 0.5, p=1)
    weights = torch.tensor(Y).view(3, 1, 1)
    assert ((y - x) * weights).sum(1).abs().max() < 1e-6 and (y - x).abs().max() > 0.05


def test_grayscale_weighs_channels_as_the_eye_does_in_a_share_p():
    x = images(2000, 3, 2, 3)
    y = fgssl.grayscale(x, seeded(2), p=0.2)
    grey = (y != x).flatten(1).any(1)
    wanted = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert y.shape == x.shape and (y[grey] - wanted[grey][:, None]).abs().max() < 1e-6
    assert_share(grey, 0.2, "grey")


# ------------------------------------------------------------------------------------------------
# Blur and normalisation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(33, 97), (64, 64), (41, 23), (7, 19), (1, 2)])
@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_is_a_convolution_with_mirrored_borders(height, width, sigma):
    x = images(2, 3, height, width)
    wanted = x.double().numpy()
    for axis, side in ((2, height), (3, width)):
        radius = min(max(1, side // 10 // 2), side - 1)  # a kernel of a tenth, odd, at least 3 wide
        weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
        border = [(0, 0)] * 4
        border[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(wanted, border, mode="reflect"), axis, 0)
        wanted = np.moveaxis(np.array([sum(w * padded[i + k] for k, w in enumerate(weights))
                                       for i in range(side)]), 0, axis) / sum(weights)
    got = fgssl.gaussian_blur(x, seeded(), (sigma, sigma), p=1)
    assert np.abs(got.double().numpy() - wanted).max() < 1e-6  # float32 sums of values up to 1


def test_blur_widths_are_uniform_and_one_an_image():
    x = torch.zeros(2000, 3, 21, 21)
    x[:, :, 10, 10] = 1
    y = fgssl.gaussian_blur(x, seeded(4), (0.5, 2.0), p=0.5)[:, 0].double()
    blurred = y[:, 10, 10] < 1
    assert_share(blurred, 0.5, "blurred")
    assert torch.equal(y[~blurred].float(), x[~blurred][:, 0])
    fall = (y[blurred, 10, 11] / y[blurred, 10, 10]).log()  # one pixel away: -0.5 / sigma^2
    assert_law((-0.5 / fall).sqrt(), flat(0.5, 2.0), "sigma")


def test_blur_keeps_a_flat_image():
    x = images(8, 3, 1, 1).expand(-1, -1, 33, 50)
    assert (fgssl.gaussian_blur(x, seeded(), p=1) - x).abs().max() < 1e-6, "weights must sum to 1"


def test_normalize_is_imagenets_and_denormalize_undoes_it():
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    x = images(4, 3, 5, 7)
    y = fgssl.normalize(x)
    for channel in range(3):
        wanted = (x[:, channel] - mean[channel]) / std[channel]
        assert torch.allclose(y[:, channel], wanted, atol=1e-6)
    assert torch.allclose(fgssl.denormalize(y), x, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# All of them
# ------------------------------------------------------------------------------------------------


def simclr_view(x, rng):
    argv = "--out none --size 24 --min-crop 0.2 --color 0.5 --gray 0.2 --blur 0.5"
    return train_simclr.random_view(x, train_simclr.arguments(argv.split()), rng)


OPERATIONS = {
    "crop": lambda x, rng: fgssl.random_resized_crop(x, 13, rng),
    "hflip": fgssl.hflip,
    "jitter": fgssl.color_jitter,
    "grayscale": fgssl.grayscale,
    "blur": fgssl.gaussian_blur,
    "simclr view": simclr_view}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_seed_repeats_to_the_bit_and_every_image_stands_alone(name):
    operation, x = OPERATIONS[name], images(16, 3, 31, 27)
    before, state = x.clone(), torch.get_rng_state()
    y = operation(x, seeded(1))
    assert torch.equal(x, before), "the input was changed in place"
    assert torch.equal(torch.get_rng_state(), state), "drawn from torch's global generator"
    assert torch.equal(y, operation(x, seeded(1))), "one seed, two results: draw from rng alone"
    assert not torch.equal(y, operation(x, seeded(2))), (
        "two seeds, one result for all 16 images: does each image have a draw of its own, of rng?")
    for i in (0, 3, 15):
        other = x.clone()
        other[i] = images(3, 31, 27, seed=i + 9)
        changed = (operation(other, seeded(1)) != y).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [i], "one image's view depends on another's"


def test_two_epochs_show_different_views():
    x, rng = torch.randint(0, 256, (20, 3, 31, 27), dtype=torch.uint8, generator=seeded()), seeded()
    first, second = (simclr_view(x, rng) for _ in range(2))
    assert (first != second).flatten(1).any(1).all(), "a view that stays is learnt by heart"


def test_either_view_of_a_pair_may_be_distorted():
    """Of flat images, crop and blur change none; jitter or grey changes 1 - 0.2 x 0.8 of them."""
    x = images(800, 3, 1, 1, low=0.2, high=0.8).expand(-1, -1, 24, 24)
    views = simclr_view(x.repeat(2, 1, 1, 1), seeded())
    changed = (views - x.repeat(2, 1, 1, 1)).abs().amax((1, 2, 3)) > 1e-3
    first, second = changed.chunk(2)
    assert_share(first, 0.84, "first views distorted")
    assert_share(second, 0.84, "second views distorted")
    assert_share(first & second, 0.84 ** 2, "pairs of which both are (drawn apart)")
