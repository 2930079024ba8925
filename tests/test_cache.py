"""From files to the uint8 cache: what is kept, what is refused, what every kind of file becomes."""

import io
import math
import os
import struct

import numpy as np
import pytest
from PIL import Image

import imagesets
import fgssl
from imagesets import cache
from imagesets.errors import UserError

# ------------------------------------------------------------------------------------------------
# Image cache
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten images, the i-th of uniform grey 20 i, and an image cache for this test only."""
    monkeypatch.setenv("FGSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(10):
        grey(tmp_path / "photos" / f"{i}.png", 20 * i)
    return tmp_path / "photos"


def grey(path, value):
    Image.new("L", (40, 30), value).save(path)


def dataset(folder, skip_bad=False):
    """All images are in train except the last two, in val; image i has label i."""
    paths = sorted(folder.iterdir())
    splits = np.array(["train"] * (len(paths) - 2) + ["val"] * 2)
    records = imagesets.Records(paths, np.arange(len(paths)), [path.stem for path in paths], splits)
    return fgssl.Dataset(records, skip_bad)


def cache_files(folder):
    return sorted(folder.parent.glob("cache/**/*.npy"))


def values(split):
    return split.images[:, 0, 0, 0].tolist()


def test_the_cache_holds_each_image_of_a_split_once_in_order(photos):
    data = dataset(photos)
    train, val, test = (data.cached(split, 24) for split in ("train", "val", "test"))
    assert train.images.shape == (8, 3, 24, 24) and train.images.dtype == np.uint8
    assert isinstance(train.images, np.memmap), "large sets do not fit in memory"
    assert values(train) == [20 * i for i in range(8)] and values(val) == [160, 180]
    assert train.labels.tolist() == list(range(8)) and val.labels.tolist() == [8, 9]
    assert test.images.shape == (0, 3, 24, 24) and test.labels.shape == (0,)
    assert (train.images == train.images[:, :, :1, :1]).all(), "flat images stay flat"
    train.images[:] = 7
    times = [file.stat().st_mtime_ns for file in cache_files(photos)]
    again = dataset(photos).cached("train", 24)
    assert values(again) == [20 * i for i in range(8)], "a stray write reached the disk"
    assert times == [file.stat().st_mtime_ns for file in cache_files(photos)], "decoded again"
    assert data.cached("train", 16).images.shape == (8, 3, 16, 16)


def test_the_cache_keeps_colours_and_positions(photos):
    corners = np.array([[(250, 0, 9), (60, 61, 62)], [(7, 200, 100), (0, 0, 255)]], np.uint8)
    Image.fromarray(corners.repeat(12, 0).repeat(12, 1)).save(photos / "1.png")
    image = dataset(photos).cached("train", 24).images[1]
    assert (image.transpose(1, 2, 0)[::12, ::12] == corners).all()


def test_a_changed_file_makes_a_new_cache(photos):
    dataset(photos).cached("train", 24)
    size, mtime = (photos / "3.png").stat().st_size, (photos / "3.png").stat().st_mtime_ns
    grey(photos / "3.png", 61)
    assert (photos / "3.png").stat().st_size == size, "the test needs the same size"
    os.utime(photos / "3.png", ns=(mtime + 1, mtime + 1))
    assert values(dataset(photos).cached("train", 24))[3] == 61, "changed, of the same size"
    Image.effect_noise((90, 90), 50).save(photos / "3.png")
    os.utime(photos / "3.png", ns=(mtime + 1, mtime + 1))
    assert dataset(photos).cached("train", 24).images[3].std() > 5, "changed, of the same time"
    (photos / "0.png").rename(photos / "z.png")
    split = dataset(photos).cached("train", 24)
    assert values(split)[:2] == [20, 40] and len(split.labels) == 8, "another list of files"


def count_decoded(monkeypatch, stop=None):
    """The names of the files that are decoded from now on; Ctrl-C at the file `stop`."""
    decode, names = cache.decode, []

    def counted(source, side):
        if source.path.name == stop:
            raise KeyboardInterrupt
        names.append(source.path.name)
        return decode(source, side)

    monkeypatch.setattr(cache, "decode", counted)
    return names


def test_a_changed_file_costs_one_decode_and_replaces_the_older_cache(photos, monkeypatch):
    dataset(photos).cached("train", 24)
    grey(photos / "3.png", 61)
    os.utime(photos / "3.png", ns=(1, 1))
    grey(photos / "7b.png", 7)                               # and one more image moves 7.png to val
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [0, 20, 40, 61, 80, 100, 120, 140, 7]
    assert sorted(names) == ["3.png", "7b.png"]
    assert len(cache_files(photos)) == 1, "the older cache stays"
    dataset(photos).cached("val", 24), (photos / "0.png").unlink()
    assert values(dataset(photos).cached("train", 24)) == [20, 40, 61, 80, 100, 120, 140, 7]
    assert len(names) == 4, "8.png and 9.png of val alone"


def test_a_subset_reuses_the_rows_of_the_whole_and_leaves_its_cache(photos, monkeypatch):
    whole = dataset(photos)
    whole.cached("train", 24)
    names = count_decoded(monkeypatch)
    part = fgssl.Dataset(whole.records.take([0, 3, 8]), note="0.3 of the images")
    assert values(part.cached("train", 24)) == [0, 60] and names == []
    assert len(cache_files(photos)) == 2


def test_what_was_decoded_survives_ctrl_c(photos, monkeypatch):
    with monkeypatch.context() as patch:
        count_decoded(patch, stop="5.png")
        with pytest.raises(KeyboardInterrupt):
            fgssl.Dataset(dataset(photos).records, workers=1).cached("train", 24)
    assert [file.suffix for file in (photos.parent / "cache").iterdir()] == [".left"]
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [20 * i for i in range(8)]
    assert sorted(names) == ["5.png", "6.png", "7.png"]
    assert [file.suffix for file in (photos.parent / "cache").iterdir()] == [".npy"]


def test_what_was_decoded_survives_kill_9(photos, monkeypatch):
    """It leaves a file that announces more rows than it has, the last of them incomplete."""
    dataset(photos).cached("train", 24)
    file, = cache_files(photos)
    row = cache.row_type(24).itemsize
    file.with_name(f"{file.name}.123.part").write_bytes(file.read_bytes()[:-3 * row + 40])
    file.unlink()
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [20 * i for i in range(8)]
    assert sorted(names) == ["5.png", "6.png", "7.png"]


def test_a_bad_file_costs_no_decoding_of_the_others(photos, monkeypatch):
    spoil(photos)
    with pytest.raises(ValueError, match="2.png"):
        dataset(photos).cached("train", 24)
    for name in ("2.png", "6.png"):
        grey(photos / name, 9)
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [0, 20, 9, 60, 80, 100, 9, 140]
    assert sorted(names) == ["2.png", "6.png"]


def test_the_cache_is_listed_and_cleared(photos, capsys):
    kernel = photos.parent / "cache" / "build" / "a-b-c-d.npy"
    kernel.parent.mkdir(parents=True)
    kernel.touch()
    dataset(photos).cached("train", 24)
    fgssl.main(["cache"])
    printed = capsys.readouterr().out
    assert "train  8 images of 24 px  14.1 kB" in printed and "in " + str(photos.parent) in printed
    fgssl.main(["cache", "--clear"])
    assert cache_files(photos) == [kernel] and "removed from" in capsys.readouterr().out


def test_a_missing_home_names_the_variable_to_set(monkeypatch):
    monkeypatch.delenv("FGSSL_CACHE")

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "expanduser", expanduser)
    with pytest.raises(UserError, match="Set FGSSL_CACHE"):
        cache.cache_folder()


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """--out=~/runs made a folder named ~: a shell expands it only where a word begins."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FGSSL_CACHE", "~/kept")
    assert cache.cache_folder() == tmp_path / "kept"
    args = fgssl.parser("").parse_args(["--out=~/a", "--data=~/b", "--root=~/c"])
    assert [args.out, args.data, args.root] == [str(tmp_path / name) for name in "abc"]


def test_a_full_disk_names_the_cache_folder_and_leaves_nothing(photos):
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # 8 x 3 x 96 x 96 = 221,184
    try:
        with pytest.raises(OSError, match="cannot write the image cache in .*FGSSL_CACHE"):
            dataset(photos).cached("train", 96)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((photos.parent / "cache").rglob("*")) == []


def test_a_cache_folder_that_cannot_be_written_is_named(photos, monkeypatch):
    monkeypatch.setenv("FGSSL_CACHE", str(photos / "0.png" / "cache"))
    with pytest.raises(OSError, match="cannot write the image cache in .*0.png.cache.*FGSSL_CACHE"):
        dataset(photos).cached("train", 24)


def spoil(photos):
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:50])
    (photos / "6.png").write_text("<html>404 Not Found</html>")


def test_an_unreadable_image_stops_the_run_by_name(photos):
    spoil(photos)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.png.*1 more.*--skip-bad"):
            dataset(photos).cached("train", 24)
    (photos / "2.png").write_bytes((photos / "3.png").read_bytes())
    with pytest.raises(ValueError, match=r"6\.png"):
        dataset(photos).cached("train", 24)
    (photos / "6.png").write_bytes((photos / "3.png").read_bytes())
    assert values(dataset(photos).cached("train", 24)) == [0, 20, 60, 60, 80, 100, 60, 140]


def test_skip_bad_counts_them_and_keeps_each_label_with_its_image(photos, capsys):
    spoil(photos)
    for _ in range(2):  # the build, then the cache
        split = dataset(photos, skip_bad=True).cached("train", 24)
        assert split.labels.tolist() == [0, 1, 3, 4, 5, 7]
        assert values(split) == [20 * label for label in split.labels]
        assert "2 of 8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2.png"):
        dataset(photos).cached("train", 24)


def test_what_was_unreadable_is_kept_in_the_cache_itself(photos):
    """A second file could be lost, or read while another process writes it."""
    spoil(photos)
    dataset(photos, skip_bad=True).cached("train", 24)
    file, = (photos.parent / "cache").rglob("*")
    assert np.load(file)["image"].shape == (6, 3, 24, 24)


def test_a_link_to_nowhere_is_an_unreadable_image(photos):
    """git-annex and DVC leave such links. --skip-bad could not skip them."""
    (photos / "2.png").unlink()
    (photos / "2.png").symlink_to(photos / "gone.png")
    with pytest.raises(ValueError, match=r"2\.png.*--skip-bad"):
        dataset(photos).cached("train", 24)
    assert 2 not in dataset(photos, skip_bad=True).cached("train", 24).labels
    grey(photos / "gone.png", 99)
    assert values(dataset(photos).cached("train", 24))[2] == 99, "the file came back"


def test_a_set_may_have_the_longest_name_a_disk_allows(photos):
    """The cache's name is longer still: the disk refused it, and the error blamed free space."""
    data = dataset(photos)
    data.records = data.records._replace(name="鳥" * 85)     # 255 bytes
    assert len(data.cached("train", 24).images) == 8


def test_a_temporary_failure_is_not_cached(photos, monkeypatch):
    """A failure of a network disk changes neither size nor time of the file."""
    decode = cache.decode
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", lambda source, side: decode(
            photos / "gone" if source.path.name == "2.png" else source, side))
        with pytest.raises(ValueError, match="gone"):
            dataset(photos).cached("train", 24)
    assert len(dataset(photos).cached("train", 24).images) == 8


def test_a_set_without_one_readable_image_is_an_error_even_with_skip_bad(photos):
    for path in photos.iterdir():
        path.write_text("no image")
    with pytest.raises(ValueError, match="0.png"):
        dataset(photos, skip_bad=True).cached("train", 24)


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


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
