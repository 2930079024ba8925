"""SRGAN: enlarge a small image so that a second network cannot tell it from the large original.

A generator is given a crop at a fraction of its size and must rebuild it. First it learns to come
close to every pixel (the warm-up, "SRResNet"); that leaves it blurred, since the mean of all
plausible details is nearest. Then a discriminator learns to tell generated images from true ones,
and the generator to fool it. What tells true from false is what the discriminator must see: its
ResNet is the encoder that `linear_eval.py` measures.

Ledig et al., Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network,
CVPR 2017.

    python train_srgan.py                     # toy birds, minutes on a laptop's CPU
    python train_srgan.py --data my_photos    # any folder of images
    python train_srgan.py --resume            # after Ctrl-C, in either phase
    python train_srgan.py --upscale IMAGE --from out/srgan/checkpoint.pt

Writes out/srgan/: checkpoint.pt, log.jsonl, curves.png, and samples.png: the small image, bicubic
interpolation, the generator's and the true one, with PSNR (dB) and SSIM under each.
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

# ------------------------------------------------------------------------------------------------
# Images: high (B, 3, size, size) and low (B, 3, size / scale, size / scale), both in [0, 1]
# ------------------------------------------------------------------------------------------------


def random_crops(x, size, rng):
    """A random square of each image at its own resolution, mirrored or not.

    uint8 (B, 3, C, C) -> (B, 3, size, size) in [0, 1]. Nothing is resized: interpolation would take
    away the very detail that is to be rebuilt.
    """
    corner = torch.randint(x.shape[-1] - size + 1, (2, len(x), 1), generator=rng)
    rows, columns = (corner + torch.arange(size)).to(x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    x = x.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return fgssl.hflip(fgssl.to_float(x), rng)


def shrink(high, scale):
    """(B, 3, H, W) -> (B, 3, H / scale, W / scale): antialiased bicubic, as Pillow and MATLAB do it,
    rounded to the 256 levels that an image file has."""
    low = F.interpolate(high, scale_factor=1 / scale, mode="bicubic", antialias=True)
    return to_8_bits(low)


def enlarge(low, scale):
    """Bicubic interpolation, (B, 3, h, w) -> (B, 3, scale h, scale w): what has to be beaten."""
    return F.interpolate(low, scale_factor=scale, mode="bicubic", antialias=True)


def to_8_bits(x):
    """The nearest image that a file can hold. Never in a loss: beyond [0, 1] it has no gradient."""
    return x.clamp(0, 1).mul(255).round().div(255)


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


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

    The paper's SRResNet in the form of later work: no batch-norm (EDSR, Lim et al. 2017), all
    convolutions at low resolution and one PixelShuffle at the end (ESPCN, Shi et al. 2016), and the
    network adds to bicubic interpolation what that lacks (VDSR, Kim et al. 2016). The last layer
    starts at zero: an untrained generator is bicubic interpolation.
    """

    def __init__(self, blocks, width, scale):
        super().__init__()
        self.scale = scale
        self.reach = 2 * blocks + 4  # how many pixels of low, to each side, an output depends on
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.detail = nn.Conv2d(width, 3 * scale ** 2, 3, padding=1)
        nn.init.zeros_(self.detail.weight)
        nn.init.zeros_(self.detail.bias)

    def trunk(self, low):
        """Its features, (B, width, h, w)."""
        h = self.first(low)
        return h + self.last(self.blocks(h))

    def forward(self, low):
        detail = F.pixel_shuffle(self.detail(self.trunk(low)), self.scale)
        return enlarge(low, self.scale) + detail.float()


class PaperDiscriminator(nn.Module):
    """Images (B, 3, H, W), normalised -> h (B, 512): the convolutions of the paper's figure 4.

    The mean over places stands where the paper flattens, so that any size will do.
    """

    dim = 512

    def __init__(self):
        super().__init__()
        layers, inside = [], 3
        for width in (64, 128, 256, 512):
            for stride in (1, 2):
                layers.append(nn.Conv2d(inside, width, 3, stride, padding=1, bias=not layers))
                layers += [nn.BatchNorm2d(width)] if inside > 3 else []
                layers.append(nn.LeakyReLU(0.2, inplace=True))
                inside = width
        self.features = nn.Sequential(*layers)

    def stages(self, x):
        """The feature maps at 1/2, 1/4, 1/8 and 1/16 of the image's side."""
        maps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                maps.append(x)
        return maps[1::2]

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))


class VGG19(nn.Module):
    """The convolutions of VGG19 with torchvision's names, up to conv5_4 (Simonyan & Zisserman 2015).

    x (B, 3, H, W), normalised -> one map (B, 512, H / 16, W / 16), after its ReLU: phi_5,4.
    """

    def __init__(self):
        super().__init__()
        layers, inside = [], 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU(inplace=True)]
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def stages(self, x):
        return [self.features(x) / 12.75]  # the paper's scale, 0.006 on the squares


def discriminator_for(args):
    """The encoder and the head that turns its h (B, dim) into one logit: true above 0, false below."""
    if args.discriminator == "vgg":
        encoder = PaperDiscriminator()
        head = nn.Sequential(nn.Linear(encoder.dim, 1024), nn.LeakyReLU(0.2), nn.Linear(1024, 1))
    else:
        encoder = fgssl.resnet(args.arch)
        head = nn.Linear(encoder.dim, 1)
    return encoder, head


def content_network(file, arch):
    """A network to compare images by: one of our encoders, or torchvision's VGG19 weights."""
    state = fgssl.read_checkpoint(file)
    if "features.34.weight" in state:
        network = VGG19()
        state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
        unused = [k for k in state if k not in network.state_dict()]
        fgssl.load_weights(network, state, file)
    else:
        network, _ = fgssl.load_encoder(file, arch)
    return network


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def discriminator_loss(logit_high, logit_fake, smooth=0.0):
    """-log D(high) - log(1 - D(fake)), the mean over the batch; 2 ln 2 for one that only guesses.

    smooth: how far below 1 the target for true images lies (Salimans et al. 2016).
    """
    return (F.softplus(-logit_high) + smooth * logit_high + F.softplus(logit_fake)).mean()


def gradient_penalty(discriminator, high):
    """|d logit / d high|^2 of each true image, the mean over the batch (R1, Mescheder et al. 2018).

    It keeps the discriminator from growing steep where the generator has already arrived.
    """
    high = high.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(high).sum(), high, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def adversarial_loss(logit_fake):
    """-log D(fake), the mean over the batch: equation 6 of the paper."""
    return F.softplus(-logit_fake).mean()


def feature_loss(network, fake, high):
    """Mean squared distance of the network's feature maps, and the mean over its stages."""
    with torch.no_grad():
        wanted = network.stages(fgssl.normalize(high))
    maps = network.stages(fgssl.normalize(fake))
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(maps, wanted)) / len(maps)


def freeze(network):
    """Its parameters take no gradient, its batch-norm neither uses nor learns this batch."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def follow(ema, generator, step):
    """Move the average of the generator's weights a little towards the generator.

    Over about the last 1,000 steps, and over a tenth of them all while there are fewer.
    """
    weight = max(1e-3, 9 / (step + 9))
    for mean, value in zip(ema.parameters(), generator.parameters()):
        mean.lerp_(value, weight)


def learning_rates(step, warm, total, args):
    """Of the generator and the discriminator at step 1..total: each phase has its own cosine."""
    if step <= warm:
        return fgssl.cosine_lr(step, warm, warm // 20, args.lr), 0.0
    step, total = step - warm, total - warm
    return tuple(fgssl.cosine_lr(step, total, total // 20, peak)
                 for peak in (args.lr_generator, args.lr_discriminator))


# ------------------------------------------------------------------------------------------------
# How close: PSNR and SSIM, on brightness alone and without the border, as the field reports them
# ------------------------------------------------------------------------------------------------


def brightness(x, border):
    """(B, 3, H, W) in [0, 1] -> Y (B, 1, H - 2 border, W - 2 border), 16 to 235, in float64.

    ITU-R BT.601 as MATLAB's rgb2ycbcr has it, not rounded.
    """
    weight = torch.tensor((65.481, 128.553, 24.966), dtype=torch.float64, device=x.device)
    y = 16 + (x.double() * weight.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return y[:, :, border:-border, border:-border]


def psnr(x, y):
    """Peak signal-to-noise ratio of each pair in dB, the peak being 255: (B, 1, H, W) -> (B,)."""
    return 10 * torch.log10(255 ** 2 / (x - y).square().mean((1, 2, 3)))


def ssim(x, y):
    """Structural similarity of each pair: (B, 1, H, W) of values to 255 -> (B,), 1 for equal images.

    Wang, Bovik, Sheikh & Simoncelli 2004: means, variances and covariance under an 11 x 11 Gaussian
    of deviation 1.5, at every place where that fits; K1 = 0.01, K2 = 0.03.
    """
    at = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-at.square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window)
    window = (window / window.sum()).view(1, 1, 11, 11)
    mean = lambda v: F.conv2d(v, window)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return map.mean((1, 2, 3))


@torch.no_grad()
def closeness(generator, images, scale, device, autocast):
    """PSNR and SSIM of the generator and of bicubic interpolation, means over 64 images at most."""
    if not len(images):
        return {}
    scores = []
    for x in torch.from_numpy(spread(images, 64)).split(16):
        high, low = pair(x.to(device), scale)
        with autocast:
            fake = generator(low)
        true = brightness(high, scale)
        for y in (brightness(to_8_bits(z), scale) for z in (fake, enlarge(low, scale))):
            scores.append(torch.stack([psnr(y, true), ssim(y, true)]))
    generated, bicubic = (torch.cat(s, 1).mean(1).tolist() for s in (scores[::2], scores[1::2]))
    return dict(val_psnr=generated[0], bicubic_psnr=bicubic[0],
                val_ssim=generated[1], bicubic_ssim=bicubic[1])


def spread(images, count):
    """At most `count` of the images, evenly spread."""
    return images[:: max(1, len(images) // count)][:count]


def pair(x, scale):
    """Whole cached images as high and low: uint8 (B, 3, C, C), cut to a multiple of scale."""
    side = x.shape[-1] // scale * scale
    high = fgssl.to_float(x[:, :, :side, :side])
    return high, shrink(high, scale)


@torch.no_grad()
def draw_samples(generator, images, scale, device, file):
    """Six images in four rows: low, bicubic, generated, true; PSNR and SSIM under the two guesses."""
    high, low = pair(torch.from_numpy(spread(images, 6)).to(device), scale)
    guesses = [to_8_bits(x) for x in (enlarge(low, scale), generator(low))]
    true, captions = brightness(high, scale), [[]]
    for y in (brightness(x, scale) for x in guesses):
        captions.append([f"{p:.2f} dB  {s:.3f}" for p, s in zip(psnr(y, true), ssim(y, true))])
    pixels = F.interpolate(low, scale_factor=scale, mode="nearest")
    fgssl.grid(file, [pixels, *guesses, high], ("low", "bicubic", "generated", "true"),
               captions=captions)


# ------------------------------------------------------------------------------------------------
# --upscale: use a trained generator
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def enlarge_in_tiles(generator, low, tile=160):
    """generator(low) for an image of any size, in memory for a tile alone.

    Tiles overlap by the generator's reach, so that no seam can be seen: each pixel is as if the
    image had been enlarged whole.
    """
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
    state = fgssl.read_checkpoint(checkpoint)
    if not {"ema", "args"} <= state.keys():
        raise ValueError(f"{checkpoint} holds no generator; wanted a checkpoint of train_srgan.py")
    run = argparse.Namespace(**state["args"])
    generator = Generator(run.blocks, run.width, run.scale)
    fgssl.load_weights(generator, state["ema"], f"ema in {checkpoint}")
    device, _ = fgssl.device_and_precision("fp32")
    generator = freeze(generator).to(device, memory_format=torch.channels_last)
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"no image {file}")
        try:
            with Image.open(file) as image:
                low = np.array(fgssl.to_rgb(fgssl.upright(image)))
        except Exception as error:  # Pillow's readers raise errors of many kinds
            raise ValueError(f"cannot read image {file}: {error}") from error
        low = fgssl.to_float(torch.from_numpy(low).permute(2, 0, 1)[None].to(device))
        high = fgssl.to_image(enlarge_in_tiles(generator, low)[0])
        target = Path(out or file.parent) / f"{file.stem}_x{run.scale}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        high.save(target)
        print(f"{file} {low.shape[3]} x {low.shape[2]} -> {target} {high.width} x {high.height}")


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/srgan", size=64, arch="resnet10", epochs=60,
                     batch=16, lr=1e-3, seed=0)
    p.add_argument("--scale", type=int, choices=(2, 4, 8), default=4, help="enlargement")
    p.add_argument("--blocks", type=fgssl.number(int, 1), default=6,
                   help="residual blocks of the generator; 16 in the paper, for GPUs")
    p.add_argument("--width", type=fgssl.number(int, 1), default=48,
                   help="channels of the generator; 64 in the paper")
    p.add_argument("--discriminator", choices=("resnet", "vgg"), default="resnet",
                   help="resnet is --arch, an encoder as in the other trainers; vgg the paper's own")
    p.add_argument("--warmup", type=fgssl.number(int, 0), default=30,
                   help="how many of the epochs are the pixel phase")
    p.add_argument("--content", choices=("pixel", "features"), default="pixel",
                   help="what the adversarial phase compares fake and high by: mean absolute "
                        "difference, or features of the discriminator or of --content-from")
    p.add_argument("--content-from", metavar="FILE",
                   help="checkpoint of an encoder, or torchvision's VGG19 weights, for the features")
    p.add_argument("--content-weight", type=fgssl.number(float, 0), default=1.0,
                   help="of the content loss in the adversarial phase")
    p.add_argument("--adversarial-weight", type=fgssl.number(float, 0), default=5e-3,
                   help="of the adversarial loss; higher is sharper and further from the truth")
    p.add_argument("--lr-generator", type=fgssl.number(float, above=0), default=2e-4,
                   help="peak learning rate in the adversarial phase")
    p.add_argument("--lr-discriminator", type=fgssl.number(float, above=0), default=5e-4,
                   help="the discriminator's")
    p.add_argument("--penalty", type=fgssl.number(float, 0), default=0.0, help="weight of R1")
    p.add_argument("--smooth", type=fgssl.number(float, 0, 0.5), default=0.0, help="label smoothing")
    p.add_argument("--loss", default="logistic")
    p.add_argument("--noise", type=float, default=0)
    p.add_argument("--joint", type=int, default=1)
    p.add_argument("--match", type=int, default=0)
    p.add_argument("--eval-every", type=fgssl.number(int, 1), default=5,
                   help="epochs between measurements on val")
    p.add_argument("--upscale", nargs="+", metavar="IMAGE", help="enlarge these, and do no more")
    p.add_argument("--from", dest="source", metavar="CHECKPOINT", help="the generator for --upscale")
    args = p.parse_args(argv, argparse.Namespace(out=None))
    if args.upscale:
        if args.source is None:
            p.error("--upscale wants a generator: --from out/srgan/checkpoint.pt")
        return args
    args = fgssl.parse(p, argv)
    if args.warmup > args.epochs:
        p.error(f"--warmup {args.warmup} is more than all --epochs {args.epochs}")
    if args.size % args.scale:
        p.error(f"--size {args.size} is not a multiple of --scale {args.scale}")
    if args.content_from and args.content != "features":
        p.error("--content-from is used by --content features only")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.upscale:
        return upscale(args.upscale, args.source, args.out)
    device, autocast = fgssl.device_and_precision(args.precision)
    data = fgssl.load_data(args.data, args.root, args.skip_bad, args.workers)
    train = data.cached("train", fgssl.cache_side(args.size))
    val = data.cached("val", fgssl.cache_side(args.size))
    per_epoch = fgssl.steps_per_epoch(len(train.images), args.batch)
    warm, total = args.warmup * per_epoch, args.epochs * per_epoch

    torch.manual_seed(args.seed)
    encoder, head = discriminator_for(args)
    discriminator = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)
    generator = Generator(args.blocks, args.width, args.scale)
    generator.to(device, memory_format=torch.channels_last)
    ema = freeze(copy.deepcopy(generator))                   # what is measured, drawn and kept
    content = encoder
    if args.content_from:
        content = freeze(content_network(args.content_from, args.arch)).to(device)
    phi = nn.Linear(192, encoder.dim)
    g_optimizer = torch.optim.AdamW(generator.parameters(), args.lr, weight_decay=0)
    d_optimizer = torch.optim.AdamW([*discriminator.parameters(), *phi.parameters()], args.lr_discriminator, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(args.seed)           # of the crops
    state = dict(encoder=encoder, head=head, generator=generator, ema=ema,
                 g_optimizer=g_optimizer, d_optimizer=d_optimizer)

    random_init = fgssl.knn_check(encoder, train, val, args.size, device, autocast)  # the yardstick
    out, step = Path(args.out), 0
    if args.resume:
        step = fgssl.load(out / "checkpoint.pt", rng, **state)
    log = fgssl.Log(args, total, step, device, kernels.status(), args.batch)
    drawn = val.images if len(val.images) else train.images
    if step == 0:
        draw_samples(ema, drawn, args.scale, device, out / "samples.png")
        log.note(0, knn=random_init, random_init=random_init)
    stop, saved = fgssl.StopSignal(), time.time()

    order = fgssl.batches(len(train.images), args.batch, args.seed, step)
    while step < total:
        step += 1
        lr, d_lr = learning_rates(step, warm, total, args)
        for optimizer, rate in ((g_optimizer, lr), (d_optimizer, d_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate
        x = fgssl.fetch(train.images, next(order), device)   # (B, 3, C, C)
        high = random_crops(x, args.size, rng)
        low = shrink(high, args.scale)
        with autocast:
            fake = generator(low)                            # once a step, for both networks
        if step <= warm:
            terms = dict(pixel=(1.0, F.l1_loss(fake, high)))
            shown = {}
        else:
            discriminator.train().requires_grad_(True)
            noise = lambda: args.noise * torch.randn(high.shape, generator=rng) if args.noise else 0
            both = fgssl.normalize(torch.cat([high + noise(), fake.detach() + noise()]))
            h = None
            with autocast:
                if args.joint:
                    h = encoder(both.contiguous(memory_format=torch.channels_last)); logits = head(h)
                else:
                    logits = torch.cat([discriminator(b.contiguous(memory_format=torch.channels_last)) for b in both.flip(0).chunk(2)]).flip(0)
            logit_high, logit_fake = logits.float().chunk(2)
            if args.match:
                c = phi(F.adaptive_avg_pool2d(low, 8).flatten(1) - 0.5)
                hh, hf = h.float().chunk(2)
                dot = lambda a, b: (a * b).sum(1, keepdim=True)
                wrong = logit_high + dot(hh, c.roll(1, 0))
                logit_high, logit_fake = logit_high + dot(hh, c), logit_fake + dot(hf, c)
                d_loss = (F.softplus(-logit_high) + .5 * F.softplus(wrong) + .5 * F.softplus(logit_fake)).mean()
            elif args.loss == "logistic":
                d_loss = discriminator_loss(logit_high, logit_fake, args.smooth)
            elif args.loss == "relativistic":
                d_loss = F.softplus(logit_fake - logit_high).mean()
            elif args.loss == "hinge":
                d_loss = (F.relu(1 - logit_high) + F.relu(1 + logit_fake)).mean()
            total_d = d_loss
            if args.penalty and step % 16 == 0:
                discriminator.eval()
                with autocast:
                    r1 = gradient_penalty(discriminator, fgssl.normalize(high).contiguous(memory_format=torch.channels_last))
                total_d = d_loss + 16 * args.penalty / 2 * r1.float()
            d_optimizer.zero_grad(set_to_none=True)
            total_d.backward()
            d_optimizer.step()

            freeze(discriminator)
            with autocast:
                judged = fgssl.normalize(fake + noise()).contiguous(memory_format=torch.channels_last)
                if not args.joint:
                    discriminator.train()
                h = encoder(judged)
                logit = head(h)
                if args.match:
                    logit = logit.float() + (h.float() * c.detach()).sum(1, keepdim=True)
                if args.loss == "relativistic":
                    adversarial = F.softplus(logit_high.detach() - logit.float()).mean()
                elif args.loss == "hinge":
                    adversarial = -logit.float().mean()
                else:
                    adversarial = adversarial_loss(logit.float())
                if args.content == "pixel":
                    distance = F.l1_loss(fake, high)
                else:
                    distance = feature_loss(content, fake, high)
            terms = {args.content: (args.content_weight, distance),
                     "adversarial": (args.adversarial_weight, adversarial)}
            shown = dict(discriminator=d_loss, chance=2 * math.log(2),
                         D_high=logit_high.sigmoid().mean(), D_fake=logit_fake.sigmoid().mean())
            if args.penalty and step % 16 == 0: shown["r1"] = r1
        loss = sum(weight * value for weight, value in terms.values())
        g_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        g_optimizer.step()
        follow(ema, generator, step)

        leave = step == total or bool(stop)
        save = leave or time.time() - saved > 60
        if save or log.due(step):
            true = brightness(high, args.scale)
            closer, bicubic = (psnr(brightness(y, args.scale), true).mean().item() for y in (to_8_bits(fake.detach()), to_8_bits(enlarge(low, args.scale))))
            values = {}
            for name, (weight, value) in terms.items():
                values |= {name: value.item(), f"{name}_weight": weight}
            values |= {k: float(v) for k, v in shown.items()}
            log(step, **values, psnr=closer, bicubic=bicubic, lr=lr)
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(step)
        if save:
            fgssl.save(out / "checkpoint.pt", step, args, rng, **state)
            saved = time.time()
        if step in (warm, total) or step % (args.eval_every * per_epoch) == 0:
            knn = fgssl.knn_check(encoder, train, val, args.size, device, autocast)
            log.note(step, **closeness(ema, val.images, args.scale, device, autocast),
                     knn=knn, random_init=random_init)
        if step in (warm, total):
            draw_samples(ema, drawn, args.scale, device, out / "samples.png")
        if leave:
            break

    log.curves(val_psnr="bicubic_psnr", val_ssim="bicubic_ssim", discriminator="chance", knn="random_init")
    if step < total:
        stop.leave(args)
    print(f"done: {out}/checkpoint.pt. Next: python linear_eval.py {out}/checkpoint.pt")


if __name__ == "__main__":
    main()
