"""A survey of a set: what it holds, what is wrong with it, and a picture of samples.

    python fgssl.py data NAME_OR_FOLDER
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import pictures

from .cache_file import cpus
from .decode import decode
from .errors import PassingError
from .imagefile import FORMATS
from .progress import progress

LISTED = 5  # of each fault, how many files are named


def survey(data, folder):
    """Print the contents and faults of a Dataset; draw samples to folder/<name>.png.

    Every file is read completely. Reported are unreadable files, near-black and flat images,
    duplicates (files of equal content) and near-duplicates (resized or saved again). Within a split
    they count twice; across splits they leak from train to test, and are named first.
    """
    records = data.records
    sources = [data.source(row) for row in range(len(records.paths))]
    with ThreadPoolExecutor(data.workers or cpus()) as pool:
        results = list(progress(pool.map(examine, sources), len(sources), f"reading {data.name}"))
    bad = [row for row, result in enumerate(results) if result.error]
    good = np.setdiff1d(np.arange(len(sources)), bad)
    top = os.path.commonpath([path.parent for path in records.paths])

    def names(rows, mark=" "):
        return "  " + mark.join(os.path.relpath(records.paths[row], top) for row in rows)

    print_counts(records)
    if len(good):
        sides = [results[row].size for row in good]
        sizes = {"min": np.min(sides, 0), "median": np.median(sides, 0), "max": np.max(sides, 0)}
        sizes = ", ".join(f"{name} {w:g} x {h:g}" for name, (w, h) in sizes.items())
        print(f"   sizes {sizes} pixels")
    print(f"unreadable {len(bad)}")
    for row in bad[:LISTED]:
        print(f"  {results[row].error}")
    black = [row for row in good if results[row].small.max() < 32]
    flat = [row for row in np.setdiff1d(good, black) if np.ptp(results[row].small) < 8]
    for title, rows in (("near-black {}: no pixel above an eighth of white", black),
                        ("flat {}: all pixels within a 32nd of white", flat)):
        if rows:
            print(f"{title.format(len(rows))}; is their depth right?")
            for row in rows[:LISTED]:
                print(names([row]))
    rows_of = {}                                             # by digest of the content
    for row in good:
        rows_of.setdefault(results[row].digest, []).append(row)
    print_copies("duplicates", [rows for rows in rows_of.values() if len(rows) > 1], records,
                 lambda rows: names(rows, " = "))
    first = [rows[0] for rows in rows_of.values()]           # one of each content
    small = np.array([results[row].small for row in first])
    print_copies("near-duplicates", [[first[i], first[j]] for i, j in near_pairs(small)], records,
                 lambda rows: names(rows, " ~ "))
    if len(good):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{records.name}.png"
        contact_sheet(file, data, good)
        print(f"wrote {file}")


def print_copies(title, groups, records, describe_rows):
    """Print the number of groups of rows that show the same, and some: leaks into test first."""
    def differ(rows):
        """Whether images leak from train to test, differ in split, and differ in label."""
        splits = {*records.splits[rows]}
        return {"train", "test"} <= splits, len(splits) > 1, len({*records.labels[rows]}) > 1

    line = f"{title} {len(groups)}"
    if groups:
        leaks, across, contradictory = np.sum([differ(rows) for rows in groups], 0)
        line += (f": {across} across splits, {leaks} of them train and test; {contradictory} with "
                 "different labels")
    print(line)
    for rows in sorted(groups, key=differ, reverse=True)[:LISTED]:
        print(describe_rows(rows))
    if len(groups) > LISTED:
        print(f"  and {len(groups) - LISTED} more")


def near_pairs(small):
    """Pairs (i, j) of images that look the same, from grey images (N, 32, 32), uint8.

    Candidates share 16 of the 64 bits of a perceptual hash: the signs of the 8 x 8 lowest
    frequencies of a cosine transform, beside their median (Zauner 2010). Only near ones in the
    order of these bits are compared, so time grows with N. The images themselves decide: they
    differ by less than a tenth of their contrast.
    """
    if len(small) < 2:
        return []
    pixels = small.reshape(len(small), -1).astype(np.float32)
    wave = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5)).astype(np.float32)
    low = (wave @ pixels.reshape(-1, 32, 32) @ wave.T).reshape(-1, 64)
    bands = np.packbits(low > np.median(low, 1, keepdims=True), axis=1).view(np.uint16)
    pairs, contrast = set(), pixels.std(1)
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for step in range(1, 21):
            a, b = order[:-step], order[step:]
            same = band[a] == band[b]
            a, b = a[same], b[same]
            for part in range(0, len(a), 4096):
                i, j = a[part:part + 4096], b[part:part + 4096]
                near = np.abs(pixels[i] - pixels[j]).mean(1) < 0.1 * np.minimum(contrast[i],
                                                                                contrast[j])
                pairs.update((min(x, y), max(x, y)) for x, y in zip(i[near], j[near]))
    return sorted(pairs)


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


class Examined(NamedTuple):
    """What `examine` finds in a file: an error, or the rest."""
    error: str | None
    digest: bytes | None = None      # of the content
    size: tuple | None = None        # width and height in pixels
    small: np.ndarray | None = None  # uint8 (32, 32), grey


def examine(source):
    """Read a file completely; return what is Examined."""
    try:
        digest = hashlib.blake2b(source.path.read_bytes()).digest()
        image = decode(source, 96).mean(0).reshape(32, 3, 32, 3).mean((1, 3))
        with Image.open(source.path, formats=FORMATS) as opened:
            return Examined(None, digest, opened.size, image.astype(np.uint8))
    except (OSError, ValueError, PassingError) as error:
        return Examined(str(error))


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
