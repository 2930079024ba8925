"""The toy birds: 20 species that differ only in their parts; drawn completely or not at all."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagesets
from imagesets import toybirds


@pytest.fixture(scope="module")
def toy(toy_root):
    return imagesets.read("toy", toy_root)


def test_two_species_differ_in_two_to_four_parts_only():
    looks = [toybirds.COMMON | parts for parts in toybirds.SPECIES.values()]
    assert len(looks) == 20 and all(look.keys() == toybirds.COMMON.keys() for look in looks)
    for one, other in itertools.combinations(looks, 2):
        assert 2 <= sum(one[part] != other[part] for part in one) <= 4, (one, other)


def test_every_species_uses_the_same_random_draws():
    """One more draw for a species would change its scenes, and they would reveal the species."""
    states = []
    for species in toybirds.SPECIES:
        rng = np.random.default_rng(5)
        toybirds.photograph(species, rng)
        states.append(rng.random())
    assert len(set(states)) == 1


def test_toy_has_the_right_counts_in_every_species_and_split(toy):
    assert (len(toy.classes), toy.name) == (20, "toy")
    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        assert np.bincount(toy.labels[toy.splits == split], minlength=20).tolist() == [count] * 20


def test_toy_boxes_lie_in_the_image_and_contain_every_visible_part(toy, toy_root):
    x, y, width, height = toy.boxes.T
    assert min(x.min(), y.min()) >= 0
    assert max((x + width).max(), (y + height).max()) <= toybirds.SIDE
    parts = np.loadtxt(toy_root / "toy" / "parts" / "part_locs.txt").reshape(2000, 15, 5)
    seen = parts[..., 4] == 1
    inside = (parts[..., 2:4] >= toy.boxes[:, None, :2] - 0.1) & (
        parts[..., 2:4] <= toy.boxes[:, None, :2] + toy.boxes[:, None, 2:] + 0.1)
    assert inside[seen].all()
    eyes = seen[..., [toybirds.PARTS.index("left eye"), toybirds.PARTS.index("right eye")]]
    assert (eyes.sum(1) == 1).all() and 0.4 < eyes[:, 0].mean() < 0.6, "half the birds are mirrored"


def test_colours_do_not_identify_a_toy_species(toy):
    """k-NN on 6 x 6 x 6 colour histograms (Hellinger distance) stays under 3 x chance."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in toy.paths]).astype(int) // 43
    codes = (pixels @ [36, 6, 1]).reshape(len(pixels), -1)
    histograms = np.sqrt([np.bincount(code, minlength=216) / code.size for code in codes])
    train, test = toy.splits == "train", toy.splits == "test"
    near = np.argsort(-histograms[test] @ histograms[train].T, axis=1)
    for k in (1, 5, 20, 50):
        votes = [np.bincount(toy.labels[train][row[:k]], minlength=20).argmax() for row in near]
        accuracy = (votes == toy.labels[test]).mean()
        assert accuracy < 3 / 20, f"{k}-NN on colours reaches {accuracy:.1%}; chance is 5 %"


def files(folder):
    """Every file under a folder with its bytes."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in found}


def test_one_seed_draws_the_same_bytes_on_any_number_of_cores(tmp_path, monkeypatch):
    toybirds.draw(tmp_path / "a", seed=1, per_class=(1, 1, 1))
    toybirds.draw(tmp_path / "c", seed=2, per_class=(1, 1, 1))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    toybirds.draw(tmp_path / "b", seed=1, per_class=(1, 1, 1))
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(items, total, what):
        yield from itertools.islice(items, 5)
        raise KeyboardInterrupt
    monkeypatch.setattr(imagesets.progress, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagesets.read("toy", tmp_path)
    assert list(tmp_path.iterdir()) == []


def run(code, *arguments):
    """Start a program that imports imagesets like a user's script, without a main guard."""
    code = "import sys, imagesets; from imagesets import toybirds\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(imagesets.__file__).parent.parent
    return subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)


def test_a_killed_drawing_leaves_no_set_and_no_process(tmp_path):
    """After kill -9 nothing is cleaned up: an incomplete set must not have a set's name."""
    process = run("imagesets.read('toy', sys.argv[1])", tmp_path)
    while process.poll() is None and not list(tmp_path.rglob("*.jpg")):
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    drawn, before = 0, -1
    while drawn > before:
        time.sleep(1)
        drawn, before = len(list(tmp_path.rglob("*.jpg"))), drawn
    assert drawn < 2000, "the workers went on after their parent was killed"
    assert not (tmp_path / "toy").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(tmp_path):
    process = run("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
                  "toybirds.draw(sys.argv[1])", tmp_path / "toy")
    error = process.communicate(timeout=60)[1]
    assert f"OSError: cannot draw the toy birds in {tmp_path / 'toy'}: " in error
    assert "File too large" in error, "the worker's own reason is lost"
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot draw the toy birds in .*file.toy"):
        imagesets.read("toy", tmp_path / "file")


def test_two_drawings_at_once_leave_one_complete_set(tmp_path):
    code = "toybirds.draw(sys.argv[1], per_class=(2, 1, 1))"
    for process in [run(code, tmp_path / "toy") for _ in range(2)]:
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert len(imagesets.read(tmp_path / "toy", ".").paths) == 80
