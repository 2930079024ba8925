"""Enlarge photographs with a trained generator: train_srgan.py --upscale."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import atomic
import fgssl
import pictures
from imagesets.imagefile import attempt, load_image
from imagesets.progress import progress
from methods.srgan import freeze, load_generator


@torch.no_grad()
def enlarged_tiles(generator, low, tile=128):
    """Yield (top, left, part) of generator(low) for an image of any size, in the memory of one
    tile. Tiles overlap by the generator's reach, so that every pixel is as if the image had been
    enlarged whole.

    low (1, 3, H, W), uint8 or float in [0, 1]; part (1, 3, h, w) in [0, 1].
    """
    s, margin = generator.scale, generator.reach
    for top in range(0, low.shape[2], tile):
        above = min(top, margin)
        for left in range(0, low.shape[3], tile):
            before = min(left, margin)
            part = generator(fgssl.to_float(low[:, :, top - above:top + tile + margin,
                                                left - before:left + tile + margin]))
            yield s * top, s * left, part[:, :, s * above:s * (above + tile),
                                          s * before:s * (before + tile)]


def enlarge_in_tiles(generator, low, tile=128):
    """enlarged_tiles put together: a tensor, which a photograph's memory may not hold."""
    s = generator.scale
    high = torch.empty(1, 3, s * low.shape[2], s * low.shape[3])
    for top, left, part in enlarged_tiles(generator, low, tile):
        high[:, :, top:top + part.shape[2], left:left + part.shape[3]] = part.cpu()
    return high


def read(file):
    """An image as RGB, its alpha channel or None, and its colour profile or None. UserError."""
    def load():
        image = fgssl.upright(load_image(file)[0])
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        if not image.has_transparency_data:
            return fgssl.to_rgb(image), None, profile
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A"), profile

    return attempt(load, file)


def enlarge_file(generator, file, target, device):
    """Write an image, enlarged, as a PNG, with its alpha channel (bicubic) and colour profile."""
    image, alpha, profile = read(file)
    size = image.width * generator.scale, image.height * generator.scale
    low = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
    high = Image.new("RGB", size)
    tiles = math.ceil(low.shape[2] / 128) * math.ceil(low.shape[3] / 128)
    for top, left, part in progress(enlarged_tiles(generator, low), tiles, f"{file}, tiles",
                                    patience=5):
        high.paste(pictures.to_image(part[0]), (left, top))
    if alpha:
        high.putalpha(alpha.resize(size, Image.BICUBIC))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(target) as draft:
        high.save(draft, "PNG", icc_profile=profile)
    print(f"{file} {image.width} x {image.height} -> {target} {high.width} x {high.height}")


def targets(files, out, scale):
    """{file: its PNG}, each file once, beside it or into the folder `out`; files of one name get
    numbers, so that none replaces another's."""
    found = {}
    for file in map(Path, files):
        stem, number = f"{file.stem}_x{scale}", 1
        target = Path(out or file.parent) / f"{stem}.png"
        while file not in found and target in found.values():
            number += 1
            target = target.with_name(f"{stem}_{number}.png")
        found.setdefault(file, target)
    return found


def upscale(files, checkpoint, out):
    """Write each image, enlarged, as a PNG beside it or into the folder `out`. One that cannot be
    enlarged is named, the others done; then UserError."""
    device, _ = fgssl.device_and_precision("fp32")
    generator, _, _ = load_generator(checkpoint)
    freeze(generator).to(device, memory_format=torch.channels_last)
    failed, jobs = [], targets(files, out, generator.scale)
    for file, target in jobs.items():
        try:
            enlarge_file(generator, file, target, device)
        except (fgssl.UserError, fgssl.PassingError, OSError, MemoryError) as error:
            failed.append(str(error) or f"{file} does not fit into memory")
            print(failed[-1], file=sys.stderr)
    if failed:
        raise fgssl.UserError(f"{len(failed)} of {len(jobs)} images are not enlarged: {failed[0]}")
