"""SimCLR: of two views of one image, recognise the partner among the views of all others.

Each image of a batch of N is distorted twice at random. The encoder and a small head turn the 2N
views into unit vectors z, and the NT-Xent loss asks that every z lie closer to its partner than to
the other 2N - 2. What survives the distortion is what the encoder must see.

Chen, Kornblith, Norouzi & Hinton, A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020: Algorithm 1.

    python train_simclr.py                     # toy birds, a few minutes on a laptop's CPU
    python train_simclr.py --data my_photos    # any folder of images
    python train_simclr.py --resume            # after Ctrl-C

Writes out/simclr/: checkpoint.pt, log.jsonl, views.png (what the network is shown), curves.png.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fgssl
import kernels
import parallel
import pictures


class ProjectionHead(nn.Sequential):
    """h (B, dim) -> z (B, out), not yet of unit length: linear, batch-norm, ReLU, linear.

    The paper's section 4.2, with the batch-norm of its code. Thrown away after training: h, what
    the head is given, is the feature.
    """

    def __init__(self, dim, hidden, out):
        super().__init__(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden),
                         nn.ReLU(inplace=True), nn.Linear(hidden, out))


def random_view(x, args, rng):
    """One distorted view of every image: uint8 (B, 3, C, C) -> (B, 3, size, size) in [0, 1].

    The paper's appendix A: crop, mirror, colour jitter, greyscale, blur.
    """
    x = fgssl.random_resized_crop(x, args.size, rng, scale=(args.min_crop, 1.0))
    x = fgssl.hflip(x, rng)
    s = args.color
    x = fgssl.color_jitter(x, rng, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    x = fgssl.grayscale(x, rng, args.gray)
    return fgssl.gaussian_blur(x, rng, p=args.blur)


# ------------------------------------------------------------------------------------------------
# Seven views for subtle classes, after Al Breiki et al. 2021: x (B, 3, S, S) in [0, 1] -> the same.
# ------------------------------------------------------------------------------------------------


def gamma(x, rng, low=0.5, high=2.5):
    """Brightness bent, x ** g with g uniform: black and white stay as they are."""
    return x ** fgssl.to_device(fgssl.uniform(rng, low, high, len(x), 1, 1, 1), x.device)


def dropout(x, rng, fewest=5, most=20, share=(1 / 16, 1 / 8)):
    """Coarse dropout: 5 to 20 black rectangles, each side 1/16 to 1/8 of the image's."""
    n, size = len(x), x.shape[-1]

    def pair(low, high):                                     # for rows and for columns
        return torch.stack([fgssl.uniform(rng, low, high, n, most, 1) for _ in range(2)])

    side = pair(*share) * size
    start = pair(0, 1) * (size - side)
    centre = torch.arange(size) + 0.5
    rows, columns = ((start <= centre) & (centre < start + side)).float()  # (n, most, size) each
    holes = fgssl.integers(rng, fewest, most + 1, n, 1, 1)
    covered = (rows * (torch.arange(most)[:, None] < holes)).mT @ columns > 0
    return x.masked_fill(fgssl.to_device(covered[:, None], x.device), 0)


def rearranged(x, perm, grid):
    """Cut into grid x grid tiles, and put together in the order perm (B, grid * grid). A margin of
    fewer than `grid` pixels, right and below, stays."""
    tile = x.shape[-1] // grid
    moved = kernels.tile_shuffle(x, perm, grid, tile, torch.zeros(2, dtype=torch.long), image=True)
    x = x.clone()
    x[:, :, :grid * tile, :grid * tile] = moved
    return x


def swap(x, rng, grid=4):
    """Two tiles of a 4 x 4 grid change places."""
    perm = torch.arange(grid ** 2).repeat(len(x), 1)
    pair = fgssl.uniform(rng, 0, 1, len(x), grid ** 2).argsort(1)[:, :2]
    return rearranged(x, perm.scatter(1, pair, pair.flip(1)), grid)


def jigsaw(x, rng, grid=4):
    """The tiles of a 4 x 4 grid in any order, all equally likely."""
    return rearranged(x, fgssl.uniform(rng, 0, 1, len(x), grid ** 2).argsort(1), grid)


def dcl(x, rng, grid=7, reach=2):
    """Region confusion: tiles of a 7 x 7 grid, each a few places from home.

    Chen et al., CVPR 2019, section 3.1: within each row, tile i gets the key i + r, r uniform in
    [-reach, reach], and the row is sorted by the keys; then the same within each column. So no tile
    moves 2 reach places or more along either side.
    """
    def order():  # (n, grid, grid): of each line, which tile comes to each place
        keys = torch.arange(grid) + fgssl.uniform(rng, -reach, reach, len(x), grid, grid)
        return keys.argsort(2)

    home = torch.arange(grid ** 2).view(1, grid, grid).expand(len(x), -1, -1)
    by_rows = home.gather(2, order())
    return rearranged(x, by_rows.gather(1, order().mT).flatten(1), grid)


def region(x, rng, share=5 / 8):
    """A crop around the salient part: the square of 5/8 of the side that holds most gradient.

    No detector: an edge is where brightness changes, and the subject is where the edges are. Edges
    near the middle count more, for that is where photographers aim. Nothing is drawn.
    """
    size = x.shape[-1]
    side, y = round(share * size), fgssl.luma(x)
    edges = F.pad(y.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(y.diff(dim=3).abs(), (0, 1))
    from_middle = torch.linspace(-1, 1, size, device=x.device).square()
    edges = edges * torch.exp(-(from_middle[:, None] + from_middle))
    energy = F.avg_pool2d(edges, side, 1)[:, 0]              # of the square from each corner
    best = energy.flatten(1).argmax(1)
    top, left = best // energy.shape[2], best % energy.shape[2]
    whole = torch.full_like(top, side)
    return fgssl.crop_resize(x, top, left, whole, whole, size)


VIEWS = {"original": None, "gamma": gamma, "dropout": dropout, "swap": swap, "jigsaw": jigsaw,
         "dcl": dcl, "region": region}


def change_one(x, view, rng):
    """Change, by one of VIEWS, one of the two views of each image, the first as often as the
    second: x (2N, 3, S, S), views i and i + N of one image."""
    if VIEWS[view] is None:
        return x
    n = len(x) // 2
    rows = fgssl.to_device(torch.arange(n) + n * (fgssl.uniform(rng, 0, 1, n) < 0.5), x.device)
    return x.index_copy(0, rows, VIEWS[view](x[rows], rng))


def positive_rank(z):
    """The partner's mean place among the 2N - 1 other views, by similarity: 1 is best, N chance.

    z (2N, D), of unit length; at most 256 anchors are looked at.
    """
    anchors = torch.arange(min(len(z), 256), device=z.device)
    partner = (anchors + len(z) // 2) % len(z)
    sim = z[anchors] @ z.T
    sim[anchors, anchors] = -torch.inf
    return 1 + (sim > sim[anchors, partner][:, None]).sum(1).float().mean()


def embed(encoder, head, x, autocast):
    """Views (B, 3, S, S) in [0, 1] -> z (B, 128), of unit length."""
    x = fgssl.normalize(x).contiguous(memory_format=torch.channels_last)
    with autocast:
        z = head(encoder(x))
    return F.normalize(z.float(), dim=1)


# ------------------------------------------------------------------------------------------------
# Large batches: --chunk and --optimizer lars
# ------------------------------------------------------------------------------------------------


def two_pass(networks, averaged, x, args, autocast):
    """The loss of all views x (2N, 3, S, S) at once and its gradients, in the memory of a chunk.

    Adding up the gradients of small batches would not do: a view's negatives are the whole batch.
    But the loss needs only z of each view, so (Gao et al. 2021) z is made first, without a graph;
    the loss gives dL/dz; then chunk after chunk is embedded again, with the graph through which its
    rows of dL/dz go back. Batch-norm normalises each chunk by itself, both times alike; its running
    statistics learn in the second pass. networks: encoder and head; averaged: the same as
    `parallel.averaged` has them, for the last chunk. Returns z, loss.
    """
    buffers = [buffer for network in networks for buffer in network.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        z = torch.cat([embed(*networks, chunk, autocast) for chunk in x.split(args.chunk)])
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
    z.requires_grad_()
    loss = kernels.nt_xent(z, args.temperature, args.impl, parallel.group())
    loss.backward()
    *others, (last, dz_last) = zip(x.split(args.chunk), z.grad.split(args.chunk))
    for chunk, dz in others:
        embed(*networks, chunk, autocast).backward(dz)       # the parameters' gradients add up
    embed(*averaged, last, autocast).backward(dz_last)
    return z, loss


class LARS(torch.optim.Optimizer):
    """SGD with momentum that moves each layer by a share of the length of its weights.

    You, Gitman & Ginsburg 2017, Algorithm 1, for weights w with gradient g:
        ratio = trust |w| / (|g| + decay |w|);  v = momentum v + lr ratio (g + decay w);  w = w - v
    As in SimCLR's code, biases and batch-norm (whatever has one dimension) have neither ratio nor
    decay; and the ratio of weights that are all zero is 1.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.9, trust=1e-3):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                          trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                g, lr, decay = w.grad, group["lr"], group["weight_decay"]
                if w.dim() > 1:
                    length = w.norm()
                    ratio = group["trust"] * length / (g.norm() + decay * length).clamp(min=1e-30)
                    lr = lr * torch.where(length > 0, ratio, 1.0)
                    g = g + decay * w
                v = self.state[w].setdefault("momentum", torch.zeros_like(w))
                w.sub_(v.mul_(group["momentum"]).add_(lr * g))


def draw_views(images, args, file):
    """A picture of what the network is shown: eight images, and two views of each below."""
    rng = torch.Generator().manual_seed(args.seed)
    x = torch.from_numpy(images[:: max(1, len(images) // 8)][:8])
    views = change_one(random_view(x.repeat(2, 1, 1, 1), args, rng), args.view, rng)
    rows = [fgssl.evaluation_view(x, args.size), *views.chunk(2)]
    pictures.grid(file, rows, ("image", "view 1", "view 2"))


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/simclr", size=64, arch="resnet10", epochs=80,
                     batch=64, lr=1e-3, seed=0)
    p.add_argument("--temperature", type=fgssl.number(float, above=0), default=0.2,
                   help="of the softmax; small sets want 0.1 to 0.2: at 0.5 the loss hardly moves")
    p.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.4,
                   help="smallest share of the image that a view may show")
    p.add_argument("--color", type=fgssl.number(float, 0, 1.25), default=0.5,
                   help="strength of colour jitter; weaken it where colour tells classes apart")
    p.add_argument("--gray", type=fgssl.number(float, 0, 1), default=0.2,
                   help="probability of a grey view; lower it with --color")
    p.add_argument("--blur", type=fgssl.number(float, 0, 1), default=0.0,
                   help="probability of a blurred view; 0.5 in the paper, for 224 pixels")
    p.add_argument("--view", choices=VIEWS, default="original",
                   help="change one of the two views further, as the function of that name says")
    p.add_argument("--hidden", type=fgssl.number(int, 1), default=256,
                   help="width of the head's hidden layer")
    p.add_argument("--optimizer", choices=("adamw", "lars"), default="adamw",
                   help="lars is for batches of 1,024 and more; it wants --weight-decay 1e-6 and "
                        "an --lr of 0.3 for every 256 images")
    p.add_argument("--weight-decay", type=fgssl.number(float, 0), default=1e-4,
                   help="of the optimizer")
    p.add_argument("--chunk", type=fgssl.number(int, 2),
                   help="views whose graph a process has in memory at once: large batches in "
                        "little memory, for a third more time; batch-norm sees one chunk at a time")
    p.add_argument("--eval-every", type=fgssl.number(int, 1), default=5,
                   help="epochs between k-NN checks on val")
    args = fgssl.parse(p, argv)
    views = 2 * args.batch // parallel.ranks()
    if args.chunk and views % args.chunk:
        p.error(f"--chunk {args.chunk} does not divide the {views} views of a process")
    return args


def main(argv=None):
    args = arguments(argv)
    device, autocast = fgssl.device_and_precision(args.precision)
    with parallel.one_first():
        data = fgssl.data_of(args)
        train = data.cached("train", fgssl.cache_side(args.size))
        val = data.cached("val", fgssl.cache_side(args.size))
    per_epoch = fgssl.steps_per_epoch(len(train.images), args.batch)
    total = args.epochs * per_epoch

    torch.manual_seed(args.seed)
    encoder = fgssl.resnet(args.arch).to(device, memory_format=torch.channels_last)
    head = ProjectionHead(encoder.dim, args.hidden, 128).to(device)
    if args.sync_bn:
        parallel.synchronise(encoder, head)
    parameters = [*encoder.parameters(), *head.parameters()]
    if args.optimizer == "lars":
        optimizer = LARS(parameters, args.lr, args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay,
                                      fused=device.type == "cuda")
    rng = parallel.Generator().manual_seed(args.seed)        # of the views
    state = dict(encoder=encoder, head=head, optimizer=optimizer)
    encode, project = parallel.averaged(encoder, head)
    first = parallel.rank() == 0                             # alone draws and evaluates

    random_init = fgssl.knn_check(encoder, train, val, args.size, device, autocast)  # the yardstick
    out, step = Path(args.out), 0
    if args.resume:
        step = fgssl.load(out / "checkpoint.pt", rng, **state)
    log = fgssl.Log(args, total, step, device, kernels.status(), 2 * args.batch, "views")
    if step == 0 and first:
        draw_views(train.images, args, out / "views.png")
        log.note(0, knn=random_init, random_init=random_init)
    stop, saved = fgssl.StopSignal(), time.time()

    order = fgssl.batches(len(train.images), args.batch, args.seed, step)
    while step < total:
        step += 1
        lr = fgssl.cosine_lr(step, total, total // 20, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mine = parallel.share(next(order))                   # of the batch's images
        x = fgssl.fetch(train.images, mine, device)          # (N, 3, C, C), then two views of each
        x = fgssl.in_pieces(random_view, x.repeat(2, 1, 1, 1), args, rng)
        x = change_one(x, args.view, rng)
        optimizer.zero_grad(set_to_none=True)
        if args.chunk:
            z, loss = two_pass((encoder, head), (encode, project), x, args, autocast)
        else:
            z = embed(encode, project, x, autocast)          # (2N, 128)
            loss = kernels.nt_xent(z, args.temperature, args.impl, parallel.group())
            loss.backward()
        optimizer.step()

        leave, late = parallel.either(step == total or bool(stop), time.time() - saved > 60)
        save = leave or late
        if save or log.due(step):
            value = parallel.mean(loss)                      # the one wait for a GPU
            rank = positive_rank(parallel.gather(z)).item()
            log(step, loss=value, chance=math.log(2 * args.batch - 1), rank=rank, lr=lr)
            if not math.isfinite(value):
                fgssl.save(out / "diverged.pt", step, args, rng, **state)
                raise FloatingPointError(f"loss {value} at step {step}, learning rate {lr:.1e}. "
                                         f"This state is in {out}/diverged.pt; try a smaller --lr.")
        if save:
            fgssl.save(out / "checkpoint.pt", step, args, rng, **state)
            saved = time.time()
        if first and (step == total or step % (args.eval_every * per_epoch) == 0):
            knn = fgssl.knn_check(encoder, train, val, args.size, device, autocast)
            log.note(step, knn=knn, random_init=random_init)
        if leave:
            break

    if first:
        log.curves(loss="chance", knn="random_init")
    if step < total:
        stop.leave(args)
    print(f"done: {out}/checkpoint.pt. Next: python linear_eval.py {out}/checkpoint.pt")


if __name__ == "__main__":
    parallel.run(main)
