"""What others wrote leads nowhere else and takes no memory: paths in lists, headers of archives."""

import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import tiny_sets

import imagesets
from imagesets import matlab, unpack
from imagesets.decode import decode

# ------------------------------------------------------------------------------------------------
# Paths in lists. The law: a listed path stays within the set's folder, by its name and by the links
# to folders that it passes; the image itself may be a link to wherever.
# ------------------------------------------------------------------------------------------------

LISTS = {  # set: (list, the image that its third line names, where its images are)
    "cub": ("CUB_200_2011/images.txt", "001.Black footed Albatross/Black footed Albatross_0002.jpg",
            "CUB_200_2011/images"),
    "aircraft": ("fgvc-aircraft-2013b/data/images_variant_train.txt", "0000291.jpg",
                 "fgvc-aircraft-2013b/data/images"),
    "pets": ("oxford-iiit-pet/annotations/trainval.txt", "Abyssinian_102.jpg",
             "oxford-iiit-pet/images"),
    "grocery": ("GroceryStoreDataset-master/dataset/train.txt",
                "train/Fruit/Apple/Royal-Gala/Royal-Gala_002.jpg",
                "GroceryStoreDataset-master/dataset"),
    "cassava-2020": ("cassava-leaf-disease-classification/train.csv", "1000007.jpg",
                     "cassava-leaf-disease-classification/train_images")}


def listed_as(root, name, hostile):
    """The list of a tiny set in which the third line names another path, without its extension."""
    listing, image, images = LISTS[name]
    tiny_sets.SETS[name](root)
    listing, stem = root / listing, image.removesuffix(".jpg")
    for file in listing.parent.glob("*.txt") if name == "aircraft" else [listing]:
        file.write_text(file.read_text().replace(stem, hostile))
    assert hostile in listing.read_text().split("\n")[2]
    return listing, root / image, root / images


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("hostile", ["../../../x_1", "a/../../../../x_1", "..\\..\\..\\x_1",
                                     "{outside}/x_1", "link/x_1", "deep/link/x_1"])
def test_a_listed_path_that_leaves_the_set_is_refused_with_file_and_line(name, hostile, tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "a" / "b" / "root"
    for folder in (outside, *list(root.parents)[:3], root):
        tiny_sets.photo(folder / "x_1.jpg")
    hostile = hostile.format(outside=outside)
    listing, _, images = listed_as(root, name, hostile)
    (images / "deep").mkdir(), (images / "deep" / "link").symlink_to("../link")
    (images / "link").symlink_to(outside)
    with pytest.raises(ValueError, match=f"line 3 of .*{listing.name} lists .*x_1.* outside"):
        imagesets.read(name, root)


@pytest.mark.parametrize("name", ["cub", "grocery", "cassava-2020"])
def test_links_that_a_user_placed_are_followed(name, tmp_path):
    """The image is a link to another disk; its folder is, or the set is; a link within the set."""
    root = tmp_path / "root"
    listing, image, images = listed_as(root, name, "again/x_1")
    (images / "real").mkdir(), (images / "again").symlink_to("real")
    tiny_sets.photo(tmp_path / "x.jpg")
    (images / "real" / "x_1.jpg").symlink_to(tmp_path / "x.jpg")
    top = listing.relative_to(root).parts[0]
    shutil.move(root / top, tmp_path / "disk")
    (root / top).symlink_to(tmp_path / "disk")
    assert images / "again" / "x_1.jpg" in imagesets.read(name, root).paths


def test_a_matlab_list_is_held_to_it_too(tmp_path):
    tiny_sets.cars(tmp_path)
    tiny_sets.photo(tmp_path / "x.jpg")
    record = {"bbox_x1": 5, "bbox_y1": 7, "bbox_x2": 24, "bbox_y2": 16, "class": 1}
    file = tmp_path / "stanford_cars" / "devkit" / "cars_train_annos.mat"
    for hostile in ("../../x.jpg", str(tmp_path / "x.jpg")):
        tiny_sets.write_mat(file, annotations=[record | {"fname": hostile}])
        with pytest.raises(ValueError, match="cars_train_annos.mat lists .*x.jpg.* outside"):
            imagesets.read("cars", tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("hostile", ["../x.png", "a/../../x.png", "{outside}/x.png", "link/x.png"])
def test_a_table_of_ones_own_is_held_to_it_too(tmp_path, kind, hostile):
    folder, hostile = tmp_path / "set", hostile.format(outside=tmp_path)
    for file in (folder / "1.png", tmp_path / "x.png", tmp_path / "other" / "x.png"):
        tiny_sets.photo(file, "png")
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "2.png").symlink_to(tmp_path / "x.png")        # an image that is a link
    rows = [("1.png", "ash"), ("2.png", "oak")]
    for names, refused in ((rows, False), ([*rows, (hostile, "oak")], True)):
        lines = [json.dumps({"file_name": name, "label": label}) if kind == "jsonl" else
                 f"{name},{label}" for name, label in names]
        head = ["file_name,label"] * (kind == "csv")
        tiny_sets.write(folder / f"metadata.{kind}", *head, *lines)
        if refused:
            with pytest.raises(ValueError, match=f"line {3 + len(head)} of .* lists .* outside"):
                imagesets.read(folder, ".")
        else:
            assert len(imagesets.read(folder, ".").paths) == 2


@pytest.mark.parametrize("row", [{"file_name": ["1.png"]}, {"file_name": {}}, {"split": ["train"]},
                                 {"x": [1], "y": 1, "width": 2, "height": 3}], ids=str)
def test_a_value_of_another_kind_is_named_with_its_line(tmp_path, row):
    tiny_sets.photo(tmp_path / "1.png", "png")
    line = json.dumps({"file_name": "1.png", "label": "ash"} | row)
    tiny_sets.write(tmp_path / "metadata.jsonl", line)
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: "):
        imagesets.read(tmp_path, ".")


def test_a_row_nested_too_deep_is_named_with_its_line(tmp_path):
    tiny_sets.photo(tmp_path / "1.png", "png")
    tiny_sets.write(tmp_path / "metadata.jsonl", '{"file_name": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: no JSON"):
        imagesets.read(tmp_path, ".")


def test_a_link_to_a_device_or_a_pipe_is_no_image(tmp_path):
    """/dev/zero was read until the memory was full, a pipe for ever."""
    for name in ("1", "2"):
        tiny_sets.photo(tmp_path / "set" / f"{name}.png", "png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "set" / "3.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "4.png").symlink_to(tmp_path / "pipe")
    records = imagesets.read(tmp_path / "set", ".")
    assert len(records.paths) == 2 and records.left_out == {"special file": 2}
    for file in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{file}: it is a folder, a device or a pipe"):
            decode(file, 8)


# ------------------------------------------------------------------------------------------------
# Headers of archives
# ------------------------------------------------------------------------------------------------

ZEROS = bytes(1 << 25)


def tar_header(kind, size, name="x"):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax(**fields):
    """A header that extends the next one, or `kind` g: all that follow."""
    kind = fields.pop("kind", "x").encode()
    text = b""
    for key, value in fields.items():
        line = f" {key}={value}\n".encode()
        size = len(line) + len(str(len(line) + len(str(len(line)))))
        text += str(size).encode() + line
    return tar_header(kind, len(text)) + padded(text)


def sparse(count):
    """GNU's old sparse file, its holes listed in `count` blocks."""
    head = bytearray(tar_header(tarfile.GNUTYPE_SPARSE, 0))
    head[482] = 1                                            # more blocks follow
    head[148:156] = b"%06o\0 " % sum([*head[:148], *b" " * 8, *head[156:]])
    return bytes(head) + ((b"%011o\0" % 1) * 42 + b"\1" + bytes(7)) * count


def file_of_tar(content=b"photo", name="x.jpg"):
    return tar_header(tarfile.REGTYPE, len(content), name) + padded(content)


def zip_of(name, kind=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", kind) as archive:
        archive.writestr(name, b"photo" * 100)
    return packed.getvalue()


END_OF_ZIP = b"PK\5\6" + bytes(4) + 2 * (65534).to_bytes(2, "little") + (
    len(ZEROS)).to_bytes(4, "little") + bytes(6)
HEADERS = {  # name: (content, what the error says)
    "pax, 1.5 GB.tgz": (tar_header(b"x", 3 << 29) + ZEROS, "header of 1610612736 bytes"),
    "global pax.tgz": (tar_header(b"g", 3 << 29) + ZEROS, "header of 1610612736 bytes"),
    "long name.tgz": (tar_header(b"L", len(ZEROS)) + ZEROS, "header of 33554432 bytes"),
    "long link.tar": (tar_header(b"K", len(ZEROS)) + ZEROS, "header of 33554432 bytes"),
    "folder with content.tar": (tar_header(b"5", len(ZEROS)) + ZEROS, "header of 33554432 bytes"),
    "nested pax.tgz": (pax(comment="x" * 60_000) * 600 + file_of_tar(), "more than 8 headers"),
    "holes.tgz": (sparse(20_000) + file_of_tar(), "sparse"),
    "holes by pax, listed.tgz": (
        pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999"}) + file_of_tar(),
        "sparse"),
    "holes by pax, in the data.tgz": (
        pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        + file_of_tar(b"9999999\n" + b"1\n" * (1 << 22)), "sparse"),
    "name of 5,000 letters.tgz": (pax(path="x" * 5000) + file_of_tar(), "name of 5000 characters"),
    "900 folders.tgz": (pax(path="a/" * 900 + "x.jpg") + file_of_tar(), "name of 1805 characters"),
    "list of files.zip": (ZEROS + END_OF_ZIP, "list of files has 33554432 bytes"),
    "900 folders.zip": (zip_of("a/" * 900 + "x.jpg"), "name of 1805 characters"),
    "lzma.zip": (zip_of("x.jpg", zipfile.ZIP_LZMA), "compressed in an unusual way")}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_an_archive_take_no_memory(name, tmp_path):
    """A .tgz whose header says 1.5 GB took 4.3 GB. Refused is what no set has."""
    content, message = HEADERS[name]
    file = tmp_path / name
    file.write_bytes(gzip.compress(content, 1) if name.endswith(".tgz") else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{name} cannot be used: .*{message}|{message}"):
            unpack.unpack(file, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 * unpack.CHUNK
    finally:
        tracemalloc.stop()
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_global_headers_do_not_pile_up(tmp_path):
    """Each is of all the files after it; kept, 200 of them are 10 MB."""
    content = b"".join(pax(kind="g", **{f"key{i}": "x" * 50_000}) + file_of_tar(name=f"{i}.jpg")
                       for i in range(200))
    (tmp_path / "x.tar").write_bytes(content)
    tracemalloc.start()
    unpack.unpack(tmp_path / "x.tar", tmp_path / "out")
    assert tracemalloc.get_traced_memory()[1] < 4 * unpack.CHUNK
    tracemalloc.stop()
    assert len(list((tmp_path / "out").iterdir())) == 200


def test_the_variables_of_a_matlab_file_are_bounded_together(tmp_path):
    """10 kB of a file are 10 MB of zeros: any number of these, one by one, was taken."""
    zeros = np.zeros((1, 10_000_000), "u1")
    tiny_sets.write_mat(tmp_path / "x.mat", a=zeros)
    assert len(matlab.read_mat(tmp_path / "x.mat")["a"]) == 10_000_000
    tiny_sets.write_mat(tmp_path / "x.mat", a=zeros, b=zeros, c=zeros, d=zeros)
    with pytest.raises(ValueError, match=r"x.mat, byte \d+: .*more than \d+ bytes"):
        matlab.read_mat(tmp_path / "x.mat")
