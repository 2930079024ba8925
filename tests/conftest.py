"""What every test file stands on: the project on the path, a cache, a toy set."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# Before torch is imported. Tiny networks gain nothing from threads; two that spin while they wait
# for one another, on cores that others use as well, took ten times as long.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Image caches and built kernels go to a temporary folder; nothing outside is touched."""
    os.environ.pop("FGSSL_DATA", None)
    os.environ["FGSSL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """A folder for --root that holds the toy birds, drawn once."""
    import imagesets
    root = tmp_path_factory.mktemp("data")
    imagesets.read("toy", root)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes of 20 images, train alone. The reader cuts 2 to val and 4 to test of each, which
    is what the hashes of these names come to."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("ash", "oak"):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"dl{i}.png")
    return folder


@pytest.fixture(scope="session")
def shades(tmp_path_factory):
    """Three classes told apart by brightness, 12 train / 6 val / 9 test images each."""
    top, rng = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 9)):
        for level, name in ((40, "ash"), (120, "elm"), (200, "oak")):
            folder = top / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (level + rng.normal(0, 20, (24, 24, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return top


@pytest.fixture(scope="session")
def splits(shades):
    """The train, val and test Splits of the shades."""
    import fgssl
    from evaluation import probe
    return probe.labelled_splits(fgssl.load_data(shades), 24)


@pytest.fixture(scope="session")
def frozen(splits):
    """An untrained encoder with a probe of the shades; its weights and features are for all."""
    import torch

    import fgssl
    from evaluation import probe
    from tiny_study import INFERENCE, NAMES
    torch.manual_seed(0)
    return probe.evaluate(fgssl.resnet("resnet10"), splits, NAMES, INFERENCE, ("4",))[1]


@pytest.fixture(scope="session")
def evaluated(shades, tmp_path_factory):
    """The folder of an evaluation of the shades, with its probe.pt."""
    import linear_eval
    from tiny_study import PLAIN
    out = tmp_path_factory.mktemp("evaluated")
    linear_eval.main([*PLAIN, "--data", str(shades), "--out", str(out)])
    return out
