"""SimCLR: recognise which two views come from the same image.

Each image of a batch of N is distorted twice at random. The encoder and a small head map the 2N
views to unit vectors z, and the NT-Xent loss asks that every z lie closer to its partner than to
the other 2N - 2. The encoder must represent what the distortions leave unchanged.

Chen, Kornblith, Norouzi & Hinton, A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020: Algorithm 1. Yeh et al., Decoupled Contrastive Learning, ECCV 2022:
the form of the loss that is the default.

    python train_simclr.py                     # toy birds, a few minutes on a laptop's CPU
    python train_simclr.py --data my_photos    # any folder of images
    python train_simclr.py --resume            # after Ctrl-C

Writes out/simclr/: checkpoint.pt, log.jsonl, views.png (what the network is shown), curves.png.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

import fgssl
import kernels
import parallel
import pictures
from methods.large_batch import two_pass
from methods.optimizers import OPTIMIZERS
from methods.views import VIEWS, distort_one_view


def random_view(x, args, rng, size=None):
    """One distorted view of every image: uint8 (B, 3, C, C) -> (B, 3, size, size) in [0, 1].

    The paper's appendix A: crop, mirror, colour jitter, greyscale, blur. size: args.size.
    """
    x = fgssl.random_resized_crop(x, size or args.size, rng, scale=(args.min_crop, 1.0))
    x = fgssl.recolor(fgssl.hflip(x, rng), args, rng)
    return fgssl.gaussian_blur(x, rng, p=args.blur)


def two_views(x, args, rng, size=None):
    """Two views of every image: uint8 (N, 3, C, C) -> (2N, 3, size, size), rows i and i + N."""
    view = functools.partial(random_view, size=size)
    x = fgssl.map_chunks(view, x.repeat(2, 1, 1, 1), args, rng)
    return x if args.view == "original" else distort_one_view(x, args.view, rng, args.impl)


class ProjectionHead(nn.Sequential):
    """h (B, dim) -> z (B, out), not yet L2-normalised: linear, batch-norm, ReLU, linear.

    The paper's section 4.2, with the batch-norm of its code. Thrown away after training: its input
    h is the feature.
    """

    def __init__(self, dim, hidden, out):
        super().__init__(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden),
                         nn.ReLU(inplace=True), nn.Linear(hidden, out))


def embed(encoder, head, x, autocast):
    """Views (B, 3, S, S) in [0, 1] -> z (B, 128), L2-normalised."""
    with autocast:
        z = head(encoder(fgssl.normalize(x)))
    return F.normalize(z.float(), dim=1)


def main(argv=None):
    args = arguments(argv)
    run = fgssl.Run(args, views=2)
    encoder = fgssl.ENCODERS[args.arch]().to(run.device, memory_format=torch.channels_last)
    head = ProjectionHead(encoder.dim, args.hidden, 128).to(run.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = OPTIMIZERS[args.optimizer](parameters, args.lr, weight_decay=args.weight_decay)
    encode, project = run.wrap(encoder, head)
    nt_xent = functools.partial(kernels.nt_xent, temperature=args.temperature, impl=args.impl,
                                group=run.group, decoupled=args.loss == "decoupled")
    run.start(encoder=encoder, head=head, optimizer=optimizer)
    if run.begins():
        draw_views(run.train.images, args, run.out / "views.png")

    for step, x in run:                                      # x: uint8 (N, 3, C, C)
        lr = fgssl.cosine_lr(step, run.total, run.total // 20, args.lr)
        fgssl.set_lr(optimizer, lr)
        size = fgssl.view_size(step, run.total, args.first_size, args.size)
        x = two_views(x, args, run.rng, size)                # (2N, 3, size, size)
        optimizer.zero_grad(set_to_none=True)
        if args.chunk:
            z, loss = two_pass(embed, (encoder, head), (encode, project), x, run.autocast,
                               args.chunk, nt_xent)
        else:
            z = embed(encode, project, x, run.autocast)      # (2N, 128)
            loss = nt_xent(z)
            loss.backward()
        optimizer.step()
        if run.due():
            columns = 2 * args.batch - (2 if args.loss == "decoupled" else 1)  # of the softmax
            run.log(loss=loss, chance=math.log(columns), lr=lr,
                    positive_rank=positive_rank(parallel.gather(z)), chance_rank=args.batch)
        if run.evaluates():
            run.note(**run.knn())
    run.finish(loss="chance", knn="random_init")


def positive_rank(z):
    """The partner's mean rank among the 2N - 1 other views, by similarity: 1 is best, N chance.

    z (2N, D), L2-normalised; the mean over at most 256 anchors.
    """
    anchors = torch.arange(min(len(z), 256), device=z.device)
    positive = (anchors + len(z) // 2) % len(z)
    sim = z[anchors] @ z.T
    sim[anchors, anchors] = -torch.inf
    closer = sim > sim[anchors, positive][:, None]
    return (1 + closer.sum(1).float() + 0 * sim[anchors, positive]).mean()  # NaN of NaN


def draw_views(images, args, file):
    """A picture of what the network is shown: eight images, and two views of each below."""
    rng = torch.Generator().manual_seed(args.seed)
    device, _ = fgssl.device_and_precision(args.precision)
    x = fgssl.fetch(images[:: max(1, len(images) // 8)], slice(8), device)
    rows = [fgssl.evaluation_view(x, args.size), *two_views(x, args, rng).chunk(2)]
    pictures.grid(file, [x.cpu() for x in rows], ("image", "view 1", "view 2"))
    print(f"look at {file}: what the network is shown")


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/simclr", size=64, arch="resnet10", epochs=30,
                     batch=64, lr=0.04, seed=0)
    p.add_argument("--loss", choices=("decoupled", "nt-xent"),
                   help="nt-xent: SimCLR's own, in which a view that has found its partner teaches "
                        "little; decoupled: it teaches as much as any (default)")
    p.add_argument("--temperature", type=fgssl.number(float, above=0), default=0.1,
                   help="of the softmax; at 0.5, ImageNet's, the loss of a small set hardly moves")
    p.add_argument("--first-size", type=fgssl.number(int, 8, 1024),
                   help="side of the first views; they grow to --size, and cost less until then "
                        "(default: half of --size)")
    p.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.4,
                   help="smallest fraction of the image's area that a view shows")
    p.add_argument("--color", type=fgssl.number(float, 0, 1.25), default=0.5,
                   help="strength of colour jitter; weaken it where colour tells classes apart")
    p.add_argument("--gray", type=fgssl.number(float, 0, 1), default=0.2,
                   help="probability of a grey view; lower it with --color")
    p.add_argument("--blur", type=fgssl.number(float, 0, 1), default=0.0,
                   help="probability of a blurred view; 0.5 in the paper, for 224 pixels")
    p.add_argument("--view", choices=("original", *VIEWS), default="original",
                   help="distort one of the two views further: see methods/views.py")
    p.add_argument("--hidden", type=fgssl.number(int, 1), default=256,
                   help="width of the head's hidden layer")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="muon",
                   help="adamw wants an --lr of 1e-3; lars is for batches of 1,024 and more, with "
                        "--weight-decay 1e-6 and an --lr of 0.3 for every 256 images")
    p.add_argument("--weight-decay", type=fgssl.number(float, 0), default=1e-4,
                   help="of the optimizer")
    p.add_argument("--chunk", type=fgssl.number(int, 2),
                   help="views whose graph a process holds at once: large batches in little "
                        "memory, for a third more time; batch-norm sees one chunk at a time")
    args = fgssl.parse(p, argv)
    if args.first_size is None:                              # an older run had one size
        args.first_size = args.size if args.resume else args.size // 2
    if args.loss is None:                                    # and the paper's loss
        args.loss = "nt-xent" if args.resume else "decoupled"
    views = 2 * args.batch // parallel.ranks()
    if args.chunk and views % args.chunk:
        p.error(f"--chunk {args.chunk} does not divide the {views} views of a process")
    return args


if __name__ == "__main__":
    fgssl.launch(main)
