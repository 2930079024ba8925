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
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import Records, read, smaller
from .decode import FITS, Source, decode, scale_of_set
from .errors import UserError
from .progress import format_bytes, progress

VERSION = 3  # part of every row's key: increase it when the stored pixels change


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


def cpus():
    """The number of processors that this process may use; a cluster or container gives it some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
        bad = [] if file.exists() else build_cache(file, sources, keys, side, label, self.workers)
        stored = np.load(file, mmap_mode="c")                # "c": writes do not reach the disk
        if len(stored) < len(keys) and not bad:              # what could not be read is tried again
            present = {*stored_rows(file, side)[1]}
            missing = [row for row, key in enumerate(keys) if key not in present]
            tried = [read_image(sources[row], side) for row in missing]
            bad = [(row, image) for row, image in zip(missing, tried) if isinstance(image, str)]
            if len(bad) < len(missing):
                bad = build_cache(file, sources, keys, side, label, self.workers)
                stored = np.load(file, mmap_mode="c")
        if bad:
            skipped = report_unreadable(bad, len(sources), self.skip_bad)
            print("skipped", skipped, file=sys.stderr)
            labels, rows = (np.delete(v, [row for row, _ in bad]) for v in (labels, rows))
        return Split(stored, labels, rows)

    def source(self, row):
        """The Source of an image of the records: what `decode` reads."""
        box = None if self.crops is None else tuple(self.crops[row].tolist())
        records = self.records
        return Source(records.paths[row], box, records.banner, records.fit, records.scale)


# ------------------------------------------------------------------------------------------------
# A cache file: a .npy array of images, followed by the key of each, 16 bytes
#
# Its name is <set>-<split>-<side>-<group>-<digest of all keys>.npy. When the files of a set change,
# the images of those that did not are copied from older files, also from one that an interruption
# left: .left, or after kill -9 .part, with its keys in .part.keys. The new file then replaces the
# others of its group: the same split of the same folder, read with the same options.
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


def read_image(source, side):
    """The image of a source, or as text why it cannot be read."""
    try:
        return decode(source, side)
    except ValueError as error:
        return str(error)


def build_cache(file, sources, keys, side, label, workers=None):
    """Decode `sources` into `file` with all cores; copy what older files hold.

    The file gets its name only when it is complete. Ctrl-C leaves what was decoded for the next
    time. Returns [(row, reason)] of the unreadable images, which the file lacks. OSError names the
    folder if it cannot be written; UserError if no image can be read.
    """
    def write_header(out, count):
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, {
            "descr": "|u1", "fortran_order": False, "shape": (count, 3, side, side)})

    partial, bad = file.with_name(f"{file.name}.{os.getpid()}.part"), []
    partial_keys = keys_file(partial)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        older = older_rows(file, side, set(keys))
        new = [source for source, key in zip(sources, keys) if key not in older]
        with (open(partial, "w+b") as out, open(partial_keys, "w+b", 0) as out_keys,
              warnings.catch_warnings(), ThreadPoolExecutor(workers or cpus()) as pool):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            write_header(out, len(keys))
            images = chain.from_iterable(
                pool.map(read_image, new[i:i + 256], [side] * 256) for i in range(0, len(new), 256))
            images = progress(images, len(new), label) if new else images
            try:
                for row, key in enumerate(keys):
                    image = older[key]() if key in older else next(images)
                    if isinstance(image, str):
                        bad.append((row, image))
                    else:
                        out.write(image.tobytes())  # with a memory map, a full disk is a crash
                        out.flush()                          # for kill -9: before its key
                        out_keys.write(key)
                next(images, None)                           # the last line of the progress
            finally:  # fewer images than announced; NumPy pads its header, so a smaller N fits
                out_keys.seek(0)
                written = out_keys.read()
                out.write(written)
                write_header(out, len(written) // 16)
        if len(bad) == len(keys):
            report_unreadable(bad, len(keys), skip=True)
        os.replace(partial, file)
        remove_older(file)
        return bad
    except OSError as error:
        raise OSError(f"cannot write the image cache in {file.parent}: {error}. Free some space, "
                      "or set FGSSL_CACHE to a folder you can write to.") from error
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            os.replace(partial, file.with_name(f"{file.name}.left"))
        raise
    finally:
        for leftover in (partial, partial_keys):
            with contextlib.suppress(OSError):
                leftover.unlink()


def keys_file(partial):
    """Where the keys of an unfinished file are."""
    return partial.with_name(f"{partial.name}.keys")


def stored_rows(file, side):
    """The images of a cache file, a memory map, and their keys. Of an unfinished file, only what
    is complete. OSError or ValueError if the file is of another kind."""
    with open(file, "rb") as content:
        np.lib.format.read_magic(content)
        (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(content)
        start, size = content.tell(), 3 * side * side
        if shape != [3, side, side] or dtype != np.uint8:
            raise ValueError(f"{file} holds other images")
        if file.suffix == ".part":
            keys = keys_file(file).read_bytes()
            count = min(len(keys) // 16, (file.stat().st_size - start) // size)
        else:
            content.seek(start + count * size)
            keys = content.read(16 * count)
    images = np.memmap(file, np.uint8, "r", start, (count, *shape)) if count else []
    return images, [keys[i:i + 16] for i in range(0, 16 * count, 16)]


def older_rows(file, side, wanted):
    """{key: function that returns its image} of the wanted keys that other files of the set hold,
    whatever their group."""
    found, start = {}, file.name.rsplit("-", 4)[0] + "-"
    for old in cache_files(file.parent):
        if old.name.startswith(start) and f"-{side}-" in old.name[len(start) - 1:]:
            with contextlib.suppress(OSError, ValueError, EOFError):
                images, keys = stored_rows(old, side)
                found |= {key: functools.partial(images.__getitem__, i)
                          for i, key in enumerate(keys) if key in wanted}
    return found


def cache_files(folder):
    """The files of the image cache, complete or not; other files and folders may lie beside."""
    endings = (".npy", ".npy.left", ".part")
    return sorted(path for path in folder.glob("*-*-*-*.npy*") if path.name.endswith(endings))


def remove_older(file):
    """Remove the other files of a file's group. An unfinished one may belong to a process that is
    still writing, unless it has not changed for an hour."""
    group = file.name.rpartition("-")[0] + "-"
    for old in cache_files(file.parent):
        if old.name.startswith(group) and old != file:
            with contextlib.suppress(OSError):               # Windows keeps a file that is in use
                if old.suffix != ".part" or time.time() - old.stat().st_mtime > 3600:
                    old.unlink()
                    keys_file(old).unlink(missing_ok=True)


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
        name, split, side, _, end = file.name.rsplit("-", 4)
        size = file.stat().st_size
        total += size
        rows = size // (3 * int(side) ** 2) if side.isdecimal() else 0
        print(f"{name}  {split}  {rows:,} images of {side} px  {format_bytes(size)}"
              + "  unfinished" * (not end.endswith(".npy")))
        if clear:
            file.unlink()
            keys_file(file).unlink(missing_ok=True)
    print(f"{format_bytes(total)} {'removed from' if clear else 'in'} {folder}"
          + "; --clear removes it" * (total > 0 and not clear))
