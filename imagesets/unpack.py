"""Opening an archive: files in one folder and nowhere else.

Archives are not trusted: every name, the sizes of what describes the files, and their total size
are checked.
"""

import errno
import shutil
import stat
import tarfile
import zipfile
from pathlib import PurePosixPath

from .errors import UserError
from .progress import progress

CHUNK = 1 << 20    # bytes read at a time
MAX_GROWTH = 4     # unpacked / packed size; photos are compressed, so real archives hardly grow
MAX_HEADER = 1 << 16  # bytes of a tar's extended header: a long name, times, attributes
MAX_LIST = 1 << 24    # bytes of a zip's list of files: that of 100,000
MAX_NAME, MAX_DEPTH = 1024, 32  # characters and folders of a file's name
# Errors of names: too long, or of a file and of a folder at once.
UNUSABLE = (errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


def unpack(file, folder):
    """Unpack a .zip or tar archive into the folder; copy a .mat file there.

    Only regular files and folders are written, with this process's rights. UserError for a link, a
    device, a name that leaves the folder, a damaged archive, one with headers beyond the limits
    above, and one that grows MAX_GROWTH times (a bomb). The caller removes what was written before
    the error.
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
        try:
            (path if piece is None else path.parent).mkdir(parents=True, exist_ok=True)
            if piece is not None:
                with open(path, "ab" if piece else "wb") as out:
                    out.write(piece)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            entry = str(path.relative_to(folder))[:60]
            raise UserError(f"{file} cannot be used: {error.strerror}, its entry {entry!r}. "
                            "Download it again.") from error


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


class Tar(tarfile.TarFile):
    headers = 0  # read since the last entry


class Entry(tarfile.TarInfo):
    """An entry of a tar. tarfile reads headers of any size into memory; this one refuses them."""

    def _proc_member(self, archive):                         # where tarfile's own subclasses begin
        if self.type not in tarfile.REGULAR_TYPES and self.size > MAX_HEADER:
            raise UserError(f"a header of {self.size} bytes")
        archive.headers += 1                                 # those before a file extend it
        if archive.headers > 8:
            raise UserError("a file with more than 8 headers")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise UserError(f"its entry {self.name!r} is a sparse file")
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_):
        raise UserError("it has a sparse file")


def tar_entries(file):
    """Yield (name, open file, or None for a folder) of each entry of a tar, compressed or not."""
    with open(file, "rb") as start:
        mode = "r|gz" if start.read(2) == b"\x1f\x8b" else "r|"
    with Tar.open(file, mode, tarinfo=Entry) as archive:
        while entry := archive.next():
            archive.headers = 0
            archive.members.clear(), archive.pax_headers.clear()  # they would pile up in memory
            if not entry.isfile() and not entry.isdir() or entry.issparse():
                raise UserError(f"its entry {entry.name!r} is a link, a device or a sparse file")
            yield entry.name, archive.extractfile(entry) if entry.isfile() else None


class ListReader:
    """An open file of which nobody reads more than MAX_LIST bytes at once, as zipfile does."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        if size > MAX_LIST:
            raise UserError(f"its list of files has {size} bytes")
        return self.file.read(size)


def zip_entries(file):
    """Yield (name, open file, or None for a folder) of each entry of a zip."""
    with open(file, "rb") as packed, zipfile.ZipFile(ListReader(packed)) as archive:
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)    # 0 if it was packed on Windows
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"its entry {entry.filename!r} is a link or a device")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"its entry {entry.filename!r} is compressed in an unusual way")
            if entry.is_dir():
                yield entry.filename, None
                continue
            with archive.open(entry) as source:
                yield entry.filename, source


def safe_path(folder, name):
    """Return folder / name; UserError for a name that would leave the folder, or is too long."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if len(name) > MAX_NAME or len(parts) > MAX_DEPTH:
        raise UserError(f"its entry {name[:60]!r}... has a name of {len(name)} characters")
    if any(part in ("/", "..") or ":" in part or "\0" in part for part in parts):
        raise UserError(f"its entry {name!r} would be written outside {folder}")
    return folder.joinpath(*parts)
