"""python fgssl.py data: counts, faults, copies, pictures."""

import numpy as np
import pytest
import tiny_sets
from PIL import Image

import fgssl
from imagesets.survey import near_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    top = tmp_path_factory.mktemp("sets")
    tiny_sets.cub(top)
    tiny_sets.SETS["cassava-paper"](top / "paper")
    return top


@pytest.fixture
def faulty(tmp_path):
    """Two classes with a duplicate within a split, one across splits, and two unreadable files."""
    folder, rng = tmp_path / "faulty", np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("ash", "oak"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    train = folder / "train"
    (train / "ash" / "1.png").write_bytes((train / "ash" / "0.png").read_bytes())
    (folder / "test" / "oak" / "1.png").write_bytes((train / "ash" / "2.png").read_bytes())
    (train / "oak" / "0.png").write_bytes((train / "oak" / "0.png").read_bytes()[:90])
    (train / "oak" / "1.png").write_text("<html>404</html>")
    return folder


def test_the_survey_prints_counts_and_faults_and_draws_samples(faulty, tmp_path, capsys):
    fgssl.main(["data", str(faulty), "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert "faulty: 16 images, 2 classes (ash, oak)" in printed
    assert "train 8 images of 2 classes; 4 to 4 per class, median 4" in printed
    assert "sizes min 30 x 20, median 30 x 21, max 30 x 23 pixels" in printed
    assert "unreadable 2" in printed and "oak/0.png" in printed and "oak/1.png" in printed
    assert ("duplicates 2: 1 across splits, 1 of them train and test; 1 with different labels"
            in printed)
    lines = printed.splitlines()
    worst = lines[[line.startswith("duplicates") for line in lines].index(True) + 1]
    assert worst.split() == ["test/oak/1.png", "=", "train/ash/2.png"], "leaks come first"
    sheet = Image.open(tmp_path / "look" / "faulty.png")
    assert sheet.height > 2 * 96 and sheet.width > 8 * 96


def test_the_survey_handles_subsets_boxes_and_unlabelled_images(root, tmp_path, capsys):
    look = ["--root", str(root), "--out", str(tmp_path)]
    fgssl.main(["data", "cub", "--bbox", "--classes", "2", *look])
    assert "cub, boxes: 12 images, 2 classes" in capsys.readouterr().out
    fgssl.main(["data", "cassava", "--root", str(root / "paper"), "--out", str(tmp_path)])
    assert "3 without a label" in capsys.readouterr().out
    for i in range(3):
        tiny_sets.photo(tmp_path / "loose" / f"{i}.jpg")
    fgssl.main(["data", str(tmp_path / "loose"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "loose: 3 images, 0 classes" in printed and "3 without a label" in printed
    assert (tmp_path / "loose.png").is_file()


def test_the_survey_prints_names_that_are_not_utf_8(tmp_path, capsys):
    """Archives from an old Windows have them. The first such name ended the survey."""
    gull = tmp_path / "gulls" / "M\udcf6we"              # the byte f6: o with dots, in Latin-1
    try:
        gull.mkdir(parents=True)
    except OSError:
        pytest.skip("this disk only accepts UTF-8 names")
    tiny_sets.photo(gull.with_name("auk") / "1.png")
    tiny_sets.photo(gull / "1.png")
    (gull / "2.png").write_bytes((gull / "1.png").read_bytes())
    fgssl.main(["data", str(tmp_path / "gulls"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert r"2 classes (M\udcf6we, auk)" in printed and r"M\udcf6we/1.png = " in printed


def photograph(rng, size=(120, 90)):
    """A smooth random picture, as photographs are."""
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def test_copies_that_were_resized_or_saved_again_are_found_and_leaks_come_first(tmp_path, capsys):
    rng, top = np.random.default_rng(0), tmp_path / "copies"
    for split in ("train", "val", "test"):
        for name in ("ash", "oak"):
            (top / split / name).mkdir(parents=True)
            for i in range(10):
                photograph(rng).save(top / split / name / f"{i}.png")
    for i in range(1, 8):                                    # seven within train
        Image.open(top / f"train/ash/{i}.png").save(top / f"train/ash/again{i}.jpg", quality=40)
    small = Image.open(top / "train/oak/3.png").resize((60, 45), Image.LANCZOS)
    small.save(top / "test/oak/small.jpg", quality=60)
    fgssl.main(["data", str(top), "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out
    assert "near-duplicates 8: 1 across splits, 1 of them train and test; 0 with" in printed
    lines = printed.splitlines()
    first = lines[[line.startswith("near-dup") for line in lines].index(True) + 1]
    assert set(first.split(" ~ ")[0].split() + first.split(" ~ ")[1].split()) == {
        "train/oak/3.png", "test/oak/small.jpg"}
    assert "  and 3 more" in printed, "a list of thousands helps nobody"


def test_different_photographs_are_no_copies():
    """Nor are flat images, all alike: a thousand black frames made half a million pairs."""
    rng = np.random.default_rng(1)
    small = [np.asarray(photograph(rng, (32, 32)).convert("L")) for _ in range(3000)]
    assert near_pairs(np.array(small)) == []
    assert near_pairs(np.zeros((1000, 32, 32), np.uint8)) == []
    assert near_pairs(np.array(small[:1])) == []
    changed = np.clip(small[7].astype(int) + rng.integers(-3, 4, (32, 32)), 0, 255)
    assert near_pairs(np.array([*small, changed], np.uint8)) == [(7, 3000)]


def test_near_black_images_are_named(tmp_path, capsys):
    """10 bits in 16, in a set that also has 16: their scale is that of the others."""
    rng = np.random.default_rng(0)
    for name, top in (("ash", 65535), ("oak", 1023)):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for i in range(3):
            grey = rng.integers(0, top, (20, 20)).astype(np.uint16)
            Image.fromarray(grey).save(tmp_path / "deep" / name / f"{i}.png")
    fgssl.main(["data", str(tmp_path / "deep"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "near-black 3" in printed and "  oak/2.png" in printed


def test_flat_images_are_named(tmp_path, capsys):
    """A "no data" of -9999 in one map of heights made grey of all others."""
    rng = np.random.default_rng(0)
    for name, low in (("ash", 0), ("oak", -9999)):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for i in range(3):
            heights = rng.uniform(0, 100, (20, 20)).astype(np.float32)
            heights[:5] += low
            Image.fromarray(heights).save(tmp_path / "deep" / name / f"{i}.tif")
    fgssl.main(["data", str(tmp_path / "deep"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "flat 3: " in printed and "  ash/2.tif" in printed and "near-black" not in printed
