"""SRGAN: enlarge a small image so that a second network cannot tell it from the large original.

A generator is given a crop at a fraction of its size and must rebuild it. First it learns to come
close to every pixel (the warm-up, "SRResNet"); that leaves it blurred, for the mean of all
plausible details is nearest. Then a discriminator learns to tell generated images from true ones,
and the generator to fool it. The discriminator is the encoder that `linear_eval.py` measures; for
its features' sake it also learns of which photograph a small view is.

Ledig et al., Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network,
CVPR 2017.

    python train_srgan.py                     # toy birds, on a laptop's CPU
    python train_srgan.py --data my_photos    # any folder of images
    python train_srgan.py --resume            # after Ctrl-C, in either phase
    python train_srgan.py --upscale IMAGE --from out/srgan/checkpoint.pt

Writes out/srgan/: checkpoint.pt, log.jsonl, curves.png, and samples.png (after the warm-up also
samples_warmup.png): the small image, bicubic interpolation, the generator's and the true one.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fgssl
import kernels
import parallel
import pictures

# Images: high and fake (B, 3, size, size), low (B, 3, size / scale, size / scale), in [0, 1] ------


def random_crops(x, size, rng):
    """A random square of each image at its own resolution, mirrored or not.

    uint8 (B, 3, C, C) -> (B, 3, size, size) in [0, 1]. Nothing is resized: that would take away the
    very detail which is to be rebuilt.
    """
    places = x.shape[-1] - size + 1
    corners = torch.stack([fgssl.integers(rng, 0, places, len(x), 1) for _ in range(2)])
    rows, columns = fgssl.to_device(corners + torch.arange(size), x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    x = x.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return fgssl.hflip(fgssl.to_float(x), rng)


def shrink(high, scale):
    """(B, 3, H, W) -> (B, 3, H / scale, W / scale): antialiased bicubic, as Pillow and MATLAB have
    it, in the 256 levels that an image file has."""
    return to_8_bits(F.interpolate(high, scale_factor=1 / scale, mode="bicubic", antialias=True))


def enlarge(low, scale):
    """Bicubic interpolation, (B, 3, h, w) -> (B, 3, scale h, scale w): what has to be beaten."""
    return F.interpolate(low, scale_factor=scale, mode="bicubic", antialias=True)


def to_8_bits(x):
    """The nearest image that a file can hold. Never in a loss: it has no gradient beyond [0, 1]."""
    return x.clamp(0, 1).mul(255).round().div(255)


def small_view(x, args, rng):
    """What the discriminator matches high with: a part of each photograph, at any zoom, mirrored or
    not, shrunk as low is and enlarged again: uint8 (B, 3, C, C) -> (B, 3, size, size)."""
    x = fgssl.hflip(fgssl.random_resized_crop(x, args.size, rng, scale=(0.15, 1.0)), rng)
    return enlarge(shrink(x, args.scale), args.scale)


# Networks -----------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), (B, width, h, w) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x), inplace=True))


class Generator(nn.Module):
    """low (B, 3, h, w) -> fake (B, 3, scale h, scale w), float32, not clamped.

    The paper's SRResNet as later work has it: no batch-norm (EDSR, Lim et al. 2017), a single
    PixelShuffle after all convolutions (ESPCN, Shi et al. 2016), and it adds to bicubic
    interpolation what that lacks (VDSR, Kim et al. 2016). Its last layer starts at zero: untrained,
    it is bicubic interpolation.
    """

    def __init__(self, blocks, width, scale):
        super().__init__()
        self.scale = scale
        self.reach = 2 * blocks + 4  # an output depends on so many pixels of low to each side
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.detail = nn.Conv2d(width, 3 * scale ** 2, 3, padding=1)
        nn.init.zeros_(self.detail.weight)
        nn.init.zeros_(self.detail.bias)

    def trunk(self, low):
        """Its features after each quarter of the blocks: four maps (B, width, h, w)."""
        h, maps = self.first(low), []
        x, n = h, len(self.blocks)
        for quarter in range(4):
            x = self.blocks[quarter * n // 4:(quarter + 1) * n // 4](x)
            maps.append(x)
        return [*maps[:3], h + self.last(x)]

    def stages(self, x):
        """The same of normalised images, as an encoder has them."""
        return self.trunk(fgssl.denormalize(x))

    def forward(self, low):
        detail = F.pixel_shuffle(self.detail(self.trunk(low)[-1]), self.scale)
        return enlarge(low, self.scale) + detail.float()


class PaperDiscriminator(nn.Module):
    """Images (B, 3, H, W), normalised -> h (B, 512): the convolutions of the paper's figure 4, and
    their mean over places where the paper flattens them, so that any size will do."""

    dim = 512

    def __init__(self):
        super().__init__()
        inside, stages = 3, []
        for width in (64, 128, 256, 512):
            stages.append(nn.Sequential(
                nn.Conv2d(inside, width, 3, padding=1, bias=inside == 3),
                nn.Identity() if inside == 3 else nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width), nn.LeakyReLU(0.2)))
            inside = width
        self.layers = nn.ModuleList(stages)

    def stages(self, x):
        """The feature maps at 1/2, 1/4, 1/8 and 1/16 of the image's side."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))


class VGG19(nn.Module):
    """VGG19 up to conv5_4 (Simonyan & Zisserman 2015), with torchvision's names: a content loss."""

    def __init__(self):
        super().__init__()
        layers, inside = [], 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU()]
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def stages(self, x):
        """One map, the paper's phi_5,4 at its scale: (B, 3, H, W) -> (B, 512, H / 16, W / 16)."""
        return [self.features(x) / 12.75]


class Head(nn.Module):
    """What the discriminator says of images by its encoder's maps of them (`stages`): truth, z.

    truth: a logit each, (B,), true above 0, from every stage's mean over places. What gives a
    generated image away is texture, which early stages see best; were it read from the last one
    alone, as in the paper, that would have room for little else.
    z (B, 128), of unit length, to be told by which photograph two images are of, as in SimCLR: a
    second task without labels, as discriminators have had before (Jeong & Shin, ICLR 2021).
    """

    def __init__(self, dim, hidden=0):
        super().__init__()
        every = dim + dim // 2 + dim // 4 + dim // 8         # stages double their channels
        layers = [nn.Linear(every, hidden), nn.LeakyReLU(0.2)] if hidden else []
        self.truth = nn.Sequential(*layers, nn.Linear(hidden or every, 1))
        self.match = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, 128))

    def forward(self, maps):
        means = [m.float().mean((2, 3)) for m in maps]
        with torch.autocast(means[0].device.type, enabled=False):  # in full precision
            return self.truth(torch.cat(means, 1))[:, 0], F.normalize(self.match(means[-1]), dim=1)


class Discriminator(nn.Module):
    """Images (B, 3, S, S) in [0, 1] -> what its head says of them."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return self.head(self.encoder.stages(prepared(x)))


def discriminator_for(args):
    if args.discriminator == "vgg":
        return Discriminator(PaperDiscriminator(), Head(PaperDiscriminator.dim, hidden=1024))
    encoder = fgssl.resnet(args.arch)
    return Discriminator(encoder, Head(encoder.dim))


def load_network(file, which):
    """The "discriminator" or the "generator" in a checkpoint of this script; a function that makes
    the same untrained; and the arguments of the run, whose `arch` now names this network. Raises
    ValueError for another file."""
    state = fgssl.read_checkpoint(file)
    if not {"encoder", "ema", "args"} <= state.keys():
        raise ValueError(f"{file} holds no {which}: it is no checkpoint of train_srgan.py")
    args = argparse.Namespace(**state["args"])

    def build():
        if which == "generator":
            return Generator(args.blocks, args.width, args.scale)
        return discriminator_for(args).encoder

    network, part = build(), "ema" if which == "generator" else "encoder"
    fgssl.load_weights(network, state[part], f"{part} in {file}")
    name = which if which == "generator" else f"{args.discriminator} {which}"
    return network, build, state["args"] | {"arch": name}


def content_network(file, arch):
    """A network to compare images by: one of our encoders, or torchvision's VGG19 weights."""
    state = fgssl.read_checkpoint(file)
    if "features.34.weight" not in state:                    # a bare state dict is of --arch
        return fgssl.load_encoder(file, None if "args" in state else arch)[0]
    network = VGG19()
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    fgssl.load_weights(network, state, file)
    return network


# Losses -------------------------------------------------------------------------------------------


def pixel_loss(fake, high):
    """Mean absolute difference; the paper's is the mean square, which blurs more (EDSR)."""
    return F.l1_loss(fake, high)


def feature_loss(network, fake, high):
    """Mean squared distance of feature maps (the paper's equation 5), the mean over the stages."""
    with torch.no_grad():
        wanted = network.stages(prepared(high))
    maps = network.stages(prepared(fake))
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(maps, wanted)) / len(maps)


def discriminator_loss(truth_high, truth_fake):
    """Mean -log D(high) plus mean -log(1 - D(fake)) of logits (B,): 2 ln 2 by guessing."""
    return F.softplus(-truth_high).mean() + F.softplus(truth_fake).mean()


def adversarial_loss(truth_fake):
    """Mean -log D(fake), the paper's equation 6."""
    return F.softplus(-truth_fake).mean()


def prepared(x):
    """As every encoder here expects its images."""
    return fgssl.normalize(x).contiguous(memory_format=torch.channels_last)


def freeze(network):
    """Its parameters take no gradient; its batch-norm neither uses nor learns a batch."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def follow(ema, generator, step):
    """Move the mean of the generator's weights a little: over about the last 1,000 steps, or over a
    tenth of all while they are fewer."""
    for mean, value in zip(ema.parameters(), generator.parameters()):
        mean.lerp_(value, max(1e-3, 9 / (step + 9)))


def learning_rates(step, warm, total, args):
    """The generator's and the discriminator's at step 1..total; each phase has its own cosine."""
    if step <= warm:
        return fgssl.cosine_lr(step, warm, warm // 20, args.lr), 0.0
    step, total = step - warm, total - warm
    return tuple(fgssl.cosine_lr(step, total, total // 20, peak)
                 for peak in (args.lr_generator, args.lr_discriminator))


# How close: PSNR and SSIM -------------------------------------------------------------------------


def brightness(x, border):
    """The nearest 8-bit image's Y, 16 to 235, by ITU-R BT.601 as MATLAB's rgb2ycbcr, not rounded.

    (B, 3, H, W) in [0, 1] -> float64 (B, 1, H - 2 border, W - 2 border).
    """
    weight = torch.tensor((65.481, 128.553, 24.966), dtype=torch.float64, device=x.device)
    y = 16 + (to_8_bits(x).double() * weight.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return y[:, :, border:-border, border:-border]


def psnr(x, y):
    """Peak signal-to-noise ratio of each pair in dB, the peak being 255: (B, 1, H, W) -> (B,).

    Equal images have 100 dB, so that one blank photograph cannot make a mean infinite.
    """
    return 10 * torch.log10(255 ** 2 / (x - y).square().mean((1, 2, 3)).clamp(min=255 ** 2 / 1e10))


def ssim(x, y):
    """Structural similarity of each pair: (B, 1, H, W), values to 255 -> (B,), 1 for equal images.

    Wang, Bovik, Sheikh & Simoncelli 2004: means, variances and covariance under an 11 x 11 Gaussian
    of deviation 1.5, wherever that fits; K1 = 0.01, K2 = 0.03.
    """
    at = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-at.square() / (2 * 1.5 ** 2))
    window = (torch.outer(window, window) / window.sum() ** 2).view(1, 1, 11, 11)
    mx, my, xx, yy, xy = (F.conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean((1, 2, 3))


@torch.no_grad()
def compare(generator, images, device):
    """Whole images (n, 3, C, C), cut to a multiple of the scale, shrunk and enlarged again.

    Returns low, bicubic, generated and true images, and the PSNR and SSIM of the two guesses:
    (2, 2, n), bicubic first.
    """
    scale = generator.scale
    side = images.shape[-1] // scale * scale
    true = fgssl.to_float(torch.from_numpy(images[:, :, :side, :side]).to(device))
    low = shrink(true, scale)
    guesses = enlarge(low, scale), generator(low)
    y = brightness(true, scale)
    scores = [[measure(brightness(x, scale), y) for measure in (psnr, ssim)] for x in guesses]
    return (low, *guesses, true), torch.stack([torch.stack(pair) for pair in scores])


def closeness(generator, images, device):
    """Mean PSNR and SSIM over at most 64 of the images, beside bicubic's; {} without images."""
    images = images[:: max(1, len(images) // 64)][:64]
    scores = [compare(generator, images[i:i + 8], device)[1] for i in range(0, len(images), 8)]
    if not scores:
        return {}
    bicubic, generated = torch.cat(scores, 2).mean(2).tolist()
    return dict(val_psnr=generated[0], bicubic_psnr=bicubic[0],
                val_ssim=generated[1], bicubic_ssim=bicubic[1])


def draw_samples(generator, images, device, file):
    """Six images in four rows, with PSNR and SSIM under the two guesses."""
    rows, scores = compare(generator, images[:: max(1, len(images) // 6)][:6], device)
    pixels = F.interpolate(rows[0], scale_factor=generator.scale, mode="nearest")
    captions = [[f"{p:.2f} dB  {s:.3f}" for p, s in zip(*pair)] for pair in scores.tolist()]
    pictures.grid(file, [pixels, *rows[1:]], ("low", "bicubic", "generated", "true"),
               captions=[[], *captions])


# --upscale ----------------------------------------------------------------------------------------


@torch.no_grad()
def enlarge_in_tiles(generator, low, tile=160):
    """generator(low) of an image of any size, in the memory of a tile; they overlap by the
    generator's reach, so that each pixel is as if the image had been enlarged whole."""
    s, margin, rows = generator.scale, generator.reach, []
    for top in range(0, low.shape[2], tile):
        row, above = [], min(top, margin)
        for left in range(0, low.shape[3], tile):
            before = min(left, margin)
            part = generator(low[:, :, top - above:top + tile + margin,
                                 left - before:left + tile + margin])
            row.append(part[:, :, s * above:s * (above + tile), s * before:s * (before + tile)])
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def upscale(files, checkpoint, out):
    """Write each image, enlarged, as a PNG beside it or into the folder `out`."""
    device, _ = fgssl.device_and_precision("fp32")
    generator, _, _ = load_network(checkpoint, "generator")
    freeze(generator).to(device, memory_format=torch.channels_last)
    for file in map(Path, files):
        try:
            with Image.open(file) as image:
                low = np.array(fgssl.to_rgb(fgssl.upright(image)))
        except Exception as error:  # Pillow's readers raise errors of many kinds
            raise ValueError(f"cannot read image {file}: {error}") from error
        low = fgssl.to_float(torch.from_numpy(low).permute(2, 0, 1)[None].to(device))
        high = pictures.to_image(enlarge_in_tiles(generator, low)[0])
        target = Path(out or file.parent) / f"{file.stem}_x{generator.scale}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        high.save(target)
        print(f"{file} {low.shape[3]} x {low.shape[2]} -> {target} {high.width} x {high.height}")


# Training -----------------------------------------------------------------------------------------


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/srgan", size=64, arch="resnet10",
                     epochs=50, batch=16, lr=1e-3, seed=0)
    p.add_argument("--scale", type=int, choices=(2, 4, 8), default=4, help="enlargement")
    p.add_argument("--blocks", type=fgssl.number(int, 1), default=6,
                   help="residual blocks of the generator; 16 in the paper, for GPUs")
    p.add_argument("--width", type=fgssl.number(int, 1), default=48,
                   help="channels of the generator; 64 in the paper")
    p.add_argument("--discriminator", choices=("resnet", "vgg"), default="resnet",
                   help="resnet: --arch, the encoder of the other trainers; vgg: the paper's own")
    p.add_argument("--warmup", type=fgssl.number(int, 0), default=20,
                   help="how many of the epochs are the warm-up, at --lr")
    p.add_argument("--eval-every", type=fgssl.number(int, 1), default=5,
                   help="epochs between measurements on val")
    game = p.add_argument_group("adversarial phase, after the warm-up")
    game.add_argument("--lr-generator", type=fgssl.number(float, above=0), default=2e-4,
                      help="the generator's peak learning rate")
    game.add_argument("--lr-discriminator", type=fgssl.number(float, above=0), default=1e-3,
                      help="the discriminator's")
    game.add_argument("--adversarial", type=fgssl.number(float, 0), default=5e-3,
                      help="weight of the adversarial loss beside the content loss; more is "
                           "sharper and further from the truth")
    game.add_argument("--content", choices=("pixel", "features"), default="pixel",
                      help="what the content loss compares generated and true images by")
    game.add_argument("--content-from", metavar="FILE",
                      help="whose features: a checkpoint of an encoder, or torchvision's VGG19 "
                           "weights (default: the discriminator's own)")
    game.add_argument("--match", type=fgssl.number(float, 0), default=1.0,
                      help="weight of the discriminator's second task, to tell of which photograph "
                           "a small view is; 0: the paper's game")
    use = p.add_argument_group("in place of training")
    use.add_argument("--upscale", nargs="+", metavar="IMAGE",
                     help="enlarge these, into --out or beside them")
    use.add_argument("--from", dest="source", metavar="CHECKPOINT",
                     help="of the run whose generator does it")
    args = p.parse_args(argv, argparse.Namespace(out=None))  # --upscale needs no folder
    if bool(args.upscale) != bool(args.source):
        p.error("--upscale IMAGE and --from CHECKPOINT go together")
    if args.upscale:
        return args
    args = fgssl.parse(p, argv)
    if args.warmup > args.epochs:
        p.error(f"--warmup {args.warmup} is more than all --epochs {args.epochs}")
    if args.size % args.scale or args.size < 4 * args.scale:
        p.error(f"--size {args.size} is not a multiple of --scale {args.scale}, 4 times or more")
    if args.content_from and args.content != "features":
        p.error("--content-from is used by --content features only")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.upscale:
        return upscale(args.upscale, args.source, args.out)
    device, autocast = fgssl.device_and_precision(args.precision)
    with parallel.one_first():
        data = fgssl.data_of(args)
        train = data.cached("train", fgssl.cache_side(args.size))
        val = data.cached("val", fgssl.cache_side(args.size))
    per_epoch = fgssl.steps_per_epoch(len(train.images), args.batch)
    warm, total = args.warmup * per_epoch, args.epochs * per_epoch

    torch.manual_seed(args.seed)
    discriminator = discriminator_for(args).to(device, memory_format=torch.channels_last)
    encoder = discriminator.encoder
    generator = Generator(args.blocks, args.width, args.scale)
    generator.to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        parallel.synchronise(discriminator)
    ema = freeze(copy.deepcopy(generator))                   # the mean of its latest weights
    content = encoder
    if args.content_from:
        content = freeze(content_network(args.content_from, args.arch)).to(device)
    fused = device.type == "cuda"
    g_optimizer = torch.optim.AdamW(generator.parameters(), args.lr, weight_decay=0, fused=fused)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), args.lr_discriminator,
                                    weight_decay=1e-4, fused=fused)
    rng = parallel.Generator().manual_seed(args.seed)        # of the crops
    state = dict(encoder=encoder, head=discriminator.head, generator=generator, ema=ema,
                 g_optimizer=g_optimizer, d_optimizer=d_optimizer)
    discriminator.head.match.requires_grad_(args.match > 0)  # or DDP would wait for its gradient
    generate, judge = parallel.averaged(generator, discriminator)
    first = parallel.rank() == 0                             # alone draws and evaluates

    random_init = fgssl.knn_check(encoder, train, val, args.size, device, autocast)  # the yardstick
    out, step = Path(args.out), 0
    if args.resume:
        step = fgssl.load(out / "checkpoint.pt", rng, **state)
    log = fgssl.Log(args, total, step, device, kernels.status(), args.batch)
    shown = val.images if len(val.images) else train.images
    if step == 0 and first:
        draw_samples(ema, shown, device, out / "samples.png")
        log.note(0, **closeness(ema, val.images, device), knn=random_init, random_init=random_init)
    stop, saved = fgssl.StopSignal(), time.time()

    order = fgssl.batches(len(train.images), args.batch, args.seed, step)
    while step < total:
        step += 1
        lr, d_lr = learning_rates(step, warm, total, args)
        for optimizer, rate in ((g_optimizer, lr), (d_optimizer, d_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate
        mine = parallel.share(next(order))                   # of the batch's images
        x = fgssl.fetch(train.images, mine, device)          # (B, 3, C, C)
        high = random_crops(x, args.size, rng)
        low = shrink(high, args.scale)
        with autocast:
            fake = generate(low)                             # once a step, for both networks
        terms, game = {"pixel": (1.0, pixel_loss(fake, high))}, {}

        if step > warm:
            # The discriminator's turn. All images go in one batch: with one each, batch-norm would
            # take away what tells them apart, and its running statistics would fit neither.
            discriminator.train().requires_grad_(True)
            images = [high, fake.detach()]
            if args.match:
                images.append(small_view(x, args, rng))
            with autocast:
                truth, z = judge(torch.cat(images))
            truth_high, truth_fake = truth.split(len(x))[:2]
            d_loss = discriminator_loss(truth_high, truth_fake)
            game = dict(discriminator=d_loss.detach(), chance=2 * math.log(2),
                        D_high=truth_high.detach().sigmoid().mean(),
                        D_fake=truth_fake.detach().sigmoid().mean())
            if args.match:
                z_high, _, z_small = z.split(len(x))
                z = torch.cat([z_high, z_small])
                match = kernels.nt_xent(z, 0.1, args.impl, parallel.group())
                d_loss = d_loss + args.match * match
                game |= dict(match=match.detach(), match_weight=args.match,
                             chance_match=math.log(2 * args.batch - 1))
            d_optimizer.zero_grad(set_to_none=True)
            d_loss.backward()
            d_optimizer.step()

            # The generator's turn, before a judge that stands still.
            freeze(discriminator)
            with autocast:
                truth, _ = discriminator(fake)
                if args.content == "features":
                    terms = {"features": (1.0, feature_loss(content, fake, high))}
            terms["adversarial"] = args.adversarial, adversarial_loss(truth)

        loss = sum(weight * value for weight, value in terms.values())
        g_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        g_optimizer.step()
        follow(ema, generator, step)

        leave, late = parallel.either(step == total or bool(stop), time.time() - saved > 60)
        save = leave or late
        if save or log.due(step):
            values = {}
            for name, (weight, value) in terms.items():      # each with the weight it has in `loss`
                values |= {name: parallel.mean(value), f"{name}_weight": weight}
            values |= {name: parallel.mean(value) for name, value in game.items()}
            true = brightness(high, args.scale)
            close = {name: parallel.mean(psnr(brightness(guess.detach(), args.scale), true).mean())
                     for name, guess in (("psnr", fake), ("bicubic", enlarge(low, args.scale)))}
            log(step, **values, **close, lr=lr)
            if not all(map(math.isfinite, values.values())):
                fgssl.save(out / "diverged.pt", step, args, rng, **state)
                raise FloatingPointError(f"loss {loss.item()} at step {step}, learning rates "
                                         f"{lr:.1e} and {d_lr:.1e}. This state is in "
                                         f"{out}/diverged.pt; try smaller ones.")
        if save:
            fgssl.save(out / "checkpoint.pt", step, args, rng, **state)
            saved = time.time()
        if first and (step in (warm, total) or step % (args.eval_every * per_epoch) == 0):
            measured = closeness(ema, val.images, device)
            if step > warm:                                  # before, the encoder is untrained
                knn = fgssl.knn_check(encoder, train, val, args.size, device, autocast)
                measured |= dict(knn=knn, random_init=random_init)
            log.note(step, **measured)
        if step == warm and first:
            draw_samples(ema, shown, device, out / "samples_warmup.png")
        if leave:
            break

    if first:
        draw_samples(ema, shown, device, out / "samples.png")
        log.curves(val_psnr="bicubic_psnr", val_ssim="bicubic_ssim", discriminator="chance",
                   knn="random_init")
    if step < total:
        stop.leave(args)
    print(f"done: {out}/checkpoint.pt, {out}/samples.png. "
          f"Next: python linear_eval.py {out}/checkpoint.pt --layer best")


if __name__ == "__main__":
    parallel.run(main)
