"""The named sets: each one's reader, how to recognise its folder, and where to get it."""

from collections.abc import Callable
from typing import NamedTuple

from . import readers
from .downloads import Archive


class SetInfo(NamedTuple):
    """What is known of a named set."""
    read: Callable            # (folder), or (folder, level) if there are levels -> Records
    folders: tuple            # names that its folder may have; a download gets the first
    markers: tuple            # paths; a folder that has two of them has this layout
    levels: tuple = ()        # kinds of labels, from fine to coarse
    archives: tuple = ()      # what to download, or else
    instructions: str = ""    # what to fetch by hand, and where to put it


CUB_FILES = ("image_class_labels.txt", "images.txt", "train_test_split.txt")
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
STANFORD_DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
CASSAVA_2019 = dict(
    folders=("cassavaleafdata", "cassava", "cassava-disease"),
    markers=(*(f"train/{name}" for name in readers.CASSAVA),
             *(f"train/train/{name}" for name in readers.CASSAVA)),
    archives=(Archive("cassavaleafdata.zip",
                      "https://storage.googleapis.com/emcassavadata/cassavaleafdata.zip",
                      1_354_096_203,
                      sha256="8ae63d2ef7dee0899d252a748523e603f97e2ae7022f103f92fc42a9fce74d95"),))

# A layout is detected in this order: nabirds has all files of cub and one more, so it comes first.
SETS = {
    "nabirds": SetInfo(
        readers.nabirds, ("nabirds",), ("hierarchy.txt", "image_class_labels.txt"),
        ("category", "coarse"),
        instructions="Register at https://dl.allaboutbirds.org/nabirds, download nabirds.tar.gz "
                     "(md5 df21a9e4db349a14e2b08adfd45873bd), and unpack it so that "
                     "{folder}/images.txt exists."),
    "cub": SetInfo(
        readers.cub, ("CUB_200_2011",), CUB_FILES,
        archives=(Archive("CUB_200_2011.tgz",
                          "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                          1_150_585_339, "97eceeb196236b17998738112f37df78"),)),
    "cars": SetInfo(
        readers.cars, ("stanford_cars", "cars"),
        ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat",
         "car_devkit/devkit/cars_meta.mat", "car_devkit/devkit/cars_train_annos.mat",
         "train/AM General Hummer SUV 2000", "test/AM General Hummer SUV 2000"),
        instructions="Its own site is gone. Download a copy from Kaggle, "
                     "https://www.kaggle.com/datasets/rickyyyyyyy/torchvision-stanford-cars, and "
                     "unpack it so that {folder}/cars_train/*.jpg, cars_test/*.jpg, devkit/*.mat "
                     "and cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10) "
                     "exist; or {folder}/train/<class>/*.jpg and test/<class>/*.jpg."),
    "aircraft": SetInfo(
        readers.aircraft, ("fgvc-aircraft-2013b",),
        ("images_variant_train.txt", "images_variant_test.txt", "variants.txt"),
        ("variant", "family", "manufacturer"),
        archives=(Archive("fgvc-aircraft-2013b.tar.gz",
                          OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                          2_753_340_328, "d4acdd33327262359767eeaa97a4f732"),)),
    "cassava": SetInfo(readers.cassava, **CASSAVA_2019),
    "cassava-paper": SetInfo(readers.cassava_paper, **CASSAVA_2019),
    "cassava-2020": SetInfo(
        readers.cassava_2020, ("cassava-leaf-disease-classification",),
        ("train.csv: image_id,label\n", "train_images"),
        instructions="Download the data of "
                     "https://www.kaggle.com/c/cassava-leaf-disease-classification (you need an "
                     "account) and unpack it so that {folder}/train.csv exists."),
    "dogs": SetInfo(
        readers.dogs, ("stanford-dogs", "stanford_dogs", "StanfordDogs"),
        ("train_list.mat", "test_list.mat"),
        archives=(Archive("stanford-dogs-images.tar", STANFORD_DOGS + "images.tar",
                          793_579_520, "1bb1f2a596ae7057f99d7d75860002ef"),
                  Archive("stanford-dogs-annotation.tar", STANFORD_DOGS + "annotation.tar",
                          21_852_160, "4298cc0031f6bc6e74612ac83b5988e2"),
                  Archive("stanford-dogs-lists.tar", STANFORD_DOGS + "lists.tar",
                          481_280, "edbb9f16854ec66506b5f09b583e0656"))),
    "flowers": SetInfo(
        readers.flowers, ("flowers-102",), ("setid.mat", "imagelabels.mat"),
        archives=(Archive("102flowers.tgz", OXFORD + "flowers/102/102flowers.tgz",
                          344_862_509, "52808999861908f626f3c1f4e79d11fa"),
                  Archive("imagelabels.mat", OXFORD + "flowers/102/imagelabels.mat",
                          502, "e0620be6f572b9609742df49c70aed4d"),
                  Archive("setid.mat", OXFORD + "flowers/102/setid.mat",
                          14_989, "a5357ecc9cb78c4bef273ce3793fc85c"))),
    "pets": SetInfo(
        readers.pets, ("oxford-iiit-pet",),
        ("annotations/trainval.txt", "annotations/test.txt", "annotations/list.txt"),
        ("breed", "species"),
        archives=(Archive("oxford-iiit-pet-images.tar.gz", OXFORD + "pets/data/images.tar.gz",
                          791_918_971, "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                  Archive("oxford-iiit-pet-annotations.tar.gz",
                          OXFORD + "pets/data/annotations.tar.gz",
                          19_173_078, "95a8c909bbe2e81eed6a22bccdf3f68f"))),
    "grocery": SetInfo(
        readers.grocery, ("GroceryStoreDataset-master", "GroceryStoreDataset", "grocery"),
        ("classes.csv: Class Name (str),Class ID (int)", "train.txt"), ("fine", "coarse"),
        archives=(Archive("GroceryStoreDataset-master.zip", "https://github.com/marcusklasson/"
                          "GroceryStoreDataset/archive/refs/heads/master.zip", 123_000_000),)),
    "toy": SetInfo(readers.cub, ("toy",), CUB_FILES),
}
