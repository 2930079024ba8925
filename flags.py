"""The flags that every script shares, and what a resumed run may change of them."""

import argparse
import math
import os
import sys
from pathlib import Path

import imagesets
import parallel
from imagesets.decode import FITS
from runfiles import read_checkpoint


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float within bounds, with an error that names them."""
    def convert(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high and value > above):
            limits = (("at least", low), ("at most", high), ("above", above))
            wanted = [f"{word} {limit}" for word, limit in limits if math.isfinite(limit)]
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: wanted a finite number {' and '.join(wanted)}")
        return value
    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def path(text):
    """An argument's path; a shell expands ~ only where it begins a word."""
    return os.path.expanduser(text)


def absolute(text):
    """An argument's path, for a checkpoint, which is read from any folder."""
    return os.path.abspath(path(text))


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and every default but None and False."""

    def _get_help_string(self, action):
        uninformative = action.default is None or action.default is False
        return action.help if uninformative else super()._get_help_string(action)


DATA_HELP = f"a folder of images, or one of {', '.join(imagesets.SETS)}"


def parser(doc, encoders, training=True, **defaults):
    """An argparse parser with the flags that every script shares; `defaults` are the script's own.

    encoders: names for --arch; training: whether to add the flags of a training run.
    """
    p = argparse.ArgumentParser(usage="%(prog)s [options]",  # all 30 flags would hide an error
                                description=doc, formatter_class=Help)
    data, run = p.add_argument_group("data"), p.add_argument_group("run")
    data.add_argument("--data", type=path, help=DATA_HELP)
    add_data_flags(data)
    data.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    run.add_argument("--size", type=number(int, 16, 1024), help="side of a view in pixels")
    run.add_argument("--arch", choices=encoders, help="encoder; resnet10 is for CPUs")
    if training:
        run.add_argument("--epochs", type=number(int, 1), help="passes over the training images")
        run.add_argument("--batch", type=number(int, 2),
                         help="images a step, of all processes together")
        run.add_argument("--lr", type=number(float, above=0), help="peak learning rate")
        run.add_argument("--eval-every", type=number(int, 1), default=5,
                         help="epochs between evaluations on val")
        run.add_argument("--init", metavar="FILE", type=absolute,
                         help="start from these weights: torchvision's, of ImageNet, or those of a "
                              "checkpoint, for the same --arch")
    run.add_argument("--seed", type=number(int, 0, 2 ** 31), help="of everything random")
    run.add_argument("--out", type=path, help="folder for what is written")
    if training:
        run.add_argument("--resume", action="store_true",
                         help="continue the run in --out; with more --epochs, lengthen it")
    run.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                     help="auto is bf16 where the hardware has it")
    if training:
        run.add_argument("--impl", choices=("auto", "cuda", "torch", "emulated"), default="auto",
                         help="kernels: CUDA, PyTorch, or the CUDA source run on the CPU; auto is "
                              "CUDA on a GPU, else PyTorch")
        run.add_argument("--sync-bn", action="store_true",
                         help="under torchrun: SyncBatchNorm, statistics over all processes")
    p.set_defaults(**defaults)
    return p


DATA_FLAGS = ("labels", "bbox", "fit", "subset", "classes")  # what of a set; None: all, as it is


def add_data_flags(p):
    """The flags that `load_data_for` reads, but for --data and --skip-bad."""
    p.add_argument("--root", type=path,
                   help="where named sets lie (default: $FGSSL_DATA, or ./data)")
    p.add_argument("--labels", metavar="LEVEL",
                   help="which labels, of a set with several kinds: coarse, family, ...; or a "
                        "column of metadata.csv")
    p.add_argument("--bbox", action=argparse.BooleanOptionalAction, default=None,
                   help="crop images to their boxes")
    p.add_argument("--fit", choices=FITS,
                   help="how an image without a box becomes a square: cut to the centre, or padded "
                        f"(default: {FITS[0]})")
    p.add_argument("--subset", type=number(float, above=0, high=1), metavar="FRACTION",
                   help="for trials: this fraction of the images of each class and split")
    p.add_argument("--classes", type=number(int, 1), metavar="N",
                   help="for trials: N of the classes; always the same")
    p.add_argument("--workers", type=number(int, 1), help="decoding threads (default: one a core)")


def accept_old_flag(p, old, new, values=None):
    """Let the flag `old` stand for the parser's `new`, with one line of notice.

    values: {old value: new value}, None where the old one needs no flag any more.
    """
    action, notices = p._option_string_actions[new], set()   # a command line is parsed repeatedly

    class Renamed(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            value = values[value] if values else value
            if value is not None:
                setattr(namespace, action.dest, value)
                if value not in notices:
                    print(f"{old} is now {new} {value}", file=sys.stderr)
                notices.add(value)

    p.add_argument(old, action=Renamed, type=action.type, choices=values, help=argparse.SUPPRESS,
                   default=argparse.SUPPRESS)


def parse(p, argv):
    """Parse; under --resume, take the arguments of the run in --out.

    An existing run is refused without --resume. Errors end the script, with usage.
    """
    args = p.parse_args(argv)
    file, ranks = Path(args.out) / "checkpoint.pt", parallel.ranks()
    if args.resume:
        args = resumed(p, argv, args, file)
    elif file.exists():
        p.error(f"{args.out} holds a run: --resume continues it, --out FOLDER starts another")
    if args.batch % ranks:
        p.error(f"--batch {args.batch} does not divide among {ranks} processes: the run wants a "
                "number of them that divides it, or another --batch")
    return args


def invalid_arguments(p, saved):
    """The arguments saved in a checkpoint that the parser rejects, as flags with their values."""
    for action in p._actions:
        value = saved.get(action.dest)
        if value is None or action.nargs:
            continue
        if isinstance(action.default, bool) or action.dest == "bbox":
            fits = isinstance(value, bool)
        else:
            try:
                fits = (action.type or str)(str(value)) == value
            except (ValueError, argparse.ArgumentTypeError):
                fits = False
            fits = fits and (action.choices is None or value in action.choices)
        if not fits:
            yield f"{action.option_strings[0]} {value!r}"


MAY_CHANGE = ("out", "resume", "root", "workers", "impl", "sync_bn")  # in a resumed run; and data


def resumed(p, argv, args, file):
    """The arguments of the run that `file` is a checkpoint of; what argv gives must repeat them,
    but for those that may change, and --epochs, which may grow."""
    if not file.exists():
        p.error(f"there is no {file} to resume: leave out --resume, or name the run with --out")
    try:
        checkpoint = read_checkpoint(file)
        saved = checkpoint.get("args")
    except ValueError as error:
        p.error(f"cannot resume: {error}")
    if not isinstance(saved, dict):
        p.error(f"cannot resume: {file} is no checkpoint of a trainer")
    if wrong := [*invalid_arguments(p, saved)]:
        p.error(f"cannot resume: {file} has {', '.join(wrong)}")
    named = argparse.Namespace(**{**saved, "out": args.out})  # the folder may have moved since
    args = p.parse_args(argv, named)  # argparse keeps what is there and not given
    for name, value in vars(args).items():
        had = saved.get(name, p.get_default(name))           # an old checkpoint may lack the flag
        longer = name == "epochs" and value > had
        moved = name == "data" and "data" in checkpoint      # Run.start compares the images
        if name not in MAY_CHANGE and had != value and not longer and not moved:
            p.error(f"the run in {args.out} has --{name.replace('_', '-')} {had}, not {value}: "
                    "a resumed run keeps its arguments" + ", or gets more epochs"
                    * (name == "epochs"))
    if args.epochs > saved["epochs"]:
        print(f"epochs raised from {saved['epochs']} to {args.epochs}: the learning rate now "
              "follows the longer schedule, and may jump up")
    return args
