"""The image cache: each file is decoded once, into one uint8 array on disk.

    load_data    name or folder -> Dataset
    Dataset      the images of a set; `cached(split, side)` returns that array
    decode       image file of any kind -> a square of it, uint8 (3, side, side)
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

MOST_PIXELS = 500_000_000                # of an image that is read
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # where Pillow warns; it refuses above twice this
VERSION = 2  # part of every cache's name: increase it when the stored pixels change


def load_data(name_or_folder, root=None, skip_bad=False, workers=None, labels=None, bbox=None,
              subset=None, classes=None):
    """Return the Dataset of a named set, downloaded if it has a public source, or of any folder.

    name_or_folder: "toy", "cub", ..., or a path (layouts: imagesets/README.md).
    root: folder of the named sets; None means $FGSSL_DATA, or else ./data.
    skip_bad: skip unreadable files and report their number, instead of raising.
    labels: a level of labels, such as "coarse"; None means the finest. bbox: crop each image to its
    box. subset: fraction of the images. classes: number of classes.
    FileNotFoundError and UserError say what was expected and where.
    """
    root = Path(root or os.environ.get("FGSSL_DATA") or "data")
    records, crops = smaller(read(name_or_folder, root, labels), subset, classes), None
    if bbox:
        if records.boxes is None:
            raise UserError(f"{records.name} has no boxes: leave --bbox out.")
        records, crops = records._replace(boxes=None), records.boxes
    note = [labels and f"{labels} labels", bbox and "boxes", subset and f"{subset:g} of the images"]
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
        file = cache_file(f"{self.records.name[:40]}-{split}-{side}", sources)
        if not file.exists():
            label = f"decoding {self.name} {split}"
            build_cache(file, sources, side, label, self.skip_bad, self.workers)
        images = np.load(file, mmap_mode="c")                # "c": writes do not reach the disk
        with open(file, "rb") as content:
            content.seek(images.offset + images.nbytes)      # the JSON behind the array
            bad = json.load(content)
        if bad:
            print("skipped", report_unreadable(bad, len(sources), self.skip_bad), file=sys.stderr)
            labels, rows = (np.delete(v, [row for row, _ in bad]) for v in (labels, rows))
        return Split(images, labels, rows)

    def source(self, row):
        """The Source of an image of the records: what `decode` reads."""
        box = None if self.crops is None else tuple(self.crops[row].tolist())
        return Source(self.records.paths[row], box, self.records.banner)


class Source(NamedTuple):
    """An image file and what to crop from it: a square around the box (x, y, width, height in
    pixels), or else in the centre; without the lowest `banner` rows of pixels."""
    path: Path
    box: tuple | None = None
    banner: int = 0

    def square(self, width, height, scale=1):
        """The crop in an image of width x height pixels: left, top and side of a square.

        The largest centred square; or the smallest that contains the box, moved and cut to lie in
        the image. scale: pixels of this image per pixel of the file. UserError for a box outside
        the image.
        """
        height -= self.banner * scale
        if self.box is None:
            side = min(width, height)
            return (width - side) / 2, (height - side) / 2, side
        x, y, w, h = (scale * value for value in self.box)
        if not (w > 0 and h > 0 and -w < x < width and -h < y < height):
            raise UserError(f"its box {self.box} is not in the image")
        side = min(max(w, h), width, height)
        left, top = x + (w - side) / 2, y + (h - side) / 2
        return min(max(left, 0), width - side), min(max(top, 0), height - side), side


# ------------------------------------------------------------------------------------------------
# A cache file: a .npy array followed by JSON, [row, reason] of each unreadable image
# ------------------------------------------------------------------------------------------------


def cache_file(name, sources):
    """The path of a cache, in $FGSSL_CACHE or ~/.cache/fgssl.

    It ends in a digest of the path, size, time and crop of every source: a changed file makes a new
    cache.
    """
    digest = hashlib.sha256(b"%d" % VERSION)
    for path, *crop in sources:
        size = time = -1                                     # of a broken link
        with contextlib.suppress(FileNotFoundError):
            size, time = os.stat(path).st_size, os.stat(path).st_mtime_ns
        absolute = os.fsencode(os.path.abspath(path))
        digest.update(b"%s\0%d\0%d\0%a\n" % (absolute, size, time, crop))
    folder = Path(os.environ.get("FGSSL_CACHE") or Path.home() / ".cache" / "fgssl")
    return folder / f"{name}-{digest.hexdigest()[:16]}.npy"


def build_cache(file, sources, side, label, skip_bad=False, workers=None):
    """Decode `sources` into `file` with all cores.

    The file gets its name only when it is complete, so an interrupted build leaves no cache.
    OSError names the folder if it cannot be written; UserError for unreadable images unless
    `skip_bad`, and if no image can be read.
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
            images = progress(chain.from_iterable(images), len(sources), label)
            for row, image in enumerate(images):
                if isinstance(image, str):
                    bad.append((row, image))
                else:
                    out.write(image.tobytes())  # with a memory map, a full disk is a crash
            out.write(json.dumps(bad).encode())
            if bad:  # fewer images than announced; NumPy pads its header, so a smaller N fits
                out.seek(0)
                np.lib.format.write_array_header_1_0(out, header(len(sources) - len(bad)))
        if bad:
            report_unreadable(bad, len(sources), skip_bad)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"cannot write the image cache in {file.parent}: {error}. Free some space, "
                      "or set FGSSL_CACHE to a folder you can write to.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


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


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


def decode(source, side):
    """Read a square of an image file of any mode and orientation: uint8 (3, side, side).

    source: a path, or a Source, which says what to crop. EXIF orientation is applied first. Grey,
    palette, CMYK and 16-bit images become RGB; transparency becomes white. Without a box, a JPEG is
    decoded at the smallest DCT scale that still covers the target (Pillow's draft mode). UserError
    names a file that cannot be read.
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
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise UserError(f"cannot read image {path}: {reason(error)}") from error


def reason(error):
    """Why Pillow could not read an image, in words."""
    if isinstance(error, Image.DecompressionBombError):
        return (f"it has more than {MOST_PIXELS // 10 ** 6} megapixels, the most that is read. "
                "Make it smaller.")
    return str(error) or "it does not fit into memory"


def upright(image):
    """Turn an image as its EXIF orientation says; damaged EXIF is ignored."""
    turn = Image.Transpose
    image.load()  # Pillow itself turns a TIFF while it loads, and deletes the orientation
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # of many kinds, as in `decode`
        return image
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
             5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    return image.transpose(turns[orientation]) if orientation in turns else image


def to_rgb(image):
    """Convert a Pillow image of any mode to 8-bit RGB. UserError for NaN or infinite pixels."""
    if image.mode == "F" or image.mode.startswith("I"):  # one channel of 16 or 32 bits
        grey = np.asarray(image, np.float64)
        if not np.isfinite(grey).all():
            raise UserError("it has pixels that are not finite")
        white = next((w for w in (1, 255, 65535) if grey.max() <= w), grey.max())
        if image.mode.startswith("I;16"):
            white = 65535
        image = Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
