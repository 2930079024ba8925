"""Break the programs on purpose, and compare their end with that of an undisturbed run.

    python tests/faults.py --hours 1                  # everything, again and again, and the table
    python tests/faults.py --only "kill, simclr" --seed 7 --keep    # one trial again, its files

A trial runs a command under a fault, and then once more without, as a user would (a trainer with
--resume if there is a checkpoint). It holds if the second run ends well and leaves what an
undisturbed run leaves: weights and images equal to the bit, the same log lines and results, no file
more or less. Where the first run lives on (full disk, read-only folder), it may not end in a
traceback. Faults come at an operation on files, such as the 17th write, drawn from all that the
undisturbed run makes; faults.c, which is preloaded, counts them. So a seed repeats a trial.

    kill, torn     SIGKILL before an operation; in the middle of a write
    late kill      in the last twentieth: after the last save, before what is written then
    power          SIGKILL; then each file has the content that its last fsync had, or none, under
                   the name that it has now: a journal keeps names, and nothing else
    disk           SIGKILL; then what an ext4 disk has that lost its power at this moment, where
                   root can mount one
    term, hup      the signals of a cluster and of a closed terminal
    full, readonly no operation succeeds any more
    eio, bad disk  reading photographs fails twice; fails from there on
    clock          the time of day jumps back an hour

Damage to files is tried, too: damage.py.

An hour is LEAST rounds at least, which kill 108 trainers and damage 360 checkpoints: on a busy
machine it takes longer. The children are forked from this process, which has imported PyTorch: a
trial costs about a second. A trainer's clock runs fast, so that it saves after each step. It takes
gcc, and Linux.
"""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
from pathlib import Path



def preload():
    """Start this program anew with faults.c preloaded, once it is built."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    source = Path(__file__).with_name("faults.c")
    try:
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", folder / "faults.so", source,
                        "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"faults.c cannot be built: {error}. Install gcc")
    os.environ["LD_PRELOAD"] = str(folder / "faults.so")
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__" and "faults.so" not in os.environ.get("LD_PRELOAD", ""):
    preload()                                                # before what takes long to import

import conftest  # noqa: F401, the project on the path
import numpy as np
import torch
from PIL import Image
from test_downloads import Server

import fgssl
import linear_eval
from damage import DAMAGED, difference, photograph_rates, try_damage
from imagesets import downloads, imagefile, toybirds
from imagesets.progress import format_time

# ------------------------------------------------------------------------------------------------
# The commands: what a child runs, in the trial's folder
# ------------------------------------------------------------------------------------------------

TINY = ["--size", "16", "--batch", "8", "--epochs", "2", "--precision", "fp32"]
PLAIN = ["--init", "random", "--size", "24", "--precision", "fp32"]


def train(script, *more):
    ticks = itertools.count(0, 61)                           # seconds: a minute a look at the clock
    fgssl.time = types.SimpleNamespace(monotonic=lambda: next(ticks))
    again = ["--resume"] if Path("out/checkpoint.pt").exists() else ["--data", "../photos", *more]
    importlib.import_module(script).main(["--out", "out", *again])


def evaluate(*more):
    linear_eval.main([*PLAIN, "--data", "../photos", "--out", "out", *more])


def explore():
    linear_eval.main(["../base/checkpoint.pt", "--explore", "../photos", "--out", "out"])


def predict():
    linear_eval.main(["../base/probe.pt", "--predict", "../photos/test", "--csv", "out/a.csv"])


def cache():
    data = fgssl.load_data("../photos", skip_bad=True)
    for split in ("train", "val", "test"):
        data.cached(split, 40)


def download():
    downloads.RETRY_WAIT = 0
    archive = downloads.Archive("set.zip", SERVER.url("set.zip"), len(SERVER.files["set.zip"]))
    if not Path("out/set").is_dir():
        downloads.download_set("set", [archive], Path("out"), "set")


def toy():
    toybirds.draw(Path("out/toy"), per_class=(1, 1, 1))


COMMANDS = {
    "simclr": lambda: train("train_simclr", *TINY), "jigsaw": lambda: train("train_jigsaw", *TINY),
    "srgan": lambda: train("train_srgan", *TINY, "--pixel-epochs", "1"),
    "evaluation": evaluate, "few labels": lambda: evaluate(
        "--shots", "1", "all", "--finetune", "--steps", "4", "--batch", "8", "--draws", "1"),
    "predict": predict, "explore": explore, "cache": cache, "download": download, "toy set": toy}
FAULTS = ("kill", "late kill", "torn", "power", "disk", "term", "hup", "full", "readonly", "clock",
          "eio", "bad disk")
LEAST = 9                                                    # rounds
READERS = ("simclr", "cache", "explore")                     # what eio is tried with


def outcome(folder):
    """What a command has left: {path: content}, comparable by `difference`."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".pt":
            found[name] = torch.load(file, weights_only=True)
            for changing in ("resume", "argv", "commit"):
                found[name].get("args", {}).pop(changing, None)
            if file.name != "checkpoint.pt":                 # where cells already on file ended
                found[name].pop("rng", None)
        elif file.name == "log.jsonl":                       # without headers and rates
            records = [record for record in fgssl.read_log(file) if "argv" not in record]
            found[name] = [{key: value for key, value in record.items()
                            if not key.endswith("_per_s")} for record in records]
        elif file.name == "eval.json":
            found[name] = {key: value for key, value in json.loads(file.read_text()).items()
                           if key not in ("argv", "commit", "checksum")}
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                found[name] = {key: arrays[key].tolist() for key in arrays}
        elif file.suffix not in (".html", ".lock", ".zip"):
            found[name] = file.read_bytes()                  # an error leaves a good archive
    return found


# ------------------------------------------------------------------------------------------------
# Faults
# ------------------------------------------------------------------------------------------------


def start(command, folder, fault="", at=0, times=0):
    """Run a command in a child, its folder the working folder; exit code and what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = folder.with_name(folder.name + ".copies")
    copies.mkdir(exist_ok=True)
    said = folder.with_name(folder.name + ".txt")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setsid()
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.argv = [f"train_{command}.py"]
            os.environ |= {
                "FGSSL_CACHE": str(folder / "cache"), "FAULT_KIND": fault, "FAULT_AT": str(at),
                "FAULT_COUNT": str(folder.with_name(folder.name + ".count")),
                "FAULT_TIMES": str(times), "FAULT_ROOT_1": str(folder / "out"),
                "FAULT_ROOT_2": str(folder / "cache"), "FAULT_READS": str(folder.parent / "photos"),
                "FAULT_COPIES": str(copies) if fault == "power" else ""}
            ctypes.CDLL(None).fault_arm()
            code = 1
            try:
                fgssl.launch(COMMANDS[command])
                code = 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else print(left.code) or 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os._exit(99)
    late = threading.Timer(120, os.killpg, (child, signal.SIGKILL))
    late.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hung = not late.is_alive()
    late.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)                     # workers that outlive their parent
    if fault == "disk":
        lose_power(folder)
    if fault == "power":
        for file in (path for path in folder.rglob("*") if path.is_file()):
            copy = copies / str(file.stat().st_ino)
            file.write_bytes(copy.read_bytes() if copy.exists() else b"")
    return code, "hung" if hung else said.read_text(errors="replace")


def mount(folder):
    """Mount the disk folder.img, an image of an ext4 disk, in a folder."""
    subprocess.run(["mount", "-o", "loop,noauto_da_alloc", f"{folder}.img", folder], check=True,
                   capture_output=True)


@contextlib.contextmanager
def disk(folder):
    """A folder on an ext4 disk of its own; an exception where that cannot be had."""
    folder.mkdir()
    with open(f"{folder}.img", "wb") as image:
        image.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image.name], check=True, capture_output=True)
    mount(folder)
    try:
        yield
    finally:
        unmount(folder)


def lose_power(folder):
    """Drop all that the disk mounted here has not written, and mount it again."""
    at = os.open(folder, os.O_RDONLY)
    fcntl.ioctl(at, 0x8004587D, struct.pack("I", 2))         # EXT4_IOC_SHUTDOWN, without a flush
    os.close(at)
    for _ in range(100):                                     # until other namespaces let it go
        unmount(folder)
        mount(folder)
        if can_write(folder):
            return
    raise OSError(f"{folder}.img cannot be mounted again")


def can_write(folder):
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
        return True
    return False


def unmount(folder):
    while subprocess.run(["umount", folder], capture_output=True).returncode:
        time.sleep(0.1)                                      # a killed process is not yet gone


def can_mount(work):
    with contextlib.suppress(OSError, subprocess.CalledProcessError), disk(work / "tried"):
        return True
    return False


def undisturbed(command, work):
    """(outcome, operations, reads) of a command without a fault."""
    if command not in UNDISTURBED:
        folder = work / f"{command} undisturbed"
        code, said = start(command, folder, "count")
        if code:
            sys.exit(f"{command} fails without a fault:\n{said}")
        count = np.fromfile(folder.with_name(folder.name + ".count"), np.int64)
        UNDISTURBED[command] = outcome(folder), *count.tolist()
    return UNDISTURBED[command]


UNDISTURBED = {}


def try_fault(fault, command, seed, work):
    """One trial: None if it holds, or what went wrong."""
    wanted, operations, reads = undisturbed(command, work)
    folder, rng = work / f"{fault} {command} {seed}", random.Random(f"{fault} {command} {seed}")
    kind, total, times = fault, operations, 0
    if fault in ("eio", "bad disk"):
        kind, total, times = "eio", reads, 2 if fault == "eio" else 10**9
    elif fault in ("power", "disk"):
        total += total // 10                                 # some after the end
    at = rng.randrange(total)
    if fault == "late kill":
        kind, at = "kill", total - 1 - at // 20
    with disk(folder) if fault == "disk" else contextlib.nullcontext():
        code, said = start(command, folder, kind, at, times)
        if "Traceback" in said or said == "hung" or fault in ("eio", "clock") and code:
            return f"at {at}: {said.strip().splitlines()[-1]}"
        code, said = start(command, folder)
        if code:
            return f"at {at}, then: {said.strip().splitlines()[-1]}"
        wrong = difference(wanted, outcome(folder))
        return wrong and f"at {at} of {operations}: {wrong}"


# ------------------------------------------------------------------------------------------------
# The harness
# ------------------------------------------------------------------------------------------------


def prepare(work):
    """Photographs, an archive on a server, and a finished run to damage: its checkpoint, log,
    results and cache."""
    global SERVER, MOUNTS
    MOUNTS = can_mount(work)
    rng, stored = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        for split, count in (("train", 8), ("val", 4), ("test", 5)):
            for level, name in ((40, "ash"), (120, "elm"), (200, "oak")):
                folder = work / "photos" / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = (level + rng.normal(0, 20, (24, 24, 3))).clip(0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
                    archive.write(folder / f"{i}.png", f"set/{split}/{name}/{i}.png")
    SERVER = Server()
    SERVER.files["set.zip"] = stored.getvalue()
    threading.Thread(target=SERVER.serve_forever, args=(0.01,), daemon=True).start()
    (work / "base").mkdir()
    for command in ("simclr", "few labels"):
        undisturbed(command, work)
        for file in (work / f"{command} undisturbed/out").iterdir():
            shutil.copy(file, work / "base")
    imagefile.WAITS = (0, 0, 0)
    if not MOUNTS:
        print("no disk can be mounted here: its kind is left out", file=sys.stderr)


def trials(round_, short):
    """(name, seeds, function of seed and folder) of a round. short: each fault with one command,
    which is another in the next round, and a quarter of the damage."""
    for i, fault in enumerate(fault for fault in FAULTS if fault != "disk" or MOUNTS):
        commands = READERS if fault in ("eio", "bad disk") else list(COMMANDS)
        for command in [commands[(i + round_) % len(commands)]] if short else commands:
            yield f"{fault}, {command}", [round_], functools.partial(try_fault, fault, command)
    for what in DAMAGED:
        yield (f"damaged {what}", range(40 * round_, 40 * round_ + (5 if short else 40)),
               functools.partial(try_damage, what))


def print_table(counts):
    print(f"\n{'kind':<30} {'tried':>7} {'held':>7} {'failed':>7}")
    for name, (tried, failed) in counts.items():
        print(f"{name:<30} {tried:>7} {tried - failed:>7} {failed:>7}")
    tried, failed = map(sum, zip(*counts.values())) if counts else (0, 0)
    print(f"{'all':<30} {tried:>7} {tried - failed:>7} {failed:>7}")
    photograph_rates()
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--hours", type=float, help="how long, LEAST rounds at least; without it, one")
    p.add_argument("--short", action="store_true", help="less of everything, in a minute")
    p.add_argument("--only", default="", help="kinds whose name contains this")
    p.add_argument("--seed", type=int, default=0, help="of the first round; the next have the next")
    p.add_argument("--keep", action="store_true", help="keep the files, and say where")
    args = p.parse_args()
    work = Path(os.environ["LD_PRELOAD"]).parent.resolve()
    begin, shown, end = time.monotonic(), 0, 3600 * args.hours if args.hours else None
    counts = {}                                              # of each kind: tried and failed
    try:
        prepare(work)
        for round_ in itertools.count(args.seed) if end else [args.seed]:
            for name, seeds, trial in trials(round_, args.short):
                for seed in seeds if args.only in name else ():
                    wrong, count = trial(seed, work), counts.setdefault(name, [0, 0])
                    count[0] += 1
                    count[1] += bool(wrong)
                    if wrong:
                        print(f'FAILED {name}, {wrong}\n  again: python tests/faults.py --only '
                              f'"{name}" --seed {round_}', flush=True)
                    for file in work.glob(f"{name.replace(', ', ' ')} {seed}*"):
                        if not args.keep:
                            shutil.rmtree(file) if file.is_dir() else file.unlink()
                spent = time.monotonic() - begin
                if counts and spent > shown + 10:
                    shown = spent
                    tried, failed = map(sum, zip(*counts.values()))
                    left = f"  eta {format_time(max(0, end - spent))}" if end else ""
                    print(f"{tried} trials, {failed} failed  round {round_}  {name}  "
                          f"{format_time(spent)}{left}", file=sys.stderr, flush=True)
                if end and spent > end and round_ >= args.seed + LEAST:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    finally:
        failed = print_table(counts)
        if args.keep:
            print(f"the files are in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
