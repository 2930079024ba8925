"""Reports of a classifier's scores: precision, recall and F1 of each class, the confusion matrix;
and a map of the features."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import pictures
from evaluation.results import write_csv

MATRIX = 1000  # classes of the largest confusion.csv that is a matrix; that of 10,000 has 200 MB


def confusion_matrix(labels, predicted, classes):
    """Counts (classes, classes): rows are true classes, columns predicted ones."""
    confusion = np.zeros((classes, classes), np.int32)       # 10,000 classes: 400 MB
    np.add.at(confusion, (labels, predicted), 1)
    return confusion


def per_class(confusion):
    """Precision, recall and F1 of each class, in percent. NaN, not 0, where it is undefined: no
    image was predicted to be of the class (precision), or none is of it (recall, F1)."""
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = right / predicted, right / true, 2 * right / (true + predicted)
    return 100 * precision, 100 * recall, 100 * np.where(true > 0, f1, np.nan)


def class_report(scores, labels, names):
    """Scores (N, classes) and labels (N,): a dict for eval.json, and the confusion matrix.

    Means over classes leave out those without a test image. "worst": the ten classes of least
    recall, each with the class that its images are most often mistaken for.
    """
    confusion = confusion_matrix(labels.numpy(), scores.argmax(1).numpy(), len(names))
    columns = [[None if math.isnan(value) else value for value in column.tolist()]
               for column in per_class(confusion)]
    classes = [dict(zip(("class", "images", "precision", "recall", "f1"), row))
               for row in zip(names, confusion.sum(1).tolist(), *columns)]
    for label, (row, mistakes) in enumerate(zip(classes, confusion.copy())):
        mistakes[label] = 0
        if mistakes.any():
            row |= {"taken_for": names[mistakes.argmax()], "times": int(mistakes.max())}
    present = [row for row in classes if row["images"]]
    in_top5 = scores.topk(min(5, len(names))).indices == labels[:, None]
    return {"top1": 100 * float(np.trace(confusion)) / len(labels),
            "top5": 100 * in_top5.any(1).double().mean().item(),
            "mean_per_class": float(np.mean([row["recall"] for row in present])),
            "macro_f1": float(np.mean([row["f1"] for row in present])),
            "worst": sorted(present, key=lambda row: row["recall"])[:10],
            "classes": classes}, confusion


def write_confusion(out, name, confusion, names, worst=20):
    """NAME.csv, counts, of more than MATRIX classes as a list of those that are not 0; and
    NAME.png, fractions of each row; where the names of all classes cannot be written, a second
    picture below shows the `worst` by recall."""
    if len(names) > MATRIX:
        cells = ([names[i], names[j], int(confusion[i, j])] for i, j in zip(*confusion.nonzero()))
        rows = itertools.chain([["true class", "taken for", "images"]], cells)
    else:
        rows = itertools.chain([["true class / taken for", *names]], (
            [name, *row.tolist()] for name, row in zip(names, confusion)))
    write_csv(out / f"{name}.csv", rows)
    total = np.maximum(confusion.sum(1), 1)

    def fractions(rows, columns=slice(None)):
        return confusion[rows][:, columns] / total[rows, None].astype(np.float32)

    block = -(-len(names) // 640)                            # of 10,000 classes, float32 is 400 MB
    small = fractions(slice(None)) if block == 1 else np.concatenate([
        pictures.shrink_matrix(fractions(slice(first, first + block)), 640).max(0, keepdims=True)
        for first in range(0, len(names), block)])
    about = f"{confusion.sum():,} test images of {len(names):,} classes: fraction of each true one"
    panels = [pictures.heat_picture(small, "true class", "taken for", names, about)]
    if len(names) > 64:
        recall = np.where(confusion.sum(1), np.diag(confusion) / total, np.inf)
        chosen = np.sort(recall.argsort(kind="stable")[:worst])
        panels.append(pictures.heat_picture(
            fractions(chosen, chosen), "true class", "taken for", [names[i] for i in chosen],
            f"of these, the {worst} of least recall"))
    pictures.save(pictures.stack(panels), out / f"{name}.png")


def evenly_spaced(n, count):
    """At most `count` indices below n, at equal distances: examples that nobody picked."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int)


def feature_map(file, h, labels, names, most=3000, coloured=14):
    """Draw test features, L2-normalised, on their first two principal components: at most `most`
    images, `coloured` of the classes in colour."""
    chosen = evenly_spaced(len(h), most)
    x, labels = F.normalize(h[chosen], dim=1), labels[chosen]
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    u, s = F.pad(u, (0, 2)), F.pad(s, (0, 2))                # two components, even of one feature
    xy = (u * s)[:, :2].numpy()
    explained = 100 * s.square() / s.square().sum().clamp(min=1e-12)
    present = np.unique(labels)
    shown = present[evenly_spaced(len(present), coloured)]
    groups = {names[label]: xy[labels == label].T for label in shown}
    titles = [f"component {i}, {v:.0f} % of the variance" for i, v in enumerate(explained[:2], 1)]
    titles[0] += f"; {len(x):,} test images of {len(present)} classes"
    pictures.save(pictures.scatter(groups, *titles, rest=xy[~np.isin(labels, shown)].T), file)
