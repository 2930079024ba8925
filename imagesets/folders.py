"""The layout of any folder of images: splits, class folders, loose images.

The level of the class folders is found where only one reading is possible. Any other tree is
refused, because a wrong table that looks right is worse than no table.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from .errors import UserError
from .files import Folder, draw_tree, scan
from .records import count_reasons, make_records

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "test": "test", "testing": "test", "holdout": "test"}
# "Test", "seg_train", "training_set", "images-val", "test2017"; not "constrain".
SPLIT_NAME = re.compile(r"(?:(?P<prefix>.+)[ ._-])?(?P<split>%s)[ ._-]*(set|data|images?|imgs|\d+)?"
                        % "|".join(sorted(SPLITS, reverse=True)), re.IGNORECASE)
UNLABELLED = re.compile(r"(?:.+[ ._-])?(pred|prediction|unlabell?ed)", re.IGNORECASE)
# Names of folders that are no classes: one of the first, or nothing but the first and the second.
NO_CLASS = {"image", "images", "img", "imgs", "dataset", "masks", "annotations", "extraimages",
            "unlabeled", "unlabelled", "jpegimages", "segmentationclass", "segmentationobject",
            "outputs", "plots", "screenshots", "unsorted", "new folder", "untitled folder"}
VERSIONS = {"color", "colour", "gray", "grey", "grayscale", "greyscale", "segmented", "mask", "raw",
            "original", "originals", "resized", "cropped", "augmented", "small", "medium", "large",
            "data", "jpg", "jpeg", "png", "photos", "pictures", "labels", "groundtruth", "gt"}
# What systems add to the name of a copy: "ash - Copy (2)", "ash (2)", "ash copy".
COPY = re.compile(r"( -)? copy( \(\d+\))?$| ?\(\d+\)$")
# Folders of a camera (100CANON, of the standard DCF) or of a day (2021-05-01 Kew, 20210501, 2021).
SESSION = re.compile(r"\d{3}[A-Z_][A-Z0-9_]{4}|(19|20)\d\d([-_. ]?\d\d){0,2}(?!\d).*")


def any_folder(folder):
    """Read loose images, class folders <class>/*, or splits {train,val,test}/<class>/*.

    Splits have any of the names in SPLITS, in any case, perhaps with the same prefix. Extra folders
    around splits or classes are passed through. All images below a class folder belong to the
    class. Loose images, alone or beside class folders, are unlabelled train images; in val or test
    they are left out, because nothing can be scored on them.
    UserError, with the tree, for what could be read in two ways; FileNotFoundError without images.
    """
    top = folder if isinstance(folder, Folder) else scan(folder)
    base = unwrap(top)
    flat = [name for name in base.images if "\\" in name]
    if flat:                                                 # on Windows, no name can have it
        refuse(top, f"a backslash in {flat[0]}: a zip of Windows was unpacked without its folders.",
               "Unpack it with another program.")
    rows, left_out, places, notes = [], Counter(), [], top.notes
    splits = find_splits(base, top)
    for split, part in (splits or {"train": base}).items():
        if split is None:                                    # unlabelled, such as seg_pred
            left_out[f"unlabelled, in {part.name}"] += len(part.image_paths())
            continue
        inner = unwrap(part, split)
        if inner.full:
            places.append(inner.path)
        rows += class_rows(inner, split, top)
        if split == "train":
            rows += [(Path(inner.path, name), None, split) for name in inner.images]
        elif inner.images:
            left_out[f"unlabelled, in {split}"] += len(inner.images)
    if splits and base.images:
        left_out["beside the splits"] += len(base.images)
    left_out += top.total_left_out()
    if "train" not in [split for _, _, split in rows]:
        where = os.path.join(base.path, "train") if splits else top.path
        counted = f" (left out: {count_reasons(left_out)})" if left_out else ""
        raise FileNotFoundError(f"no images under {where}{counted}. Expected class folders or "
                                'loose .jpg files; see README, "Your own images".')
    records = make_records(rows)
    check_classes(records, functools.partial(refuse, top))
    sessions = [name for name in records.classes if SESSION.fullmatch(name)]
    if records.classes and sessions == records.classes:
        refuse(top, f"{', '.join(sessions[:5])}: these are days, or a camera's folders, and no "
               "classes.", "Expected a folder for each class.")
    expected = [part.path for part in (splits or {"train": top}).values()]
    if places and not (set(places) <= set(expected) and base is top):
        places = ", ".join(display(place, top) for place in places)
        notes = (f"classes found in {places}", *notes)
    return records._replace(left_out=left_out, notes=notes)


def refuse(top, problem, advice):
    """Raise a UserError with the tree."""
    lines = [f"{top.path}: {problem}", f"  {top.name or top.path}/", *draw_tree(top, indent="    "),
             *top.notes,
             f"{advice} Or pass --labels none, which takes all images, without labels; or say it "
             "in a table, metadata.csv with columns file_name and label "
             '(README, "Your own images").']
    raise UserError("\n".join(lines))


def display(path, top):
    return os.path.join(top.name, os.path.relpath(path, top.path))


def parse_split(name):
    """(prefix, split) of a folder's name, such as ("seg_", "train"); None for another name."""
    match = SPLIT_NAME.fullmatch(name)
    return match and ((match["prefix"] or "").casefold(), SPLITS[match["split"].lower()])


def unwrap(folder, split=None):
    """Pass through folders that hold nothing but one folder, with more folders in it.

    A split stops the way down, but for one of the same name: split is that of the folder, if any.
    """
    while len(folder.full) == 1 and not folder.images:
        inner, = folder.full
        prefix, found = parse_split(inner.name) or ("", split)
        if inner.images or found != split and not prefix:
            break
        folder = inner
    return folder


def find_splits(base, top):
    """The splits among the subfolders, {split: Folder}, under None one without labels; {} if the
    subfolders are classes."""
    parsed = [(folder, parse_split(folder.name)) for folder in base.full]
    named = [(folder, found) for folder, found in parsed if found]
    others = [folder for folder, found in parsed if not found]
    if not named or len(parsed) == 1 and named[0][1][0]:     # none, or only "bullet train"
        return {}
    if len(named) == 1 and others and named[0][0].name.lower() in ("train", "training"):
        if all(folder.images for folder in base.full):
            return {}                                        # a class that is called train
    splits = {split: folder for folder, (_, split) in named}
    unlabelled = [folder for folder in others if UNLABELLED.fullmatch(folder.name)]
    if len(splits) == len(named) and len({prefix for _, (prefix, _) in named}) == 1 and (
            others == unlabelled and len(others) < 2):
        return splits | {None: folder for folder in others}
    names = ", ".join(folder.name for folder, _ in named)
    beside = f" beside {', '.join(folder.name for folder in others[:5])}" if others else ""
    refuse(top, f"it is not clear which folders are splits: {names}{beside}.",
           "Expected splits, called train, val and test, or classes: move the others out, or "
           "rename them.")


def class_rows(folder, split, top):
    """Rows (path, class, split) of the class folders in a folder."""
    rows = []
    for group in folder.full:
        paths = sorted(group.image_paths())
        if len(paths) > 2 * len(group.images):
            refuse(top, f"{display(group.path, top)} holds folders: is it a class, or are they?",
                   "Pass the folder that holds the class folders, or move the images up.")
        for inner in group.walk():
            found = inner is not group and inner.images and parse_split(inner.name)
            if found and not found[0]:
                refuse(top, f"a split in a class, {display(inner.path, top)}.",
                       f"Expected {inner.name}/{group.name}.")
        name = unicodedata.normalize("NFC", group.name)
        rows += [(Path(path), name, split) for path in paths]
    return rows


def check_classes(records, refuse):
    """Refuse one class, classes of one `spelling`, and names that are no classes'.

    refuse: a function of a problem and an advice that raises UserError.
    """
    classes = records.classes
    if len(classes) == 1:
        refuse(f"one class only, {classes[0]}.", "Expected two or more.")
    spelt = {}
    for name in classes:
        other = spelt.setdefault(spelling(name), name)
        if other != name:
            refuse(f"{other!r} and {name!r}: one class or two?",
                   "Spell them alike, or less so.")
    odd = [name for name in classes if name.lower() in NO_CLASS]
    if odd or classes and all(name.lower() in VERSIONS for name in classes):
        refuse(f"{', '.join(odd or classes[:5])}: these are not names of classes.",
               "Expected a class for each.")


def spelling(name):
    """A class's name without what may differ by mistake: case, spaces, the zeros of a number (01,
    1.0), what systems add to a copy."""
    name = COPY.sub("", " ".join(name.replace("_", " ").casefold().split()))
    return re.sub(r"0*(\d+)(\.0+)?", r"\1", name) if re.fullmatch(r"\d+(\.0+)?", name) else name


def without_labels(folder):
    """All images below a Folder, without labels, in train."""
    paths = sorted(folder.image_paths())
    if not paths:
        raise FileNotFoundError(f"no images under {folder.path}")
    return make_records([(Path(path), None, "train") for path in paths])._replace(
        left_out=folder.total_left_out(), notes=("all images, without labels",))
