"""A survey of a set: what it holds, what is wrong with it, and a picture of samples.

    python fgssl.py data NAME_OR_FOLDER
"""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

import pictures

from .cache import cpus
from .decode import decode
from .progress import progress


def survey(data, folder):
    """Print the contents and faults of a Dataset; draw samples to folder/<name>.png.

    Every file is read completely. Reported are unreadable files and duplicates: files of equal
    content count twice within a split, and leak from train to test across splits.
    """
    records = data.records
    sources = [data.source(row) for row in range(len(records.paths))]
    with warnings.catch_warnings(), ThreadPoolExecutor(data.workers or cpus()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        results = list(progress(pool.map(examine, sources), len(sources), f"reading {data.name}"))
    bad = [row for row, (error, _, _) in enumerate(results) if error]
    good = np.setdiff1d(np.arange(len(sources)), bad)
    rows_of = {}                                             # by digest of the content
    for row in good:
        rows_of.setdefault(results[row][1], []).append(row)

    def differ(rows):
        """Whether images differ in split, and in label."""
        return [len({*values[rows]}) > 1 for values in (records.splits, records.labels)]

    duplicates = [rows for rows in rows_of.values() if len(rows) > 1]
    duplicates.sort(key=differ, reverse=True)                # leaks between splits first
    top = os.path.commonpath([path.parent for path in records.paths])

    print_counts(records)
    if len(good):
        sides = [results[row][2] for row in good]
        sizes = {"min": np.min(sides, 0), "median": np.median(sides, 0), "max": np.max(sides, 0)}
        sizes = ", ".join(f"{name} {w:g} x {h:g}" for name, (w, h) in sizes.items())
        print(f"   sizes {sizes} pixels")
    print(f"unreadable {len(bad)}")
    for row in bad[:5]:
        print(f"  {results[row][0]}")
    line = f"duplicates {len(duplicates)}"
    if duplicates:
        across, contradictory = np.sum([differ(rows) for rows in duplicates], 0)
        line += f": {across} across splits, {contradictory} with different labels"
    print(line)
    for rows in duplicates[:5]:
        print("  " + " = ".join(os.path.relpath(records.paths[row], top) for row in rows))
    if len(good):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{records.name}.png"
        contact_sheet(file, data, good)
        print(f"wrote {file}")


def print_counts(records):
    """Print a line for each split: images, classes, images per class."""
    for split in ("train", "val", "test"):
        labels = records.labels[records.splits == split]
        _, counts = np.unique(labels[labels >= 0], return_counts=True)
        line = f"{split:>8} {len(labels)} images"
        if len(counts):
            line += (f" of {len(counts)} classes; {min(counts)} to {max(counts)} per class, median "
                     f"{np.median(counts):g}")
        print(line + (f"; {(labels < 0).sum()} without a label" if (labels < 0).any() else ""))


def examine(source):
    """Return the reason why a file cannot be read, or None; its digest; its width and height."""
    try:
        digest = hashlib.blake2b(source.path.read_bytes()).digest()
        decode(source, 96)
        with Image.open(source.path) as image:
            return None, digest, image.size
    except (OSError, ValueError) as error:
        return str(error), None, None


def contact_sheet(file, data, rows, classes=12, images=8):
    """Draw up to `images` samples of up to `classes` classes from some rows of the records."""
    def spread(values, count):
        """Up to `count` of the values, evenly spaced."""
        return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]

    labels = data.records.labels[rows]
    lines, titles = [], []
    for label in spread(np.unique(labels), classes):
        chosen = spread(rows[labels == label], images)
        lines.append(torch.from_numpy(np.stack([decode(data.source(row), 96) for row in chosen])))
        titles.append(data.classes[label][:24] if label >= 0 else "no label")
    pictures.grid(file, lines, titles)
