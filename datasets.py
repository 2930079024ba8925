"""Labelled image sets: where the files are, what they show, and which split each belongs to.

`read("toy" | "cub" | "grocery" | any folder, root)` returns `Records`. A set is one small function from
a folder to Records; `read` finds the folder, the function reads it, `complete` settles the splits.
The toy birds are drawn by the second half of this file, so nothing has to be downloaded to start.
"""
import csv
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Records(NamedTuple):
    """One row per image: N paths, labels (N,) int64 with -1 for unknown, splits (N,) of "train",
    "val" or "test", boxes (N, 4) float32 of x, y, width, height in pixels, or None. `classes` holds
    the name of each label."""
    name: str
    paths: list
    labels: np.ndarray
    classes: list
    splits: np.ndarray
    boxes: np.ndarray = None


# ---------------------------------------------------------------- text files

def table(path, *columns, key=int, separator=None):
    """Read lines of `key value ...` into {key: value}, or {key: (values)} for several columns.

    Each column is a function from text to value; the last takes the rest of its line, spaces and all.
    ValueError names the file and the line that has another number of fields, a value its function
    refuses, or a key seen before.
    """
    found = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.strip().split(separator, len(columns))]
            try:
                first, *values = (parse(field) for parse, field in
                                  zip((key, *columns), fields, strict=True))
                if first in found:
                    raise ValueError
            except (ValueError, KeyError):
                raise ValueError(f"{path}, line {number}: cannot use {line.strip()!r}") from None
            found[first] = values[0] if len(values) == 1 else tuple(values)
    return found


def existing(path, listed_in):
    """Return the path if the file is there, else raise a FileNotFoundError naming it and its list."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but {listed_in} lists it. Unpack the set again.")
    return path


# ---------------------------------------------------------------- readers

def cub(folder):
    """Caltech-UCSD Birds 200-2011 (Wah et al. 2011), from its text files; 1-based labels become 0-based."""
    folder = Path(folder)
    names = table(folder / "classes.txt", str)
    index = {class_id: label for label, class_id in enumerate(sorted(names))}
    images = table(folder / "images.txt", str)
    labels = table(folder / "image_class_labels.txt", lambda text: index[int(text)])
    splits = table(folder / "train_test_split.txt", {"1": "train", "0": "test"}.__getitem__)
    boxes = table(folder / "bounding_boxes.txt", float, float, float, float)
    if (folder / "val.txt").is_file():
        splits.update(dict.fromkeys(table(folder / "val.txt"), "val"))
    ids = sorted(images)
    return Records(
        folder.name,
        [existing(folder / "images" / images[i], folder / "images.txt") for i in ids],
        np.array([labels[i] for i in ids], np.int64),
        [names[class_id] for class_id in sorted(names)],
        np.array([splits[i] for i in ids]),
        np.array([boxes[i] for i in ids], np.float32))


def grocery(folder):
    """Grocery Store (Klasson et al. 2019): 81 fine classes; takes the repository or its dataset folder."""
    folder = Path(folder)
    if (folder / "dataset" / "classes.csv").is_file():
        folder = folder / "dataset"
    with open(folder / "classes.csv", encoding="utf-8", newline="") as file:
        classes = [row[0] for row in list(csv.reader(file))[1:]]
    paths, labels, splits = [], [], []
    for split in ("train", "val", "test"):
        listing = folder / f"{split}.txt"
        for path, (label, _) in table(listing, int, int, key=str, separator=",").items():
            paths.append(existing(folder / path, listing))
            labels.append(label)
            splits.append(split)
    return Records("grocery", paths, np.array(labels, np.int64), classes, np.array(splits))


def images_under(folder, deep=True):
    """Sorted image files of a folder (and of its sub-folders if deep); hidden names are ignored."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        found += [Path(parent, name) for name in files
                  if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS]
    return sorted(found)


def folders_in(folder):
    """Sorted visible sub-folders, without links back to the folder or above it."""
    return sorted(path for path in folder.iterdir()
                  if path.is_dir() and not path.name.startswith(".")
                  and not folder.resolve().is_relative_to(path.resolve()))


def folder(top):
    """Any folder: <class>/*, or {train,val,test}/<class>/*, or loose images without labels."""
    top = Path(top)
    tops = {top: "train"}
    if (top / "train").is_dir():
        tops = {path: SPLITS[path.name] for path in folders_in(top) if path.name in SPLITS}
    classes = sorted({path.name for top in tops for path in folders_in(top) if images_under(path)})
    paths, labels, splits = [], [], []
    for top_, split in tops.items():
        groups = [(path, classes.index(path.name)) for path in folders_in(top_)
                  if path.name in classes]
        for path in images_under(top_, deep=False) if split == "train" else []:
            paths.append(path), labels.append(-1), splits.append(split)
        for group, label in groups:
            for path in images_under(group):
                paths.append(path), labels.append(label), splits.append(split)
    if not paths:
        raise FileNotFoundError(f"no images under {top}. Expected class folders or loose .jpg files; "
                                'see README, "Your own images".')
    return Records(top.name, paths, np.array(labels, np.int64), classes, np.array(splits))


# ---------------------------------------------------------------- read

def read(name_or_folder, root):
    """Return the Records of a named set under `root`, or of any folder."""
    root, target = Path(root), Path(name_or_folder)
    if name_or_folder == "toy":
        return complete(cub(toy(root / "toy")))
    if name_or_folder == "cub":
        target = root / "CUB_200_2011"
    elif name_or_folder == "grocery":
        target = root / "GroceryStoreDataset"
        target = target if target.is_dir() else root / "grocery"
    if not target.is_dir():
        raise FileNotFoundError(f"no folder {target}")
    if (target / "images.txt").is_file():
        return complete(cub(target))
    if (target / "classes.csv").is_file() or (target / "dataset" / "classes.csv").is_file():
        return complete(grocery(target))
    return complete(folder(target))


def complete(records):
    """Cut a missing test (20 %) or val (10 %) split from train, and check that train has every class."""
    splits = records.splits.astype("<U5")
    rng = np.random.default_rng(0)
    for split, share in (("test", 0.2), ("val", 0.1)):
        if split in records.splits:
            continue
        for label in range(len(records.classes)):
            members = np.flatnonzero((records.labels == label) & (splits == "train"))
            if len(members) >= 2:
                splits[rng.permutation(members)[:max(1, round(share * len(members)))]] = split
    return records._replace(splits=splits)


# ---------------------------------------------------------------- toy birds

def toy(folder):
    """Return the folder of the toy set, drawn first if it is not there."""
    if not (folder / "images.txt").is_file():
        draw_toy(folder)
    return folder


def draw_toy(folder, seed=0, per_class=(60, 20, 20)):
    """First version: plain birds."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".toy-", dir=folder.parent))
    lines = {name: [] for name in ("images", "classes", "image_class_labels", "train_test_split",
                                   "bounding_boxes", "val")}
    image_id = 0
    for label in range(20):
        name = f"{label + 1:03}.Plain_Bird_{label + 1}"
        lines["classes"].append(f"{label + 1} {name}")
        (temporary / "images" / name).mkdir(parents=True)
        for k in range(sum(per_class)):
            image_id += 1
            rng = np.random.default_rng([seed, label, k])
            image = Image.new("RGB", (96, 96), tuple(rng.integers(120, 255, 3).tolist()))
            draw = ImageDraw.Draw(image)
            x, y = rng.integers(15, 30, 2).tolist()
            draw.ellipse((x, y, x + 50, y + 40), tuple(rng.integers(0, 150, 3).tolist()))
            draw.rectangle((x + 20, y + 15, x + 24 + label % 5 * 4, y + 19 + label // 5 * 4), "white")
            path = f"{name}/{name[4:]}_{k:04}.jpg"
            image.save(temporary / "images" / path, quality=90)
            lines["images"].append(f"{image_id} {path}")
            lines["image_class_labels"].append(f"{image_id} {label + 1}")
            lines["train_test_split"].append(f"{image_id} {int(k < sum(per_class[:2]))}")
            lines["bounding_boxes"].append(f"{image_id} {x} {y} 50 40")
            if per_class[0] <= k < sum(per_class[:2]):
                lines["val"].append(f"{image_id}")
    for name, text in lines.items():
        (temporary / f"{name}.txt").write_text("\n".join(text) + "\n")
    os.rename(temporary, folder)
