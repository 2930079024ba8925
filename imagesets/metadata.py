"""A table of one's own: metadata.csv or metadata.jsonl beside the images, as Hugging Face names it.

    file_name,label[,split][,x,y,width,height]

file_name is relative to the table's folder; split is a name such as train or val; x, y, width and
height are a box in pixels. A table may also lie in each of the split folders.
"""

import csv
import json
import math
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import is_image, require_image
from .folders import check_classes, display, parse_split
from .records import make_records

NAMES = ("metadata.csv", "metadata.jsonl")
BOX = ("x", "y", "width", "height")


def find_tables(top):
    """The tables of a scanned folder: [(table's path, Folder, split or None)], [] if there is none.

    A table is one of NAMES with a column file_name: here, in the only folder with images, or in
    each of the splits.
    """
    found, folder = tables_in(top), top
    while not found and len(folder.full) == 1:
        folder, = folder.full
        found = tables_in(folder)
    if found:
        return [(file, folder, None) for file in found]
    parts = [(file, part, parse_split(part.name)) for part in folder.full
             for file in tables_in(part)]
    if not parts:
        return []
    if len(parts) < len(folder.full) or not all(found for _, _, found in parts):
        raise UserError(f"{parts[0][0]} says nothing of the folders beside it. Expected one table "
                        f"in {folder.path}, or one in each of its splits.")
    return [(file, part, split) for file, part, (_, split) in parts]


def tables_in(folder):
    """The paths of the tables that lie in a Folder."""
    files = [os.path.join(folder.path, name) for name in NAMES if name in folder.others]
    return [file for file in files if "file_name" in columns_of(file)]


def columns_of(file):
    """The names of a table's columns."""
    _, row = next(read_rows(file), (0, {}))
    return list(row)


def read_rows(file):
    """Yield (line number, {column: text}) of a .csv or .jsonl file.

    A .csv is separated by commas, semicolons or tabs. UserError names file and line.
    """
    def refuse(line, problem):
        raise UserError(f"{file}, line {line}: {problem}. Correct the table.")

    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if file.endswith(".jsonl"):
            for line, record in enumerate(text, 1):
                if record.strip():
                    try:
                        row = json.loads(record)
                    except ValueError as error:
                        refuse(line, f"no JSON ({error})")
                    if not isinstance(row, dict):
                        refuse(line, f"{record.strip()[:40]!r} is no JSON object")
                    yield line, {str(key).strip(): "" if value is None else str(value).strip()
                                 for key, value in row.items()}
            return
        header = text.readline()
        separator = max(",;\t", key=header.count)
        columns = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        if len(set(columns)) < len(columns):
            refuse(1, f"two columns of one name in {', '.join(columns)}")
        reader = csv.reader(text, delimiter=separator, strict=True)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                refuse(reader.line_num + 1, error)
            if any(cell.strip() for cell in cells):
                if len(cells) != len(columns):
                    refuse(reader.line_num + 1, f"{len(cells)} values for {len(columns)} columns")
                yield reader.line_num + 1, dict(zip(columns, (cell.strip() for cell in cells)))


def label_columns(tables):
    """The columns that can be labels, `label` first; "" is first if there are only others."""
    known = {"file_name", "split", *BOX}
    columns = [name for file, _, _ in tables for name in columns_of(file) if name not in known]
    first = ["label"] if "label" in columns else [""] if columns else []
    return tuple(dict.fromkeys(first + columns))


def read_tables(top, column=None, tables=()):
    """The Records of the images that the tables name; `column` holds the class.

    An empty class is unknown: the image trains without a label, and is left out of val and test.
    UserError names file and line of what does not fit, FileNotFoundError a missing image.
    """
    if column == "":
        raise UserError(f"{tables[0][0]} has no column label. Pass --labels with one of "
                        f"{', '.join(label_columns(tables)[1:])}.")
    rows, boxes, left_out, listed = [], [], Counter(), set()
    for file, folder, split_of_folder in tables:
        place = Path(folder.path)
        images = {unicodedata.normalize("NFC", os.path.relpath(path, place)): path
                  for path in folder.image_paths()}
        for line, row in read_rows(file):
            where = f"{file}, line {line}"
            name = row.get("file_name", "").replace("\\", "/")
            path = images.get(unicodedata.normalize("NFC", os.path.normpath(name)))
            if path is None:
                path = str(require_image(place, name, file))
                if not is_image(os.path.basename(path)):
                    raise UserError(f"{where}: {name!r} cannot be read as an image. Convert it to "
                                    "JPEG or PNG.")
            if path in listed:
                raise UserError(f"{where}: {name!r} is listed twice. Remove one of the lines.")
            listed.add(path)
            split, box = split_of_folder or read_split(row, where), read_box(row, where)
            label = unicodedata.normalize("NFC", row.get(column, "")) if column else ""
            if not label and split not in (None, "train"):
                left_out[f"unlabelled, in {split}"] += 1
                continue
            rows.append((Path(path), label or None, split))
            boxes.append(box)
    given = {split is None for _, _, split in rows}
    if len(given) != 1 or len({box is None for box in boxes}) != 1:
        raise UserError(f"{tables[0][0]} gives a split or a box for some images only, or has no "
                        "label of a test image. Expected them for all, or leave the columns out.")
    rows = [(path, label, split or "train") for path, label, split in rows]
    records = make_records(rows)
    check_classes(records, top)
    left_out += Counter({"not in the table": len({*top.image_paths()} - listed)})
    left_out += top.total_left_out() - Counter({"not an image": len(tables)})
    names = ", ".join(display(file, top) for file, _, _ in tables)
    return records._replace(
        boxes=np.array(boxes, np.float32) if boxes[0] else None, left_out=left_out,
        notes=(f"labels are {column!r} of {names}" if column else f"listed in {names}",))


def read_split(row, where):
    """The split that a row names, or None."""
    text = row.get("split", "")
    found = parse_split(text) if text else None
    if text and not found:
        raise UserError(f"{where}: cannot use the split {text!r}. Expected train, val or test.")
    return found and found[1]


def read_box(row, where):
    """The box of a row as four numbers, or None."""
    texts = [row.get(name, "") for name in BOX]
    if not any(texts):
        return None
    try:
        box = [float(text) for text in texts]
    except ValueError:
        box = [math.nan]
    if not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise UserError(f"{where}: cannot use the box {', '.join(texts)}. Expected numbers of "
                        "pixels, width and height above 0.")
    return box
