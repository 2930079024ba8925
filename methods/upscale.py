"""Enlarge photographs with a trained generator: train_srgan.py --upscale."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fgssl
import pictures
from methods.srgan import freeze, load_generator


@torch.no_grad()
def enlarge_in_tiles(generator, low, tile=160):
    """generator(low) for an image of any size, in the memory of one tile. Tiles overlap by the
    generator's reach, so that every pixel is as if the image had been enlarged whole."""
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
    generator, _, _ = load_generator(checkpoint)
    freeze(generator).to(device, memory_format=torch.channels_last)
    for file in map(Path, files):
        try:
            with Image.open(file) as image:
                low = np.array(fgssl.to_rgb(fgssl.upright(image)))
        except Exception as error:  # Pillow's readers raise errors of many kinds
            raise fgssl.UserError(f"cannot read image {file}: {error}") from error
        low = fgssl.to_float(torch.from_numpy(low).permute(2, 0, 1)[None].to(device))
        high = pictures.to_image(enlarge_in_tiles(generator, low)[0])
        target = Path(out or file.parent) / f"{file.stem}_x{generator.scale}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(high, target)
        print(f"{file} {low.shape[3]} x {low.shape[2]} -> {target} {high.width} x {high.height}")
