"""The images of a set: each file is decoded once, into one uint8 array on disk.

    load_data    a name or a folder -> Dataset
    Dataset      the files of a set; its `cached(split, side)` is that array
    decode       a file of any kind -> a square of its picture, uint8 (3, side, side)
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import Records, read, smaller
from .errors import UserError
from .progress import progress

VERSION = 2  # part of every cache's name: raise it when something else is stored


def load_data(name_or_folder, root=None, skip_bad=False, workers=None, labels=None, bbox=None,
              subset=None, classes=None):
    """Find a data set by name, downloading it where it has a public source, or read any folder.

    name_or_folder: "toy", "cub", ..., or a path (see imagesets/ for the layouts).
    root: where the named sets lie; None means $FGSSL_DATA, else ./data.
    skip_bad: leave unreadable files out, with a count, where they would raise otherwise.
    labels: which of a set's labels, such as "coarse"; None is the finest. bbox: show the box of
    each image in place of its centre. subset, classes: a share of the images, a number of classes.
    Returns a Dataset. Raises FileNotFoundError or ValueError saying what was wanted and where.
    """
    root = Path(root or os.environ.get("FGSSL_DATA") or "data")
    records, crops = smaller(read(name_or_folder, root, labels), subset, classes), None
    if bbox:
        if records.boxes is None:
            raise UserError(f"{records.name} has no boxes: leave --bbox out.")
        records, crops = records._replace(boxes=None), records.boxes
    part = [labels and f"{labels} labels", bbox and "boxes", subset and f"{subset:g} of the images"]
    return Dataset(records, skip_bad, workers, crops, ", ".join(filter(None, part)))


class Split(NamedTuple):
    images: np.ndarray              # uint8 (N, 3, side, side)
    labels: np.ndarray              # int64 (N,)
    rows: np.ndarray | None = None  # int64 (N,): where each image stands in the records


@dataclasses.dataclass
class Dataset:
    """The files of a data set and what is known of them, split into train, val and test.

    crops: (N, 4), where images are cropped to their boxes. part: what of the set, in words.
    """

    records: Records
    skip_bad: bool = False
    workers: int | None = None
    crops: np.ndarray | None = None
    part: str = ""

    @property
    def name(self):
        return f"{self.records.name}, {self.part}" if self.part else self.records.name

    @property
    def classes(self):
        return self.records.classes

    def cached(self, split, side, labelled=False):
        """Every image of a split, decoded once: one square of each, `side` pixels wide.

        labelled: leave out images whose label is unknown.
        Returns images, uint8 (N, 3, side, side), memory-mapped; labels, int64 (N,), -1 where
        unknown; rows, int64 (N,), their places in `records`. N is 0 for a split without images.
        """
        wanted = self.records.labels >= 0 if labelled else True
        rows = np.flatnonzero((self.records.splits == split) & wanted)
        sources, labels = [self.source(row) for row in rows], self.records.labels[rows]
        if not sources:
            return Split(np.empty((0, 3, side, side), np.uint8), labels, rows)
        file = cache_file(f"{self.records.name[:40]}-{split}-{side}", sources)
        if not file.exists():
            what = f"decoding {self.name} {split}"
            build_cache(file, sources, side, what, self.skip_bad, self.workers)
        images = np.load(file, mmap_mode="c")                # "c": stray writes go nowhere
        with open(file, "rb") as content:
            content.seek(images.offset + images.nbytes)      # what lies behind the array
            bad = json.load(content)
        if bad:
            print("skipped", unreadable(bad, len(sources), self.skip_bad), file=sys.stderr)
            labels, rows = (np.delete(v, [row for row, _ in bad]) for v in (labels, rows))
        return Split(images, labels, rows)

    def source(self, row):
        """What is read of an image of the records, as `decode` takes it."""
        box = None if self.crops is None else tuple(self.crops[row].tolist())
        return Source(self.records.paths[row], box, self.records.banner)


class Source(NamedTuple):
    """A file, and what of its picture is shown: around a box (x, y, width, height, in pixels) or in
    the middle; without the `banner`, rows of pixels at its foot."""
    path: Path
    box: tuple | None = None
    banner: int = 0

    def square(self, width, height, scale=1):
        """What is shown of a picture of these sides: left, top and side of a square, in pixels.

        The largest one in the middle; or the smallest that holds the box, moved and cut to lie in
        the picture. scale: pixels of this picture for one of the file's. Raises ValueError for a
        box outside of the picture.
        """
        height -= self.banner * scale
        if self.box is None:
            side = min(width, height)
            return (width - side) / 2, (height - side) / 2, side
        x, y, w, h = (scale * value for value in self.box)
        if not (w > 0 and h > 0 and -w < x < width and -h < y < height):
            raise UserError(f"its box {self.box} is not in the picture")
        side = min(max(w, h), width, height)
        left, top = x + (w - side) / 2, y + (h - side) / 2
        return min(max(left, 0), width - side), min(max(top, 0), height - side), side


# ------------------------------------------------------------------------------------------------
# The file of a cache: a .npy array and, behind it, JSON: [row, why] of each unreadable image
# ------------------------------------------------------------------------------------------------


def cache_file(name, sources):
    """Its path, in $FGSSL_CACHE or ~/.cache/fgssl: `name` and a digest of every source's path, size
    and time and of what is cropped, so that a changed file makes a new cache."""
    digest = hashlib.sha256(b"%d" % VERSION)
    for path, *crop in sources:
        size = time = -1                                     # of a link to nowhere
        with contextlib.suppress(FileNotFoundError):
            size, time = os.stat(path).st_size, os.stat(path).st_mtime_ns
        name_of_file = os.fsencode(os.path.abspath(path))
        digest.update(b"%s\0%d\0%d\0%a\n" % (name_of_file, size, time, crop))
    folder = Path(os.environ.get("FGSSL_CACHE") or Path.home() / ".cache" / "fgssl")
    return folder / f"{name}-{digest.hexdigest()[:16]}.npy"


def build_cache(file, sources, side, what, skip_bad=False, workers=None):
    """Decode `sources` on all cores into `file`.

    It is written under a temporary name and renamed when whole: an interrupted build leaves nothing
    that could pass for a cache. Raises OSError naming the folder where it cannot be written to;
    ValueError for unreadable images, unless `skip_bad`, and where all are.
    """
    def read(source):
        try:
            return decode(source, side)
        except ValueError as error:
            return str(error)

    def header(n):
        return {"descr": "|u1", "fortran_order": False, "shape": (n, 3, side, side)}

    partial, bad = file.with_name(f"{file.name}.{os.getpid()}.part"), []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (open(partial, "wb") as out, warnings.catch_warnings(),
              ThreadPoolExecutor(workers or os.cpu_count()) as pool):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            np.lib.format.write_array_header_1_0(out, header(len(sources)))
            images = (pool.map(read, sources[i:i + 256]) for i in range(0, len(sources), 256))
            images = progress(chain.from_iterable(images), len(sources), what)
            for row, image in enumerate(images):
                if isinstance(image, str):
                    bad.append((row, image))
                else:
                    out.write(image.tobytes())  # not by memory map: there a full disk is a crash
            out.write(json.dumps(bad).encode())
            if bad:  # fewer images than promised; NumPy pads its header so that N can shrink
                out.seek(0)
                np.lib.format.write_array_header_1_0(out, header(len(sources) - len(bad)))
        if bad:
            unreadable(bad, len(sources), skip_bad)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"cannot write the image cache in {file.parent}: {error}. Free some space, "
                      "or set FGSSL_CACHE to a folder you can write to.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def unreadable(bad, total, skip):
    """What of `total` images cannot be read, [(row, why)], in words; unless `skip`, and where all
    are, as a ValueError."""
    first = bad[0][1]
    if len(bad) == total:
        raise UserError(f"none of the {total} images can be read: {first}")
    more = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
    if not skip:
        raise UserError(f"{first}{more}. Remove or replace it, or pass --skip-bad.")
    return f"{len(bad)} of {total} images: {first}{more}"


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


def decode(source, side):
    """Read one image file of any mode and orientation: a square of it, uint8 (3, side, side).

    source: a path, or a Source, which says what of the picture. EXIF rotation is applied first;
    grey, palette, CMYK and 16-bit images become RGB, transparency becomes white. A JPEG of which
    the middle is shown is decoded at the smallest DCT scale that still covers the target (Pillow's
    draft mode). Raises ValueError naming the file where it cannot be read.
    """
    source = source if isinstance(source, Source) else Source(source)
    path = source.path
    try:
        with Image.open(path) as image:
            longest = max(image.size)
            if source.box is None:
                image.draft("RGB", (side + source.banner, side + source.banner))
            scale = max(image.size) / longest
            image = to_rgb(upright(image))
            left, top, length = source.square(*image.size, scale)
            image = image.resize((side, side), Image.BILINEAR,
                                 (left, top, left + length, top + length))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, ...
        raise UserError(f"cannot read image {path}: {error}") from error


def upright(image):
    """The image turned as its EXIF orientation says; damaged EXIF is no reason to lose it."""
    turn = Image.Transpose
    image.load()  # a TIFF is turned by Pillow itself while it loads, and its orientation erased
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # of many kinds, as for the image itself
        return image
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
             5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    return image.transpose(turns[orientation]) if orientation in turns else image


def to_rgb(image):
    """An 8-bit RGB copy of a Pillow image of any mode. Raises ValueError for NaN pixels."""
    if image.mode == "F" or image.mode.startswith("I"):  # one channel of 16 or 32 bits
        grey = np.asarray(image, np.float64)
        if not np.isfinite(grey).all():
            raise UserError("it holds pixels that are not finite")
        white = next((w for w in (1, 255, 65535) if grey.max() <= w), grey.max())
        if image.mode.startswith("I;16"):
            white = 65535
        image = Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
