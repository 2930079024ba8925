"""The image cache: each file is decoded once, into one uint8 array on disk.

    load_data    name or folder -> Dataset
    Dataset      the images of a set; `cached(split, side)` returns that array
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import atomic

from . import Records, read, smaller
from .cache_file import (
    cpus,
    header,
    make_row,
    memory_map,
    open_rows,
    row_type,
    stored_keys,
)
from .decode import FITS, Source, decode, scale_of_set
from .errors import UserError
from .progress import format_bytes, progress

VERSION = 4  # part of every row's key: increase it when what is stored changes


def load_data(name_or_folder, root=None, skip_bad=False, workers=None, labels=None, bbox=None,
              fit=None, subset=None, classes=None):
    """Return the Dataset of a named set, downloaded if it has a public source, or of any folder.

    name_or_folder: "toy", "cub", ..., or a path (layouts: imagesets/README.md).
    root: folder of the named sets; None means $FGSSL_DATA, or else ./data.
    skip_bad: skip unreadable files and report their number, instead of raising.
    labels: a level of labels, such as "coarse"; None means the finest. bbox: crop each image to its
    box. fit: one of FITS, for images without a box; None means the first. subset: fraction of the
    images. classes: number of classes.
    FileNotFoundError and UserError say what was expected and where.
    """
    root = Path(root or os.environ.get("FGSSL_DATA") or "data")
    records, crops = read(name_or_folder, root, labels), None
    scale = scale_of_set(records.paths)                      # also of a subset of it
    records = smaller(records, subset, classes)._replace(scale=scale, fit=fit or FITS[0])
    if bbox:
        if records.boxes is None:
            raise UserError(f"{records.name} has no boxes: leave --bbox out.")
        records, crops = records._replace(boxes=None), records.boxes
    note = [labels and f"{labels} labels", bbox and "boxes", fit not in (None, FITS[0]) and fit,
            subset and f"{subset:g} of the images"]
    return Dataset(records, skip_bad, workers, crops, ", ".join(filter(None, note)))


class Split(NamedTuple):
    images: np.ndarray              # uint8 (N, 3, side, side)
    labels: np.ndarray              # int64 (N,)
    rows: np.ndarray | None = None  # int64 (N,): index of each image in the records


@dataclasses.dataclass
class Dataset:
    """The images of a set, in splits train, val and test.

    crops: (N, 4) boxes to crop to, or None. note: the options that chose a part, for messages.
    """

    records: Records
    skip_bad: bool = False
    workers: int | None = None
    crops: np.ndarray | None = None
    note: str = ""

    @property
    def name(self):
        return f"{self.records.name}, {self.note}" if self.note else self.records.name

    @property
    def classes(self):
        return self.records.classes

    def cached(self, split, side, labelled=False):
        """Return a split's images as squares of `side` pixels; decode them if not cached yet.

        labelled: leave out images without a label.
        Returns a Split: images, uint8 (N, 3, side, side), memory-mapped; labels, int64 (N,), -1 if
        unknown; rows, int64 (N,), indices in `records`. N is 0 for a split without images.
        """
        wanted = self.records.labels >= 0 if labelled else True
        rows = np.flatnonzero((self.records.splits == split) & wanted)
        sources, labels = [self.source(row) for row in rows], self.records.labels[rows]
        if not sources:
            return Split(np.empty((0, 3, side, side), np.uint8), labels, rows)
        keys = [row_key(source) for source in sources]
        group = digest(self.records.folder, self.note, split, labelled)[:8]
        file = cache_folder() / (f"{self.records.name[:40]}-{split}-{side}-{group}-"
                                 f"{digest(*keys)}.npy")
        label = f"decoding {self.name} {split}"
        stored, bad = cached_rows(file, sources, keys, side, label, self.workers)
        if bad:
            print("skipped", report_unreadable(bad, len(keys), self.skip_bad), file=sys.stderr)
        if len(stored) < len(keys):
            kept = np.isin(keys, stored["key"])
            labels, rows = labels[kept], rows[kept]
        return Split(stored["image"], labels, rows)

    def source(self, row):
        """The Source of an image of the records: what `decode` reads."""
        box = None if self.crops is None else tuple(self.crops[row].tolist())
        records = self.records
        return Source(records.paths[row], box, records.banner, records.fit, records.scale)


# ------------------------------------------------------------------------------------------------
# The cache's folder
#
# A file is called <set>-<split>-<side>-<group>-<digest of all keys>.npy. When the files of a set
# change, the images of those that did not are copied from older files, also from one that is
# damaged, or that Ctrl-C or kill -9 left unfinished (.part). The new file then replaces the others
# of its group: the same split of the same folder, read with the same options.
# ------------------------------------------------------------------------------------------------


def cache_folder():
    """$FGSSL_CACHE or ~/.cache/fgssl. UserError without a home folder."""
    try:
        return Path(os.environ.get("FGSSL_CACHE") or "~/.cache/fgssl").expanduser()
    except RuntimeError as error:
        raise UserError("there is no home folder for the image cache. Set FGSSL_CACHE to a folder "
                        "you can write to.") from error


def digest(*values):
    return hashlib.sha256(repr(values).encode(errors="surrogateescape")).hexdigest()[:16]


def row_key(source):
    """16 bytes that change with the path, size, time and crop of a source."""
    path, *crop = source
    size = changed = -1                                      # of a broken link
    with contextlib.suppress(FileNotFoundError):
        state = os.stat(path)
        size, changed = state.st_size, state.st_mtime_ns
    return digest(VERSION, os.fsencode(os.path.abspath(path)), size, changed, crop).encode()


def read_row(source, key, side):
    """The row of a source, as bytes; or as text why the image cannot be read."""
    try:
        return make_row(key, decode(source, side))
    except ValueError as error:
        return str(error)


def cached_rows(file, sources, keys, side, label, workers):
    """The rows of a cache file, which is made if need be, and [(row, reason)] of the unreadable
    images, which it lacks. An image is tried again each time: its disk may have failed."""
    stored, bad = open_rows(file, keys, side), []
    if stored is not None and len(stored) < len(keys):
        missing = np.flatnonzero(~np.isin(keys, stored["key"]))
        tried = [read_row(sources[row], keys[row], side) for row in missing]
        bad = [(row, found) for row, found in zip(missing, tried) if isinstance(found, str)]
        if len(bad) < len(missing):
            stored = None
    if stored is None:
        bad = build_cache(file, sources, keys, side, label, workers)
        stored = memory_map(file, side)
    return stored, bad


def build_cache(file, sources, keys, side, label, workers=None):
    """Decode `sources` into `file` with all cores; copy what older files hold.

    The file gets its name only when it is complete. Ctrl-C leaves what was decoded for the next
    time. Returns [(row, reason)] of the unreadable images, which the file lacks. OSError names the
    folder if it cannot be written; UserError if no image can be read.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        older = older_rows(file, side, {*keys})
        with atomic.drafting(file, keep=True) as draft:
            bad = write_rows(draft, sources, keys, side, older, label, workers)
            if len(bad) == len(keys):
                report_unreadable(bad, len(keys), skip=True)
            atomic.publish(draft, file)
        remove_older(file)
        return bad
    except OSError as error:
        raise OSError(f"cannot write the image cache in {file.parent}: {error}. Free some space, "
                      "or set FGSSL_CACHE to a folder you can write to.") from error


def write_rows(draft, sources, keys, side, older, label, workers):
    """Write a cache file: rows of `older`, {key: function that returns it}, and new ones. Returns
    [(row, reason)] of those that cannot be read."""
    bad, new = [], [pair for pair in zip(sources, keys) if pair[1] not in older]
    with open(draft, "wb") as out, ThreadPoolExecutor(workers or cpus()) as pool:
        out.write(header(0, side))
        decoded = chain.from_iterable(
            pool.map(read_row, *zip(*new[i:i + 256]), [side] * 256)
            for i in range(0, len(new), 256))
        decoded = progress(decoded, len(new), label) if new else decoded
        for row, key in enumerate(keys):
            content = older[key]().tobytes() if key in older else next(decoded)
            if isinstance(content, str):
                bad.append((row, content))
            else:
                out.write(content)  # with a memory map, a full disk is a crash
                out.flush()                                  # for kill -9
        next(decoded, None)                                  # the last line of the progress
        out.seek(0)
        out.write(header(len(keys) - len(bad), side))
    return bad


def older_rows(file, side, wanted):
    """{key: function that returns its row} of the wanted keys that other files of the set hold,
    whatever their group."""
    found, start = {}, file.name.rsplit("-", 4)[0] + "-"
    for old in cache_files(file.parent):
        name = old.name.removeprefix(".")
        if name.startswith(start) and f"-{side}-" in name[len(start) - 1:]:
            with contextlib.suppress(OSError, ValueError):   # ValueError: it has no rows
                rows = memory_map(old, side)
                if not wanted.isdisjoint(rows["key"].tolist()):
                    found |= {key: functools.partial(rows.__getitem__, i) for i, key in
                              zip(range(len(rows)), stored_keys(old, side))  # it may be growing
                              if key in wanted}
    return found


def cache_files(folder):
    """The files of the image cache, complete or not; other files and folders may lie beside."""
    return sorted(folder.glob("*-*-*-*.npy*"))


def remove_older(file):
    """Remove the other files of a file's group, but for what a living process is writing."""
    group = file.name.rpartition("-")[0] + "-"
    for old in cache_files(file.parent):
        if old.name.removeprefix(".").startswith(group) and old != file:
            (atomic.remove if old.suffix == ".npy" else atomic.remove_if_dead)(old)


def report_unreadable(bad, total, skip):
    """Describe the unreadable ones of `total` images; bad: [(row, reason)].

    UserError unless `skip`, and if all are unreadable.
    """
    reason = bad[0][1]
    if len(bad) == total:
        raise UserError(f"none of the {total} images can be read: {reason}. Check the folder; "
                        "python fgssl.py data NAME lists what is wrong.")
    more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
    if not skip:
        raise UserError(f"{reason}{more}. Remove or replace it, or pass --skip-bad.")
    return f"{len(bad)} of {total} images: {reason}{more}"


def list_cache(clear=False):
    """Print the sets in the cache, their splits, sides and sizes. clear: remove them."""
    folder, total = cache_folder(), 0
    for file in cache_files(folder):
        name, split, side, _, end = file.name.removeprefix(".").rsplit("-", 4)
        size = file.stat().st_size
        total += size
        rows = size // row_type(int(side)).itemsize if side.isdecimal() else 0
        print(f"{name}  {split}  {rows:,} images of {side} px  {format_bytes(size)}"
              + "  unfinished" * (not end.endswith(".npy")))
        if clear:
            file.unlink()
    print(f"{format_bytes(total)} {'removed from' if clear else 'in'} {folder}"
          + "; --clear removes it" * (total > 0 and not clear))
