"""MATLAB files of version 5 to 7, in which some sets keep their labels.

`read_columns` returns the lists that a reader wants, `read_mat` all variables. Source: MathWorks,
"MAT-File Format". A damaged file is a UserError with file and byte; nearly all files are compressed
by zlib, whose checksum finds changed numbers.
"""

import math
import os
import struct
import zlib

import numpy as np

from .errors import UserError

# Types of stored data, and classes of arrays.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8"}
MATRIX, COMPRESSED, UTF8 = 14, 15, 16
MAX_BYTES = 1 << 25  # of a file; the lists of a set have some millions
CELL, STRUCT, CHAR, NUMERIC, COMPLEX = 1, 2, 4, range(6, 16), 0x800


def read_columns(path, types):
    """Read lists of numbers or texts from a MATLAB file, one for each item of {name: int or str}.

    name: a variable, or variable.field of a struct array. MATLAB often stores integers as doubles;
    they are converted. FileNotFoundError and UserError name the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}. Unpack the set again; imagesets/README.md shows "
                                "its layout.")
    variables, columns = read_mat(path), []
    for name, expected in types.items():
        variable, _, field = name.partition(".")
        values = variables.get(variable)
        if field:
            values = values.get(field) if isinstance(values, dict) else None
        if not isinstance(values, (list, np.ndarray)):
            raise UserError(f"{path} has no {name}: it holds {', '.join(variables) or 'nothing'}. "
                            "Unpack the set again.")
        column = []
        for number, value in enumerate(values, 1):
            value = value.item() if getattr(value, "size", 0) == 1 else value
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, expected):
                raise UserError(f"{path}, {name} number {number}: {value!r} is not of type "
                                f"{expected.__name__}. Unpack the set again.")
            column.append(value)
        columns.append(column)
    return columns


def read_mat(path):
    """Return the variables of a MATLAB 5 file, {name: value}.

    A value is an array of numbers (N,) in column order, whatever its shape; a str; a list of values
    (of a cell array); or {field: list of values} (of a struct array). The file is a header of 128
    bytes and then elements: a tag with type and length, then data, usually compressed by zlib.
    UserError names the file and the byte of a bad element. Sparse arrays, objects, complex numbers,
    version 7.3 (HDF5) and more than MAX_BYTES, inflated, are not supported.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES} bytes. Unpack the set again.")
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(data[124:128])
    if order is None:
        raise UserError(f"{path}, byte 124: not a MATLAB file of version 5 to 7. Unpack the set "
                        "again.")
    variables, offset, left = {}, 128, MAX_BYTES
    while offset < len(data):
        try:
            kind, body, after = read_element(data, offset, order)
            if kind == COMPRESSED:
                inflated = inflate(body, left)
                left -= len(inflated)
                kind, body, _ = read_element(inflated, 0, order)
            if kind != MATRIX:
                raise UserError(f"an element of type {kind} is not a variable")
            name, value = read_array(body, order)
            if name in variables:
                raise UserError(f"{name} comes twice")
        except ValueError as error:
            raise UserError(f"{path}, byte {offset}: {error}. Unpack the set again.") from error
        variables[name], offset = value, after
    return variables


def inflate(body, max_bytes):
    """Undo zlib; UserError for data that is damaged, cut short, or larger than that of any set."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(body, max_bytes)
    except zlib.error as error:
        raise UserError(f"damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise UserError(f"compressed data that is cut short, or more than {max_bytes} bytes")
    return data


def read_element(data, offset, order):
    """Return the element at a byte offset: type, data, and the offset of the next element.

    Its tag is two 4-byte numbers, type and length. Up to 4 bytes of data may lie in the tag itself;
    then the upper half of the first number is the length. Data is padded to a multiple of 8 bytes,
    unless it is compressed.
    """
    if offset + 8 > len(data):
        raise UserError("cut short")
    kind, size = struct.unpack_from(order + "II", data, offset)
    start, after = offset + 8, offset + 8 + size + (0 if kind == COMPRESSED else -size % 8)
    if kind >> 16:
        kind, size = kind & 0xffff, kind >> 16
        start, after = offset + 4, offset + 8
    if start + size > min(after, len(data)):
        raise UserError("cut short")
    return kind, data[start:start + size], after


def read_array(body, order, depth=0):
    """Return name and value of an array from its elements: flags, shape, name, then its data."""
    offset = 0

    def next_element():
        nonlocal offset
        kind, data, offset = read_element(body, offset, order)
        return kind, data

    def next_array():
        kind, data = next_element()
        if kind != MATRIX or depth > 8:
            raise UserError("expected an array")
        return read_array(data, order, depth + 1)[1] if data else np.empty(0)

    flags, shape, name = (to_integers(*next_element(), order) for _ in range(3))
    if len(flags) != 2 or not shape or min(shape) < 0:
        raise UserError("an array without flags or without a shape")
    kind, count, name = flags[0] & 0xff, math.prod(shape), to_text(name)
    fits = True
    if kind in NUMERIC and not flags[0] & COMPLEX:
        value = to_numbers(*next_element(), order)
        fits = len(value) == count
    elif kind == CHAR:
        stored, data = next_element()
        value = data.decode() if stored == UTF8 else to_text(to_integers(stored, data, order))
        fits = shape[0] <= 1 and (stored == UTF8 or len(value) == count)
    elif kind == CELL:
        value = [next_array() for _ in range(count)]
    elif kind == STRUCT:
        width, text = (to_integers(*next_element(), order) for _ in range(2))
        text = to_text(text)
        if len(width) != 1 or width[0] < 1 or not text:
            raise UserError(f"{name}: a struct without fields")
        fields = [text[i:i + width[0]].split("\0")[0] for i in range(0, len(text), width[0])]
        rows = [[next_array() for _ in fields] for _ in range(count)]
        value = {field: [row[i] for row in rows] for i, field in enumerate(fields)}
        fits = len(value) * width[0] == len(text)
    else:
        raise UserError(f"{name}: an array of an unsupported class")
    if not fits or offset < len(body):
        raise UserError(f"{name}: its data does not match its shape")
    return name, value


def to_numbers(kind, data, order):
    """Stored data as an array (N,)."""
    if kind not in NUMBERS or len(data) % int(NUMBERS[kind][1]):
        raise UserError(f"{len(data)} bytes of type {kind} are not numbers")
    return np.frombuffer(data, order + NUMBERS[kind])


def to_integers(kind, data, order):
    """Stored data as a list of int."""
    values = to_numbers(kind, data, order)
    if values.dtype.kind == "f":
        raise UserError("expected integers")
    return values.tolist()


def to_text(codes):
    """Character codes as a str."""
    if not all(0 <= code < 0x110000 for code in codes):
        raise UserError("expected text")
    return "".join(map(chr, codes))
