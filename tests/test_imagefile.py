"""What is checked of an image file before and while it is decoded."""

import errno
import io
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from damage import damaged
from PIL import EpsImagePlugin, Image

import fgssl
from imagesets import imagefile
from imagesets.decode import Source, scale_of_set
from imagesets.files import image_extensions


@pytest.fixture(scope="module")
def photo():
    """300 x 200 pixels that compress as a photograph does: a few kB for each kind of file."""
    y, x = np.mgrid[:200, :300]
    waves = [128 + 70 * np.sin(x / a) + 40 * np.cos(y / b) for a, b in ((9, 5), (13, 8), (21, 4))]
    noise = np.random.default_rng(0).normal(0, 9, (200, 300, 3))
    return Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8))


def saved(image, **how):
    content = io.BytesIO()
    image.save(content, **how)
    return content.getvalue()


def read(content, folder, side=64, box=None):
    (folder / "image").write_bytes(content)
    return fgssl.decode(Source(folder / "image", box), side)


# Formats and memory -------------------------------------------------------------------------------


def test_a_file_called_jpg_that_is_eps_starts_no_program(tmp_path, monkeypatch):
    """Ghostscript ran on whatever a data set brought."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **more: started.append(1))
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **more: started.append(2))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(fgssl.UserError, match="none of JPEG, PNG, WEBP"):
        read(eps, tmp_path)
    assert not started


def test_the_formats_are_those_of_the_page():
    page = (ROOT / "imagesets/README.md").read_text()
    listed = re.search(r"\*\*Formats\.\*\* (.*?)\. ", page, re.S)[1]
    names = {"JPEG 2000": "JPEG2000", "WebP": "WEBP"}
    listed = [names.get(name, name) for name in re.findall(r"JPEG 2000|[A-Z]\w+", listed)]
    assert sorted(listed) == sorted(imagefile.FORMATS)
    assert image_extensions() >= {".jpg", ".png", ".webp", ".tif", ".gif", ".bmp", ".pgm"}
    assert image_extensions().isdisjoint({".eps", ".psd", ".wmf", ".ico"})


def tiny_png_of(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_pixels_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(
        tmp_path, monkeypatch):
    """57 bytes took 3.2 GB, in each thread."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    message = r"its 20000 x 20000 pixels take 1.6 GB to decode, and the most is 1 GB. Make it small"
    with pytest.raises(fgssl.UserError, match=message):
        read(tiny_png_of(20000, 20000), tmp_path)


@pytest.mark.parametrize("progressive, fits", [(False, True), (True, False)])
def test_a_large_jpeg_is_decoded_reduced(photo, tmp_path, monkeypatch, progressive, fits):
    """Also around a box, for which it is otherwise decoded whole; a progressive one needs memory
    for all its coefficients, however small the picture."""
    content = saved(photo, format="JPEG", quality=95, progressive=progressive)
    box = 40, 8, 160, 160
    whole = read(content, tmp_path, box=box).astype(int)
    monkeypatch.setattr(imagefile, "MOST_BYTES", 100_000 + 4 * 150 * 100)
    if not fits:
        with pytest.raises(fgssl.UserError, match="its 300 x 200 pixels take"):
            read(content, tmp_path, box=box)
        return
    reduced = read(content, tmp_path, box=box).astype(int)
    assert 0 < np.abs(reduced - whole).mean() < 8, "another place makes 30 and more"
    with pytest.raises(fgssl.UserError, match="its 300 x 200 pixels take"):
        read(saved(photo, format="PNG"), tmp_path)


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from PIL import Image
from imagesets import decode, imagefile
def peak(kind):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status")
                       if line.startswith(kind))
estimate, fit = {}, imagefile.bytes_to_decode
def noted(image, fixed, *more):
    estimate["need"] = fixed + fit(image)
imagefile.fit_memory = noted
for file in sorted(Path(sys.argv[2]).iterdir()):
    open("/proc/self/clear_refs", "w").write("5")            # the peak begins here
    before = peak("VmRSS")
    decode.decode(decode.Source(file, (0, 0, 1500, 1500)), 16)
    print(file.name, peak("VmHWM") - before, estimate["need"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to measure with")
def test_no_format_takes_more_memory_than_is_estimated(tmp_path):
    """The limit is one of memory, and holds for every format and mode."""
    y, x = np.mgrid[:1500, :1500]
    rgb = Image.fromarray(np.dstack([x // 6, y // 6, (x + y) // 12]).astype(np.uint8))
    clear, grey, turned = rgb.convert("RGBA"), rgb.convert("L"), Image.Exif()
    clear.putalpha(grey)
    turned[0x0112] = 6
    deep = Image.fromarray(x.astype(np.uint16))
    for name, image, how in (
            ("rgb.png", rgb, {}), ("turned.png", rgb, {"exif": turned}), ("clear.png", clear, {}),
            ("grey.png", grey, {}), ("deep.png", deep, {}), ("palette.png", rgb.quantize(9), {}),
            ("rgb.jpg", rgb, {}), ("cmyk.jpg", rgb.convert("CMYK"), {}),
            ("steps.jpg", rgb, {"progressive": True, "subsampling": 0}), ("rgb.webp", rgb, {}),
            ("clear.webp", clear, {}), ("one_strip.tif", rgb, {
                "compression": "tiff_adobe_deflate", "tiffinfo": {278: 1500}}),
            ("float.tif", Image.fromarray((x / 2).astype(np.float32)), {}),
            ("rgb.gif", rgb, {}), ("rgb.bmp", rgb, {}), ("rgb.ppm", rgb, {})):
        image.save(tmp_path / name, **how)
    lines = subprocess.run([sys.executable, "-c", MEASURE, ROOT, tmp_path], text=True,
                           capture_output=True, check=True).stdout.split()
    assert len(lines) == 3 * 16
    for name, found, estimate in zip(lines[::3], map(int, lines[1::3]), map(int, lines[2::3])):
        assert found < estimate + 2_000_000, f"{name} took {found / 1500 ** 2:.1f} bytes a pixel"


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, how, silent", [
    ("PNG", {}, 0), ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
    ("WEBP", {}, None), ("TIFF", {"compression": "tiff_lzw"}, None), ("GIF", {}, None),
    ("JPEG", {"quality": 90}, None)], ids=str)
def test_damage_is_not_decoded_to_another_picture(photo, tmp_path, kind, how, silent):
    """Where the format has checksums, none; elsewhere, no lost sector. Pillow decoded 389 of 1,598
    damaged files to another picture."""
    content, rng = saved(photo, format=kind, **how), random.Random(0)
    whole, counts = read(content, tmp_path), {}
    for name in ["cut", "zeros", "lost"] + ["bit", "byte"] * (silent == 0):
        for _ in range(25):
            try:
                found = read(damaged(content, name, rng), tmp_path)
            except fgssl.UserError:
                continue
            if not np.array_equal(found, whole):
                counts[name] = counts.get(name, 0) + 1
    assert not counts


def test_every_chunk_of_a_png_is_compared_with_its_checksum(photo, tmp_path):
    """Pillow skips those of the pixels."""
    content = saved(photo, format="PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    for at in (content.index(b"IDAT") + 2000, content.index(b"eXIf") + 5, len(content) - 14):
        broken = bytearray(content)
        broken[at] ^= 4
        with pytest.raises(fgssl.UserError, match="checksum of b'(IDAT|eXIf)' at"):
            read(broken, tmp_path)


def test_what_libjpeg_only_warns_of_is_named(photo, tmp_path):
    """Pillow drops the warnings: a JPEG with a lost block was grey below it."""
    content = saved(photo, format="JPEG")
    middle = len(content) // 2
    with pytest.raises(fgssl.UserError, match="truncated"):
        read(content[:middle] + content[middle + 600:], tmp_path)
    with pytest.raises(fgssl.UserError, match="corrupt JPEG data"):
        read(content[:-2] + b"\x5a" * 40 + content[-2:], tmp_path)
    rows = saved(photo, format="JPEG", restart_marker_rows=1)
    first, second = (rows.index(bytes((0xFF, mark))) for mark in (0xD1, 0xD2))
    with pytest.raises(fgssl.UserError, match="restart markers"):
        read(rows[:first] + rows[second:], tmp_path)


def test_a_whole_jpeg_is_read_whatever_follows_it(photo, tmp_path):
    """A camera's second picture, a film: what ends the pixels is the first end."""
    content = saved(photo, format="JPEG")
    whole = read(content, tmp_path)
    two = saved(photo, format="MPO", save_all=True, append_images=[photo.rotate(180)])
    for name, more in (("junk", content + b"film" * 99), ("second", content + content),
                       ("filled", content[:-2] + b"\xff" * 9 + content[-2:]), ("MPO", two),
                       ("rows", saved(photo, format="JPEG", restart_marker_blocks=3))):
        assert np.array_equal(read(more, tmp_path), whole), name


# Errors that may pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(),
                                   OSError(errno.ESTALE, "Stale file handle")], ids=str)
@pytest.mark.parametrize("times", [2, 99])
def test_errors_that_may_pass_are_tried_again_and_never_remembered(
        photos, tmp_path, monkeypatch, error, times):
    """Ten of them, and ten images were missing in all later runs."""
    monkeypatch.setenv("FGSSL_CACHE", str(tmp_path))
    monkeypatch.setattr(imagefile, "WAITS", (0, 0, 0))
    whole, left = imagefile.load_image, [times]

    def failing(path, *more, **others):
        if path.name == "dl7.png" and left[0]:
            left[0] -= 1
            raise error
        return whole(path, *more, **others)

    monkeypatch.setattr("imagesets.decode.load_image", failing)
    data = fgssl.load_data(photos, skip_bad=True)
    if times == 2:
        assert len(data.cached("train", 24).images) == 28
        return
    with pytest.raises(fgssl.PassingError, match="dl7.png: .*, 4 times. It may be the disk"):
        data.cached("train", 24)
    left[0] = 0
    assert len(data.cached("train", 24).images) == 28, "the next run reads them all"


def test_the_scale_of_a_set_does_not_depend_on_an_error_that_passes(tmp_path, monkeypatch):
    """The brightest image was left out of the common range, and the others were brighter."""
    monkeypatch.setattr(imagefile, "WAITS", (0,))
    for name, value in (("1", 200), ("2", 900)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"{name}.png")
    whole, failed = imagefile.load_image, []

    def failing(path, *more):
        if path.name == "2.png" and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return whole(path, *more)

    paths = [tmp_path / "1.png", tmp_path / "gone.png", tmp_path / "2.png"]
    monkeypatch.setattr("imagesets.decode.load_image", failing)
    assert scale_of_set(paths) == (0, 1023) and failed


def test_other_errors_are_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(imagefile, "WAITS", (99,))
    with pytest.raises(fgssl.UserError, match="gone.png: .*No such file"):
        fgssl.decode(tmp_path / "gone.png", 8)
