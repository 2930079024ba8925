"""Image sets: which files, what they show, which split each belongs to.

`read(name_or_folder, root)` returns `Records`. A set is one small function, from its folder to
Records, and one entry of `SETS` at the end of this file, which says where the set comes from.
`complete` cuts the splits that a set lacks; `smaller` takes a part of one.

A reader believes nothing: a line that it cannot use, an image that is listed and not there, a class
nobody named is an error with file and line. A silently wrong label costs more than a crash.
"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import downloads, matlab, toybirds
from .downloads import Archive
from .errors import UserError


class Records(NamedTuple):
    """A set of N images. A label indexes `classes` and is -1 where unknown."""
    paths: list[Path]
    labels: np.ndarray                # (N,) int64
    classes: list[str]
    splits: np.ndarray                # (N,) of "train", "val", "test"
    boxes: np.ndarray | None = None   # (N, 4) float32: x, y, width, height in pixels
    banner: int = 0                   # rows of pixels, at the foot of each image, that are no photo
    name: str = ""

    def take(self, rows):
        """The Records of some images; rows: indices, or a mask."""
        rows = np.arange(len(self.paths))[rows]
        return self._replace(paths=[self.paths[row] for row in rows], labels=self.labels[rows],
                             splits=self.splits[rows],
                             boxes=None if self.boxes is None else self.boxes[rows])


class Set(NamedTuple):
    """What is known of a set with a name."""
    read: Callable              # (folder) or, where there are levels, (folder, level) -> Records
    places: tuple               # the folder's names under root; a download goes into the first
    signs: tuple                # paths, any of which tells this layout
    levels: tuple = ()          # its kinds of labels, from fine to coarse
    archives: tuple = ()        # what can be downloaded
    by_hand: str = ""           # else: what to fetch, and how to lay it out


def read(name_or_folder, root, labels=None):
    """Return the Records of a named set kept under `root`, or of any folder of images.

    "toy" is drawn if it is not there; a set with a public source is downloaded. A folder's layout
    is told by its files: that of a named set, else class folders or loose images. A folder called
    like a set is `./toy`. labels: one of the set's levels; None is the finest.
    FileNotFoundError says what is missing and where to get it, ValueError what cannot be used.
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    by_name = name in SETS
    if by_name:
        known = SETS[name]
    elif folder.is_dir():
        name, (known, folder) = folder.resolve().name, told(folder)
    else:
        raise FileNotFoundError(f"no folder {folder}. Expected a folder of images, or one of the "
                                f"sets {', '.join(SETS)}.")
    if labels not in (None, *known.levels):
        kinds = f"the labels {', '.join(known.levels)}" if known.levels else "one kind of labels"
        raise UserError(f"{name} has no labels {labels!r}: it has {kinds}.")
    if by_name:
        folder = fetched(name, Path(root))
    level = [labels or known.levels[0]] if known.levels else []
    return complete(known.read(folder, *level)._replace(name=name))


def fetched(name, root):
    """The folder in root with the files of a named set; drawn or downloaded if it is not there."""
    known, top = SETS[name], root / SETS[name].places[0]
    if name == "toy":
        toybirds.draw(top)
    there = [root / place for place in known.places if (root / place).is_dir()]
    if not there and not known.archives:
        raise FileNotFoundError(f"no folder {top}. {known.by_hand.format(folder=top)}")
    if not there:
        downloads.obtain(name, known.archives, root, known.places[0])
    for top in there or [top]:
        for folder in within(top, 2):
            if shows(folder, known):
                return folder
    raise FileNotFoundError(f"{top} holds no {' and no '.join(known.signs)}: it is not {name} as "
                            "its source unpacks it. Take it away and run this again to fetch it; "
                            'see imagesets/README.md.')


def told(folder):
    """The set whose layout a folder has, or one folder in it, and where; else any folder's."""
    found = [(known, inner) for inner in within(folder, 1) for known in SETS.values()
             if shows(inner, known)]
    inner = sorted({inner.name for _, inner in found})
    if len(inner) > 1 and found[0][1] != folder:
        raise UserError(f"{folder} holds {' and '.join(inner)}, each a data set. Name one of "
                         "them.")
    return found[0] if found else (Set(any_folder, (), ()), folder)


def shows(folder, known):
    """Whether a folder holds what tells the layout of a set."""
    return any((folder / sign).exists() for sign in known.signs)


def complete(records):
    """Cut a missing test split (20 %) or val split (10 %) from train, and check images and classes.

    The cut takes its share of each class, at least one image, and leaves at least one. Its seed is
    fixed: the splits do not depend on a run's seed. A split that the set has is not touched: train/
    and val/ without test/ keep their val, and test is cut from train. Unlabelled images stay in
    train. ValueError if an image comes twice, or if val or test holds a class of which train, where
    labelled, has no image.
    """
    seen = set()
    for path in records.paths:
        if path in seen:
            raise UserError(f"{records.name} lists {path} twice. Expected each image once.")
        seen.add(path)
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
        raise UserError(f"{records.name}: val or test holds {', '.join(lacking)}, of which train "
                         "has no image. Move some to train, or take the class out.")
    return records._replace(splits=splits)


def smaller(records, share=None, classes=None):
    """A part of a set, for quick trials: of its classes, and of the images of each and each split.

    share: in (0, 1], at least one image is kept; classes: how many; None is all. The draws are
    fixed, and nested: what a small share or count holds, a larger one holds, too. Images without a
    label are a class of their own, which is left out where classes are chosen.
    ValueError for more classes than there are.
    """
    labels = records.labels
    if classes is not None:
        if classes > len(records.classes):
            raise UserError(f"{records.name} has {len(records.classes)} classes, not {classes}.")
        order = np.random.default_rng(0).permutation(len(records.classes))
        chosen = np.sort(order[:classes])
        records = records.take(np.isin(labels, chosen))
        labels = np.searchsorted(chosen, records.labels)
        records = records._replace(labels=labels, classes=[records.classes[i] for i in chosen])
    if share is not None:
        kept = []
        for i, split in enumerate(("train", "val", "test")):
            for label in range(-1, len(records.classes)):
                members = np.flatnonzero((labels == label) & (records.splits == split))
                order = np.random.default_rng((i, label + 1)).permutation(members)
                kept += order[:max(1, round(share * len(members)))].tolist()
        records = records.take(sorted(kept))
    return records


# ------------------------------------------------------------------------------------------------
# Readers: a folder in a known layout -> Records
# ------------------------------------------------------------------------------------------------


def cub(folder):
    """Caltech-UCSD Birds 200-2011, by its text files alone: the archive holds images they lack.

    Labels count from 1 in the files, from 0 here. CUB has no val split; one more file, val.txt,
    with lines `<image_id> <is_val>`, may set it, as the toy birds do.
    """
    names = table(folder / "classes.txt", "<class_id> <name>", str)
    label_of = {class_id: label for label, class_id in enumerate(names)}
    images = table(folder / "images.txt", "<image_id> <path>", once())
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


def nabirds(folder, level):
    """NABirds (Van Horn et al. 2015), in CUB's layout. Its classes.txt names a whole tree: the
    categories, of which there are images, and the groups above them.

    level: "category", or "coarse", the groups under the root. Ids have gaps; labels have none.
    """
    records = cub(folder)
    names = table(folder / "classes.txt", "<class_id> <name>", str)
    ids = list(names)                                        # of each label in `records`
    if level == "coarse":
        parents = table(folder / "hierarchy.txt", "<class_id> <parent_id>", one_of(names))
        ids = [highest(class_id, parents, folder) for class_id in ids]
    rows = [(path, ids[label], split)
            for path, label, split in zip(records.paths, records.labels, records.splits)]
    used = {class_id for _, class_id, _ in rows}
    found = named(rows, [class_id for class_id in names if class_id in used])
    return found._replace(classes=[names[class_id] for class_id in found.classes],
                          boxes=records.boxes)


def highest(class_id, parents, folder):
    """The highest group in which a class lies, below the root, which has no parent."""
    for _ in parents:
        if parents.get(class_id) not in parents:
            return class_id
        class_id = parents[class_id]
    raise UserError(f"{folder / 'hierarchy.txt'}: {class_id} lies below itself.")


def cars(folder):
    """Stanford Cars (Krause et al. 2013): two folders of images and a devkit of .mat files; or, as
    others hand it on, one folder a class.

    The devkit's own cars_test_annos.mat has no labels. Boxes are corners, counted from 1.
    """
    devkit = folder / "devkit"
    if not devkit.is_dir():
        return any_folder(folder)
    names, = matlab.columns(devkit / "cars_meta.mat", {"class_names": str})
    tests = [place / "cars_test_annos_withlabels.mat" for place in (folder, devkit)]
    tests = next((file for file in tests if file.is_file()), tests[0])
    rows, boxes, fields = [], [], {"annotations.fname": str, "annotations.class": int}
    fields |= {f"annotations.bbox_{side}": int for side in ("x1", "y1", "x2", "y2")}
    for split, file in (("train", devkit / "cars_train_annos.mat"), ("test", tests)):
        lines = matlab.columns(file, fields)
        images = unnested(folder / f"cars_{split}")
        for image, label, x1, y1, x2, y2 in zip(*lines):
            if not 1 <= label <= len(names):
                raise UserError(f"{file}: {image} is of class {label}, of {len(names)}.")
            rows.append((listed(images / image, file), names[label - 1], split))
            boxes.append((x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1))
    return named(rows, names)._replace(boxes=np.array(boxes, np.float32))


def aircraft(folder, level):
    """FGVC-Aircraft (Maji et al. 2013), data/ of its archive: 100 variants of 70 families by 30
    manufacturers.

    Names hold spaces, ids leading zeros. Each photograph ends in a banner, 20 pixels high, that
    names its owner. Boxes are corners, counted from 1.
    """
    listing = {"variant": "variants.txt", "family": "families.txt",
               "manufacturer": "manufacturers.txt"}[level]
    classes = list(table(folder / listing, "<name>"))
    rows = []
    for split in ("train", "val", "test"):
        file = folder / f"images_{level}_{split}.txt"
        lines = table(file, "<image_id> <name>", one_of(classes))
        rows += [(listed(folder / "images" / f"{image}.jpg", file), name, split)
                 for image, name in lines.items()]
    ids = [path.stem for path, _, _ in rows]
    corners = table(folder / "images_box.txt", "<image_id> <xmin> <ymin> <xmax> <ymax>",
                    float, float, float, float, keys=dict.fromkeys(ids))
    x1, y1, x2, y2 = np.array([corners[image] for image in ids], np.float32).T
    boxes = np.stack([x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], 1)
    return named(rows, classes)._replace(boxes=boxes, banner=20)


def flowers(folder):
    """Oxford Flowers-102 (Nilsback & Zisserman 2008). Its files number the classes, from 1; their
    names are on its web page alone."""
    labels, = matlab.columns(folder / "imagelabels.mat", {"labels": int})
    file, rows = folder / "setid.mat", []
    lists = matlab.columns(file, {"trnid": int, "valid": int, "tstid": int})
    for split, images in zip(("train", "val", "test"), lists):
        for image in images:
            if not 1 <= image <= len(labels) or not 1 <= labels[image - 1] <= 102:
                raise UserError(f"{file}: image {image} has no label from 1 to 102.")
            path = listed(folder / "jpg" / f"image_{image:05}.jpg", file)
            rows.append((path, f"{labels[image - 1]:03}", split))
    return named(rows)


def pets(folder, level):
    """Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of 2 species. An image's name is its breed
    and a number; among images/ lie files that no list has."""
    breeds, rows = {}, []
    for split, listing in (("train", "trainval"), ("test", "test")):
        file = folder / "annotations" / f"{listing}.txt"
        lines = table(file, "<image_id> <class_id> <species: 1, 2> <breed_id>", int,
                      {"1": "cat", "2": "dog"}.get, int)
        for image, (breed, species, _) in lines.items():
            name = image.rpartition("_")[0]
            if breeds.setdefault(name, (breed, species)) != (breed, species):
                raise UserError(f"{file}: {image} is of class {breed}, a {species}; other images "
                                 f"of {name} are of class {breeds[name][0]}, a {breeds[name][1]}.")
            path = listed(folder / "images" / f"{image}.jpg", file)
            rows.append((path, species if level == "species" else name, split))
    ids = [breed for breed, _ in breeds.values()]
    if len(set(ids)) < len(ids):
        raise UserError(f"{folder / 'annotations'}: two breeds have the same class.")
    return named(rows, ["cat", "dog"] if level == "species" else sorted(breeds, key=breeds.get))


CASSAVA = ["cbb", "cbsd", "cgm", "cmd", "healthy"]


def cassava(folder):
    """Cassava leaf diseases, 2019 (Mwebaze et al.): <split>/<class>/ folders.

    extraimages/, where it is there, is train images without a label. The public mirror has all
    three splits; Kaggle's test/ has no labels and is left out, so that val and test are cut.
    """
    rows = []
    for split in ("train", "val", "valid", "validation", "test"):
        for name in CASSAVA:
            images = images_in(unnested(folder / split) / name, deep=True)
            rows += [(path, name, "val" if split[0] == "v" else split) for path in images]
    extra = images_in(unnested(folder / "extraimages"), deep=True)
    if not rows:
        raise FileNotFoundError(f"no images under {folder / 'train' / 'cbb'} and its neighbours. "
                                "Unpack the set again.")
    return named(rows + [(path, None, "train") for path in extra], CASSAVA)


def cassava_paper(folder):
    """Cassava 2019 as split by Al Breiki et al. 2021: of the labelled train images those whose
    number 4 divides are test. Their paper chose on test; here val is cut from the others."""
    records = cassava(folder)
    records = records.take(records.splits == "train")
    for i in np.flatnonzero(records.labels >= 0):
        number = re.search(r"\d+$", records.paths[i].stem)
        if not number:
            raise UserError(f"{records.paths[i]} has no number, by which the paper splits.")
        records.splits[i] = "train" if int(number[0]) % 4 else "test"
    return records


def cassava_2020(folder):
    """Cassava 2020, Kaggle's: train.csv and train_images/. It shares images with that of 2019."""
    file = folder / "train.csv"
    lines = table(file, "<image>,<label: 0 to 4>", one_of("01234"), separator=",",
                  header="image_id,label")
    return named([(listed(folder / "train_images" / image, file), CASSAVA[int(label)], "train")
                  for image, label in lines.items()], CASSAVA)


def grocery(folder, level):
    """Grocery Store (Klasson et al. 2019), dataset/ of its repository: 81 classes in 43 groups."""
    file = folder / "classes.csv"
    lines = table(file, "<name>,<class_id>,<group>,<group_id>,<more>", once(int), str, int, str,
                  separator=",", header="Class Name (str),Class ID (int),Coarse Class Name (str)")
    fine = {class_id: name for name, (class_id, *_) in lines.items()}
    groups = {group_id: group for _, group, group_id, _ in lines.values()}
    name_of = {}                                             # (class_id, group_id), as written
    for name, (class_id, group, group_id, _) in lines.items():
        if groups[group_id] != group:
            raise UserError(f"{file}: group {group_id} is {group} and {groups[group_id]}.")
        name_of[str(class_id), str(group_id)] = group if level == "coarse" else name
    rows = []
    for split in ("train", "val", "test"):
        file = folder / f"{split}.txt"
        images = table(file, "<path>, <class_id>, <group_id>",
                       lambda text: name_of.get(tuple(re.split(" *, *", text))), separator=",")
        rows += [(listed(folder / path, file), name, split) for path, name in images.items()]
    classes = groups if level == "coarse" else fine
    return named(rows, [classes[i] for i in sorted(classes)])


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
        raise UserError(f"{folder} holds {', '.join(top.name for top in tops)} beside "
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
    return named(rows)


def named(rows, classes=None):
    """The Records of rows (path, class name or None, split); classes: in their order, or sorted."""
    paths, names, splits = zip(*rows)
    classes = sorted(set(names) - {None}) if classes is None else classes
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise UserError(f"{os.path.commonpath(paths)}: two classes have one name, of "
                         f"{', '.join(classes)}.")
    labels = np.array([label_of.get(name, -1) for name in names], np.int64)
    return Records(list(paths), labels, list(classes), np.array(splits))


# ------------------------------------------------------------------------------------------------
# Tables: lines of text
# ------------------------------------------------------------------------------------------------


def table(path, form, *parse, keys=None, separator=None, header=""):
    """Read lines `key value ...` into {key: value}; {key: (value, ...)} for none or several values.

    form: the line in words, for the error. parse: for each value a function of its text, which
    returns None or raises ValueError for what it refuses; the last value takes the rest of the
    line. keys: if given, each must have a line and no other may. header: what line 1 begins with.
    FileNotFoundError names the file; ValueError file and line, for a line that does not fit or
    repeats a key.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}. Expected lines {form}. Unpack the set again; "
                                "imagesets/README.md has its layout.")
    found = {}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        if header and not file.readline().startswith(header):
            raise UserError(f"{path}, line 1: expected {header} ...")
        for number, line in enumerate(file, 2 if header else 1):
            if not line.strip():
                continue
            key, *texts = [text.strip() for text in line.strip().split(separator, len(parse))]
            try:
                values = [function(text) for function, text in zip(parse, texts, strict=True)]
            except ValueError:
                values = [None]
            if None in values or key in found or key not in (keys or [key]):
                raise UserError(f"{path}, line {number}: cannot use {line.strip()!r}. Expected "
                                 f"{form} with known ids, each once.")
            found[key] = values[0] if len(values) == 1 else tuple(values)
    if not found:
        raise UserError(f"{path} is empty. Expected lines {form}.")
    for key in keys or ():
        if key not in found:
            raise UserError(f"{path} has no line for {key}. Expected lines {form}.")
    return found


def one_of(names):
    """For `table`: a text that is among the names."""
    return {name: name for name in names}.get


def once(kind=str):
    """For `table`: a text, as `kind`, that no line before had."""
    seen = set()

    def parse(text):
        value = kind(text)
        if value in seen:
            raise ValueError
        seen.add(value)
        return value
    return parse


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def listed(path, listing):
    """Return `path` if it is there; FileNotFoundError names it and the file that lists it."""
    if not os.path.isfile(path):  # Path's own raises for names that are too long
        raise FileNotFoundError(f"no image {path}, which {listing} lists. Unpack the set again.")
    return path


def within(folder, deep):
    """The folder and those up to `deep` levels below it, breadth first."""
    level = [folder]
    yield folder
    for _ in range(deep):
        level = [inner for place in level for inner in folders_in(place)]
        yield from level


def unnested(folder):
    """folder/folder, where that is there: what unpacking an archive into its own name makes."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def folders_in(folder):
    """Sorted visible sub-folders, without links that lead back to the folder or above it."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
                  and not folder.resolve().is_relative_to(path.resolve()))


def images_in(folder, deep=False):
    """Sorted visible images in a folder, if it is there; if `deep`, in its sub-folders too, links
    excepted."""
    def refuse(error):  # os.walk would pass over a folder that may not be read, and lose a class
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    extensions = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if deep and name[0] != "."]
        found += [Path(parent, name) for name in files
                  if name[0] != "." and name.lower().endswith(extensions)]
    return sorted(found)


# ------------------------------------------------------------------------------------------------
# The sets with a name
# ------------------------------------------------------------------------------------------------

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
CASSAVA_2019 = dict(
    places=("cassavaleafdata", "cassava", "cassava-disease"),
    signs=("train/cbb", "train/train/cbb"),
    archives=(Archive("cassavaleafdata.zip",
                      "https://storage.googleapis.com/emcassavadata/cassavaleafdata.zip",
                      1_350_000_000),))
SETS = {
    "nabirds": Set(  # before cub and toy, whose layout it has, and one file more
        nabirds, ("nabirds",), ("hierarchy.txt",), ("category", "coarse"),
        by_hand="Register at https://dl.allaboutbirds.org/nabirds, fetch nabirds.tar.gz (md5 "
                "df21a9e4db349a14e2b08adfd45873bd), and unpack it so that {folder}/images.txt is "
                "there."),
    "cub": Set(
        cub, ("CUB_200_2011",), ("image_class_labels.txt",),
        archives=(Archive("CUB_200_2011.tgz",
                          "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                          1_150_585_339, "97eceeb196236b17998738112f37df78"),)),
    "cars": Set(
        cars, ("stanford_cars", "cars"),
        ("devkit/cars_meta.mat", "train/AM General Hummer SUV 2000"),
        by_hand="Its own site is gone. Fetch a copy, such as those on Kaggle, and lay it out as "
                "{folder}/cars_train/*.jpg, cars_test/*.jpg, devkit/*.mat and "
                "cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10); or as "
                "{folder}/train/<class>/*.jpg and test/<class>/*.jpg."),
    "aircraft": Set(
        aircraft, ("fgvc-aircraft-2013b",), ("images_variant_train.txt",),
        ("variant", "family", "manufacturer"),
        archives=(Archive("fgvc-aircraft-2013b.tar.gz",
                          OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                          2_753_340_328, "d4acdd33327262359767eeaa97a4f732"),)),
    "cassava": Set(cassava, **CASSAVA_2019),
    "cassava-paper": Set(cassava_paper, **CASSAVA_2019),
    "cassava-2020": Set(
        cassava_2020, ("cassava-leaf-disease-classification",),
        ("label_num_to_disease_map.json", "train_images"),
        by_hand="Fetch the data of https://www.kaggle.com/c/cassava-leaf-disease-classification, "
                "which takes an account, and unpack it so that {folder}/train.csv is there."),
    "flowers": Set(
        flowers, ("flowers-102",), ("setid.mat",),
        archives=(Archive("102flowers.tgz", OXFORD + "flowers/102/102flowers.tgz",
                          344_862_509, "52808999861908f626f3c1f4e79d11fa"),
                  Archive("imagelabels.mat", OXFORD + "flowers/102/imagelabels.mat",
                          502, "e0620be6f572b9609742df49c70aed4d"),
                  Archive("setid.mat", OXFORD + "flowers/102/setid.mat",
                          14_989, "a5357ecc9cb78c4bef273ce3793fc85c"))),
    "pets": Set(
        pets, ("oxford-iiit-pet",), ("annotations/trainval.txt",), ("breed", "species"),
        archives=(Archive("oxford-iiit-pet-images.tar.gz", OXFORD + "pets/data/images.tar.gz",
                          791_918_971, "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                  Archive("oxford-iiit-pet-annotations.tar.gz",
                          OXFORD + "pets/data/annotations.tar.gz",
                          19_173_078, "95a8c909bbe2e81eed6a22bccdf3f68f"))),
    "grocery": Set(
        grocery, ("GroceryStoreDataset-master", "GroceryStoreDataset", "grocery"),
        ("classes.csv",), ("fine", "coarse"),
        archives=(Archive("GroceryStoreDataset-master.zip", "https://github.com/marcusklasson/"
                          "GroceryStoreDataset/archive/refs/heads/master.zip", 123_000_000),)),
    "toy": Set(cub, ("toy",), ("image_class_labels.txt",)),
}
