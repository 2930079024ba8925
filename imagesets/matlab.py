"""Numbers and names from MATLAB files of version 5 to 7: the labels of Cars and Flowers-102.

`columns` gives what a data set wants, lists of one kind; `read_mat` all that a file holds. After
MATLAB's document "MAT-File Format". A damaged file is a ValueError with file and byte, no other
error, and not another number: nearly all files carry zlib's checksums.
"""

import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from .errors import UserError

# The types of stored data that are read here, and the classes of arrays.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8"}
MATRIX, COMPRESSED, UTF8 = 14, 15, 16
CELL, STRUCT, CHAR, NUMERIC, COMPLEX = 1, 2, 4, range(6, 16), 0x800


def columns(path, kinds):
    """Lists of numbers or texts from a MATLAB file, one for each of kinds: {name: int or str}.

    name: a variable, or variable.field of a struct array. Whole numbers may be stored as doubles,
    as MATLAB likes to. FileNotFoundError or ValueError name the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}. Unpack the set again; "
                                "imagesets/README.md has its layout.")
    variables, lists = read_mat(path), []
    for name, kind in kinds.items():
        variable, _, field = name.partition(".")
        values = variables.get(variable)
        if field:
            values = values.get(field) if isinstance(values, dict) else None
        if not isinstance(values, (list, np.ndarray)):
            raise UserError(f"{path} has no {name}: it holds {', '.join(variables) or 'nothing'}.")
        column = []
        for number, value in enumerate(values, 1):
            value = value.item() if getattr(value, "size", 0) == 1 else value
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, kind):
                raise UserError(f"{path}, {name} number {number}: {value!r} is no {kind.__name__}")
            column.append(value)
        lists.append(column)
    return lists


def read_mat(path):
    """The variables of a MATLAB 5 file, {name: value}.

    A value is an array of numbers (N,), in MATLAB's column order, whatever its shape; a str; a list
    of values, of a cell array; {field: list of values}, of a struct array. The file is 128 bytes of
    header, then elements: a tag of type and length, and data; most are compressed by zlib, whose
    checksum covers them. ValueError names the file and the byte of the element that is wrong.
    Sparse arrays, objects and complex numbers are not read, nor are files of version 7.3 (HDF5).
    """
    data = Path(path).read_bytes()
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(data[124:128])
    if order is None:
        raise UserError(f"{path}, byte 124: this is no MATLAB file of version 5 to 7.")
    variables, at = {}, 128
    while at < len(data):
        try:
            kind, body, after = element(data, at, order)
            if kind == COMPRESSED:
                kind, body, _ = element(inflate(body), 0, order)
            if kind != MATRIX:
                raise UserError(f"an element of type {kind} is no variable")
            name, value = matrix(body, order)
            if name in variables:
                raise UserError(f"{name} comes twice")
        except ValueError as error:
            raise UserError(f"{path}, byte {at}: {error}.") from error
        variables[name], at = value, after
    return variables


def inflate(body, most=1 << 26):
    """Undo zlib; ValueError for data that is damaged, cut short, or larger than any set's."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(body, most)
    except zlib.error as error:
        raise UserError(f"damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise UserError(f"compressed data that is cut short, or more than {most} bytes")
    return data


def element(data, at, order):
    """One element from byte `at` on: type, bytes, and where the next one starts.

    The tag is two 4-byte numbers, type and length. Up to 4 bytes of data may stand in the tag
    itself; then its upper half is the length. All but compressed data is filled up to 8 bytes.
    """
    if at + 8 > len(data):
        raise UserError("cut short")
    kind, size = struct.unpack_from(order + "II", data, at)
    start, after = at + 8, at + 8 + size + (0 if kind == COMPRESSED else -size % 8)
    if kind >> 16:
        kind, size = kind & 0xffff, kind >> 16
        start, after = at + 4, at + 8
    if start + size > min(after, len(data)):
        raise UserError("cut short")
    return kind, data[start:start + size], after


def matrix(body, order, depth=0):
    """The name and value of an array, from its elements: flags, shape, name, then its data."""
    at = 0

    def part():
        nonlocal at
        kind, data, at = element(body, at, order)
        return kind, data

    def child():
        kind, data = part()
        if kind != MATRIX or depth > 8:
            raise UserError("an array was expected")
        return matrix(data, order, depth + 1)[1] if data else np.empty(0)

    flags, shape, name = (integers(*part(), order) for _ in range(3))
    if len(flags) != 2 or not shape or min(shape) < 0:
        raise UserError("an array without flags or without a shape")
    kind, count, name = flags[0] & 0xff, math.prod(shape), letters(name)
    fits = True
    if kind in NUMERIC and not flags[0] & COMPLEX:
        value = numbers(*part(), order)
        fits = len(value) == count
    elif kind == CHAR:
        stored, data = part()
        value = data.decode() if stored == UTF8 else letters(integers(stored, data, order))
        fits = shape[0] <= 1 and (stored == UTF8 or len(value) == count)
    elif kind == CELL:
        value = [child() for _ in range(count)]
    elif kind == STRUCT:
        width, text = integers(*part(), order), letters(integers(*part(), order))
        if len(width) != 1 or width[0] < 1 or not text:
            raise UserError(f"{name}: a struct without fields")
        fields = [text[i:i + width[0]].split("\0")[0] for i in range(0, len(text), width[0])]
        rows = [[child() for _ in fields] for _ in range(count)]
        value = {field: [row[i] for row in rows] for i, field in enumerate(fields)}
        fits = len(value) * width[0] == len(text)
    else:
        raise UserError(f"{name}: an array of a kind that is not read here")
    if not fits or at < len(body):
        raise UserError(f"{name}: its data is not of its shape")
    return name, value


def numbers(kind, data, order):
    """Stored data as an array (N,)."""
    if kind not in NUMBERS or len(data) % int(NUMBERS[kind][1]):
        raise UserError(f"{len(data)} bytes of type {kind} are no numbers")
    return np.frombuffer(data, order + NUMBERS[kind])


def integers(kind, data, order):
    """Stored data as a list of int."""
    values = numbers(kind, data, order)
    if values.dtype.kind == "f":
        raise UserError("whole numbers were expected")
    return values.tolist()


def letters(codes):
    if not all(0 <= code < 0x110000 for code in codes):
        raise UserError("letters were expected")
    return "".join(map(chr, codes))
