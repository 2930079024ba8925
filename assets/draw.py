"""Draws the README's picture: toy birds, and what SimCLR is shown of each.

    python assets/draw.py            # writes assets/views.png; draws the toy set first, if need be
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fgssl  # noqa: E402
import pictures  # noqa: E402
import train_simclr  # noqa: E402


def main():
    args = train_simclr.arguments(["--out", str(ROOT / "assets"), "--size", "96"])
    images, labels, _ = fgssl.load_data("toy").cached("train", fgssl.cache_side(args.size))
    one_a_species = [int((labels == label).argmax()) for label in range(0, 20, 2)]
    x = torch.from_numpy(images[one_a_species])
    views = train_simclr.random_view(x.repeat(2, 1, 1, 1), args, torch.Generator().manual_seed(3))
    rows = [fgssl.evaluation_view(x, args.size), *views.chunk(2)]
    pictures.grid(ROOT / "assets" / "views.png", rows, ("image", "view 1", "view 2"))


if __name__ == "__main__":
    main()
