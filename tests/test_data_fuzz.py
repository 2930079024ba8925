"""Damaged text, .mat and XML files: an error that names the file, or the correct result.

A result is correct if a few plain lines without any check read the same from the damaged files.
"""

import re
import time
import zlib

import numpy as np
import pytest
import tiny_sets

import imagesets
from imagesets import files, matlab, readers

TRIALS = 60


def damaged(content, rng):
    """Bytes changed, deleted, repeated or inserted, one to three times, as in a bad transfer."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if not content:
            break
        start = int(rng.integers(len(content)))
        length = int(rng.integers(1, 40))
        match rng.integers(7):
            case 0:
                content[start] = rng.integers(256)
            case 1:
                content[start] ^= 1 << rng.integers(8)
            case 2:
                del content[start:start + length]
            case 3:
                content[start:start] = content[start:start + length]
            case 4:
                content[start:start] = b"\n \0,;\r\xff9"[rng.integers(8):][:1]
            case 5:
                del content[start:]
            case 6:                                          # swap two lines
                lines = content.split(b"\n")
                i, j = rng.integers(len(lines), size=2)
                lines[i], lines[j] = lines[j], lines[i]
                content = bytearray(b"\n".join(lines))
    return bytes(content)


def lines(path, separator=None, count=-1, header=0):
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return [[part.strip() for part in line.strip().split(separator, count)]
            for line in re.split("\r\n|\r|\n", text)[header:] if line.strip()]


def plain_cub(folder):
    name, label, train = (dict(lines(folder / f"{file}.txt", count=1))
                          for file in ("classes", "image_class_labels", "train_test_split"))
    return {path: (name[label[i]], ("test", "train")[int(train[i])])
            for i, path in lines(folder / "images.txt", count=1)}


def plain_aircraft(folder):
    return {f"{image}.jpg": (name, split) for split in ("train", "val", "test")
            for image, name in lines(folder / f"images_variant_{split}.txt", count=1)}


def plain_pets(folder):
    return {f"{image}.jpg": (re.fullmatch("(.*)_.*", image)[1], split)
            for split, file in (("train", "trainval"), ("test", "test"))
            for image, *_ in lines(folder / "annotations" / f"{file}.txt")}


def plain_cassava_2020(folder):
    return {image: (["cbb", "cbsd", "cgm", "cmd", "healthy"][int(label)], "train")
            for image, label in lines(folder / "train.csv", ",", header=1)}


def plain_grocery(folder):
    name = {int(row[1]): row[0] for row in lines(folder / "classes.csv", ",", header=1)}
    return {path: (name[int(label)], split) for split in ("train", "val", "test")
            for path, label, _ in lines(folder / f"{split}.txt", ",")}


TEXT = {  # name: (plain reader, folder of the images, text files)
    "cub": (plain_cub, "images", ["images", "classes", "image_class_labels", "train_test_split",
                                  "bounding_boxes"]),
    "aircraft": (plain_aircraft, "images", ["variants", "images_variant_train", "images_box",
                                            "images_variant_test"]),
    "pets": (plain_pets, "images", ["annotations/trainval", "annotations/test"]),
    "cassava-2020": (plain_cassava_2020, "train_images", ["train.csv"]),
    "grocery": (plain_grocery, ".", ["classes.csv", "train", "val"])}


@pytest.mark.parametrize("name", TEXT)
def test_damaged_text_is_an_error_with_its_file_or_is_read_correctly(name, tmp_path):
    plain, images, listings = TEXT[name]
    tiny_sets.SETS[name](tmp_path)
    info, rng, refused = imagesets.SETS[name], np.random.default_rng(1), 0
    (_, folder), *_ = imagesets.find_layout(files.scan(tmp_path), [info])
    for trial in range(TRIALS):
        listing = listings[trial % len(listings)]
        listing = folder / (listing if "." in listing else f"{listing}.txt")
        content = listing.read_bytes()
        listing.write_bytes(damaged(content, rng))
        try:
            records = info.read(folder, *info.levels[:1])
            records = imagesets.complete_splits(records._replace(name=name))
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(folder) in str(error) or str(error).startswith(name), error
        else:
            wanted = plain(folder)
            assert len(records.paths) == len(wanted)
            for path, label, split in zip(records.paths, records.labels, records.splits):
                path = path.relative_to(folder / images).as_posix()
                assert records.classes[label] == wanted[path][0], f"{path} after {listing.name}"
                assert split == wanted[path][1] or wanted[path][1] == "train"
        listing.write_bytes(content)
    assert refused > TRIALS / 4, "nothing was damaged"


@pytest.mark.parametrize("name, file, kinds", [
    ("cars", "devkit/cars_train_annos.mat", {"annotations.fname": str, "annotations.class": int}),
    ("cars", "devkit/cars_meta.mat", {"class_names": str}),
    ("flowers", "setid.mat", {"trnid": int, "valid": int, "tstid": int}),
    ("flowers", "imagelabels.mat", {"labels": int}),
    ("dogs", "train_list.mat", {"file_list": str, "labels": int})])
def test_a_damaged_mat_is_an_error_with_its_byte_or_is_read_correctly(name, file, kinds, tmp_path):
    """The official files are compressed, so a checksum covers the data."""
    tiny_sets.SETS[name](tmp_path)
    file, rng, refused = next(tmp_path.iterdir()) / file, np.random.default_rng(2), 0
    content, right = file.read_bytes(), matlab.read_columns(file, kinds)
    for _ in range(4 * TRIALS):
        file.write_bytes(damaged(content, rng))
        try:
            assert matlab.read_columns(file, kinds) == right
        except ValueError as error:
            refused += 1
            assert re.search(rf"{file}(, byte \d+:| has no)", str(error))
    assert refused > TRIALS, "nothing was damaged"


@pytest.mark.parametrize("order", "<>")
def test_damage_to_an_uncompressed_mat_cannot_shift_its_labels(order, tmp_path):
    """Nothing protects the numbers of an uncompressed file; everything around them is checked."""
    labels, file = np.arange(100, 40, -1, dtype="u2"), tmp_path / "a.mat"
    tiny_sets.write_mat(file, order, compressed=False, labels=labels[None], names=["a b", "c", "d"])
    content, rng = file.read_bytes(), np.random.default_rng(3)
    first = content.index(labels.astype(order + "u2").tobytes())
    kinds = {"labels": int, "names": str}
    assert matlab.read_columns(file, kinds) == [labels.tolist(), ["a b", "c", "d"]]
    offsets = [i for i in range(128, len(content)) if not first <= i < first + 2 * len(labels)]
    same = 0
    for offset in offsets:
        for value in {content[offset] ^ 1, content[offset] ^ 128, 0, int(rng.integers(256))}:
            file.write_bytes(content[:offset] + bytes([value]) + content[offset + 1:])
            try:
                assert matlab.read_columns(file, kinds)[0] == labels.tolist()
                same += 1
            except ValueError as error:
                assert str(file) in str(error)
    assert same > 20, "padding and letters may change"


def test_every_kind_of_variable_is_read_in_either_byte_order(tmp_path):
    for order in "<>":
        for compressed in (True, False):
            tiny_sets.write_mat(tmp_path / "a.mat", order, compressed, t="words", e="",
                                numbers=np.array([[1, 2], [3, 4]], "u2"),
                                real=np.array([[0.5, -2]]), names=["a b", "", "long enough"],
                                records=[{"fname": "1.jpg", "class": 7, "box": 300},
                                         {"fname": "2.jpg", "class": 196, "box": 9}])
            read = matlab.read_mat(tmp_path / "a.mat")
            assert read["t"] == "words" and read["e"] == "" and read["real"].tolist() == [0.5, -2]
            assert read["numbers"].tolist() == [1, 3, 2, 4], "column order"
            assert read["names"] == ["a b", "", "long enough"]
            types = {"records.class": int, "records.fname": str, "records.box": int}
            assert matlab.read_columns(tmp_path / "a.mat", types) == [
                [7, 196], ["1.jpg", "2.jpg"], [300, 9]]


def test_a_missing_or_unsupported_variable_is_named(tmp_path):
    file = tmp_path / "a.mat"
    tiny_sets.write_mat(file, ids=np.array([[1.0, 2.0]]), real=np.array([[2, 0.5]]))
    assert matlab.read_columns(file, {"ids": int}) == [[1, 2]], "MATLAB stores integers as doubles"
    with pytest.raises(ValueError, match="a.mat has no labels: it holds ids, real"):
        matlab.read_columns(file, {"labels": int})
    with pytest.raises(ValueError, match="a.mat has no ids.class"):
        matlab.read_columns(file, {"ids.class": int})
    with pytest.raises(ValueError, match="a.mat, real number 2: 0.5 is not of type int"):
        matlab.read_columns(file, {"real": int})
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")
    with pytest.raises(ValueError, match="a.mat, byte 124.*version 5 to 7"):
        matlab.read_columns(file, {"labels": int})


def test_a_mat_that_inflates_without_end_is_refused():
    bomb = zlib.compress(bytes(2_000_000))
    assert len(matlab.inflate(bomb, 2_000_000)) == 2_000_000
    for cut, most in ((None, 1_999_999), (-1, 2_000_000)):
        with pytest.raises(ValueError, match="cut short, or more than"):
            matlab.inflate(bomb[:cut], most)


def test_a_damaged_annotation_is_an_error_with_its_file_or_a_box(tmp_path):
    """Nothing protects the digits, but a reader must not raise another error or return no area."""
    file, rng, refused = tmp_path / "n02085620_7", np.random.default_rng(4), 0
    tiny_sets.write_xml(file, [(4, 6, 24, 16), (0, 0, 9, 9)])
    content = file.read_bytes()
    assert readers.largest_box(file) == (4, 6, 20, 10)
    for _ in range(10 * TRIALS):
        file.write_bytes(damaged(content, rng))
        try:
            x, y, width, height = readers.largest_box(file)
            assert min(x, y) >= 0 and min(width, height) > 0
        except ValueError as error:
            refused += 1
            assert f"{file} has no box" in str(error)
    assert refused > TRIALS / 2, "nothing was damaged"


@pytest.mark.parametrize("hostile", ["<bndbox>" * 10 ** 6, "<bndbox><xmin>" + " " * 10 ** 6,
                                     "<bndbox>" + "<xmin>" * 10 ** 6])
def test_a_hostile_annotation_takes_no_time(hostile, tmp_path):
    """A pattern that searches each box to the end of the file takes the square of its length."""
    (tmp_path / "a").write_text(hostile)
    start = time.monotonic()
    with pytest.raises(ValueError, match="has no box"):
        readers.largest_box(tmp_path / "a")
    assert time.monotonic() - start < 20, "1 to 2 s for a million boxes on a slow core"
