"""A tiny study, for the tests of what evaluates: three shades, an untrained encoder, 24 pixels."""

import csv

import fgssl
import linear_eval
from evaluation import probe

NAMES = ["ash", "elm", "oak"]
INFERENCE = probe.Inference(24, *fgssl.device_and_precision("fp32"))
PLAIN = ["--init", "random", "--size", "24", "--precision", "fp32"]
TINY = [*PLAIN, "--batch", "8", "--steps", "6"]


def arguments(*more):
    """Those of a tiny fine-tuning, as `study` fills them in."""
    args = linear_eval.arguments([*TINY, "--finetune", *more])
    args.seed, args.arch = 0, "resnet10"
    args.stages = 4 if args.stages is None else args.stages
    return args


def table(file):
    """The rows of a CSV as dicts."""
    with open(file, encoding="utf-8-sig", newline="") as rows:
        return list(csv.DictReader(rows))
