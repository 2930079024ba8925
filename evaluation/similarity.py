"""Questions about images, answered from their features x (N, D) or, for duplicates, their pixels.

Nothing here knows files or pages: see explore.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

import fgssl
from evaluation.probe import fit_linear
from imagesets.progress import progress

NEAR, FOLDS = 5, 5
SAME_PIXELS, SAME_SHAPE = 0.02, 0.985   # see `duplicates`


def neighbours(x, k=NEAR):
    """(N, D) -> the k others most similar to each by cosine, most similar first: similarities and
    indices (N, k)."""
    x = F.normalize(x, dim=1)
    values, indices, first = [], [], 0
    parts = x.split(max(1, fgssl.MOST // len(x)))
    for part in progress(parts, len(parts), "neighbours, parts", patience=5):
        sim = part @ x.T
        rows = torch.arange(len(part))
        sim[rows, first + rows] = -torch.inf
        found = sim.topk(min(k, len(x) - 1))
        values.append(found.values)
        indices.append(found.indices)
        first += len(part)
    return torch.cat(values), torch.cat(indices)


def duplicates(images, side=16):
    """Pairs (i, j, difference), i < j, of uint8 images (N, 3, C, C) that are one picture, resized
    or saved again.

    Compared are the images at 16 x 16 pixels, without their mean brightness: the root mean square
    difference, of values in [0, 1], is below 0.02, and the correlation above 0.985, unless there is
    no difference at all. Re-saved photographs of two sets had at most 0.022; of different ones, the
    nearest pairs, bursts, began at 0.016.
    """
    small = torch.cat([F.adaptive_avg_pool2d(fgssl.to_float(torch.from_numpy(images[i:i + 256])),
                                             side).flatten(1) for i in range(0, len(images), 256)])
    small -= small.mean(1, keepdim=True)
    square, found, first = small.square().sum(1), [], 0
    parts = small.split(max(1, fgssl.MOST // len(small)))
    for part in progress(parts, len(parts), "duplicates, parts", patience=5):
        rest = small[first:]
        product = part @ rest.T
        a, b = square[first:first + len(part), None], square[first:]
        difference = ((a + b - 2 * product).clamp(min=0) / small.shape[1]).sqrt()
        alike = (difference < SAME_PIXELS) & (product > SAME_SHAPE * (a * b).sqrt())
        alike = (alike | (difference < 1e-3)).triu(1)
        for i, j in alike.nonzero().tolist():
            found.append((first + i, first + j, difference[i, j].item()))
        first += len(part)
    return sorted(found, key=lambda pair: pair[2])


def clusters(x, k, steps=50):
    """k-means of the directions of x (N, D), begun by k-means++ with a fixed seed: the cluster of
    each image, (N,), and the medoid of each cluster, the image nearest to its centre. Clusters are
    in order of size; empty ones are left out."""
    x, rng = F.normalize(x, dim=1), torch.Generator().manual_seed(0)
    centre = x[[int(torch.randint(len(x), (1,), generator=rng))]]
    distance = 1 - x @ centre[0]
    for _ in range(k - 1):                                   # the next centre is far from these
        weight = distance.clamp(min=0).square()
        if not weight.sum() > 0:
            break
        centre = torch.cat([centre, x[[int(torch.multinomial(weight, 1, generator=rng))]]])
        distance = torch.minimum(distance, 1 - x @ centre[-1])
    member = None
    for _ in range(steps):
        before, member = member, (x @ centre.T).argmax(1)
        if before is not None and torch.equal(before, member):
            break
        total = torch.zeros_like(centre).index_add_(0, member, x)
        centre = F.normalize(torch.where(total.norm(dim=1, keepdim=True) > 0, total, centre), dim=1)
    sizes = torch.bincount(member, minlength=len(centre))
    order = sizes.argsort(descending=True, stable=True)      # the empty ones come last
    medoids = [int(torch.where(member == c, x @ centre[c], -torch.inf).argmax())
               for c in order.tolist() if sizes[c]]
    return order.argsort()[member], medoids


def outlyingness(x, k=NEAR):
    """The mean Euclidean distance of each of (N, D) to its k nearest others: (N,)."""
    found = []
    parts = x.split(max(1, fgssl.MOST // len(x)))
    for part in progress(parts, len(parts), "outliers, parts", patience=5):
        nearest = torch.cdist(part, x).topk(min(k + 1, len(x)), largest=False).values
        found.append(nearest[:, 1:].mean(1))                 # the first is the image itself
    return torch.cat(found)


def label_probabilities(x, labels, classes):
    """What the other labels say of each image: out-of-fold probabilities (N, classes).

    x (N, D), standardised; labels (N,). Logistic regression on four fifths of the images judges the
    rest, five times; each class is spread evenly over the folds, so that an image is judged by
    others of its class. A wrong label is one of low probability (Northcutt et al. 2021). The
    strength of L2 is the one that judges the first fold best; of equals, the strongest.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % FOLDS
    fold, target = torch.from_numpy(fold), torch.from_numpy(labels)

    def judge(held, l2):
        weight = fit_linear(x[fold != held], target[fold != held], classes, l2)
        return (x[fold == held] @ weight[:-1] + weight[-1]).softmax(1)

    def score(l2):
        return fgssl.accuracy(judge(0, l2).argmax(1), target[fold == 0])

    strengths = progress((1e-1, 1e-2, 1e-3), 3, "doubtful labels, strengths", patience=5)
    l2, probability = max(strengths, key=score), torch.zeros(len(x), classes)
    for held in progress(range(min(FOLDS, len(x))), FOLDS, "doubtful labels, folds", patience=5):
        probability[fold == held] = judge(held, l2)
    return probability


def farthest_first(x, known, wanted):
    """The order in which to label: each next image is the one least similar to all that are known
    or were chosen before it (greedy k-centre, Gonzalez 1985).

    x (N, D); known, bool (N,): has a label. Returns at most `wanted` indices and the cosine
    similarity of each to the nearest known one. Without any label, the first is the image nearest
    to the mean, and is returned, too.
    """
    x, chosen, known = F.normalize(x, dim=1), [], known.clone()
    if known.any():
        nearest = torch.full((len(x),), -1.0)
        for part in x[known].split(256):
            nearest = torch.maximum(nearest, (x @ part.T).amax(1))
    else:
        first = int((x @ x.mean(0)).argmax())
        chosen, nearest = [(first, 0.0)], x @ x[first]
        known[first] = True
    while len(chosen) < wanted and not known.all():
        i = int(torch.where(known, torch.inf, nearest).argmin())
        chosen.append((i, float(nearest[i])))
        known[i] = True
        nearest = torch.maximum(nearest, x @ x[i])
    return chosen
