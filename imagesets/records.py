"""Records: the images of a set with labels and splits. Their description; missing splits; subsets.
"""

import hashlib
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import UserError


class Records(NamedTuple):
    """The N images of a set. A label is an index into `classes`, or -1 if unknown."""
    paths: list[Path]
    labels: np.ndarray                # (N,) int64
    classes: list[str]
    splits: np.ndarray                # (N,) of "train", "val", "test"
    boxes: np.ndarray | None = None   # (N, 4) float32: x, y, width, height in pixels
    banner: int = 0                   # pixel rows at the foot of each image that are not photo
    name: str = ""
    folder: str = ""                  # the absolute path of the set
    left_out: dict = {}               # files that are not read: {reason or extension: number}
    notes: tuple = ()                 # how an unusual layout was read, a line each
    scale: tuple | None = None        # pixel values of black and white, of images above 8 bits
    fit: str = "crop"                 # what a square shows of an image without a box: see Source

    def take(self, rows):
        """The Records of some of the images; rows: indices or a boolean mask."""
        rows = np.arange(len(self.paths))[rows]
        return self._replace(paths=[self.paths[row] for row in rows], labels=self.labels[rows],
                             splits=self.splits[rows],
                             boxes=None if self.boxes is None else self.boxes[rows])


def count_reasons(left_out, most=12):
    """{reason: number} of files that are not read as text, the largest first: ".heic 6, .cr2 3"."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(number for _, number in ordered[most:])
    return ", ".join(f"{reason} {number:,}" for reason, number in
                     ordered[:most] + [("others", rest)] * bool(rest))


def printable(text):
    """A text in one line: what cannot be printed is escaped, as in names that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(records, name=None):
    """What was read, as text: images, classes, splits; below, how it was read if that was not
    plain, and what was left out and why. name: in place of the set's.

    Up to four classes are named, in a line of at most 120 columns; the first three of more, where
    the line stays within 80.
    """
    counts = {split: int((records.splits == split).sum()) for split in ("train", "val", "test")}
    unlabelled, classes = int((records.labels < 0).sum()), [*map(printable, records.classes)]
    head = f"{name or records.name}: {len(records.paths):,} images, {len(classes):,} classes"
    tail = "; " + " / ".join(f"{number:,} {split}" for split, number in counts.items()) + (
        f"; {unlabelled:,} without a label" if unlabelled else "")
    if len(classes) < 5:
        most = max(12, (117 - len(head + tail)) // max(1, len(classes)) - 2)
        names = [name if len(name) <= most else name[:most - 3] + "..." for name in classes]
    else:
        names = [*classes[:3], "..."]
    names = f" ({', '.join(names)})" if names else ""
    fits = len(classes) < 5 or len(head + names + tail) <= 80
    lines = [head + names * fits + tail, *(f"  {note}" for note in records.notes)]
    if records.left_out:
        lines.append(f"  left out: {count_reasons(records.left_out)}")
    return "\n".join(map(printable, lines))


def make_records(rows, classes=None):
    """Records of rows (path, class name or None, split). classes: in label order, else sorted."""
    paths, names, splits = zip(*rows)
    classes = sorted(set(names) - {None}) if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise UserError(f"{os.path.commonpath(paths)}: two classes share a name; found "
                        f"{', '.join(classes)}. Rename one, or unpack the set again.")
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)
    return Records(list(paths), labels, classes, np.array(splits))


def complete_splits(records):
    """Cut a missing test split (20 %) or val split (10 % of the rest) from train; check the set.

    Each labelled image is cut by itself: it goes to test if `hash_to_unit` of its class and file
    name is below 0.2, and of the rest to val if another hash is below 0.1. So files that are added,
    removed or moved to another folder change the split of no other, and every class is cut in the
    same proportions, up to chance. Two exceptions keep tiny sets usable: if a whole split would be
    empty, it gets the image of lowest hash of each class; if a class would have no train image, the
    one of highest hash stays in train. Existing splits are never changed; unlabelled images stay in
    train. UserError if an image is listed twice, or if val or test has a class without a train
    image (unless train has no labels at all).
    """
    seen = set()
    for path in records.paths:
        if path in seen:
            raise UserError(f"{records.name} lists {path} twice. Remove one of the two, or "
                            "unpack the set again.")
        seen.add(path)
    labels, splits = records.labels, records.splits.astype("<U5")
    for split, fraction in (("test", 0.2), ("val", 0.1)):
        if split in records.splits:
            continue
        rows = np.flatnonzero((labels >= 0) & (splits == "train"))
        if not len(rows):
            continue
        unit = np.array([hash_to_unit(split, records.classes[labels[row]], records.paths[row].name)
                         for row in rows])
        order = np.argsort(labels[rows], kind="stable")
        by_class = np.split(order, np.flatnonzero(np.diff(labels[rows][order])) + 1)
        cut = unit < fraction
        if not cut.any():
            cut[[members[unit[members].argmin()] for members in by_class]] = True
        for members in by_class:
            if cut[members].all():
                cut[members[unit[members].argmax()]] = False
        splits[rows[cut]] = split
    train_labels = set(labels[splits == "train"])
    missing = sorted(set(labels[labels >= 0]) - train_labels)
    if missing and train_labels != {-1}:
        missing = ", ".join(records.classes[label] for label in missing)
        raise UserError(f"{records.name}: val or test holds {missing}, of which train has no "
                        "image. Move some of these images to train, or remove the class.")
    return records._replace(splits=splits)


def hash_to_unit(*texts):
    """A number in [0, 1) that depends on the texts alone, in whichever Unicode form they are."""
    text = unicodedata.normalize("NFC", "\0".join(texts)).encode(errors="surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2 ** 64


def smaller(records, fraction=None, classes=None):
    """A subset for quick trials: some classes, and a fraction of each class in each split.

    fraction: in (0, 1]; at least one image of a class and split is kept. classes: how many. None
    keeps all. The choice is fixed, and a larger fraction or number keeps what a smaller one keeps.
    Unlabelled images count as one more class, dropped if `classes` is given.
    UserError for more classes than there are.
    """
    labels = records.labels
    if classes is not None:
        if classes > len(records.classes):
            raise UserError(f"{records.name} has {len(records.classes)} classes, not {classes}. "
                            f"Pass --classes {len(records.classes)} or fewer.")
        order = np.random.default_rng(0).permutation(len(records.classes))
        chosen = np.sort(order[:classes])
        records = records.take(np.isin(labels, chosen))
        labels = np.searchsorted(chosen, records.labels)
        records = records._replace(labels=labels, classes=[records.classes[i] for i in chosen])
    if fraction is not None:
        kept, codes = [], np.searchsorted(("test", "train", "val"), records.splits)
        order = np.lexsort((labels, codes))                  # stable: by split, label, position
        starts = np.flatnonzero(np.diff(codes[order] * (len(records.classes) + 1) + labels[order]))
        for members in np.split(order, starts + 1):
            seed = (("train", "val", "test").index(records.splits[members[0]]),
                    labels[members[0]] + 1)
            members = np.random.default_rng(seed).permutation(members)
            kept += members[:max(1, round(fraction * len(members)))].tolist()
        records = records.take(sorted(kept))
    return records
