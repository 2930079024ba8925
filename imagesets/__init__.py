"""Image sets: which files belong to a set, what they show, and in which split they are.

`read(name_or_folder, root)` finds a set, downloads it if necessary, and returns its `Records`.

    records.py     Records; missing splits, subsets      files.py       the scan of a folder
    sets.py        SETS: the named sets                  tables.py      text files of labels
    readers.py     one function for each layout          matlab.py      .mat files of labels
    folders.py     any folder of images                  metadata.py    a table of one's own
    downloads.py   download and check                    unpack.py      open the archives
    decode.py      an image file -> a square of it       cache.py       decode each image once
    cache_file.py  the squares of a split on disk
    survey.py      `python fgssl.py data NAME`           toybirds.py    the drawn set
"""

import difflib
import functools
import os
import re
from pathlib import Path

from . import downloads, metadata, toybirds
from .errors import UserError
from .files import scan
from .folders import any_folder, without_labels
from .records import Records, complete_splits, describe, smaller
from .sets import SETS, SetInfo

__all__ = ["SETS", "Records", "describe", "read", "smaller"]


def read(name_or_folder, root, labels=None):
    """Return the Records of a named set that lies under `root`, or of any folder of images.

    A named set that is missing is downloaded if it has a public source; "toy" is drawn. The layout
    of a folder is detected from its files: a named set's, a table of labels (metadata.py), or else
    class folders or loose images (folders.py). A set's name goes before a folder of that name,
    which can be given as ./name.
    labels: one of the set's levels of labels, or a column of the table; None means the first. Of a
    folder, "none" reads all images at whatever depth, without labels.
    Every file is accounted for: it is in the Records, or counted in their `left_out`.
    FileNotFoundError says what is missing and where to get it; UserError, what cannot be used.
    """
    name, folder = str(name_or_folder), Path(name_or_folder).expanduser()
    is_named = name in SETS
    if is_named:
        info, top = SETS[name], ensure_downloaded(name, Path(root).expanduser())
    elif folder.is_dir():
        name, top = folder.resolve().name, scan(folder)
    else:
        similar = difflib.get_close_matches(name.lower(), SETS, n=1)
        question = f"; did you mean {similar[0]}?" if similar else "."
        raise FileNotFoundError(f"no folder {folder}{question} Expected a folder of images (if it "
                                "was moved, name it with --data), or one of the sets "
                                f"{', '.join(SETS)}.")
    if labels == "none" and not is_named:
        return without_labels(top)._replace(name=name, folder=os.path.abspath(top.path))
    info, found = find_set(top, info) if is_named else detect_layout(top)
    if labels not in (None, *info.levels):
        advice = (f"Expected one of {', '.join(filter(None, info.levels))}." if info.levels
                  else "It has one kind of labels: leave --labels out.")
        raise UserError(f"{name} has no labels {labels!r}. {advice}")
    level = [labels or info.levels[0]] if info.levels else []
    records = info.read(found, *level)
    if isinstance(found, Path):                              # the reader saw no Folder
        records = count_unlisted(records, top)
    records = records._replace(name=name, folder=os.path.abspath(top.path))
    return complete_splits(records)


def count_unlisted(records, top):
    """Add what the lists of a named set leave out, and the other files of its folder."""
    left_out = top.total_left_out()
    left_out["not in the lists"] = len({*top.image_paths()}.difference(map(str, records.paths)))
    return records._replace(left_out=+left_out)


def ensure_downloaded(name, root):
    """Return the scanned folder of a named set under root. If it is missing, download or draw
    it."""
    info, target = SETS[name], root / SETS[name].folders[0]
    if name == "toy":
        toybirds.draw(target)
    present = [root / folder for folder in info.folders if (root / folder).is_dir()]
    if not present:
        if not info.archives:
            instructions = info.instructions.format(folder=target)
            raise FileNotFoundError(f"no folder {target}. {instructions}")
        downloads.download_set(name, info.archives, root, info.folders[0])
        present = [target]
    tops = [scan(folder) for folder in present]
    return next((top for top in tops if find_layout(top, [info])), tops[-1])


def find_set(top, info):
    """(info, folder) of a named set in a scanned folder; FileNotFoundError if it is another."""
    found = find_layout(top, [info])
    if not found:
        missing = [marker.partition(": ")[0] for marker in info.markers
                   if not has_marker(top.path, marker)]
        advice = info.instructions.format(folder=top.path) if not info.archives else (
            "Move it away and run the command again to download the set; imagesets/README.md "
            "shows the layout.")
        raise FileNotFoundError(f"{top.path} is not the set as its source unpacks it: it holds no "
                                f"{' and no '.join(missing[:3])}. {advice}")
    return found[0]


def detect_layout(top):
    """(info, folder) of the layout that a scanned folder, or one of its subfolders, has.

    A named set's reader gets a Path; the others get the Folder. UserError for several sets.
    """
    found = find_layout(top, [*SETS.values()])
    names = sorted({inner.name for _, inner in found})
    if len(names) > 1 and str(found[0][1]) != top.path:
        raise UserError(f"{top.path} holds several data sets: {' and '.join(names)}. Pass the "
                        "folder of one of them.")
    if found:
        return found[0]
    tables = metadata.find_tables(top)
    if not tables:
        top.notes = metadata.unused(top)
        return SetInfo(any_folder, (), ()), top
    columns = metadata.label_columns(tables)
    return SetInfo(functools.partial(metadata.read_tables, tables=tables), (), (), columns), top


def find_layout(top, infos, depth=2):
    """The (info, Path) of all folders of a tree, to some depth, that have two markers of a set and
    lie in no other such folder."""
    first_parts = {re.split("/|: ", marker)[0] for info in infos for marker in info.markers}
    found = [(info, Path(folder.path)) for folder in top.walk(depth)
             if not first_parts.isdisjoint(folder.names()) for info in infos
             if sum(has_marker(folder.path, marker) for marker in info.markers) > 1]
    return [(info, folder) for info, folder in found
            if not any(outer in folder.parents for _, outer in found)]


def has_marker(folder, marker):
    """Whether a folder has the file or folder that a marker names: a path, and after a colon how
    its first line begins."""
    path, _, header = marker.partition(": ")
    path = os.path.join(folder, path)
    if not header or not os.path.isfile(path):
        return not header and os.path.exists(path)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline().startswith(header)
