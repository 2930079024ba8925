"""Folders and files of images: a scan that accounts for every file."""

import contextlib
import dataclasses
import functools
import os
import re
from collections import Counter
from pathlib import Path

from PIL import Image, features

from .errors import UserError
from .imagefile import FORMATS

# Folders that systems, network disks, cameras and editors make; lower case. Hidden ones (".git")
# are left out as well.
SYSTEM_FOLDERS = {
    "__macosx", "lost+found", "$recycle.bin", "recycle.bin", "recycler", "found.000", "lost.dir",
    "system volume information", "network trash folder", "temporary items",
    "thevolumesettingsfolder", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb",
    "#recycle", "#snapshot", "captureone", "__pycache__", "node_modules", "thumb", "thumbs",
    "thumbnail", "thumbnails", "_thumbs"}
# Libraries of programs, which are folders, and hold copies of the photographs.
SYSTEM_SUFFIXES = (".lrdata", ".photoslibrary", ".aplibrary", ".migratedphotolibrary", ".cocatalog")
# Everyday files that are no images. Any other file that cannot be read is counted by extension.
NOT_IMAGES = set(
    ".txt .csv .tsv .json .jsonl .xml .md .rst .html .htm .css .js .pdf .doc .docx .xls .xlsx .ods "
    ".ini .cfg .toml .yaml .yml .db .log .py .ipynb .sh .mat .npy .npz .pkl .h5 .hdf5 .parquet "
    ".pt .pth .url .lnk .md5 .sha256".split())


@functools.cache
def image_extensions():
    """The extensions, in lower case, of the FORMATS that the installed Pillow decodes."""
    Image.init()                                             # takes 0.1 s, hence not at import
    lacking = {name for name, is_built in (
        ("AVIF", "avif" in features.modules and features.check("avif")),
        ("WEBP", features.check("webp")), ("JPEG2000", features.check("jpg_2000"))) if not is_built}
    return frozenset(extension for extension, kind in Image.registered_extensions().items()
                     if kind in FORMATS and kind not in lacking)


def is_image(name):
    """Whether a file's name is that of an image; it need not exist."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in image_extensions()


# ------------------------------------------------------------------------------------------------
# The scan of a folder
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Folder:
    """A folder of a scanned tree."""
    path: str
    images: list = dataclasses.field(default_factory=list)      # names of the image files in it
    folders: list = dataclasses.field(default_factory=list)     # visible subfolders, as Folders
    others: list = dataclasses.field(default_factory=list)      # names of its other visible files
    left_out: Counter = dataclasses.field(default_factory=Counter)  # files that are not read
    notes: tuple = ()                                           # on other files, a line each

    @property
    def name(self):
        return os.path.basename(self.path)

    @functools.cached_property
    def full(self):
        """The subfolders with an image in them, at whatever depth."""
        return [folder for folder in self.folders if folder.images or folder.full]

    def names(self):
        """The names of the subfolders and of the files that are no images."""
        return [*self.others, *(folder.name for folder in self.folders)]

    def walk(self, depth=None):
        """Yield the folder and its subfolders, to `depth` levels, breadth first."""
        level = [self]
        while level and (depth is None or depth >= 0):
            yield from level
            level = [inner for folder in level for inner in folder.folders]
            depth = None if depth is None else depth - 1

    def image_paths(self):
        """The paths of all images at whatever depth, as texts."""
        paths = []
        for folder in self.walk():
            start = os.path.join(folder.path, "")            # faster than a join for each name
            paths += [start + name for name in folder.images]
        return paths

    def total_left_out(self):
        """Counts of the files that are not read, {reason: number}, at whatever depth."""
        return sum((folder.left_out for folder in self.walk()), Counter())


def scan(path):
    """Read the tree of a folder: a Folder, its names sorted.

    Links to folders are followed, unless what they lead to is read anyway. UserError names a folder
    that may not be read.
    """
    top = os.fspath(path)
    return scan_folder(top, {os.path.realpath(top)})


def scan_folder(path, real_paths):
    """real_paths: of the tops of all trees that are being read; a link to a folder adds one."""
    folder = Folder(path)
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}. Change its permissions, "
                        "or move it elsewhere.") from error
    for entry in entries:
        if entry.is_dir():
            name = entry.name.lower()
            if name[0] == "." or name in SYSTEM_FOLDERS or name.endswith(SYSTEM_SUFFIXES):
                reason = "hidden" if entry.name[0] == "." else "system folder"
                folder.left_out[reason] += max(1, sum(len(files) for _, _, files in
                                                      os.walk(entry.path)))
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if any(is_inside(target, real) or is_inside(real, target) for real in real_paths):
                    folder.left_out["link to a folder read elsewhere"] += 1
                    continue
                real_paths.add(target)
            folder.folders.append(scan_folder(entry.path, real_paths))
        elif not entry.is_file() and os.path.exists(entry.path):  # a broken link: a missing image
            folder.left_out["special file"] += 1
        elif is_image(entry.name):
            folder.images.append(entry.name)
        else:
            folder.others.append(entry.name)
            extension = os.path.splitext(entry.name)[1].lower()
            reason = ("hidden" if entry.name[0] == "." else "not an image" if extension in
                      NOT_IMAGES else extension or "no extension")
            folder.left_out[reason] += 1
    leave_out_masks(folder)
    return folder


MASK = re.compile(r"(.+)[ ._-](mask|segmentation)([ ._-]?\d+)?", re.IGNORECASE)


def leave_out_masks(folder):
    """Leave out of a Folder's images those called as another is, with "_mask": auk.jpg has
    auk_mask.png."""
    stems = [os.path.splitext(name)[0] for name in folder.images]
    known, found = set(stems), [MASK.fullmatch(stem) for stem in stems]
    masks = {name for name, match in zip(folder.images, found) if match and match[1] in known}
    if masks:
        folder.images = [name for name in folder.images if name not in masks]
        folder.left_out["mask of an image"] += len(masks)


def is_inside(path, folder):
    """Whether a path is the folder or lies in it."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def draw_tree(folder, depth=3, most=5, indent="  "):
    """The tree of a Folder as text for a message: subfolders and their numbers of images."""
    lines = []
    for inner in folder.full[:most]:
        lines.append(f"{indent}{inner.name}/" + (f"  {len(inner.images)} images" if inner.images
                                                 else ""))
        lines += draw_tree(inner, depth - 1, most, indent + "  ") if depth > 1 else []
    if len(folder.full) > most:
        lines.append(f"{indent}... {len(folder.full) - most} more folders")
    return lines


# ------------------------------------------------------------------------------------------------
# Files that a list names
# ------------------------------------------------------------------------------------------------


def require_image(folder, name, listing, advice="Unpack the set again."):
    """Return the path folder / name of an image that the file `listing` names.

    UserError if the name leads out of the folder, by itself or through a link to a folder; the
    image may be a link to wherever. FileNotFoundError if there is no such file.
    """
    path = folder / name
    if Path(name).anchor or ".." in re.split(r"[/\\]", name) or leaves(path, folder):
        raise UserError(f"{line_of(listing, name)} lists {name!r}, which lies outside {folder}. "
                        f"Expected paths inside it. {advice}")
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise FileNotFoundError(f"no image {path}, which {listing} lists. {advice}")
    return path


def leaves(path, folder):
    """Whether a link among the folders between a folder and a path below it leads out of it."""
    inner = parent = os.path.dirname(path)
    while len(inner) > len(os.fspath(folder)):
        if os.path.islink(inner):
            return not is_inside(os.path.realpath(parent), os.path.realpath(folder))
        inner = os.path.dirname(inner)
    return False


def line_of(listing, name):
    """The line of a list that names an image, as text; of a list that is no text, its name."""
    stem = re.escape(os.path.splitext(name)[0])
    with contextlib.suppress(OSError), open(listing, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if re.search(rf"(?<![^\s,]){stem}(\.\w+)?(?![^\s,])", line):
                return f"line {number} of {listing}"
    return listing


def unnest(folder):
    """folder/folder if it exists: what unpacking an archive into a folder of its name makes."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def list_images(folder):
    """Sorted paths of all images below a folder; empty if there is no such folder."""
    return sorted(map(Path, scan(folder).image_paths())) if folder.is_dir() else []
