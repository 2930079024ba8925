"""Retrieval: each test image ranks the other test images by similarity. Nothing is trained."""

import numpy as np
import torch
import torch.nn.functional as F

import fgssl
import pictures
from evaluation.report import evenly_spaced
from imagesets.progress import progress

GREEN, RED = (0.2, 0.65, 0.3), (0.85, 0.15, 0.2)


def retrieval(h, labels):
    """Rank, for each of N images, the N - 1 others by cosine similarity: percentages.

    h (N, D), labels (N,). rank1, rank5: of the queries, those with their class among the first 1 or
    5; map: the mean average precision over the full ranking, as in Shu et al., CVPR 2023. A query
    whose class has no other image is left out; None where no query is left.
    """
    def percent(values):
        return 100 * values.double().mean().item() if len(values) else None

    first, precision = ranking(h, labels)
    return {"rank1": percent(first == 1), "rank5": percent(first <= 5), "map": percent(precision),
            "queries": len(first)}


def ranking(h, labels, chunk=512):
    """Leave-one-out retrieval: (N, D), (N,) -> for each query whose class has another image, the
    rank of the first such image, and the average precision. Ranks `chunk` queries at a time, of
    more than 32,768 images fewer."""
    chunk = min(chunk, max(1, fgssl.MOST // len(h)))
    h, rank, first, precision = F.normalize(h, dim=1), torch.arange(len(h))[1:], [], []
    queries = torch.arange(len(h)).split(chunk)
    for query in progress(queries, len(queries), "ranking", patience=5):
        sim = h[query] @ h.T
        sim[torch.arange(len(query)), query] = -torch.inf    # a query does not find itself
        order = sim.argsort(1, descending=True)[:, :-1]
        hit = labels[order] == labels[query, None]           # (queries, N - 1), nearest first
        hit = hit[hit.any(1)]
        found = hit.cumsum(1)
        first.append(1 + (found == 0).sum(1))
        precision.append((found / rank * hit).sum(1) / hit.sum(1))
    return torch.cat(first), torch.cat(precision)


def retrieval_sheet(file, h, split, names, count=8):
    """Draw `count` test images and the five nearest others of each by cosine similarity: in a solid
    green frame where the class is the same, in a broken red one where it is not."""
    h, rows, titles, there = F.normalize(h, dim=1), [], [], np.bincount(split.labels)
    position = torch.arange(split.images.shape[-1])
    width = len(position) // 14
    frame = torch.ones(len(position), len(position), dtype=torch.bool)
    frame[width:-width, width:-width] = False
    broken = frame & ((position + position[:, None]) // width % 3 > 0)
    for query in evenly_spaced(len(h), count):
        sim = h @ h[query]
        sim[query] = -torch.inf
        near = [query, *sim.topk(min(5, len(h) - 1)).indices.tolist()]
        x = fgssl.to_float(torch.from_numpy(split.images[near]))
        for image, right in zip(x[1:], split.labels[near[1:]] == split.labels[query]):
            image[:, frame if right else broken] = torch.tensor(GREEN if right else RED)[:, None]
        rows.append(x)
        label, right = split.labels[query], (split.labels[near[1:]] == split.labels[query]).sum()
        titles.append(f"{pictures.fit(names[label], 14, 220)}\n{right} of {len(near) - 1} right; "
                      f"there are {there[label] - 1}")
    heads = "test image", *(f"nearest {i}" for i in range(1, len(rows[0])))
    pictures.grid(file, rows, titles, side=112, heads=heads)
