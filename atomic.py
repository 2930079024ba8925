"""What is written is whole or not there, whatever happens in between; one writer at a time.

    with atomic.replacing(file) as draft:                    # a unique name beside the file
        draft.write_bytes(...)
                                                             # now its new content is on the disk
    with atomic.drafting(folder, is_folder=True) as draft:   # the steps of `replacing`, one by one
        ...
        atomic.publish(draft, folder)
    with atomic.lock(file, "waiting for ..."):               # one process at a time
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: drafts of dead processes stay until somebody removes them
    fcntl = None
    import msvcrt

# ------------------------------------------------------------------------------------------------
# Files and folders
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(file):
    """Yield the path of a draft; when the block ends, it replaces `file`.

    A power cut leaves the old content or the new; an error, or a kill, the old one. The OSError of
    a disk that is full says so, and names `file`.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)       # somebody may have removed it
    except OSError as error:
        raise OSError(error.errno, f"cannot write {file}: {error.strerror}") from error
    try:
        with drafting(file) as draft:
            yield draft
            publish(draft, file)
    except OSError as error:
        ours = str(file.with_name(draft_prefix(file)))
        if not str(error.filename or ours).startswith(ours):  # the block was reading another file
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot write {file}: {reason}. What was there "
                      "is untouched") from error


@contextlib.contextmanager
def drafting(path, is_folder=False, keep=False):
    """Yield the path of a new, empty file or folder beside `path`; remove it when the block ends.

    It has a name of its own, which two processes with the same pid, in two containers, do not
    share, and a lock, by which others see that its process lives: drafts of the dead are removed.
    keep: Ctrl-C leaves the draft, as a kill does, for the next process to go on with.
    """
    path = Path(path)
    if not keep:
        remove_dead_drafts(path)
    draft, held = make_draft(path, is_folder)
    kept = False
    try:
        yield draft
    except KeyboardInterrupt:
        kept = keep
        raise
    finally:
        if not kept:
            remove(draft)
        if held is not None:
            os.close(held)


def draft_prefix(path):
    """How the names of its drafts begin; a disk allows 255 bytes for a whole name."""
    return f".{os.fsdecode(os.fsencode(path.name)[:230])}."


def make_draft(path, is_folder):
    """Make a draft; returns its path and the open file that holds its lock, None on Windows, which
    renames no open file."""
    while True:
        draft = path.with_name(f"{draft_prefix(path)}{secrets.token_hex(4)}.part")
        if is_folder:
            draft.mkdir(parents=True)
        else:
            open(draft, "xb").close()
        if not fcntl:
            return draft, None
        with contextlib.suppress(FileNotFoundError):         # somebody's `remove_dead_drafts`
            held = os.open(draft, os.O_RDONLY)
            with contextlib.suppress(OSError):               # some network disks have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if draft.exists():
                return draft, held
            os.close(held)


def publish(draft, path):
    """Flush a draft, file or folder, to the disk; then give it its name, and flush that."""
    if draft.is_dir():
        with ThreadPoolExecutor(16) as pool:                 # a disk flushes many at a time faster
            list(pool.map(flush, draft.rglob("*")))
    flush(draft)
    os.replace(draft, path)
    flush(Path(path).parent)


def flush(path):
    """Write a file, or a folder's list of names where the system can, to the disk."""
    if path.is_symlink():
        return
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path):
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_dead_drafts(path):
    """Remove the drafts of `path` whose processes are dead."""
    for draft in path.parent.glob(f"{glob.escape(draft_prefix(path))}*.part"):
        remove_if_dead(draft)


def remove_if_dead(draft):
    """Remove a draft that no living process holds a lock on, where that can be told."""
    with contextlib.suppress(OSError):
        held = os.open(draft, os.O_RDONLY)
        try:
            if fcntl:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(draft)
        finally:
            os.close(held)


# ------------------------------------------------------------------------------------------------
# Locks: the system releases them when their process ends, however it does
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(file, waiting):
    """Hold the lock of a file, which is made; while another process does, wait, and print why."""
    held = try_lock(file)
    if held is None:
        print(waiting, file=sys.stderr, flush=True)
        while held is None:
            time.sleep(0.2)
            held = try_lock(file)
    with held:
        yield


def try_lock(file):
    """Open and lock a file until the handle is closed or this process dies; None where another
    process holds it. On a disk without locks nothing is locked."""
    held = open(file, "ab")
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        held.close()
        return None
    except OSError:
        pass
    return held
