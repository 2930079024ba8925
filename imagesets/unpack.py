"""Opening an archive: files in one folder and nowhere else.

Archives are not trusted: every name and the total size are checked.
"""

import shutil
import stat
import tarfile
import zipfile
from pathlib import PurePosixPath

from .errors import UserError
from .progress import progress

CHUNK = 1 << 20    # bytes read at a time
MAX_GROWTH = 4     # unpacked / packed size; photos are compressed, so real archives hardly grow


def unpack(file, folder):
    """Unpack a .zip or tar archive into the folder; copy a .mat file there.

    Only regular files and folders are written, with this process's rights. UserError for a link, a
    device, a name that leaves the folder, a damaged archive, and an archive that grows MAX_GROWTH
    times (a bomb). The caller removes what was written before the error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mat":
        shutil.copyfile(file, folder / file.name)
        return
    left = MAX_GROWTH * file.stat().st_size + CHUNK          # bytes that may still be written
    pieces = progress(archive_pieces(file, folder), None, f"unpacking {file.name}",
                      lambda piece: len(piece[1] or b""))
    for path, piece in pieces:
        left -= len(piece or b"") or 512                     # empty files and folders count too
        if left < 0:
            raise UserError(f"{file} unpacks to more than {MAX_GROWTH} times its size; an archive "
                            "of photos does not. Download it again.")
        if piece is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab" if piece else "wb") as out:
            out.write(piece)


def archive_pieces(file, folder):
    """Yield an archive's content in pieces: (path, None) for a folder; for a file (path, b""), then
    (path, bytes) until it is complete. UserError for anything wrong with the archive."""
    entries = zip_entries if file.suffix == ".zip" else tar_entries
    try:
        for name, source in entries(file):
            path = safe_path(folder, name)
            if source is None:
                yield path, None
                continue
            yield path, b""
            while piece := source.read(CHUNK):
                yield path, piece
    except Exception as error:  # a damaged archive makes its reader raise errors of many kinds
        raise UserError(f"{file} cannot be used: {error}. Download it again.") from error


def tar_entries(file):
    """Yield (name, open file, or None for a folder) of each entry of a tar, compressed or not."""
    with tarfile.open(file, "r|*") as archive:
        for entry in archive:
            if not entry.isfile() and not entry.isdir():
                raise UserError(f"its entry {entry.name!r} is a link or a device")
            yield entry.name, archive.extractfile(entry) if entry.isfile() else None


def zip_entries(file):
    """Yield (name, open file, or None for a folder) of each entry of a zip."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)    # 0 if it was packed on Windows
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"its entry {entry.filename!r} is a link or a device")
            if entry.is_dir():
                yield entry.filename, None
                continue
            with archive.open(entry) as source:
                yield entry.filename, source


def safe_path(folder, name):
    """Return folder / name; UserError for a name that would leave the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if any(part in ("/", "..") or ":" in part or "\0" in part for part in parts):
        raise UserError(f"its entry {name!r} would be written outside {folder}")
    return folder.joinpath(*parts)
