"""Two-view SimCLR batches, per second: ours beside the usual pipeline of Pillow and DataLoader.

    python tests/bench_views.py --data FOLDER     # the toy birds without --data

The usual one opens each JPEG again at every epoch and augments image by image, in one worker
process a core: crop, mirror, jitter, greyscale and blur by Pillow, which is what torchvision's
transforms call. Ours decodes once (timed apart) and augments whole batches. Both end in normalised
float tensors.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import fgssl  # noqa: E402
import train_simclr  # noqa: E402

BATCH, SECONDS = 128, 8


class PillowViews(torch.utils.data.Dataset):
    """Two views of a file, augmented with Pillow."""

    def __init__(self, paths, args):
        self.paths, self.args = paths, args

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            image = image.convert("RGB")
        return torch.stack([self.view(image), self.view(image)])

    def view(self, image):
        args, width, height = self.args, *image.size
        area = random.uniform(args.min_crop, 1) * width * height
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        x, y = random.randint(0, width - w), random.randint(0, height - h)
        image = image.crop((x, y, x + w, y + h)).resize((args.size, args.size), Image.BILINEAR)
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        if random.random() < 0.8:
            steps = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, shift_hue]
            for step in random.sample(steps, 4):
                factor = 1 + 0.8 * args.color * random.uniform(-1, 1)
                image = step(image, factor) if step is shift_hue else step(image).enhance(factor)
        if random.random() < args.gray:
            image = ImageOps.grayscale(image).convert("RGB")
        if random.random() < args.blur:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
        return fgssl.normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)[0]


def shift_hue(image, factor):
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.array(hue) + np.uint8(256 * 0.25 * (factor - 1) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def rate(batches):
    """Views per second of an iterator of view batches, the first batch not counted."""
    batches = iter(batches)
    next(batches)
    start, views = time.perf_counter(), 0
    for x in batches:
        views += x.shape[:-3].numel()
        if time.perf_counter() - start > SECONDS:
            break
    return views / (time.perf_counter() - start)


def ours(images, args):
    rng = torch.Generator().manual_seed(0)
    for index in fgssl.batches(len(images), BATCH, 0):
        x = fgssl.fetch(images, index, torch.device("cpu"))
        yield train_simclr.two_views(x, args, rng)


def main():
    given = fgssl.parser(__doc__, training=False, data="toy").parse_args()
    data = fgssl.load_data(given.data, given.root)
    paths = [p for p, s in zip(data.records.paths, data.records.splits) if s == "train"]
    workers = torch.get_num_threads()
    print(f"{data.name}, {len(paths)} images, {workers} cores, views/s")
    print(f"{'size':>4}  {'Pillow':>8}  {'ours':>8}  ratio  decoded once, images/s")
    for size in (64, 224):
        args = train_simclr.arguments(["--out", "nowhere", "--size", str(size), "--blur", "0.5"])
        loader = torch.utils.data.DataLoader(PillowViews(paths, args), BATCH, shuffle=True,
                                             drop_last=True, num_workers=workers)
        usual = rate(x for _ in iter(int, 1) for x in loader)
        start = time.perf_counter()
        images = data.cached("train", fgssl.cache_side(size)).images
        decode = len(paths) / (time.perf_counter() - start)
        fast = rate(ours(images, args))
        print(f"{size:4}  {usual:8.0f}  {fast:8.0f}  {fast / usual:5.1f}  {decode:.0f}", flush=True)


if __name__ == "__main__":
    main()
