"""What is in a folder of photographs? linear_eval.py CHECKPOINT --explore FOLDER

Labels are used where there are some. Everything rests on the encoder's features, standardised over
these images: cosine similarity of two, Euclidean distance to the others. Duplicates are the
exception: they are found by their pixels.

Writes embeddings.npz and .csv, a CSV for each question, a picture of each cluster, and
explore.html, which shows them.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import atomic
import fgssl
import pictures
from evaluation import page
from evaluation.probe import Inference, Layers, extract_features, layer_names
from evaluation.results import Extras, digest, digest_weights, write_csv
from evaluation.similarity import (
    clusters, duplicates, farthest_first, label_probabilities, neighbours, outlyingness)
from runfiles import raise_if_disk_failed

CLUSTERS = 30  # at most


def explore(encoder, args, out):
    """Answer all questions about the images of --explore; files go into the folder `out`."""
    if Path(args.explore).resolve() in (out.resolve(), *out.resolve().parents):
        raise fgssl.UserError(f"{out} lies in {args.explore}, whose images would be joined by the "
                              "pictures that are written: pass an --out elsewhere")
    data = fgssl.load_data_for(args)
    splits = [data.cached(split, fgssl.cache_side(args.size)) for split in ("train", "val", "test")]
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    rows = np.concatenate([split.rows for split in splits])
    files, names = [str(data.records.paths[row]) for row in rows], data.classes
    if len(files) < 2:
        raise fgssl.UserError(f"{args.explore} holds {len(files)} readable image: there is nothing "
                              "to compare it with")
    identity = digest(digest_weights(encoder).encode(), os.fsencode(os.path.abspath(args.explore)))
    claim(out, identity)
    bad = [str(data.records.paths[row])
           for row in np.setdiff1d(np.arange(len(data.records.paths)), rows)]
    write_csv(out / "unreadable.csv", [["file"], *([file] for file in bad)])

    encoder.to((device := fgssl.device_and_precision(args.precision))[0],
               memory_format=torch.channels_last)
    layer, = layer_names(len(fgssl.stage_widths(encoder, args.size)),
                         args.layer or str(len(fgssl.stage_widths(encoder, args.size))))
    h = extract_features(Layers(encoder, (layer,)), images, Inference(args.size, *device), "images")
    x = (h - h.mean(0)) / h.std(0).clamp(min=1e-6)
    named = [names[label] if label >= 0 else "" for label in labels]
    show, known = page.Thumbnails(images, args.size), labels >= 0
    answers = {
        "embeddings.csv": lambda: write_embeddings(out, identity, h, files, labels, names, named),
        "neighbours.csv": lambda: look_alikes(out, x, files, show),
        "duplicates.csv": lambda: twins(out, images, files, named, show),
        "outliers.csv": lambda: strangers(out, x, files, named, show),
        "clusters": lambda: groups(out, x, files, named, images, show)}
    if (np.bincount(labels[known]) > 1).sum() > 1:           # one alone of its class: unknown
        answers["doubtful_labels.csv"] = lambda: doubtful(out, x, labels, files, names, show)
    if not known.all():
        answers["label_next.csv"] = lambda: to_label(out, x, known, files, show)
    sections, extras = [], Extras()
    for name, answer in answers.items():                     # one that fails does not cost the rest
        with extras.write(name):
            sections.append(answer())
    sections = [section for section in sections if section]
    title = f"{data.name}: {len(files):,} images, {known.sum():,} with a label"
    about = [f"{len(bad)} files cannot be read, see unreadable.csv"] if bad else []
    with extras.write("explore.html"):
        page.write(out / "explore.html", title,
                   [*about, f"encoder {args.checkpoint}, layer {layer}"], sections)
    print(f"{title}; {len(bad)} cannot be read")
    for section in sections:
        print(f"  {section.summary}")
    if "explore.html" not in extras.failed:
        print(f"look at {out / 'explore.html'}; the tables beside it open in a spreadsheet")
    extras.finish()


def claim(out, identity):
    """Make the folder; UserError where it holds an exploration of another folder or encoder."""
    file = out / "embeddings.npz"
    if file.exists():
        try:
            with np.load(file) as earlier:
                found = earlier.get("identity")
        except Exception as error:                           # zipfile's, zlib's, NumPy's, ...
            raise_if_disk_failed(error, file)
            raise fgssl.UserError(f"{file} is damaged, or not of this script: remove it, or pass "
                                  "another --out") from error
        if found != identity:
            raise fgssl.UserError(f"{out} holds what was found in another folder, or by another "
                                  "encoder: pass another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)


def write_embeddings(out, identity, h, files, labels, names, named):
    """embeddings.npz (h, files, labels, classes) and embeddings.csv (file, label, numbers)."""
    with atomic.replacing(out / "embeddings.npz") as draft, open(draft, "wb") as file:
        np.savez(file, h=h.numpy(), files=np.array(files), labels=labels, classes=np.array(names),
                 identity=identity)
    write_csv(out / "embeddings.csv", [
        ["file", "label", *(f"h{i}" for i in range(h.shape[1]))],
        *([file, label, *(float(f"{v:.5g}") for v in row)] for file, label, row in
          zip(files, named, h.tolist()))])


def look_alikes(out, x, files, show):
    """neighbours.csv: the most similar others of each image."""
    similarity, near = neighbours(x)
    k = near.shape[1]
    write_csv(out / "neighbours.csv", [
        ["file", *(f"{what} {i}" for i in range(1, k + 1) for what in ("neighbour", "similarity"))],
        *([files[i], *(cell for j, s in zip(near[i].tolist(), similarity[i].tolist())
                       for cell in (files[j], round(s, 4)))] for i in range(len(files)))])
    rows = [[i, *near[i].tolist()] for i in np.linspace(0, len(files) - 1, 8).astype(int).tolist()]
    return page.Section("Which look alike?", f"neighbours.csv: the {k} most similar others of each "
                        "image", "Eight images, and their most similar others.",
                        [[(show(i), name_of(files[i])) for i in row] for row in rows])


def twins(out, images, files, named, show):
    """duplicates.csv: pairs of files that hold one picture."""
    pairs = duplicates(images)
    write_csv(out / "duplicates.csv", [
        ["file", "duplicate", "difference", "label", "label of the duplicate"],
        *([files[i], files[j], round(d, 4), named[i], named[j]] for i, j, d in pairs)])
    return page.Section("Which are there twice?", f"duplicates.csv: {len(pairs)} pairs of one "
                        "picture, resized or saved again", "The first pairs.",
                        [[(show(i), name_of(files[i])), (show(j), name_of(files[j]))]
                         for i, j, _ in pairs[:24]])


def strangers(out, x, files, named, show, count=24):
    """outliers.csv: all images, the least like the others first."""
    far = outlyingness(x)
    order = far.argsort(descending=True).tolist()
    write_csv(out / "outliers.csv", [["file", "label", "distance"],
                                     *([files[i], named[i], round(far[i].item(), 3)]
                                       for i in order)])
    return page.Section("Which are unlike the others?", "outliers.csv: all images, the most unlike "
                        "the others first", "The distance to the nearest others is largest.",
                        [[(show(i), name_of(files[i])) for i in order[:count]]])


def groups(out, x, files, named, images, show, most=40):
    """clusters.csv, then a picture of each cluster, named by its medoid."""
    k = min(CLUSTERS, len(x) - 1, max(2, round((len(x) / 2) ** 0.5)))
    member, medoids = clusters(x, k)
    sim = F.normalize(x, dim=1)
    titles = [f"{c:02}_{name_of(files[m])}" for c, m in enumerate(medoids, 1)]
    rows, shown, sheets = [["file", "label", "cluster", "similarity to its medoid"]], [], {}
    for c, (medoid, title) in enumerate(zip(medoids, titles)):
        near = sim @ sim[medoid]
        inside = (member == c).nonzero()[:, 0]
        inside = inside[near[inside].argsort(descending=True)].tolist()
        rows += [[files[i], named[i], title, round(near[i].item(), 4)] for i in inside]
        sheets[title] = inside[:most]
        common = [named[i] for i in inside if named[i]]
        shown.append([(show(i), "") for i in inside[:8]])
        note = max(set(common), key=common.count) if common else ""
        shown[-1][0] = (shown[-1][0][0], f"{title}, {len(inside)} images" + (f", {note}" if note
                                                                             else ""))
    write_csv(out / "clusters.csv", rows)
    (out / "clusters").mkdir(exist_ok=True)
    for file in (out / "clusters").glob("[0-9]*_*.png"):     # of an earlier time
        file.unlink()
    for title, inside in sheets.items():
        sheet = torch.from_numpy(images[inside])
        captions = [name_of(files[i]) for i in inside]
        pictures.grid(out / "clusters" / f"{title}.png", [*sheet.split(8)], side=112,
                      captions=[captions[i:i + 8] for i in range(0, len(captions), 8)])
    return page.Section("Which groups are there?", f"clusters.csv and clusters/: {len(medoids)} "
                        "groups, each named by its most typical image",
                        "The most typical images of each (k-means).", shown)


def doubtful(out, x, labels, files, names, show, count=24):
    """doubtful_labels.csv: all labelled images that can be judged, the most doubtful first."""
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    rows = np.flatnonzero((labels >= 0) & (counts[labels] > 1))
    y = labels[rows]
    probability = label_probabilities(x[rows], y, len(names))
    own = probability[np.arange(len(rows)), y].numpy()
    unit = F.normalize(x[rows], dim=1)
    table, shown = [], []
    for i in own.argsort(kind="stable").tolist():
        other = probability[i].clone()
        other[y[i]] = -1
        said = int(other.argmax())
        sim = torch.where(torch.from_numpy(y == said), unit @ unit[i], -torch.inf)
        near = [rows[j] for j in sim.topk(min(3, len(sim))).indices.tolist() if y[j] == said]
        table.append([files[rows[i]], names[y[i]], round(float(own[i]), 4), names[said],
                      round(float(other[said]), 4),
                      *([files[j] for j in near] + ["", "", ""])[:3]])
        if len(shown) < count:
            shown.append([(show(rows[i]), f"{name_of(files[rows[i]])}: {names[y[i]]}?"),
                          *((show(j), names[said]) for j in near)])
    write_csv(out / "doubtful_labels.csv", [
        ["file", "label", "probability of the label", "more likely", "its probability",
         "as in", "and in ", "and also in"], *table])
    worse = sum(row[4] > row[2] for row in table)
    return page.Section("Which labels are wrong?", f"doubtful_labels.csv: {len(table)} labels, the "
                        f"most doubtful first; {worse} are less likely than another class",
                        "Each beside the images of the class that it resembles more. The other "
                        "labels judge it: with few per class, or a poor encoder, they judge badly.",
                        shown)


def to_label(out, x, known, files, show, count=50):
    """label_next.csv: the images without a label that would tell most, in order."""
    chosen = farthest_first(x, torch.from_numpy(known), min(count, int((~known).sum())))
    write_csv(out / "label_next.csv", [["order", "file", "similarity to the nearest labelled"], *(
        [i, files[j], round(s, 4)] for i, (j, s) in enumerate(chosen, 1))])
    return page.Section("Which should be labelled next?", f"label_next.csv: {len(chosen)} images, "
                        "in order", "Each is the one least like all that have a label or come "
                        "before it.", [[(show(j), name_of(files[j])) for j, _ in chosen]])


def name_of(file):
    """The name of a file, for captions, cut in the middle where it is long."""
    name = Path(file).stem
    return name if len(name) <= 24 else f"{name[:12]}...{name[-9:]}"
