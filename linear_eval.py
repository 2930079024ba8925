"""How good are the features? Everything one asks of an encoder that learned without labels.

The encoder stays as pretraining left it. Its features h of the labelled images train a logistic
regression ("linear"), vote as neighbours ("k-NN") and rank the test images by likeness ("rank-1",
"mAP"). Whatever is chosen is chosen on val; test is looked at once, at the end. Beside the result
stand the controls without which it means nothing: the majority class, and the network untrained.

    python linear_eval.py out/simclr/checkpoint.pt
    python linear_eval.py out/jigsaw/checkpoint.pt --layer best                   # earlier stages
    python linear_eval.py out/srgan/checkpoint.pt --layer best --encoder generator
    python linear_eval.py out/simclr/checkpoint.pt --shots 1 5 10 all             # few labels
    python linear_eval.py out/simclr/checkpoint.pt --shots 1 5 10 all --finetune  # and fine-tuned
    python linear_eval.py --init random --data toy --finetune              # supervised from scratch
    python linear_eval.py --compare out/simclr/eval.json out/random/eval.json
    python linear_eval.py out/simclr/probe.pt --predict bird.jpg
    python linear_eval.py out/simclr/checkpoint.pt --export encoder.pt     # torchvision's names
    python linear_eval.py resnet50.pth --arch resnet50 --size 224 --data cub --out out/resnet50

What is not given (data, size, seed) is as in the run that made the checkpoint; without a run, the
toy set at 64 pixels. Prints one table; writes eval.json, probe.pt and pictures beside the
checkpoint, or into --out.
"""

import copy
import csv
import hashlib
import json
import math
import os
import sys
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fgssl
import pictures
from methods import srgan
from imagesets.progress import format_time, progress

L2 = tuple(10.0 ** (k / 2) for k in range(0, -11, -1))  # regularisation tried, from strong to weak
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
SPLITS = ("train", "val", "test")
LAYERS = ("4", "4:2x2", "3", "3:2x2", "2", "2:2x2", "1", "1:2x2")
LOOKS = 20  # times that fine-tuning looks at val
COLUMNS = {"linear": "linear", "knn": "k-NN", "rank1": "rank-1", "rank5": "rank-5", "map": "mAP"}
GREEN, RED = (0.2, 0.65, 0.3), (0.85, 0.15, 0.2)
# `how`, below, is always (size, device, autocast): how images are shown to a network.


# Features: an encoder read at a layer -------------------------------------------------------------


class Layers(nn.Module):
    """An encoder read at several layers: (B, 3, H, W) -> their features side by side.

    Layer "3" is the map of the third stage, averaged over all places; "3:2x2" its averages over the
    four quarters of the image, one after the other. "4" is h, what the encoder itself returns.
    """

    def __init__(self, encoder, names):
        super().__init__()
        self.encoder, self.names, self.dims = encoder, names, []
        self.eval()

    def forward(self, x):
        maps = self.encoder.stages(x)
        h = [pooled(maps[stage(name)], name) for name in self.names]
        self.dims = [each.shape[1] for each in h]
        return torch.cat(h, 1)


def stage(layer):
    """Where a layer's map stands among those of encoder.stages."""
    return int(layer[0]) - 1


def pooled(maps, layer):
    """(B, C, h, w) -> (B, C), or (B, 4 C) for a layer read in quarters; float32."""
    return F.adaptive_avg_pool2d(maps.float(), 2 if ":" in layer else 1).flatten(1)


def features(network, images, how, what):
    """fgssl.features, with a line of progress where they take long."""
    h = (fgssl.features(network, images[i:i + 256], *how) for i in range(0, len(images), 256))
    h = progress(chain.from_iterable(h), len(images), f"features of {what}", patience=5)
    return torch.stack(list(h))


# Probe: a linear classifier and k nearest neighbours ----------------------------------------------


def fit_linear(h, labels, classes, l2, weight=None):
    """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + l2 / 2 |W|^2.

    h (N, D), labels (N,) -> weight (D + 1, classes); its last row is the bias, not penalised.
    weight: where to start, such as the solution for another l2. The problem is convex: the start
    changes the time it takes, not the result.
    """
    h = F.pad(h, (0, 1), value=1.0)
    weight = torch.zeros(h.shape[1], classes) if weight is None else weight.clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight, labels) + l2 / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def choose_linear(h, labels, h_val, labels_val, classes, scale, what="the probe"):
    """Fit for every strength in L2, each from the last, and take the best on val.

    scale: mean and deviation, (D,) each, by which features are standardised: L2 counts on that
    scale. Returns the accuracy on val, the nn.Linear over h itself that scores as the fit does over
    h standardised, and l2. Where two strengths do equally well, the stronger.
    """
    mean, std = scale
    x, x_val = (h - mean) / std, (h_val - mean) / std
    best, weight = (-1.0,), None
    for l2 in progress(L2, len(L2), f"fitting {what}", patience=5):
        weight = fit_linear(x, labels, classes, l2, weight)
        score = fgssl.accuracy((x_val @ weight[:-1] + weight[-1]).argmax(1), labels_val)
        if score > best[0]:
            best = score, weight, l2
    score, weight, l2 = best
    head = nn.Linear(len(mean), classes).requires_grad_(False)
    head.weight.copy_((weight[:-1] / std[:, None]).T)
    head.bias.copy_(weight[-1] - head.weight @ mean)
    return score, head, l2


def scale_of(h):
    """Mean and deviation of each feature, as choose_linear takes them."""
    return h.mean(0), h.std(0).clamp(min=1e-6)


def choose_neighbours(h, labels, h_val, labels_val, classes):
    """(accuracy on val, k) of the best k in NEIGHBOURS, of those that the training set has."""
    scores = {k: fgssl.accuracy(fgssl.knn(h, labels, h_val, k, classes), labels_val)
              for k in NEIGHBOURS if k <= len(h)}
    k = max(scores, key=scores.get)
    return scores[k], k


class Frozen(NamedTuple):
    """A frozen encoder, its features of some images, and the linear probe that did best on val."""
    encoder: nn.Module
    splits: tuple    # train, val and test
    names: list      # of the classes
    how: tuple       # size, device and autocast
    h: dict          # {layer: features of train, val and test, (N, D) each}
    layer: str       # the one that the probe reads
    head: nn.Linear  # the probe: features of that layer -> scores


def evaluate(encoder, splits, names, how, layer="4"):
    """Probe one frozen encoder: choices on val, then test, once and whole.

    splits: train, val and test. layer: one of LAYERS, or "best": the linear classifier and k-NN
    each read the layer that does best on val. Returns percentages and choices, and the Frozen.
    Raises ValueError for features that are not finite.
    """
    encoder.to(how[1], memory_format=torch.channels_last)
    layers = Layers(encoder, LAYERS if layer == "best" else (layer,))
    read = [features(layers, split.images, how, what).split(layers.dims, 1)
            for what, split in zip(SPLITS, splits)]
    if not all(part.isfinite().all() for of_split in read for part in of_split):
        raise ValueError("the features hold NaN or infinity: the checkpoint is of a run that "
                         "diverged, or --precision bf16 is too coarse for it")
    h = dict(zip(layers.names, zip(*read)))
    labels, labels_val, labels_test = (torch.from_numpy(split.labels) for split in splits)
    knn, linear = {}, {}
    for name, (train, val, _) in h.items():
        data = train, labels, val, labels_val, len(names)
        knn[name] = choose_neighbours(*data)
        linear[name] = choose_linear(*data, scale_of(train), f"the probe of layer {name}")
    knn_layer, linear_layer = (max(found, key=lambda name: found[name][0])
                               for found in (knn, linear))   # of equals, the last stage
    (val_knn, k), (val_linear, head, l2) = knn[knn_layer], linear[linear_layer]

    train, _, test = h[knn_layer]
    detail, _ = report(head(h[linear_layer][2]), labels_test, names)
    return {"linear": detail["top1"],
            "knn": fgssl.accuracy(fgssl.knn(train, labels, test, k, len(names)), labels_test),
            **{name: detail[name] for name in ("top5", "mean_per_class", "macro_f1")},
            **retrieval(test, labels_test, len(names)), "val_linear": val_linear,
            "val_knn": val_knn, "linear_layer": linear_layer, "l2": l2, "knn_layer": knn_layer,
            "k": k}, Frozen(encoder, splits, names, how, h, linear_layer, head)


# Retrieval: each test image against all others ----------------------------------------------------


def retrieval(h, labels, classes):
    """Each of N images looks for its class among the N - 1 others, by cosine: percentages.

    rank1, rank5: of the queries, those with their class among the first 1 or 5; map: the mean
    average precision over the full ranking, as in Shu et al., CVPR 2023. A query whose class has no
    other image can find nothing and is left out. unseen_rank1: among the second half of the classes
    alone, as in metric learning, where the first half is for training; here neither trains
    anything. None where there is no query.
    """
    def percent(values):
        return 100 * values.double().mean().item() if len(values) else None

    later = labels >= classes // 2
    first, precision = ranking(h, labels)
    first_later, _ = ranking(h[later], labels[later])
    return {"rank1": percent(first == 1), "rank5": percent(first <= 5), "map": percent(precision),
            "queries": len(first), "unseen_rank1": percent(first_later == 1)}


def ranking(h, labels, chunk=512):
    """Leave-one-out retrieval: (N, D), (N,) -> of each query that has a class mate, the rank of the
    first it finds, and its average precision. `chunk` queries are ranked at a time."""
    h, place, first, precision = F.normalize(h, dim=1), torch.arange(len(h))[1:], [], []
    queries = torch.arange(len(h)).split(chunk)
    for query in progress(queries, len(queries), "ranking", patience=5):
        sim = h[query] @ h.T
        sim[torch.arange(len(query)), query] = -torch.inf    # a query does not find itself
        order = sim.argsort(1, descending=True)[:, :-1]
        hit = labels[order] == labels[query, None]           # (queries, N - 1), nearest first
        hit = hit[hit.any(1)]
        found = hit.cumsum(1)
        first.append(1 + (found == 0).sum(1))
        precision.append((found / place * hit).sum(1) / hit.sum(1))
    return torch.cat(first), torch.cat(precision)


# Fine-tuning: the encoder and a linear head learn together ----------------------------------------


class Classifier(nn.Module):
    """An encoder read at a layer, and a head: (B, 3, H, W), normalised -> scores (B, classes)."""

    def __init__(self, encoder, head, layer="4"):
        super().__init__()
        self.layers, self.head = Layers(encoder, (layer,)), head

    def forward(self, x):
        return self.head(self.layers(x))


def parameter_groups(model, stages, decay):
    """What of a Classifier learns, grouped for the optimizer; the rest is frozen.

    stages: how many stages learn, counted from the one that the head reads; 4 is all, the stem too.
    decay: the head learns at the full rate, that stage at `decay` times it, the one before at
    decay^2, ...
    """
    groups, last = {}, 1 + stage(model.layers.names[0])
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            depth, learns = 0, True
        else:                                                # layers.encoder.layer3.0.conv1.weight
            part = name.split(".")[2]
            depth = last + 1 - (int(part[-1]) if part.startswith("layer") else 0)
            learns = 1 <= depth <= (stages if stages < 4 else 5)
        parameter.requires_grad_(learns)
        if learns:
            groups.setdefault(depth, []).append(parameter)
    return [{"params": group, "scale": decay ** depth} for depth, group in groups.items()]


def learning_mode(model, batch_norm):
    """Train mode, but for the batch-norms of frozen stages, and for all if batch_norm is "kept":
    they normalise by the statistics that they came with, and leave these as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(batch_norm == "batch" and module.weight.requires_grad)


def class_weights(labels, classes):
    """(classes,): inverse to how often a class occurs, with mean 1 over those that do."""
    counts = torch.from_numpy(np.bincount(labels, minlength=classes)).float()
    weight = torch.where(counts > 0, 1 / counts, 0)
    return weight / weight[counts > 0].mean()


def training_view(x, args, rng):
    """A random crop, mirrored or not: uint8 (B, 3, C, C) -> normalised (B, 3, size, size)."""
    x = fgssl.random_resized_crop(x, args.size, rng, scale=(args.min_crop, 1.0))
    return fgssl.normalize(fgssl.hflip(x, rng))


def finetune(model, train, val, args, how, title, file, stop):
    """Train a Classifier on the Split `train`; leaves it as it was when it did best on `val`.

    The length is counted in steps, so that one label a class gets the time that all get. AdamW,
    warm-up, cosine. Val is looked at LOOKS times; of equals the last look is kept. The run is saved
    in `file` every minute, and when `stop` asks; found there, it goes on to the same end as if
    never stopped. It stays there until its results are written. Returns the step of the best look.
    """
    _, device, autocast = how
    total, batch = args.steps, min(args.batch, len(train.labels))
    what = {"title": title, "recipe": recipe(args), "weights": digest_weights(model),
            "data": digest(train.images, train.labels, val.images, val.labels)}
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.stages, args.layer_decay),
                                  weight_decay=1e-4)
    weight = None
    if args.class_weights:
        weight = class_weights(train.labels, model.head.out_features).to(device)
    rng, step, best = torch.Generator().manual_seed(args.seed), 0, {"val": -1.0, "step": 0}
    state = dict(model=model, best=copy.deepcopy(model), optimizer=optimizer)
    if file.exists() and (saved := fgssl.read_checkpoint(file)["args"])["what"] == what:
        step, best = fgssl.load(file, rng, **state), saved["best"]

    looks = {round(total * i / LOOKS) for i in range(1, LOOKS + 1)}
    order = fgssl.batches(len(train.labels), batch, args.seed, step)
    begun, start = step, time.time()
    saved = shown = start
    while step < total:
        step += 1
        lr = fgssl.cosine_lr(step, total, total // 10, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        index = next(order)
        x = fgssl.map_chunks(training_view, fgssl.fetch(train.images, index, device), args, rng)
        learning_mode(model, args.batch_norm)
        with autocast:
            scores = model(x.contiguous(memory_format=torch.channels_last))
        label = torch.from_numpy(train.labels[index]).to(device)
        loss = F.cross_entropy(scores.float(), label, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        leave = bool(stop)
        save, show = leave or time.time() - saved > 60, time.time() - shown > 10
        if (save or show or step in looks) and not math.isfinite(loss.item()):
            raise FloatingPointError(f"{title}: loss {loss.item()} at step {step}, learning rate "
                                     f"{lr:.1e}. Try a smaller --lr.")
        if step in looks:
            scores = features(model, val.images, how, "val")
            score = fgssl.accuracy(scores.argmax(1), torch.from_numpy(val.labels))
            if score >= best["val"]:
                best = {"val": score, "step": step}
                state["best"].load_state_dict(model.state_dict())
        if show:
            shown, rate = time.time(), (step - begun) / (time.time() - start)
            val_yet = f"best val {best['val']:.1f}  " if best["step"] else ""
            print(f"{title}: step {step}/{total}  loss {loss.item():.3f}  {val_yet}"
                  f"{rate * batch:.0f} img/s  eta {format_time((total - step) / rate)}",
                  flush=True)
        if save:
            fgssl.save(file, step, Namespace(what=what, best=best), rng, **state)
            saved = time.time()
        if leave:
            leave_by(stop)
    model.load_state_dict(state["best"].state_dict())
    return best["step"]


def leave_by(stop):
    """End the script as a StopSignal asks."""
    print("saved; the same command goes on from here")
    raise SystemExit(128 + stop.signal)


# Few labels ---------------------------------------------------------------------------------------


def draw_shots(labels, k, draw):
    """Indices of k images of each class, or of all that a smaller one has; k "all": every image.

    Draw 0, 1, ... is the same for every encoder and seed, so that their results are paired, and a
    larger k holds the images of a smaller one.
    """
    rng = np.random.default_rng(draw)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.sort(np.concatenate([rows[:None if k == "all" else k] for rows in members]))


def recipe(args):
    """The arguments on which a fine-tuned result depends."""
    names = ("head", "steps", "lr", "batch", "stages", "layer_decay", "batch_norm", "min_crop",
             "class_weights", "seed")
    return {name: getattr(args, name) for name in names}


def few_labels(frozen, args, out, done=()):
    """Yield one cell, a dict, for each method, number of shots, and draw that is not in `done`.

    A cell learns from k labels a class of train and chooses (the probe's strength, the step of
    fine-tuning) on at most k a class of val: whoever has five labels has no hundreds to tune with.
    Features are standardised over all of train, which takes no labels. A cell's "val" is of the
    whole of val, for choosing a recipe; its "test" is for the report. With "all" there is one draw.
    """
    methods = {"frozen": None} | ({"fine-tuned": recipe(args)} if args.finetune else {})
    todo = [{"method": method, "shots": k, "draw": draw, "recipe": how}
            for method, how in methods.items() for k in args.shots
            for draw in range(1 if k == "all" else args.draws)]
    known = [{key: cell[key] for key in ("method", "shots", "draw", "recipe")} for cell in done]
    counts = np.bincount(frozen.splits[0].labels, minlength=len(frozen.names))
    for k in args.shots:
        fewer = [] if k == "all" else [frozen.names[i] for i in np.flatnonzero(counts < k)]
        if fewer:
            print(f"shots {k}: of {len(fewer)} classes with fewer images, such as {fewer[0]}, all")
    stop = fgssl.StopSignal() if todo else None
    for i, cell in enumerate(todo, 1):
        if cell in known:
            continue
        if stop:
            leave_by(stop)
        title = f"{cell['method']}, shots {cell['shots']}, draw {cell['draw']}"
        cell |= few_label_cell(frozen, args, out, cell, title, stop)
        print(f"[{i}/{len(todo)}] {title}: {cell['images']} images, val {cell['val']:.1f}, "
              f"test {cell['test']:.1f}", flush=True)
        yield cell
        if cell["method"] == "fine-tuned":
            (out / "finetuning.pt").unlink(missing_ok=True)


def few_label_cell(frozen, args, out, cell, title, stop):
    """The results of one cell of few_labels; of fine-tuning on all labels, its files too."""
    (train, val, test), names, how = frozen.splits, frozen.names, frozen.how
    h, h_val, h_test = frozen.h[frozen.layer]
    labels, labels_val, labels_test = (torch.from_numpy(split.labels) for split in frozen.splits)
    rows, few = (draw_shots(split.labels, cell["shots"], cell["draw"]) for split in (train, val))
    found = {"images": len(rows)}
    if cell["method"] == "frozen" or args.head == "probe":
        _, head, found["l2"] = choose_linear(h[rows], labels[rows], h_val[few], labels_val[few],
                                             len(names), scale_of(h))
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
        choose = fgssl.Split(val.images[few], val.labels[few])
        found["step"] = finetune(model, train, choose, args, how, title, out / "finetuning.pt",
                                 stop)
        scores_val, scores = (features(model, split.images, how, what)
                              for split, what in ((val, "val"), (test, "test")))
    detail, confusion = report(scores, labels_test, names)
    if (cell["method"], cell["shots"]) == ("fine-tuned", "all"):
        found["report"] = detail
        write_confusion(out, "confusion-finetuned", confusion, names)
        save_classifier(out / "finetuned.pt", model, args, names)
    return found | {"val": fgssl.accuracy(scores_val.argmax(1), labels_val), "test": detail["top1"],
                    "mean_per_class": detail["mean_per_class"]}


# Report: what is taken for what -------------------------------------------------------------------


def confusion_matrix(labels, predicted, classes):
    """Counts (classes, classes): row = the true class, column = what it was taken for."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes ** 2)
    return pairs.reshape(classes, classes)


def per_class(confusion):
    """Precision, recall and F1 of each class, in percent. NaN, not 0, where there is nothing to
    count: no image was taken for the class (precision), or none is of it (recall, F1)."""
    right, true, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = right / said, right / true, 2 * right / (true + said)
    return 100 * precision, 100 * recall, 100 * np.where(true > 0, f1, np.nan)


def report(scores, labels, names):
    """Scores (N, classes) and labels (N,): a dict for eval.json, and the confusion matrix.

    Means over classes leave out those without a test image. "worst": the ten of least recall, each
    with what its images are most often taken for.
    """
    confusion = confusion_matrix(labels.numpy(), scores.argmax(1).numpy(), len(names))
    columns = [[None if math.isnan(value) else value for value in column.tolist()]
               for column in per_class(confusion)]
    classes = [dict(zip(("class", "images", "precision", "recall", "f1"), row))
               for row in zip(names, confusion.sum(1).tolist(), *columns)]
    for row, mistakes in zip(classes, confusion - np.diag(np.diag(confusion))):
        if mistakes.any():
            row |= {"taken_for": names[mistakes.argmax()], "times": int(mistakes.max())}
    seen = [row for row in classes if row["images"]]
    five = scores.topk(min(5, len(names))).indices == labels[:, None]
    return {"top1": 100 * float(np.trace(confusion)) / len(labels),
            "top5": 100 * five.any(1).double().mean().item(),
            "mean_per_class": float(np.mean([row["recall"] for row in seen])),
            "macro_f1": float(np.mean([row["f1"] for row in seen])),
            "worst": sorted(seen, key=lambda row: row["recall"])[:10],
            "classes": classes}, confusion


def write_confusion(out, name, confusion, names):
    """name.csv, counts, and name.png, shares of each row."""
    with open(out / f"{name}.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["true class / taken for", *names])
        rows.writerows([name, *row] for name, row in zip(names, confusion.tolist()))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    pictures.heatmap(out / f"{name}.png", share, "true class", "taken for", names)


# Pictures -----------------------------------------------------------------------------------------


def evenly(n, count):
    """About `count` of the numbers below n, evenly apart: nobody picked them."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int)


def retrieval_sheet(file, h, split, names, count=8):
    """A picture: test images, and the five nearest others of each by cosine, in a green frame where
    the class is the same and in a broken red one where it is not."""
    h, rows, titles = F.normalize(h, dim=1), [], []
    place = torch.arange(split.images.shape[-1])
    width = len(place) // 14
    frame = torch.ones(len(place), len(place), dtype=torch.bool)
    frame[width:-width, width:-width] = False
    broken = frame & ((place + place[:, None]) // width % 3 > 0)
    for query in evenly(len(h), count):
        sim = h @ h[query]
        sim[query] = -torch.inf
        near = [query, *sim.topk(min(5, len(h) - 1)).indices.tolist()]
        x = fgssl.to_float(torch.from_numpy(split.images[near]))
        for image, right in zip(x[1:], split.labels[near[1:]] == split.labels[query]):
            image[:, frame if right else broken] = torch.tensor(GREEN if right else RED)[:, None]
        rows.append(x)
        titles.append(names[split.labels[query]][:28])
    pictures.grid(file, rows, titles, side=112)


def feature_map(file, h, labels, names, most=3000, coloured=14):
    """A picture: test features, of unit length, on their first two principal components.

    At most `most` images and, in colour, `coloured` classes, evenly taken.
    """
    chosen = evenly(len(h), most)
    x, labels = F.normalize(h[chosen], dim=1), labels[chosen]
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    u, s = F.pad(u, (0, 2)), F.pad(s, (0, 2))                # two components, whatever there is
    xy, share = (u * s)[:, :2].numpy(), 100 * s.square() / s.square().sum().clamp(min=1e-12)
    present = np.unique(labels)
    shown = present[evenly(len(present), coloured)]
    groups = {names[label]: xy[labels == label].T for label in shown}
    titles = (f"component {i}, {v:.0f} % of the variance" for i, v in enumerate(share[:2], 1))
    pictures.scatter(groups, *titles, rest=xy[~np.isin(labels, shown)].T).save(file)


def grad_cam(maps, score):
    """Where a score comes from: maps (B, C, h, w), score: maps -> (B,), to (B, h, w), at least 0.

    Each channel weighted by the mean over places of d score / d map, summed, negative sums dropped
    (Selvaraju et al. 2017). The maps are what a whole stage returns, its residual additions done.
    """
    maps = maps.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(score(maps).sum(), maps)
    return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).clamp(min=0)


def enlarged(cam, height, width):
    """(B, h, w) -> (B, height, width), the greatest of each map 1; a map of zeros stays zeros."""
    cam = F.interpolate(cam[:, None], (height, width), mode="bilinear")[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(x, cam):
    """Images (B, 3, H, W) in [0, 1], dark and grey where the map (B, h, w) is low: a colour laid
    over them would be lost on an orange."""
    return torch.lerp(0.3 * fgssl.luma(x), x, enlarged(cam, *x.shape[2:])[:, None])


def explain(frozen, images, rng):
    """Grad-CAM of uint8 images (B, 3, C, C) at the layer of the probe.

    Returns the evaluation view and another, random one, (B, 3, size, size) in [0, 1], and two maps
    (B, h, w) over the first: of the score of the class that the probe says; and, which takes no
    labels, of the cosine similarity of the features of the two views.
    """
    (size, device, autocast), layer = frozen.how, frozen.layer
    images = torch.from_numpy(images)
    views = [fgssl.evaluation_view(images, size),
             fgssl.hflip(fgssl.random_resized_crop(images, size, rng, scale=(0.3, 1.0)), rng)]
    with torch.no_grad(), autocast:
        maps, others = (frozen.encoder.stages(fgssl.normalize(x).to(device))[stage(layer)]
                        .float().cpu() for x in views)
    h = pooled(others, layer)
    said = grad_cam(maps, lambda maps: frozen.head(pooled(maps, layer)).amax(1))
    alike = grad_cam(maps, lambda maps: F.cosine_similarity(pooled(maps, layer), h))
    return *views, said, alike


def boxes_in_view(records, rows, size):
    """The boxes of some records as masks of the evaluation view, (N, size, size), bool.

    A box is in pixels of the file. The cache holds one square of the file (fgssl.Source), and the
    view the centre 7/8 of that. A pixel is in the box if its centre is.
    """
    masks, at = [], 1 / 16 + 7 / 8 * (np.arange(size) + 0.5) / size
    for row in rows:
        with Image.open(records.paths[row]) as image:
            width, height = image.size
        source = fgssl.Source(records.paths[row], banner=records.banner)
        x, y, side = source.square(width, height)
        left, top, w, h = records.boxes[row]
        x, y = x + at * side, y + at * side
        masks.append(((top <= y) & (y < top + h))[:, None] & (left <= x) & (x < left + w))
    return np.stack(masks)


def outline(mask):
    """The outermost pixels of masks (B, 1, H, W); one that is cut off is closed at the rim."""
    outside = F.pad(1 - mask, (1, 1, 1, 1), value=1.0)
    return mask * F.max_pool2d(outside, 3, 1) > 0


def energy_inside(cam, masks):
    """Percent of the sum of each map (N, h, w) that lies inside its mask (N, H, W): (N,); NaN for a
    map of zeros, which has none to share."""
    cam = enlarged(cam, *masks.shape[1:]).numpy()
    with np.errstate(invalid="ignore"):
        return 100 * (cam * masks).sum((1, 2)) / cam.sum((1, 2))


def grad_cam_study(file, frozen, records, count=8, most=512):
    """Draw Grad-CAM for `count` test images; where the set has boxes, measure up to `most`.

    Returns {} without boxes, else mean percentages: of the maps' energy inside the box, for the
    class score and for the similarity of two views, and of the view that the box covers.
    """
    test, (size, *_) = frozen.splits[2], frozen.how
    rng, shown = torch.Generator().manual_seed(0), evenly(len(test.labels), count)
    x, other, said, alike = explain(frozen, test.images[shown], rng)
    rows = [x, overlay(x, said), other, overlay(x, alike)]
    if records.boxes is not None:
        mask = torch.from_numpy(boxes_in_view(records, test.rows[shown], size)).float()[:, None]
        rows[0] = torch.where(outline(mask), torch.tensor((1.0, 1.0, 0.0))[:, None, None], x)
    pictures.grid(file, rows, ("image", "class score", "another view", "similarity"), side=128)
    if records.boxes is None:
        return {}

    def shares(places):
        mask = boxes_in_view(records, test.rows[places], size)
        _, _, *cams = explain(frozen, test.images[places], rng)
        return zip(*(energy_inside(cam, mask) for cam in cams), 100 * mask.mean((1, 2)))

    measured = evenly(len(test.labels), most)
    found = map(shares, np.array_split(measured, math.ceil(len(measured) / 64)))
    found = progress(chain.from_iterable(found), len(measured), "Grad-CAM inside boxes", patience=5)
    finite = [column[np.isfinite(column)] for column in np.array(list(found)).T]
    return {name: float(column.mean()) if len(column) else None for name, column in
            zip(("class_score_in_box", "similarity_in_box", "box_of_view"), finite)}


# Results on file, and of several encoders side by side --------------------------------------------


def digest(*parts):
    """16 hex digits that tell these bytes or arrays from others."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def digest_weights(model):
    return digest(*(name.encode() + tensor.cpu().numpy().tobytes()
                    for name, tensor in sorted(model.state_dict().items())))


def digest_data(data, splits):
    """Of the classes, file names, labels, splits and crops."""
    parts = [json.dumps(data.classes).encode()]
    for split in splits:
        files = ["/".join(data.records.paths[row].parts[-2:]) for row in split.rows]
        parts.append(json.dumps([files, split.labels.tolist()]).encode())
        if data.crops is not None:
            parts.append(data.crops[split.rows].tobytes())
    return digest(*parts)


def read_result(file):
    """The eval.json of an earlier run; ValueError for another file."""
    try:
        result = json.loads(Path(file).read_text())
        if {"digest", "few_labels"} <= result.keys():
            return result
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(f"{file} is no eval.json of this version of the script; make one with "
                     "python linear_eval.py CHECKPOINT --out FOLDER")


def write_result(file, result):
    """Whole or not at all: hours of few-label results may be in it."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(partial, file)


def finished_cells(file, result, args):
    """The few-label cells in the eval.json of an earlier run that this one need not repeat.

    Those of another recipe that are asked for again are left out. Raises ValueError where the cells
    are of other data or weights, which this run would overwrite.
    """
    try:
        before = read_result(file)
    except ValueError:  # none yet, or of an older version, which held no cells
        return []
    cells = before["few_labels"]
    if cells and any(before[key] != result[key] for key in ("digest", "weights", "size", "layer")):
        raise ValueError(f"{file} holds {len(cells)} few-label results of other data, weights, "
                         "size or layer: pass another --out, or remove it.")
    return [cell for cell in cells if not args.finetune or cell["shots"] not in args.shots
            or cell["recipe"] in (None, recipe(args))]


def table(rows):
    """Rows of texts, the first being titles, as a Markdown table."""
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) + " |"
             for row in rows]
    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def text(values):
    """The mean of numbers, ± their deviation where there are several; empty where none is known."""
    values = [value for value in values if value is not None]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}" if values else ""


def compare(files, out):
    """Print the results in several eval.json as one table; draw their few-label curves.

    files: FILE, or NAME=FILE; the files of one name are seeds of one method, and are pooled.
    Deviations are over seeds and, for few labels, draws. ValueError where data, splits or size of
    the images differ.
    """
    runs, first = {}, None                                   # {name: [result, ...]}
    for argument in files:
        parts = argument.split("=")                          # name and folder may hold more of it
        cuts = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(len(parts))]
        name, file = next((cut for cut in cuts if Path(cut[1]).is_file()), cuts[-1])
        result = read_result(file)
        first = first or result
        if any(result[key] != first[key] for key in ("digest", "size")):
            raise ValueError(f"{file} is not of the same data, splits and size as {files[0]} "
                             f"({result['data']} at {result['size']} px, {first['data']} at "
                             f"{first['size']} px): there is nothing to compare.")
        name = name or Path(file).resolve().parent.name
        runs.setdefault(name, []).append(result)

    few, methods, ks = few_label_scores(runs)
    rows = [["test, %", *COLUMNS.values(), *(f"{method} {k}" for method in methods for k in ks)]]
    for name, results in runs.items():
        measured = [result.get("encoder", result["random_init"]) for result in results]
        rows.append([name, *(text([row[column] for row in measured]) for column in COLUMNS),
                     *(text(few.get((method, name, k), [])) for method in methods for k in ks)])
    print(table(rows))
    if few:
        out.mkdir(parents=True, exist_ok=True)
        few_label_curves(runs, first["majority"]).save(out / "compare.png")
        print(f"\nwrote {out}/compare.png")


def few_label_scores(runs):
    """Of {name: [result, ...]} the test accuracies {(method, name, shots): [score, ...]}, the
    methods, and the numbers of shots in order."""
    few = {}
    for name, results in runs.items():
        for cell in (cell for result in results for cell in result["few_labels"]):
            few.setdefault((cell["method"], name, cell["shots"]), []).append(cell["test"])
    return (few, list(dict.fromkeys(method for method, _, _ in few)),
            sorted({k for _, _, k in few}, key=lambda k: math.inf if k == "all" else k))


def few_label_curves(runs, majority):
    """A picture of few_label_scores: a panel a method, a curve a name, bars of one deviation."""
    (few, methods, ks), panels = few_label_scores(runs), []
    for method in methods:
        curves = {}
        for i, name in enumerate(runs):                      # beside each other, not on top
            shift = 0.04 * (i - (len(runs) - 1) / 2)
            points = [(x + shift, few[method, name, k]) for x, k in enumerate(ks)
                      if (method, name, k) in few]
            curves[name] = ([x for x, _ in points], [np.mean(scores) for _, scores in points],
                            [np.std(scores, ddof=1) if len(scores) > 1 else 0
                             for _, scores in points])
        panels.append(pictures.curve(curves, {"majority class": majority}, f"{method}: test "
                                     "accuracy, %, by labels a class", xnames=[*map(str, ks)]))
    return pictures.stack(panels)


# A classifier on file -----------------------------------------------------------------------------


def save_classifier(file, model, args, names):
    """A checkpoint like the trainers', with a head, the layer it reads and its classes' names."""
    args = Namespace(**{**vars(args), "layer": model.layers.names[0], "class_names": list(names)})
    fgssl.save(file, 0, args, torch.Generator(), encoder=model.layers.encoder, head=model.head)


def load_classifier(file):
    """The Classifier in a probe.pt or finetuned.pt, and the arguments of its run."""
    checkpoint = fgssl.read_checkpoint(file)
    if "class_names" not in checkpoint.get("args", {}):
        raise ValueError(f"{file} holds no classifier. Run python linear_eval.py {file}, then "
                         "predict with the probe.pt that it writes.")
    (encoder, run), state = fgssl.load_encoder(file), checkpoint["head"]
    model = Classifier(encoder, nn.Linear(*reversed(state["weight"].shape)), run["layer"])
    fgssl.load_weights(model.head, state, f"head in {file}")
    return model, run


def predict(file, images, precision):
    """Print the five likeliest classes of each image, by the classifier in `file`.

    An image that cannot be read is named on stderr, and the others done; then the exit status is 1.
    """
    (model, run), failed = load_classifier(file), False
    device, autocast = fgssl.device_and_precision(precision)
    model.to(device, memory_format=torch.channels_last)
    for image in images:
        try:
            x = fgssl.decode(image, fgssl.cache_side(run["size"]))[None].copy()
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        probability = fgssl.features(model, x, run["size"], device, autocast).softmax(1)[0]
        print(image)
        for label in probability.argsort(descending=True)[:5]:
            print(f"  {100 * probability[label]:5.1f} %  {run['class_names'][label]}")
    if failed:
        raise SystemExit(1)


# Main ---------------------------------------------------------------------------------------------


def labelled_splits(data, size):
    """The train, val and test Splits of a set. Raises ValueError where they cannot be used."""
    splits = [data.cached(name, fgssl.cache_side(size), labelled=True) for name in SPLITS]
    for name, split in zip(SPLITS, splits):
        if not len(split.labels):
            raise ValueError(f"{data.name} has no {name} images, or only some without labels. "
                             "Evaluation needs labels: put images into one folder a class; see "
                             'README, "Your own images".')
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has one class only, {data.classes[0]}: nothing to tell.")
    return splits


def shots(text):
    return text if text == "all" else fgssl.number(int, 1)(text)


def arguments(argv):
    p = fgssl.parser(__doc__, training=False)
    p.usage = "%(prog)s [checkpoint] [options]"
    p.add_argument("checkpoint", nargs="?",
                   help="of a trainer, or a torchvision state dict with its --arch")
    what = p.add_argument_group("what is evaluated")
    what.add_argument("--init", choices=("random",),
                      help="in place of a checkpoint: an untrained encoder alone")
    what.add_argument("--encoder", choices=("discriminator", "generator"), default="discriminator",
                      help="which network of a run of train_srgan.py")
    what.add_argument("--layer", choices=(*LAYERS, "best"), default="4",
                      help="stage whose features are read, averaged over the image or its "
                           "quarters; best: chosen on val, for each encoder and classifier")
    other = p.add_argument_group("in place of an evaluation")
    other.add_argument("--compare", nargs="+", metavar="[NAME=]FILE",
                       help="print and draw the results in these eval.json side by side; files of "
                            "one NAME are seeds of one run")
    other.add_argument("--predict", nargs="+", metavar="IMAGE",
                       help="name the classes of these images; the checkpoint is a probe.pt or a "
                            "finetuned.pt")
    other.add_argument("--export", metavar="FILE",
                       help="write the encoder alone, its weights named as torchvision's")
    few = p.add_argument_group("few labels")
    few.add_argument("--shots", nargs="+", type=shots, metavar="K",
                     help="learn from K images a class; all: from every one")
    few.add_argument("--draws", type=fgssl.number(int, 1), default=5,
                     help="how often the K images are drawn; mean and deviation are printed")
    tune = p.add_argument_group("fine-tuning")
    tune.add_argument("--finetune", action="store_true",
                      help="train the encoder too: for every K of --shots, or on all labels")
    tune.add_argument("--steps", type=fgssl.number(int, 1), default=1200,
                      help="length of training, the same for few labels and for many")
    tune.add_argument("--lr", type=fgssl.number(float, above=0), default=1e-3,
                      help="peak learning rate, of the head; see --layer-decay")
    tune.add_argument("--batch", type=fgssl.number(int, 2), default=32, help="images a step")
    tune.add_argument("--head", choices=("probe", "zero"),
                      help="where the head starts: as the frozen probe (Kumar et al. 2022), the "
                           "default, or from zeros, the default with --init random")
    tune.add_argument("--stages", type=fgssl.number(int, 0, 4), default=4,
                      help="last stages of the encoder that learn; 4: all of it; 0: the head alone")
    tune.add_argument("--layer-decay", type=fgssl.number(float, above=0, high=1), default=1.0,
                      help="each stage's rate is this times that of the one after it")
    tune.add_argument("--batch-norm", choices=("batch", "kept"), default="batch",
                      help="normalise by the batch, or by the statistics of pretraining")
    tune.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.25,
                      help="smallest share of the image that a training view may show")
    tune.add_argument("--class-weights", action="store_true",
                      help="weigh a class by the inverse of how often it occurs")
    args = p.parse_args(argv)
    if args.compare is None and (args.checkpoint is None) == (args.init is None):
        p.error("name a checkpoint, e.g. out/simclr/checkpoint.pt, or pass --init random")
    if (args.predict or args.export or args.encoder == "generator") and not args.checkpoint:
        p.error("--predict, --export and --encoder generator take a checkpoint")
    if args.export and Path(args.export).resolve() == Path(args.checkpoint).resolve():
        p.error("--export would overwrite the checkpoint: name another FILE")
    args.shots = [*dict.fromkeys(args.shots or (["all"] if args.finetune else []))]
    args.head = args.head or ("zero" if args.init else "probe")
    return args


def load_network(file, arch, which):
    """The encoder of a checkpoint, a function that makes the same untrained, the run's arguments.

    which: of SRGAN's two networks. Only the paper's discriminator and a generator are no ResNets.
    """
    run = fgssl.read_checkpoint(file).get("args", {})
    if which == "generator":
        return srgan.load_generator(file)
    encoder, run = fgssl.load_encoder(file, arch)
    return encoder, fgssl.ENCODERS[run.get("arch", arch)], run


def print_result(result):
    """The table, and beside it the layers, the worst classes and what Grad-CAM found."""
    rows = {name: dict.fromkeys(("linear", "knn"), result[name.split()[0]])
            for name in ("chance", "majority class")} | {"random init": result["random_init"]}
    if "encoder" in result:
        rows[result["checkpoint"]] = result["encoder"]
    print(table([["test, %", *COLUMNS.values()]] + [
        [name, *(text([row.get(column)]) for column in COLUMNS)] for name, row in rows.items()]))
    measured, detail, cam = list(rows.values())[-1], result["report"], result["grad_cam"]
    if result["layer"] == "best":
        print(f"\nlayers: {measured['linear_layer']} (linear), {measured['knn_layer']} (others)")
    print(f"\nlinear: top-5 {detail['top5']:.1f}, mean over classes "
          f"{detail['mean_per_class']:.1f}; worst classes:")
    for row in detail["worst"][:3]:
        print(f"  {row['class']}: {row['recall']:.0f} % of {row['images']}"
              + (f", most often taken for {row['taken_for']}" if "taken_for" in row else ""))
    if cam:
        print(f"Grad-CAM inside the box: {text([cam['class_score_in_box']])} % for the class, "
              f"{text([cam['similarity_in_box']])} % for the similarity of views; "
              f"the box is {text([cam['box_of_view']])} % of the view")


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        return compare(args.compare, Path(args.out or "out"))
    if args.predict:
        return predict(args.checkpoint, args.predict, args.precision)
    encoder, build, run = None, lambda: fgssl.resnet(args.arch), {}
    if args.checkpoint:
        encoder, build, run = load_network(args.checkpoint, args.arch, args.encoder)
    if encoder and not isinstance(encoder, fgssl.ResNet) and (args.finetune or args.export):
        raise ValueError(f"the {args.encoder} in {args.checkpoint} is no ResNet: it is read as it "
                         "is, without --finetune or --export")
    if args.export:
        Path(args.export).parent.mkdir(parents=True, exist_ok=True)
        torch.save(encoder.state_dict(), args.export)
        return print(f"wrote {args.export}")
    defaults = dict(data="toy", root=None, size=64, arch="resnet10", seed=0)
    if args.data is None:                                    # another set has other labels, boxes
        defaults |= dict.fromkeys(fgssl.DATA_FLAGS)
    for name, default in defaults.items():
        if getattr(args, name) is None:                      # what is not given is as in the run
            setattr(args, name, run.get(name, default))
    beside = Path(args.checkpoint).parent if args.checkpoint else Path("out/random")
    out = Path(args.out or (beside / "generator" if args.encoder == "generator" else beside))
    out.mkdir(parents=True, exist_ok=True)
    how = args.size, *fgssl.device_and_precision(args.precision)
    data = fgssl.load_data_for(args)
    splits, names = labelled_splits(data, args.size), data.classes
    torch.manual_seed(args.seed)
    untrained = build()
    counts, test = np.bincount(splits[0].labels, minlength=len(names)), splits[2]
    result = {"data": data.name, "digest": digest_data(data, splits), "classes": len(names),
              "size": args.size, "arch": args.arch, "layer": args.layer, "seed": args.seed,
              "checkpoint": args.checkpoint, "weights": digest_weights(encoder or untrained),
              "n": {name: len(split.labels) for name, split in zip(SPLITS, splits)},
              "chance": 100 / len(names),
              "majority": 100 * float((test.labels == counts.argmax()).mean()),
              "argv": sys.argv, "commit": fgssl.commit()}
    done = finished_cells(out / "eval.json", result, args)
    print(f"{data.name}, {len(names)} classes, {args.size} px, {args.arch}: "
          f"{' / '.join(map(str, result['n'].values()))} images to train / choose / test\n",
          flush=True)

    result["random_init"], frozen = evaluate(untrained, splits, names, how, args.layer)
    if encoder:
        result["encoder"], frozen = evaluate(encoder, splits, names, how, args.layer)
    measured = result.get("encoder", result["random_init"])
    h = frozen.h[frozen.layer][2]
    result["report"], confusion = report(frozen.head(h), torch.from_numpy(test.labels), names)
    write_confusion(out, "confusion", confusion, names)
    retrieval_sheet(out / "retrieval.png", frozen.h[measured["knn_layer"]][2], test, names)
    feature_map(out / "map.png", h, test.labels, names)
    result["grad_cam"] = grad_cam_study(out / "gradcam.png", frozen, data.records)
    written = "eval.json and pictures"
    if isinstance(frozen.encoder, fgssl.ResNet):             # what --predict can read
        probe = Classifier(frozen.encoder, frozen.head, frozen.layer)
        save_classifier(out / "probe.pt", probe, args, names)
        written = "eval.json, probe.pt and pictures"
    result["few_labels"] = done
    write_result(out / "eval.json", result)
    print_result(result)

    for cell in few_labels(frozen, args, out, list(done)):
        result["few_labels"].append(cell)
        write_result(out / "eval.json", result)
    if result["few_labels"]:
        print()
        compare([str(out / "eval.json")], out)
    print(f"\nwrote {written} into {out}")


if __name__ == "__main__":
    main()
