"""Layouts of people's own folders: read rightly, or refused with the tree; never read wrongly."""

import random
from collections import Counter
import unicodedata

import pytest
from test_data import put, rows

import fgssl
import imagesets
from imagesets import files
from imagesets.errors import UserError
from imagesets.records import make_records


def found(top):
    """{path below top: (class, split)} of what is read; None for a split that is cut."""
    return {path: (name, split) for path, name, split in rows(imagesets.read(top, "."), top)}


def classes_of(top):
    return {path: name for path, (name, _) in found(top).items()}


# ------------------------------------------------------------------------------------------------
# A grammar of layouts
# ------------------------------------------------------------------------------------------------

CLASSES = ["Malus domestica", "bus", "Möwe", "鳥", "a,b", "constrain", "train", "testament",
           "001.Auk", "Valid Anna's", "x" * 60, "0"]
SPLIT_NAMES = {"train": ["train", "Training", "TRAIN", "seg_train", "training_set"],
               "val": ["val", "Valid", "validation", "seg_val", "val_set"],
               "test": ["test", "Testing", "TEST", "seg_test", "test_set"]}
STRAY = [".DS_Store", "notes.txt", "labels.csv", "classes.csv", "IMG_1.HEIC", "b.cr2", "README",
         "classes.txt", "hierarchy.txt"]
SYSTEM = ["@eaDir", "__MACOSX", "lost+found", ".git", "$RECYCLE.BIN", "System Volume Information",
          "#recycle", ".ipynb_checkpoints"]


def draw_layout(rng, top):
    """Make a random layout. Returns {path: (class or None, split or None if it is cut)}, the counts
    of what must be left out, and whether it must be refused."""
    wrappers = ["dataset", "images", "flowers_v2", "Data"]
    wrappers = "/".join(rng.sample(wrappers, rng.choice((0, 0, 1, 2))))
    kind = rng.choice(("classes", "classes", "splits", "splits", "splits", "deep", "copies"))
    classes = rng.sample(CLASSES, rng.randint(1 + (kind == "deep"), 5))  # a lone one is a wrapper
    classes = ["bus"] if classes == ["train"] else classes   # a lone train/ is a split
    splits = rng.sample(("train", "val", "test"), rng.randint(1, 3)) if kind == "splits" else [None]
    if kind == "splits" and "train" not in splits:
        splits[0] = "train"
    style = rng.randrange(5)
    names = {split: SPLIT_NAMES[split][style if len(splits) > 1 else rng.randrange(3)]
             for split in splits if split}
    wanted, left_out, folders = {}, Counter(), [wrappers]
    for split in splits:
        inner = rng.choice(("", "", "images", names.get(split, ""))) if split else ""
        for label in classes:
            for middle in {"deep": ("red", "blue"), "copies": ("v1", "v2")}.get(kind, ("",)):
                parts = [wrappers, names.get(split, ""), inner]
                parts += [middle, label] if kind == "copies" else [label, middle]
                folder = "/".join(part for part in parts if part)
                folders.append(folder)
                for i in range(4):
                    wanted[f"{folder}/{i}.JPG"] = (label, split)
    loose = kind == "classes" and not wrappers and rng.random() < 0.3
    if loose:
        wanted["loose.jpe"] = (None, "train")
    put(top, *wanted)
    for folder in rng.sample(folders, min(len(folders), 2)):
        for name in rng.sample(STRAY, 2):
            (top / folder / name).write_text("x")
            reason = {".DS_Store": "hidden", "IMG_1.HEIC": ".heic", "b.cr2": ".cr2",
                      "README": "no extension"}.get(name, "not an image")
            left_out[reason] += 1
        name = rng.choice(SYSTEM)
        put(top / folder / name, "thumb.jpg", "deep/thumb.jpg")
        left_out["hidden" if name[0] == "." else "system folder"] += 2
    refused = len(classes) == 1 or kind in ("deep", "copies")
    return wanted, left_out, refused


@pytest.mark.parametrize("seed", range(100))
def test_a_random_layout_is_read_rightly_or_refused_with_the_tree(seed, tmp_path):
    top = tmp_path / "my photos"
    wanted, left_out, must_refuse = draw_layout(random.Random(seed), top)
    try:
        records = imagesets.read(top, ".")
    except UserError as error:
        assert "my photos/" in str(error) and "images" in str(error), "the tree tells what was seen"
        assert must_refuse, f"refused, but it is clear: {error}"
        return
    assert not must_refuse, "read, but it can be read in two ways"
    got = {path: (name, split) for path, name, split in rows(records, top)}
    assert got.keys() == wanted.keys()
    given = {split for _, split in wanted.values()}
    for path, (name, split) in wanted.items():
        assert got[path][0] == name, path
        may_be = {None: ("train", "val", "test")}.get(split, {split} | (
            {"val", "test"} - given if split == "train" and name else set()))
        assert got[path][1] in may_be, path
    assert records.left_out == left_out


# ------------------------------------------------------------------------------------------------
# Layouts of known folders
# ------------------------------------------------------------------------------------------------


def test_splits_of_kaggle_are_splits_and_a_folder_of_predictions_is_none(tmp_path):
    """Training and Testing became the two classes; seg_pred has no labels."""
    put(tmp_path, *(f"{part}/{part}/{name}/{i}.jpg" for part in ("seg_train", "seg_test")
                    for name in ("sea", "ice") for i in range(3)), "seg_pred/seg_pred/5.jpg")
    records = imagesets.read(tmp_path, ".")
    assert records.classes == ["ice", "sea"] and records.left_out == {
        "unlabelled, in seg_pred": 1}
    for path, (name, split) in found(tmp_path).items():
        assert name == path.split("/")[2] and (split == "test") == path.startswith("seg_test")
    assert records.notes == ("classes found in {0}/seg_test/seg_test, {0}/seg_train/seg_train"
                             .format(tmp_path.name),)


def test_classes_below_wrappers_are_found_and_the_place_is_told(tmp_path):
    put(tmp_path / "X", "dataset/images/ash/1.jpg", "dataset/images/oak/1.jpg", "dataset/a.txt")
    assert set(classes_of(tmp_path / "X").values()) == {"ash", "oak"}
    described = imagesets.describe(imagesets.read(tmp_path / "X", "."))
    assert "classes found in X/dataset/images" in described and "not an image 1" in described


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path):
    """macOS splits letters from accents in file names; a zip of it met folders of Linux."""
    forms = [unicodedata.normalize(form, "Möwe") for form in ("NFC", "NFD")]
    put(tmp_path, f"train/{forms[0]}/1.jpg", f"test/{forms[1]}/2.jpg", "train/auk/3.jpg")
    assert imagesets.read(tmp_path, ".").classes == [forms[0], "auk"]


@pytest.mark.parametrize("names, problem", [
    (["Malus/domestica/1.jpg", "Malus/baccata/1.jpg", "Pyrus/communis/1.jpg"], "holds folders"),
    (["ash/1.jpg", "oak/red/1.jpg", "oak/white/1.jpg"], "X/oak holds folders"),
    (["ash/1.jpg", "oak/cover.jpg", "oak/red/1.jpg", "oak/white/1.jpg"], "X/oak holds folders"),
    (["color/ash/1.jpg", "gray/ash/1.jpg", "color/oak/1.jpg", "gray/oak/1.jpg"], "holds folders"),
    (["ash/1.jpg"], "one class only, ash"),
    (["train/ash/1.jpg", "test/ash/2.jpg"], "one class only, ash"),
    (["train/images/1.jpg", "valid/images/2.jpg"], "one class only, images"),
    (["ash/1.jpg", "oak/2.jpg", "images/3.jpg"], "images: these are not names of classes"),
    (["resized/1.jpg", "original/1.jpg"], "these are not names"),
    (["JPEGImages/1.jpg", "SegmentationClass/2.png"], "these are not names"),
    (["DCIM/100CANON/1.jpg", "DCIM/101_PANA/2.jpg"], "days, or a camera's folders"),
    (["2021-05-01 Kew/1.jpg", "20210502/2.jpg", "2022/3.jpg"], "days, or a camera's folders"),
    (["red oak/1.jpg", "red_oak/2.jpg"], "one class or two"),
    ([f"{copy}/{name}/1.jpg" for copy in ("v1", "v2", "v3") for name in "ab"], "holds folders"),
    (["train1/ash/1.jpg", "train2/ash/1.jpg"], "not clear which folders are splits"),
    (["val/a/1.jpg", "valid/b/1.jpg", "train/a/1.jpg"], "not clear which folders are splits"),
    (["train/a/1.jpg", "test/b/1.jpg", "extra/c/1.jpg"], "train beside extra|test, train beside"),
    (["ash/train/1.jpg", "ash/0.jpg", "oak/1.jpg"], "a split in a class"),
    (["Ash/1.jpg", "ash/2.jpg"], "one class or two"),
    (["a/ash/1.jpg", "oak.jpg"], "X/a holds folders"),
    (["ash/1.jpg", "ash - Copy/1.jpg", "oak/2.jpg"], "one class or two"),
    (["ash/1.jpg", "ash (2)/1.jpg", "oak/2.jpg"], "one class or two"),
    (["1/1.jpg", "01/2.jpg", "2/3.jpg"], "one class or two"),
    (["ash/1.jpg", "oak/2.jpg", "New folder/3.jpg"], "New folder: these are not names"),
    (["train/ash/1.jpg", "eval/ash/2.jpg"], "splits: train beside eval.*called train, val and"),
    (["plants\\ash\\1.jpg", "plants\\oak\\2.jpg"], "a zip of Windows was unpacked without")])
def test_what_can_be_read_in_two_ways_is_refused_with_its_tree(names, problem, tmp_path):
    with pytest.raises(UserError, match=f"(?s){problem}") as error:
        imagesets.read(put(tmp_path / "X", *names), ".")
    assert "\n  X/\n" in str(error.value) and "metadata.csv" in str(error.value)


def test_numbers_that_differ_and_names_like_copies_are_classes(tmp_path):
    put(tmp_path, "1.1/1.jpg", "1.10/1.jpg", "photo/1.jpg", "photocopy/1.jpg", "gull (2)/1.jpg")
    assert len(imagesets.read(tmp_path, ".").classes) == 5


def test_dev_and_holdout_are_splits(tmp_path):
    put(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "dev", "Holdout")
                    for name in ("ash", "oak")))
    assert {split for path, (_, split) in found(tmp_path).items() if path[0] == "d"} == {"val"}
    assert {split for path, (_, split) in found(tmp_path).items() if path[0] == "H"} == {"test"}


def test_masks_beside_their_images_are_no_photographs(tmp_path):
    """Of a set of ultrasound images, half of what was read were the masks."""
    put(tmp_path, "benign/a (1).png", "benign/a (1)_mask.png", "benign/a (1)_mask_1.png",
        "normal/b.jpg", "normal/b_Segmentation.png", "normal/carnival_mask.jpg")
    records = imagesets.read(tmp_path, ".")
    assert sorted(path.name for path in records.paths) == ["a (1).png", "b.jpg",
                                                           "carnival_mask.jpg"]
    assert records.left_out == {"mask of an image": 3}


def test_labels_none_takes_the_images_of_any_tree(tmp_path):
    """Days, or genus and species, were refused, with no way to train on the photographs."""
    put(tmp_path / "X", "2021/05/1.jpg", "2021/06/2.jpg", "3.jpg", "@eaDir/4.jpg")
    records = imagesets.read(tmp_path / "X", ".", "none")
    assert rows(records, tmp_path / "X") == [(name, None, "train") for name in (
        "2021/05/1.jpg", "2021/06/2.jpg", "3.jpg")]
    assert records.classes == [] and records.left_out == {"system folder": 1}


def test_the_first_line_fits_a_terminal():
    def line(*classes):
        rows = [(f"{i}.jpg", name, "train") for i, name in enumerate(classes)]
        return imagesets.describe(make_records(rows), "toy")

    assert line("ash", "oak") == "toy: 2 images, 2 classes (ash, oak); 2 train / 0 val / 0 test"
    assert len(line(*(c * 90 for c in "abcd"))) <= 120
    assert line(*"abcdef").startswith("toy: 6 images, 6 classes (a, b, c, ...); 6 train")
    assert line(*(c * 9 for c in "abcdef")).startswith("toy: 6 images, 6 classes; 6 train")


@pytest.mark.parametrize("name", ["classes.csv", "hierarchy.txt", "classes.txt", "train.csv",
                                  "image_class_labels.txt", "setid.mat", "train_images/c/1.jpg"])
def test_one_file_with_a_common_name_is_no_named_set(name, tmp_path):
    """Class folders beside a classes.csv were read as Grocery Store, and refused."""
    put(tmp_path, "ash/1.jpg", "oak/1.jpg")
    if name.endswith(".jpg"):
        put(tmp_path / "other", "train_images/ash/1.jpg", "train_images/oak/1.jpg")
        assert imagesets.read(tmp_path / "other", ".").classes == ["ash", "oak"]
        return
    (tmp_path / name).write_text("image_id,label,age\n")
    assert imagesets.read(tmp_path, ".").classes == ["ash", "oak"]


# ------------------------------------------------------------------------------------------------
# Every file is accounted for
# ------------------------------------------------------------------------------------------------


def test_every_kind_of_image_is_found(tmp_path):
    """AVIF, .jfif and .jpe vanished without a word."""
    names = [f"{'ao'[i % 2]}/{i}{extension}" for i, extension in
             enumerate(sorted(files.image_extensions()) * 2)]
    assert {".avif", ".jfif", ".jpe", ".tif", ".pgm"} <= files.image_extensions()
    assert files.image_extensions().isdisjoint({".eps", ".pdf", ".mpg", ".heic"})
    put(tmp_path, *names, "a/x.JPG")
    assert len(imagesets.read(tmp_path, ".").paths) == len(names) + 1


def test_what_is_left_out_is_counted_by_extension_and_reason(tmp_path, capsys):
    put(tmp_path, "ash/1.png", "ash/2.png", "ash/3.png", "oak/1.png", "oak/2.png", "oak/3.png",
        *(f"phone/{i}.HEIC" for i in range(6)), "ash/a.cr2", "@eaDir/x.jpg", "ash/@eaDir/y.jpg",
        "__MACOSX/._1.jpg", "lost+found/z.jpg", "ash/thumbs/1.jpg",
        "My Previews.lrdata/a/1.jpg", "ash/._1.png", "Thumbs.db", "ash/notes.txt",
        "ash/2.jpg_large")
    (tmp_path / "linked").symlink_to(tmp_path / "ash")
    fgssl.main(["data", str(tmp_path), "--out", str(tmp_path / "look")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{tmp_path.name}: 6 images, 2 classes (ash, oak); ")
    assert printed[1] == ("  left out: .heic 6, system folder 6, not an image 2, .cr2 1, "
                          ".jpg_large 1, hidden 1, link to a folder read elsewhere 1")


def test_a_folder_of_nothing_but_unread_files_says_so(tmp_path):
    put(tmp_path, "ash/1.heic", "oak/2.heic")
    with pytest.raises(FileNotFoundError, match=r"no images under .* \(left out: .heic 2\)"):
        imagesets.read(tmp_path, ".")


def test_a_system_folder_that_may_not_be_read_does_not_stop_a_run(tmp_path, monkeypatch):
    put(tmp_path, "ash/1.jpg", "oak/2.jpg", "lost+found/3.jpg")
    scandir = files.os.scandir

    def guarded(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", guarded)
    assert imagesets.read(tmp_path, ".").left_out == {"system folder": 1}


def test_links_are_followed_once(tmp_path):
    """Two folders that link to each other multiplied; a linked class is a class."""
    put(tmp_path / "store", "oak/1.jpg")
    put(tmp_path / "X", "ash/1.jpg", "elm/2.jpg")
    (tmp_path / "X" / "oak").symlink_to(tmp_path / "store" / "oak")
    (tmp_path / "X" / "ash" / "up").symlink_to(tmp_path / "X")
    (tmp_path / "store" / "oak" / "back").symlink_to(tmp_path / "X" / "elm")
    assert set(classes_of(tmp_path / "X")) == {"ash/1.jpg", "elm/2.jpg", "oak/1.jpg"}


def test_a_name_that_cannot_be_printed_is_escaped(tmp_path, capsys):
    put(tmp_path / "X", "a\nb/1.jpg", f"{'x' * 99}/1.jpg")
    printed = imagesets.describe(imagesets.read(tmp_path / "X", "."))
    assert "2 classes (a\\nb, xxxxxxxxxxxxxxxxxxxxxxxxxxxxx...)" in printed
    assert len(printed.splitlines()[0]) <= 120
