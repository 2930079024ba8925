"""Tiny copies of the named sets, in their official layouts and formats, with their traps.

A builder writes its set under `root` and returns what a reader must find: {path below root: (class,
split)}. There are three classes with four train images or more, enough for a batch of eight.
"""

import struct
import zlib

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0)


def photo(path, kind="jpeg", mode="RGB", size=(40, 34)):
    """Write a small image of noise; its file type need not match its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = NOISE.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def birds(folder, paths, ids, class_ids, is_train, names):
    """Write the text files that CUB and NABirds have in common."""
    rows = list(zip(ids, paths, class_ids, is_train))
    write(folder / "images.txt", *(f"{i} {path}" for i, path, _, _ in rows))
    write(folder / "image_class_labels.txt", *(f"{i} {label}" for i, _, label, _ in rows[::-1]))
    write(folder / "train_test_split.txt", *(f"{i} {train}" for i, _, _, train in rows))
    write(folder / "bounding_boxes.txt", *(f"{i} 4.0 6.0 20.0 10.0" for i in ids))
    write(folder / "classes.txt", *(f"{i} {name}" for i, name in names.items()))


def cub(root):
    """One image is grey, one CMYK; a file is in no list; ids are out of order."""
    folder, names = root / "CUB_200_2011", {}
    paths, class_ids, is_train = [], [], []
    for label, name in enumerate(("Black footed Albatross", "Auk", "Wren"), 1):
        names[label] = f"{label:03}.{name}"
        for i in range(6):
            paths.append(f"{names[label]}/{name}_{i:04}.jpg")
            class_ids.append(label)
            is_train.append(int(i < 4))
    for path, mode in zip(paths, ["L", "CMYK"] + ["RGB"] * 16):
        photo(folder / "images" / path, mode=mode)
    photo(folder / "images" / "002.Auk" / "Auk_0000_rgb.jpg")
    birds(folder, paths, [97 * i % 101 for i in range(1, 19)], class_ids, is_train, names)
    return {f"CUB_200_2011/images/{path}": (names[label], "train" if train else "test")
            for path, label, train in zip(paths, class_ids, is_train)}


def nabirds(root):
    """Class ids have gaps and include groups; image ids are UUIDs; two classes share a name."""
    folder = root / "nabirds"
    names = {"0": "Birds", "1": "Ducks, Geese, and Swans", "9": "Owls", "22": "Eiders",
             "295": "Common Eider (Female/juvenile)", "817": "Barn Owl", "1010": "Barn Owl"}
    write(folder / "hierarchy.txt", "1 0", "9 0", "22 1", "295 22", "817 9", "1010 9")
    paths, class_ids, is_train = [], [], []
    for label in ("817", "295", "1010"):
        for i in range(6):
            paths.append(f"{int(label):04}/{i:06}4dc0bfe1{label}.jpg")
            class_ids.append(label)
            is_train.append(int(i < 4))
    ids = [f"{i:08}-21dc-4d0c-bfe1-4cae3c85c829" for i in range(18)]
    for path in paths:
        photo(folder / "images" / path)
    birds(folder, paths, ids, class_ids, is_train, names)
    write(folder / "sizes.txt", *(f"{i} 40 34" for i in ids))
    return {f"nabirds/images/{path}": (names[label], "train" if train else "test")
            for path, label, train in zip(paths, class_ids, is_train)}


def cars(root, nested=False):
    """MATLAB files, compressed; nested: as Kaggle unpacks it. The devkit's test has no labels."""
    folder = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van 2012", "Fisker Karma Sedan 2012"]
    write_mat(folder / "devkit" / "cars_meta.mat", class_names=names)
    wanted = {}
    for split, labels in (("train", [3, 1, 2] * 4), ("test", [1, 2, 3, 2])):
        records = []
        for i, label in enumerate(labels, 1):
            path = f"cars_{split}/" * (1 + nested) + f"{i:05}.jpg"
            photo(folder / path)
            records.append({"bbox_x1": 5, "bbox_y1": 7, "bbox_x2": 24, "bbox_y2": 16,
                            "class": label, "fname": f"{i:05}.jpg"})
            wanted[f"stanford_cars/{path}"] = names[label - 1], split
        if split == "train":
            write_mat(folder / "devkit" / "cars_train_annos.mat", annotations=records)
        else:
            write_mat(folder / "cars_test_annos_withlabels.mat", annotations=records)
            bare = [{k: v for k, v in record.items() if k != "class"} for record in records]
            write_mat(folder / "devkit" / "cars_test_annos.mat", annotations=bare)
    return wanted


def cars_in_class_folders(root):
    """The layout of other copies, nested; a folder's name cannot contain a slash."""
    wanted = {}
    for split, count in (("train", 4), ("test", 2)):
        for name in ("AM General Hummer SUV 2000", "Ram C-V Cargo Van 2012", "Fisker Karma 2012"):
            for i in range(count):
                path = f"stanford_cars/car_data/car_data/{split}/{name}/{i:05}.jpg"
                photo(root / path)
                wanted[path] = name, split
    write(root / "stanford_cars" / "names.csv", "AM General Hummer SUV 2000")
    return wanted


def aircraft(root, level="variant"):
    """Ids with leading zeros, names with spaces and a slash; the last 20 rows are a red banner."""
    folder = root / "fgvc-aircraft-2013b" / "data"
    kinds = {"Boeing 737-700": ("Boeing 737", "Boeing"), "F/A-18": ("F/A-18", "McDonnell Douglas"),
             "737-200": ("Boeing 737", "Boeing")}
    write(folder / "variants.txt", *kinds)
    write(folder / "families.txt", "Boeing 737", "F/A-18")
    write(folder / "manufacturers.txt", "Boeing", "McDonnell Douglas")
    wanted, boxes, number = {}, [], 0
    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        lists = {"variant": [], "family": [], "manufacturer": []}
        for i in range(count):
            for name, above in kinds.items():
                number += 97
                image = f"{number:07}"
                pixels = NOISE.integers(0, 200, (54, 40, 3), dtype=np.uint8)
                pixels[34:] = 255, 0, 0
                (folder / "images").mkdir(exist_ok=True)
                Image.fromarray(pixels).save(folder / "images" / f"{image}.jpg", quality=95)
                boxes.append(f"{image} 5 7 24 16")
                named = dict(zip(lists, (name, *above)))
                for kind, label in named.items():
                    lists[kind].append(f"{image} {label}")
                wanted[f"fgvc-aircraft-2013b/data/images/{image}.jpg"] = named[level], split
        for kind, lines in lists.items():
            write(folder / f"images_{kind}_{split}.txt", *lines)
    write(folder / "images_box.txt", *boxes)
    return wanted


def flowers(root):
    """MATLAB files; labels and image numbers count from 1."""
    folder = root / "flowers-102"
    labels = [77, 77, 1, 1, 102, 102] * 4
    names = {1: "pink primrose", 77: "passion flower", 102: "blackberry lily"}
    write_mat(folder / "imagelabels.mat", labels=np.array([labels], "u1"))
    train, val, test = range(1, 13), range(13, 19), range(19, 25)
    write_mat(folder / "setid.mat", trnid=np.array([train[::-1]], "u2"),
              valid=np.array([val], "u2"), tstid=np.array([test], "u2"))
    wanted = {}
    for split, images in (("train", train), ("val", val), ("test", test)):
        for i in images:
            path = f"flowers-102/jpg/image_{i:05}.jpg"
            photo(root / path)
            wanted[path] = names[labels[i - 1]], split
    return wanted


def pets(root, level="breed"):
    """One .jpg is a GIF and one a PNG; images/ also holds files that are not images."""
    folder, wanted = root / "oxford-iiit-pet", {}
    lists = {"trainval": [], "test": []}
    breeds = {"Abyssinian": (1, 1, 1), "american_pit_bull_terrier": (3, 2, 2), "Bombay": (8, 1, 4)}
    for listing, count in (("trainval", 5), ("test", 2)):
        for name, numbers in breeds.items():
            for i in range(count):
                image = f"{name}_{len(wanted) + 100}"
                kind = {0: "gif", 1: "png"}.get(len(wanted), "jpeg")
                photo(folder / "images" / f"{image}.jpg", kind)
                lists[listing].append(" ".join(map(str, (image, *numbers))))
                species = "cat" if numbers[1] == 1 else "dog"
                wanted[f"oxford-iiit-pet/images/{image}.jpg"] = (
                    name if level == "breed" else species, "train" if count == 5 else "test")
    for listing, lines in lists.items():
        write(folder / "annotations" / f"{listing}.txt", *lines)
    write(folder / "annotations" / "list.txt", "#Image CLASS-ID SPECIES BREED ID")
    write(folder / "annotations" / "._trainval.txt", "\0\5\26\7")
    write(folder / "images" / "Abyssinian_100.mat", "MATLAB")
    photo(folder / "images" / "Abyssinian_999.jpg")  # in no list
    return wanted


def cassava(root):
    """The public mirror: three splits; classes keep the order of the challenge."""
    wanted = {}
    for split, ours in (("train", "train"), ("validation", "val"), ("test", "test")):
        for name in ("cbb", "cmd", "healthy"):
            for i in range(5 if ours == "train" else 2):
                path = f"cassavaleafdata/{split}/{name}/{split}-{name}-{i}.jpg"
                photo(root / path)
                wanted[path] = name, ours
    return wanted


def cassava_kaggle(root):
    """Kaggle's: nested folders, a test split without labels, images without labels."""
    wanted = {}
    for name in ("cbb", "cmd", "healthy"):
        for i in range(10):
            path = f"cassava-disease/train/train/{name}/train-{name}-{i}.jpg"
            photo(root / path)
            wanted[path] = name, None
    for i in range(3):
        photo(root / f"cassava-disease/test/test/0/test-img-{i}.jpg")
        path = f"cassava-disease/extraimages/extraimages/extra-image-{i}.jpg"
        photo(root / path)
        wanted[path] = None, "train"
    return wanted


def cassava_2020(root):
    """Kaggle's second challenge: a CSV file without splits."""
    folder, lines, wanted = root / "cassava-leaf-disease-classification", ["image_id,label"], {}
    for i in range(15):
        label, name = ((0, "cbb"), (3, "cmd"), (4, "healthy"))[i % 3]
        image = f"{10 ** 6 + 7 * i}.jpg"
        photo(folder / "train_images" / image)
        lines.append(f"{image},{label}")
        wanted[f"{folder.name}/train_images/{image}"] = name, None
    write(folder / "train.csv", *lines)
    write(folder / "label_num_to_disease_map.json", '{"0": "Cassava Bacterial Blight (CBB)"}')
    photo(folder / "test_images" / "2216849948.jpg")
    return wanted


def grocery(root, level="fine"):
    """Classes out of order; val lacks one; a file is in no list."""
    folder = root / "GroceryStoreDataset-master" / "dataset"
    names = [("Royal-Gala", "Apple"), ("Kiwi", "Kiwi"), ("Granny-Smith", "Apple")]
    write(folder / "classes.csv", "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse "
          "Class ID (int),Iconic Image Path (str),Product Description Path (str)",
          "Kiwi,1,Kiwi,1,/k.jpg,/k.txt", "Granny-Smith,2,Apple,0,/g.jpg,/g.txt",
          "Royal-Gala,0,Apple,0,/r.jpg,/r.txt")
    wanted = {}
    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        lines = []
        for label, (name, group) in enumerate(names[:2] if split == "val" else names):
            for i in range(count):
                path = f"{split}/Fruit/{group}/{name}/{name}_{i:03}.jpg"
                photo(folder / path)
                lines.append(f"{path}, {label}, {int(group == 'Kiwi')}")
                wanted[f"GroceryStoreDataset-master/dataset/{path}"] = (
                    name if level == "fine" else group, split)
        write(folder / f"{split}.txt", *lines)
    photo(folder / "train" / "Fruit" / "Kiwi" / "Kiwi" / "stray.jpg")
    return wanted


def dogs(root):
    """MATLAB lists; XML boxes, of several dogs in some images; breeds with hyphens; a PNG with an
    alpha channel called .jpg; a file in no list."""
    folder, wanted, lists = root / "stanford-dogs", {}, {"train": [], "test": []}
    breeds = ["n02085620-Chihuahua", "n02086240-Shih-Tzu", "n02089078-black-and-tan_coonhound"]
    for split, count in (("train", 5), ("test", 2)):
        for i in range(count):
            for label, breed in list(enumerate(breeds, 1))[::-1]:
                name = f"{breed}/{breed.partition('-')[0]}_{len(wanted) + 7}"
                kind, mode = ("png", "RGBA") if len(wanted) == 1 else ("jpeg", "RGB")
                photo(folder / "Images" / f"{name}.jpg", kind, mode)
                boxes = [(0, 0, 9, 9), (4, 6, 24, 16), (20, 20, 30, 30)]  # the second is largest
                write_xml(folder / "Annotation" / name, boxes if i else boxes[1:2])
                lists[split].append((f"{name}.jpg", label))
                wanted[f"stanford-dogs/Images/{name}.jpg"] = breed.partition("-")[2], split
    for split, rows in [*lists.items(), ("file", lists["train"] + lists["test"])]:
        names, labels = zip(*rows)
        write_mat(folder / f"{split}_list.mat", file_list=list(names),
                  annotation_list=[name.removesuffix(".jpg") for name in names],
                  labels=np.array([labels], "u1").T)
    photo(folder / "Images" / breeds[0] / "n02085620_1.jpg")
    return wanted


def write_xml(path, boxes):
    """Write an annotation in PASCAL VOC's XML; boxes: corners xmin, ymin, xmax, ymax."""
    objects = []
    for box in boxes:
        corners = "".join(f"\n\t\t\t<{side}>{value}</{side}>"
                          for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        objects.append(f"\t<object>\n\t\t<bndbox>{corners}\n\t\t</bndbox>\n\t</object>")
    size = "<size><width>40</width><height>34</height><depth>3</depth></size>"
    write(path, "<annotation>", f"\t{size}", *objects, "</annotation>")


SETS = {"cub": cub, "nabirds": nabirds, "cars": cars, "aircraft": aircraft, "cassava": cassava,
        "cassava-paper": cassava_kaggle, "cassava-2020": cassava_2020, "dogs": dogs,
        "flowers": flowers, "pets": pets, "grocery": grocery}


# ------------------------------------------------------------------------------------------------
# A writer of MATLAB 5 files; source: MathWorks, "MAT-File Format"
# ------------------------------------------------------------------------------------------------

STORED = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f8": 9}
CLASS = {"f8": 6, "i1": 8, "u1": 9, "i2": 10, "u2": 11, "i4": 12, "u4": 13}


def write_mat(path, order="<", compressed=True, **variables):
    """variables: arrays, texts, lists of texts (cell arrays), lists of dicts (struct arrays)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"MATLAB 5.0 MAT-file, written by a test".ljust(124)
    content += struct.pack(order + "H", 0x100) + (b"IM" if order == "<" else b"MI")
    for name, value in variables.items():
        variable = tagged(14, matrix(value, order, name), order)
        content += tagged(15, zlib.compress(variable), order) if compressed else variable
    path.write_bytes(content)


def tagged(kind, data, order):
    if 0 < len(data) <= 4:
        return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    fill = b"" if kind == 15 else b"\0" * (-len(data) % 8)
    return struct.pack(order + "II", kind, len(data)) + data + fill


def matrix(value, order, name=""):
    def array(values, dtype):
        return tagged(STORED[dtype], np.asarray(values).astype(order + dtype).tobytes(), order)

    def head(kind, *shape):
        return array([kind, 0], "u4") + array(shape, "i4") + array(list(name.encode()), "i1")

    if isinstance(value, str):
        return head(4, int(bool(value)), len(value)) + array([ord(c) for c in value], "u2")
    if isinstance(value, np.ndarray):
        dtype = value.dtype.str[1:]
        return head(CLASS[dtype], *value.shape) + array(value.ravel("F"), dtype)
    if isinstance(value, int):
        return matrix(np.array([[value]], "u1" if value < 256 else "u2"), order, name)
    if isinstance(value[0], str):
        return head(1, 1, len(value)) + b"".join(tagged(14, matrix(v, order), order) for v in value)
    fields = b"".join(field.encode().ljust(32, b"\0") for field in value[0])
    content = head(2, 1, len(value)) + array([32], "i4") + array(list(fields), "i1")
    return content + b"".join(tagged(14, matrix(v, order), order)
                              for record in value for v in record.values())
