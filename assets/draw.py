"""Draws assets/ways.png and assets/views.png: what the three methods see and do, by networks that
were trained here, and the views of train_simclr.py.

    python assets/draw.py              # after the default runs of the three trainers
    python assets/draw.py out/reproduce/toy:7 out/reproduce/grocery:30

A row for each FOLDER:IMAGE. FOLDER holds the runs, in folders named simclr, jigsaw and srgan; IMAGE
is a number among val's. Writes assets/ways.png and assets/views.png.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fgssl  # noqa: E402
import kernels  # noqa: E402
import pictures  # noqa: E402
import train_jigsaw  # noqa: E402
import train_simclr  # noqa: E402
from methods.srgan import load_generator  # noqa: E402
from methods.super_resolution import super_resolve  # noqa: E402
from methods.views import VIEWS  # noqa: E402

COLUMNS = ("photograph", "view", "another view", "puzzle", "as solved", "small", "enlarged", "true")


def row(images, files, args):
    """What stands under COLUMNS for one image, uint8 (1, 3, C, C): eight tensors (3, H, W)."""
    views = train_simclr.random_view(images.repeat(2, 1, 1, 1), args,
                                     torch.Generator().manual_seed(1))
    generator, _, _ = load_generator(files["srgan"])
    samples, _ = super_resolve(generator.eval(), images.numpy(), torch.device("cpu"))
    low, _, enlarged, true = (x[0] for x in samples)
    low = F.interpolate(low[None], scale_factor=generator.scale)[0]  # its pixels, to be seen
    return [fgssl.evaluation_view(images, args.size)[0], *views,
            *puzzle(files["jigsaw"], images.numpy()), low, enlarged, true]


def puzzle(file, images):
    """The first image as shuffled, and as the network of the checkpoint puts it together."""
    checkpoint = fgssl.read_checkpoint(file)
    args, perms = Namespace(**checkpoint["args"]), checkpoint["head"]["perms"]
    encoder, _ = fgssl.load_encoder(file)
    head = train_jigsaw.PuzzleHead(encoder.dim, args.hidden, perms)
    head.load_state_dict(checkpoint["head"])
    device, autocast = fgssl.device_and_precision("fp32")
    shuffled, _, answer = train_jigsaw.solve(encoder.to(device), head.to(device), images, args,
                                             Namespace(device=device, autocast=autocast))
    back = perms[answer].argsort(1)
    return shuffled[0], kernels.tile_shuffle(shuffled, back, args.grid, args.tile, image=True)[0]


def main(argv):
    ways, views = [], []
    for given in argv or ["out:0"]:
        folder, _, number = given.rpartition(":")
        files = {file.parent.name.lower().partition("_")[0]: file  # of several seeds, the first
                 for file in sorted(Path(folder).glob("*/checkpoint.pt"), reverse=True)}
        args = Namespace(**fgssl.read_checkpoint(files["simclr"])["args"])
        val = fgssl.load_data_for(args).cached("val", fgssl.cache_side(args.size))
        images = torch.from_numpy(val.images[int(number):int(number) + 1])
        ways.append(row(images, files, args))
        x = fgssl.evaluation_view(images, 96)
        views.append([x[0], *(view(x, torch.Generator().manual_seed(0))[0]
                              for view in VIEWS.values())])
    for name, rows, columns in (("ways", ways, COLUMNS), ("views", views, ("original", *VIEWS))):
        pictures.grid(ROOT / "assets" / f"{name}.png", rows, side=128,
                      captions=[()] * (len(rows) - 1) + [list(columns)])


if __name__ == "__main__":
    main(sys.argv[1:])
