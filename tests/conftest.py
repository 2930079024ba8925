"""What every test file stands on: the project on the path, a cache, a toy set."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Image caches and built kernels go to a temporary folder; nothing outside is touched."""
    os.environ.pop("FGSSL_DATA", None)
    os.environ["FGSSL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory):
    """A folder for --root that holds the toy birds, drawn once."""
    import datasets
    root = tmp_path_factory.mktemp("data")
    datasets.read("toy", root)
    return root
