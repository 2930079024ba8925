"""fgssl: the nouns that every script here shares, each with one right answer.

    data           load_data, Dataset.cached, batches: files -> one uint8 array (imagesets/cache.py)
                   -> batches of indices; python fgssl.py data NAME_OR_FOLDER looks at a set
    augmentation   random_resized_crop, hflip, color_jitter, grayscale, gaussian_blur, normalize
    network        resnet("resnet10|18|34|50|101"), load_encoder
    evaluation     features, knn
    run            parser, cosine_lr, save, load, Log, StopSignal

Images are (B, 3, H, W). On disk and in the cache they are uint8; every augmentation returns
float32 in [0, 1]; `normalize` comes last. Random draws take an explicit torch.Generator, on the
CPU whatever the device.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import nn

import imagesets
import parallel
import pictures
from imagesets.cache import (  # noqa: F401, for the scripts
    Dataset, Source, Split, decode, load_data, to_rgb, upright)
from imagesets.progress import format_time as minutes

# ------------------------------------------------------------------------------------------------
# Data: an array of images -> batches
# ------------------------------------------------------------------------------------------------


def data_of(args):
    """The Dataset that the shared flags ask for."""
    return load_data(args.data, args.root, args.skip_bad, args.workers,
                     *(getattr(args, flag) for flag in DATA_FLAGS))


def cache_side(size):
    """The side at which images are cached for views of `size` pixels: 48 more (64 -> 112), so that
    a crop of a quarter of the image still has pixels of its own."""
    return size + 48


def steps_per_epoch(n, batch):
    """n // batch. Raises ValueError where the images do not fill one batch."""
    if n < batch:
        lower = f"pass --batch {max(n // 2, 2)}, or " if n > 1 else ""
        raise ValueError(f"{n} training images do not fill a batch of {batch}: {lower}add images.")
    return n // batch


def batches(n, batch, seed, step=0):
    """Endless batches of indices into n images, from the given step on: int64 arrays (batch,).

    Each epoch is one permutation of range(n), drawn from (seed, epoch) alone, so that any step
    can be resumed without replaying those before it. The last n % batch images of a permutation
    are left out of that epoch: a contrastive batch must be full.
    """
    epoch, i = divmod(step, steps_per_epoch(n, batch))
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(n)
        for i in range(i, n // batch):
            yield order[i * batch:(i + 1) * batch]
        epoch, i = epoch + 1, 0


def fetch(images, index, device):
    """images[index] as a uint8 tensor on the device."""
    return to_device(torch.from_numpy(images[index]), device)


def to_device(x, device):
    """A CPU's tensor on the device. To a GPU by way of pinned memory, so that nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# ------------------------------------------------------------------------------------------------
# Augmentation: batched tensor code, one random draw an image
# ------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights
LUMA = (0.299, 0.587, 0.114)  # share of red, green and blue in brightness: ITU-R BT.601


def uniform(rng, low, high, n, *shape):
    """float32 draws from [low, high) for each of n images: (n, *shape), on the CPU."""
    rank, ranks = parallel.share_of(rng)
    return low + (high - low) * torch.rand(ranks * n, *shape, generator=rng)[rank::ranks]


def integers(rng, low, high, n, *shape):
    """int64 draws from low..high - 1 for each of n images: (n, *shape), on the CPU."""
    rank, ranks = parallel.share_of(rng)
    return torch.randint(low, high, (ranks * n, *shape), generator=rng)[rank::ranks]


def in_pieces(view, x, args, rng):
    """view(x, args, rng); on a CPU a few images at a time, for a whole batch outgrows its cache and
    the memory that each step allocates costs more than the arithmetic. R ranks take an R-th of a
    piece each: where R divides it (128 of 64 pixels, 10 of 224), they draw in the order of one
    process, else in another."""
    _, ranks = parallel.share_of(rng)
    piece = max(1, 2**19 // args.size ** 2 // ranks) if x.device.type == "cpu" else len(x)
    return torch.cat([view(part, args, rng) for part in x.split(piece)])


def to_float(x):
    """uint8 in 0..255, or float in [0, 1], to float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def crop_resize(x, top, left, h, w, size):
    """Cut a box from each image and resize it: (B, C, H, W), uint8 or float -> (B, C, size, size).

    top, left, h, w: (B,) in pixels. Bilinear, as F.interpolate does to the box alone. There is no
    antialiasing: from a cache of `cache_side(size)` it made no difference that could be measured.
    """
    def places(start, length, side):  # (B, size): what each output pixel shows, -1 to 1 over x
        start, length = start[:, None], length[:, None]
        at = (torch.arange(size, device=x.device) + 0.5) * (length / size)
        at = torch.minimum(at.clamp(min=0.5), length - 0.5)  # the box's outermost pixel centres
        return (start + at) * (2 / side) - 1

    ys, xs = places(top, h, x.shape[2]), places(left, w, x.shape[3])
    grid = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), dim=3)
    return F.grid_sample(to_float(x), grid, align_corners=False)


def crop_boxes(rng, n, height, width, scale, ratio):
    """n random boxes (top, left, h, w), int64 (n,) each, in an image of height x width.

    A share of the area uniform in `scale`, an aspect ratio w / h log-uniform in `ratio`; of ten
    tries the first that fits, else the largest centred box whose ratio is in range: torchvision's
    rule.
    """
    area = height * width * uniform(rng, *scale, n, 10)
    aspect = uniform(rng, math.log(ratio[0]), math.log(ratio[1]), n, 10).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    bounded = min(max(width / height, ratio[0]), ratio[1])
    whole_w = min(width, round(height * bounded))
    whole_h = min(height, round(width / bounded))
    found = fits.any(1)
    w = torch.where(found, w.gather(1, first)[:, 0], whole_w)
    h = torch.where(found, h.gather(1, first)[:, 0], whole_h)
    u, v = (uniform(rng, 0, 1, n) for _ in range(2))
    top = torch.where(found, (u * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(found, (v * (width - w + 1)).long(), (width - w) // 2)
    return top, left, h, w


def random_resized_crop(x, size, rng, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random crop of each image, resized: (B, C, H, W), uint8 or float -> (B, C, size, size).

    scale: share of the area; ratio: width / height. Inception's crop (Szegedy et al. 2015), with
    torchvision's distribution.
    """
    boxes = crop_boxes(rng, len(x), *x.shape[2:], scale, ratio)
    return crop_resize(x, *(to_device(v, x.device) for v in boxes), size)


def evaluation_view(x, size):
    """The deterministic view for measuring: the centre 7/8 of each image, at `size` pixels.

    (B, C, H, W), uint8 or float -> (B, C, size, size) float in [0, 1].
    """
    height, width = x.shape[2:]
    side = torch.full((len(x),), min(height, width) * 7 / 8, device=x.device)
    return crop_resize(x, (height - side) / 2, (width - side) / 2, side, side, size)


def hflip(x, rng, p=0.5):
    """Mirror each image of (B, C, H, W) left to right with probability p, one draw of rng each."""
    flip = to_device(uniform(rng, 0, 1, len(x)) < p, x.device)
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)


def luma(x):
    """Brightness as the eye weighs it (ITU-R BT.601): (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def hue_rotation(turn):
    """(B, 3, 3) matrices that turn colour by `turn` (B,) of a full circle, keeping grey and luma.

    A rotation of the two chroma axes of YIQ: linear, where HSV's hue is not, and alike in effect.
    """
    yiq = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    sin, cos = (2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()
    rotation = torch.eye(3).repeat(len(turn), 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cos, -sin, sin, cos
    return torch.linalg.inv(yiq) @ rotation @ yiq


def color_jitter(x, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8):
    """With probability p, change brightness, contrast, saturation and hue, each image its own way.

    x (..., 3, H, W) float in [0, 1], images (B) or their tiles (B, K) -> the same, clamped. Factors
    are uniform in [1 - s, 1 + s] (not below 0), the turn of hue in [-hue, hue] of the circle;
    strength 0 changes nothing. Brightness scales a colour; contrast blends it with the image's mean
    luma, saturation with its own luma.

    All four are affine in the colour: together, one 3 x 3 matrix and one offset an image. Unlike
    torchvision's, which clamps after each and turns the hue of HSV, they commute, so that their
    order, random there, makes no difference here.
    """
    n, images = x.shape[:-3], x.flatten(0, -4)
    b, c, s = (uniform(rng, max(0, 1 - v), 1 + v, *n) for v in (brightness, contrast, saturation))
    turn = uniform(rng, -hue, hue, *n)
    unchanged = uniform(rng, 0, 1, *n) >= p
    for factor, neutral in ((b, 1), (c, 1), (s, 1), (turn, 0)):
        factor[unchanged] = neutral
    b, c, s = (v.reshape(-1, 1, 1) for v in (b, c, s))
    to_luma = torch.tensor(LUMA).expand(3, 3)  # the matrix of `luma`, in all three channels
    matrix = to_device(b * c * (s * hue_rotation(turn.flatten()) + (1 - s) * to_luma), x.device)
    offset = to_device(b * (1 - c), x.device) * luma(images).mean((2, 3))[:, :, None]
    return torch.baddbmm(offset, matrix, images.flatten(2)).clamp_(0, 1).view_as(x)


def grayscale(x, rng, p=0.2):
    """Replace an image by its luma in all three channels with probability p."""
    grey = to_device(uniform(rng, 0, 1, len(x)) < p, x.device)
    return torch.where(grey.view(-1, 1, 1, 1), luma(x), x)


def gaussian_blur(x, rng, sigma=(0.1, 2.0), p=0.5):
    """Blur each image with probability p by a Gaussian of its own width.

    sigma: range of the standard deviation in pixels, uniform. The kernel spans a tenth of the
    image, as in SimCLR's code; the border is mirrored without repeating the edge. A blur is a
    linear map of the rows and one of the columns: two matrix products do it for a whole batch.
    """
    n, _, height, width = x.shape
    sigma = uniform(rng, *sigma, n)
    rows = (uniform(rng, 0, 1, n) < p).nonzero()[:, 0]
    if not len(rows):
        return x
    sigma, rows = to_device(sigma[rows], x.device), to_device(rows, x.device)
    vertical, horizontal = (_blur_matrix(sigma, side) for side in (height, width))
    y = x.index_select(0, rows).flatten(1, 2) @ horizontal.mT  # (b, 3 H, W)
    y = vertical.unsqueeze(1) @ y.view(-1, 3, height, width)
    return x.index_copy(0, rows, y)


def _blur_matrix(sigma, n):
    """(B, n, n): convolution with a Gaussian of deviation sigma (B,), mirrored at the ends."""
    taps = _blur_taps(n, sigma.device)
    offset = torch.arange(len(taps), device=sigma.device) - len(taps) // 2
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    return (weight / weight.sum(1, keepdim=True) @ taps.flatten(1)).view(-1, n, n)


@functools.lru_cache
def _blur_taps(n, device):
    """(taps, n, n): 1 where a tap brings pixel j to place i, counting mirrored pixels."""
    radius = min(max(1, n // 20), n - 1)
    source = torch.arange(n) + torch.arange(-radius, radius + 1)[:, None]
    source = (n - 1) - ((n - 1) - source.abs()).abs()  # mirrored at 0 and at n - 1
    return F.one_hot(source, n).float().to(device)


def normalize(x):
    """Less ImageNet's mean colour, over its deviation: what every encoder here expects."""
    mean, std = _mean_and_std(x.device)
    return (x - mean).div_(std)


def denormalize(x):
    """Undo `normalize`, for pictures."""
    mean, std = _mean_and_std(x.device)
    return x * std + mean


@functools.lru_cache
def _mean_and_std(device):
    """MEAN and STD (3, 1, 1), made once: to make them on a GPU is to wait for it."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD)]


# ------------------------------------------------------------------------------------------------
# Network: ResNet (He et al. 2016), with torchvision's parameter names and shapes
# ------------------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias. A map of one pixel is convolved without the stride, which
    makes no difference to the result: with it, the weights' gradient that a CPU computes in bf16
    (oneDNN, torch 2.13) is read from memory that nobody wrote, and sometimes NaN."""

    def __init__(self, inside, outside, stride=1):
        super().__init__(inside, outside, 3, stride, padding=1, bias=False)

    def forward(self, x):
        stride = 1 if x.shape[2:] == (1, 1) else self.stride
        return F.conv2d(x, self.weight, None, stride, self.padding)


def conv1x1(inside, outside, stride=1):
    return nn.Conv2d(inside, outside, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, inside, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1, self.bn1 = Conv3x3(inside, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = shortcut(inside, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: (B, inside, H, W) -> (B, 4 width, H/stride, W/stride).

    The stride sits on the 3x3 convolution, as in torchvision ("ResNet v1.5"), not on the first 1x1.
    """

    expansion = 4

    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(inside, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inside, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(inside, outside, stride):
    """The identity, or a strided 1x1 projection where the shape changes."""
    if stride == 1 and inside == outside:
        return nn.Identity()
    return nn.Sequential(conv1x1(inside, outside, stride), nn.BatchNorm2d(outside))


class ResNet(nn.Module):
    """Images (B, 3, H, W), normalised -> features h (B, dim), the last stage's mean over places.

    blocks: how many in each of the four stages; width: channels of the first stage.
    small_stem: one 3x3 convolution of stride 2 in place of a 7x7 and max-pooling, for images of
    32 to 96 pixels: the first stage then sees them at half their size, not at a quarter.
    """

    def __init__(self, block, blocks, width=64, small_stem=False):
        super().__init__()
        if small_stem:
            self.conv1, self.maxpool = Conv3x3(3, width, stride=2), nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        inside = width
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(block(inside, width * 2 ** stage, stride))
                inside = width * 2 ** stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.dim = inside
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x):
        """The feature maps after each of the four stages, (B, channels, height, width) each."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))


ARCHITECTURES = {
    "resnet10": dict(block=BasicBlock, blocks=(1, 1, 1, 1), width=32, small_stem=True),
    "resnet18": dict(block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, blocks=(3, 4, 23, 3)),
}


def resnet(name):
    """A ResNet with fresh weights. resnet18|34|50|101 are torchvision's, less the classifier `fc`;
    resnet10 is for CPUs: half the width, one block a stage, a stem for small images."""
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ResNet(**ARCHITECTURES[name])


def load_weights(module, state, what):
    """module.load_state_dict, but with every key that does not fit listed in one ValueError."""
    own = module.state_dict()
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [f"{k} is {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}"
                 for k in own if k in state and state[k].shape != own[k].shape]
    if problems:
        raise ValueError(f"{what} does not fit this {type(module).__name__}, "
                         f"{len(problems)} keys differ:\n  " + "\n  ".join(problems))
    module.load_state_dict(state)


def load_encoder(file, arch=None):
    """The encoder in one of our checkpoints, or in a torchvision state dict (less its `fc`).

    arch: needed for a bare state dict, which does not name its architecture. Returns the encoder
    and the arguments of its run ({} for a bare state dict). Raises ValueError listing every
    missing, unexpected or misshapen key.
    """
    checkpoint = read_checkpoint(file)
    if "encoder" in checkpoint and "args" in checkpoint:
        state, run = checkpoint["encoder"], checkpoint["args"]
        if arch not in (None, run["arch"]):
            raise ValueError(f"{file} holds a {run['arch']}, not a {arch}")
        arch = run["arch"]
    elif checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        state, run = {k: v for k, v in checkpoint.items() if not k.startswith("fc.")}, {}
        if arch is None:
            raise ValueError(f"{file} is a bare state dict; name its architecture with --arch")
    else:
        raise ValueError(f"{file} is neither a checkpoint of a trainer nor a ResNet's state dict")
    encoder = resnet(arch)
    if not run:  # the older of torchvision's files lack these counters, which nothing here reads
        counters = {k: v for k, v in encoder.state_dict().items() if "num_batches" in k}
        state = counters | state
    load_weights(encoder, state, f"{file} ({arch})")
    return encoder, run


# ------------------------------------------------------------------------------------------------
# Evaluation of features, shared by the trainers' running check and linear_eval.py
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(encoder, images, size, device, autocast=contextlib.nullcontext(), batch=256):
    """h of every image's evaluation view: uint8 (N, 3, C, C) -> float32 (N, dim), on the CPU.

    The encoder is in eval mode meanwhile, so that its batch-norm neither uses nor learns the
    statistics of these images.
    """
    was_training = encoder.training
    encoder.eval()
    out = []
    for first in range(0, len(images), batch):
        x = fetch(images, slice(first, first + batch), device)
        x = normalize(evaluation_view(x, size)).contiguous(memory_format=torch.channels_last)
        with autocast:
            out.append(encoder(x).float().cpu())
    encoder.train(was_training)
    return torch.cat(out) if out else torch.empty(0, encoder.dim)


def knn(train_h, train_labels, h, k, classes):
    """Classify by the k nearest training features; cosine similarity s votes with exp(s / 0.07).

    train_h (N, D), train_labels (N,), h (M, D) -> predicted labels (M,). k is at most N. After Wu
    et al. 2018, whose k is 200; here a class may have 30 images, so the caller chooses k, on val.
    """
    train_h, h = F.normalize(train_h, dim=1), F.normalize(h, dim=1)
    similarity, nearest = (h @ train_h.T).topk(min(k, len(train_h)))
    votes = torch.zeros(len(h), classes)
    votes.scatter_add_(1, train_labels[nearest], (similarity / 0.07).exp())
    return votes.argmax(1)


def knn_check(encoder, train, val, size, device, autocast, k=5):
    """Percent of `val` that k-NN among `train` gets right; None where either lacks labels.

    train, val: Splits. Quick enough for every few epochs. Choices may rest on it, reports may not.
    """
    known = train.labels >= 0
    if not known.any() or not len(val.labels) or (val.labels < 0).any():
        return None
    h = features(encoder, train.images, size, device, autocast)[known]
    h_val = features(encoder, val.images, size, device, autocast)
    labels = torch.from_numpy(train.labels[known])
    return accuracy(knn(h, labels, h_val, k, int(labels.max()) + 1), torch.from_numpy(val.labels))


def accuracy(predicted, labels):
    """Percent right; NaN where there is nothing to be right about."""
    return 100 * (predicted == labels).double().mean().item() if len(labels) else math.nan


# ------------------------------------------------------------------------------------------------
# A run: arguments, schedule, checkpoint, log, stop
# ------------------------------------------------------------------------------------------------


def cosine_lr(step, total, warmup, peak):
    """The rate at step 0..total: linear from 0 to `peak` at step `warmup`, then half a cosine to 0
    at step `total` (Loshchilov & Hutter 2017). Pure: there is no scheduler to step wrongly."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


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


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and every default that says something."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


DATA_HELP = f"a folder of images, or one of {', '.join(imagesets.SETS)}"


def parser(doc, training=True, **defaults):
    """An argparse parser with the flags that every script shares; `defaults` are the script's own.

    training: whether to add the flags of a training run.
    """
    p = argparse.ArgumentParser(usage="%(prog)s [options]",  # all 30 flags would hide an error
                                description=doc, formatter_class=_Help)
    data, run = p.add_argument_group("data"), p.add_argument_group("run")
    data.add_argument("--data", help=DATA_HELP)
    add_data_flags(data)
    data.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    run.add_argument("--size", type=number(int, 16, 1024), help="side of a view in pixels")
    run.add_argument("--arch", choices=ARCHITECTURES, help="encoder; resnet10 is for CPUs")
    if training:
        run.add_argument("--epochs", type=number(int, 1), help="passes over the training images")
        run.add_argument("--batch", type=number(int, 2),
                         help="images a step, of all processes together")
        run.add_argument("--lr", type=number(float, above=0), help="peak learning rate")
    run.add_argument("--seed", type=number(int, 0, 2 ** 31), help="of everything random")
    run.add_argument("--out", help="folder for what is written")
    if training:
        run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                     help="auto is bf16 where the hardware has it")
    if training:
        run.add_argument("--impl", choices=("auto", "cuda", "torch", "emulated"), default="auto",
                         help="kernels: CUDA, PyTorch, or the CUDA source run on the CPU; auto is "
                              "CUDA on a GPU, else PyTorch")
        run.add_argument("--sync-bn", action="store_true",
                         help="under torchrun: batch-norm by the images of all processes")
    p.set_defaults(**defaults)
    return p


DATA_FLAGS = ("labels", "bbox", "subset", "classes")  # what of a set; None: all of it, as it is


def add_data_flags(p):
    """The flags that `data_of` reads, but for --data and --skip-bad."""
    p.add_argument("--root", help="where named sets lie (default: $FGSSL_DATA, or ./data)")
    p.add_argument("--labels", metavar="LEVEL",
                   help="which labels, of a set with several kinds: coarse, family, ...")
    p.add_argument("--bbox", action=argparse.BooleanOptionalAction, default=None,
                   help="crop images to their boxes")
    p.add_argument("--subset", type=number(float, above=0, high=1), metavar="SHARE",
                   help="for trials: this share of the images of each class and split")
    p.add_argument("--classes", type=number(int, 1), metavar="N",
                   help="for trials: N of the classes; always the same")
    p.add_argument("--workers", type=number(int, 1), help="decoding threads (default: one a core)")


def parse(p, argv):
    """Parse; under --resume, take the arguments of the run in --out.

    An existing run is refused without --resume. Errors end the script, with usage.
    """
    args = p.parse_args(argv)
    file, ranks = Path(args.out) / "checkpoint.pt", parallel.ranks()
    if args.resume:
        args = resumed(p, argv, args, file)
    elif file.exists():
        p.error(f"{args.out} holds a run: --resume goes on with it, --out FOLDER starts another")
    if args.batch % ranks:
        p.error(f"--batch {args.batch} does not divide among {ranks} processes: the run wants a "
                "number of them that divides it, or another --batch")
    return args


MAY_CHANGE = ("out", "resume", "root", "workers", "impl", "sync_bn")  # in a resumed run


def resumed(p, argv, args, file):
    """The arguments of the run that `file` is a checkpoint of; what argv gives must repeat them,
    but for those that may change."""
    if not file.exists():
        p.error(f"there is no {file} to resume: leave out --resume, or name the run with --out")
    try:
        saved = read_checkpoint(file).get("args")
    except ValueError as error:
        p.error(f"cannot resume: {error}")
    if saved is None:
        p.error(f"cannot resume: {file} is no checkpoint of a trainer")
    named = argparse.Namespace(**{**saved, "out": args.out})  # the folder may have moved since
    args = p.parse_args(argv, named)  # argparse keeps what is there and not given
    for name, value in vars(args).items():
        had = saved.get(name, p.get_default(name))           # a flag may be younger than the run
        if name not in MAY_CHANGE and had != value:
            p.error(f"the run in {args.out} has --{name.replace('_', '-')} {had}, not {value}: "
                    "a resumed run keeps its arguments")
    return args


def device_and_precision(precision):
    """The device to run on and the autocast context for --precision auto|fp32|bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    bf16 = precision == "bf16" or precision == "auto" and fast
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def save(file, step, args, rng, **parts):
    """Write one checkpoint: step, args, the state of every part, and of every random generator.

    rng: the generator of the views; parts: name=module or name=optimizer. Written to a temporary
    name and renamed: a crash while saving leaves the last checkpoint whole. Of several ranks the
    first writes, and the others wait.
    """
    if parallel.rank() == 0:
        write_checkpoint(Path(file), step, args, rng, parts)
    parallel.wait()


def write_checkpoint(file, step, args, rng, parts):
    kind, keys, *rest = np.random.get_state()
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.update(step=step, args=vars(args).copy(), rng={
        "views": rng.get_state(), "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]})
    partial = file.with_name(file.name + ".part")
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"cannot write {file}: {error}. The last checkpoint is untouched.") from error


def read_checkpoint(file):
    """torch.load, executing nothing. Raises FileNotFoundError, or ValueError for another file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint {file}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle and end-of-file errors have no common type
        raise ValueError(f"{file} is no checkpoint: cut short, or holding more than tensors and "
                         "plain values, which are all that is ever loaded") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def load(file, rng, **parts):
    """Put a checkpoint's state back into the parts and the random generators; returns its step."""
    checkpoint = read_checkpoint(file)
    absent = [name for name in ("step", "rng", *parts) if name not in checkpoint]
    if absent:
        raise ValueError(f"{file} is no checkpoint of this script: it lacks {', '.join(absent)}")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_weights(part, checkpoint[name], f"{name} in {file}")
        else:
            part.load_state_dict(checkpoint[name])
    state = checkpoint["rng"]
    rng.set_state(state["views"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    return checkpoint["step"]


class StopSignal:
    """Makes the first Ctrl-C or SIGTERM a wish (`if stop: save, leave`); the second one kills."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def __bool__(self):
        return self.signal is not None

    def leave(self, args):
        """Say how to go on; exit with the code of the signal, so that `a && b` does not run b."""
        script, python = shlex.quote(os.path.basename(sys.argv[0])), "python"
        if parallel.ranks() > 1:
            python = f"torchrun --nproc-per-node {parallel.ranks()}"
        print(f"saved; to go on: {python} {script} --out {shlex.quote(args.out)} --resume")
        parallel.wait()                                      # for whoever leaves first ends all
        raise SystemExit(128 + (self.signal or signal.SIGTERM))  # another rank's, if not this one's


class Log:
    """One line on the terminal and one JSON line in <out>/log.jsonl for each record.

    The first record holds what repeats the run: command, arguments, versions, device, commit.
    Resumed at `step`, later records (of a run that outlived its last checkpoint) are dropped.

    total: steps in the whole run; per_step, unit: what the rate counts, e.g. 256 "views". Of
    several ranks the first alone prints and writes.
    """

    def __init__(self, args, total, step, device, kernels, per_step, unit="img"):
        self.total, self.per_step, self.unit = total, per_step, unit
        self.folder = Path(args.out)
        self.file = self.folder / "log.jsonl"
        if parallel.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_log(self.file) if step and record["step"] <= step]
            partial = self.file.with_suffix(".part")         # a full disk must not cost the log
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(partial, self.file)
        self._write({"step": step, "argv": sys.argv, "args": vars(args), "seed": args.seed,
                     "device": describe(device), "processes": parallel.ranks(),
                     "kernels": kernels, "commit": commit(),
                     "python": platform.python_version(), "torch": str(torch.__version__),
                     "numpy": np.__version__, "pillow": PIL.__version__,
                     "started": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.step, self.time = step, time.time()

    def due(self, step):
        """Whether this step is one to log: the first, the last, and 50 or more between, evenly."""
        return step in (1, self.total) or step % max(1, min(50, self.total // 50)) == 0

    def __call__(self, step, **values):
        """Log numbers of training, with the rate since the last record and the time left."""
        steps_per_s = (step - self.step) / max(time.time() - self.time, 1e-9)
        rate = round(steps_per_s * self.per_step, 1)
        eta = minutes((self.total - step) / steps_per_s)
        tail = f"  {rate:.0f} {self.unit}/s  eta {eta}{memory()}"
        self.note(step, tail, **values, **{f"{self.unit}_per_s": rate})

    def note(self, step, tail="", **values):
        """Log numbers from elsewhere, such as an evaluation; the clock of the rate restarts.

        Yardsticks ("chance", "random_init", "bicubic...") and weights ("..._weight") are printed in
        brackets behind their number. None is a number that could not be had, such as k-NN without
        labels: it is left out.
        """
        values = {name: value for name, value in values.items() if value is not None}
        if not values:
            return
        line = f"step {step}/{self.total}"
        for name, value in values.items():
            text = f"{name.replace('_', ' ')} {value:.4g}"
            if name.startswith(("chance", "random_init", "bicubic")) or name.endswith("_weight"):
                line += f" ({text})"
            elif not name.endswith("_per_s"):
                line += f"  {text}"
        print(line + tail, flush=True)
        self._write({"step": step, **values})
        self.step, self.time = step, time.time()

    def curves(self, **yardsticks):
        """Draw each named number over the steps, beside its yardstick, into <out>/curves.png."""
        records, panels = read_log(self.file), []
        for name, yardstick in yardsticks.items():
            points = [(r["step"], r[name], r[yardstick]) for r in records
                      if r.get(name) is not None]
            if points:
                steps, values, level = zip(*points)
                name, yardstick = name.replace("_", " "), yardstick.replace("_", " ")
                panels.append(pictures.curve({name: (steps, values)}, {yardstick: level[-1]},
                                             "step"))
        if panels:
            pictures.stack(panels).save(self.folder / "curves.png")

    def _write(self, record):
        if parallel.rank() > 0:
            return
        with open(self.file, "a") as out:
            finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in record.items()}  # JSON knows neither NaN nor infinity
            out.write(json.dumps(finite) + "\n")


def read_log(file):
    """The records of a log.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def memory():
    """The peak of GPU memory as the log prints it; nothing on a CPU."""
    if not torch.cuda.is_available():
        return ""
    return f"  mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def commit():
    """The git commit of this code, with + where files were changed; None outside a checkout."""
    try:
        git = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------
# A look at a data set: python fgssl.py data NAME_OR_FOLDER
# ------------------------------------------------------------------------------------------------


def main(argv=None):
    from imagesets import survey
    top = argparse.ArgumentParser(description="What the scripts share, and a look at data.")
    p = top.add_subparsers(required=True).add_parser(
        "data", formatter_class=_Help, help="count, check and draw what a set holds",
        description="Print a set's splits, classes and sizes, unreadable and duplicate files; draw "
                    "some of it.")
    p.add_argument("data", help=DATA_HELP)
    add_data_flags(p)
    p.add_argument("--out", default="out/data", help="folder for the picture")
    p.set_defaults(skip_bad=False)
    args = top.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")        # some files' names are not UTF-8
    survey.survey(data_of(args), Path(args.out))


if __name__ == "__main__":
    main()
