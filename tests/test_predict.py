"""Photographs named by a classifier: which files, what is written, and how sure it is."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_study import table

import fgssl
import linear_eval
from evaluation import classifier, predict
from imagesets.decode import PADDING


def test_files_folders_patterns_and_standard_input(shades, tmp_path, monkeypatch):
    folder = shades / "test" / "ash"
    every = sorted(map(str, folder.glob("*.png")))
    assert predict.expand([str(folder)]) == every
    assert predict.expand([str(folder / "*.png"), every[0]]) == every, "each once"
    assert predict.expand([every[0], str(folder / ".." / "ash" / "*.png")]) == every[:1] + [
        str(folder / ".." / "ash" / Path(name).name) for name in every[1:]], "in any spelling"
    assert predict.expand([str(shades / "test" / "a*")]) == every, "a pattern of folders"
    assert predict.expand([str(tmp_path / "no*.png")]) == [str(tmp_path / "no*.png")], "is named"
    odd = [str(tmp_path / name) for name in ("a\u2028b.png", "c\x85d.png", "\udcff.png", "e .png")]
    lines = b"\n".join(map(os.fsencode, [*odd, str(folder), ""]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    assert predict.expand(["-"]) == odd + every, "a name in Latin-1 was a UnicodeDecodeError"
    for text, wanted in ((b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]), (b"", []),
                         (b"\xef\xbb\xbfa.png\r\nb.png\r\n", ["a.png", "b.png"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        assert predict.expand(["-"]) == wanted
    (tmp_path / "[a-z]*.png").symlink_to("gone")
    assert len(predict.expand([str(tmp_path / "[[]*.png")])) == 1, "it was expanded without end"


def test_the_table_has_a_row_for_each_file(shades, evaluated, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, level in enumerate((40, 120, 200)):
        Image.open(shades / "train" / ("ash", "elm", "oak")[i] / "0.png").save(photos / f"{i}.png")
    (photos / "bad.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    with pytest.raises(SystemExit):
        linear_eval.main([str(evaluated / "probe.pt"), "--predict", str(photos), "--precision",
                          "fp32", "--csv", str(tmp_path / "found.csv")])
    rows = {row["file"].split("/")[-1]: row for row in table(tmp_path / "found.csv")}
    assert list(rows) == ["0.png", "1.png", "2.png", "bad.png", "noise.png"]
    assert [rows[f"{i}.png"]["class"] for i in range(3)] == ["ash", "elm", "oak"]
    for i, name in enumerate(("ash", "elm", "oak")):
        row = rows[f"{i}.png"]
        assert row["nearest training image"] == str(shades / "train" / name / "0.png")
        assert float(row["probability"]) >= float(row["probability 2"]) >= 0
        assert 0 <= float(row["confidence"]) <= 1 and row["note"] == ""
    assert rows["bad.png"]["class"] == "" and "cannot read" in rows["bad.png"]["note"]
    assert "unlike every training image" in rows["noise.png"]["note"]
    err = capsys.readouterr().err
    assert "4 of 5 images classified, 1 cannot be read, 1 are unlike" in err
    Image.open(tmp_path / "found_least_certain.png").verify()


def test_no_photograph_is_replaced_by_the_table_or_its_picture(shades, evaluated, tmp_path, capsys):
    """--csv a.csv wrote its picture over the photograph a.png, and --csv a.png the table, too."""
    photo = tmp_path / "a.png"
    Image.open(shades / "train" / "ash" / "0.png").save(photo)
    before, argv = photo.read_bytes(), [str(evaluated / "probe.pt"), "--predict", str(tmp_path)]
    for _ in range(2):                                       # again: the picture is no photograph
        linear_eval.main([*argv, "--csv", str(tmp_path / "a.csv")])
        assert [row["file"] for row in table(tmp_path / "a.csv")] == [str(photo)]
    with pytest.raises(SystemExit):
        linear_eval.main([*argv, "--csv", str(photo)])
    assert "name a table, such as classes.csv" in capsys.readouterr().err
    assert photo.read_bytes() == before and (tmp_path / "a_least_certain.png").exists()


def test_the_probe_for_use_learned_from_all_labels_after_its_figures(shades, evaluated):
    loaded = classifier.load_all(evaluated / "probe.pt")
    figures = json.loads((evaluated / "eval.json").read_text())["random_init"]
    assert loaded.run["refitted"] and loaded.run["accuracy"] == figures["linear"]
    assert len(loaded.run["files"]) == len(loaded.memory.h) == 36 + 18 + 27
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    inference = (24, *fgssl.device_and_precision("fp32"))
    h = torch.cat([fgssl.features(loaded.model.layers, s.images, *inference) for s in splits])
    y = torch.cat([torch.from_numpy(s.labels) for s in splits])
    mean, std = h.mean(0), h.std(0).clamp(min=1e-6)
    weight = classifier.fit_linear((h - mean) / std, y, 3, figures["l2"])
    torch.testing.assert_close(loaded.model.head(h).softmax(1), torch.softmax(
        (h - mean) / std @ weight[:-1] + weight[-1], 1), atol=2e-3, rtol=0)  # the optimizer's


def test_confidence_is_how_many_such_were_right():
    h = torch.arange(8.0)[:, None]
    scores = torch.stack([torch.linspace(0.1, 4, 100), torch.zeros(100)], 1)
    labels = (torch.arange(100) < 50).long()                 # the surer half is right
    memory = classifier.Memory((h, h, h), scores, labels)
    low, high = memory.confidence(torch.tensor([0.5, 0.99]), count=20).tolist()
    assert (low, high) == (0, 1)


def test_answers_that_cannot_be_written_are_printed(shades, evaluated, tmp_path, monkeypatch,
                                                    capsys):
    """A full disk cost the classes of all photographs."""
    def disk_full(file, rows):
        raise OSError(errno.ENOSPC, f"cannot write {file}: No space left on device")

    monkeypatch.setattr(predict, "write_csv", disk_full)
    with pytest.raises(OSError, match="No space left"):
        linear_eval.main([str(evaluated / "probe.pt"), "--predict", str(shades / "test"), "--csv",
                          str(tmp_path / "a.csv")])
    assert capsys.readouterr().out.count(" %  oak") == 27, "one line for each of 27 images"


def test_a_photograph_is_shown_as_the_labelled_ones_were(shades, evaluated, tmp_path, monkeypatch,
                                                        capsys):
    """A probe of whole pictures (--fit pad) was given their centres; one of boxes, no word."""
    wide = np.full((24, 72, 3), 200, np.uint8)
    wide[:, 24:48] = 40                                      # the centre alone is dark
    Image.fromarray(wide).save(tmp_path / "wide.png")
    shown, load = [], predict.load_all

    def load_as(file):
        loaded = load(file)
        loaded.run.update(fit="pad", bbox=True)
        return loaded

    def show(loaded, part, inference):
        shown.extend(image for _, image in part)
        return iter(())

    monkeypatch.setattr(predict, "load_all", load_as)
    monkeypatch.setattr(predict, "classify", show)
    linear_eval.main([str(evaluated / "probe.pt"), "--predict", str(tmp_path / "wide.png")])
    top = shown[0][0, :shown[0].shape[1] // 4]               # the margin above the picture
    assert (top == PADDING[0]).all()
    assert "cropped to their boxes" in capsys.readouterr().err
