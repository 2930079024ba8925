"""The data of a run has an identity: resumed on other images it is refused, evaluated on images
that it has seen it is no test."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainers import TINY

import fgssl
import imagesets
import linear_eval
import train_simclr
from evaluation.results import count_seen
from imagesets.identity import differences, file_ids, identify


@pytest.fixture
def mine(photos, tmp_path):
    """The photographs, to be changed."""
    return shutil.copytree(photos, tmp_path / "mine")


def train(folder, out, *more):
    train_simclr.main(["--data", str(folder), "--out", str(out), *TINY, "--epochs", "1", *more])
    return fgssl.read_checkpoint(out / "checkpoint.pt")


def test_an_id_changes_with_any_of_the_pieces_and_the_size_and_not_with_the_name(tmp_path):
    content = bytearray(np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes())
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "same").write_bytes(content)
    for name, at in (("start", 0), ("middle", 25_000), ("end", 49_999)):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / name).write_bytes(changed)
    (tmp_path / "longer").write_bytes(content[:40_000] + content[30_000:])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    ids = file_ids([tmp_path / name for name in (
        "a", "same", "start", "middle", "end", "longer", "empty", "one")])
    assert ids.dtype == np.uint8 and ids.shape == (8, 8)
    assert (ids[0] == ids[1]).all() and len({row.tobytes() for row in ids}) == 7


def test_a_checkpoint_names_what_it_was_trained_on(photos, tmp_path):
    data = train(photos, tmp_path)["data"]
    records = imagesets.read(photos, ".")
    trained = sorted(f"{path.parent.name}/{path.name}" for path, split in
                     zip(records.paths, records.splits) if split == "train")
    assert sorted(np.array(data["files"])[np.array(data["splits"]) == "train"]) == trained
    assert {*data["splits"]} == {"train", "val"} and len(data["ids"]) == 32


def test_resume_on_other_images_is_refused_with_what_changed(mine, tmp_path):
    """The schedule became another in silence: its length is that of the set."""
    records = imagesets.read(mine, ".")
    gone = [path for path, split in zip(records.paths, records.splits) if split == "train"][:2]
    train(mine, tmp_path / "out")
    for path in gone:
        path.unlink()
    with pytest.raises(fgssl.UserError, match=f"2 gone .ash/{gone[0].name}.*another --out"):
        train_simclr.main(["--out", str(tmp_path / "out"), "--resume", "--epochs", "2"])


def test_resume_refuses_an_image_whose_bytes_changed(mine, tmp_path):
    records = imagesets.read(mine, ".")
    changed = next(path for path, split in zip(records.paths, records.splits) if split == "train")
    train(mine, tmp_path / "out")
    Image.new("RGB", (24, 30), "red").save(changed)
    with pytest.raises(fgssl.UserError, match="1 gone .*1 new"):
        train_simclr.main(["--out", str(tmp_path / "out"), "--resume", "--epochs", "2"])


def test_resume_goes_on_with_the_same_images_in_another_place(mine, tmp_path, monkeypatch):
    train(mine, tmp_path / "out")
    moved = mine.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train_simclr.main(["--out", "out", "--resume", "--epochs", "2", "--data", "moved"])
    checkpoint = fgssl.read_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert checkpoint["step"] == 6 and checkpoint["args"]["data"] == str(moved)


def test_a_relative_folder_in_a_checkpoint_works_from_any_folder(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("mine", tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_simclr.main(["--out", "../out", "--resume", "--epochs", "2"])
    linear_eval.main(["../out/checkpoint.pt"])


def test_an_evaluation_counts_test_images_that_pretraining_saw(mine, tmp_path, capsys):
    """44 of 60 test images had been trained on, and the table looked like any other."""
    train(mine, tmp_path / "out")
    linear_eval.main([str(tmp_path / "out" / "checkpoint.pt")])
    assert "pretraining saw 0 of the 8 test images" in capsys.readouterr().out
    seen = tmp_path / "seen"
    for split in ("train", "val", "test"):                   # renamed, and all of it three times
        for path in mine.glob("*/*.png"):
            target = seen / split / path.parent.name / f"{split}{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = [str(tmp_path / "out" / "checkpoint.pt"), "--data", str(seen), "--out",
               str(tmp_path / "eval")]
    with pytest.raises(fgssl.UserError, match="trained on 28 of the 40 test images.*--allow-seen"):
        linear_eval.main(command)
    linear_eval.main([*command, "--allow-seen"])
    assert "pretraining saw 28 of the 40 test images" in capsys.readouterr().out


def test_older_checkpoints_say_nothing_of_their_images(mine, tmp_path):
    train(mine, tmp_path / "out")
    file = tmp_path / "out" / "checkpoint.pt"
    old = torch.load(file, weights_only=True)
    del old["data"]
    torch.save(old, file)
    train_simclr.main(["--out", str(tmp_path / "out"), "--resume", "--epochs", "2"])
    with pytest.raises(SystemExit):
        torch.save(old, file)
        train_simclr.main(["--out", str(tmp_path / "out"), "--resume", "--data", str(tmp_path)])


def test_differences_are_of_content_and_split_and_not_of_names(mine):
    records = imagesets.read(mine, ".")
    before = identify(records, np.arange(10))
    assert differences(before, {**before, "files": ["other"] * 10}) == ""
    assert differences(before, identify(records, np.arange(9, -1, -1))).startswith("the same")
    assert differences(before, identify(records, np.arange(2, 12))).startswith("2 gone (ash/")
    records.paths[11].write_bytes(records.paths[0].read_bytes())
    twice = identify(records, np.array([*range(10), 11]))
    assert differences(before, twice).startswith("1 new (ash/"), "a copy of one that was there"


def test_what_the_weights_of_init_saw_counts_as_seen(mine, tmp_path):
    """A run that began with the weights of another has seen that one's images, too."""
    train(mine, tmp_path / "first")
    train(mine, tmp_path / "second", "--init", str(tmp_path / "first" / "checkpoint.pt"))
    file = tmp_path / "second" / "checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["data"]["ids"] += 1                           # as if trained on other images
    torch.save(checkpoint, file)
    records = imagesets.read(mine, ".")
    args = argparse.Namespace(checkpoint=str(file), allow_seen=True, fold=None)
    assert count_seen(args, records, np.flatnonzero(records.splits == "train")) == 28
