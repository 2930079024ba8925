"""A cache file: a .npy array of rows, one for each image: a checksum, a key, the image.

A row that agrees with its checksum is the image that its key stands for, whatever happened to the
rest of the file: a damaged file, or one that is not finished, still gives its whole rows.
"""

import mmap
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

HEADER = 256  # bytes before the rows


def cpus():
    """The number of processors that this process may use; a cluster or container gives it some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def row_type(side):
    """A row; `crc` is the CRC-32 of what follows it."""
    return np.dtype([("crc", "<u4"), ("key", "S16"), ("image", "u1", (3, side, side))])


def make_row(key, image):
    """The bytes of a row. key: 16 bytes, none of them 0; image: uint8 (3, side, side)."""
    image = np.ascontiguousarray(image)
    crc = zlib.crc32(image, zlib.crc32(key))
    return b"".join((crc.to_bytes(4, "little"), key, image))


def header(count, side):
    """The first HEADER bytes, in NumPy's format 1.0. The count of an unfinished file is 0."""
    text = str({"descr": row_type(side).descr, "fortran_order": False, "shape": (count,)})
    size = HEADER - 10
    return b"\x93NUMPY\1\0" + size.to_bytes(2, "little") + f"{text:{size - 1}}\n".encode()


def count_rows(file, side):
    """How many rows a file has, and how many bytes beside them and the header."""
    count, rest = divmod(file.stat().st_size - HEADER, row_type(side).itemsize)
    return max(count, 0), rest


def stored_keys(file, side):
    """The keys of a file's rows; None for a row that is damaged. Reads 1 GB in half a second."""
    row = row_type(side)
    step = 1 + (1 << 22) // row.itemsize

    def check(start):
        rows = np.fromfile(file, row, step, offset=HEADER + start * row.itemsize)
        contents = rows.view(np.uint8).reshape(len(rows), row.itemsize)[:, 4:]
        return [key if zlib.crc32(content) == crc else None for crc, key, content in
                zip(rows["crc"].tolist(), rows["key"].tolist(), contents)]

    with ThreadPoolExecutor(cpus()) as pool:
        starts = range(0, count_rows(file, side)[0], step)
        return [*chain.from_iterable(pool.map(check, starts))]


def memory_map(file, side):
    """A file's rows (N,) of row_type, read when used; writes to them do not reach the disk.
    ValueError for a file without rows."""
    return np.memmap(file, row_type(side), "c", HEADER, (count_rows(file, side)[0],))


def open_rows(file, keys, side):
    """The rows of a finished file of some of the keys, in their order: a memory_map.

    Checks all of it. None where there is no such file, or, after a line that says so, where it is
    damaged or another.
    """
    try:
        found = stored_keys(file, side)
        with open(file, "rb") as content:
            fits = content.read(HEADER) == header(len(found), side)
        present, rest = {*found}, count_rows(file, side)[1]
        if fits and not rest and found and found == [key for key in keys if key in present]:
            return memory_map(file, side)
        reason = f"it has {len(present.intersection(keys))} of its {len(keys)} images"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or error
    print(f"{file} is damaged, {reason}: it is made again", file=sys.stderr)
    return None


def release(images):
    """Give back the memory of what was read of a memory_map: the system counts it as this process's
    and keeps it in its own cache; what is read again is there again."""
    mapped = getattr(images, "_mmap", None)
    if hasattr(mapped, "madvise"):                           # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def require_whole(images):
    """OSError where a memory_map's file lost its end since it was opened: to read what is no longer
    there ends the process without a word, by SIGBUS."""
    mapped = getattr(images, "_mmap", None)                  # of a numpy.memmap
    if mapped is not None and mapped.size() < len(mapped):
        raise OSError(f"{images.filename} was cut short by another program. Run the command again: "
                      "it is then made anew.")
