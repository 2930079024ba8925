"""An image file of any kind -> a square of it, uint8 (3, side, side)."""

import contextlib
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .errors import UserError
from .imagefile import FORMATS, attempt, load_image

PADDING = (124, 116, 104)  # beyond the picture: ImageNet's mean colour, 0 after `fgssl.normalize`
FITS = ("crop", "pad")


class Source(NamedTuple):
    """An image file and which square of it is wanted, without the lowest `banner` rows of pixels.

    With a box (x, y, width, height in pixels), the smallest square that holds it. Without one, the
    largest centred square of the picture (fit "crop") or the smallest that holds the whole picture
    (fit "pad"). scale: the pixel values of black and white, for images of more than 8 bits; None
    means the image's own (`value_range`).
    """
    path: Path
    box: tuple | None = None
    banner: int = 0
    fit: str = FITS[0]
    scale: tuple | None = None

    def square(self, width, height, scale=1):
        """The square in an image of width x height pixels: left, top and side.

        A square around a box is moved to lie in the picture, and where it is larger than the
        picture extends beyond it evenly; a part of the box outside the picture is ignored. scale:
        pixels of this image per pixel of the file. UserError for a box outside the picture.
        """
        height -= self.banner * scale
        if self.box is None:
            side = max(width, height) if self.fit == "pad" else min(width, height)
            return (width - side) / 2, (height - side) / 2, side
        x, y, w, h = (scale * value for value in self.box)
        if not (w > 0 and h > 0 and -w < x < width and -h < y < height):
            raise UserError(f"its box {self.box} is not in the image")
        spans = [(max(start, 0), min(start + length, extent)) for start, length, extent in
                 ((x, w, width), (y, h, height))]
        side = max(stop - start for start, stop in spans)
        left, top = (min(max((start + stop - side) / 2, 0), extent - side) if side <= extent else
                     (extent - side) / 2 for (start, stop), extent in zip(spans, (width, height)))
        return left, top, side


def decode(source, side):
    """Read a square of an image file of any mode and orientation: uint8 (3, side, side).

    source: a path, or a Source, which says what to crop. EXIF orientation is applied first. Grey,
    palette, CMYK and 16-bit images become RGB; transparency becomes white; what lies beyond the
    picture becomes PADDING. Without a box, a JPEG is decoded at the smallest DCT scale that still
    covers the target (Pillow's draft mode). UserError names a file that cannot be read, or would
    take more memory than `imagefile.MOST_BYTES`; PassingError one that may be readable later.
    """
    source = source if isinstance(source, Source) else Source(source)
    smallest = None if source.box else (side + source.banner, side + source.banner)

    def read():
        image, scale = load_image(source.path, smallest, shrink=True)
        image = to_rgb(upright(image), source.scale)
        left, top, length = source.square(*image.size, scale)
        picture = (image.width, image.height - source.banner * scale)
        return cut_square(image, picture, left, top, length, side).transpose(2, 0, 1)

    return attempt(read, source.path)


def cut_square(image, picture, left, top, length, side):
    """Resize a square of an RGB image to (side, side, 3); PADDING beyond `picture`, its width and
    height."""
    begin, end, into = [], [], []                            # by axis: in the image, in the result
    for start, extent in zip((left, top), picture):
        begin.append(max(start, 0))
        end.append(min(start + length, extent))
        first, last = (round((at - start) / length * side) for at in (begin[-1], end[-1]))
        into.append((min(first, side - 1), max(last, first + 1)))
    (x0, x1), (y0, y1) = into
    part = image.resize((x1 - x0, y1 - y0), Image.BILINEAR, (*begin, *end))
    if part.size == (side, side):
        return np.asarray(part)
    whole = Image.new("RGB", (side, side), PADDING)
    whole.paste(part, (x0, y0))
    return np.asarray(whole)


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


def to_rgb(image, scale=None):
    """Convert a Pillow image of any mode to 8-bit RGB. UserError for NaN or infinite pixels.

    scale: the values of black and white if it has one channel of more than 8 bits.
    """
    if is_deep(image):
        grey = np.asarray(image)
        if not np.isfinite(grey).all():
            raise UserError("it has pixels that are not finite")
        black, white = scale or value_range([grey])
        grey = grey.astype(np.float64)
        grey -= black                                        # in place, for memory
        grey /= white - black
        grey *= 255
        image = Image.fromarray(grey.clip(0, 255, out=grey).round(out=grey).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ------------------------------------------------------------------------------------------------
# Images of more than 8 bits
# ------------------------------------------------------------------------------------------------


def is_deep(image):
    """Whether an image has one channel of 16 or 32 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def value_range(images):
    """The values of black and white in images of more than 8 bits, arrays of whatever shape.

    White is the largest value of the narrowest common range that holds all pixels: 1, or that of
    8, 10, 12, 14 or 16 bits, or else a power of two. Black is 0, and minus white if there are
    negative values. A camera of 12 bits, stored in 16, thus fills the range of 8. 16 bits with 8
    bits of values are a dark image of 16: white stays 65535, and the survey names it. Floats may
    lie 5 % beyond the range, at either end, as resampled ones and reflectances do.
    """
    low = min(float(image.min()) for image in images)
    high = max(float(image.max()) for image in images)
    most, kind = max(high, -low), images[0].dtype
    if kind.itemsize == 2 and most < 256:
        return 0, 65535
    beyond = 0.05 if kind.kind == "f" else 0
    whites = [1] * (kind.kind == "f") + [2 ** bits - 1 for bits in (8, 10, 12, 14, 16)]
    white = (next((w for w in whites if most <= (1 + beyond) * w), None)
             or 2 ** math.ceil(math.log2(most)))
    return (-white if low < -beyond * white else 0), white


def deep_range(path):
    """[the smallest and the largest pixel value (2,)] of an image of more than 8 bits; [] of
    another."""
    with Image.open(path, formats=FORMATS) as image:
        if not is_deep(image):
            return []
    pixels = np.asarray(load_image(path)[0])
    return [np.array([pixels.min(), pixels.max()])]


def scale_of_set(paths, most=64):
    """One value_range for all images of more than 8 bits of a set, from up to `most` of its files,
    evenly spaced; None if none of those has more than 8 bits.

    With a range of its own, each image would be brightened differently.
    """
    paths = [path for path in paths if path.suffix.lower() not in (".jpg", ".jpeg", ".webp")]
    ranges = []
    for i in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int)):
        with contextlib.suppress(UserError):                 # `decode` names this file again
            ranges += attempt(functools.partial(deep_range, paths[i]), paths[i])
    ranges = [pixels for pixels in ranges if np.isfinite(pixels).all()]
    return value_range(ranges) if ranges else None
