"""fgssl: what the scripts share. Data, augmentation, ResNet, features, flags, the run.

    data           load_data, Dataset.cached, batches: files -> one uint8 array (imagesets/cache.py)
                   -> batches of indices; python fgssl.py data NAME_OR_FOLDER looks at a set
    augmentation   random_resized_crop, hflip, color_jitter, grayscale, gaussian_blur, normalize
    encoders       ENCODERS, resnet("resnet10|18|34|50|101"), load_encoder
    evaluation     features, knn
    run            parser, cosine_lr, Run, launch; its files (checkpoint, log) are in runfiles.py

Images are (B, 3, H, W). On disk and in the cache they are uint8; every augmentation returns
float32 in [0, 1]; `normalize` comes last. Random draws take an explicit torch.Generator, on the
CPU whatever the device.
"""

import argparse
import contextlib
import functools
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import atomic
import imagesets
import kernels
import parallel
import terminal
from imagesets.cache import (  # noqa: F401, for the scripts
    Dataset, Source, Split, decode, load_data, reason, to_rgb, upright)
from imagesets.errors import UserError
from imagesets.progress import progress
from runfiles import (  # noqa: F401, for the scripts
    Log, commit, describe_device, load, load_weights, read_checkpoint, read_log, save)

# ------------------------------------------------------------------------------------------------
# Data: an array of images -> batches
# ------------------------------------------------------------------------------------------------


def load_data_for(args):
    """The Dataset that the shared flags ask for."""
    return load_data(args.data, args.root, args.skip_bad, args.workers,
                     *(getattr(args, flag) for flag in DATA_FLAGS))


def cache_side(size):
    """The side at which images are cached for views of `size` pixels: 48 more (64 -> 112), so that
    a crop of a quarter of the image still has pixels of its own."""
    return size + 48


def steps_per_epoch(n, batch):
    """n // batch. Raises UserError where the images do not fill one batch."""
    if n < batch:
        lower = f"pass --batch {max(n // 2, 2)}, or " if n > 1 else ""
        raise UserError(f"{n} training images do not fill a batch of {batch}: {lower}add images.")
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
    """Copy a CPU tensor to the device; to a GPU through pinned memory, so that nothing waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# ------------------------------------------------------------------------------------------------
# Augmentation: batched tensor code, one random draw an image
# ------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in luma: ITU-R BT.601


def uniform(rng, low, high, n, *shape):
    """float32 draws from [low, high) for each of n images: (n, *shape), on the CPU."""
    rank, ranks = getattr(rng, "shard", (0, 1))
    return low + (high - low) * torch.rand(ranks * n, *shape, generator=rng)[rank::ranks]


def integers(rng, low, high, n, *shape):
    """int64 draws from low..high - 1 for each of n images: (n, *shape), on the CPU."""
    rank, ranks = getattr(rng, "shard", (0, 1))
    return torch.randint(low, high, (ranks * n, *shape), generator=rng)[rank::ranks]


def map_chunks(view, x, args, rng):
    """view(x, args, rng), on a CPU a few images at a time: the intermediate images of a whole batch
    outgrow its cache, and allocating them costs more than the arithmetic. Each of R ranks takes an
    R-th of a chunk; where R divides it (128 images of 64 pixels, 10 of 224), the draws are those of
    one process."""
    _, ranks = getattr(rng, "shard", (0, 1))
    chunk = max(1, 2**19 // args.size ** 2 // ranks) if x.device.type == "cpu" else len(x)
    return torch.cat([view(part, args, rng) for part in x.split(chunk)])


def to_float(x):
    """uint8 in 0..255, or float in [0, 1], to float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def crop_resize(x, top, left, h, w, size):
    """Cut a box from each image and resize it: (B, C, H, W), uint8 or float -> (B, C, size, size).

    top, left, h, w: (B,) in pixels. Bilinear, as F.interpolate of the box alone. There is no
    antialiasing: with a cache of `cache_side(size)` it made no measurable difference.
    """
    def places(start, length, side):  # (B, size): where each output pixel lies, -1 to 1 over x
        start, length = start[:, None], length[:, None]
        at = (torch.arange(size, device=x.device) + 0.5) * (length / size)
        at = torch.minimum(at.clamp(min=0.5), length - 0.5)  # the box's outermost pixel centres
        return (start + at) * (2 / side) - 1

    ys, xs = places(top, h, x.shape[2]), places(left, w, x.shape[3])
    grid = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), dim=3)
    return F.grid_sample(to_float(x), grid, align_corners=False)


def crop_boxes(rng, n, height, width, scale, ratio):
    """n random boxes (top, left, h, w), int64 (n,) each, in an image of height x width.

    The area is uniform in `scale` as a fraction of the image's, the aspect ratio w / h log-uniform
    in `ratio`. The first of ten tries that fits, else the largest centred box with a ratio in
    range: torchvision's rule.
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

    scale: fraction of the area; ratio: width / height. Inception's crop (Szegedy et al. 2015), with
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
    """Brightness as the eye weighs it, Y of ITU-R BT.601: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def hue_rotation(turn):
    """(B, 3, 3) matrices that turn hue by `turn` (B,) of a full circle and keep luma.

    A rotation of the two chroma axes of YIQ: linear, unlike a turn of HSV's hue.
    """
    yiq = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    sin, cos = (2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()
    rotation = torch.eye(3).repeat(len(turn), 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cos, -sin, sin, cos
    return torch.linalg.inv(yiq) @ rotation @ yiq


def color_jitter(x, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8):
    """With probability p, change brightness, contrast, saturation and hue, each image its own way.

    x (..., 3, H, W) float in [0, 1], images (B) or their tiles (B, K) -> the same, clamped. Factors
    are uniform in [1 - s, 1 + s] (not below 0), the turn of hue in [-hue, hue] of the circle.
    Brightness scales a colour; contrast blends it with the image's mean luma, saturation with its
    own luma. All four are affine in the colour: together, one 3 x 3 matrix and one offset an image.
    Unlike torchvision's, which clamp after each and turn HSV's hue, they commute: their order,
    random there, does not matter here.
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
    image, as in SimCLR's code; the border is mirrored without repeating the edge. A blur is linear
    in the rows and in the columns: two matrix products do it for a whole batch.
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
    """(B, n, n): convolution with a Gaussian of std sigma (B,), mirrored at the ends."""
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
    """Subtract ImageNet's mean colour and divide by its std: what every encoder here expects."""
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
# Encoders: ResNet (He et al. 2016), with torchvision's parameter names and shapes
#
# An encoder is any nn.Module that has
#     dim         the length of its features
#     stages(x)   normalised images (B, 3, H, W) of any size -> maps (B, channels, h, w), early to
#                 late, as many as it likes; the last has `dim` channels
#     forward(x)  -> features h (B, dim): the global average pool of the last map
# and an entry in ENCODERS, below.
# ------------------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias. A map of one pixel is convolved without the stride, with the
    same result: with the stride, oneDNN (torch 2.13, CPU, bf16) reads the weights' gradient from
    uninitialised memory, and it is sometimes NaN."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, x):
        stride = 1 if x.shape[2:] == (1, 1) else self.stride
        return F.conv2d(x, self.weight, None, stride, self.padding)


def conv1x1(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = Conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: (B, C, H, W) -> (B, 4 width, H/stride, W/stride).

    The stride sits on the 3x3 convolution, as in torchvision ("ResNet v1.5"), not on the first 1x1.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(in_channels, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(in_channels, out_channels, stride):
    """The identity, or a strided 1x1 projection where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Normalised images (B, 3, H, W) -> features h (B, dim), the last stage's global average pool.

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
        in_channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(block(in_channels, width * 2 ** stage, stride))
                in_channels = width * 2 ** stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.dim = in_channels
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


RESNETS = {
    "resnet10": dict(block=BasicBlock, blocks=(1, 1, 1, 1), width=32, small_stem=True),
    "resnet18": dict(block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": dict(block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": dict(block=Bottleneck, blocks=(3, 4, 23, 3)),
}


def resnet(name):
    """A ResNet with fresh weights. resnet18|34|50|101 are torchvision's, less the classifier `fc`;
    resnet10 is for CPUs: half the width, one block a stage, a stem for small images."""
    if name not in RESNETS:
        raise UserError(f"no architecture {name!r}; there are {', '.join(RESNETS)}")
    return ResNet(**RESNETS[name])


ENCODERS = {name: functools.partial(resnet, name) for name in RESNETS}  # of --arch; add yours


def stage_widths(encoder, size):
    """The channels of each of an encoder's maps, found by running it on a blank image."""
    parameter, was_training = next(encoder.parameters()), encoder.training
    with torch.no_grad():
        maps = encoder.eval().stages(torch.zeros(1, 3, size, size, device=parameter.device))
    encoder.train(was_training)
    return [each.shape[1] for each in maps]


def load_encoder(file, arch=None):
    """The encoder in one of our checkpoints, or in a bare state dict such as torchvision's.

    arch: needed for a bare state dict, which does not name its architecture; a classifier `fc` that
    the architecture lacks is left out. Returns the encoder and the arguments of its run ({} for a
    bare state dict). Raises UserError listing every missing, unexpected or misshapen key.
    """
    checkpoint = read_checkpoint(file)
    run = checkpoint["args"] if "encoder" in checkpoint and "args" in checkpoint else {}
    if not run and not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        raise UserError(f"{file} is neither a trainer's checkpoint nor an encoder's state dict")
    if run and arch not in (None, run["arch"]):
        raise UserError(f"{file} holds a {run['arch']}, not a {arch}")
    arch = arch or run.get("arch")
    if not isinstance(arch, str) or arch not in ENCODERS:
        raise UserError(f"{file} holds an encoder {arch!r}, which is not in fgssl.ENCODERS" if arch
                        else f"{file} is a bare state dict; name its architecture with --arch")
    encoder = ENCODERS[arch]()
    if run:
        state = checkpoint["encoder"]
    else:
        own = encoder.state_dict()
        state = {k: v for k, v in checkpoint.items() if k in own or not k.startswith("fc.")}
        # older files of torchvision's lack these counters, which nothing here reads
        state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | state
    load_weights(encoder, state, f"{file} ({arch})")
    return encoder, run


# ------------------------------------------------------------------------------------------------
# Evaluation of features, shared by the trainers' running check and linear_eval.py
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(encoder, images, size, device, autocast=contextlib.nullcontext(), batch=256):
    """h of every image's evaluation view: uint8 (N, 3, C, C) -> float32 (N, dim), on the CPU.

    In eval mode: batch-norm neither uses nor learns the statistics of these images.
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


MOST = 2 ** 24  # numbers in one table of similarities or scores: 64 MiB


MOST = 2 ** 24  # similarities or scores that are held at once: 64 MiB


def knn(train_h, train_labels, h, k, classes):
    """Classify by the k nearest training features; cosine similarity s has weight exp(s / 0.07).

    train_h (N, D), train_labels (N,), h (M, D) -> predicted labels (M,). k is at most N. After Wu
    et al. 2018, whose k is 200; here a class may have 30 images, so the caller chooses k, on val.
    """
    train_h, h, predicted = F.normalize(train_h, dim=1), F.normalize(h, dim=1), []
    parts = h.split(max(1, MOST // max(len(train_h), classes)))
    for part in progress(parts, len(parts), "k-NN, parts", patience=5):
        similarity, nearest = (part @ train_h.T).topk(min(k, len(train_h)))
        votes = torch.zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / 0.07).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_check(encoder, train, val, size, device, autocast, k=5):
    """Percent of `val` that k-NN among `train` gets right; None where either lacks labels.

    train, val: Splits. For choices during training; reports take linear_eval.py.
    """
    known = train.labels >= 0
    if not known.any() or not len(val.labels) or (val.labels < 0).any():
        return None
    h = features(encoder, train.images, size, device, autocast)[known]
    h_val = features(encoder, val.images, size, device, autocast)
    labels = torch.from_numpy(train.labels[known])
    return accuracy(knn(h, labels, h_val, k, int(labels.max()) + 1), torch.from_numpy(val.labels))


def accuracy(predicted, labels):
    """Percent right; NaN for no images."""
    return 100 * (predicted == labels).double().mean().item() if len(labels) else math.nan


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


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
    """The script's docstring as it stands, and every default that tells something."""

    def _get_help_string(self, action):
        tells_nothing = action.default is None or action.default is False
        return action.help if tells_nothing else super()._get_help_string(action)


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
    run.add_argument("--arch", choices=ENCODERS, help="encoder; resnet10 is for CPUs")
    if training:
        run.add_argument("--epochs", type=number(int, 1), help="passes over the training images")
        run.add_argument("--batch", type=number(int, 2),
                         help="images a step, of all processes together")
        run.add_argument("--lr", type=number(float, above=0), help="peak learning rate")
        run.add_argument("--eval-every", type=number(int, 1), default=5,
                         help="epochs between evaluations on val")
        run.add_argument("--init", metavar="FILE",
                         help="start from these weights: torchvision's, of ImageNet, or those of a "
                              "checkpoint, for the same --arch")
    run.add_argument("--seed", type=number(int, 0, 2 ** 31), help="of everything random")
    run.add_argument("--out", help="folder for what is written")
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


DATA_FLAGS = ("labels", "bbox", "subset", "classes")  # what of a set; None: all of it, as it is


def add_data_flags(p):
    """The flags that `load_data_for` reads, but for --data and --skip-bad."""
    p.add_argument("--root", help="where named sets lie (default: $FGSSL_DATA, or ./data)")
    p.add_argument("--labels", metavar="LEVEL",
                   help="which labels, of a set with several kinds: coarse, family, ...")
    p.add_argument("--bbox", action=argparse.BooleanOptionalAction, default=None,
                   help="crop images to their boxes")
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


def misfits(p, saved):
    """Of the arguments saved in a checkpoint, those that the parser would not have taken."""
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


MAY_CHANGE = ("out", "resume", "root", "workers", "impl", "sync_bn")  # in a resumed run


def resumed(p, argv, args, file):
    """The arguments of the run that `file` is a checkpoint of; what argv gives must repeat them,
    but for those that may change, and --epochs, which may grow."""
    if not file.exists():
        p.error(f"there is no {file} to resume: leave out --resume, or name the run with --out")
    try:
        saved = read_checkpoint(file).get("args")
    except ValueError as error:
        p.error(f"cannot resume: {error}")
    if not isinstance(saved, dict):
        p.error(f"cannot resume: {file} is no checkpoint of a trainer")
    for flag in misfits(p, saved):
        p.error(f"cannot resume: {file} has {flag}")
    named = argparse.Namespace(**{**saved, "out": args.out})  # the folder may have moved since
    args = p.parse_args(argv, named)  # argparse keeps what is there and not given
    for name, value in vars(args).items():
        had = saved.get(name, p.get_default(name))           # a flag may be younger than the run
        longer = name == "epochs" and value > had
        if name not in MAY_CHANGE and had != value and not longer:
            p.error(f"the run in {args.out} has --{name.replace('_', '-')} {had}, not {value}: "
                    "a resumed run keeps its arguments" + ", or gets more epochs"
                    * (name == "epochs"))
    if args.epochs > saved["epochs"]:
        print(f"lengthened from {saved['epochs']} to {args.epochs} epochs: the learning rate "
              "continues on the longer schedule, so it jumps up where the shorter had come down")
    return args


# ------------------------------------------------------------------------------------------------
# A run: what surrounds a training loop
# ------------------------------------------------------------------------------------------------


def cosine_lr(step, total, warmup, peak):
    """The rate at step 0..total: linear from 0 to `peak` at step `warmup`, then half a cosine to 0
    at step `total` (Loshchilov & Hutter 2017). Pure: there is no scheduler to step wrongly."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def device_and_precision(precision):
    """The device to run on and the autocast context for --precision auto|fp32|bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:                                                    # torch 2.6 has no get_capabilities
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("avx512_bf16"))
    bf16 = precision == "bf16" or precision == "auto" and fast
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


class Run:
    """What surrounds a training loop, the same for every method. It calls nothing back.

        run = fgssl.Run(args, views=2)                       # images decoded, torch seeded
        encoder = fgssl.ENCODERS[args.arch]().to(run.device) # head, optimizer
        encode, project = run.wrap(encoder, head)            # under torchrun: DDP
        run.start(encoder=encoder, head=head, optimizer=optimizer)      # or resume
        for step, x in run:                # x: uint8 (B, 3, C, C), this rank's images of the batch
            ...                            # forward, loss.backward(), optimizer.step()
            if run.due():                  # some steps: to be logged, saved, or the last
                run.log(loss=loss, chance=..., lr=lr)
            if run.evaluates():            # every --eval-every epochs, and at the end
                run.note(**run.knn())
        run.finish(loss="chance", knn="random_init")         # curves, each beside its yardstick

    args: those of `parser`; views: how many of each image a step shows, for the printed rate.
    Attributes: train and val (Splits), device, autocast, rng (the generator of all random draws),
    group (of all ranks, for kernels.nt_xent), out (the folder), per_epoch and total (steps), step.
    """

    def __init__(self, args, views=1):
        self.args, self.out = args, Path(args.out)
        self.device, self.autocast = device_and_precision(args.precision)
        with parallel.local_rank0_first():                   # the other ranks reuse its cache
            self.data = load_data_for(args)
            self.train, self.val = (self.data.cached(split, cache_side(args.size))
                                    for split in ("train", "val"))
        self.per_epoch = steps_per_epoch(len(self.train.images), args.batch)
        self.step, self.total = 0, args.epochs * self.per_epoch
        self.rank, self.ranks, self.group = parallel.rank(), parallel.ranks(), parallel.group()
        self.rng = parallel.Generator().manual_seed(args.seed)
        self.per_step, self.unit = views * args.batch, "views" if views > 1 else "img"
        torch.manual_seed(args.seed)                         # of the networks' weights

    def wrap(self, *modules):
        """The modules as the loop calls them: under torchrun, DDP averages their gradients, and
        --sync-bn makes their batch-norm one of all processes. The parameters are the same."""
        if self.args.sync_bn:
            parallel.convert_sync_batchnorm(*modules)
        return parallel.wrap_ddp(*modules)

    def start(self, **state):
        """Begin, or resume from the checkpoint in the run's folder.

        state: name=module or name=optimizer, all that a checkpoint holds; `encoder` is what k-NN
        evaluates. From here on Ctrl-C saves.
        """
        self.state = state
        print(f"{describe_data(self.data)}\n{self.args.arch}, {self.args.size} px, "
              f"{describe_device(self.device)}, {'bf16' if self.autocast._enabled else 'fp32'}; "
              f"kernels: {kernel_in_use(self.args.impl, self.device)}; folder {self.out}")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = atomic.hold(self.out / ".lock")
            if self.lock is None:
                raise UserError(f"another process is training in {self.out}: wait for it, or pass "
                                "another --out")
        self.random_init = self.knn_accuracy()               # the yardstick
        if self.args.init and not self.args.resume:
            encoder, _ = load_encoder(self.args.init, self.args.arch)
            state["encoder"].load_state_dict(encoder.state_dict())
        if self.args.resume:
            self.step = load(self.out / "checkpoint.pt", self.rng, **state)
        self.logger = Log(self.args, self.total, self.step, self.device, self.per_step, self.unit)
        if self.step == 0:
            self.note(**self.knn(None if self.args.init else self.random_init))
        self.stop, self.saved = StopSignal(), time.monotonic()

    def begins(self):
        """Whether to draw what is drawn once: on rank 0, before the first step."""
        return self.rank == 0 and self.step == 0

    def __iter__(self):
        order = batches(len(self.train.images), self.args.batch, self.args.seed, self.step)
        self.leaving = False
        while self.step < self.total and not self.leaving:
            self.step, self.decided = self.step + 1, False
            index = next(order)[self.rank::self.ranks]       # this rank's images of the batch
            yield self.step, fetch(self.train.images, index, self.device)
            self.due()                                       # for a script that did not ask
            if self.saving:
                save(self.out / "checkpoint.pt", self.step, self.args, self.rng, **self.state)
                self.saved = time.monotonic()

    def due(self):
        """Whether to log this step: the first, the last, 50 or more evenly between, and any after
        which the run is saved, as it is once a minute, at the end, and when a signal came."""
        if not self.decided:
            self.decided = True
            leaving = self.step == self.total or bool(self.stop)
            late = time.monotonic() - self.saved > 60
            if self.ranks > 1:
                leaving, late = parallel.any_rank(leaving, late)
            self.leaving, self.saving = leaving, leaving or late
        every = max(1, min(50, self.total // 50))
        return self.saving or self.step in (1, self.total) or self.step % every == 0

    def log(self, **values):
        """Log numbers or tensors (), means over processes; waits for the GPU. `lr` is among them.

        One that is not finite ends the run: FloatingPointError, after saving into diverged.pt.
        """
        values = {name: parallel.mean(value) for name, value in values.items()}
        self.logger(self.step, **values)
        for name, value in values.items():
            if not math.isfinite(value):
                save(self.out / "diverged.pt", self.step, self.args, self.rng, **self.state)
                raise FloatingPointError(
                    f"{name} {value} at step {self.step}, learning rate {values['lr']:.1e}. This "
                    f"state is in {self.out}/diverged.pt; try a smaller learning rate")

    def note(self, **values):
        """Log numbers of an evaluation; nothing where there are none."""
        if values:
            self.logger.note(self.step, **values)

    def evaluates(self, also=False):
        """Whether to evaluate after this step, on rank 0: every --eval-every epochs, at the last
        step, and when `also` says so."""
        every = self.args.eval_every * self.per_epoch
        return self.rank == 0 and (also or self.step == self.total or self.step % every == 0)

    def knn(self, accuracy=None):
        """k-NN accuracy on val beside the untrained encoder's, for `note`; {} without labels."""
        accuracy = self.knn_accuracy() if accuracy is None else accuracy
        return {} if accuracy is None else {"knn": accuracy, "n": len(self.val.labels),
                                            "random_init": self.random_init}

    def knn_accuracy(self):
        return knn_check(self.state["encoder"], self.train, self.val, self.args.size, self.device,
                         self.autocast)

    def finish(self, evaluate="", **curves):
        """Draw the curves, name=yardstick; say what to do next, or how to resume and exit.

        evaluate: options of linear_eval.py that suit the method.
        """
        if self.rank == 0:
            self.logger.curves(**curves)
            self.lock.close()
        if self.step < self.total:
            python = Path(sys.executable).name
            if self.ranks > 1:
                python = f"torchrun --nproc-per-node {self.ranks}"
            script, out = shlex.quote(sys.argv[0]), shlex.quote(str(self.out))
            self.stop.exit(f"{python} {script} --out {out} --resume")
        file = shlex.quote(str(self.out / "checkpoint.pt"))
        if not (self.data.records.labels >= 0).any():        # no labels to evaluate with
            evaluate += f" --data LABELLED --out {shlex.quote(f'{self.out}_on_labelled')}"
        script = os.path.relpath(Path(__file__).with_name("linear_eval.py"))
        print(f"done: {file}. Next:\n  {Path(sys.executable).name} {shlex.quote(script)} {file}"
              f"{evaluate}")


def describe_data(data):
    """A set in one line: images of each split, and classes."""
    splits = ", ".join(f"{split} {(data.records.splits == split).sum():,}"
                       for split in ("train", "val", "test"))
    return f"{data.name}: images {splits}; {len(data.classes) or 'no'} classes"


def kernel_in_use(impl, device):
    """Which implementation of the kernels --impl stands for on the device."""
    return kernels.status()[device.type] if impl == "auto" else impl


class StopSignal:
    """The first Ctrl-C, SIGTERM, or SIGHUP of a closed terminal sets a flag: `if stop:` the loop
    saves and exits. A second one kills."""

    def __init__(self):
        self.signal, self.numbers = None, [signal.SIGINT, signal.SIGTERM]
        if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self.numbers.append(signal.SIGHUP)               # nohup has it ignored
        for number in self.numbers:
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.signal = number
        for each in self.numbers:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def __bool__(self):
        return self.signal is not None

    def exit(self, command):
        """Say how to go on; exit with the code of the signal, so that `a && b` does not run b."""
        print(f"saved; to go on: {command}")
        parallel.wait()                                      # the first to leave ends all ranks
        raise SystemExit(128 + (self.signal or signal.SIGTERM))  # another rank's, if not this one's


def launch(main):
    """Run a script's main(). Ctrl-C and what a user can mend (a UserError, a file or disk that
    fails, a loss that diverges) end it in one line; a bug ends it in a traceback."""
    try:
        with terminal.tolerant():
            parallel.run(main)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


# ------------------------------------------------------------------------------------------------
# A look at a data set: python fgssl.py data NAME_OR_FOLDER
# ------------------------------------------------------------------------------------------------


def main(argv=None):
    from imagesets import survey
    p = argparse.ArgumentParser(formatter_class=_Help, description="python fgssl.py data SET: "
                                "print its splits, classes and sizes, unreadable and duplicate "
                                "files; draw some of it.")
    p.add_argument("command", choices=["data"])
    p.add_argument("data", metavar="SET", help=DATA_HELP)
    add_data_flags(p)
    p.add_argument("--out", default="out/data", help="folder for the picture")
    p.set_defaults(skip_bad=False)
    args = p.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")        # some files' names are not UTF-8
    survey.survey(load_data_for(args), Path(args.out))


if __name__ == "__main__":
    launch(main)
