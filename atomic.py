"""Files that are written whole or not at all, whatever happens in between.

    with atomic.replacing(file) as draft:      # a unique name beside the file
        draft.write_bytes(...)
                                               # here the file has its new content, on the disk
"""

import contextlib
import errno
import os
import secrets
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: drafts of dead processes stay until somebody removes them
    fcntl = None


@contextlib.contextmanager
def replacing(file):
    """Yield the path of a draft; when the block ends, it replaces `file`.

    The draft has a name of its own, which two processes with the same pid, in two containers, do
    not share, and is flushed to the disk before it is renamed, and the folder after: a power cut
    leaves the old content or the new. An error, or a kill, leaves the old one; drafts of processes
    that are dead are removed. The OSError of a disk that is full says so, and names `file`.
    """
    file = Path(file)
    remove_dead_drafts(file)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        with locked(draft):
            yield draft
            with open(draft, "rb+") as content:
                os.fsync(content.fileno())
            os.replace(draft, file)
        flush_folder(file.parent)
    except OSError as error:
        if error.filename not in (None, str(draft), draft):  # the block was reading another file
            raise
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot write {file}: {reason}. What was there "
                      "is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


@contextlib.contextmanager
def locked(draft):
    """Make the draft, and hold a lock on it, which the system releases when this process dies."""
    with open(draft, "xb") as held:
        if fcntl:
            with contextlib.suppress(OSError):               # some network disks have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
        else:
            held.close()                                     # Windows renames no open file
        yield


def try_lock(file):
    """Open and lock a file until the handle is closed or this process dies; None where another
    process holds it. On a disk without locks nothing is locked."""
    held = open(file, "ab")
    if fcntl:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            return None
        except OSError:
            pass
    return held


def remove_dead_drafts(file):
    """Remove the drafts of `file` that no living process holds a lock on."""
    for draft in file.parent.glob(f".{file.name}.*.part") if fcntl else ():
        with contextlib.suppress(OSError), open(draft, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()


def flush_folder(folder):
    """Write a folder's list of names to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
