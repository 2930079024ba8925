"""Jigsaw: predict which of P known permutations shuffled the tiles of an image.

Each image is cut into a grid of tiles, with a random gap between them, and the tiles are shuffled
by one of P permutations. The encoder sees every tile alone; a small head sees the features of all
tiles in their shuffled order and predicts the permutation. To place a tile, the encoder must
recognise which part of the object it shows.

Noroozi & Favaro, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles, 2016.

    python train_jigsaw.py                     # toy birds, a few minutes on a laptop's CPU
    python train_jigsaw.py --data my_photos    # any folder of images
    python train_jigsaw.py --resume            # after Ctrl-C

Writes out/jigsaw/: checkpoint.pt, log.jsonl, puzzles.png (shuffled, solved, true), curves.png.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fgssl
import kernels
import pictures
from methods.optimizers import Muon


def permutation_set(grid, count, seed):
    """`count` permutations of grid * grid tiles that lie far apart: int64 (count, grid * grid).

    Greedy: after a random first, always the permutation whose least Hamming distance to those
    chosen is greatest; ties go to the greatest sum of distances, then to chance. Candidates: all
    permutations up to a 3 x 3 grid, else 100,000 random ones. Noroozi & Favaro 2016, Algorithm 1,
    but theirs maximises the mean distance, which leaves pairs that differ in 2 places of 9. Raises
    ValueError where there are fewer than `count`.
    """
    rng, k = np.random.default_rng(seed), grid * grid
    if grid <= 3:
        pool = np.array(list(itertools.permutations(range(k))), np.uint8)
    else:
        pool = np.unique(rng.random((100_000, k)).argsort(1).astype(np.uint8), axis=0)
    if count > len(pool):
        raise fgssl.UserError(f"{count} permutations of {grid} x {grid} tiles, but there are "
                              f"{len(pool)}: lower --perms, or raise --grid.")
    pool = rng.permutation(pool).T.copy()                    # (k, candidates), in random order
    least, total = np.full(pool.shape[1], k, np.uint8), np.zeros(pool.shape[1], np.int32)
    chosen = [0]
    while len(chosen) < count:
        distance = (pool != pool[:, chosen[-1:]]).sum(0, dtype=np.uint8)
        np.minimum(least, distance, out=least)               # 0 for those chosen
        total += distance
        furthest = np.flatnonzero(least == least.max())
        chosen.append(furthest[total[furthest].argmax()])
    return pool[:, chosen].T.astype(np.int64)


class PuzzleHead(nn.Module):
    """Features of the K tiles of a puzzle, in shuffled order (B, K, dim) -> logits (B, P).

    One layer for each tile alone, then two for all tiles together: the paper's fc6 to fc8, with
    batch-norm. Keeps the permutations (P, K), so that a checkpoint holds what its logits stand for.
    """

    def __init__(self, dim, hidden, perms):
        super().__init__()
        count, tiles = perms.shape
        self.register_buffer("perms", perms)
        self.each = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden),
                                  nn.ReLU(inplace=True))
        self.all = nn.Sequential(nn.Linear(tiles * hidden, 2 * hidden, bias=False),
                                 nn.BatchNorm1d(2 * hidden), nn.ReLU(inplace=True),
                                 nn.Linear(2 * hidden, count))

    def forward(self, h):
        return self.all(self.each(h.flatten(0, 1)).view(len(h), -1))


def draw_puzzles(n, perms, args, rng):
    """Q puzzles of each of n images: target (n, Q), the index of its permutation; perm (n, Q, K),
    the permutation; offset (n, K, 2), the place of each tile in its cell."""
    target = fgssl.integers(rng, 0, len(perms), n, args.puzzles)
    max_offset = args.size // args.grid - args.tile
    offset = fgssl.integers(rng, 0, max_offset + 1, n, args.grid ** 2, 2)
    return target, perms[target], offset


def random_view(x, args, rng):
    """One random view of every image, to be cut: uint8 (B, 3, C, C) -> (B, 3, size, size)."""
    x = fgssl.random_resized_crop(x, args.size, rng, scale=(args.min_crop, 1.0))
    return fgssl.grayscale(fgssl.hflip(x, rng), rng, args.gray)


def reorder(h, perm):
    """The features of all Q puzzles, from those of the first: tiles are encoded once.

    h (B, K, D): tile k of image b is source tile perm[b, 0, k]; perm (B, Q, K) -> (B Q, K, D).
    """
    place = perm[:, :1].argsort(2).expand_as(perm).gather(2, perm).flatten(1)  # (B, Q K)
    every = fgssl.to_device(place, h.device)[:, :, None].expand(-1, -1, h.shape[2])
    return h.gather(1, every).view(-1, *h.shape[1:])


def cut_tiles(x, perm, offset, args, rng=None):
    """What the encoder is shown: x (B, 3, S, S) in [0, 1] -> (B K, 3, t, t), normalised.

    With rng, the colours of each tile are jittered on their own, so that they do not match its
    neighbours'. --tile-norm normalises each tile by its own mean and std, as the paper does.
    """
    s = args.color
    color = rng and fgssl.jitter_matrix(perm.shape, rng, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    norm = (None, None) if args.tile_norm else (fgssl.MEAN, fgssl.STD)
    cut = x, perm, args.grid, args.tile, offset
    tiles = kernels.tile_shuffle(*cut, color, *norm, impl=args.impl).flatten(0, 1)
    if not args.tile_norm:
        return tiles
    mean, std = (f((1, 2, 3), keepdim=True) for f in (tiles.mean, tiles.std))
    return (tiles - mean) / (std + 0.02)                     # a flat tile stays flat


def main(argv=None):
    args = arguments(argv)
    run = fgssl.Run(args)
    encoder = fgssl.ENCODERS[args.arch]().to(run.device, memory_format=torch.channels_last)
    perms = torch.from_numpy(permutation_set(args.grid, args.perms, args.seed))
    head = PuzzleHead(encoder.dim, args.hidden, perms).to(run.device)
    optimizer = Muon([*encoder.parameters(), *head.parameters()], args.lr, args.weight_decay)
    encode, classify = run.wrap(encoder, head)
    run.start(encoder=encoder, head=head, optimizer=optimizer)
    shown = run.val.images if len(run.val.images) else run.train.images[:1000]
    if run.begins():
        draw_solutions(*solve(encoder, head, shown, args, run), perms, args, run.out)
        print(f"look at {run.out}/puzzles.png: shuffled, as the network solves them, true")

    for step, x in run:                                      # x: uint8 (B, 3, C, C)
        lr = fgssl.cosine_lr(step, run.total, run.total // 20, args.lr)
        fgssl.set_lr(optimizer, lr)
        x = fgssl.map_chunks(random_view, x, args, run.rng)
        target, perm, offset = draw_puzzles(len(x), perms, args, run.rng)
        tiles = cut_tiles(x, perm[:, 0], offset, args, run.rng)
        with run.autocast:
            h = encode(tiles.contiguous(memory_format=torch.channels_last))
            logits = classify(reorder(h.unflatten(0, (len(x), -1)), perm))
        target = fgssl.to_device(target.flatten(), run.device)  # (B Q,), as logits (B Q, P)
        loss = F.cross_entropy(logits.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if run.due():
            run.log(loss=loss, chance=math.log(args.perms), lr=lr,
                    solved=fgssl.accuracy(logits.argmax(1), target))
        if run.evaluates():
            shuffled, target, answer = solve(encoder, head, shown, args, run)
            draw_solutions(shuffled, target, answer, perms, args, run.out)
            if len(run.val.images):
                run.note(val_puzzles=fgssl.accuracy(answer, target), n=len(target),
                         chance=100 / args.perms)
            run.note(**run.knn())
    run.finish("--layer best", loss="chance", val_puzzles="chance", knn="random_init")


@torch.no_grad()
def solve(encoder, head, images, args, run):
    """Give each image one puzzle, always the same: uint8 (N, 3, C, C) -> three results.

    The shuffled image (N, 3, g t, g t); the indices of the true and of the predicted permutation,
    (N,), on the CPU. Nothing is jittered or learned: encoder and head are in eval mode.
    """
    was_training = encoder.training
    encoder.eval(), head.eval()
    rng, results = torch.Generator().manual_seed(args.seed), []
    for first in range(0, len(images), 256):
        x = fgssl.fetch(images, slice(first, first + 256), run.device)
        x = fgssl.evaluation_view(x, args.size)
        target, perm, offset = draw_puzzles(len(x), head.perms.cpu(), args, rng)
        tiles = cut_tiles(x, perm[:, 0], offset, args)
        with run.autocast:
            logits = head(encoder(tiles).unflatten(0, (len(x), -1)))
        cut = x, perm[:, 0], args.grid, args.tile, offset
        shuffled = kernels.tile_shuffle(*cut, image=True, impl=args.impl)
        results.append((shuffled, target[:, 0], logits.argmax(1).cpu()))
    encoder.train(was_training), head.train(was_training)
    return [torch.cat(parts) for parts in zip(*results)]


def draw_solutions(shuffled, target, answer, perms, args, out):
    """A picture of eight puzzles: shuffled, as the network solves them, and true."""
    shuffled, target, answer = (v[:: max(1, len(v) // 8)][:8] for v in (shuffled, target, answer))
    rows = [shuffled]
    for solution in (answer, target):
        rows.append(kernels.tile_shuffle(shuffled, perms[solution].argsort(1), args.grid, args.tile,
                                         image=True, impl=args.impl))  # edge to edge: no offset
    pictures.grid(out / "puzzles.png", [x.cpu() for x in rows], ("shuffled", "solved", "true"))


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/jigsaw", size=64, arch="resnet10", epochs=80,
                     batch=64, lr=0.04, seed=0)
    p.add_argument("--grid", type=fgssl.number(int, 2, 5), default=3, help="tiles a side")
    p.add_argument("--tile", type=fgssl.number(int, 1),
                   help="side of a tile in pixels; the rest of its cell is the gap, without which "
                        "edges give the answer away (default: 4/5 of the cell)")
    p.add_argument("--perms", type=fgssl.number(int, 2, 10000), default=100,
                   help="permutations to tell apart")
    p.add_argument("--puzzles", type=fgssl.number(int, 1), default=8,
                   help="puzzles made of each image a step; its tiles are encoded once for all")
    p.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.6,
                   help="smallest fraction of the image's area that a puzzle shows")
    p.add_argument("--color", type=fgssl.number(float, 0, 1.25), default=0.5,
                   help="strength of colour jitter, each tile its own; 0 where colour is evidence "
                        "of the class")
    p.add_argument("--gray", type=fgssl.number(float, 0, 1), default=0.2,
                   help="probability of a grey puzzle; lower it with --color")
    p.add_argument("--tile-norm", action="store_true",
                   help="normalise each tile by its own mean and std, as the paper does")
    p.add_argument("--hidden", type=fgssl.number(int, 1), default=128,
                   help="width of the head's hidden layers")
    p.add_argument("--weight-decay", type=fgssl.number(float, 0), default=1e-4,
                   help="of the optimizer")
    args = fgssl.parse(p, argv)
    cell = args.size // args.grid
    args.tile = args.tile or cell * 4 // 5
    if args.tile > cell:
        p.error(f"--tile {args.tile} does not fit: a grid of {args.grid} cuts {args.size} pixels "
                f"into cells of {cell}")
    return args


if __name__ == "__main__":
    fgssl.launch(main)
