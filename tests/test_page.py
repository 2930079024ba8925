"""report.html, and names and large matrices in pictures."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import linear_eval
import pictures
from evaluation.report import write_confusion

PLAIN = ["--init", "random", "--size", "24", "--precision", "fp32"]


def test_names_of_any_script_are_letters_or_ascii_never_boxes():
    picture = pictures.heat_picture([[1.0, 0], [0, 1]], names=["Épinard", "苹果"])
    assert picture.width < 400
    for text in ("Épinard", "苹果", "яблоко", "± œuf"):
        shown, face = pictures.lettering(text, 13)
        name = next(n for n in (None, *pictures.FONTS) if pictures.font(13, n) is face)
        assert all(letter == " " or pictures.has_glyph(name, letter) for letter in shown)
    assert pictures.lettering("a\tb\0", 13)[0] == "a b ", "a tab was a box"
    assert pictures.fit("a long name of a class", 12, 60).endswith("...")
    assert pictures.width_of(pictures.fit("a long name of a class", 12, 60), 12) <= 60


def test_a_confusion_of_many_classes_is_a_small_picture_with_a_zoom(tmp_path):
    """4,000 classes took 2.7 GB."""
    confusion = np.zeros((1500, 1500), np.int32)
    confusion[range(1500), range(1500)] = 3
    confusion[700, 700:702] = 0, 3
    write_confusion(tmp_path, "confusion", confusion, [f"class {i}" for i in range(1500)])
    width, height = Image.open(tmp_path / "confusion.png").size
    assert width < 1200 and 900 < height < 2000
    rows = (tmp_path / "confusion.csv").read_text().splitlines()
    assert len(rows) == 1 + 1500 and rows[0] == "true class,taken for,images", "no 2,250,000 cells"
    assert rows[701] == "class 700,class 701,3"


@pytest.fixture(scope="module")
def report(shades, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    linear_eval.main([*PLAIN, "--data", str(shades), "--out", str(out)])
    return out / "report.html"


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome")
                for folder in os.get_exec_path() if (path := Path(folder, name)).exists()), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_report(report, tmp_path):
    shown = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                            f"--user-data-dir={tmp_path}", report.as_uri()],
                           capture_output=True, text=True, timeout=120).stdout
    matrix = shown.split('id="matrix"')[1].split("</table>")[0]
    assert matrix.count("<td") == 9, "the script drew three classes in three columns"
    assert "taken for" in matrix


def test_the_report_needs_nothing_from_elsewhere(report):
    text = report.read_text(encoding="utf-8")
    for what in ("http:", "https:", "<link", "@import", "src=\"/"):
        assert what not in text
    for what in ("random init", "majority class", "Grad-CAM", "Retrieval", "prefers-color-scheme",
                 "@media print", "random weights"):
        assert what in text
