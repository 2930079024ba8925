"""Which images a run was trained on: their names, splits, and an id of each file's bytes."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np

from .errors import UserError
from .imagefile import attempt

PIECE = 4096  # bytes that are read at the start, in the middle and at the end of a file


def file_ids(paths):
    """8 bytes that identify the content of each file: uint8 (N, 8).

    A hash of the file's size and of three pieces of 4 KiB. Two photographs differ in each of them,
    and 100,000 files are read in seconds, whichever size their images are cached at.
    """
    def file_id(path):
        size = path.stat().st_size
        found = blake2b(size.to_bytes(8, "big"), digest_size=8)
        with open(path, "rb") as file:
            for start in (0, (size - PIECE) // 2, size - PIECE):
                file.seek(max(start, 0))
                found.update(file.read(PIECE))
        return found.digest()

    with ThreadPoolExecutor(8) as pool:
        ids = b"".join(pool.map(lambda path: attempt(lambda: file_id(path), path), paths))
    return np.frombuffer(ids, np.uint8).reshape(-1, 8).copy()


def identify(records, rows):
    """What a checkpoint keeps of the images `rows` of some Records: plain values and one array."""
    names = [records.classes[label] if label >= 0 else "" for label in records.labels[rows]]
    paths = [records.paths[row] for row in rows]
    return {"files": [f"{name}/{path.name}" for name, path in zip(names, paths)],
            "splits": records.splits[rows].tolist(), "ids": file_ids(paths)}


def differences(before, now):
    """How two results of `identify` differ, in words; "" where content, order and splits agree.
    Where files lie and what they are called does not matter."""
    if before["splits"] == now["splits"] and np.array_equal(before["ids"], now["ids"]):
        return ""
    ids = [[row.tobytes() for row in np.asarray(each["ids"])] for each in (before, now)]
    changes = []
    for word, ours, theirs, files in (("gone", ids[0], Counter(ids[1]), before["files"]),
                                      ("new", ids[1], Counter(ids[0]), now["files"])):
        names = []
        for file, each in zip(files, ours):                  # one content may be there twice
            theirs[each] -= 1
            names += [file] * (theirs[each] < 0)
        if names:
            more = ", ..." * (len(names) > 3)
            changes.append(f"{len(names)} {word} ({', '.join(names[:3])}{more})")
    return ", ".join(changes) or "the same images in another order or other splits"


def require_same(before, now, name, out):
    """UserError where the run in the folder `out` was trained on other images than those of the set
    `name` are now; before may be None, of older checkpoints."""
    if before is None:
        return
    if not isinstance(before, dict) or before.keys() != now.keys():
        raise UserError(f"{out}/checkpoint.pt was changed or damaged: its data is {before!r:.60}")
    changed = differences(before, now)
    if changed:
        raise UserError(f"the images of {name} are not those of the run in {out}: {changed}. Put "
                        "them back, name the folder that has them with --data, or start a run with "
                        "another --out")
