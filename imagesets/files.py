"""Folders and files of images."""

import os
import re
from pathlib import Path

from .errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


def require_image(folder, name, listing):
    """Return the path folder / name of an image that the file `listing` names.

    UserError if the name leads out of the folder, FileNotFoundError if there is no such file.
    """
    if Path(name).anchor or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{listing} lists {name!r}, which lies outside {folder}. Expected paths "
                        "inside it; unpack the set again.")
    path = folder / name
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise FileNotFoundError(f"no image {path}, which {listing} lists. Unpack the set again.")
    return path


def subfolders(folder):
    """Sorted visible subfolders, without links that lead back to the folder or above it."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
                  and not folder.resolve().is_relative_to(path.resolve()))


def walk_folders(folder, depth):
    """Yield the folder and its subfolders down to `depth` levels, breadth first."""
    level = [folder]
    yield folder
    for _ in range(depth):
        level = [inner for outer in level for inner in subfolders(outer)]
        yield from level


def unnest(folder):
    """folder/folder if it exists: what unpacking an archive into a folder of its name makes."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def list_images(folder, recursive=False):
    """Sorted visible images of a folder and, if `recursive`, of its subfolders; links to folders
    are not followed. Empty if there is no such folder."""
    def refuse(error):  # os.walk skips a folder it cannot read, and a class would be missing
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if recursive and name[0] != "."]
        found += [Path(parent, name) for name in files
                  if name[0] != "." and name.lower().endswith(EXTENSIONS)]
    return sorted(found)
