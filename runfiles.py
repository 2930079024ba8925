"""The files of a run: its checkpoint and its log.

    save, load       checkpoint.pt: everything that --resume needs
    read_checkpoint  any checkpoint, executing nothing
    Log, read_log    the terminal's lines, log.jsonl, curves.png
"""

import contextlib
import errno
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import nn

import atomic
import kernels
import parallel
import pictures
from imagesets.errors import UserError
from imagesets.progress import format_time

# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def save(file, step, args, rng, data=None, **parts):
    """Write one checkpoint: step, args, the state of every part and of the random generators.

    rng: the generator of the views; data: which images it was trained on, as imagesets.identity has
    it; parts: name=module or name=optimizer. PyTorch's own generators
    are saved for encoders with dropout. Rank 0 writes, and the others wait. OSError where it cannot
    be written; then the last checkpoint is untouched.
    """
    if parallel.rank() == 0:
        save_tensors(file, checkpoint_of(step, args, rng, data, **parts))
    parallel.wait()


def checkpoint_of(step, args, rng, data=None, **parts):
    """What `save` writes, a dict."""
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.update(step=step, args=vars(args).copy(), rng={
        "views": rng.get_state(), "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []})
    if data:
        checkpoint["data"] = data | {"ids": torch.from_numpy(data["ids"])}
    return checkpoint


def save_or_rescue(file, *state, **parts):
    """Write the checkpoint of a run. Where that fails and the run has none, since somebody removed
    its folder, it is written elsewhere; the OSError says where. state, parts: those of `save`."""
    checkpoint = checkpoint_of(*state, **parts)
    try:
        save_tensors(file, checkpoint)
    except OSError as error:
        if file.with_name("checkpoint.pt").exists():
            raise
        folder = tempfile.mkdtemp(prefix=f"{file.parent.name}-")
        save_tensors(Path(folder, "checkpoint.pt"), checkpoint)
        raise OSError(error.errno, f"{error.strerror}. The run is saved in {folder}: go on with "
                      f"--out {folder} --resume") from error


def save_tensors(file, content):
    """torch.save, whole or not at all. OSError where it cannot be written; a full disk is one, too,
    which PyTorch's writer reports as a RuntimeError."""
    with atomic.replacing(file) as draft, open(draft, "wb") as out:
        try:
            torch.save(content, out)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def raise_if_disk_failed(error, file):
    """OSError naming the file where `error`, of reading it, says nothing of what is in it."""
    of_content = (None, errno.EINVAL, errno.ENOENT, errno.EISDIR)
    if isinstance(error, OSError) and error.errno not in of_content:
        raise OSError(error.errno, f"cannot read {file}: {error.strerror}") from error


def read_checkpoint(file):
    """torch.load, executing nothing. Raises OSError where it cannot be read; UserError for a file
    that is damaged (the checksum of each part is compared) or no checkpoint."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint {file}: name one that a trainer wrote, such as "
                                "out/simclr/checkpoint.pt")
    try:
        if zipfile.is_zipfile(file):                         # torch.load compares no checksum
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():
                    raise UserError
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors have no common type
        raise_if_disk_failed(error, file)
        raise UserError(f"{file} is no checkpoint, or damaged. Only tensors and plain values are "
                        "loaded, never code") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("args"), dict):
        rename_old_arguments(checkpoint["args"])
    return checkpoint


def rename_old_arguments(args):
    """Give the arguments of an older SRGAN run, in place, the names that they have now."""
    if "warmup" in args:
        args["pixel_epochs"] = args.pop("warmup")
    if args.pop("discriminator", None) == "vgg":
        args["arch"] = "srgan-vgg"


def load(file, rng, **parts):
    """Put a checkpoint's state back into the parts and the random generators; returns it whole."""
    checkpoint = read_checkpoint(file)
    absent = [name for name in ("step", "rng", *parts) if name not in checkpoint]
    if absent:
        raise UserError(f"{file} is no checkpoint of this script: it lacks {', '.join(absent)}")
    step, state = checkpoint["step"], checkpoint["rng"]
    if type(step) is not int or step < 0:
        raise UserError(f"{file} cannot be used: its step is {step!r}")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_weights(part, checkpoint[name], f"{name} in {file}")
        else:
            load_optimizer(part, checkpoint[name], f"{name} in {file}")
    try:
        rng.set_state(state["views"])
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{file} cannot be used: its random generators, {error!r}") from error
    return checkpoint


def load_optimizer(optimizer, state, what):
    """optimizer.load_state_dict; UserError where the state is of other parameters, or of another
    optimizer, such as the AdamW of older runs."""
    try:
        settings = {name for group in state["param_groups"] for name in group}
        if not settings >= optimizer.param_groups[0].keys():
            raise UserError(f"{what} is of another optimizer than {type(optimizer).__name__}: "
                            "start a new run with another --out")
        optimizer.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what} does not fit: {error!r}") from error
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            fits = isinstance(value, torch.Tensor) and value.shape in ((), parameter.shape)
            if not fits or not value.isfinite().all():
                raise UserError(f"{what} does not fit: {name} of a parameter of shape "
                                f"{tuple(parameter.shape)}")


def load_weights(module, state, what):
    """module.load_state_dict, but with every key that does not fit, or whose numbers are not
    finite, listed in one UserError."""
    own = module.state_dict()
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{what} is no state dict of tensors")
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [f"{k} is {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}"
                 for k in own if k in state and state[k].shape != own[k].shape]
    problems += [f"{k} holds NaN or infinity: the run diverged" for k in own
                 if k in state and not state[k].isfinite().all()]
    if problems:
        raise UserError(f"{what} does not fit this {type(module).__name__}, "
                        f"{len(problems)} keys differ:\n  " + "\n  ".join(problems))
    module.load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# Log
# ------------------------------------------------------------------------------------------------

FORMATS = dict.fromkeys(("knn", "solved", "val_puzzles"), "{:.1f} %")
FORMATS |= dict.fromkeys(("psnr", "val_psnr"), "{:.2f} dB") | {"lr": "{:.1e}"}
YARDSTICKS = ("chance", "random_init", "bicubic")


class Log:
    """One line on the terminal and one JSON line in <out>/log.jsonl for each record.

    The first record holds what repeats the run: command, arguments, versions, device, commit.
    Resumed at `step`, later records (of a run that outlived its last checkpoint) are dropped.

    total: steps in the whole run; per_step, unit: what the rate counts, e.g. 256 "views". Rank 0
    alone prints and writes.
    """

    def __init__(self, args, total, step, device, per_step, unit="img"):
        self.total, self.per_step, self.unit = total, per_step, unit
        self.folder = Path(args.out)
        self.file = self.folder / "log.jsonl"
        if parallel.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_log(self.file) if step and record["step"] <= step]
            with atomic.replacing(self.file) as draft:       # a full disk must not cost the log
                draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._write({"step": step, "argv": sys.argv, "args": vars(args), "seed": args.seed,
                     "device": describe_device(device), "processes": parallel.ranks(),
                     "kernels": kernels.status(), "commit": commit(),
                     "python": platform.python_version(), "torch": str(torch.__version__),
                     "numpy": np.__version__, "pillow": PIL.__version__,
                     "started": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.step, self.time = step, time.monotonic()

    def __call__(self, step, **values):
        """Log numbers of training, with the rate since the last record and the time left."""
        steps_per_s = (step - self.step) / max(time.monotonic() - self.time, 1e-9)
        rate = round(steps_per_s * self.per_step, 1)
        left = format_time((self.total - step) / steps_per_s)
        tail = [f"{rate:.0f} {self.unit}/s", f"eta {left}"]
        if torch.cuda.is_available():
            tail.append(f"mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        self.note(step, tail, **values, **{f"{self.unit}_per_s": rate})

    def note(self, step, tail=(), **values):
        """Log the results of an evaluation; the clock of the rate restarts.

        `n`, how many images a percentage is of, and then a yardstick follow their number; the
        yardstick is printed in brackets. Lines are at most 120 columns wide.
        """
        words = [f"step {step}/{self.total}"]
        for name, value in values.items():
            yardstick = next((word for word in YARDSTICKS if name.startswith(word)), None)
            if yardstick:
                words[-1] += f" ({yardstick.replace('_', ' ')} {value:.4g})"
            elif name == "n":
                words[-1] += f" of {value}"
            elif not name.endswith("_per_s"):
                words.append(f"{label_of(name)} {FORMATS.get(name, '{:.4g}').format(value)}")
        line = "  ".join(word.replace(" ", "\xa0") for word in [*words, *tail])  # not broken
        lines = textwrap.wrap(line, 120, subsequent_indent="    ", break_on_hyphens=False)
        print("\n".join(lines).replace("\xa0", " "), flush=True)
        self._write({"step": step, **values})
        self.step, self.time = step, time.monotonic()

    def curves(self, **yardsticks):
        """Draw each named number over the steps, beside its yardstick, into <out>/curves.png."""
        records, panels = read_log(self.file), []
        for name, yardstick in yardsticks.items():
            points = [(r["step"], r[name], r[yardstick]) for r in records
                      if all(isinstance(r.get(key), (int, float)) and -1e30 < r[key] < 1e30
                             for key in (name, yardstick))]  # False for NaN, too
            if points:
                steps, values, level = zip(*points)
                unit = FORMATS.get(name, "").rpartition("}")[2].strip()
                number = next((r["n"] for r in records if name in r and type(r.get("n")) is int),
                              None)
                name, yardstick = label_of(name), yardstick.replace("_", " ")
                title = ", ".join(filter(None, [name, unit])) + (
                    f" of {number:,} images" if number and unit == "%" else "")
                panels.append(pictures.curve({name: (steps, values)}, {yardstick: level[-1]},
                                             "step", xrange=(0, self.step), title=title))
        if panels:
            pictures.save(pictures.stack(panels), self.folder / "curves.png")

    def _write(self, record):
        if parallel.rank() > 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)       # somebody may have removed it
        with open(self.file, "a") as out:
            finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in record.items()}  # JSON knows neither NaN nor infinity
            out.write(json.dumps(finite) + "\n")
            out.flush()
            os.fsync(out.fileno())                           # or a power cut empties the file


def label_of(name):
    """A number's name as people read it."""
    return {"knn": "k-NN"}.get(name, name.replace("_", " "))


def read_log(file):
    """The records of a log.jsonl. Lines that are none, cut short by a crash or damaged, are left
    out."""
    records = []
    for line in Path(file).read_bytes().splitlines() if Path(file).exists() else []:
        with contextlib.suppress(ValueError, RecursionError):  # of JSON, or of UTF-8
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def commit():
    """The git commit of this code, with + where files were changed; None outside a checkout.

    Takes no lock: `git describe --dirty` takes that of the index, in the way of a `git commit`, and
    leaves it behind when killed."""
    def git(*command):
        return subprocess.run(["git", "--no-optional-locks", *command], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_device(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
