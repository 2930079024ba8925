"""Fetching a data set: download, check, unpack.

    download_set    archives -> one folder, complete or not at all
    download        one file: resumed if interrupted, checked before it gets its name
    unpack          a tar or zip archive -> files in one folder and nowhere else

Archives are not trusted: the md5 shows that a file is the expected one, and unpacking checks every
name and the total size.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import PurePosixPath
from typing import NamedTuple

from .errors import UserError
from .progress import format_bytes, progress

CHUNK = 1 << 20    # bytes read at a time
TIMEOUT = 30       # seconds without a byte until a connection counts as broken
MAX_TRIES = 5      # connections in a row without a new byte until we give up
RETRY_WAIT = 1     # seconds before the second of them, doubled each time
MAX_GROWTH = 4     # unpacked / packed size; photos are compressed, so real archives hardly grow


class Archive(NamedTuple):
    """A file to download. `file` is its name under --root."""
    file: str
    url: str
    size: int               # bytes; approximate if there is no md5
    md5: str | None = None  # None if none is published; then only the archive's own checksums help


def download_set(name, archives, root, folder):
    """Download `archives` into root and unpack all of them into root/folder.

    An archive that already lies in root is checked and used. If two processes ask at once, one
    downloads and the other waits. After an interruption there is no folder, and at most a .part
    file that the next call resumes. ConnectionError if the download fails, UserError for a wrong
    file, OSError for a full disk.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(root / f".{name}.lock", name):
            if not (root / folder).is_dir():                 # another process may have made it
                check_disk_space(archives, root)
                download_and_unpack(archives, root / folder)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(f"cannot store {name} in {root}: {error}. Free some space there, or choose "
                      "another --root.") from error


def download_and_unpack(archives, folder):
    """Download archives beside the folder and unpack them; it gets its name when it is complete.

    Downloaded archives are removed once unpacked, and if they are unusable.
    """
    files = [folder.with_name(archive.file) for archive in archives]
    temporary = [file for archive, file in zip(archives, files) if download(archive, file)]
    draft = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(draft, ignore_errors=True)                 # left by a process that was killed
    try:
        for file in files:
            unpack(file, draft)
        inner = draft / folder.name
        os.replace(inner if inner.is_dir() else draft, folder)
    except (OSError, KeyboardInterrupt):                     # the archives are good: keep them
        temporary = []
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for file in temporary:
            file.unlink()


@contextlib.contextmanager
def file_lock(file, name):
    """Hold a lock against other processes; the system releases it if the holder dies.

    The file is removed on success: a process that waited then finds the work done.
    """
    with open(file, "a") as held:
        if not try_lock(held):
            print(f"waiting for another process that downloads {name}", file=sys.stderr, flush=True)
            while not try_lock(held):
                time.sleep(0.2)
        yield
    with contextlib.suppress(OSError):
        file.unlink()


def try_lock(file):
    """Try to lock an open file; return whether it worked."""
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def check_disk_space(archives, root):
    """OSError if the disk cannot hold the archives and what they unpack to."""
    files = [root / archive.file for archive in archives]
    present = sum(file.stat().st_size for file in [*files, *map(part_file, files)]
                  if file.is_file())
    needed = 2 * sum(archive.size for archive in archives) - present
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f"it needs {format_bytes(needed)}, packed and unpacked, and "
                      f"{format_bytes(free)} are free")


# ------------------------------------------------------------------------------------------------
# Download one file
# ------------------------------------------------------------------------------------------------


class BrokenConnection(Exception):
    """A connection failed in a way that may pass."""


def part_file(file):
    return file.with_name(file.name + ".part")


def download(archive, file):
    """Download an archive to `file` and check it. Return False if the file was already there."""
    if file.is_file():
        check_md5(archive, file, "Remove it, or put the right file in its place")
        return False
    part = part_file(file)
    have = f", of which {format_bytes(part.stat().st_size)} are here" if part.is_file() else ""
    print(f"downloading {format_bytes(archive.size)}{have} from {archive.url} to {file}",
          file=sys.stderr)
    try:
        download_with_retries(archive, part)
    except (urllib.error.HTTPError, BrokenConnection) as error:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                part.unlink()
        md5 = f" (md5 {archive.md5})" if archive.md5 else ""
        raise ConnectionError(
            f"cannot download {archive.url}: {error}. Run the command again to resume, or fetch "
            f"the file{md5} in another way, save it as {file}, and run the command again."
        ) from error
    try:
        check_md5(archive, part, "It was removed; run the command again")
    except ValueError:
        part.unlink()
        raise
    os.replace(part, file)
    return True


def check_md5(archive, file, what_to_do):
    """UserError, ending in what_to_do, if the file's md5 is not the archive's."""
    if archive.md5 is None:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as data:
        chunks = iter(lambda: data.read(CHUNK), b"")
        for chunk in progress(chunks, file.stat().st_size, f"checking {archive.file}", len):
            md5.update(chunk)
    if md5.hexdigest() != archive.md5:
        raise UserError(f"{file} is not the expected file: md5 {md5.hexdigest()}, "
                        f"{file.stat().st_size} bytes; expected md5 {archive.md5}, {archive.size} "
                        f"bytes. {what_to_do}.")


def download_with_retries(archive, part):
    """Bring `part` to its full length with as many connections as it takes.

    BrokenConnection after MAX_TRIES in a row without a new byte; HTTPError for an answer that will
    not change, such as 404; UserError for a file longer than expected.
    """
    tries, longest = 0, 0
    while True:
        start = part.stat().st_size if part.is_file() else 0
        tries, longest = (0 if start > longest else tries), max(start, longest)
        if archive.md5 and start == archive.size:
            return                                           # complete; its md5 is checked next
        try:
            return download_from(archive, part, start)
        except urllib.error.HTTPError as error:
            if error.code == 416:                            # `start` lies beyond the end
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise
            broken = BrokenConnection(error)
        except BrokenConnection as error:
            broken = error
        tries += 1
        if tries == MAX_TRIES:
            raise broken
        print(f"{archive.file}: {broken}; trying again", file=sys.stderr)
        time.sleep(RETRY_WAIT * 2 ** (tries - 1))


def download_from(archive, part, start):
    """Open one connection and append what the server sends from byte `start` on to `part`.

    A server may ignore the range and send the whole file (200 instead of 206); then `part` is
    rewritten. BrokenConnection if the connection ends early.
    """
    headers = {"User-Agent": "fgssl"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers),
                                          timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:    # URLError, timeout, reset, ...
        raise BrokenConnection(getattr(error, "reason", error)) from error
    with response:
        if response.status == 206:
            content_range = response.headers.get("Content-Range", "")
            if not re.match(rf"bytes {start}-", content_range):
                part.unlink()
                raise BrokenConnection(f"asked for bytes from {start}, got {content_range!r}")
        else:
            start = 0
        length = response.headers.get("Content-Length")
        end = start + int(length) if length and length.isdecimal() else None
        limit = archive.size if archive.md5 else 2 * archive.size
        with open(part, "ab" if start else "wb") as out:
            for chunk in progress(read_chunks(response, limit - start), end or archive.size,
                                  f"downloading {archive.file}", len, start):
                out.write(chunk)
            size = out.tell()
    if size > limit:
        part.unlink()
        raise UserError(f"{archive.url} is longer than expected: {size} bytes or more instead of "
                        f"{archive.size}. Nothing was kept; try again later.")
    if end and size < end:
        raise BrokenConnection(f"the connection ended {format_bytes(end - size)} early")


def read_chunks(response, max_bytes):
    """Yield a response's bytes as they come, until they exceed max_bytes. BrokenConnection for any
    failure."""
    while max_bytes >= 0:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenConnection(error) from error
        if not chunk:
            return
        max_bytes -= len(chunk)
        yield chunk


# ------------------------------------------------------------------------------------------------
# Unpack
# ------------------------------------------------------------------------------------------------


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
