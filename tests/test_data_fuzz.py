"""Readers of text and .mat files on damaged ones: an error that names the file, or a right answer.

The answer of a reader is right where it is that of a few plain lines which read the same damaged
files without any check.
"""

import re
import zlib

import numpy as np
import pytest
import tiny_sets

import imagesets
from imagesets import matlab

TRIALS = 60


def damaged(content, dice):
    """Bytes changed, cut out, repeated or put in, once to three times, as in a bad transfer."""
    content = bytearray(content)
    for _ in range(dice.integers(1, 4)):
        if not content:
            break
        start = int(dice.integers(len(content)))
        length = int(dice.integers(1, 40))
        match dice.integers(7):
            case 0:
                content[start] = dice.integers(256)
            case 1:
                content[start] ^= 1 << dice.integers(8)
            case 2:
                del content[start:start + length]
            case 3:
                content[start:start] = content[start:start + length]
            case 4:
                content[start:start] = b"\n \0,;\r\xff9"[dice.integers(8):][:1]
            case 5:
                del content[start:]
            case 6:                                          # two lines change places
                lines = content.split(b"\n")
                i, j = dice.integers(len(lines), size=2)
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


TEXT = {  # name: (plain reader, folder of the images, listings)
    "cub": (plain_cub, "images", ["images", "classes", "image_class_labels", "train_test_split",
                                  "bounding_boxes"]),
    "aircraft": (plain_aircraft, "images", ["variants", "images_variant_train", "images_box",
                                            "images_variant_test"]),
    "pets": (plain_pets, "images", ["annotations/trainval", "annotations/test"]),
    "cassava-2020": (plain_cassava_2020, "train_images", ["train.csv"]),
    "grocery": (plain_grocery, ".", ["classes.csv", "train", "val"])}


@pytest.mark.parametrize("name", TEXT)
def test_damaged_text_is_an_error_with_its_place_or_is_read_as_it_stands(name, tmp_path):
    plain, images, listings = TEXT[name]
    tiny_sets.SETS[name](tmp_path)
    known, dice, refused = imagesets.SETS[name], np.random.default_rng(1), 0
    folder = next(each for each in imagesets.within(tmp_path, 2) if imagesets.shows(each, known))
    for trial in range(TRIALS):
        listing = listings[trial % len(listings)]
        listing = folder / (listing if "." in listing else f"{listing}.txt")
        content = listing.read_bytes()
        listing.write_bytes(damaged(content, dice))
        try:
            records = known.read(folder, known.levels[0]) if known.levels else known.read(folder)
            records = imagesets.complete(records._replace(name=name))
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
    assert refused > TRIALS / 4, "the damage was none"



@pytest.mark.parametrize("name, file, kinds", [
    ("cars", "devkit/cars_train_annos.mat", {"annotations.fname": str, "annotations.class": int}),
    ("cars", "devkit/cars_meta.mat", {"class_names": str}),
    ("flowers", "setid.mat", {"trnid": int, "valid": int, "tstid": int}),
    ("flowers", "imagelabels.mat", {"labels": int})])
def test_a_damaged_mat_is_an_error_with_its_byte_or_holds_what_it_held(name, file, kinds, tmp_path):
    """Compressed, as the official ones are: a checksum covers what matters."""
    tiny_sets.SETS[name](tmp_path)
    file, dice, refused = next(tmp_path.iterdir()) / file, np.random.default_rng(2), 0
    content, right = file.read_bytes(), matlab.columns(file, kinds)
    for _ in range(4 * TRIALS):
        file.write_bytes(damaged(content, dice))
        try:
            assert matlab.columns(file, kinds) == right
        except ValueError as error:
            refused += 1
            assert re.search(rf"{file}(, byte \d+:| has no)", str(error))
    assert refused > TRIALS, "the damage was none"


@pytest.mark.parametrize("order", "<>")
def test_a_damaged_structure_of_a_plain_mat_cannot_shift_its_labels(order, tmp_path):
    """Nothing checks the numbers of an uncompressed file; what stands around them is checked."""
    labels, file = np.arange(100, 40, -1, dtype="u2"), tmp_path / "a.mat"
    tiny_sets.write_mat(file, order, compressed=False, labels=labels[None], names=["a b", "c", "d"])
    content, dice = file.read_bytes(), np.random.default_rng(3)
    first = content.index(labels.astype(order + "u2").tobytes())
    kinds = {"labels": int, "names": str}
    assert matlab.columns(file, kinds) == [labels.tolist(), ["a b", "c", "d"]]
    places = [i for i in range(128, len(content)) if not first <= i < first + 2 * len(labels)]
    same = 0
    for place in places:
        for value in {content[place] ^ 1, content[place] ^ 128, 0, int(dice.integers(256))}:
            file.write_bytes(content[:place] + bytes([value]) + content[place + 1:])
            try:
                assert matlab.columns(file, kinds)[0] == labels.tolist()
                same += 1
            except ValueError as error:
                assert str(file) in str(error)
    assert same > 20, "fillings and letters of names may change"


def test_a_mat_of_every_kind_is_read_in_either_byte_order(tmp_path):
    for order in "<>":
        for compressed in (True, False):
            tiny_sets.write_mat(tmp_path / "a.mat", order, compressed, t="words", e="",
                                numbers=np.array([[1, 2], [3, 4]], "u2"),
                                real=np.array([[0.5, -2]]), names=["a b", "", "long enough"],
                                records=[{"fname": "1.jpg", "class": 7, "box": 300},
                                         {"fname": "2.jpg", "class": 196, "box": 9}])
            read = matlab.read_mat(tmp_path / "a.mat")
            assert read["t"] == "words" and read["e"] == "" and read["real"].tolist() == [0.5, -2]
            assert read["numbers"].tolist() == [1, 3, 2, 4], "by columns"
            assert read["names"] == ["a b", "", "long enough"]
            assert matlab.columns(tmp_path / "a.mat", {"records.class": int, "records.fname": str,
                                                         "records.box": int}) == [
                [7, 196], ["1.jpg", "2.jpg"], [300, 9]]


def test_what_a_mat_lacks_or_is_not_is_told(tmp_path):
    file = tmp_path / "a.mat"
    tiny_sets.write_mat(file, ids=np.array([[1.0, 2.0]]), real=np.array([[2, 0.5]]))
    assert matlab.columns(file, {"ids": int}) == [[1, 2]], "MATLAB's numbers are doubles by birth"
    with pytest.raises(ValueError, match="a.mat has no labels: it holds ids, real"):
        matlab.columns(file, {"labels": int})
    with pytest.raises(ValueError, match="a.mat has no ids.class"):
        matlab.columns(file, {"ids.class": int})
    with pytest.raises(ValueError, match="a.mat, real number 2: 0.5 is no int"):
        matlab.columns(file, {"real": int})
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")
    with pytest.raises(ValueError, match="a.mat, byte 124.*version 5 to 7"):
        matlab.columns(file, {"labels": int})


def test_a_mat_that_unpacks_without_end_is_refused():
    bomb = zlib.compress(bytes(2_000_000))
    assert len(matlab.inflate(bomb, 2_000_000)) == 2_000_000
    for cut, most in ((None, 1_999_999), (-1, 2_000_000)):
        with pytest.raises(ValueError, match="cut short, or more than"):
            matlab.inflate(bomb[:cut], most)
