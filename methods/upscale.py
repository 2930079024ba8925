"""Enlarge photographs with a trained generator: train_srgan.py --upscale."""

import math
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import atomic
import fgssl
import pictures
from imagesets.decode import is_deep
from imagesets.imagefile import MOST_BYTES, attempt, bytes_to_decode, load_image
from imagesets.progress import format_bytes, progress
from methods.srgan import freeze, load_generator

TILE = 128  # pixels of the image that is enlarged


@torch.no_grad()
def enlarged_tiles(generator, low, tile=TILE):
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


def enlarge_in_tiles(generator, low, tile=TILE):
    """enlarged_tiles put together: a tensor, which a photograph's memory may not hold."""
    s = generator.scale
    high = torch.empty(1, 3, s * low.shape[2], s * low.shape[3])
    for top, left, part in enlarged_tiles(generator, low, tile):
        high[:, :, top:top + part.shape[2], left:left + part.shape[3]] = part.cpu()
    return high


def read(file):
    """An image as RGB, its alpha channel or None, and its colour profile or None. UserError."""
    def load():
        image = load_image(file)[0]
        count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a preview, there
        if count > 1:
            print(f"{file} holds {count} pictures: the first is enlarged", file=sys.stderr)
        image = fgssl.upright(image)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
        if is_deep(image) or not image.has_transparency_data:  # to RGBA, 16 bits become white
            return fgssl.to_rgb(image), None, profile
        image = image.convert("RGBA")
        return image.convert("RGB"), image.getchannel("A"), profile

    return attempt(load, file)


def enlarged_strips(generator, image, alpha, device, label):
    """Yield an image, enlarged, as strips from top to bottom: uint8 (h, width, 3), or 4 with its
    alpha channel (bicubic). Reports progress by tiles."""
    low, s = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device), generator.scale
    tiles = math.ceil(image.height / TILE) * math.ceil(image.width / TILE)
    row = []
    for top, left, part in progress(enlarged_tiles(generator, low), tiles, f"{label}, tiles",
                                    patience=5):
        row.append(np.asarray(pictures.to_image(part[0])))
        if left + part.shape[3] == s * image.width:
            strip, row = np.concatenate(row, 1), []
            if alpha:
                first = max(0, top // s - 4)                 # bicubic looks 2 pixels up and down
                last = min(image.height, (top + len(strip)) // s + 4)
                cut = alpha.crop((0, first, image.width, last))
                cut = cut.resize((s * cut.width, s * cut.height), Image.BICUBIC)
                cut = np.asarray(cut)[top - s * first:][:len(strip)]
                strip = np.dstack([strip, cut])
            yield strip


def write_png(file, width, height, channels, strips, profile=None):
    """Write strips (h, width, 3 or 4), uint8, as a PNG (ISO/IEC 15948), each as it comes: the image
    is never whole in memory, as Pillow's writer has it."""
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check))

    packer = zlib.compressobj()
    with open(file, "wb") as out:
        out.write(b"\x89PNG\r\n\x1a\n")
        color = {3: 2, 4: 6}[channels]                       # RGB, RGBA
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
        if profile:
            chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
        for strip in strips:
            x = strip.reshape(len(strip), -1)
            lines = np.ones((len(x), 1 + x.shape[1]), np.uint8)  # filter 1: less the pixel before
            lines[:, 1:] = x
            lines[:, 1 + channels:] -= x[:, :-channels]
            chunk(b"IDAT", packer.compress(lines.tobytes()))
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def enlarge_file(generator, file, target, device):
    """Write an image, enlarged, as a PNG, with its alpha channel and colour profile."""
    image, alpha, profile = read(file)
    width, height = image.width * generator.scale, image.height * generator.scale
    target.parent.mkdir(parents=True, exist_ok=True)
    says = ", which it replaces" if target.exists() else ""
    with atomic.replacing(target) as draft:
        write_png(draft, width, height, 4 if alpha else 3,
                  enlarged_strips(generator, image, alpha, device, file), profile)
    print(f"{file} {image.width} x {image.height} -> {target} {width} x {height}{says}")
    with Image.open(target) as high:
        if target.stat().st_size + bytes_to_decode(high) > MOST_BYTES:
            print(f"{target} takes more than {format_bytes(MOST_BYTES)} to decode: no script here "
                  "reads it. Enlarge parts of the image for that", file=sys.stderr)


def targets(files, out, scale):
    """{file: its PNG}, each file once, beside it or into the folder `out`. Where the name is that
    of another's PNG or of one of the files, in small or large letters, it gets a number: none
    replaces another."""
    def place(path):                                         # another spelling of a path is no file
        return Path(os.path.realpath(path.parent), path.name)

    each, found = {}, {}
    for file in map(Path, files):
        each.setdefault(place(file), file)
    taken = {str(path).casefold() for path in each}
    for file in each.values():
        stem, number = f"{file.stem}_x{scale}", 1
        target = Path(out or file.parent) / f"{stem}.png"
        while str(place(target)).casefold() in taken:
            number += 1
            target = target.with_name(f"{stem}_{number}.png")
        taken.add(str(place(target)).casefold())
        found[file] = target
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
