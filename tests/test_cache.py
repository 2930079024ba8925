"""The image cache: what is kept, what is decoded again, what is refused."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fgssl
import imagesets
from imagesets import cache, cache_file, imagefile
from imagesets.errors import PassingError, UserError


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
    """The names of the files that are decoded from now on; Ctrl-C at the file `stop`, after which
    none is, however late the main thread hears of it."""
    decode, names, stopped = cache.decode, [], threading.Event()

    def counted(source, side):
        if source.path.name == stop:
            stopped.set()
        if stopped.is_set():
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
    assert [file.suffix for file in (photos.parent / "cache").iterdir()] == [".part"]
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [20 * i for i in range(8)]
    assert sorted(names) == ["5.png", "6.png", "7.png"]
    assert [file.suffix for file in (photos.parent / "cache").iterdir()] == [".npy"]


KILLED = """
import os, signal, sys, time
import fgssl
from imagesets import cache
decode = cache.decode
def killed(source, side):
    if source.path.name == "5.png":
        time.sleep(1)  # the others are written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(source, side)
cache.decode = killed
from test_cache import dataset
data = dataset(cache.Path(sys.argv[1]))
fgssl.Dataset(data.records, workers=1).cached("train", 24)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")
def test_what_was_decoded_survives_kill_9(photos, monkeypatch):
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent)))
    done = subprocess.run([sys.executable, "-c", KILLED, str(photos)],
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    file = next((photos.parent / "cache").glob("*.part"))
    with open(file, "ab") as part:
        part.write(b"half a row")
    names = count_decoded(monkeypatch)
    assert values(dataset(photos).cached("train", 24)) == [20 * i for i in range(8)]
    assert set(names) >= {"5.png", "6.png", "7.png"} and len(names) < 8
    fgssl.main(["cache", "--clear"])
    assert list((photos.parent / "cache").iterdir()) == []


def test_a_file_that_another_process_is_writing_gives_the_rows_it_had(photos, monkeypatch):
    dataset(photos).cached("train", 24)
    (whole,) = cache_files(photos)
    content, row = whole.read_bytes(), whole.stat().st_size // 8
    growing = whole.with_name(f".{whole.name}.part")
    growing.write_bytes(content[:cache_file.HEADER + 5 * row])
    whole.unlink()

    def memory_map(file, side, real=cache.memory_map):
        rows = real(file, side)
        if file == growing:
            growing.write_bytes(content)
        return rows

    monkeypatch.setattr(cache, "memory_map", memory_map)
    assert values(dataset(photos).cached("train", 24)) == [20 * i for i in range(8)]


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
    assert "train  8 images of 24 px  14.2 kB" in printed and "in " + str(photos.parent) in printed
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


def test_a_failing_disk_ends_a_run_and_costs_no_image(photos, monkeypatch):
    """Passing errors of 10 files under --skip-bad: these 10 images were gone in all later runs."""
    def fail(path, *mode, **options):
        if Path(path).stem in ("2", "5"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, *mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(imagefile, "open", fail, raising=False)
        patch.setattr(imagefile, "WAITS", ())
        with pytest.raises(PassingError, match="2.png: Input/output error"):
            dataset(photos, skip_bad=True).cached("train", 24)
    split = dataset(photos, skip_bad=True).cached("train", 24)
    assert values(split) == [20 * i for i in range(8)] and split.labels.tolist() == list(range(8))


def test_a_set_without_one_readable_image_is_an_error_even_with_skip_bad(photos):
    for path in photos.iterdir():
        path.write_text("no image")
    with pytest.raises(ValueError, match="0.png"):
        dataset(photos, skip_bad=True).cached("train", 24)
