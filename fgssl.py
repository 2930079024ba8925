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
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if sys.version_info < (3, 10) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    sys.exit(f"fgssl needs Python 3.10 and torch 2.6, or later. This is Python "
             f"{sys.version.split()[0]} with torch {torch.__version__}: pip install -U torch")

import atomic
import flags
import imagesets
import kernels
import parallel
import terminal
from flags import (  # noqa: F401, for the scripts
    DATA_FLAGS, accept_old_flag, invalid_arguments, number, parse, path)
from imagesets import identity
from imagesets.cache import Dataset, Split, list_cache, load_data  # noqa: F401, too
from imagesets.cache_file import require_whole
from imagesets.decode import Source, decode, to_rgb, upright  # noqa: F401, too
from imagesets.errors import PassingError, UserError
from imagesets.progress import progress
from runfiles import (  # noqa: F401, for the scripts
    Log, commit, describe_device, load, load_weights, read_checkpoint, read_log, save,
    save_or_rescue)

# ------------------------------------------------------------------------------------------------
# Data: an array of images -> batches
# ------------------------------------------------------------------------------------------------


def load_data_for(args):
    """The Dataset that the shared flags ask for. Prints what was read, and what was left out."""
    data = load_data(args.data, args.root, args.skip_bad, args.workers,
                     *(getattr(args, flag) for flag in DATA_FLAGS))
    if args.data not in imagesets.SETS:                      # for a checkpoint, read from anywhere
        args.data = os.path.abspath(args.data)
    print(imagesets.describe(data.records, data.name), flush=True)
    return data


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
    require_whole(images)
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
    images = x.flatten(0, -4)
    matrix, gray = draw_jitter(x.shape[:-3], rng, brightness, contrast, saturation, hue, p)
    offset = to_device(gray, x.device) * luma(images).mean((2, 3))[:, :, None]
    return torch.baddbmm(offset, to_device(matrix, x.device), images.flatten(2)).clamp_(
        0, 1).view_as(x)


def draw_jitter(n, rng, brightness, contrast, saturation, hue, p=0.8):
    """The random part of `color_jitter`, for images n = (B,) or their tiles (B, K), on the CPU.

    Returns matrix (N, 3, 3) and gray (N, 1, 1), N = B or B K: colour v of an image whose mean luma
    is m becomes matrix v + gray m.
    """
    b, c, s = (uniform(rng, max(0, 1 - v), 1 + v, *n) for v in (brightness, contrast, saturation))
    turn = uniform(rng, -hue, hue, *n)
    unchanged = uniform(rng, 0, 1, *n) >= p
    for factor, neutral in ((b, 1), (c, 1), (s, 1), (turn, 0)):
        factor[unchanged] = neutral
    b, c, s = (v.reshape(-1, 1, 1) for v in (b, c, s))
    to_luma = torch.tensor(LUMA).expand(3, 3)  # the matrix of `luma`, in all three channels
    return b * c * (s * hue_rotation(turn.flatten()) + (1 - s) * to_luma), b * (1 - c)


def jitter_matrix(n, rng, *strengths):
    """`color_jitter` as one affine map of a pixel and of its image's mean pixel: (*n, 3, 7), the
    color that kernels.tile_shuffle takes."""
    matrix, gray = draw_jitter(n, rng, *strengths)
    of_mean = gray * torch.tensor(LUMA).expand(3, 3)
    return torch.cat((matrix, of_mean, 0 * gray.expand(-1, 3, 1)), 2).unflatten(0, n)


def grayscale(x, rng, p=0.2):
    """Replace an image by its luma in all three channels with probability p."""
    grey = to_device(uniform(rng, 0, 1, len(x)) < p, x.device)
    return torch.where(grey.view(-1, 1, 1, 1), luma(x), x)


def recolor(x, args, rng):
    """Change the colours of each image its own way, by --color and --gray: the colour jitter of
    SimCLR (Chen et al. 2020, appendix A), then greyscale."""
    s = args.color
    x = color_jitter(x, rng, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return grayscale(x, rng, args.gray)


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
    return to_device(F.one_hot(source, n).float(), device)


def normalize(x):
    """Subtract ImageNet's mean colour and divide by its std, in the memory layout channels_last:
    what every encoder here expects."""
    mean, std = _mean_and_std(x.device)
    return (x - mean).div_(std).contiguous(memory_format=torch.channels_last)


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
    the architecture lacks and the prefix `module.` of DataParallel are left out. Returns the
    encoder and the arguments of its run ({} for a bare state dict). Raises UserError listing every
    missing, unexpected or misshapen key.
    """
    checkpoint = {str(name).removeprefix("module."): value
                  for name, value in read_checkpoint(file).items()}
    run = checkpoint["args"] if "encoder" in checkpoint and "args" in checkpoint else {}
    if not run and not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        raise UserError(f"{file} is neither a trainer's checkpoint nor an encoder's state dict; "
                        f"it holds {', '.join([*checkpoint][:5])}")
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
        x = normalize(evaluation_view(x, size))
        with autocast:
            out.append(encoder(x).float().cpu())
    encoder.train(was_training)
    return torch.cat(out) if out else torch.empty(0, encoder.dim)


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
# A run: what surrounds a training loop
# ------------------------------------------------------------------------------------------------


def cosine_lr(step, total, warmup, peak):
    """The rate at step 0..total: linear from 0 to `peak` at step `warmup`, then half a cosine to 0
    at step `total` (Loshchilov & Hutter 2017). Pure: there is no scheduler to step wrongly."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def view_size(step, total, first, last):
    """The side of the views at step 1..total: from `first` to `last` pixels, reached after 70 % of
    the steps, by eights. Small views cost less and teach early what large ones would (as in Tan &
    Le 2021); docs/speed.md has what that gains."""
    progress = step / (0.7 * total)
    return last if progress >= 1 else first + int((last - first) * progress) // 8 * 8


def parser(doc, training=True, **defaults):
    """An argparse parser with the flags that every script shares: see flags.py."""
    return flags.parser(doc, ENCODERS, training, **defaults)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def device_and_precision(precision):
    """The device to run on and the autocast context for --precision auto|fp32|bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
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

    Between steps the run saves itself: once a minute, at the end, and after Ctrl-C.

    args: those of `parser`; views: how many of each image a step shows, for the printed rate.
    Attributes: train and val (Splits), device, autocast, rng (the generator of all random draws),
    group (of all ranks, for kernels.nt_xent), out (the folder), per_epoch and total (steps), step.
    """

    def __init__(self, args, views=1):
        self.args, self.out = args, Path(args.out)
        self.device, self.autocast = device_and_precision(args.precision)
        if args.impl == "cuda" and self.device.type == "cpu":
            raise UserError("--impl cuda needs a GPU: leave it out, or pass --impl emulated")
        if parallel.rank() == 0:
            self.lock = lock_folder(self.out)
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
        --sync-bn computes batch-norm statistics over all processes. Parameters stay the same."""
        if self.args.sync_bn:
            parallel.convert_sync_batchnorm(*modules)
        return parallel.wrap_ddp(*modules)

    def start(self, **state):
        """Begin, or resume from the checkpoint in the run's folder.

        state: name=module or name=optimizer, all that a checkpoint holds; `encoder` is what k-NN
        evaluates. It gets the weights of --init here: a copy of it is made, or made equal, after.
        From here on Ctrl-C saves.
        """
        self.state = state
        print(f"{self.args.arch}, {self.args.size} px, "
              f"{describe_device(self.device)}, {'bf16' if self.autocast._enabled else 'fp32'}; "
              f"kernels: {kernel_in_use(self.args.impl, self.device)}; folder {self.out}")
        self.random_init = self.knn_accuracy()               # the yardstick
        if self.rank == 0:
            trained_on = np.concatenate([split.rows for split in (self.train, self.val)])
            self.identity = identity.identify(self.data.records, trained_on)
        if self.args.init and not self.args.resume:
            encoder, _ = load_encoder(self.args.init, self.args.arch)
            state["encoder"].load_state_dict(encoder.state_dict())
        if self.args.resume:
            saved = load(self.out / "checkpoint.pt", self.rng, **state)
            self.step = saved["step"]
            if self.rank == 0:
                identity.require_same(saved.get("data"), self.identity, self.args.data, self.out)
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
            self.due()                                       # if the loop did not call it
            if self.saving:
                self.save("checkpoint.pt")
                self.saved = time.monotonic()

    def save(self, name):
        if self.rank == 0:
            self.save_alone(name)
        parallel.wait()

    def save_alone(self, name):
        save_or_rescue(self.out / name, self.step, self.args, self.rng, self.identity, **self.state)

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
        """Log numbers or tensors (), means over processes; waits for the GPU.

        One that is not finite ends the run: FloatingPointError, after saving into diverged.pt.
        """
        values = {name: parallel.mean(value) for name, value in values.items()}
        self.write_log(self.logger, values)
        for name, value in values.items():
            if not math.isfinite(value):
                self.save("diverged.pt")
                rate = f", learning rate {values['lr']:.1e}" if "lr" in values else ""
                raise FloatingPointError(f"{name} {value} at step {self.step}{rate}. This state is "
                                         f"in {self.out}/diverged.pt; try a smaller learning rate")

    def note(self, **values):
        """Log numbers of an evaluation; nothing where there are none."""
        if values:
            self.write_log(self.logger.note, values)

    def write_log(self, write, values):
        """A log that cannot be written ends the run, which is saved first."""
        try:
            write(self.step, **values)
        except OSError:                                      # of rank 0, which alone writes
            self.save_alone("checkpoint.pt")
            raise

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
            python = python_command()
            if self.ranks > 1:
                python = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            script, out = shlex.quote(sys.argv[0]), shlex.quote(str(self.out))
            self.stop.exit(f"{python} {script} --out {out} --resume")
        file = shlex.quote(str(self.out / "checkpoint.pt"))
        words = [python_command(), shlex.quote(script_beside("linear_eval.py")), file, evaluate]
        if not (self.data.records.labels >= 0).any():        # no labels to evaluate with
            words.append(f"--data LABELLED --out {shlex.quote(f'{self.out}_on_labelled')}")
        print(f"done: {file}. Next:\n  {' '.join(word for word in words if word)}")


def lock_folder(folder, doing="training"):
    """Make a folder that this process alone is training or evaluating in; returns its lock.
    UserError if another process is, or if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = atomic.try_lock(folder / f".{doing}.lock")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}. Pass another --out"
                        ) from error
    if lock is None:
        raise UserError(f"another process is {doing} in {folder}: wait for it, or pass another "
                        "--out")
    return lock


def python_command():
    """This interpreter as a shell finds it: its name, or else its path."""
    name = Path(sys.executable).name
    return name if shutil.which(name) == sys.executable else shlex.quote(sys.executable)


def script_beside(name):
    """The path of one of the scripts here from the working folder."""
    return os.path.relpath(Path(__file__).with_name(name))


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
        for each in self.numbers:
            signal.signal(each, self._handle)

    def _handle(self, caught, frame):
        self.signal = caught
        for each in self.numbers:
            signal.signal(each, signal.SIG_DFL)
        if caught == getattr(signal, "SIGHUP", None):
            signal.signal(caught, signal.SIG_IGN)            # shells may send it twice
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
    except (UserError, PassingError, OSError, FloatingPointError) as error:
        about = None if getattr(error, "filename", None) else getattr(error, "strerror", None)
        sys.exit(f"error: {about or error}")                 # "[Errno 28]" tells nothing more


# ------------------------------------------------------------------------------------------------
# A look at a data set and at the cache: python fgssl.py data NAME_OR_FOLDER, python fgssl.py cache
# ------------------------------------------------------------------------------------------------


def main(argv=None):
    from imagesets import survey
    p = argparse.ArgumentParser(description="look at a data set, or at the cache")
    commands = p.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", formatter_class=flags.Help,
                               help="what is in a set, and what is wrong with it",
                               description="Print its splits, classes, sizes, unreadable, "
                               "near-black and duplicate files; draw some of it.")
    data.add_argument("data", metavar="SET", type=path, help=flags.DATA_HELP)
    flags.add_data_flags(data)
    data.add_argument("--out", type=path, default="out/data", help="folder for the picture")
    data.set_defaults(skip_bad=False)
    cache = commands.add_parser("cache", help="the decoded images: sets and sizes",
                                description="List the decoded images of each set.")
    cache.add_argument("--clear", action="store_true", help="remove them")
    args = p.parse_args(argv)
    if args.command == "cache":
        return list_cache(args.clear)
    sys.stdout.reconfigure(errors="backslashreplace")        # some files' names are not UTF-8
    survey.survey(load_data_for(args), Path(args.out))


if __name__ == "__main__":
    launch(main)
