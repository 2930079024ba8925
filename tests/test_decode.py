"""What every kind of image file becomes, and which square of it."""

import io
import math
import struct

import numpy as np
import pytest
from PIL import Image

import fgssl
from imagesets.decode import PADDING, Source, scale_of_set


def palette(transparent):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 255, 200, 60, 30])
    if transparent:
        image.info["transparency"] = 1
    return image


RED = (200, 60, 30)
MODES = {  # name: (image, file type, the colour that a viewer shows)
    "RGB": (Image.new("RGB", (6, 6), RED), "png", RED),
    "grey": (Image.new("L", (6, 6), 100), "png", (100, 100, 100)),
    "grey jpeg": (Image.new("L", (64, 64), 100), "jpeg", (100, 100, 100)),
    "1 bit": (Image.new("1", (6, 6), 1), "png", (255, 255, 255)),
    "CMYK": (Image.new("CMYK", (64, 64), (0, 179, 217, 55)), "jpeg", (200, 60, 30)),
    "palette": (palette(transparent=False), "png", RED),
    "palette, transparent": (palette(transparent=True), "png", (255, 255, 255)),
    "RGBA, clear": (Image.new("RGBA", (6, 6), (*RED, 0)), "png", (255, 255, 255)),
    "RGBA, half clear": (Image.new("RGBA", (6, 6), (0, 100, 200, 128)), "png", (127, 177, 227)),
    "LA": (Image.new("LA", (6, 6), (0, 51)), "png", (204, 204, 204)),
    "16 bit": (Image.new("I;16", (6, 6), 32768), "png", (128, 128, 128)),
    "16 bit, dark": (Image.new("I;16", (6, 6), 200), "png", (1, 1, 1)),
    "16 bit tiff": (Image.new("I;16", (6, 6), 32768), "tiff", (128, 128, 128)),
    "float": (Image.new("F", (6, 6), 0.5), "tiff", (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(name, tmp_path):
    """Bugs: 16 bits clipped to white, the hidden colour of clear pixels shown."""
    image, kind, colour = MODES[name]
    image.save(tmp_path / "image", kind)
    pixels = fgssl.decode(tmp_path / "image", 5)
    assert pixels.shape == (3, 5, 5) and pixels.dtype == np.uint8
    tolerance = 4 if kind == "jpeg" else 1  # JPEG rounds in YCbCr; the others round once
    shown = pixels.reshape(3, -1).T.astype(int)
    assert np.abs(shown - colour).max() <= tolerance, f"shown {shown[0]}, wanted {colour}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_numbers_are_refused(tmp_path, value):
    pixels = np.full((6, 6), 0.5, np.float32)
    pixels[2, 3] = value
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff.*not finite"):
        fgssl.decode(tmp_path / "a.tiff", 5)


SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top",
         6: "right top", 7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])  # Pillow itself turns a TIFF, on load
def test_exif_orientation_is_obeyed(orientation, kind, tmp_path):
    """EXIF standard: where the stored row 0 and column 0 appear."""
    row, column = SIDES[orientation].split()
    other = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    stored = np.zeros((32, 32, 3), np.uint8)
    corners = {}
    for y, x, value in ((0, 0, 250), (0, 1, 180), (1, 0, 110), (1, 1, 40)):
        stored[16 * y:16 * y + 16, 16 * x:16 * x + 16] = value
        corners[frozenset((other[row] if y else row, other[column] if x else column))] = value
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image", kind, exif=exif)
    seen = fgssl.decode(tmp_path / "image", 32)[0]
    for y, x, corner in ((4, 4, "top left"), (4, 28, "top right"), (28, 4, "bottom left"),
                         (28, 28, "bottom right")):
        assert abs(int(seen[y, x]) - corners[frozenset(corner.split())]) < 12, corner


@pytest.mark.parametrize("exif", [
    b"MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    + struct.pack(">HHII", 0x011A, 2, 1, 0x41000000) + bytes(4),  # a resolution of the wrong type
    b"MM\0*\0\0",  # cut short
    b"not what it should be"], ids=["mistyped", "cut", "junk"])
def test_damaged_exif_is_ignored(exif, tmp_path):
    Image.new("RGB", (12, 8), RED).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    assert fgssl.decode(tmp_path / "a.png", 4)[:, 2, 2].tolist() == list(RED)


def test_the_centre_square_is_kept(tmp_path):
    thirds = np.repeat(np.array([10, 100, 200], np.uint8), 20)
    Image.fromarray(np.tile(thirds, (20, 1))).save(tmp_path / "wide.png")
    Image.fromarray(np.tile(thirds[:, None], (1, 20))).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        inside = fgssl.decode(tmp_path / name, 10)[:, 1:-1, 1:-1]  # its rim is interpolated
        assert (inside == 100).all(), name
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert (fgssl.decode(tmp_path / "dot.png", 8) == np.reshape(RED, (3, 1, 1))).all()


def test_draft_mode_gives_the_same_image(tmp_path):
    """A draft smaller than the target would be blurred; a box in file pixels would be shifted."""
    y, x = np.mgrid[:200, :304]
    waves = 128 + 60 * np.sin(x / 3) + 60 * np.cos(y / 4)
    Image.fromarray(waves.astype(np.uint8)).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    for side in (50, 40, 101):  # drafts of 1/4, 1/4 and none
        whole = Image.open(tmp_path / "a.jpg").crop((52, 0, 252, 200))
        whole = np.asarray(whole.resize((side, side), Image.BILINEAR), float)
        error = np.abs(fgssl.decode(tmp_path / "a.jpg", side).transpose(1, 2, 0) - whole).mean()
        assert error < 4, f"{error:.1f} at side {side}: half a pixel of shift makes 12 to 24"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns before its errors
def test_any_error_names_the_file(tmp_path):
    """One struct.error without a name would end a run of a million images."""
    image, damaged, rng = Image.effect_noise((40, 30), 60), 0, np.random.default_rng(0)
    for kind in ("jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm"):
        whole = io.BytesIO()
        image.save(whole, kind)
        for cut in np.linspace(0, len(whole.getvalue()) - 1, 25).astype(int):
            for flips in (0, 8):
                content = bytearray(whole.getvalue()[:cut] if not flips else whole.getvalue())
                for place in rng.integers(0, len(content), flips):
                    content[place] = rng.integers(256)
                (tmp_path / "bad").write_bytes(content)
                try:
                    fgssl.decode(tmp_path / "bad", 8)
                except ValueError as error:
                    damaged += 1
                    assert str(tmp_path / "bad") in str(error)
    assert damaged > 150, "nothing was damaged"


# ------------------------------------------------------------------------------------------------
# Squares
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box, square", [
    ((10, 20, 30, 10), (10, 10, 30)),      # wide: extended above and below
    ((10, 20, 10, 30), (0, 20, 30)),       # tall, at the left edge: moved in
    ((0, 0, 100, 80), (0, -10, 100)),      # the whole image: the square extends beyond it
    ((5, 0, 90, 80), (5, -5, 90)),         # higher than the image: evenly above and below
    ((90, 70, 30, 30), (90, 70, 10)),      # partly outside: what of it is inside
    (None, (10, 0, 80))])
def test_the_square_around_a_box(box, square):
    assert fgssl.Source("x", box).square(100, 80) == square
    left, top, side = (2 * value for value in square)
    assert fgssl.Source("x", box).square(200, 160, scale=2) == (left, top, side), "twice as large"


def test_a_box_outside_its_image_is_refused(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    for box in ((20, 0, 5, 5), (0, 10, 5, 5), (-5, 0, 5, 5), (1, 1, 0, 5), (1, 1, 5, -5),
                (np.nan, 1, 5, 5)):
        with pytest.raises(ValueError, match="a.png.*box.*not in the image"):
            fgssl.decode(fgssl.Source(tmp_path / "a.png", box), 8)


def test_a_random_box_is_held_by_its_square():
    """17.8 % of CUB's boxes lost more than 1 %, the worst more than half: the square was cut."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(1, 400, 2)
        x, y = rng.uniform(0, 0.9) * width, rng.uniform(0, 0.9) * height
        w, h = rng.uniform(0.01, 1) * (width - x), rng.uniform(0.01, 1) * (height - y)
        left, top, side = Source("x", (x, y, w, h)).square(width, height)
        assert side == pytest.approx(max(w, h)), "the smallest"
        assert left - 1e-6 <= x and x + w <= left + side + 1e-6
        assert top - 1e-6 <= y and y + h <= top + side + 1e-6
        for start, extent in ((left, width), (top, height)):  # in the picture, or evenly beyond
            beyond = max(-start, 0) - max(start + side - extent, 0)
            assert beyond == pytest.approx(0, abs=1e-6) and (start >= 0 or side > extent)


def test_the_whole_picture_is_shown_with_equal_padding(tmp_path):
    """Where 12 of 36 rows are picture, and the banner is not."""
    pixels = np.full((20, 36, 3), 200, np.uint8)
    pixels[12:] = 0
    pixels[:, :3], pixels[:, -3:] = 250, 250
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = fgssl.decode(Source(tmp_path / "a.png", banner=8, fit="pad"), 36)
    assert (image[:, :12] == np.reshape(PADDING, (3, 1, 1))).all()
    assert (image[:, 24:] == np.reshape(PADDING, (3, 1, 1))).all()
    assert (image[0, 12:24] == pixels[:12, :, 0]).all()
    tall = Image.fromarray(pixels[:12].transpose(1, 0, 2).copy())
    tall.save(tmp_path / "b.png")
    small = fgssl.decode(Source(tmp_path / "b.png", fit="pad"), 12)
    assert (small[:, 6, :4] == np.reshape(PADDING, (3, 1))).all() and (small[0, :, 6] > 180).all()
    box = fgssl.decode(Source(tmp_path / "a.png", (0, 0, 36, 12), 8), 36)
    assert (box == image).all(), "a box of the whole picture is the whole picture"


def test_a_line_of_pixels_keeps_a_pixel_of_height(tmp_path):
    Image.new("RGB", (500, 1), RED).save(tmp_path / "a.png")
    image = fgssl.decode(Source(tmp_path / "a.png", fit="pad"), 10)
    assert (image == np.reshape(RED, (3, 1, 1))).all(0).sum() == 10


# ------------------------------------------------------------------------------------------------
# More than 8 bits
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1023, 4095, 16383, 65535])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_ramp_of_any_depth_becomes_the_same_ramp(top, kind, tmp_path):
    """12 bits in 16 were nearly black."""
    ramp = np.tile(np.linspace(0, top, 256).round().astype(np.uint16), (256, 1))
    Image.fromarray(ramp).save(tmp_path / "a", kind)
    seen = fgssl.decode(tmp_path / "a", 256)[0, 128].astype(int)
    assert np.abs(seen - np.arange(256)).max() <= 1, "one rounding"


@pytest.mark.parametrize("low, high, black", [(-1, 1, 0), (-0.5, 0.9, 64), (-300, 400, 90)])
def test_negative_values_are_kept_apart(low, high, black, tmp_path):
    """All of them were black. Zero becomes the middle; the range is symmetric."""
    pixels = np.linspace(low, high, 64, dtype=np.float32)[None].repeat(64, 0)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    seen = fgssl.decode(tmp_path / "a.tif", 64)[0, 32].astype(int)
    assert (np.diff(seen) >= 0).all() and len(set(seen)) > 50 and abs(seen[0] - black) <= 1


def test_floats_a_little_beyond_0_and_1_keep_their_contrast(tmp_path):
    """Resampling overshoots, and reflectances are noisy: the whole image was one grey."""
    pixels = np.linspace(-0.02, 1.04, 64, dtype=np.float32)[None].repeat(64, 0)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    seen = fgssl.decode(tmp_path / "a.tif", 64)[0, 32]
    assert np.abs(seen - (pixels[0].clip(0, 1) * 255)).max() <= 1, "one rounding"


def test_the_images_of_a_set_have_one_scale(tmp_path):
    """A dark image was brightened to the white of the others."""
    for name in ("ash", "oak"):
        (tmp_path / name).mkdir()
        for i in range(1, 4):
            grey = np.full((20, 20), 1000 * i, np.uint16)
            Image.fromarray(grey).save(tmp_path / name / f"{i}.png")
    data = fgssl.load_data(tmp_path)
    assert data.records.scale == (0, 4095)
    seen = {data.records.paths[row].name: fgssl.decode(data.source(row), 8)[0, 4, 4]
            for row in range(6)}
    assert seen == {"1.png": 62, "2.png": 125, "3.png": 187}
    Image.new("RGB", (9, 9)).save(tmp_path / "c.png")
    assert scale_of_set([tmp_path / "c.png", tmp_path / "none.png"]) is None
