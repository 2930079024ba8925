"""Image sets: which files, what they show, which split each belongs to; and the toy birds.

`read(name_or_folder, root)` returns `Records`. A set is one small function from its folder to
Records, and one line in `SETS`; `complete` cuts the splits that a set lacks.

The toy birds need no download: 20 species that share one body, its colours and its poses and differ
in a few parts, which is what makes the photographs of CUB-200-2011 (Wah et al. 2011) hard. They are
drawn with Pillow and written in CUB's layout, so that both go through one reader.
"""

import functools
import io
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


class Records(NamedTuple):
    """A set of N images. A label indexes `classes` and is -1 where unknown."""
    paths: list[Path]
    labels: np.ndarray                # (N,) int64
    classes: list[str]
    splits: np.ndarray                # (N,) of "train", "val", "test"
    boxes: np.ndarray | None = None   # (N, 4) float32: x, y, width, height in pixels
    name: str = ""


def read(name_or_folder, root):
    """Return the Records of a named set kept under `root`, or of any folder of images.

    "toy" is drawn first if it is not there. A folder's layout is told by its text files: CUB's or
    Grocery Store's, else class folders or loose images. A folder called like a set is `./toy`.
    FileNotFoundError says what is missing and where to get it, ValueError what cannot be used.
    """
    name, folder, root = str(name_or_folder), Path(name_or_folder), Path(root)
    if name == "toy":
        draw_toy(root / "toy")
    if name in SETS:
        reader, places, source = SETS[name]
        folder = next((root / place for place in places if (root / place).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"no folder {root / places[0]}. Fetch {source} and unpack it "
                                    f"in {root}.")
    elif not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}. Expected a folder of images, or one of the "
                                f"sets {', '.join(SETS)}.")
    elif (folder / "image_class_labels.txt").is_file():
        reader = cub
    elif (folder / "classes.csv").is_file() or (folder / "dataset" / "classes.csv").is_file():
        reader = grocery
    else:
        reader = any_folder
    return complete(reader(folder)._replace(name=name if name in SETS else folder.resolve().name))


def complete(records):
    """Cut a missing test split (20 %) or val split (10 %) from train, and check the classes.

    The cut takes its share of each class, at least one image, and leaves at least one. Its seed is
    fixed: the splits do not depend on a run's seed. A split that the set has is not touched: train/
    and val/ without test/ keep their val, and test is cut from train. Unlabelled images stay in
    train. ValueError if val or test holds a class of which train, where labelled, has no image.
    """
    labels, splits = records.labels, records.splits.astype("<U5")
    rng = np.random.default_rng(0)
    for split, share in (("test", 0.2), ("val", 0.1)):
        if split in records.splits:
            continue
        for label in range(len(records.classes)):
            members = rng.permutation(np.flatnonzero((labels == label) & (splits == "train")))
            if len(members) > 1:
                splits[members[:max(1, round(share * len(members)))]] = split
    trained = set(labels[splits == "train"])
    lacking = [records.classes[label] for label in sorted(set(labels[labels >= 0]) - trained)]
    if lacking and trained != {-1}:
        raise ValueError(f"{records.name}: val or test holds {', '.join(lacking)}, of which train "
                         "has no image. Move some to train, or take the class out.")
    return records._replace(splits=splits)


# ------------------------------------------------------------------------------------------------
# Readers
# ------------------------------------------------------------------------------------------------


def cub(folder):
    """Caltech-UCSD Birds 200-2011, by its text files alone: the archive holds images they lack.

    Labels count from 1 in the files, from 0 here. CUB has no val split; one more file, val.txt,
    with lines `<image_id> <is_val>`, may set it, as the toy birds do.
    """
    names = table(folder / "classes.txt", "<class_id> <name>", str)
    label_of = {class_id: label for label, class_id in enumerate(names)}
    images = table(folder / "images.txt", "<image_id> <path>", str)
    column = functools.partial(table, keys=images)
    labels = column(folder / "image_class_labels.txt", "<image_id> <class_id>", label_of.get)
    splits = column(folder / "train_test_split.txt", "<image_id> <is_train>",
                    {"1": "train", "0": "test"}.get)
    boxes = column(folder / "bounding_boxes.txt", "<image_id> <x> <y> <width> <height>",
                   float, float, float, float)
    if (folder / "val.txt").is_file():
        is_val = column(folder / "val.txt", "<image_id> <is_val>", {"1": True, "0": False}.get)
        splits = {image: "val" if is_val[image] else splits[image] for image in images}
    return Records(
        [listed(folder / "images" / path, folder / "images.txt") for path in images.values()],
        np.array([labels[image] for image in images], np.int64),
        list(names.values()),
        np.array([splits[image] for image in images]),
        np.array([boxes[image] for image in images], np.float32))


def grocery(folder):
    """Grocery Store (Klasson et al. 2019), 81 fine classes; its repository, or dataset/ in it."""
    if (folder / "dataset" / "classes.csv").is_file():
        folder = folder / "dataset"
    ids = table(folder / "classes.csv", "<name>,<class_id>,<more>", int, str, separator=",",
                header=1)
    classes = sorted(ids, key=ids.get)
    label_of = {str(ids[name][0]): label for label, name in enumerate(classes)}
    rows = []
    for split in ("train", "val", "test"):
        listing = folder / f"{split}.txt"
        lines = table(listing, "<path>, <class_id>, <coarse_id>", label_of.get, int, separator=",")
        rows += [(listed(folder / path, listing), label, split)
                 for path, (label, _) in lines.items()]
    paths, labels, splits = zip(*rows)
    return Records(list(paths), np.array(labels, np.int64), classes, np.array(splits))


def any_folder(folder):
    """Class folders <class>/*, or {train,val,test}/<class>/*; valid and validation are val too.

    Sub-folders of a class folder belong to the class. Loose images, alone or beside class folders,
    are train images without a label; in val/ or test/ they could score nothing and are left out.
    Hidden files and files that are not images are ignored. ValueError if splits and classes mix.
    """
    split_of = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    inside = folders_in(folder)
    tops = {top: split_of[top.name.lower()] for top in inside if top.name.lower() in split_of}
    others = [top.name for top in inside if tops and top not in tops and images_in(top, deep=True)]
    if others:
        raise ValueError(f"{folder} holds {', '.join(top.name for top in tops)} beside "
                         f"{', '.join(others)}. Expected splits or classes: move the others out.")
    rows = []
    for top, split in (tops or {folder: "train"}).items():
        if split == "train":
            rows += [(path, None, split) for path in images_in(top)]
        for group in folders_in(top):
            rows += [(path, group.name, split) for path in images_in(group, deep=True)]
    if "train" not in [split for _, _, split in rows]:
        raise FileNotFoundError(f"no images under {folder / 'train' if tops else folder}. Expected "
                                'class folders or loose .jpg files; see README, "Your own images".')
    paths, names, splits = zip(*rows)
    classes = sorted(set(names) - {None})
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)
    return Records(list(paths), labels, classes, np.array(splits))


CUB_SOURCE = ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz "
              "(1.1 GB, md5 97eceeb196236b17998738112f37df78)")
GROCERY_SOURCE = "https://github.com/marcusklasson/GroceryStoreDataset (123 MB)"
SETS = {  # name: its reader, its folder's names under root, where to fetch it
    "toy": (cub, ["toy"], None),
    "cub": (cub, ["CUB_200_2011"], CUB_SOURCE),
    "grocery": (grocery, ["GroceryStoreDataset", "GroceryStoreDataset-master", "grocery"],
                GROCERY_SOURCE),
}


def table(path, form, *parse, keys=None, separator=None, header=0):
    """Read lines `key value ...` into {key: value}, or {key: (value, ...)} for more than one value.

    form: the line in words, for the error. parse: for each value a function of its text, which
    returns None or raises ValueError for what it refuses; the last value takes the rest of the
    line. keys: if given, each must have a line and no other may. header: lines to skip.
    ValueError names file and line, for a line that does not fit or repeats a key.
    """
    found = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if number <= header or not line.strip():
                continue
            key, *texts = [text.strip() for text in line.strip().split(separator, len(parse))]
            try:
                values = [function(text) for function, text in zip(parse, texts, strict=True)]
            except ValueError:
                values = [None]
            if None in values or key in found or key not in (keys or [key]):
                raise ValueError(f"{path}, line {number}: cannot use {line.strip()!r}. Expected "
                                 f"{form} with known ids, each once.")
            found[key] = values[0] if len(values) == 1 else tuple(values)
    if not found:
        raise ValueError(f"{path} is empty. Expected lines {form}.")
    for key in keys or ():
        if key not in found:
            raise ValueError(f"{path} has no line for {key}. Expected lines {form}.")
    return found


def listed(path, listing):
    """Return `path` if it is there; FileNotFoundError names it and the file that lists it."""
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}, which {listing} lists. Unpack the set again.")
    return path


def folders_in(folder):
    """Sorted visible sub-folders, without links that lead back to the folder or above it."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
                  and not folder.resolve().is_relative_to(path.resolve()))


def images_in(folder, deep=False):
    """Sorted visible images in a folder; if `deep`, in its sub-folders too, links excepted."""
    extensions = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if deep and name[0] != "."]
        found += [Path(parent, name) for name in files
                  if name[0] != "." and name.lower().endswith(extensions)]
    return sorted(found)


def progress(items, total, what):
    """Yield the items and report count, rate and time left on stderr.

    On a terminal one line is rewritten five times a second; elsewhere one comes every ten seconds.
    """
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - shown > (0.2 if terminal else 10):
            shown, rate = now, done / max(now - start, 1e-9)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            line = f"{what}  {done}/{total}  {rate:.0f}/s  eta {minutes}:{seconds:02}"
            print(f"\r{line:<70}" if terminal else line, file=sys.stderr, flush=True,
                  end="" if terminal and done < total else "\n")


# ------------------------------------------------------------------------------------------------
# Toy birds: the set
# ------------------------------------------------------------------------------------------------

COMMON = dict(bill="cone", crest="none", eye="plain", wing="plain", breast="plain", tail="square")
SPECIES = {  # the common bird with two parts changed: two species differ in two, three or four
    "Hook-billed_Barwing": dict(bill="hook", wing="bars"),
    "Hook-billed_Forktail": dict(bill="hook", tail="fork"),
    "Masked_Hookbill": dict(bill="hook", eye="mask"),
    "Streaked_Spearbill": dict(bill="spear", breast="streaks"),
    "Crested_Spearbill": dict(bill="spear", crest="peak"),
    "Spear-billed_Fantail": dict(bill="spear", tail="fan"),
    "Plumed_Sicklebill": dict(bill="sickle", crest="plume"),
    "Sickle-billed_Flagwing": dict(bill="sickle", wing="patch"),
    "Spectacled_Sicklebill": dict(bill="sickle", eye="ring"),
    "Crested_Barwing": dict(crest="peak", wing="bars"),
    "Crested_Ringneck": dict(crest="peak", breast="band"),
    "Tufted_Ribbontail": dict(crest="tuft", tail="ribbon"),
    "Tufted_Spectaclebird": dict(crest="tuft", eye="ring"),
    "Plumed_Fantail": dict(crest="plume", tail="fan"),
    "White-browed_Forktail": dict(eye="brow", tail="fork"),
    "White-browed_Streakling": dict(eye="brow", breast="streaks"),
    "Masked_Flagwing": dict(eye="mask", wing="patch"),
    "Banded_Ribbontail": dict(breast="band", tail="ribbon"),
    "Spectacled_Bibling": dict(eye="ring", breast="bib"),
    "Bibbed_Flagwing": dict(wing="patch", breast="bib"),
}
PARTS = ["back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg",
         "left wing", "nape", "right eye", "right leg", "right wing", "tail", "throat"]  # as in CUB


def draw_toy(folder, seed=0, per_class=(60, 20, 20)):
    """Draw the toy birds in CUB's layout: `per_class` (train, val, test) images of each species.

    A set that is there stays. Every core draws its share in a process of its own, started as
    `python datasets.py`, which needs neither fork nor a guarded main module. The set is drawn
    beside `folder` and renamed when whole: an interrupted drawing leaves no half set, and of two at
    once the first to finish stays. One seed, one set of files. OSError names a folder it cannot
    write.
    """
    folder, each, cores = Path(folder), sum(per_class), min(os.cpu_count() or 1, 16)
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    paths, rows, workers = toy_paths(each), [], []
    if (folder / "images.txt").is_file():
        return
    try:
        for path in paths[::each]:
            (draft / "images" / path).parent.mkdir(parents=True)
        for core in range(cores):
            share = map(str, (draft / "images", seed, each, core, cores))
            workers.append(subprocess.Popen([sys.executable, __file__, *share], text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for i in progress(range(len(paths)), len(paths), "drawing toy birds"):
            rows.append(workers[i % cores].stdout.readline().split())
            if not rows[-1]:
                raise OSError(workers[i % cores].stderr.read().strip().split("\n")[-1])
        annotate(draft, paths, rows, per_class)
        draft.rename(folder)
    except OSError as error:
        if (folder / "images.txt").is_file():
            return  # another process was faster
        raise OSError(f"cannot draw the toy birds in {folder}: {error}. Make room there, or choose "
                      "another --root.") from error
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
        shutil.rmtree(draft, ignore_errors=True)


def draw_share(folder, seed, each, core, cores):
    """Draw every `cores`-th image from `core` on; print a row for each: box, then x, y, visible of
    each part.
    """
    for i, path in list(enumerate(toy_paths(each)))[core::cores]:
        rng = np.random.default_rng([seed, *divmod(i, each)])
        picture, box, parts = photograph(list(SPECIES)[i // each], rng)
        jpeg = io.BytesIO()
        picture.save(jpeg, "jpeg", quality=92)
        Path(folder, path).write_bytes(jpeg.getvalue())  # on a full disk, save(path) may not raise
        numbers = list(box)
        for part in PARTS:
            numbers += (*parts[part], 1) if part in parts else (0, 0, 0)
        print(*(f"{number:.4g}" for number in numbers), flush=True)


def toy_paths(each):
    """Paths under images/ of `each` images a species, as CUB writes them."""
    return [f"{label:03}.{species}/{species}_{number:04}.jpg"
            for label, species in enumerate(SPECIES, 1) for number in range(1, each + 1)]


def annotate(folder, paths, rows, per_class):
    """Write CUB's text files, and val.txt, for images with these rows of draw_share."""
    train, val, test = per_class
    label, number = np.divmod(np.arange(len(paths)), train + val + test)
    columns = {  # of lines `<id> <value>`, ids from 1
        "classes": [f"{label:03}.{species}" for label, species in enumerate(SPECIES, 1)],
        "images": paths,
        "image_class_labels": label + 1,
        "train_test_split": (number < train + val).astype(int),
        "val": ((train <= number) & (number < train + val)).astype(int),
        "bounding_boxes": [" ".join(row[:4]) for row in rows],
        "parts/parts": PARTS}
    (folder / "parts").mkdir()
    for name, values in columns.items():
        lines = [f"{i} {value}\n" for i, value in enumerate(values, 1)]
        (folder / f"{name}.txt").write_text("".join(lines))
    lines = [f"{i} {part} {' '.join(row[3 * part + 1:3 * part + 4])}\n"
             for i, row in enumerate(rows, 1) for part in range(1, len(PARTS) + 1)]
    (folder / "parts" / "part_locs.txt").write_text("".join(lines))


# ------------------------------------------------------------------------------------------------
# Toy birds: the drawing
#
# A shape is (points, fill): a polygon (n, 2) and its colour, or one point and the name of the part
# it marks. A bird looks along +x, y points down, and its body is 1.3 long.
# ------------------------------------------------------------------------------------------------

SIDE, FINE = 96, 3  # pixels of an image, and how much finer it is drawn before it is averaged down
UPPER = ["5f7896", "768245", "a05f3c", "8a7050", "3f8285", "7f6488", "5f7068"]
LOWER = ["f1e7cd", "ecd2a6", "f0bd8d", "efe09a", "e3e6e2", "eacabd"]
BILL = ["45424a", "dda43c", "a08f7c", "cf6f40"]
BARK = ["7b6250", "938372", "66574c"]
# A scene: sky at the top and below, foliage from one colour to another, leaves.
SCENES = [["a9cfe6", "dfe9e2", "9dbb7c", "c4d3a0", "6f9a4a"],  # spring
          ["8fbad6", "b9d0a6", "6d9a5c", "8fb36c", "4f8040"],  # summer
          ["cfd9dc", "e3cfa4", "c98f52", "dcb268", "c56a32"],  # autumn
          ["c6d3de", "e6e9ea", "a7b6bd", "d3dbdd", "8f9c80"],  # winter
          ["e6b98f", "edd7b6", "9a8f76", "caa981", "7a8250"],  # evening
          ["5d7d5c", "7f9a66", "45664c", "a3b56f", "5f8a48"]]  # deep forest
OUTLINES = {  # corners x y of each part, in hundredths; `outline` rounds them
    "body": "54 -40  66 0  48 36  8 47  -34 33  -76 14  -74 0  -28 -26  2 -46  14 -74  36 -70",
    "belly": "56 -52  66 0  48 36  8 46  -34 32  -66 15  -30 10  10 6  26 -20  38 -50",
    "wing": "38 -20  34 8  10 24  -35 25  -90 20  -55 2  -20 -26  14 -36",
    "long coverts": "38 -20  33 8  6 20  -22 15  -30 -2  -24 -24  14 -36",
    "short coverts": "38 -20  33 8  16 20  -2 15  -10 -2  -4 -24  14 -36",
    "patch": "-5 -20  0 16  -30 20  -62 16  -40 -6",
    "square": "10 -9  -44 -12  -56 -14  -56 12  -44 12  10 10",
    "ribbon": "10 -8  -70 -10  -110 -13  -114 10  -70 8  10 8",
    "prong": "10 -6  -45 -12  -86 -34  -50 0  10 6",
    "feather": "10 -4  -45 -13  -66 -12  -66 12  -45 13  10 4",
    "band": "10 -16  40 -4  58 -16  66 -14  66 8  60 16  40 24  10 14",
    "cheek": "27 5  2 2  -20 10  -12 27  10 36  30 20",
    "bib": "28 6  4 10  -6 30  4 62  26 56  33 20",
    "peak": "24 -14  10 -28  -16 -42  -46 -66  -32 -20  -28 4  0 0",
    "tuft": "6 0  10 -38  0 -66  -10 -38  -6 0",
    "cone": "16 -12  30 -9  54 5  50 8  30 16  16 16",
    "spear": "16 -9  30 -6  95 4  93 6  30 12  16 13",
    "hook": "14 -20  38 -18  58 -4  55 34  47 30  42 14  16 16",
    "sickle": "16 -10  40 -12  74 4  86 50  82 50  62 18  40 8  16 13",
    "leaf": "0 0  30 -28  70 -20  100 0  70 20  30 28",
    "leaf half": "0 0  50 2  100 0  70 20  30 28",
}


def photograph(species, rng):
    """Draw one bird: image, box (x, y, width, height) and {visible part: (x, y)}, in pixels.

    Colours, pose, scene and light take the same random draws for every species: they tell nothing
    of it, and one seed shows all species in the same scene.
    """
    def colour(texts):
        return rgb(texts[rng.integers(len(texts))]) * rng.uniform(0.88, 1.1)

    scene = [rgb(text) * rng.uniform(0.94, 1.06, 3) for text in SCENES[rng.integers(len(SCENES))]]
    look = COMMON | SPECIES[species]
    look |= dict(upper=colour(UPPER), lower=colour(LOWER), beak=colour(BILL))
    tilt, nod, wag, roll = rng.uniform((-0.55, -0.3, -0.25, -0.12), (0.15, 0.3, 0.25, 0.12))
    scale, flip = rng.uniform(0.38, 0.54), rng.choice([-1, 1])
    tree = moved(branch(rng, bark=colour(BARK), green=scene.pop()), roll)
    shapes = moved(bird(look, tilt, nod, wag), roll)

    extent = np.concatenate([points for points, _ in shapes]) * (flip, 1)
    low, high = extent.min(0), extent.max(0)
    scale = min(scale, 0.95 / (high - low).max())
    room = 0.97 - (high - low) * scale
    place = 0.5 + rng.uniform(-0.5, 0.5, 2) * room - (low + high) / 2 * scale
    picture, parts = backdrop(rng, scene), {}
    draw = ImageDraw.Draw(picture)
    near, far = ("right", "left")[::flip]
    for points, fill in tree + shapes:
        points = (points * (scale * flip, scale) + place) * SIDE
        if isinstance(fill, str):
            parts[fill.replace("near", near).replace("far", far)] = points[0]
        else:
            draw.polygon((points * FINE).ravel().tolist(), pixel(fill))
    box = (*(low * scale + place) * SIDE, *(high - low) * scale * SIDE)
    return daylight(rng, picture.reduce(FINE)), box, parts


def daylight(rng, picture):
    """Light from one side, brightness, a colour cast, and a sensor's grain."""
    down, across = np.ogrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j]
    light = 1 + rng.uniform(-0.15, 0.15) * across + rng.uniform(-0.2, 0.1) * down
    cast = rng.uniform(0.82, 1.08) * rng.uniform(0.92, 1.08, 3)
    pixels = np.asarray(picture) * light[..., None] * cast + rng.normal(0, 2.5, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def backdrop(rng, scene):
    """Sky, clouds and foliage out of focus: drawn small, blurred and enlarged."""
    def blob(x, y, wide, high, colour):
        draw.ellipse((x - wide, y - high, x + wide, y + high), pixel(colour))

    above, below, *foliage = scene
    half, horizon, slope = SIDE // 2, rng.uniform(0, SIDE // 2), rng.uniform(-0.5, 0.5)
    picture = Image.new("RGB", (half, half))
    draw = ImageDraw.Draw(picture)
    for y in range(half):
        draw.line((0, y, half, y), pixel(mix(above, below, y / half)))
    for x, y, size in rng.uniform((0, 0, 2), (half, half / 2, 8), (rng.integers(5), 3)):
        blob(x, y, 2 * size, size, mix(above, WHITE, 0.5))
    for x, y, size, hue, haze in rng.uniform(0, (half, half / 2, 6, 1, 0.5), (40, 5)):
        y += horizon + slope * (x - half / 2)
        blob(x, y, size + 2, size + 2, mix(mix(*foliage, hue), below, haze))
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2)))
    return blurred.resize((SIDE * FINE, SIDE * FINE), Image.BILINEAR)


def branch(rng, bark, green):
    """The perch, its top at y = 0.64 under the feet, with leafy twigs clear of the legs."""
    slope, bend, thick, taper = rng.uniform((-0.2, -0.3, 0.15, 0.4), (0.2, 0.3, 0.26, 0.9))
    middle = 0.64 + thick * (1 + taper) / 4
    shapes = []
    for _ in range(rng.integers(2, 6)):
        x, sideways, up = rng.uniform((0.55, -0.4, 0.3), (1.8, 0.4, 0.9)) * rng.choice([-1, 1], 3)
        start, end = np.array([[x, middle + slope * x], [x + sideways, middle + slope * x + up]])
        shapes += [(stroke(start, mix(start, end, 0.5) + (0.06, 0), end, 0.055, 0.4), bark * 0.8)]
        leaves = rng.integers(2, 5)
        for angle, size, shade in rng.uniform((0, 0.22, 0.8), (6.28, 0.42, 1.2), (leaves, 3)):
            shapes += moved([(outline("leaf") * size, green * shade),
                             (outline("leaf half") * size, green * shade * 0.82)], angle, to=end)
    for drop, width, shade in ((0.02, 1.0, 0.62), (-0.006, 0.8, 1.0), (-0.04, 0.3, 1.18)):
        left, right = [(x, middle + slope * x + bend + drop) for x in (-2.8, 2.8)]
        shapes += [(stroke(left, (0, middle + drop), right, thick * width, taper), bark * shade)]
    for x, y in rng.uniform((-1.6, -0.03), (1.6, 0.05), (6, 2)):
        y += middle + slope * x + bend * (x / 2.8) ** 2
        crack = stroke((x, y), (x + 0.1, y), (x + 0.2, y + 0.2 * slope), 0.02, 0.3)
        shapes += [(crack, bark * 0.66)]
    return shapes


def bird(look, tilt, nod, wag):
    """The shapes of one bird from back to front, in the variants and colours of `look`.

    tilt, nod, wag: angles of body, head and tail in radians; the feet stay where they are.
    """
    trunk = moved(tail(look), wag, to=(-0.6, 0.08)) + body(look) + breast(look) + wing(look)
    neck, *hips = turned(corners("38 -60  0 32  16 30"), tilt)
    return legs(hips) + moved(trunk, tilt) + moved(head(look), nod, to=neck)


def legs(hips):
    """Two legs from the hips to the perch, three toes each."""
    shapes, colour = [], rgb("4a3c38")
    for (x, y), foot, side in zip(hips, (-0.02, 0.18), ("far", "near")):
        knee, ankle = ((x + foot) / 2 - 0.04, 0.5), (foot, 0.62)
        shapes += [(stroke((x, y), knee, ankle, 0.05), colour), mark(f"{side} leg", foot, 0.56)]
        for toe in (0.04, 0.11, 0.17):
            grip = stroke((foot - 0.06, 0.65), (foot + 0.03, 0.61), (foot + toe, 0.69), 0.05, 0.6)
            shapes += [(grip, colour)]
    return shapes


def body(look):
    """Upper parts from neck to rump, and the pale belly."""
    return (volume(outline("body"), look["upper"]) + volume(outline("belly"), look["lower"])
            + [mark("back", -0.1, -0.3), mark("belly", 0.1, 0.3), mark("breast", 0.45, 0.0)])


def breast(look):
    """A dark band or streaks; a bib hangs from the head."""
    places = "42 -20  54 -12  34 -5  47 0  26 10  55 8  38 14  18 22  30 27  45 22"
    marks = {"band": [outline("band")],
             "streaks": [stroke((x, y), (x - 0.02, y + 0.07), (x - 0.06, y + 0.14), 0.07, 0.3)
                         for x, y in corners(places)]}
    return [(points, mix(look["upper"], INK, 0.7)) for points in marks.get(look["breast"], [])]


def wing(look):
    """The folded wing: flight feathers under two rows of coverts; a pale patch or two pale bars."""
    dark, pale = mix(look["upper"], INK, 0.42), mix(look["lower"], WHITE, 0.75)
    shadow = outline("wing") + (0.02, 0.05)
    shapes = [mark("near wing", -0.1, 0.0), (shadow, mix(look["lower"], INK, 0.3))]
    shapes += volume(outline("wing"), dark, 0.8, 0.05)
    for y in (0.1, 0.0, -0.1):
        feather = stroke((-0.1, y), (-0.38, y + 0.08), (-0.74 + 0.3 * y, 0.155), 0.02)
        shapes += [(feather, mix(dark, WHITE, 0.22))]
    if look["wing"] == "patch":
        shapes += volume(outline("patch"), pale, 0.85)
    for row, x, light in (("long coverts", -0.2, 0.3), ("short coverts", 0.0, 0.6)):
        shapes += volume(outline(row), mix(dark, look["upper"], light), 0.86, 0.1)
        if look["wing"] == "bars":
            bar = stroke((x - 0.02, -0.24), (x - 0.06, -0.02), (x + 0.06, 0.17), 0.085)
            shapes += [(bar, pale)]
    return shapes


def tail(look):
    """Square, forked, a long ribbon, or a fan of five feathers."""
    feathers = {"square": [outline("square")], "ribbon": [outline("ribbon")],
                "fork": [outline("prong"), outline("prong") * (1, -1)],
                "fan": [turned(outline("feather"), turn) for turn in (-0.64, 0.64, -0.32, 0.32, 0)]}
    shapes = [mark("tail", -0.4, 0.0)]
    for points in feathers[look["tail"]]:
        shapes += [(points, mix(look["upper"], INK, 0.75)),
                   (mix(points, points.mean(0), 0.16), mix(look["upper"], INK, 0.4))]
    return shapes


def head(look):
    """The head about its own centre: crest, skull, cheek, bib, bill and eye."""
    shapes = crest(look) + volume(ellipse(0, 0, 0.3, 0.28), look["upper"], 0.8)
    shapes += [(outline("cheek"), mix(look["lower"], INK, 0.06)), mark("crown", 0.0, -0.24),
               mark("forehead", 0.2, -0.16), mark("nape", -0.24, 0.0), mark("throat", 0.14, 0.24)]
    if look["breast"] == "bib":
        shapes += [(outline("bib"), mix(look["upper"], INK, 0.8))]
    bill = outline(look["bill"])
    shapes += [(bill, mix(look["beak"], INK, 0.55)), (mix(bill, (0.25, -0.03), 0.15), look["beak"]),
               mark("beak", 0.36, 0.02)]
    return shapes + eye(look)


def crest(look):
    """A peaked hood, a tuft of four feathers, or one curled plume."""
    colour = mix(look["upper"], INK, 0.25)
    tuft = [(outline("tuft"), mix(colour, INK, 0.4)), (outline("tuft") * (0.6, 0.9), colour)]
    return {"none": [],
            "peak": volume(outline("peak"), colour),
            "tuft": [shape for angle in (-1.0, -0.6, -0.2, 0.2) for shape in moved(tuft, angle)],
            "plume": [(stroke((0.04, -0.2), (0.02, -0.5), (0.26, -0.6), 0.055, 1.2), INK),
                      (ellipse(0.27, -0.56, 0.1, 0.085), INK)]}[look["crest"]]


def eye(look):
    """A dark eye: plain, in a pale ring, under a pale brow, or in a dark mask."""
    pale = mix(look["lower"], WHITE, 0.8)
    around = {
        "plain": [],
        "ring": [(ellipse(0.08, -0.05, 0.135, 0.135), pale)],
        "brow": [(stroke((0.24, -0.1), (0.02, -0.16), (-0.27, -0.06), 0.1, 0.7), pale)],
        "mask": [(stroke((0.26, 0.02), (0.03, -0.05), (-0.27, 0.05), 0.2, 0.6), INK)]}
    return around[look["eye"]] + [mark("near eye", 0.08, -0.05),
                                  (ellipse(0.08, -0.05, 0.075, 0.075), INK),
                                  (ellipse(0.105, -0.08, 0.027, 0.027), WHITE)]


def mark(part, x, y):
    """The place of a part, carried along with the shapes around it."""
    return np.array([[x, y]], float), part


def volume(points, colour, shadow=0.7, light=0.16):
    """A rounded form lit from above: its outline in shadow, then smaller and lighter copies."""
    lit = mix(points.min(0), points.max(0), np.array([0.62, 0.14]))
    t = np.linspace(0, 0.8, 10)[:, None]
    colours = mix(colour * shadow, mix(colour, WHITE, light), (t / 0.8) ** 0.7)
    return list(zip(mix(points, lit, t[:, None]), colours))


def corners(text):
    """Points (n, 2) from text in hundredths."""
    return np.array(text.split(), float).reshape(-1, 2) / 100


@functools.cache
def outline(name):
    """One of OUTLINES as a polygon, its corners cut three times (Chaikin 1974)."""
    points = corners(OUTLINES[name])
    for _ in range(3):
        after = np.roll(points, -1, axis=0)
        points = np.stack([mix(points, after, 0.25), mix(points, after, 0.75)], 1).reshape(-1, 2)
    return points


def ellipse(x, y, rx, ry):
    """An ellipse as a polygon."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


# Weights of three points: the parabola through them at times T, and its slope.
T = np.linspace(0, 1, 12)
THROUGH = np.stack([(1 - T) * (1 - 2 * T), 4 * T * (1 - T), T * (2 * T - 1)], 1)
SLOPE = np.stack([4 * T - 3, 4 - 8 * T, 4 * T - 1], 1)


def stroke(start, middle, end, width, taper=1.0):
    """A band along the parabola through three points; at the end it is `taper` times as wide."""
    points = np.array([start, middle, end])
    line, along = THROUGH @ points, SLOPE @ points
    half = width / 2 * mix(1, taper, T) / np.hypot(*along.T)
    across = along[:, ::-1] * (-1, 1) * half[:, None]
    return np.concatenate([line + across, (line - across)[::-1]])


def turned(points, angle):
    """Points (..., 2) rotated about the origin; with y down, a positive angle turns clockwise."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def moved(shapes, angle, to=(0, 0)):
    """Shapes rotated about the origin, which then goes to `to`."""
    return [(turned(points, angle) + to, fill) for points, fill in shapes]


def mix(a, b, t):
    """From a (t = 0) to b (t = 1), for colours and points alike."""
    return a + (np.asarray(b) - a) * t


def rgb(text):
    """Colour from six hex digits, as floats 0 to 255."""
    return np.array(list(bytes.fromhex(text)), float)


def pixel(colour):
    """A colour as Pillow takes it."""
    return tuple(min(255, int(value)) for value in colour.tolist())


INK, WHITE = rgb("221f24"), rgb("fffaf0")

if __name__ == "__main__":
    draw_share(sys.argv[1], *map(int, sys.argv[2:]))
