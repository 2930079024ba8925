"""Text files of lines `key value ...`, in which most sets keep their labels."""

import os

from .errors import UserError


def read_table(path, line_format, *parsers, keys=None, separator=None, header=""):
    """Read lines `key value ...` into {key: value}; {key: (value, ...)} for none or several values.

    line_format: a line in words, for the error message. parsers: one function for each value, from
    its text; to reject a text it returns None or raises ValueError. The last value takes the rest
    of the line. keys: if given, each must have a line and no other key may. header: how line 1
    begins. FileNotFoundError names the file; UserError names file and line if a line does not fit
    or repeats a key.
    """
    advice = (f"Expected lines {line_format} with known ids, each once. Correct the file or unpack "
              "the set again; imagesets/README.md shows its layout.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}. {advice}")
    table = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        if header and not file.readline().startswith(header):
            raise UserError(f"{path}, line 1: expected {header} ... {advice}")
        for number, line in enumerate(file, 2 if header else 1):
            if not line.strip():
                continue
            key, *texts = [text.strip() for text in line.strip().split(separator, len(parsers))]
            try:
                values = [parse(text) for parse, text in zip(parsers, texts, strict=True)]
            except ValueError:
                values = [None]
            if None in values or key in table or key not in (keys or [key]):
                raise UserError(f"{path}, line {number}: cannot use {line.strip()!r}. {advice}")
            table[key] = values[0] if len(values) == 1 else tuple(values)
    if not table:
        raise UserError(f"{path} is empty. {advice}")
    for key in keys or ():
        if key not in table:
            raise UserError(f"{path} has no line for {key}. {advice}")
    return table


def one_of(names):
    """A parser for `read_table` that accepts only these names."""
    return {name: name for name in names}.get


def unique(convert):
    """A parser for `read_table` that converts a text and rejects a value it has seen before."""
    seen = set()

    def parse(text):
        value = convert(text)
        if value in seen:
            raise ValueError
        seen.add(value)
        return value
    return parse
