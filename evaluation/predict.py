"""Which class is this? Photographs named by a classifier: linear_eval.py probe.pt --predict."""

import glob
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fgssl
import pictures
from evaluation.classifier import load_all
from evaluation.probe import Inference, extract_features
from evaluation.results import write_csv
from imagesets.decode import FITS
from imagesets.files import list_images
from imagesets.progress import progress

COLUMNS = ("file", "class", "probability", *(f"{what} {i}" for i in range(2, 6)
                                              for what in ("class", "probability")),
           "confidence", "nearest training image", "note")


def expand(arguments):
    """The image files that are meant, each once: files, folders with all below them, patterns such
    as photos/*.jpg where the shell left them, and with "-" a list of these on standard input, one a
    line, or with a zero byte after each, as find -print0 writes them."""
    found, each = [], {}
    for name in arguments:
        if name == "-":
            text = os.fsdecode(sys.stdin.buffer.read()).removeprefix("\ufeff")
            listed = [*filter(None, re.split("\0" if "\0" in text else "\r?\n", text))]
            if not listed:
                print("standard input names no images", file=sys.stderr)
            found += expand(listed)
        elif os.path.isdir(name):
            images = list_images(Path(name))
            if not images:
                print(f"{name} holds no images", file=sys.stderr)
            found += map(str, images)
        elif glob.has_magic(name) and not os.path.lexists(name):
            found += expand(sorted(glob.glob(name, recursive=True))) or [name]
        else:
            found.append(name)
    for name in found:
        each.setdefault(os.path.abspath(name), name)
    return [*each.values()]


def read(source, side):
    """An image as uint8 (3, side, side), or the reason why it cannot be read."""
    try:
        return torch.from_numpy(fgssl.decode(source, side).copy())
    except (fgssl.UserError, fgssl.PassingError) as error:
        return str(error)


def read_chunks(files, side, fit, workers=None, chunk=256):
    """Yield files, at most `chunk` together, each with its image or reason; reads with all cores
    and reports progress. fit: as of a Source."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = progress(range(len(files)), len(files), "photographs", patience=3)
        for first in range(0, len(files), chunk):
            part = files[first:first + chunk]
            sources = [fgssl.Source(Path(file), fit=fit) for file in part]
            yield [(file, image, next(done))[:2]
                   for file, image in zip(part, pool.map(read, sources, [side] * len(part)))]
        next(done, None)                                     # its last line


def predict(checkpoint, arguments, args):
    """Print the five most probable classes of each image, or write them into --csv.

    arguments: as of `expand`. An image that cannot be read is named on stderr, and the others done;
    then the exit status is 1.
    """
    loaded, sheet = load_all(checkpoint), args.csv and os.path.abspath(sheet_of(args.csv))
    files = [file for file in expand(arguments) if os.path.abspath(file) != sheet]
    side, fit = fgssl.cache_side(loaded.run["size"]), loaded.run.get("fit") or FITS[0]
    inference = Inference(loaded.run["size"], *fgssl.device_and_precision(args.precision))
    loaded.model.to(inference.device, memory_format=torch.channels_last)
    if "accuracy" in loaded.run:
        also = "; then it learned from those, too" if loaded.run.get("refitted") else ""
        print(f"{checkpoint}: {loaded.run['accuracy']:.1f} % of its test images were right{also}",
              file=sys.stderr)
    if loaded.run.get("bbox"):
        print(f"{checkpoint} learned from images cropped to their boxes, and reads these whole: "
              "crop them to the object first", file=sys.stderr)
    rows, failed, unlike = [], 0, 0
    try:
        for part in read_chunks(files, side, fit, args.workers):
            for row in classify(loaded, part, inference):
                rows.append(row)
                if not row["class"]:
                    failed += 1
                    print(row["note"], file=sys.stderr)
                    continue
                unlike += bool(row["note"])
                if not args.csv:
                    print_prediction(row)
    finally:                                                 # of a run that was stopped, too
        if args.csv and rows:
            try:
                write_predictions(Path(args.csv), rows, side, fit)
            except OSError:                                  # a full disk does not cost the answers
                for row in rows:
                    print_prediction(row)
                raise
    if args.csv or failed or unlike:
        print(f"{len(rows) - failed} of {len(files)} images classified, {failed} cannot be read, "
              f"{unlike} are unlike the training images", file=sys.stderr)
    if failed or not files:
        raise SystemExit(1)


def print_prediction(row):
    """The five most probable classes of a row of `classify`."""
    if row["note"]:
        print(f"{row['file']}: {row['note']}", file=sys.stderr)
    if row["class"]:
        print(row["file"])
        for name, probability in row["five"]:
            print(f"  {100 * probability:5.1f} %  {name}")


def classify(loaded, part, inference):
    """A dict for each (file, image or reason) of a chunk; "class" is empty for a reason."""
    good = [image for _, image in part if not isinstance(image, str)]
    if good:
        h = extract_features(loaded.model.layers, torch.stack(good).numpy(), inference, "photos")
        probability = loaded.model.head.cpu()(h).softmax(1).detach()
        best = probability.topk(min(5, probability.shape[1]))
        distance, nearest, confidence = 3 * [None]
        if loaded.memory:
            distance, nearest = loaded.memory.nearest(h)
            confidence = loaded.memory.confidence(best.values[:, 0])
    i = 0
    for file, image in part:
        if isinstance(image, str):
            yield {"file": file, "class": "", "note": image}
            continue
        five = [(loaded.run["class_names"][label], value) for value, label in
                zip(best.values[i].tolist(), best.indices[i].tolist())]
        row = {"file": file, "class": five[0][0], "five": five, "note": "",
               "confidence": "", "nearest": ""}
        if loaded.memory:
            row["confidence"] = round(confidence[i].item(), 2)
            row["nearest"] = loaded.run["files"][nearest[i]]
            if distance[i] > loaded.memory.far:
                row["note"] = "unlike every training image: the class is a guess"
        yield row
        i += 1


def sheet_of(table):
    """The picture beside a table; a photograph hardly has this name."""
    return Path(table).with_name(f"{Path(table).stem}_least_certain.png")


def write_predictions(file, rows, side, fit, count=40):
    """A CSV of the rows of `classify`; beside it a picture of the `count` least certain ones."""
    def cells(row):
        five = [cell for name, value in row.get("five", ()) for cell in (name, round(value, 4))]
        five = [*five, *[""] * 10][:10]
        return row["file"], *five, row.get("confidence", ""), row.get("nearest", ""), row["note"]

    file.parent.mkdir(parents=True, exist_ok=True)
    write_csv(file, [COLUMNS, *map(cells, rows)])
    print(f"wrote {file}")
    least = sorted((row for row in rows if row["class"]), key=lambda row: row["five"][0][1])
    shown = [(row, image) for row in least[:count] if not isinstance(
        image := read(fgssl.Source(Path(row["file"]), fit=fit), side), str)]
    if shown:
        lines = [shown[i:i + 8] for i in range(0, len(shown), 8)]
        x = [torch.stack([image for _, image in line]) for line in lines]
        captions = [[f"{100 * row['five'][0][1]:.0f} % {row['class']}\n{Path(row['file']).stem}"
                     for row, _ in line] for line in lines]
        pictures.grid(sheet_of(file), x, side=128, captions=captions)
        print(f"wrote {sheet_of(file)}")
