"""The networks of train_srgan.py: generator, discriminator, and VGG19 for a content loss."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import fgssl
from methods.super_resolution import enlarge


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

    The paper's SRResNet with later improvements: no batch-norm (EDSR, Lim et al. 2017), a single
    PixelShuffle after all convolutions (ESPCN, Shi et al. 2016), and a residual to bicubic
    interpolation (VDSR, Kim et al. 2016). Its last layer starts at zero: untrained, it is bicubic
    interpolation.
    """

    def __init__(self, blocks, width, scale):
        super().__init__()
        self.scale = scale
        self.reach = 2 * blocks + 4  # pixels of low, to each side, that an output depends on
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.detail = nn.Conv2d(width, 3 * scale ** 2, 3, padding=1)
        nn.init.zeros_(self.detail.weight)
        nn.init.zeros_(self.detail.bias)

    def trunk(self, low):
        """Features after each quarter of the blocks: four maps (B, width, h, w)."""
        h, maps = self.first(low), []
        x, n = h, len(self.blocks)
        for quarter in range(4):
            x = self.blocks[quarter * n // 4:(quarter + 1) * n // 4](x)
            maps.append(x)
        return [*maps[:3], h + self.last(x)]

    def stages(self, x):
        """The same for normalised images, as an encoder's."""
        return self.trunk(fgssl.denormalize(x))

    def forward(self, low):
        detail = F.pixel_shuffle(self.detail(self.trunk(low)[-1]), self.scale)
        return enlarge(low, self.scale) + detail.float()


class PaperDiscriminator(nn.Module):
    """Normalised images (B, 3, H, W) -> h (B, 512): the convolutions of the paper's figure 4, then
    global average pooling where the paper flattens, so that any size will do."""

    dim = 512

    def __init__(self):
        super().__init__()
        channels, stages = 3, []
        for width in (64, 128, 256, 512):
            stages.append(nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=channels == 3),
                nn.Identity() if channels == 3 else nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width), nn.LeakyReLU(0.2)))
            channels = width
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
        layers, channels = [], 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def stages(self, x):
        """One map, the paper's phi_5,4 at its scale: (B, 3, H, W) -> (B, 512, H / 16, W / 16)."""
        return [self.features(x) / 12.75]


class Head(nn.Module):
    """Two heads on an encoder's maps of images (`stages`): a real/fake logit and an embedding.

    truth (B,): a logit each, real above 0, from the global average pools of all stages. Real or
    fake mostly depends on texture, which early stages see best; a logit of the last stage alone, as
    in the paper, would leave it room for little else.
    z (B, 128), L2-normalised, for a second task without labels: to tell, as in SimCLR, which images
    are of one photograph. Jeong & Shin, ICLR 2021, train a discriminator so.

    widths: the channels of each stage; hidden: of a hidden layer before the logit, or 0 for none.
    """

    def __init__(self, widths, hidden=0):
        super().__init__()
        pooled, dim = sum(widths), widths[-1]
        layers = [nn.Linear(pooled, hidden), nn.LeakyReLU(0.2)] if hidden else []
        self.truth = nn.Sequential(*layers, nn.Linear(hidden or pooled, 1))
        self.match = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, 128))

    def forward(self, maps):
        pools = [each.float().mean((2, 3)) for each in maps]
        with torch.autocast(pools[0].device.type, enabled=False):  # in full precision
            return self.truth(torch.cat(pools, 1))[:, 0], F.normalize(self.match(pools[-1]), dim=1)


class Discriminator(nn.Module):
    """Images (B, 3, S, S) in [0, 1] -> truth (B,) and z (B, 128) of its `Head`."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return self.head(self.encoder.stages(fgssl.normalize(x)))


PAPER = "srgan-vgg"
fgssl.ENCODERS[PAPER] = PaperDiscriminator


def build_discriminator(args):
    """The Discriminator for --arch, untrained; the paper's has a hidden layer before its logit."""
    encoder = fgssl.ENCODERS[args.arch]()
    widths = fgssl.stage_widths(encoder, args.size)
    return Discriminator(encoder, Head(widths, hidden=1024 if args.arch == PAPER else 0))


def freeze(network):
    """Its parameters take no gradient; its batch-norm neither uses nor learns a batch."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema, generator, step):
    """Move an exponential moving average of the generator's weights: over about the last 1,000
    steps, or over a tenth of all while they are fewer."""
    for mean, value in zip(ema.parameters(), generator.parameters()):
        mean.lerp_(value, max(1e-3, 9 / (step + 9)))


def load_generator(file):
    """The generator (its EMA) in a checkpoint of train_srgan.py; a function that makes the same
    untrained; and the arguments of the run, with arch "generator". UserError for another file."""
    state = fgssl.read_checkpoint(file)
    if not {"ema", "args"} <= state.keys():
        raise fgssl.UserError(f"{file} holds no generator: it is no checkpoint of train_srgan.py")
    args = state["args"]
    build = functools.partial(Generator, args["blocks"], args["width"], args["scale"])
    generator = build()
    fgssl.load_weights(generator, state["ema"], f"ema in {file}")
    return generator, build, args | {"arch": "generator"}


def load_content_encoder(file, arch):
    """A network to compare images by: one of our encoders, or torchvision's VGG19 weights."""
    state = fgssl.read_checkpoint(file)
    if "features.34.weight" not in state:                    # a bare state dict is of --arch
        return fgssl.load_encoder(file, None if "args" in state else arch)[0]
    network = VGG19()
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    fgssl.load_weights(network, state, file)
    return network
