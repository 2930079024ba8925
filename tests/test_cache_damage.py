"""Damaged cache files: never other images, never a traceback, always a line that names the file."""

import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import cache_files, count_decoded, dataset

import fgssl
from imagesets import cache, cache_file

SIDE = 24


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten images of noise, each with colours of its own: eight of train and two of val."""
    monkeypatch.setenv("FGSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def rows_of(content):
    size = cache_file.row_type(SIDE).itemsize
    return [content[at:at + size] for at in range(cache_file.HEADER, len(content), size)]


def damage(kind, content, dice, other):
    """A damaged copy of a cache file's bytes. other: another file of the cache."""
    at = dice.randrange(len(content))
    if dice.random() < 0.3:
        at %= cache_file.HEADER + 40                         # the header and the first key
    head, rows = content[:cache_file.HEADER], rows_of(content)
    if kind == "flipped bit":
        return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1:]
    if kind == "cut short":
        return content[:at]
    if kind == "cut between rows":
        return head + b"".join(rows[:dice.randrange(8)])
    if kind == "extended":
        return content + dice.choice([b"\0", rows[0], bytes(dice.randrange(1, 9999)), content])
    if kind == "zeroed block":
        at -= at % 512
        return content[:at] + bytes(len(content[at:at + 512])) + content[at + 512:]
    if kind == "foreign block":
        return content[:at] + dice.randbytes(len(content[at:at + 512])) + content[at + 512:]
    if kind == "other header":
        count, side = dice.choice([(7, SIDE), (9, SIDE), (0, SIDE), (8, 25), (8, 16)])
        return cache_file.header(count, side) + content[cache_file.HEADER:]
    if kind == "other version":
        return head[:6] + bytes([dice.randrange(2, 256)]) + head[7:] + b"".join(rows)
    if kind == "other order":
        dice.shuffle(rows)
        return head + b"".join(rows[:7] + [rows[0]])
    if kind == "other file":
        return dice.choice([other, b"", b"<html>", other + content, np.lib.format.magic(1, 0)])
    raise ValueError(kind)


KINDS = ("flipped bit", "cut short", "cut between rows", "extended", "zeroed block",
         "foreign block", "other header", "other version", "other order", "other file")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_made_again_and_named(photos, kind, capsys, monkeypatch):
    """90 of 150 gave other images without a word."""
    data, dice = dataset(photos), random.Random(kind)
    wanted, _ = data.cached("train", SIDE).images.copy(), data.cached("val", SIDE)
    file, other = sorted(cache_files(photos), key=lambda file: "train" not in file.name)
    content, others = file.read_bytes(), other.read_bytes()
    names = count_decoded(monkeypatch)
    for _ in range(16):
        broken = damage(kind, content, dice, others)
        while broken == content:
            broken = damage(kind, content, dice, others)
        file.write_bytes(broken)
        names.clear(), capsys.readouterr()
        assert np.array_equal(data.cached("train", SIDE).images, wanted)
        lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(lines) == 1 and str(file) in lines[0] and "made again" in lines[0]
        whole = set(rows_of(content)).intersection(rows_of(broken))
        assert len(names) == 8 - len(whole), "rows that are whole are copied, the others decoded"
        assert file.read_bytes() == content


def test_a_file_that_cannot_be_read_is_made_again(photos, capsys):
    data = dataset(photos)
    wanted = data.cached("train", SIDE).images.copy()
    file, = cache_files(photos)
    file.unlink(), file.mkdir()
    with pytest.raises(OSError, match="cannot write the image cache"):
        data.cached("train", SIDE)
    assert str(file) in capsys.readouterr().err
    file.rmdir()
    assert np.array_equal(data.cached("train", SIDE).images, wanted)


def test_a_file_cut_short_in_mid_run_is_an_error_and_no_bus_error(photos):
    """A memory map whose file lost its end kills the process that reads there."""
    images = dataset(photos).cached("train", SIDE).images
    file, = cache_files(photos)
    fgssl.fetch(images, np.arange(8), torch.device("cpu"))
    with open(file, "r+b") as out:
        out.truncate(1000)
    with pytest.raises(OSError, match=f"{file.name} was cut short.*Run the command again"):
        fgssl.fetch(images, np.arange(8), torch.device("cpu"))


def test_work_is_kept_through_several_interruptions(photos, monkeypatch):
    total = []
    for stop in ("3.png", "6.png", None):
        with monkeypatch.context() as patch:
            names = count_decoded(patch, stop)
            data = fgssl.Dataset(dataset(photos).records, workers=1)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    data.cached("train", SIDE)
            else:
                assert len(data.cached("train", SIDE).images) == 8
        total += names
    assert sorted(total) == sorted({*total}), "an image was decoded twice"
    assert [file.suffix for file in (photos.parent / "cache").iterdir()] == [".npy"]


def test_two_builds_at_once_do_not_share_a_draft(photos, monkeypatch):
    """Two containers, in which the processes have one number: images were black for good."""
    decode, together = cache.decode, threading.Barrier(2)
    alone = dataset(photos).cached("val", SIDE).images

    def slow(source, side):
        if source.path.name == "4.png":
            together.wait(60)
        return decode(source, side)

    monkeypatch.setattr(cache, "decode", slow)
    found = [None, None]

    def build(i):
        found[i] = dataset(photos).cached("train", SIDE).images

    threads = [threading.Thread(target=build, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert np.array_equal(*found) and np.array_equal(found[0][3], decode(
        cache.Source(photos / "3.png"), SIDE))
    assert len(alone) == 2 and len(cache_files(photos)) == 2
