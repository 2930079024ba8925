"""A classifier: an encoder read at a layer, and a linear head. Its file, and what it remembers."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fgssl
from evaluation.probe import Layers, extract_features, fit_linear, head_of, mean_and_std
from imagesets.progress import progress


class Classifier(nn.Module):
    """An encoder read at a layer, and a head: (B, 3, H, W), normalised -> scores (B, classes)."""

    def __init__(self, encoder, head, layer):
        super().__init__()
        self.layers, self.head = Layers(encoder, (layer,)), head

    def forward(self, x):
        return self.head(self.layers(x))


def predict_scores(model, images, inference, what):
    """A Classifier's scores of uint8 images: (N, classes), float32, on the CPU."""
    return extract_features(model, images, inference, what)


def refit(frozen, l2):
    """The probe for use: fitted to the labels of train, val and test together, with the strength
    that was chosen on val. Its own accuracy is unknown; that of the probe before it is reported."""
    h = torch.cat(frozen.h[frozen.layer])
    labels = torch.cat([torch.from_numpy(split.labels) for split in frozen.splits])
    mean, std = mean_and_std(h)
    weight = fit_linear((h - mean) / std, labels, len(frozen.names), l2)
    return head_of(weight, mean, std)


class Memory(nn.Module):
    """The labelled images as a classifier knows them, for what it says of new ones.

    h (N, D), float16: features, standardised by mean and std. far: a distance to the nearest of
    these that 1 % of the test images exceeded, from the train images. test (2, M): the probability
    of the predicted class of each test image, ascending, and whether it was right.
    """

    def __init__(self, h_by_split, scores, labels):
        """h_by_split: features of train, val and test; scores (M, classes) and labels (M,): of
        test, by a classifier that did not learn from it."""
        super().__init__()
        everything = torch.cat(h_by_split)
        mean, std = mean_and_std(everything)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("h", ((h_by_split[0] - mean) / std).half())
        self.register_buffer("far", self.nearest(h_by_split[2])[0].quantile(0.99))
        self.register_buffer("h", ((everything - mean) / std).half())
        probability, predicted = scores.softmax(1).max(1)
        probability, order = probability.sort()
        right = (predicted == labels)[order].float()
        self.register_buffer("test", torch.stack([probability, right]))

    def nearest(self, h):
        """The distance to, and the index of, the nearest image of each of h (M, D)."""
        x, found = (h - self.mean) / self.std, []
        known = self.h.float()
        parts = x.split(max(1, fgssl.MOST // len(known)))
        for part in progress(parts, len(parts), "nearest images, parts", patience=5):
            found.append(torch.cdist(part, known).min(1))
        return tuple(torch.cat(column) for column in zip(*found))

    def confidence(self, probability, count=50):
        """Of the `count` test images with the most similar probability, how many the classifier had
        right: (M,) -> (M,) in [0, 1]."""
        known, right = (row.contiguous() for row in self.test)
        count = min(count, len(known))
        first = torch.searchsorted(known, probability.contiguous()) - count // 2
        first = first.clamp(0, len(known) - count)
        total = torch.cat([torch.zeros(1), right.cumsum(0)])
        return (total[first + count] - total[first]) / count


def save_classifier(file, model, args, names, memory, **about):
    """A checkpoint like the trainers', with a head, the layer it reads, its classes' names and a
    Memory; about: more to keep, `files` (of the Memory) and `accuracy` (%, on test)."""
    args = Namespace(**{**vars(args), "layer": model.layers.names[0], "class_names": list(names),
                        **about})
    fgssl.save(file, 0, args, torch.Generator(), encoder=model.layers.encoder, head=model.head,
               memory=memory)


def load_init(file, arch):
    """The weights that training began with, for a row of the table: its name, and the encoder; {}
    where there was no file, or it is gone."""
    if not file:
        return "", {}
    if not Path(file).is_file():
        print(f"{file}, from which training began, is not there: no row for it", file=sys.stderr)
        return "", {}
    encoder, run = fgssl.load_encoder(file, arch)
    return f"init {file}" if run else "ImageNet init", {"init": encoder}


class Loaded(NamedTuple):
    """A classifier from its file."""
    model: Classifier
    run: dict               # the arguments that made it
    memory: Memory | None   # None in files of older versions


def load_classifier(file):
    """The Classifier in a probe.pt or finetuned.pt, and the arguments of its run."""
    return load_all(file)[:2]


def load_all(file):
    """Everything in a probe.pt or finetuned.pt."""
    checkpoint = fgssl.read_checkpoint(file)
    if "class_names" not in checkpoint.get("args", {}):
        raise fgssl.UserError(f"{file} holds no classifier. Run python linear_eval.py "
                              f"{shlex.quote(str(file))}, then predict with the probe.pt that it "
                              "writes.")
    (encoder, run), state = fgssl.load_encoder(file), checkpoint["head"]
    model = Classifier(encoder, nn.Linear(*reversed(state["weight"].shape)), run["layer"])
    fgssl.load_weights(model.head, state, f"head in {file}")
    memory, kept = None, checkpoint.get("memory")
    if kept:
        memory = Memory.__new__(Memory)
        nn.Module.__init__(memory)
        for name, value in kept.items():
            memory.register_buffer(name, value)
    return Loaded(model, run, memory)
