"""Fine-tuning: encoder and linear head learn together, from labels."""

import math
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fgssl
from evaluation.probe import stage_index
from evaluation.results import digest, digest_weights
from imagesets.progress import format_time
from methods.optimizers import Muon

RECIPE = ("head", "steps", "batch", "stages", "layer_decay", "batch_norm", "min_crop",
          "class_weights", "seed")


def recipe(args, images):
    """What a fine-tuned result depends on: the optimizer, once AdamW; which weights are kept, once
    those of the step that did best on val; the rates, once one for all weights; their peak, with
    so many labelled images; and arguments."""
    return {"optimizer": "muon", "kept": "last", "rates": "by norm",
            "lr": args.lr or peak_rate(images, args.init == "random")} | {
        name: getattr(args, name) for name in RECIPE}


def peak_rate(images, from_scratch):
    """The peak learning rate that suits a number of labelled images. The fewer there are, the less
    they should change what pretraining learned."""
    return 0.04 if from_scratch else 0.02 * min(1, images / 2000)


def stages_of_parameters(encoder, size):
    """The stage, from 1, that each of encoder.parameters() belongs to: the first whose map depends
    on it, found by autograd from the maps of one blank image of `size` pixels. So what comes before
    all stages, a stem or a patch embedding, belongs to stage 1; a parameter that no map depends on,
    to the last. Leaves the encoder in eval mode, with all parameters learning.
    """
    parameters = [parameter.requires_grad_(True) for parameter in encoder.parameters()]
    maps = encoder.eval().stages(torch.zeros(1, 3, size, size, device=parameters[0].device))
    found = [len(maps)] * len(parameters)
    for stage, x in reversed([*enumerate(maps, 1)]):
        if x.requires_grad:                                  # some parameter is behind it
            gradients = torch.autograd.grad(x.sum(), parameters, retain_graph=True,
                                            allow_unused=True)
            found = [stage if g is not None else before for g, before in zip(gradients, found)]
    return found


def parameter_groups(model, untrained, size, stages, decay):
    """What of a Classifier learns, as groups for the optimizer; the rest is frozen.

    stages: how many stages learn, counted back from the one that the head reads. decay: the head
    learns at the full rate, that stage (depth 1) at `decay` times it, the one before (depth 2) at
    decay^2, ... The stem learns with stage 1. untrained: the same encoder with fresh weights, in
    proportion to whose norms these learn (`relative_norm`).
    """
    groups = [{"params": [*model.head.requires_grad_(True).parameters()], "scale": 1.0}]
    encoder, last = model.layers.encoder, 1 + stage_index(model.layers.names[0])
    of_stage = stages_of_parameters(encoder, size)
    for w, fresh, stage in zip(encoder.parameters(), untrained.parameters(), of_stage):
        depth = last + 1 - stage
        w.requires_grad_(1 <= depth <= stages)
        if w.requires_grad:
            groups.append({"params": [w], "scale": decay ** depth * relative_norm(w, fresh)})
    return groups


def relative_norm(w, fresh):
    """|w| / |fresh| of a layer's weights; 1 for what has one dimension, or if either is 0.

    Behind a batch-norm the direction of w alone matters, and a step of one length turns a longer w
    less. Pretraining makes w several times as long: at one rate for all, a pretrained network would
    learn that much more slowly from labels than an untrained one.
    """
    if w.dim() == 1 or not fresh.any():
        return 1.0
    return w.norm().item() / fresh.norm().item() or 1.0


def learning_mode(model, batch_norm):
    """Train mode, except for what is frozen: there, dropout is off and norms use their running
    statistics and leave them as they are. With batch_norm "kept", all norms do that."""
    model.train()
    for module in model.modules():
        parameters = [*module.parameters()]
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        has_statistics = getattr(module, "running_mean", None) is not None
        if frozen or batch_norm == "kept" and has_statistics:
            module.eval()


def class_weights(labels, classes):
    """(classes,): inverse to the frequency of each class, with mean 1 over those that occur."""
    counts = torch.from_numpy(np.bincount(labels, minlength=classes)).float()
    weight = torch.where(counts > 0, 1 / counts, 0)
    return weight / weight[counts > 0].mean()


def training_view(x, args, rng):
    """A random crop, mirrored or not: uint8 (B, 3, C, C) -> normalised (B, 3, size, size)."""
    x = fgssl.random_resized_crop(x, args.size, rng, scale=(args.min_crop, 1.0))
    return fgssl.normalize(fgssl.hflip(x, rng))


def finetune(model, train, args, inference, title, file, stop):
    """Train a Classifier on the Split `train`.

    Muon, warm-up, cosine. The length is in steps, so that one label a class gets as many as all.
    The last weights are kept: the rate has come down to 0, and to choose a step by its accuracy on
    val would take labels, and follow their noise. The run is saved in `file` every minute and when
    `stop` is set; found there, it continues, on a CPU to the same bit. The file stays until the
    results are written.
    """
    _, device, autocast = inference
    total, batch = args.steps, min(args.batch, len(train.labels))
    task = {"title": title, "recipe": recipe(args, len(train.labels)),
            "weights": digest_weights(model), "data": digest(train.images, train.labels)}
    model.to(device, memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)                         # as --init random does
        untrained = fgssl.ENCODERS[args.arch]()
    groups = parameter_groups(model, untrained, args.size, args.stages, args.layer_decay)
    peak = task["recipe"]["lr"]
    optimizer = Muon(groups, peak)
    weight = None
    if args.class_weights:
        weight = class_weights(train.labels, model.head.out_features).to(device)
    rng, step = torch.Generator().manual_seed(args.seed), 0
    state = dict(model=model, optimizer=optimizer)
    if file.exists() and fgssl.read_checkpoint(file)["args"].get("task") == task:
        step = fgssl.load(file, rng, **state)["step"]

    order = fgssl.batches(len(train.labels), batch, args.seed, step)
    first, start = step, time.monotonic()
    saved = shown = start
    while step < total:
        step += 1
        lr = fgssl.cosine_lr(step, total, total // 10, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        index = next(order)
        x = fgssl.map_chunks(training_view, fgssl.fetch(train.images, index, device), args, rng)
        learning_mode(model, args.batch_norm)
        with autocast:
            scores = model(x)
        label = fgssl.fetch(train.labels, index, device)
        loss = F.cross_entropy(scores.float(), label, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        leaving = bool(stop)
        save, show = leaving or time.monotonic() - saved > 60, time.monotonic() - shown > 10
        if (save or show or step == total) and not math.isfinite(loss.item()):
            raise FloatingPointError(f"{title}: loss {loss.item()} at step {step}, learning rate "
                                     f"{lr:.1e}. Try a smaller --lr.")
        if show:
            shown, rate = time.monotonic(), (step - first) / (time.monotonic() - start)
            print(f"{title}: step {step}/{total}  loss {loss.item():.3f}  "
                  f"{rate * batch:.0f} img/s  eta {format_time((total - step) / rate)}",
                  flush=True)
        if save:
            fgssl.save(file, step, Namespace(task=task), rng, **state)
            saved = time.monotonic()
        if leaving:
            exit_interrupted(stop)


def exit_interrupted(stop):
    """End the script as a StopSignal asks: the same command continues."""
    stop.exit(shlex.join([Path(sys.executable).name, *sys.argv]))
