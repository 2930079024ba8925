"""Grad-CAM (Selvaraju et al. 2017): where features come from, drawn and measured against boxes."""

import math
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fgssl
import pictures
from evaluation.probe import Layers, extract_features, pool_map, stage_index
from evaluation.report import evenly_spaced
from evaluation.results import Extras
from imagesets.imagefile import FORMATS
from imagesets.progress import progress


def grad_cam(maps, score):
    """Where a score comes from: maps (B, C, h, w), score: maps -> (B,), to (B, h, w), at least 0.

    The weight of a channel is the global average pool of d score / d map; the weighted channels are
    summed, and negative sums set to 0. The maps are the output of a whole stage, its residual
    additions done.
    """
    maps = maps.detach().requires_grad_(True)
    gradient, = torch.autograd.grad(score(maps).sum(), maps)
    return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).clamp(min=0)


def resize_cam(cam, height, width):
    """(B, h, w) -> (B, height, width), scaled to a maximum of 1; a map of zeros stays zeros."""
    cam = F.interpolate(cam[:, None], (height, width), mode="bilinear")[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(x, cam):
    """Images (B, 3, H, W) in [0, 1], dark and grey where the map (B, h, w) is low: on an orange, a
    colour map laid over the image would be lost."""
    return torch.lerp(0.3 * fgssl.luma(x), x, resize_cam(cam, *x.shape[2:])[:, None])


def explain(frozen, images, rng):
    """Grad-CAM of uint8 images (B, 3, C, C) at the layer of the probe.

    Returns the evaluation view and a random one, (B, 3, size, size) in [0, 1], and two maps
    (B, h, w) over the first: class_cam, of the score of the class that the probe predicts; and
    similarity_cam, which takes no labels, of the cosine similarity of the two views' features.
    """
    (size, device, autocast), layer = frozen.inference, frozen.layer
    images = torch.from_numpy(images)
    views = [fgssl.evaluation_view(images, size),
             fgssl.hflip(fgssl.random_resized_crop(images, size, rng, scale=(0.3, 1.0)), rng)]
    with torch.no_grad(), autocast:
        maps, others = (frozen.encoder.stages(fgssl.normalize(x).to(device))[stage_index(layer)]
                        .float().cpu() for x in views)
    h = pool_map(others, layer)
    class_cam = grad_cam(maps, lambda maps: frozen.head(pool_map(maps, layer)).amax(1))
    similarity_cam = grad_cam(
        maps, lambda maps: F.cosine_similarity(pool_map(maps, layer), h))
    return *views, class_cam, similarity_cam


def boxes_in_view(records, rows, size):
    """The boxes of some records as masks of the evaluation view, (N, size, size), bool.

    A box is in pixels of the file. The cache holds one square of the file (fgssl.Source), and the
    view the centre 7/8 of that. A pixel is in the box if its centre is.
    """
    masks, at = [], 1 / 16 + 7 / 8 * (np.arange(size) + 0.5) / size
    for row in rows:
        with Image.open(records.paths[row], formats=FORMATS) as image:
            width, height = image.size
        source = fgssl.Source(records.paths[row], banner=records.banner, fit=records.fit)
        x, y, side = source.square(width, height)
        left, top, w, h = records.boxes[row]
        x, y = x + at * side, y + at * side
        masks.append(((top <= y) & (y < top + h))[:, None] & (left <= x) & (x < left + w))
    return np.stack(masks)


def outline(mask):
    """The outermost pixels of masks (B, 1, H, W); a box that is cut off is closed at the edge."""
    outside = F.pad(1 - mask, (1, 1, 1, 1), value=1.0)
    return mask * F.max_pool2d(outside, 3, 1) > 0


def energy_inside(cam, masks):
    """Percent of the sum of each map (N, h, w) that lies inside its mask (N, H, W): (N,); NaN for a
    map of zeros."""
    cam = resize_cam(cam, *masks.shape[1:]).numpy()
    with np.errstate(invalid="ignore"):
        return 100 * (cam * masks).sum((1, 2)) / cam.sum((1, 2))


def grad_cam_study(file, frozen, records, count=8, extras=None):
    """Draw Grad-CAM for `count` test images. Returns energy_in_boxes, or {} for a set without; a
    picture that cannot be drawn is left to `extras` and costs no number."""
    test, size = frozen.splits[2], frozen.inference.size
    rng, shown = torch.Generator().manual_seed(0), evenly_spaced(len(test.labels), count)
    x, other, class_cam, similarity_cam = explain(frozen, test.images[shown], rng)
    rows = [x, overlay(x, class_cam), other, overlay(x, similarity_cam)]
    if records.boxes is not None:
        mask = torch.from_numpy(boxes_in_view(records, test.rows[shown], size)).float()[:, None]
        rows[0] = torch.where(outline(mask), torch.tensor((1.0, 1.0, 0.0))[:, None, None], x)
    found = {} if records.boxes is None else energy_in_boxes(frozen, records, rng)
    with (extras or Extras()).write(Path(file).name):
        with torch.no_grad():
            features = extract_features(Layers(frozen.encoder, (frozen.layer,)), test.images[shown],
                                        frozen.inference, "examples")
            predicted = frozen.head(features).argmax(1).tolist()
        captions = [[frozen.names[label] for label in test.labels[shown]],
                    [f"{'right' if i == j else 'as'}: {frozen.names[i]}" for i, j in
                     zip(predicted, test.labels[shown])]]
        pictures.grid(file, rows, ("image and class", "score of the\npredicted class",
                                   "another view", "similarity\nof the views"), side=144,
                      captions=captions)
    return found


def energy_in_boxes(frozen, records, rng, most=512):
    """Means over up to `most` test images, in percent: of the maps' energy inside the box, for the
    class score and for the similarity of two views, and of the view's area that the box covers."""
    test, size = frozen.splits[2], frozen.inference.size

    def inside(indices):
        mask = boxes_in_view(records, test.rows[indices], size)
        _, _, *cams = explain(frozen, test.images[indices], rng)
        return zip(*(energy_inside(cam, mask) for cam in cams), 100 * mask.mean((1, 2)))

    measured = evenly_spaced(len(test.labels), most)
    found = map(inside, np.array_split(measured, math.ceil(len(measured) / 64)))
    found = progress(chain.from_iterable(found), len(measured), "Grad-CAM inside boxes", patience=5)
    finite = [column[np.isfinite(column)] for column in np.array(list(found)).T]
    return {name: float(column.mean()) if len(column) else None for name, column in
            zip(("class_score_in_box", "similarity_in_box", "box_of_view"), finite)}
