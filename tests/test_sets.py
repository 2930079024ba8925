"""Every named set: read correctly, completely or in part, and trained one step by each trainer."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_sets
from PIL import Image

import imagesets
import fgssl
import linear_eval
from evaluation import results
import train_jigsaw
import train_simclr
import train_srgan
from imagesets import cache, matlab, readers
from imagesets.errors import UserError

TRAINERS = {"simclr": train_simclr, "jigsaw": train_jigsaw, "srgan": train_srgan}
SMALL = {"simclr": [], "jigsaw": ["--puzzles", "1"],
         "srgan": ["--pixel-epochs", "0", "--scale", "2", "--blocks", "1", "--width", "8"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for --root with every named set; cassava-paper has a root of its own."""
    top = tmp_path_factory.mktemp("sets")
    for name, make in tiny_sets.SETS.items():
        make(top / "paper" if name == "cassava-paper" else top)
    return top


def root_of(name, root):
    return root / "paper" if name == "cassava-paper" else root


def found(records, root):
    """{path below root: (class, split)}: all that a reader determines."""
    names = [records.classes[label] if label >= 0 else None for label in records.labels]
    return {path.relative_to(root).as_posix(): (name, split)
            for path, name, split in zip(records.paths, names, records.splits)}


def assert_found(records, root, wanted):
    """Check that the images and classes are those wanted; None and train may have been cut."""
    got = found(records, root)
    assert got.keys() == wanted.keys()
    for path, (name, split) in wanted.items():
        assert got[path][0] == name, path
        cut = {None: ("train", "val", "test"), "train": ("train", "val")}.get(split, (split,))
        assert got[path][1] in cut, path


# ------------------------------------------------------------------------------------------------
# Layouts
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_sets.SETS)
def test_a_set_is_read_correctly_by_name_and_by_folder(name, tmp_path):
    wanted = tiny_sets.SETS[name](tmp_path)
    records = imagesets.read(name, tmp_path)
    if name != "cassava-paper":
        assert_found(records, tmp_path, wanted)
        folder, = tmp_path.iterdir()
        assert found(imagesets.read(folder, "."), tmp_path) == found(records, tmp_path)
    assert records.labels.dtype == np.int64 and set(records.splits) == {"train", "val", "test"}
    data = fgssl.load_data(name, tmp_path)
    assert len(data.cached("train", 16).images) == (records.splits == "train").sum()


@pytest.mark.parametrize("name, levels", [
    ("aircraft", ["variant", "family", "manufacturer"]), ("pets", ["breed", "species"]),
    ("grocery", ["fine", "coarse"])])
def test_each_level_of_labels_is_that_of_the_files(name, levels, tmp_path):
    for level in levels:
        wanted = tiny_sets.SETS[name](tmp_path / level, level)
        assert_found(imagesets.read(name, tmp_path / level, level), tmp_path / level, wanted)
        assert imagesets.SETS[name].levels == tuple(levels)
    with pytest.raises(ValueError, match=f"no labels 'genus'. Expected one of {', '.join(levels)}"):
        imagesets.read(name, tmp_path / levels[0], "genus")


def test_coarse_labels_of_nabirds_are_the_groups_under_the_root(root):
    fine, coarse = (imagesets.read("nabirds", root, level) for level in ("category", "coarse"))
    assert coarse.classes == ["Ducks, Geese, and Swans", "Owls"], "not Eiders, a group in a group"
    eider = fine.labels == fine.classes.index("Common Eider (Female/juvenile)")
    assert (coarse.labels == np.where(eider, 0, 1)).all()
    assert fine.labels.max() == 2, "1010 and 817, of one name, are two classes; ids have gaps"


def test_a_folder_of_several_sets_is_refused(root):
    with pytest.raises(ValueError, match="several data sets: CUB_200_2011 and .*of one of them"):
        imagesets.read(root, ".")


def test_a_folder_that_is_not_the_set_it_is_named_after_is_an_error(tmp_path):
    tiny_sets.photo(tmp_path / "CUB_200_2011" / "001.Auk" / "1.jpg")
    with pytest.raises(FileNotFoundError, match="holds no image_class_labels.txt.*Move it away"):
        imagesets.read("cub", tmp_path)


def test_a_set_without_a_hierarchy_has_one_kind_of_labels(root):
    with pytest.raises(ValueError, match="cub has no labels 'coarse'.*leave --labels out"):
        imagesets.read("cub", root, "coarse")


@pytest.mark.parametrize("make", [tiny_sets.cars_in_class_folders,
                                  lambda root: tiny_sets.cars(root, nested=True)])
def test_cars_are_read_in_the_layouts_of_copies(make, tmp_path):
    wanted = make(tmp_path)
    assert_found(imagesets.read("cars", tmp_path), tmp_path, wanted)


@pytest.mark.parametrize("wrapper", ["", "archive", "archive/stanford_cars"])
@pytest.mark.parametrize("renamed", [
    {}, {"devkit": "car_devkit/devkit"},
    {"cars_test_annos_withlabels.mat": "cars_test_annos_withlabels (1).mat"},
    {"cars_test_annos_withlabels.mat": "devkit/cars_test_annos_withlabels.mat"}])
def test_cars_are_found_by_path_and_by_name_however_a_copy_nests_them(renamed, wrapper, tmp_path):
    tiny_sets.cars(tmp_path / "made", nested=True)
    made, top = tmp_path / "made" / "stanford_cars", tmp_path / "root" / "stanford_cars"
    for old, new in renamed.items():
        (made / new).parent.mkdir(exist_ok=True)
        (made / old).rename(made / new)
    (top / wrapper).parent.mkdir(parents=True)
    shutil.move(made, top / wrapper)
    records = imagesets.read("cars", tmp_path / "root")
    assert len(records.paths) == 16 and len(records.classes) == 3 and records.boxes is not None
    assert imagesets.read(top, ".").paths == records.paths


@pytest.mark.parametrize("name", ["cars", "nabirds", "cassava-2020"])
def test_a_set_fetched_by_hand_is_never_promised_by_running_again(name, tmp_path):
    tiny_sets.photo(tmp_path / imagesets.SETS[name].folders[0] / "other" / "1.jpg")
    with pytest.raises(FileNotFoundError, match="is not the set as its source unpacks") as error:
        imagesets.read(name, tmp_path)
    assert "run" not in str(error.value).replace("torchvision", "")


def test_birds_in_the_layout_of_cub_need_no_boxes(tmp_path):
    wanted = tiny_sets.cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "bounding_boxes.txt").unlink()
    records = imagesets.read(tmp_path / "CUB_200_2011", ".")
    assert records.boxes is None and len(records.paths) == len(wanted)
    assert records.left_out == {"not in the lists": 1, "not an image": 4}
    for listing in ("images.txt", "train_test_split.txt"):
        (tmp_path / "CUB_200_2011" / listing).rename(tmp_path / listing)
        with pytest.raises(FileNotFoundError, match=listing):
            imagesets.read(tmp_path / "CUB_200_2011", ".")
        (tmp_path / listing).rename(tmp_path / "CUB_200_2011" / listing)


def test_cars_without_test_labels_name_the_missing_file(tmp_path):
    tiny_sets.cars(tmp_path)
    (tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match="cars_test_annos_withlabels.mat"):
        imagesets.read("cars", tmp_path)


def test_boxes_are_in_pixels_from_zero_and_of_the_largest_dog(root):
    for name in ("cars", "aircraft", "cub", "nabirds", "dogs"):
        assert (imagesets.read(name, root).boxes == [4, 6, 20, 10]).all(), name


def test_dogs_need_no_boxes_and_accept_another_spelling_of_the_folder(tmp_path):
    wanted = tiny_sets.dogs(tmp_path)
    top = tmp_path / "stanford-dogs"
    records = imagesets.read("dogs", tmp_path)
    assert records.classes == ["Chihuahua", "Shih-Tzu", "black-and-tan_coonhound"], "as labels say"
    shutil.rmtree(top / "Annotation")
    (top / "Images").rename(top / "images")
    assert imagesets.read("dogs", tmp_path).boxes is None
    assert len(imagesets.read("dogs", tmp_path).paths) == len(wanted)


def test_the_reader_in_the_readme_reads_dogs(tmp_path):
    tiny_sets.dogs(tmp_path)
    page = (Path(imagesets.__file__).parent / "README.md").read_text()
    scope = vars(readers).copy()
    exec(re.search("(?s)```python\n(def dogs.*?)```", page)[1], scope)
    one, other = (read(tmp_path / "stanford-dogs") for read in (scope["dogs"], readers.dogs))
    assert one.paths == other.paths and one.classes == other.classes
    assert (one.labels == other.labels).all() and (one.splits == other.splits).all()


@pytest.mark.parametrize("change, message", [
    (lambda names, labels: names.__setitem__(3, "../n1-Auk/1.jpg"), "cannot use '../n1-Auk/1.jpg'"),
    (lambda names, labels: names.__setitem__(3, "/tmp/n1-Auk/1.jpg"), "cannot use '/tmp/n1-Auk"),
    (lambda names, labels: names.__setitem__(3, "n1-a/../../x.jpg"), "cannot use 'n1-a/../../x"),
    (lambda names, labels: labels.__setitem__(3, 1), "cannot use 'n.*' with label 1"),
    (lambda names, labels: labels.pop(), "15 images and 14 labels"),
    (lambda names, labels: labels.__setitem__(slice(0, 15, 3), [9, 3, 3, 3, 3]), "share a name")])
def test_dogs_refuse_contradictory_lists_and_paths_outside(change, message, tmp_path):
    tiny_sets.dogs(tmp_path)
    file = tmp_path / "stanford-dogs" / "train_list.mat"
    names, labels = matlab.read_columns(file, {"file_list": str, "labels": int})
    change(names, labels)
    tiny_sets.write_mat(file, file_list=names, labels=np.array([labels], "u1").T)
    with pytest.raises(UserError, match=f"stanford-dogs.*{message}"):
        imagesets.read("dogs", tmp_path)


@pytest.mark.parametrize("boxes", [[], [(5, 5, 5, 9)], [(9, 9, 5, 5)], [(-1, 0, 5, 5)],
                                   [("", 0, 5, 5)], [("&lol;", 0, 5, 5)], [(0, 0, 10 ** 9, 5)]])
def test_dogs_name_an_annotation_without_a_usable_box(boxes, tmp_path):
    tiny_sets.dogs(tmp_path)
    file = next((tmp_path / "stanford-dogs" / "Annotation").rglob("*_9"))
    tiny_sets.write_xml(file, boxes)
    with pytest.raises(UserError, match=f"{file.name} has no box"):
        imagesets.read("dogs", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no annotation .*{file.name}"):
        imagesets.read("dogs", tmp_path)


@pytest.mark.parametrize("name, listing", [
    ("cub", "images.txt"), ("nabirds", "images.txt"), ("aircraft", "images_variant_train.txt"),
    ("pets", "annotations/trainval.txt"), ("cassava-2020", "train.csv"), ("grocery", "train.txt")])
@pytest.mark.parametrize("outside", ["../secret", "a/../../../secret", "/tmp/secret", "..\\secret"])
def test_a_listed_path_cannot_leave_the_folder(name, listing, outside, tmp_path):
    """A hostile list could otherwise have any image on the disk read, copied and shown."""
    tiny_sets.SETS[name](tmp_path)
    file = next(tmp_path.rglob(listing))
    image = next(iter(imagesets.read(name, tmp_path).paths))
    text = file.read_text()
    known = next(part for line in text.splitlines()[::-1] for part in re.split("[ ,]", line)
                 if re.search(r"\.jpg$|_\d+$|^\d{7}$", part))
    file.write_text(text.replace(known, outside + image.suffix * ("." in known)))
    with pytest.raises(UserError, match=f"{listing} lists .*secret.*outside"):
        imagesets.read(name, tmp_path)


def test_cassava_paper_tests_on_numbers_divisible_by_four(root):
    top = root / "paper"
    for path, (name, split) in found(imagesets.read("cassava-paper", top), top).items():
        number = int(path.rpartition("-")[2].removesuffix(".jpg"))
        assert (split == "test") == (name is not None and number % 4 == 0), path


def test_cassava_trains_on_kaggles_extra_images_without_a_label(tmp_path):
    wanted = tiny_sets.cassava_kaggle(tmp_path)
    records = imagesets.read("cassava", tmp_path)
    assert_found(records, tmp_path, wanted)
    data = fgssl.load_data("cassava", tmp_path)
    assert (data.cached("train", 16).labels < 0).sum() == 3
    assert (data.cached("train", 16, labelled=True).labels >= 0).all(), "an evaluation needs labels"


@pytest.mark.parametrize("name, message", [
    ("cars", "Kaggle.*stanford_cars/cars_train.*b0a2b23655a3edd16d84508592a98d10"),
    ("nabirds", "Register.*df21a9e4db349a14e2b08adfd45873bd.*nabirds/images.txt"),
    ("cassava-2020", "kaggle.com.*train.csv")])
def test_a_set_behind_a_login_says_what_to_fetch_and_where_to_put_it(name, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        imagesets.read(name, tmp_path)


@pytest.mark.parametrize("name", tiny_sets.SETS)
def test_a_missing_file_is_named(name, tmp_path):
    """A set that is only partly unpacked must not be taken for a complete one."""
    tiny_sets.SETS[name](tmp_path)
    listings = [path for path in tmp_path.rglob("*") if path.suffix in (".txt", ".mat", ".csv")
                and "list.txt" not in path.name and path.name[0] != "."
                and path.name not in ("sizes.txt", "bounding_boxes.txt", "cars_test_annos.mat",
                                      "hierarchy.txt", "families.txt", "manufacturers.txt",
                                      "Abyssinian_100.mat", "file_list.mat")
                and not path.name.startswith(("images_family", "images_manufacturer"))]
    for listing in listings:
        content = listing.read_bytes()
        listing.unlink()
        with pytest.raises(FileNotFoundError, match=listing.name):
            imagesets.read(name, tmp_path)
        listing.write_bytes(content)
    imagesets.read(name, tmp_path)


# ------------------------------------------------------------------------------------------------
# Crops
# ------------------------------------------------------------------------------------------------


def test_the_banner_of_aircraft_is_cropped(root):
    """It is red, 20 of 54 rows. What is left is 40 x 34 pixels; the central square is shown."""
    images = fgssl.load_data("aircraft", root).cached("train", 34).images.astype(int)
    red = (images[:, 0] > 220) & (images[:, 1] < 40) & (images[:, 2] < 40)
    assert red.mean() < 0.01


def test_boxes_are_cropped_and_have_a_cache_of_their_own(tmp_path):
    """With one cache for both, the second run would train on the crops of the first."""
    tiny_sets.cub(tmp_path)
    for path in (tmp_path / "CUB_200_2011" / "images").rglob("*.jpg"):
        pixels = np.zeros((34, 40, 3), np.uint8)
        pixels[1:21, 4:24] = 255                     # the box, 4 6 20 10, made square
        Image.fromarray(pixels).save(path, quality=95)
    whole = fgssl.load_data("cub", tmp_path).cached("train", 20).images
    boxes = fgssl.load_data("cub", tmp_path, bbox=True).cached("train", 20).images
    assert boxes.min() > 200 and whole.min() < 50
    assert (fgssl.load_data("cub", tmp_path).cached("train", 20).images == whole).all()
    with pytest.raises(ValueError, match="flowers has no boxes: leave --bbox out"):
        tiny_sets.flowers(tmp_path)
        fgssl.load_data("flowers", tmp_path, bbox=True)


def test_a_banner_has_a_cache_of_its_own():
    """It is not a property of the file: a later version of a reader may add it."""
    keys = {cache.row_key(fgssl.Source(__file__, None, banner)) for banner in (0, 20)}
    assert len(keys) == 2


# ------------------------------------------------------------------------------------------------
# Subsets
# ------------------------------------------------------------------------------------------------


def folder_of(tmp_path, sizes):
    for name, size in sizes.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(size):
            (tmp_path / name / f"{i:03}.jpg").touch()
    return tmp_path


def test_a_fraction_is_taken_of_each_class_and_split_and_is_part_of_a_larger_one(tmp_path):
    records = imagesets.read(folder_of(tmp_path, {"a": 100, "b": 50, "c": 10, "d": 3}), ".")
    before = set()
    for fraction in (0.1, 0.25, 0.5, 1.0):
        part = imagesets.smaller(records, fraction)
        for label, split in itertools.product(range(4), ("train", "val", "test")):
            total = ((records.labels == label) & (records.splits == split)).sum()
            kept = ((part.labels == label) & (part.splits == split)).sum()
            assert kept == min(total, max(1, round(fraction * total))), (fraction, label, split)
        assert before <= set(part.paths)
        assert part.paths == imagesets.smaller(records, fraction).paths, "always the same"
        before = set(part.paths)
    assert before == set(records.paths)
    part = imagesets.smaller(records, 0.1)
    images = [path.name for path in part.paths if path.parent.name == "a"]
    assert images != sorted(path.name for path in records.paths)[:len(images)], "not the first ones"


def test_some_classes_are_renumbered_with_their_names(tmp_path):
    records = imagesets.read(folder_of(tmp_path, dict.fromkeys("abcdefgh", 10)), ".")
    chosen = [imagesets.smaller(records, classes=n) for n in (2, 5, 8)]
    for part, n in zip(chosen, (2, 5, 8)):
        assert len(part.classes) == n and part.classes == sorted(part.classes)
        assert len(part.paths) == 10 * n
        assert all(part.classes[label] == path.parent.name
                   for path, label in zip(part.paths, part.labels))
    assert set(chosen[0].classes) < set(chosen[1].classes) < set(chosen[2].classes)
    assert chosen[1].classes != list("abcde"), "neighbours in the alphabet are often similar"
    with pytest.raises(ValueError, match="has 8 classes, not 9"):
        imagesets.smaller(records, classes=9)


def test_a_subset_keeps_each_box_with_its_image_and_classes_drop_the_unlabelled(root, tmp_path):
    records = imagesets.read("cub", root)
    records.boxes[:, 0] = np.arange(len(records.paths))
    place = {path: i for i, path in enumerate(records.paths)}
    part = imagesets.smaller(records, 0.5, 2)
    assert part.boxes[:, 0].tolist() == [place[path] for path in part.paths]
    folder_of(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "loose.jpg").touch()
    mixed = imagesets.read(tmp_path, ".")
    assert (imagesets.smaller(mixed, 0.5).labels < 0).sum() == 1
    assert (imagesets.smaller(mixed, classes=2).labels >= 0).all()


# ------------------------------------------------------------------------------------------------
# Scripts
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, trainer", [
    *((name, "simclr") for name in tiny_sets.SETS),
    *itertools.product(("cub", "grocery"), ("jigsaw", "srgan"))])    # a box, a level of labels
def test_each_set_trains_a_step_by_each_trainer(name, trainer, root, tmp_path, monkeypatch):
    """The flags reach the images: the trainer gets the labels and crops it asked for."""
    flags = {"cub": ["--bbox"], "dogs": ["--bbox"], "aircraft": ["--labels", "family"],
             "grocery": ["--labels", "coarse"]}.get(name, [])
    monkeypatch.setattr(fgssl, "knn_check", lambda *args, **kwargs: None)  # tested elsewhere
    used, cached = [], fgssl.Dataset.cached
    monkeypatch.setattr(fgssl.Dataset, "cached",
                        lambda data, *args, **kw: used.append(data) or cached(data, *args, **kw))
    images = (imagesets.read(name, root_of(name, root)).splits == "train").sum()
    TRAINERS[trainer].main([
        "--data", name, "--root", str(root_of(name, root)), "--size", "16", "--epochs", "1",
        "--batch", str(images // 2 + 1), "--precision", "fp32", "--out", str(tmp_path), *flags,
        *SMALL[trainer]])
    checkpoint = fgssl.read_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 1 and checkpoint["args"]["data"] == name
    assert checkpoint["args"]["labels"] == (flags[1] if "--labels" in flags else None)
    assert (used[0].crops is not None) == ("--bbox" in flags)
    assert len(used[0].classes) == {"aircraft": 2, "grocery": 2, "cassava": 5}.get(
        name.partition("-")[0], 3)


def test_resume_keeps_the_subset(photos, tmp_path, capsys):
    flags = ["--data", str(photos), "--size", "16", "--batch", "4", "--epochs", "1", "--out",
             str(tmp_path)]
    train_simclr.main([*flags, "--subset", "0.5", "--classes", "2"])
    first = fgssl.read_log(tmp_path / "log.jsonl")[0]
    assert first["args"]["subset"] == 0.5 and first["args"]["classes"] == 2
    assert fgssl.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 14 // 4, "of 28, half"
    for change in (["--subset", "0.7"], ["--classes", "1"], ["--bbox"], ["--labels", "coarse"]):
        with pytest.raises(SystemExit):
            train_simclr.main(["--out", str(tmp_path), "--resume", *change])
        assert "a resumed run keeps its arguments" in capsys.readouterr().err


def test_an_evaluation_uses_the_labels_and_subset_of_its_run(root, tmp_path):
    train_simclr.main(["--data", "grocery", "--root", str(root), "--labels", "coarse", "--size",
                       "16", "--batch", "4", "--epochs", "1", "--out", str(tmp_path)])
    checkpoint = str(tmp_path / "checkpoint.pt")

    def result(*flags):
        out = tmp_path / "-".join(["eval", *flags])
        linear_eval.main([checkpoint, "--out", str(out), *flags])
        return results.read_result(out / "eval.json")

    with pytest.raises(ValueError, match="holds no classifier"):
        linear_eval.main([checkpoint, "--predict", "photo.jpg"])  # --classes does not name classes
    coarse = result()
    assert coarse["classes"] == 2 and coarse["data"] == "grocery, coarse labels"
    whole, boxes = (result("--data", "cub", *flag) for flag in ([], ["--bbox"]))
    assert whole["classes"] == 3, "cub has no coarse labels: those are of the run's own set"
    assert whole["digest"] != boxes["digest"], "other pixels make another task"
    assert whole["grad_cam"] and not boxes["grad_cam"], "the box is the image"
