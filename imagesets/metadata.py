"""A table of one's own: metadata.csv or metadata.jsonl beside the images, as Hugging Face names it.

    file_name,label[,split][,x,y,width,height]

file_name is relative to the table's folder; split is a name such as train or val; x, y, width and
height are a box in pixels. A table may also lie in each of the split folders.
"""

import codecs
import csv
import json
import math
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import is_image, leaves, require_image
from .folders import check_classes, display, parse_split
from .records import make_records

NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
BOX = ("x", "y", "width", "height")
KNOWN = {"file_name", "label", "split", *BOX}                # columns, in upper or lower case
MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "null"}       # how programs write an empty cell


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


def named_as_tables(folder):
    """The paths of the files in a Folder that are named as a table is."""
    return [os.path.join(folder.path, name) for name in folder.others if name.lower() in NAMES]


def tables_in(folder):
    """The paths of the tables that lie in a Folder."""
    return [file for file in named_as_tables(folder) if "file_name" in columns_of(file)]


def unused(top):
    """A note on each file that is called metadata and is no table: another program's, misspelt, or
    in another place."""
    notes = []
    for folder in top.walk(1):
        for name in folder.others:
            if name.lower() in NAMES:
                columns = columns_of(os.path.join(folder.path, name))
                why = ("it lies in no folder around all images" if "file_name" in columns else
                       f"no column file_name among {', '.join(columns[:5])}" if columns else
                       "it has no rows")
            elif os.path.splitext(name.lower())[0] == "metadata":
                why = f"expected one of {', '.join(NAMES)}"
            else:
                continue
            file = os.path.relpath(os.path.join(folder.path, name), top.path)
            notes.append(f"{file} is not used: {why}")
    return tuple(notes)


def columns_of(file):
    """The names of a table's columns; none where it has no rows."""
    _, row = next(read_rows(file), (0, {}))
    return list(row)


def read_rows(file):
    """Yield (line number, {column: text}) of a table; of JSON lines, lists and dicts as they are.

    A .csv is separated by commas, semicolons, tabs or bars, in UTF-8, or UTF-16 with its mark.
    UserError names file and line.
    """
    with open(file, "rb") as start:
        marks = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
        encoding = "utf-16" if start.read(2) in marks else "utf-8-sig"
    with open(file, encoding=encoding, errors="surrogateescape", newline="") as text:
        yield from (json_rows if file.lower().endswith(".jsonl") else csv_rows)(text, file)


def refuse(file, line, problem):
    raise UserError(f"{file}, line {line}: {problem}. Correct the table.")


def json_rows(text, file):
    for line, record in enumerate(text, 1):
        if record.strip():
            try:
                row = json.loads(record)
            except (ValueError, RecursionError) as error:
                refuse(file, line, f"no JSON ({error})")
            if not isinstance(row, dict):
                refuse(file, line, f"{record.strip()[:40]!r} is no JSON object")
            yield line, {str(key).strip(): value if isinstance(value, (dict, list)) else
                         "" if value is None else str(value).strip() for key, value in row.items()}


def csv_rows(text, file):
    header, line, separator = text.readline(), 1, ""
    while header and (not header.strip() or header.lower().startswith("sep=")):
        separator = header[4:5].strip("\n")                  # Excel's line "sep=;"
        header, line = text.readline(), line + 1
    separator = separator or max(",;\t|", key=header.count)
    options = dict(delimiter=separator, skipinitialspace=separator != "\t", strict=True)
    columns = [name.strip() for name in next(csv.reader([header], **options), [])]
    columns = [name.lower() if name.lower() in KNOWN else name for name in columns]
    while columns and not columns[-1]:                       # a spreadsheet's empty columns
        columns.pop()
    if len(set(columns)) < len(columns):
        refuse(file, line, f"two columns of one name in {', '.join(columns)}")
    reader = csv.reader(text, **options)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refuse(file, line + reader.line_num, error)
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()
        if any(cell.strip() for cell in cells):
            if len(cells) != len(columns):
                refuse(file, line + reader.line_num,
                       f"{len(cells)} values for {len(columns)} columns")
            yield line + reader.line_num, dict(zip(columns, (cell.strip() for cell in cells)))


def label_columns(tables):
    """The columns that can be labels, `label` first; "" is first if there are only others."""
    columns = [name for file, _, _ in tables for name in columns_of(file)
               if name == "label" or name not in KNOWN]
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
        images = {unicodedata.normalize("NFC", os.path.relpath(path, folder.path)): path
                  for path in folder.image_paths()}
        for line, row in read_rows(file):
            path = find_image(row.get("file_name", ""), images, folder, file, line)
            if path in listed:
                refuse(file, line, f"{row['file_name']!r} is listed twice")
            listed.add(path)
            split, box = read_split(row, file, line), read_box(row, file, line)
            if split_of_folder and split not in (None, split_of_folder):
                refuse(file, line, f"the split is {split}, but the table lies in {folder.name}")
            split, label = split_of_folder or split, read_label(row.get(column, ""), file, line)
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

    def refuse_classes(problem, advice):
        raise UserError(f"{tables[0][0]}: {problem} {advice}")

    check_classes(records, refuse_classes)
    left_out += Counter({"not in the table": len({*top.image_paths()} - listed)})
    left_out += top.total_left_out() - Counter({"not an image": len(tables)})
    names = ", ".join(display(file, top) for file, _, _ in tables)
    return records._replace(
        boxes=np.array(boxes, np.float32) if boxes[0] else None, left_out=left_out,
        notes=(f"labels are {column!r} of {names}" if column else f"listed in {names}",))


def find_image(name, images, folder, file, line):
    """The path of an image that a table names, in whichever Unicode form. images: {path below the
    Folder: path}. An absolute path must lead into the folder, as a link to a folder must."""
    if not isinstance(name, str):
        refuse(file, line, f"the file_name is {json.dumps(name)[:40]}, expected a text")
    wanted = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(wanted):
        wanted = os.path.relpath(wanted, os.path.abspath(folder.path))
    path = images.get(unicodedata.normalize("NFC", wanted))
    if path is None or leaves(path, folder.path):
        listing = f"line {line} of {file}"
        path = str(require_image(Path(folder.path), wanted, listing, "Correct the table: a "
                                 "file_name, with its ending, is relative to the table's folder."))
        if not is_image(os.path.basename(path)):
            refuse(file, line, f"{name!r} cannot be read as an image: convert it to JPEG or PNG")
    return path


def read_label(label, file, line):
    """The class of a row, "" if unknown; a name that is none is refused."""
    if isinstance(label, (dict, list)):
        refuse(file, line, f"the label is {json.dumps(label)[:40]}, expected a text or a number")
    if label.lower() in MISSING:
        refuse(file, line, f"the label is {label}: leave it empty where it is unknown")
    if re.search("[\ud800-\udfff]", label):
        refuse(file, line, f"the label {ascii(label)} is not in UTF-8: save the table as \"CSV "
               "UTF-8\"")
    return unicodedata.normalize("NFC", label)


def read_split(row, file, line):
    """The split that a row names, or None."""
    text = row.get("split", "")
    found = parse_split(text) if text and isinstance(text, str) else None
    if text and not found:
        refuse(file, line, f"cannot use the split {text!r}, expected train, val or test")
    return found and found[1]


def read_box(row, file, line):
    """The box of a row as four numbers, or None."""
    texts = [row.get(name, "") for name in BOX]
    if not any(texts):
        return None
    try:
        box = [float(text) for text in texts]
    except (TypeError, ValueError):
        box = [math.nan]
    if not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        refuse(file, line, f"cannot use the box {', '.join(map(str, texts))}, expected numbers of "
               "pixels, width and height above 0")
    return box
