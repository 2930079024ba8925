"""Files damaged on purpose: what is read then is what was written, or the file is named.

The damage is a changed bit or byte, a sector of zeros or a missing one, or an end cut off. A trial
holds if the file is read as it was, or refused by name. Photographs of a format without checksums
can be damaged unseen: there, only lost sectors must be seen, and the rest is counted.
"""

import collections
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fgssl
from evaluation import results

DAMAGES = ("bit", "byte", "zeros", "lost", "cut")


def damaged(content, kind, rng):
    """`content` with a changed bit or byte, a sector of zeros, one lost, or without its end."""
    broken, at = bytearray(content), rng.randrange(len(content))
    sector = slice(at // 512 * 512, at // 512 * 512 + 512)
    if kind == "bit":
        broken[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        broken[at] ^= rng.randrange(1, 256)
    elif kind == "zeros":
        broken[sector] = bytes(len(broken[sector]))
    else:
        del broken[sector if kind == "lost" else slice(at, None)]
    return bytes(broken)


def try_damage(what, seed, work):
    """One trial: None if it holds, or what went wrong."""
    rng = random.Random(f"{what} {seed}")
    kind = rng.choice(DAMAGES)
    file, check = DAMAGED[what](work, rng)
    whole = file.read_bytes()
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        (folder / file.name).write_bytes(damaged(whole, kind, rng))
        wrong = check(folder / file.name, file, kind)
        return wrong and f"{kind}: {wrong}"
    except fgssl.UserError as error:
        return None if file.name in str(error) else f"{kind}: the file is not named: {error}"
    except Exception as error:
        return f"{kind}: {error!r}"
    finally:
        shutil.rmtree(folder)


def checkpoints(work, rng):
    def check(broken, file, kind):
        return difference(torch.load(file, weights_only=True), fgssl.read_checkpoint(broken))
    return work / "base/checkpoint.pt", check


def logs(work, rng):
    def check(broken, file, kind):
        lines = broken.read_bytes().splitlines()
        kept = [json.loads(line) for line in file.read_bytes().splitlines() if line in lines]
        found = fgssl.read_log(broken)
        return None if all(record in found for record in kept) else "a whole line is not read"
    return work / "base/log.jsonl", check


def evaluations(work, rng):
    def check(broken, file, kind):
        content, before, said = broken.read_bytes(), results.read_result(file), io.StringIO()
        with contextlib.redirect_stderr(said):
            found = results.earlier_result(broken, before)
        if "was changed or damaged" in said.getvalue() and broken.read_bytes() == content:
            return None
        kept = any(path.read_bytes() == content for path in broken.parent.iterdir())
        return difference(before, found) if found else None if kept else "it is overwritten"
    return work / "base/eval.json", check


def caches(work, rng):
    def images(folder):
        os.environ["FGSSL_CACHE"] = str(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            return np.array(fgssl.load_data(work / "photos").cached("train", 40).images)

    def check(broken, file, kind):
        return None if np.array_equal(images(broken.parent), whole) else "other images"

    whole = images(work / "cache")
    file, = (work / "cache").glob("*-train-40-*.npy")
    return file, check


FORMATS = {
    "png": ("png", {}), "webp": ("webp", {}), "webp, lossless": ("webp", {"lossless": True}),
    "tiff": ("tiff", {"compression": "tiff_adobe_deflate"}),
    "tiff, LZW": ("tiff", {"compression": "tiff_lzw"}), "jpeg": ("jpeg", {"quality": 90}),
    "jpeg, progressive": ("jpeg", {"progressive": True}), "gif": ("gif", {})}
CHECKED = {"png": DAMAGES, "tiff": DAMAGES, "jpeg, progressive": ("cut",)}  # others: sectors, cut
SILENT = collections.Counter()                               # (format, damage, changed unseen?)


def photographs(name):
    def sample(work, rng):
        file = work / f"{name}.{FORMATS[name][0]}"
        if not file.exists():
            noise = rng.choices(range(256), k=3 * 60 * 40)
            small = Image.frombytes("RGB", (60, 40), bytes(noise)).resize((300, 200))
            small.save(file, **FORMATS[name][1])
        return file, check

    def check(broken, file, kind):
        whole = fgssl.decode(file, 64)
        try:
            same = np.array_equal(fgssl.decode(broken, 64), whole)
        except fgssl.UserError:
            SILENT[name, kind, False] += 1
            raise
        SILENT[name, kind, not same] += 1
        if not same and kind in CHECKED.get(name, DAMAGES[2:]):
            return "another picture"
        return None
    return sample


DAMAGED = {"checkpoint": checkpoints, "log.jsonl": logs, "eval.json": evaluations, "cache": caches}
DAMAGED |= {name: photographs(name) for name in FORMATS}


def photograph_rates():
    """Print how often a damaged photograph decoded to another picture."""
    if SILENT:
        print("\nphotographs that decode to another picture, unseen, in % of those damaged by\n"
              f"{'':<20}" + "".join(f"{kind:>8}" for kind in DAMAGES))
    for name in FORMATS if SILENT else ():
        rates = [(SILENT[name, kind, True], SILENT[name, kind, False]) for kind in DAMAGES]
        print(f"{name:<20}" + "".join(f"{100 * bad / (bad + good):8.0f}" if bad + good else
                                      f"{'':>8}" for bad, good in rates))


def difference(a, b, where=""):
    """What differs in two trees of dicts, lists, tensors and values; None if nothing does."""
    if type(a) is not type(b):
        return f"{where}: {str(b)[:60]} in place of {str(a)[:60]}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            missing, more = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
            return f"{where}: missing {missing[:3]}, surplus {more[:3]}"
        pairs = [(a[key], b[key], f"{where}/{key}") for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(b)} in place of {len(a)}"
        pairs = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))]
    elif isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else f"{where}: another tensor"
    else:
        return None if a == b or a != a and b != b else f"{where}: {str(b)[:60]} for {str(a)[:60]}"
    return next(filter(None, (difference(*pair) for pair in pairs)), None)
