"""Readers of folders: CUB's and Grocery Store's text files, class folders; missing splits."""

import errno
import os
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import imagesets
from imagesets import readers
from imagesets.errors import UserError


def put(folder, *names):
    """Write a tiny image under each name, whatever its extension; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path, format="png")
    return folder


def rows(records, top):
    """(path below top, class or None, split) of each image: all that a reader determines."""
    names = [records.classes[label] if label >= 0 else None for label in records.labels]
    return [(path.relative_to(top).as_posix(), name, split)
            for path, name, split in zip(records.paths, names, records.splits)]


@pytest.fixture
def cub(tmp_path):
    """Two birds in CUB's layout, ids out of order, beside a file that is in no list."""
    folder = put(tmp_path / "CUB_200_2011", "images/001.Auk/b.jpg", "images/002.Black Gull/a 1.jpg",
                 "images/001.Auk/b_rgb.jpg", "images/002.Black Gull/c.jpg", "images/001.Auk/d.jpg")
    texts = {"classes": "1 001.Auk\n2 002.Black Gull",
             "images": "7 002.Black Gull/a 1.jpg\n3 001.Auk/b.jpg\n"
                       "12 002.Black Gull/c.jpg\n5 001.Auk/d.jpg",
             "image_class_labels": "3 1\n5 1\n7 2\n12 2",
             "train_test_split": "3 1\n5 0\n7 1\n12 0",
             "bounding_boxes": "3 0.5 1 2 3\n5 4 4 4 4\n7 10 20 30 40\n12 5 5 5 5"}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text + "\n")
    return folder


@pytest.fixture
def grocery(tmp_path):
    """The dataset folder of Grocery Store, with two classes listed out of order."""
    folder = put(tmp_path / "GroceryStoreDataset" / "dataset", "train/p/1.jpg", "train/k/2.jpg",
                 "val/k/1.jpg", "test/p/1.jpg", "train/k/stray.jpg")
    (folder / "classes.csv").write_text(
        "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic\n"
        "Pear,1,Fruit,0,/p\nKiwi,0,Fruit,0,/k\n")
    (folder / "train.txt").write_text("train/p/1.jpg, 1, 0\ntrain/k/2.jpg, 0, 0\n")
    (folder / "val.txt").write_text("val/k/1.jpg, 0, 0\n")
    (folder / "test.txt").write_text("test/p/1.jpg, 1, 0\n")
    return folder


# ------------------------------------------------------------------------------------------------
# Readers
# ------------------------------------------------------------------------------------------------


def test_cub_joins_its_files_by_image_id_and_never_globs(cub):
    records = imagesets.read(cub, cub.parent)
    assert rows(records, cub / "images") == [
        ("002.Black Gull/a 1.jpg", "002.Black Gull", "train"),
        ("001.Auk/b.jpg", "001.Auk", "train"),
        ("002.Black Gull/c.jpg", "002.Black Gull", "test"),
        ("001.Auk/d.jpg", "001.Auk", "test")]
    assert records.labels.tolist() == [1, 0, 1, 0], "labels count from 1 in the files, from 0 here"
    assert records.boxes[:2].tolist() == [[10, 20, 30, 40], [0.5, 1, 2, 3]]
    assert (records.labels.dtype, records.boxes.dtype, records.name) == (
        np.int64, np.float32, "CUB_200_2011")
    assert imagesets.read("cub", cub.parent).paths == records.paths


def test_cub_reads_val_from_val_txt_if_present(cub):
    (cub / "val.txt").write_text("3 1\n5 0\n7 0\n12 0\n")
    (cub / "train_test_split.txt").write_text("3 1\n5 1\n7 1\n12 0\n")
    assert imagesets.read(cub, cub.parent).splits.tolist() == ["train", "val", "test", "train"]


@pytest.mark.parametrize("name, text, where", [
    ("image_class_labels", "3 1\n5 one\n7 2\n12 2", "line 2"),
    ("image_class_labels", "3 1\n5\n7 2\n12 2", "line 2"),
    ("image_class_labels", "3 1\n5 1\n7 3\n12 2", "line 3"),        # classes.txt lacks class 3
    ("image_class_labels", "3 1\n5 1\n7 2\n12 2\n9 1", "line 5"),  # images.txt lacks image 9
    ("image_class_labels", "3 1\n5 1\n7 2\n12 2\n3 2", "line 5"),  # image 3 comes twice
    ("image_class_labels", "3 1\n5 1\n7 2", "no line for 12"),
    ("train_test_split", "3 1\n5 yes\n7 1\n12 0", "line 2"),
    ("bounding_boxes", "3 1 1 1\n5 4 4 4 4\n7 1 1 1 1\n12 5 5 5 5", "line 1"),
    ("bounding_boxes", "3 1 1 1 1 1\n5 4 4 4 4\n7 1 1 1 1\n12 5 5 5 5", "line 1"),
    ("classes", "", "is empty"),
])
def test_cub_names_file_and_line_of_a_bad_line(cub, name, text, where):
    (cub / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=f"{name}.txt.*{where}"):
        imagesets.read(cub, cub.parent)


def test_a_listed_image_that_is_missing_is_named(cub, grocery):
    for folder, image in (cub, "images/001.Auk/b.jpg"), (grocery, "val/k/1.jpg"):
        (folder / image).unlink()
        with pytest.raises(FileNotFoundError, match=image):
            imagesets.read(folder, ".")


def test_an_impossible_file_name_is_a_missing_image(cub):
    """The system reports it with another error than a file that does not exist."""
    for name in "x" * 300 + ".jpg", "nul\0.jpg":
        (cub / "images.txt").write_text(f"7 {name}\n3 001.Auk/b.jpg\n")
        for listing in "image_class_labels", "train_test_split":
            (cub / f"{listing}.txt").write_text("3 1\n7 1\n")
        (cub / "bounding_boxes.txt").write_text("3 1 1 1 1\n7 1 1 1 1\n")
        with pytest.raises(FileNotFoundError, match="images.txt lists"):
            imagesets.read(cub, cub.parent)


def test_grocery_labels_follow_class_ids_from_repository_or_dataset_folder(grocery):
    wanted = [("train/p/1.jpg", "Pear", "train"), ("train/k/2.jpg", "Kiwi", "train"),
              ("val/k/1.jpg", "Kiwi", "val"), ("test/p/1.jpg", "Pear", "test")]
    for folder in (grocery, grocery.parent, "grocery"):
        records = imagesets.read(folder, grocery.parent.parent)
        assert rows(records, grocery) == wanted
        assert records.classes == ["Kiwi", "Pear"] and records.boxes is None
    (grocery / "val.txt").write_text("val/k/1.jpg, 0, 0\nval/k/1.jpg, two, 0\n")
    with pytest.raises(ValueError, match="val.txt, line 2"):
        imagesets.read(grocery, ".")


def test_class_folders_give_every_image_and_nothing_else(tmp_path):
    put(tmp_path, "Möwe/a.JPG", "Möwe/b.jpeg", "Möwe/x/deep.PnG", "auk/c.TIFF", "auk/d.ppm",
        "auk/ü ñ 鳥.webp", f"auk/{'z' * 240}.jpg")
    put(tmp_path, "Möwe/.hidden.jpg", "Möwe/notes.txt", ".cache/e.jpg", "auk/.thumbs/f.jpg",
        "empty/readme.md")
    (tmp_path / "auk" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    records = readers.any_folder(tmp_path)
    assert [row[:2] for row in rows(records, tmp_path)] == [
        ("Möwe/a.JPG", "Möwe"), ("Möwe/b.jpeg", "Möwe"), ("Möwe/x/deep.PnG", "Möwe"),
        ("auk/c.TIFF", "auk"), ("auk/d.ppm", "auk"),
        (f"auk/{'z' * 240}.jpg", "auk"), ("auk/ü ñ 鳥.webp", "auk")]
    assert records.classes == ["Möwe", "auk"], "an empty folder is no class"


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_splits_use_the_same_label_for_a_class(tmp_path, val):
    put(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", f"{val}/c/2.jpg",
        "test/b/3.jpg")
    assert set(rows(imagesets.read(tmp_path, "."), tmp_path)) == {
        ("train/a/1.jpg", "a", "train"), ("train/b/1.jpg", "b", "train"),
        ("train/c/1.jpg", "c", "train"), (f"{val}/c/2.jpg", "c", "val"),
        ("test/b/3.jpg", "b", "test")}


def test_loose_images_are_train_images_without_a_label(tmp_path):
    put(tmp_path / "flat", "2.jpg", "1.png")
    put(tmp_path / "split", "train/1.jpg", "val/a/2.jpg", "val/b/4.jpg", "test/3.jpg")
    assert rows(imagesets.read(tmp_path / "flat", "."), tmp_path / "flat") == [
        ("1.png", None, "train"), ("2.jpg", None, "train")]
    assert rows(imagesets.read(tmp_path / "split", "."), tmp_path / "split") == [
        ("train/1.jpg", None, "train"), ("val/a/2.jpg", "a", "val"),
        ("val/b/4.jpg", "b", "val")], "test/3.jpg has no score"


@pytest.mark.parametrize("names, error, message", [
    ([], FileNotFoundError, 'no images under .*class folders or loose .jpg.*"Your own images"'),
    (["val/a/1.jpg"], FileNotFoundError, "no images under .*train"),
    (["train/a/1.jpg", "val/b/1.jpg", "test/c/1.jpg"], ValueError, "val or test holds b, c"),
    (["train/a/1.jpg", "bus/1.jpg"], ValueError, "train beside bus"),   # is `train` a class?
])
def test_an_unusable_folder_says_what_was_expected(tmp_path, names, error, message):
    with pytest.raises(error, match=message):
        imagesets.read(put(tmp_path, *names), ".")


def test_a_class_folder_without_read_permission_is_an_error(tmp_path, monkeypatch):
    """If it were skipped, its class would be missing and nothing would show it."""
    put(tmp_path, "ash/1.jpg", "oak/2.jpg")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("oak"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="cannot read the folder .*oak: Permission denied"):
        imagesets.read(tmp_path, ".")


def test_an_unknown_name_lists_the_sets(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder quetzal[.] .*cub, .*grocery, toy"):
        imagesets.read("quetzal", tmp_path)


@pytest.mark.parametrize("typed, meant", [("Grocery", "grocery"), ("CUB", "cub"),
                                          ("grocrey", "grocery"), ("cassava2020", "cassava-2020")])
def test_a_misspelt_name_gets_a_suggestion_unless_it_is_a_folder(typed, meant, tmp_path,
                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder {typed}; did you mean {meant}[?]"):
        imagesets.read(typed, tmp_path)
    put(tmp_path / typed, "ash/1.jpg", "oak/1.jpg")
    assert imagesets.read(typed, tmp_path).classes == ["ash", "oak"]


# ------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------


def split_of(folder):
    """{class/file name: split} of a folder of classes."""
    records = imagesets.read(folder, ".")
    return {"/".join(path.parts[-2:]): str(split)
            for path, split in zip(records.paths, records.splits)}


def test_files_that_come_or_go_move_no_other_file_to_another_split(tmp_path):
    """A cut by one permutation a class moved 245 of 600 images when one was removed, test images
    that pretraining had seen among them."""
    put(tmp_path / "a", *(f"{name}/{i}.jpg" for name in "abcdef" for i in range(30)))
    before = split_of(tmp_path / "a")
    for gone in ("a/0.jpg", "c/17.jpg", "f/29.jpg"):
        (tmp_path / "a" / gone).unlink()
    put(tmp_path / "a", "a/new.jpg", "bb/1.jpg", "bb/2.jpg", "zz/1.jpg")
    after = split_of(tmp_path / "a")
    assert len(before.keys() & after.keys()) == 177
    assert all(after[name] == before[name] for name in before.keys() & after.keys())
    (tmp_path / "a").rename(tmp_path / "b")
    assert split_of(tmp_path / "b") == after, "nor does a folder that is moved"
    np.random.seed(1)
    assert split_of(tmp_path / "b") == after, "nor a run's seed"


def test_a_cut_takes_a_fifth_and_a_tenth_of_the_rest_of_every_class(tmp_path):
    put(tmp_path, *(f"{name}/{i}.jpg" for name in "abc" for i in range(800)))
    records = imagesets.read(tmp_path, ".")
    for label in range(3):
        counts = Counter(records.splits[records.labels == label].tolist())
        assert abs(counts["test"] - 160) < 37 and abs(counts["val"] - 64) < 26, "3.3 std errors"


def test_one_name_in_two_unicode_forms_is_one_name(tmp_path):
    """A set copied from a Mac has its accents decomposed."""
    found = []
    for form in ("NFC", "NFD"):
        names = (unicodedata.normalize(form, f"ü/é{i}.jpg") for i in range(40))
        cut = split_of(put(tmp_path / form, *names, "x/1.jpg"))
        found.append({unicodedata.normalize("NFC", name): split for name, split in cut.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 3), (2, 5, 1), (4, 4, 4)])
def test_every_class_of_a_tiny_set_is_trained_on_and_a_split_is_empty_only_for_want_of_images(
        tmp_path, sizes):
    put(tmp_path, *(f"{name}/{i}.jpg" for name, size in zip("abc", sizes) for i in range(size)))
    records = imagesets.read(tmp_path, ".")
    assert set(records.labels[records.splits == "train"]) == set(range(len(sizes)))
    assert ("test" in records.splits) == (max(sizes) > 1)
    assert ("val" in records.splits) == (max(sizes) > 2)


def test_a_cut_does_not_change_existing_splits(tmp_path):
    put(tmp_path, *(f"{split}/{name}/{i}.jpg" for split in ("train", "val") for i in range(10)
                    for name in "ab"))
    cut = rows(imagesets.read(tmp_path, "."), tmp_path)
    counts = Counter(split for _, _, split in cut)
    assert counts["val"] == 20 and counts["train"] + counts["test"] == 20 and counts["test"] > 0
    assert all(path.startswith("val/") == (split == "val") for path, _, split in cut)
