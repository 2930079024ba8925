"""An image file -> a Pillow image, checked before a pixel of it is decoded.

    load_image(path)     of one of FORMATS, no checksum or length in it wrong, in at most MOST_BYTES
    attempt(read, path)  an error that may pass is tried again, any other names the file

JPEG, WebP, GIF, BMP, PPM, and TIFF without Deflate have no checksum: a changed bit makes another
picture, and often nothing can tell. imagesets/README.md has how often.
"""

import errno
import io
import os
import re
import stat
import struct
import time
import zlib

from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import PassingError, UserError
from .progress import format_bytes

# By content, whatever a file is called. What else Pillow knows is rare, or starts another program:
# EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
MOST_BYTES = 10 ** 9  # of memory for one image, with its file; each thread decodes one
Image.MAX_IMAGE_PIXELS = None            # `bytes_to_decode` knows more, and is asked in its place
ImageFile.LOAD_TRUNCATED_IMAGES = False  # or Pillow would fill in what is missing

# Errors of a disk, a network or a machine short of something, and not of the file.
PASSING = {number for name in (
    "EIO ENOMEM EAGAIN EINTR EBUSY EMFILE ENFILE ENOBUFS ETIMEDOUT ECONNRESET EHOSTDOWN ENETDOWN "
    "ENETUNREACH EHOSTUNREACH ESTALE EREMOTEIO ENOLINK").split()
    if (number := getattr(errno, name, None))}               # Windows lacks some
JPEG_END, ZEROS = b"\xff\xd9", re.compile(rb"\0+")
WAITS = (0.05, 0.25, 1)                                      # seconds before each further try


def attempt(read, path):
    """read(), which uses the image file `path`, again after an error that may pass.

    PassingError if it does not pass. UserError with the file's name for any other error: Pillow
    raises OSError, SyntaxError, struct.error and more.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except Exception as error:
            failure = error
        if not isinstance(failure, MemoryError) and getattr(failure, "errno", None) not in PASSING:
            reason = str(failure) or type(failure).__name__
            raise UserError(f"cannot read image {path}: {reason}") from failure
        if wait:
            time.sleep(wait)
    raise PassingError(f"cannot read image {path}: {getattr(failure, 'strerror', 0) or 'no memory'}"
                       f", {len(WAITS) + 1} times. It may be the disk, the network or the memory "
                       "and not the file: run again, with fewer --workers if memory is short; or "
                       "move the file away") from failure


def load_image(path, smallest=None, shrink=False):
    """Read and decode an image file: a Pillow image, and its scale.

    smallest: (width, height), which a JPEG is decoded at the smallest DCT scale to cover (Pillow's
    draft mode). shrink: a JPEG may be smaller yet, if memory asks for it. The scale is that of such
    a JPEG, 1 or less. Raises OSError, and ValueError or what else Pillow raises for a file that is
    damaged, of another format, or too large.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):                      # to open a pipe is to wait for ever
        raise ValueError("it is a folder, a device or a pipe")
    with open(path, "rb", buffering=0) as file:
        if state.st_size > MOST_BYTES:
            raise ValueError(f"it has more than {format_bytes(MOST_BYTES)}, the most that is read")
        content = file.readall()                             # a map would crash if it is truncated
    return load_content(content, smallest, shrink)


def load_content(content, smallest=None, shrink=False):
    """`load_image` of the bytes of a file."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        check_png(content)
    elif content.startswith(b"RIFF"):
        check_webp(content)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is damaged, or none of {', '.join(FORMATS)}") from None
    size, fixed, scan = image.size, len(content), None
    if image.format in ("JPEG", "MPO"):
        scan = check_jpeg(image, content)
        if not scan:                                         # progressive: all its coefficients
            fixed += 2 * image.layers * size[0] * size[1]
    fit_memory(image, fixed, smallest or size, shrink)
    if image.format == "TIFF":
        check_tiff(image, content)
    elif image.format in ("GIF", "JPEG2000", "AVIF"):
        require_no_hole(content)
    if scan:
        image.fp = image._fp = scan
    image.load()
    if scan and not scan.complete:
        first = content.find(JPEG_END, scan.start)           # a second JPEG may follow
        if first < scan.last:
            return load_content(content[:first + 2], smallest, shrink)
        raise ValueError("corrupt JPEG data: some are left over at the end of the picture")
    return image, max(image.size) / max(size)                # a TIFF is turned while it is loaded


def fit_memory(image, fixed, smallest, shrink):
    """Set an opened JPEG to be decoded small enough; ValueError for an image that is not.

    fixed: bytes besides the pixels. The others: as of `load_image`.
    """
    width, height = image.size
    if fixed + 40 * width * height < MOST_BYTES and image.format != "TIFF":  # fits, whatever it is
        return image.draft("RGB", smallest)
    need = bytes_to_decode(image)
    if shrink and fixed + need > MOST_BYTES:
        scale = next((s for s in (2, 4) if fixed + need / s ** 2 <= MOST_BYTES), 8)
        smallest = min(smallest[0], width // scale), min(smallest[1], height // scale)
    if smallest != image.size and min(smallest) > 0 and image.draft("RGB", smallest):
        need = bytes_to_decode(image)
    if fixed + need > MOST_BYTES:
        raise ValueError(f"its {width} x {height} pixels take {format_bytes(fixed + need)} to "
                         f"decode, and the most is {format_bytes(MOST_BYTES)}. Make it smaller")


def bytes_to_decode(image):
    """How much memory `decode` takes at its peak for an opened image, besides its file: measured
    for each format and mode, and rounded up."""
    depth = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16L": 2, "I;16B": 2}.get(image.mode, 4)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        depth += 12                                          # RGBA, white, both, RGB
    elif image.mode[0] in "IF":
        depth += 14                                          # float64 and more
    elif image.mode != "RGB":
        depth += 4                                           # RGB
    elif "exif" in image.info or image.format == "TIFF" and image.tag_v2.get(0x0112, 1) != 1:
        depth += 4                                           # turned
    depth += {"WEBP": 12, "AVIF": 12, "JPEG2000": 5 * len(image.getbands())}.get(image.format, 0)
    strip = strip_shape(image)[2] if image.format == "TIFF" else 0
    return depth * image.width * image.height + strip


# ------------------------------------------------------------------------------------------------
# Is the file whole? A ValueError says what is wrong
# ------------------------------------------------------------------------------------------------


def require_no_hole(content, start=0, end=None):
    """Refuse compressed data with a lost block, such as a crash or a bad disk leaves: zeros, 512 or
    more, or up to the end, that begin and end where a sector does. A flat picture may compress to
    as many zeros, but hardly at such places; up to 2 zeros on either side may be data."""
    end = len(content) if end is None else end
    at = content.find(bytes(512), start, end)
    while at >= 0 or content.endswith(bytes(16), start, end):
        first = len(content[:at].rstrip(b"\0"))              # at -1: those before the last byte
        stop = ZEROS.match(content, first).end()
        if -first % 512 <= 2 and (stop % 512 <= 2 or stop >= end):
            raise ValueError(f"it is damaged: {stop - first} bytes at {first} are zeros, a lost "
                             "block")
        if at < 0:
            break
        at = content.find(bytes(512), stop, end)


def check_png(content):
    """Compare the checksum of every chunk; Pillow skips those of the pixels."""
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise ValueError("it is truncated: the end of the PNG is missing")
        size, kind = struct.unpack_from(">I4s", content, at)
        chunk = memoryview(content)[at + 4:at + 8 + size]
        checksum = content[at + 8 + size:at + 12 + size]
        if zlib.crc32(chunk).to_bytes(4, "big") != checksum:
            raise ValueError(f"it is damaged or truncated: the checksum of {kind} at {at} is wrong")
        at += 12 + size


def check_webp(content):
    """The chunks must fill the container; there is no checksum."""
    end, at = 8 + int.from_bytes(content[4:8], "little"), 12
    while at + 8 <= end <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        if kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
            require_no_hole(content, at + 8, min(at + 8 + size, end))
        at += 8 + size + size % 2
    if at != end:
        raise ValueError("it is damaged or truncated: the lengths in the WebP do not add up")


def check_tiff(image, content):
    """Every strip or tile must lie in the file and be long enough, and its checksum right where
    the compression has one, Deflate."""
    tags, (w, h, _, plane_bits) = image.tag_v2, strip_shape(image)
    width, height = tags[256], tags[257]
    offsets, sizes = (tags.get(tag) for tag in ((324, 325) if 322 in tags else (273, 279)))
    across, down = -(-width // w), -(-height // h)
    if not offsets or not sizes:
        return
    planes = tags.get(277, 1) if tags.get(284) == 2 else 1
    if not len(offsets) == len(sizes) == across * down * planes:
        raise ValueError("it is damaged: the TIFF has another number of strips than its size needs")
    for i, (at, size) in enumerate(zip(offsets, sizes)):
        rows = h if 322 in tags else min(h, height - i % down * h)
        line = (w * plane_bits + 7) // 8
        if at + size > len(content):
            raise ValueError("it is truncated: a strip of the TIFF is beyond its end")
        if tags.get(259, 1) in (8, 32946):
            inflate = zlib.decompressobj()
            pixels = inflate.decompress(memoryview(content)[at:at + size], line * h + 1)
            if not inflate.eof or len(pixels) < line * rows:
                raise ValueError(f"it is damaged: strip {i} of the TIFF is not whole")
        elif tags.get(259, 1) != 1:
            require_no_hole(content, at, at + size)
        elif size < line * rows and tags.get(262) != 6:      # YCbCr may have fewer samples
            raise ValueError(f"it is damaged: strip {i} of the TIFF is too short")


def strip_shape(image):
    """Width and height of a strip or tile of a TIFF, its bytes, and the bits of a pixel in it."""
    tags = image.tag_v2
    bits = tags.get(258, (1,))
    plane_bits = bits[0] if tags.get(284) == 2 else sum(bits)
    if 322 in tags:
        w, h = tags[322], tags[323]
    else:
        w, h = tags[256], min(tags.get(278, tags[257]), tags[257])
    return w, h, w * h * plane_bits // 8, plane_bits


def check_jpeg(image, content):
    """The JpegScan of an opened JPEG; None if it has several scans, as a progressive one has, or
    arithmetic coding. Restart markers, which few files have, must be in order and complete."""
    start, (width, height), n = image.fp.tell(), image.size, image.layers  # n: channels
    end = len(content) - 2
    if image.format == "MPO" or not content.endswith(JPEG_END):
        end = content.find(JPEG_END, start)
    if end < start:
        raise ValueError("it is truncated: the end of the JPEG is missing")
    require_no_hole(content, start, end)
    scan = struct.pack(">HHB", 0xFFDA, 6 + 2 * n, n)
    frame = struct.pack(">HBHHB", 8 + 3 * n, 8, height, width, n)
    if not content.startswith(scan, start - 8 - 2 * n) or (
            content.find(b"\xff\xc0" + frame, 0, start) < 0
            and content.find(b"\xff\xc1" + frame, 0, start) < 0):
        return None
    at = content.rfind(b"\xff\xdd\0\4", 0, start) + 4       # how many units between restarts
    interval = int.from_bytes(content[at:at + 2], "big") if at > 4 else 0
    if interval:
        across, down = (8 * max(1 if n == 1 else layer[i] for layer in image.layer) for i in (1, 2))
        units = -(-width // across) * -(-height // down)
        wanted = [bytes((0xFF, 0xD0 + i % 8)) for i in range((units - 1) // interval)]
        if re.findall(rb"\xff[\xd0-\xd7]", content[start:end]) != wanted:
            raise ValueError("corrupt JPEG data: restart markers are missing")
    while content[end - 1] == 0xFF:                          # filled up
        end -= 1
    return JpegScan(content, start, end)


class JpegScan(io.BytesIO):
    """A JPEG whose last byte of pixels is read alone, and whose end is replaced by zeros.

    libjpeg says "corrupt JPEG data" in warnings, which Pillow drops: it fills in what is missing
    once it has seen the end, and skips what is left over. Here it never sees the end. If data are
    missing, it asks for more, and Pillow says "truncated"; if some are left over, it never asked
    for the last byte, and the JPEG is not `complete`. libjpeg reads up to 8 bytes ahead, so 12
    zeros suffice.
    """

    def __init__(self, content, start, end):
        super().__init__(content[:end] + bytes(12))
        self.start, self.last, self.complete = start, end - 1, False

    def read(self, size):
        at = self.tell()
        self.complete = at >= self.last
        return super().read(size if self.complete else min(size, self.last - at))
