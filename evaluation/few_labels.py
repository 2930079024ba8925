"""Few labels: probes and fine-tuned networks that learn from k images a class.

A cell is one method, number of shots and draw; its results are one entry of eval.json's few_labels.
"""

import copy

import numpy as np
import torch
from torch import nn

import fgssl
from evaluation.classifier import Classifier, Memory, predict_scores, save_classifier
from evaluation.finetune import exit_interrupted, finetune, recipe
from evaluation.probe import SPLITS, choose_linear, extract_features, mean_and_std
from evaluation.report import class_report, write_confusion
from evaluation.results import Extras

# What is written of the cell that is fine-tuned on all labels.
FINETUNED = "finetuned.pt", "confusion-finetuned.csv", "confusion-finetuned.png"


def draw_shots(labels, k, draw):
    """Indices of k images of each class, or of all that a smaller one has; k "all": every image.

    Draw 0, 1, ... is the same for every encoder and seed, so that their results are paired, and a
    larger k holds the images of a smaller one.
    """
    rng = np.random.default_rng(draw)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.sort(np.concatenate([rows[:None if k == "all" else k] for rows in members]))


def finished_cells(before, args):
    """The cells of an earlier result that this run need not repeat; those of another recipe that
    are asked for again are left out, with a line that says so."""
    cells = before.get("few_labels", [])
    kept = [cell for cell in cells if not args.finetune or cell["shots"] not in args.shots
            or cell["recipe"] in (None, recipe(args, cell["images"]))]
    if len(kept) < len(cells):
        print(f"{len(cells) - len(kept)} fine-tuned results of another recipe will be replaced")
    return kept


def save_finetuned(file, model, frozen, args, files, accuracy):
    """A finetuned.pt, with the features that its own encoder gives the labelled images."""
    h = [extract_features(model.layers, split.images, frozen.inference, what)
         for split, what in zip(frozen.splits, SPLITS)]
    memory = Memory(h, model.head.cpu()(h[2]).detach(), torch.from_numpy(frozen.splits[2].labels))
    save_classifier(file, model, args, frozen.names, memory, files=files, accuracy=accuracy)


def run_cells(frozen, args, out, done=(), extras=None, files=()):
    """Yield the results of each cell, a dict, that is not in `done`; then print them and write its
    files, also of a cell in `done` if one is missing. files: the names of the labelled images,
    which a finetuned.pt tells.

    A cell learns from k labels a class of train and chooses the probe's l2 on at most k a class of
    val: whoever has five labels a class has no hundreds to choose with. Features are standardised
    over all of train, which takes no labels. A cell's "val" is of all of val, for choosing a
    recipe; its "test" is for the report. "all" has one draw.
    """
    extras = extras or Extras()
    images = {k: len(draw_shots(frozen.splits[0].labels, k, 0)) for k in args.shots}
    methods = ("frozen", "fine-tuned") if args.finetune else ("frozen",)
    todo = [{"method": method, "shots": k, "draw": draw,
             "recipe": None if method == "frozen" else recipe(args, images[k])}
            for method in methods for k in args.shots
            for draw in range(1 if k == "all" else args.draws)]
    known = [{key: cell[key] for key in ("method", "shots", "draw", "recipe")} for cell in done]
    n_val, n_test = (len(split.labels) for split in frozen.splits[1:])
    counts = np.bincount(frozen.splits[0].labels, minlength=len(frozen.names))
    for k in args.shots:
        fewer = [] if k == "all" else [frozen.names[i] for i in np.flatnonzero(counts < k)]
        if fewer:
            print(f"shots {k}: all images of the {len(fewer)} classes that have fewer, such as "
                  f"{fewer[0]}")
    stop = fgssl.StopSignal() if todo else None
    for i, cell in enumerate(todo, 1):
        tuned, there = cell["method"] == "fine-tuned", cell in known
        if there and not (tuned and cell["shots"] == "all"
                          and any(not (out / name).exists() for name in FINETUNED)):
            continue
        if stop:
            exit_interrupted(stop)
        title = f"{cell['method']}, shots {cell['shots']}, draw {cell['draw']}"
        found, model, confusion = run_cell(frozen, args, out, cell, title, stop)
        cell |= found
        if not there:
            yield cell                                       # on file before it is printed
        print(f"[{i}/{len(todo)}] {title}: {cell['images']} images, val {cell['val']:.1f} % of "
              f"{n_val}, test {cell['test']:.1f} % of {n_test}", flush=True)
        if tuned and cell["shots"] == "all":
            with extras.write("finetuned.pt"):
                save_finetuned(out / "finetuned.pt", model, frozen, args, files, found["test"])
            with extras.write("confusion-finetuned.png"):
                write_confusion(out, "confusion-finetuned", confusion, frozen.names)
        if tuned and "finetuned.pt" not in extras.failed:
            (out / "finetuning.pt").unlink(missing_ok=True)


def run_cell(frozen, args, out, cell, title, stop):
    """The results of one cell, its Classifier where it was fine-tuned, and the confusion matrix."""
    (train, val, test), names, inference = frozen.splits, frozen.names, frozen.inference
    h, h_val, h_test = frozen.h[frozen.layer]
    labels, labels_val, labels_test = (torch.from_numpy(split.labels) for split in frozen.splits)
    rows, few = (draw_shots(split.labels, cell["shots"], cell["draw"]) for split in (train, val))
    found, model = {"images": len(rows)}, None
    if cell["method"] == "frozen" or args.head == "probe":
        _, head, found["l2"] = choose_linear(h[rows], labels[rows], h_val[few], labels_val[few],
                                             len(names), mean_and_std(h))
    else:
        head = nn.Linear(h.shape[1], len(names))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    if cell["method"] == "frozen":
        scores_val, scores = head(h_val), head(h_test)
    else:
        model = Classifier(copy.deepcopy(frozen.encoder), head, frozen.layer)
        if cell["shots"] != "all":
            train = fgssl.Split(train.images[rows], train.labels[rows])
        finetune(model, train, args, inference, title, out / "finetuning.pt", stop)
        scores_val, scores = (predict_scores(model, split.images, inference, what)
                              for split, what in ((val, "val"), (test, "test")))
    report, confusion = class_report(scores, labels_test, names)
    if (cell["method"], cell["shots"]) == ("fine-tuned", "all"):
        found["report"] = report
    found |= {"val": fgssl.accuracy(scores_val.argmax(1), labels_val), "test": report["top1"],
              "mean_per_class": report["mean_per_class"]}
    return found, model, confusion
