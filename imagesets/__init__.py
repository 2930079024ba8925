"""Image sets: which files belong to a set, what they show, and in which split they are.

`read(name_or_folder, root)` finds a set, downloads it if necessary, and returns its `Records`.

    records.py     Records; missing splits, subsets      files.py       folders and image files
    sets.py        SETS: the named sets                  tables.py      text files of labels
    readers.py     one function for each layout          matlab.py      .mat files of labels
    downloads.py   download, check, unpack               toybirds.py    the drawn set
    cache.py       decode each image once                survey.py      `python fgssl.py data NAME`
"""

import difflib
from pathlib import Path

from . import downloads, readers, toybirds
from .errors import UserError
from .files import walk_folders
from .records import Records, complete_splits, smaller
from .sets import SETS, SetInfo

__all__ = ["SETS", "Records", "read", "smaller"]


def read(name_or_folder, root, labels=None):
    """Return the Records of a named set that lies under `root`, or of any folder of images.

    A named set that is missing is downloaded if it has a public source; "toy" is drawn. The layout
    of a folder is detected from its files: a named set's, or else class folders or loose images.
    A set's name goes before a folder of that name, which can be given as ./name.
    labels: one of the set's levels of labels; None means the finest.
    FileNotFoundError says what is missing and where to get it; UserError, what cannot be used.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    is_named = name in SETS
    if is_named:
        info = SETS[name]
    elif folder.is_dir():
        name, (info, folder) = folder.resolve().name, detect_layout(folder)
    else:
        similar = difflib.get_close_matches(name.lower(), SETS, n=1)
        question = f"; did you mean {similar[0]}?" if similar else "."
        raise FileNotFoundError(f"no folder {folder}{question} Expected a folder of images, or one "
                                f"of the sets {', '.join(SETS)}.")
    if labels not in (None, *info.levels):
        advice = (f"Expected one of {', '.join(info.levels)}." if info.levels else
                  "It has one kind of labels: leave --labels out.")
        raise UserError(f"{name} has no labels {labels!r}. {advice}")
    if is_named:
        folder = ensure_downloaded(name, Path(root))
    level = [labels or info.levels[0]] if info.levels else []
    return complete_splits(info.read(folder, *level)._replace(name=name))


def ensure_downloaded(name, root):
    """Return the folder of a named set under root. If it is missing, download or draw it."""
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
    for top in present:
        for folder in walk_folders(top, 2):
            if matches_layout(folder, info):
                return folder
    raise FileNotFoundError(
        f"{top} is not {name} as its source unpacks it: it holds no "
        f"{' and no '.join(info.marker_files)}. Move it away and run the command again; "
        "imagesets/README.md shows the layout.")


def detect_layout(folder):
    """Return the SetInfo of the layout that a folder, or one of its subfolders, has, and where.

    Without a known layout, it is the one of any folder of images. UserError for several sets.
    """
    found = [(info, inner) for inner in walk_folders(folder, 1) for info in SETS.values()
             if matches_layout(inner, info)]
    names = sorted({inner.name for _, inner in found})
    if len(names) > 1 and found[0][1] != folder:
        raise UserError(f"{folder} holds several data sets: {' and '.join(names)}. Pass the folder "
                        "of one of them.")
    return found[0] if found else (SetInfo(readers.any_folder, (), ()), folder)


def matches_layout(folder, info):
    """Whether a folder has one of the marker files of a set."""
    return any((folder / file).exists() for file in info.marker_files)
