"""Tables rerun: what runs, what is not run again, what is written where."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import reproduce
from PIL import Image
from reproduce import Run, Table

import atomic


@pytest.fixture
def tiny(shades, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "PAGES", [tmp_path / "other.md", tmp_path / "README.md"])
    (tmp_path / "other.md").write_text("# Another page\n")
    fast = "--size 16 --shots 1 --draws 2 --finetune --steps 2"
    runs = (Run("random", "", (fast,), 1),
            Run("Sim CLR", "train_simclr.py --size 16 --batch 8 --epochs 1", (fast,), 1))
    columns = {"linear": "linear", "1 label": "fine-tuned 1", "frozen": "frozen 1"}
    monkeypatch.setattr(reproduce, "TABLES", {"tiny": Table(str(shades), 0.1, columns, runs)})
    ran = []

    def here(script, *argv):  # a process for each would take a minute
        ran.append(script)
        importlib.import_module(script.removesuffix(".py")).main(argv)

    monkeypatch.setattr(reproduce, "python", here)
    return tmp_path, ran


def test_a_table_is_run_once_and_written_between_its_markers(tiny):
    folder, ran = tiny
    readme = folder / "README.md"
    readme.write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    reproduce.main(["tiny"])
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["random", "Sim CLR"]
    assert lines[4].count("±") == lines[5].count("±") == 2, "one seed, but two draws of the labels"
    assert ran == ["linear_eval.py", "train_simclr.py", "linear_eval.py"]
    with Image.open(folder / "few_labels-tiny.png") as picture:
        assert picture.size == (640, 720), "two panels: frozen, fine-tuned"
    record = folder / "results" / "tiny.json"
    record.write_text("".join(line.replace("Sim_CLR", "other") for line in open(record)))
    reproduce.main(["tiny", "--write"])
    assert ran[3:] == [] and "Sim CLR" not in readme.read_text(), "no row without a figure"
    reproduce.main(["tiny"])
    assert ran[3:] == ["linear_eval.py"], "what is recorded is not run again, nor what is trained"
    reproduce.main(["tiny", "--again"])
    assert ran[4:] == ["linear_eval.py", "train_simclr.py", "linear_eval.py"], "from scratch"


def test_the_core_minutes_of_a_resumed_run_are_added_up(tmp_path):
    began = os.times()
    subprocess.run([sys.executable, "-c", "sum(range(10 ** 7))"], check=True)
    reproduce.add_core_minutes(tmp_path, began)
    once = float((tmp_path / "core_minutes").read_text())
    assert 0.05 < 60 * once < 30, "of the child: a tenth of a second or so"
    reproduce.add_core_minutes(tmp_path, began)
    assert float((tmp_path / "core_minutes").read_text()) == pytest.approx(2 * once)


def test_a_run_of_another_process_is_left_to_it(tiny, capsys):
    folder, ran = tiny
    (folder / "README.md").write_text("<!-- tiny -->\nold\n<!-- /tiny -->\n")
    other = folder / "out" / "tiny" / "Sim_CLR_0"
    other.mkdir(parents=True)
    with atomic.lock(other / "lock", "nobody waits here"):
        reproduce.main(["tiny"])
    assert ran == ["linear_eval.py"] and "old" in (folder / "README.md").read_text()
    assert "The last 1 are run by other processes" in capsys.readouterr().out
    reproduce.main(["tiny"])
    assert ran[1:] == ["train_simclr.py", "linear_eval.py"]
    assert "Sim CLR" in (folder / "README.md").read_text()


def test_figures_of_a_second_evaluation_and_of_the_training(tiny, monkeypatch):
    table = reproduce.TABLES["tiny"]
    columns = {"stage 2": "linear", "stage 4": "1 linear", "k-NN": "log knn"}
    run = Run("jigsaw", "train_jigsaw.py --size 16 --batch 8 --epochs 1",
              ("--size 16 --layer 2", "--size 16 --layer 4"), 1)
    monkeypatch.setitem(reproduce.TABLES, "tiny", table._replace(columns=columns, runs=(run,)))
    reproduce.execute("tiny")
    found, files = reproduce.figures("tiny", "jigsaw", columns), reproduce.OUT / "tiny" / "jigsaw_0"
    for i, stage in enumerate(("stage 2", "stage 4")):
        result = json.loads((files / f"eval{i}" / "eval.json").read_text())
        assert found[stage] == [result["encoder"]["linear"]]
    (last,) = (line for line in open(files / "log.jsonl") if '"step": 4, "knn"' in line)
    assert found["k-NN"] == [json.loads(last)["knn"]]


def test_a_row_shows_the_evaluation_that_val_prefers(monkeypatch):
    """By test it would be the other; and by all draws, where only one of them has a second draw."""
    cells = {"a": [(0, 70, 1), (0, 60, 2)], "b": [(0, 50, 10), (0, 60, 20), (1, 90, 90)]}

    def recorded(name):
        return {of: {"few_labels": [{"method": "fine-tuned", "shots": 5, "draw": draw, "val": val,
                                     "test": test} for draw, val, test in found],
                     "random_init": {"linear": 3}} for of, found in cells.items()}

    run = Run("any", "")
    columns = {"5": "fine-tuned 5", "longer": "1 fine-tuned 5", "linear": "linear",
               "folds": "every linear", "5 in folds": "every fine-tuned 5"}
    monkeypatch.setattr(reproduce, "TABLES", {"t": Table("toy", 1, columns, (run,))})
    monkeypatch.setattr(reproduce, "recorded", recorded)
    monkeypatch.setattr(reproduce, "runs", lambda name: [(run, 0, None, None, [["a"], ["b"]])])
    found = reproduce.figures("t", "any", columns)
    assert found == {"5": [1, 2], "longer": [10, 20, 90], "linear": [3], "folds": [3, 3],
                     "5 in folds": [1, 2, 10, 20, 90]}


def test_what_exceeds_the_noise_is_bold(monkeypatch):
    cells = {"plain": (10, 11, 12), "near": (11, 12, 13), "far": (12, 13, 14), "random": (1, 1, 1)}
    runs = tuple(Run(label, label != "random" and "train_simclr.py") for label in cells)
    table = Table("toy", 1, {"k-NN": "knn"}, runs, "plain")
    monkeypatch.setattr(reproduce, "TABLES", {"views": table})
    monkeypatch.setattr(reproduce, "figures", lambda name, label, columns: {"k-NN": cells[label]})
    rows = reproduce.render("views", table.columns).splitlines()[2:]  # standard error: sqrt(2 / 3)
    assert [row.split("|")[1].strip() for row in rows if "**" in row] == ["far", "random"]


def test_a_page_without_the_markers_is_left_as_it_is(tiny):
    (tiny[0] / "README.md").write_text("nothing here\n")
    with pytest.raises(ValueError, match="<!-- tiny -->"):
        reproduce.write("tiny", "| a |")
    assert (tiny[0] / "README.md").read_text() == "nothing here\n"


@pytest.mark.docs
def test_the_pages_have_one_place_for_every_table():
    """Or hours of runs would end in an error."""
    text = "".join(page.read_text() for page in reproduce.PAGES)
    for name in (name for own, table in reproduce.TABLES.items() for name in (own, *table.also)):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1, name


def test_every_command_is_one_that_its_script_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in reproduce.TABLES:
        for *_, train, evaluations in reproduce.runs(name):
            for script, *argv in ([train] if train else []) + evaluations:
                importlib.import_module(script.removesuffix(".py")).arguments(argv)
    reproduce.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(reproduce.TABLES)
