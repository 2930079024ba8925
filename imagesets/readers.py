"""Readers: one function for each layout, from the set's folder to Records.

Readers validate every line. A line that does not fit, a listed image that is missing, or a class
without a name is an error with file and line, because a wrong label would go unnoticed.
"""

import functools
import re

import numpy as np

from .errors import UserError
from .files import list_images, require_image, unnest
from .folders import any_folder
from .matlab import read_columns
from .records import Records, make_records
from .tables import one_of, read_table, unique


def cub(folder):
    """Caltech-UCSD Birds 200-2011 (Wah et al. 2011).

    Only listed images are read: the archive holds others too. Labels count from 1 in the files,
    from 0 here. CUB has no val split; an additional file val.txt with lines `<image_id> <is_val>`
    sets one (the toy birds have it).
    """
    names = read_table(folder / "classes.txt", "<class_id> <name>", str)
    label_of = {class_id: label for label, class_id in enumerate(names)}
    images = read_table(folder / "images.txt", "<image_id> <path>", unique(str))
    read_column = functools.partial(read_table, keys=images)
    labels = read_column(folder / "image_class_labels.txt", "<image_id> <class_id>", label_of.get)
    splits = read_column(folder / "train_test_split.txt", "<image_id> <is_train>",
                         {"1": "train", "0": "test"}.get)
    boxes = None
    if (folder / "bounding_boxes.txt").is_file():
        boxes = read_column(folder / "bounding_boxes.txt", "<image_id> <x> <y> <width> <height>",
                            float, float, float, float)
    if (folder / "val.txt").is_file():
        is_val = read_column(folder / "val.txt", "<image_id> <is_val>",
                             {"1": True, "0": False}.get)
        splits = {image: "val" if is_val[image] else splits[image] for image in images}
    return Records(
        [require_image(folder / "images", path, folder / "images.txt") for path in images.values()],
        np.array([labels[image] for image in images], np.int64),
        list(names.values()),
        np.array([splits[image] for image in images]),
        boxes and np.array([boxes[image] for image in images], np.float32))


def nabirds(folder, level):
    """NABirds (Van Horn et al. 2015), in CUB's layout; its classes.txt names a tree of groups.

    level: "category", the leaves, of which there are images; "coarse", the groups below the root.
    Class ids have gaps; labels have none.
    """
    records = cub(folder)
    names = read_table(folder / "classes.txt", "<class_id> <name>", str)
    ids = list(names)                                        # the class id of each label
    if level == "coarse":
        parents = read_table(folder / "hierarchy.txt", "<class_id> <parent_id>", one_of(names))
        ids = [top_group(class_id, parents, folder) for class_id in ids]
    rows = [(path, ids[label], split)
            for path, label, split in zip(records.paths, records.labels, records.splits)]
    used = {class_id for _, class_id, _ in rows}
    by_id = make_records(rows, [class_id for class_id in names if class_id in used])
    return by_id._replace(classes=[names[class_id] for class_id in by_id.classes],
                          boxes=records.boxes)


def top_group(class_id, parents, folder):
    """The ancestor of a class just below the root; the root has no parent."""
    for _ in parents:
        if parents.get(class_id) not in parents:
            return class_id
        class_id = parents[class_id]
    raise UserError(f"{folder / 'hierarchy.txt'}: {class_id} is its own ancestor. Unpack the set "
                    "again.")


def cars(folder):
    """Stanford Cars (Krause et al. 2013): two folders of images and a devkit of .mat files, or
    class folders, as in some copies.

    The devkit's own cars_test_annos.mat has no labels. Boxes are given by corners, from 1.
    """
    devkits = [folder / "devkit", folder / "car_devkit" / "devkit"]
    devkit = next((top for top in devkits if top.is_dir()), None)
    if not devkit:
        return any_folder(folder)
    names, = read_columns(devkit / "cars_meta.mat", {"class_names": str})
    test_files = [file for top in (folder, devkit, devkit.parent)  # a browser adds " (1)"
                  for file in sorted(top.glob("cars_test_annos_withlabels*.mat"))]
    test_file = (test_files or [folder / "cars_test_annos_withlabels.mat"])[0]
    rows, boxes, fields = [], [], {"annotations.fname": str, "annotations.class": int}
    fields |= {f"annotations.bbox_{side}": int for side in ("x1", "y1", "x2", "y2")}
    for split, file in (("train", devkit / "cars_train_annos.mat"), ("test", test_file)):
        images = unnest(folder / f"cars_{split}")
        for image, label, x1, y1, x2, y2 in zip(*read_columns(file, fields)):
            if not 1 <= label <= len(names):
                raise UserError(f"{file}: {image} has class {label}. Expected 1 to {len(names)}; "
                                "unpack the set again.")
            rows.append((require_image(images, image, file), names[label - 1], split))
            boxes.append((x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1))
    return make_records(rows, names)._replace(boxes=np.array(boxes, np.float32))


def aircraft(folder, level):
    """FGVC-Aircraft (Maji et al. 2013), data/ of its archive: 100 variants, 70 families, 30
    manufacturers.

    Names contain spaces, and ids start with zeros. The lowest 20 rows of pixels of each photo are a
    banner with its owner. Boxes are given by corners, from 1.
    """
    names_file = {"variant": "variants.txt", "family": "families.txt",
                  "manufacturer": "manufacturers.txt"}[level]
    classes = list(read_table(folder / names_file, "<name>"))
    rows = []
    for split in ("train", "val", "test"):
        file = folder / f"images_{level}_{split}.txt"
        lines = read_table(file, "<image_id> <name>", one_of(classes))
        rows += [(require_image(folder / "images", f"{image}.jpg", file), name, split)
                 for image, name in lines.items()]
    ids = [path.stem for path, _, _ in rows]
    corners = read_table(folder / "images_box.txt", "<image_id> <xmin> <ymin> <xmax> <ymax>",
                         float, float, float, float, keys=dict.fromkeys(ids))
    x1, y1, x2, y2 = np.array([corners[image] for image in ids], np.float32).T
    boxes = np.stack([x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], 1)
    return make_records(rows, classes)._replace(boxes=boxes, banner=20)


FLOWERS = (  # in the order of the labels, from 1
    "pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, "
    "tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's "
    "foot, king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian "
    "lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red "
    "ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, "
    "sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, "
    "ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton "
    "daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, "
    "oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop "
    "of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese "
    "anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus, "
    "bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, "
    "morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, "
    "columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, "
    "hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican "
    "petunia, bromelia, blanket flower, trumpet creeper, blackberry lily").split(", ")


def flowers(folder):
    """Oxford Flowers-102 (Nilsback & Zisserman 2008). Classes are numbered from 1; their names,
    which only the web page has, are in FLOWERS."""
    labels, = read_columns(folder / "imagelabels.mat", {"labels": int})
    file, rows = folder / "setid.mat", []
    lists = read_columns(file, {"trnid": int, "valid": int, "tstid": int})
    for split, images in zip(("train", "val", "test"), lists):
        for image in images:
            if not 1 <= image <= len(labels) or not 1 <= labels[image - 1] <= 102:
                raise UserError(f"{file}: image {image} has no label from 1 to 102. Unpack the set "
                                "again.")
            path = require_image(folder / "jpg", f"image_{image:05}.jpg", file)
            rows.append((path, FLOWERS[labels[image - 1] - 1], split))
    used = {name for _, name, _ in rows}
    return make_records(rows, [name for name in FLOWERS if name in used])


def dogs(folder):
    """Stanford Dogs (Khosla et al. 2011): 120 breeds. Listed paths are <id>-<breed>/<image>.jpg.

    Labels count from 1. If annotation.tar is unpacked too, each image has a box: that of its
    largest dog.
    """
    images = folder / ("Images" if (folder / "Images").is_dir() else "images")
    annotations = folder / "Annotation"
    has_boxes, breeds, rows, boxes = annotations.is_dir(), {}, [], []
    for split in ("train", "test"):
        file = folder / f"{split}_list.mat"
        names, labels = read_columns(file, {"file_list": str, "labels": int})
        if len(names) != len(labels):
            raise UserError(f"{file} has {len(names)} images and {len(labels)} labels. Unpack the "
                            "set again.")
        for name, label in zip(names, labels):
            breed = re.fullmatch(r"n\d+-([\w-]+)/\w+\.jpg", name)
            if not breed or breeds.setdefault(label, breed[1]) != breed[1]:
                raise UserError(f"{file}: cannot use {name!r} with label {label}. Expected "
                                "<id>-<breed>/<image>.jpg and one breed for each label.")
            rows.append((require_image(images, name, file), breed[1], split))
            if has_boxes:
                boxes.append(largest_box(annotations / name.removesuffix(".jpg")))
    records = make_records(rows, [breeds[label] for label in sorted(breeds)])
    return records._replace(boxes=np.array(boxes, np.float32) if boxes else None)


def largest_box(file):
    """The largest box of an annotation in PASCAL VOC's XML: x, y, width, height in pixels.

    Regular expressions read it, because an XML parser would expand the entities of a hostile file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no annotation {file}. Unpack the set again.")
    boxes = []
    for text in file.read_text(errors="replace").split("<bndbox>")[1:]:
        corners = [re.search(rf"<{side}>\s*(\d{{1,5}})\s*</{side}>", text)
                   for side in ("xmin", "ymin", "xmax", "ymax")]
        if all(corners):
            x1, y1, x2, y2 = (int(corner[1]) for corner in corners)
            if x1 < x2 and y1 < y2:
                boxes.append((x1, y1, x2 - x1, y2 - y1))
    if not boxes:
        raise UserError(f"{file} has no box. Expected <bndbox> with <xmin> below <xmax> and <ymin> "
                        "below <ymax>; unpack the set again.")
    return max(boxes, key=lambda box: box[2] * box[3])


def pets(folder, level):
    """Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds, or 2 species. An image's name is its breed
    and a number. images/ also holds files that are in no list."""
    breeds, rows = {}, []
    for split, listing in (("train", "trainval"), ("test", "test")):
        file = folder / "annotations" / f"{listing}.txt"
        lines = read_table(file, "<image_id> <class_id> <species: 1, 2> <breed_id>", int,
                           {"1": "cat", "2": "dog"}.get, int)
        for image, (breed, species, _) in lines.items():
            name = image.rpartition("_")[0]
            if breeds.setdefault(name, (breed, species)) != (breed, species):
                raise UserError(f"{file}: {image} is of class {breed}, a {species}; other images "
                                f"of {name} are of class {breeds[name][0]}, a {breeds[name][1]}. "
                                "Unpack the set again.")
            path = require_image(folder / "images", f"{image}.jpg", file)
            rows.append((path, species if level == "species" else name, split))
    ids = [breed for breed, _ in breeds.values()]
    if len(set(ids)) < len(ids):
        raise UserError(f"{folder / 'annotations'}: two breeds have the same class. Unpack the set "
                        "again.")
    classes = ["cat", "dog"] if level == "species" else sorted(breeds, key=breeds.get)
    return make_records(rows, classes)


CASSAVA = ["cbb", "cbsd", "cgm", "cmd", "healthy"]


def cassava(folder):
    """Cassava leaf diseases, 2019 (Mwebaze et al.): folders <split>/<class>/.

    The public mirror has all three splits. Kaggle's test/ has no labels and is left out, so val and
    test are cut from train. Images in extraimages/, if present, are unlabelled train images.
    """
    rows = []
    for split in ("train", "val", "valid", "validation", "test"):
        for name in CASSAVA:
            images = list_images(unnest(folder / split) / name)
            rows += [(path, name, "val" if split[0] == "v" else split) for path in images]
    if not rows:
        raise FileNotFoundError(f"no images under {folder / 'train' / 'cbb'} and its neighbours. "
                                "Unpack the set again.")
    extra = list_images(unnest(folder / "extraimages"))
    return make_records(rows + [(path, None, "train") for path in extra], CASSAVA)


def cassava_paper(folder):
    """Cassava 2019 as Al Breiki et al. 2021 split it: among the labelled train images, those with a
    number divisible by 4 are test. The paper chose on test; here val is cut from the rest."""
    records = cassava(folder)
    records = records.take(records.splits == "train")
    for i in np.flatnonzero(records.labels >= 0):
        number = re.search(r"\d+$", records.paths[i].stem)
        if not number:
            raise UserError(f"{records.paths[i]} has no number at the end of its name; the paper's "
                            "split needs it. Rename the file, or use --data cassava.")
        records.splits[i] = "train" if int(number[0]) % 4 else "test"
    return records


def cassava_2020(folder):
    """Cassava 2020 (Kaggle): train.csv and train_images/. It shares images with cassava 2019."""
    file = folder / "train.csv"
    lines = read_table(file, "<image>,<label: 0 to 4>", one_of("01234"), separator=",",
                       header="image_id,label")
    return make_records([(require_image(folder / "train_images", image, file), CASSAVA[int(label)],
                          "train") for image, label in lines.items()], CASSAVA)


def grocery(folder, level):
    """Grocery Store (Klasson et al. 2019), dataset/ of its repository: 81 classes in 43 groups."""
    file = folder / "classes.csv"
    lines = read_table(file, "<name>,<class_id>,<group>,<group_id>,<more>", unique(int), str, int,
                       str, separator=",",
                       header="Class Name (str),Class ID (int),Coarse Class Name (str)")
    fine = {class_id: name for name, (class_id, *_) in lines.items()}
    groups = {group_id: group for _, group, group_id, _ in lines.values()}
    name_of = {}                                             # of (class_id, group_id), as texts
    for name, (class_id, group, group_id, _) in lines.items():
        if groups[group_id] != group:
            raise UserError(f"{file}: group {group_id} is {group} and {groups[group_id]}. Unpack "
                            "the set again.")
        name_of[str(class_id), str(group_id)] = group if level == "coarse" else name
    rows = []
    for split in ("train", "val", "test"):
        file = folder / f"{split}.txt"
        images = read_table(file, "<path>, <class_id>, <group_id>",
                            lambda text: name_of.get(tuple(re.split(" *, *", text))),
                            separator=",")
        rows += [(require_image(folder, path, file), name, split) for path, name in images.items()]
    classes = groups if level == "coarse" else fine
    return make_records(rows, [classes[i] for i in sorted(classes)])
