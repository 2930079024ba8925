"""Pictures drawn with Pillow: what stands where."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import pictures


def near(pixel, colour, tolerance=3):
    return np.abs(np.subtract(pixel, colour)).max() <= tolerance


def flat(*colour):
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)


def test_a_long_legend_wraps_instead_of_leaving_the_picture():
    names = [f"an encoder with a long name {i}" for i in range(5)]
    picture = pictures.curve({name: ([0, 1], [0.0, 1.0]) for name in names})
    row = {i: {y for y in range(100) for x in range(picture.width)
               if near(picture.getpixel((x, y)), ImageColor.getrgb(pictures.COLORS[i]), 0)}
           for i in range(5)}
    tops = [min(row[i]) for i in range(5)]
    assert tops == sorted(tops) and tops[0] < tops[-1] < 70, "every name has its line, in rows"
    assert near(picture.getpixel((picture.width - 4, tops[0])), (255, 255, 255))


def test_a_grid_shows_each_image_in_its_row_and_column(tmp_path):
    first = torch.stack([flat(255, 0, 0), flat(0, 255, 0), flat(0, 0, 255)])
    second = torch.stack([flat(9, 80, 200), flat(90, 90, 90)]).float() / 255
    second[1, 0], second[1, 1] = 1.3, -0.2  # brighter than white, darker than black
    pictures.grid(tmp_path / "a.png", [first, second], side=32)
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (4 + 3 * 36, 4 + 2 * 36), "32 pixels an image and gaps of 4"
    for r, row in enumerate(([(255, 0, 0), (0, 255, 0), (0, 0, 255)],
                             [(9, 80, 200), (255, 0, 90), (255, 255, 255)])):
        for c, colour in enumerate(row):
            assert near(picture.getpixel((20 + 36 * c, 20 + 36 * r)), colour), (r, c)
    pictures.grid(tmp_path / "b.png", [first, second], ("image", "a longer title"), side=32)
    titled = Image.open(tmp_path / "b.png")
    assert titled.height == picture.height and titled.width > picture.width + 60
    assert near(titled.getpixel((titled.width - 20, 20)), (0, 0, 255)), "titles stand at the left"


def test_captions_stand_under_their_images_and_move_the_rows_below(tmp_path):
    row = torch.stack([flat(255, 0, 0), flat(0, 255, 0)])
    pictures.grid(tmp_path / "a.png", [row, row, row], side=64, captions=[[], ["28.1 dB", "9 dB"]])
    picture = Image.open(tmp_path / "a.png")
    assert picture.height == 4 + 3 * 68 + 16, "one row of the three has captions"
    for top in (4, 72, 156):
        assert near(picture.getpixel((10, top)), (255, 0, 0))
        assert near(picture.getpixel((10, top + 63)), (255, 0, 0))
    under = np.asarray(picture.convert("L"))[136:156]
    assert (under[:, 4:68] < 99).any() and (under[:, 72:136] < 99).any(), "each its own"
    assert (np.asarray(picture.convert("L"))[68:72] == 255).all(), "none where none was given"


def drawn(picture, colour, columns):
    """The rows in which a colour is found, averaged, in each of the given columns."""
    pixels = np.asarray(picture).astype(int)
    hit = np.abs(pixels - np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).max(2) < 30
    return [np.flatnonzero(hit[:, x]).mean() for x in columns]


def test_a_curve_stands_where_its_numbers_say():
    line = {"rising": ([0, 10], [0.0, 1.0])}
    picture = pictures.curve(line, {"half": 0.5}, "step")
    assert picture.size == (640, 360)
    left, middle, right = drawn(picture, pictures.COLORS[0], (100, 300, 480))
    assert left > middle > right, "a rising curve rises to the right"
    assert (left - middle) / 200 == pytest.approx((middle - right) / 180, rel=0.05), "straight"
    dashes = drawn(picture, pictures.COLORS[1], (186, 476))  # 16 of each 20 columns hold no gap
    assert dashes[0] == dashes[1], "a yardstick is level"
    crossing = np.interp(dashes[0], [right, left], [480, 100])
    assert crossing == pytest.approx(64 + (624 - 64) / 2, abs=5), "y = 0.5 is met half way"


@pytest.mark.parametrize("ys", [[0.5, 0.5, 0.5], [0.5, math.nextafter(0.5, 1), 0.5],
                                [1e-12, 2e-12, 3e-12], [0.0, 0.0, 0.0], [1e9, 1e9 + 1, 1e9],
                                [-5.0, 3.0, 1e6]])
def test_a_curve_of_all_but_equal_numbers_does_not_end_a_run(ys):
    """Drawn after hours of training: a division by zero there would be the last thing one sees."""
    for n in (1, 3):
        picture = pictures.curve({"loss": ([1, 2, 3][:n], ys[:n])}, {"chance": ys[0]})
        assert picture.getextrema() != ((255, 255),) * 3


def test_error_bars_span_two_deviations_and_places_have_names():
    picture = pictures.curve({"mean": ([0, 1], [2.0, 4.0], [1.0, 0.0])}, xnames=["5", "all"])
    pixels = np.asarray(picture).astype(int)
    blue = np.abs(pixels - np.array((0x33, 0x66, 0xaa))).max(2) < 30
    x = [64 + (624 - 64) * place for place in (0.25, 0.75)]  # halves of the axis, one a place
    bar, point = (np.flatnonzero(blue[28:, round(at)]) for at in x)
    assert np.ptp(point) < 12, "a deviation of 0 is no bar"
    per_unit = (bar.mean() - point.mean()) / 2               # pixels between 2 and 4
    assert np.ptp(bar) == pytest.approx(2 * per_unit, abs=4), "from 1 to 3"


def test_a_name_keeps_its_colour_where_another_has_no_points():
    picture = pictures.curve({"a": ([], []), "b": ([0, 1], [0.0, 1.0])}, {"chance": 0.5})
    assert drawn(picture, pictures.COLORS[1], [300]), "b is second, though alone"
    assert not (np.abs(np.asarray(picture).astype(int) - (0x33, 0x66, 0xaa)).max(2) < 30).any()


def test_a_scatter_draws_each_point_in_its_groups_colour():
    groups = {f"group {i}": ([i], [i]) for i in range(9)}
    picture = pictures.scatter(groups, "across", "up", rest=([0], [8]))
    pixels = np.asarray(picture).astype(int)
    places = []
    for i in (0, 3):  # seven discs; 7 and 8 are rings in the colours of 0 and 1
        hit = np.abs(pixels - np.array(ImageColor.getrgb(pictures.COLORS[i])))
        ys, xs = np.nonzero(hit.max(2)[:, :600] < 30)
        places.append((xs.min(), ys.max()))
    assert places[0][0] < places[1][0] and places[0][1] > places[1][1], "y points up"
    legend = pixels[:, 620:].min(2).min(1) < 200
    assert np.count_nonzero(np.diff(legend.astype(int)) == 1) == 10, "nine groups, and the others"


def test_stacked_panels_stand_below_each_other():
    panels = [Image.new("RGB", (8, 5), color) for color in ("red", "blue")]
    sheet = pictures.stack(panels)
    assert sheet.size == (8, 10)
    assert sheet.getpixel((4, 4)) == (255, 0, 0) and sheet.getpixel((4, 5)) == (0, 0, 255)


@pytest.mark.parametrize("low, high", [(0, 1), (1, 9300), (-0.5, 0.5), (0.1, 0.3), (4.84, 5.54),
                                       (1e-12, 3e-12), (-3, 7e5), (1e9, 1e9 + 7), (0, 1e-300)])
def test_ticks_are_round_even_and_cover_the_range(low, high):
    ticks = pictures.ticks(low, high)
    steps = np.diff(ticks)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack, "a point would lie outside"
    assert 3 <= len(ticks) <= 12 and steps.min() > 0
    assert steps.max() - steps.min() <= 1e-6 * steps.max(), "evenly spaced"
    mantissa = steps.mean() / 10 ** math.floor(math.log10(steps.mean()) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3, f"step {steps.mean():g}"


def test_a_heatmap_has_row_0_on_top_and_darkens_with_its_values(tmp_path):
    matrix = [[0.0, 1.0], [0.5, 0.25], [1.0, 0.0]]
    pictures.heatmap(tmp_path / "a.png", matrix, "true", "taken for")
    picture = Image.open(tmp_path / "a.png").convert("L")
    cell = np.array([[picture.getpixel((30 + 24 * c + 12, 30 + 24 * r + 12)) for c in (0, 1)]
                     for r in (0, 1, 2)])
    assert (np.argsort(cell.ravel(), kind="stable") == [1, 4, 2, 3, 0, 5]).all(), cell
    assert cell[0, 0] == 255 and cell[0, 1] < 40
    shades = pictures.heat(np.linspace(0, 1, 50)).sum(-1, dtype=int)
    assert (np.diff(shades) < 0).all(), "darker only"
    assert (pictures.heat([math.nan, -1]) == 255).all()
    assert (pictures.heat(7) == pictures.heat(1)).all()
    names = [f"species {i}" for i in range(200)]
    pictures.heatmap(tmp_path / "b.png", np.eye(200), names=names)
    assert max(Image.open(tmp_path / "b.png").size) < 1100, "200 classes still fit a screen"
