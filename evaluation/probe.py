"""A frozen encoder: its features at a layer, a linear probe and k-NN on them.

A layer is a stage of the encoder, counted from 1, early to late. "4" is the global average pool of
the fourth stage's map; "4:2x2" averages each quarter of the map and concatenates the four. The last
stage's is h, the encoder's output.
"""

from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fgssl
from evaluation.report import class_report
from evaluation.retrieval import retrieval
from imagesets.cache_file import release
from imagesets.progress import progress

L2 = tuple(10.0 ** (k / 2) for k in range(0, -11, -1))  # regularisation tried, from strong to weak
PATIENCE = 3     # strengths in a row that may be worse on val, before the weaker are left out
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
SPLITS = ("train", "val", "test")


class Inference(NamedTuple):
    """How images are shown to a network."""
    size: int        # side of the view in pixels
    device: torch.device
    autocast: torch.autocast


def labelled_splits(data, size):
    """The train, val and test Splits of a set. Raises UserError where they cannot be used."""
    splits = [data.cached(name, fgssl.cache_side(size), labelled=True) for name in SPLITS]
    for name, split in zip(SPLITS, splits):
        if not len(split.labels):
            raise fgssl.UserError(
                f"{data.name} has no {name} images, or only some without labels. Evaluation needs "
                "labels: name a labelled set with --data, or put images into one folder a class; "
                'see README, "Your own images".')
    if len(data.classes) < 2:
        raise fgssl.UserError(f"{data.name} has one class only, {data.classes[0]}: there is "
                              "nothing to classify. Name a set of two or more with --data.")
    return splits


def hold_out(splits, fold):
    """Splits whose test is part I of K of train and val, for the fold "I/K"; test is left out.

    Each class is cut into K parts, the same at every call. What is left of val remains val.
    """
    (train, val, _), (i, count) = splits, map(int, fold.split("/"))
    images, labels, rows = map(np.concatenate, zip(train, val))
    parts = np.repeat([0, 1], [len(train.labels), len(val.labels)])
    for label in np.unique(labels):
        of_class = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        parts[of_class[i - 1::count]] = 2
    return [fgssl.Split(images[parts == part], labels[parts == part], rows[parts == part])
            for part in range(3)]


def layer_names(stages, layer="best"):
    """The layers that --layer stands for, of an encoder with so many stages: one, or with "best"
    all, the last stage first. Raises UserError for a layer that the encoder lacks."""
    every = tuple(f"{stage}{part}" for stage in range(stages, 0, -1) for part in ("", ":2x2"))
    if layer not in ("best", *every):
        raise fgssl.UserError(f"--layer {layer}: this encoder has the layers {', '.join(every)}")
    return every if layer == "best" else (layer,)


def stage_index(layer):
    """The position of a layer's map in encoder.stages(x): "3:2x2" -> 2."""
    return int(layer.partition(":")[0]) - 1


def pool_map(x, layer):
    """A map (B, C, h, w) -> the layer's features (B, C), or (B, 4 C) of a 2x2 layer; float32."""
    return F.adaptive_avg_pool2d(x.float(), 2 if ":" in layer else 1).flatten(1)


class Layers(nn.Module):
    """An encoder read at several layers: (B, 3, H, W) -> their features, concatenated."""

    def __init__(self, encoder, names):
        super().__init__()
        self.encoder, self.names, self.dims = encoder, names, []
        self.eval()

    def forward(self, x):
        maps = self.encoder.stages(x)
        h = [pool_map(maps[stage_index(name)], name) for name in self.names]
        self.dims = [each.shape[1] for each in h]
        return torch.cat(h, 1)


def extract_features(network, images, inference, what):
    """fgssl.features, with a line of progress where it takes long: (N, D), float32, on the CPU."""
    def chunks():
        for i in range(0, len(images), 256):
            yield from fgssl.features(network, images[i:i + 256], *inference)
            release(images)                                  # 100,000 images at 64 px: 3.8 GB

    return torch.stack([*progress(chunks(), len(images), f"features of {what}", patience=5)])


def fit_linear(h, labels, classes, l2, weight=None):
    """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + l2 / 2 |W|^2.

    h (N, D), labels (N,) -> weight (D + 1, classes); its last row is the bias, not penalised.
    weight: where to start, such as the solution for another l2. The problem is convex: the start
    changes the time it takes, not the result. Of many classes, the scores of a part of the images
    are held at once, and L-BFGS remembers fewer steps.
    """
    h = F.pad(h, (0, 1), value=1.0)
    weight = torch.zeros(h.shape[1], classes) if weight is None else weight.clone()
    weight.requires_grad_(True)
    history = min(100, max(10, 8 * fgssl.MOST // weight.numel()))
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-5,
                                  history_size=history, line_search_fn="strong_wolfe")
    rows = max(1, 2 * fgssl.MOST // classes)
    parts = [*zip(h.split(rows), labels.split(rows))]
    steps = progress(count(), None, f"fitting with L2 {l2:.1g}, evaluations", patience=5)

    def closure():
        optimizer.zero_grad()
        next(steps)
        total = 0
        for part, of in parts:
            loss = F.cross_entropy(part @ weight, of) * (len(part) / len(h))
            loss.backward()
            total += loss.detach()
        penalty = l2 / 2 * weight[:-1].square().sum()
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(closure)
    return weight.detach()


def choose_linear(h, labels, h_val, labels_val, classes, scale, what="the probe"):
    """Fit for the strengths in L2, each from the last, and keep the best on val. After `PATIENCE`
    worse ones in a row it ends: the weaker take longest.

    scale: mean and std of each feature, (D,) both; features are standardised by them, so that one
    list of strengths suits all encoders. Returns the accuracy on val, an nn.Linear that takes h
    itself and scores as the fit does on standardised h, and l2. Ties keep the stronger l2.
    """
    mean, std = scale
    x, x_val = (h - mean) / std, (h_val - mean) / std
    best, weight, worse = (-1.0,), None, 0
    for l2 in progress(L2, len(L2), f"fitting {what}", patience=5):
        if worse == PATIENCE:                                # the progress goes to its end
            continue
        weight = fit_linear(x, labels, classes, l2, weight)
        score = fgssl.accuracy((x_val @ weight[:-1] + weight[-1]).argmax(1), labels_val)
        worse = worse + 1 if score < best[0] else 0
        if score > best[0]:
            best = score, weight, l2
    score, weight, l2 = best
    return score, head_of(weight, mean, std), l2


def head_of(weight, mean, std):
    """An nn.Linear that takes h and scores as `weight` (D + 1, classes) does on standardised h."""
    head = nn.Linear(len(mean), weight.shape[1]).requires_grad_(False)
    head.weight.copy_((weight[:-1] / std[:, None]).T)
    head.bias.copy_(weight[-1] - head.weight @ mean)
    return head


def mean_and_std(h):
    """Mean and std of each feature, as choose_linear takes them."""
    return h.mean(0), h.std(0).clamp(min=1e-6)


def choose_neighbours(h, labels, h_val, labels_val, classes):
    """(accuracy on val, k) of the best k in NEIGHBOURS that is at most the training set's size."""
    scores = {k: fgssl.accuracy(fgssl.knn(h, labels, h_val, k, classes), labels_val)
              for k in NEIGHBOURS if k <= len(h)}
    k = max(scores, key=scores.get)
    return scores[k], k


class Frozen(NamedTuple):
    """A frozen encoder, its features, and the linear probe that did best on val."""
    encoder: nn.Module
    splits: tuple    # train, val and test
    names: list      # of the classes
    inference: Inference
    h: dict          # {layer: features of train, val and test, (N, D) each}
    layer: str       # the one that the probe reads
    head: nn.Linear  # the probe: features of that layer -> scores
    report: dict     # class_report of its scores on test
    confusion: np.ndarray


def evaluate(encoder, splits, names, inference, layers):
    """Probe one frozen encoder: every choice is made on val, then test is read once.

    splits: train, val and test; names: of the classes. layers: the linear probe and k-NN each read
    the one of these that does best on val. Returns {percentages and choices}, and the Frozen.
    Raises UserError for features that are not finite.
    """
    encoder.to(inference.device, memory_format=torch.channels_last)
    network = Layers(encoder, layers)
    by_split = [extract_features(network, split.images, inference, what).split(network.dims, 1)
                for what, split in zip(SPLITS, splits)]
    if not all(h.isfinite().all() for of_split in by_split for h in of_split):
        raise fgssl.UserError("the features hold NaN or infinity. Either the run diverged: "
                              "evaluate another checkpoint; or bf16 is too coarse: pass "
                              "--precision fp32.")
    h = dict(zip(layers, zip(*by_split)))
    labels, labels_val, labels_test = (torch.from_numpy(split.labels) for split in splits)
    knn, linear = {}, {}
    for layer, (train, val, _) in h.items():
        data = train, labels, val, labels_val, len(names)
        knn[layer] = choose_neighbours(*data)
        linear[layer] = choose_linear(*data, mean_and_std(train), f"the probe of layer {layer}")
    knn_layer, linear_layer = (max(found, key=lambda layer: found[layer][0])
                               for found in (knn, linear))   # ties keep the later stage
    (val_knn, k), (val_linear, head, l2) = knn[knn_layer], linear[linear_layer]

    train, _, test = h[knn_layer]
    report, confusion = class_report(head(h[linear_layer][2]), labels_test, names)
    result = {"linear": report["top1"],
              "knn": fgssl.accuracy(fgssl.knn(train, labels, test, k, len(names)), labels_test),
              **{name: report[name] for name in ("top5", "mean_per_class", "macro_f1")},
              **retrieval(test, labels_test), "val_linear": val_linear, "val_knn": val_knn,
              "linear_layer": linear_layer, "l2": l2, "knn_layer": knn_layer, "k": k}
    return result, Frozen(encoder, splits, names, inference, h, linear_layer, head, report,
                          confusion)
