"""Fetching a data set: download and check; unpack.py opens the archives.

    download_set    archives -> one folder, complete or not at all
    download        one file: resumed if interrupted, checked before it gets its name

Archives are not trusted: the checksum shows that a file is the expected one.
"""

import contextlib
import hashlib
import http.client
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from typing import NamedTuple

import atomic

from .errors import UserError
from .progress import format_bytes, progress
from .unpack import CHUNK, unpack

TIMEOUT = 30       # seconds without a byte until a connection counts as broken
MAX_TRIES = 5      # connections in a row without a new byte until we give up
RETRY_WAIT = 1     # seconds before the second of them, doubled each time


class Archive(NamedTuple):
    """A file to download. `file` is its name under --root."""
    file: str
    url: str
    size: int                  # bytes; approximate if there is no checksum
    md5: str | None = None     # without md5 and sha256, only the archive's own checksums help
    sha256: str | None = None

    @property
    def checksum(self):
        """The kind and value of the published checksum, or None."""
        return self.sha256 and ("sha256", self.sha256) or self.md5 and ("md5", self.md5)


def download_set(name, archives, root, folder):
    """Download `archives` into root and unpack all of them into root/folder.

    An archive that already lies in root is checked and used. If two processes ask at once, one
    downloads and the other waits. After an interruption there is no folder, and at most a .part
    file that the next call resumes. ConnectionError if the download fails, UserError for a wrong
    file, OSError for a full disk.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = root / f".{name}.lock"
        with atomic.lock(lock, f"waiting for another process that downloads {name}"):
            if not (root / folder).is_dir():                 # another process may have made it
                check_disk_space(archives, root)
                download_and_unpack(archives, root / folder)
        atomic.remove(lock)                                  # who still waits finds the work done
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
    try:
        with atomic.drafting(folder, is_folder=True) as draft:
            for file in files:
                unpack(file, draft)
            inner = draft / folder.name
            atomic.publish(inner if inner.is_dir() else draft, folder)
    except (OSError, KeyboardInterrupt):                     # the archives are good: keep them
        temporary = []
        raise
    finally:
        for file in temporary:
            file.unlink()


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
        check_digest(archive, file, "Remove it, or put the right file in its place")
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
        checksum = f" ({' '.join(archive.checksum)})" if archive.checksum else ""
        raise ConnectionError(
            f"cannot download {archive.url}: {error}. Run the command again to resume, or fetch "
            f"the file{checksum} in another way, save it as {file}, and run the command again."
        ) from error
    try:
        check_digest(archive, part, "It was removed; run the command again")
    except ValueError:
        part.unlink()
        raise
    atomic.publish(part, file)
    return True


def check_digest(archive, file, what_to_do):
    """UserError, ending in what_to_do, if the file's checksum is not the archive's."""
    if archive.checksum is None:
        return
    kind, expected = archive.checksum
    found = hashlib.new(kind, usedforsecurity=False)
    with open(file, "rb") as data:
        chunks = iter(lambda: data.read(CHUNK), b"")
        for chunk in progress(chunks, file.stat().st_size, f"checking {archive.file}", len):
            found.update(chunk)
    if found.hexdigest() != expected:
        raise UserError(f"{file} is not the expected file: {kind} {found.hexdigest()}, "
                        f"{file.stat().st_size} bytes; expected {kind} {expected}, {archive.size} "
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
        if archive.checksum and start == archive.size:
            return                                           # complete; it is checked next
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
        limit = archive.size if archive.checksum else 2 * archive.size
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
