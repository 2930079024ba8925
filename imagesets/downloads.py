"""Fetching a data set: download, check, unpack.

    obtain       archives from the internet -> one folder, whole or not at all
    download     one file: broken off, it goes on where it was; checked before it gets its name
    unpack       a tar or zip archive into a folder, and nowhere else

An archive is hostile until shown otherwise: its md5 says that it is the file we mean, and unpacking
trusts neither its names nor its sizes.
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
from .progress import amount, progress

CHUNK = 1 << 20
TIMEOUT = 30   # seconds without a byte after which a connection counts as broken
TRIES = 5      # connections in a row that bring nothing new, before we give up
PAUSE = 1      # seconds before the second of them; doubled for each one after
BOMB = 4       # photographs are compressed already: an archive that grows fourfold holds no images


class Archive(NamedTuple):
    """A file on the internet. `file` is its name on this machine, under --root."""
    file: str
    url: str
    size: int               # bytes; about that many where there is no md5
    md5: str | None = None  # None where the source gives none: a zip's own checksums must do


def obtain(name, archives, root, place):
    """Download `archives` into root and unpack them all into the folder root/place.

    An archive that is there already, put there by hand, is checked and used. Of two processes that
    ask at once, one fetches and the other waits. Interrupted, it leaves no folder, and at most a
    .part that the next call goes on with. Raises ConnectionError where the internet does not give
    the file, ValueError for one that is not what was wanted, OSError for a disk that is full.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f".{name}.lock", name):
            if not (root / place).is_dir():                  # another process may have been faster
                check_room(archives, root)
                fill(root / place, archives)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(f"cannot keep {name} in {root}: {error}. Make room there, or choose another "
                      "--root.") from error


def fill(folder, archives):
    """Download archives beside the folder and unpack them; it gets its name when it is whole.

    What was downloaded is removed where it has served, and where it cannot be used.
    """
    files = [folder.with_name(archive.file) for archive in archives]
    ours = [file for archive, file in zip(archives, files) if download(archive, file)]
    draft = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(draft, ignore_errors=True)                 # of a process that was killed
    try:
        for file in files:
            unpack(file, draft)
        inner = draft / folder.name
        os.replace(inner if inner.is_dir() else draft, folder)
    except (OSError, KeyboardInterrupt):                     # a full disk, Ctrl-C: to be used again
        ours = []
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for file in ours:
            file.unlink()


@contextlib.contextmanager
def alone(file, name):
    """Hold a lock against other processes; the system frees it when its holder dies.

    The file is removed where the work succeeded: who waits then finds the work done.
    """
    with open(file, "a") as held:
        waiting = False
        while not locked(held):
            if not waiting:
                print(f"waiting for another process that fetches {name}", file=sys.stderr)
            waiting = True
            time.sleep(0.2)
        yield
    with contextlib.suppress(OSError):
        file.unlink()


def locked(file):
    """Try to lock an open file; whether it worked."""
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


def check_room(archives, root):
    """OSError where the disk cannot hold what is not there yet, packed and unpacked."""
    there = sum(file.stat().st_size for archive in archives
                for file in (root / archive.file, part_of(root / archive.file)) if file.is_file())
    needed = 2 * sum(archive.size for archive in archives) - there
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(f"it takes {amount(needed)}, packed and unpacked, and {amount(free)} are "
                      "free")


# ------------------------------------------------------------------------------------------------
# One file
# ------------------------------------------------------------------------------------------------


class Broken(Exception):
    """A connection that failed in a way that may pass."""


def part_of(file):
    return file.with_name(file.name + ".part")


def download(archive, file):
    """Fetch an archive to `file` and check it. Returns whether it was fetched: False if there."""
    if file.is_file():
        check(archive, file, "Remove it, or put the right one in its place")
        return False
    part = part_of(file)
    have = f", of which {amount(part.stat().st_size)} are here" if part.is_file() else ""
    print(f"downloading {amount(archive.size)}{have} from {archive.url} to {file}", file=sys.stderr)
    try:
        transfer(archive, part)
    except (urllib.error.HTTPError, Broken) as error:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                part.unlink()
        md5 = f" (md5 {archive.md5})" if archive.md5 else ""
        raise ConnectionError(
            f"cannot download {archive.url}: {error}. Run the command again to go on, or fetch "
            f"that file{md5} by other means, put it at {file}, and run the command again."
        ) from error
    try:
        check(archive, part, "It was removed; run the command again")
    except ValueError:
        part.unlink()
        raise
    os.replace(part, file)
    return True


def check(archive, file, what_to_do):
    """ValueError, which ends in what_to_do, if the file's md5 is not the archive's."""
    if archive.md5 is None:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as data:
        chunks = iter(lambda: data.read(CHUNK), b"")
        for chunk in progress(chunks, file.stat().st_size, f"checking {archive.file}", len):
            md5.update(chunk)
    if md5.hexdigest() != archive.md5:
        raise UserError(f"{file} is not the file that was expected: md5 {md5.hexdigest()}, "
                         f"{file.stat().st_size} bytes; wanted md5 {archive.md5}, {archive.size} "
                         f"bytes. {what_to_do}.")


def transfer(archive, part):
    """Bring `part` to its full length, over as many connections as it takes.

    Raises Broken when TRIES of them in a row bring nothing new, HTTPError for an answer that will
    not change (such as 404), ValueError for a file longer than it should be.
    """
    tries, most = 0, 0
    while True:
        start = part.stat().st_size if part.is_file() else 0
        tries, most = (0 if start > most else tries), max(start, most)
        if archive.md5 and start == archive.size:
            return                                           # and the check will tell
        try:
            return receive(archive, part, start)
        except urllib.error.HTTPError as error:
            if error.code == 416:                            # there is nothing from here on
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise
            broken = Broken(error)
        except Broken as error:
            broken = error
        tries += 1
        if tries == TRIES:
            raise broken
        print(f"{archive.file}: {broken}; trying again", file=sys.stderr)
        time.sleep(PAUSE * 2 ** (tries - 1))


def receive(archive, part, start):
    """One connection: write what the server has from byte `start` on, or all, to the end of `part`.

    A server may ignore the wish to start in the middle (200 in place of 206); then `part` is
    written anew. Raises Broken if the connection ends early.
    """
    headers = {"User-Agent": "fgssl"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers),
                                          timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:    # URLError, timeout, reset, ...
        raise Broken(getattr(error, "reason", error)) from error
    with response:
        if response.status == 206:
            given = response.headers.get("Content-Range", "")
            if not re.match(rf"bytes {start}-", given):
                part.unlink()
                raise Broken(f"asked for the bytes from {start} on, got {given!r}")
        else:
            start = 0
        length = response.headers.get("Content-Length")
        end = start + int(length) if length and length.isdecimal() else None
        limit = archive.size if archive.md5 else 2 * archive.size
        with open(part, "ab" if start else "wb") as out:
            for chunk in progress(chunks_of(response, limit - start), end or archive.size,
                                  f"downloading {archive.file}", len, start):
                out.write(chunk)
            size = out.tell()
    if size > limit:
        part.unlink()
        raise UserError(f"{archive.url} is longer than it should be: wanted {archive.size} bytes, "
                         f"got {size} and more. Nothing was kept.")
    if end and size < end:
        raise Broken(f"the connection ended {amount(end - size)} early")


def chunks_of(response, most):
    """What a response brings, as it comes, until it is more than `most` bytes; Broken for whatever
    goes wrong on the way."""
    while most >= 0:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(error) from error
        if not chunk:
            return
        most -= len(chunk)
        yield chunk


# ------------------------------------------------------------------------------------------------
# Unpacking
# ------------------------------------------------------------------------------------------------


def unpack(file, folder):
    """Unpack a .zip or a tar archive into the folder; a single file (.mat) is copied there.

    Only plain files and folders are made, with this process's own rights. ValueError for an entry
    that is a link or a device or whose name leaves the folder, for a damaged archive, and for a
    bomb: one that grows BOMB times. What was written until then is the caller's to remove.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mat":
        shutil.copyfile(file, folder / file.name)
        return
    room = BOMB * file.stat().st_size + CHUNK                # bytes that may still be written
    pieces = progress(contents(file, folder), None, f"unpacking {file.name}",
                      lambda piece: len(piece[1] or b""))
    for target, piece in pieces:
        room -= len(piece or b"") or 512                     # entries without bytes end, too
        if room < 0:
            raise UserError(f"{file} unpacks to more than {BOMB} times its size: no archive of "
                             "photographs does. Fetch it anew.")
        if piece is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab" if piece else "wb") as out:
            out.write(piece)


def contents(file, folder):
    """What an archive holds, in pieces: (path in folder, None) for a folder; for a file (path, b"")
    and then (path, bytes) until it is whole. ValueError for whatever is wrong with it."""
    entries = zip_entries if file.suffix == ".zip" else tar_entries
    try:
        for name, source in entries(file):
            target = inside(folder, name)
            if source is None:
                yield target, None
                continue
            yield target, b""
            while piece := source.read(CHUNK):
                yield target, piece
    except Exception as error:  # the readers of damaged archives raise what they please
        raise UserError(f"{file} cannot be used: {error}. Fetch it anew.") from error


def tar_entries(file):
    """(name, open file, or None for a folder) of each entry of a tar, compressed or not."""
    with tarfile.open(file, "r|*") as archive:
        for entry in archive:
            if not entry.isfile() and not entry.isdir():
                raise UserError(f"{entry.name!r} in it is a link or a device")
            yield entry.name, archive.extractfile(entry) if entry.isfile() else None


def zip_entries(file):
    """(name, open file, or None for a folder) of each entry of a zip."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)    # 0 where it was packed on Windows
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{entry.filename!r} in it is a link or a device")
            if entry.is_dir():
                yield entry.filename, None
                continue
            with archive.open(entry) as source:
                yield entry.filename, source


def inside(folder, name):
    """folder / name, where that stays within the folder; ValueError for any other name."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if any(part in ("/", "..") or ":" in part or "\0" in part for part in parts):
        raise UserError(f"{name!r} in it would be written outside of {folder}")
    return folder.joinpath(*parts)
