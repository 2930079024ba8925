"""Tables rerun: what runs, what is not run again, what is written where."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import reproduce
from PIL import Image
from reproduce import Run, Table

import atomic


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{a command: the folder that it left}: each is run once for all tests of this file."""
    return {}, tmp_path_factory.mktemp("results")


@pytest.fixture
def tiny(shades, tmp_path, monkeypatch, results):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "PAGES", [tmp_path / "other.md", tmp_path / "README.md"])
    (tmp_path / "other.md").write_text("# Another page\n")
    fast = "--size 16 --shots 1 --draws 2 --finetune --steps 2"
    runs = (Run("random", "", (fast,), 1),
            Run("Sim CLR", "train_simclr.py --size 16 --batch 8 --epochs 1", (fast,), 1))
    columns = {"linear": "linear", "1 label": "fine-tuned 1", "frozen": "frozen 1",
               "10 labels": "fine-tuned 10"}
    monkeypatch.setattr(reproduce, "TABLES", {"tiny": Table(str(shades), 0.1, columns, runs)})
    ran = []

    def here(script, *argv):
        ran.append(script)
        left, folder = results
        command, out = " ".join((script, *argv)).replace(str(tmp_path), ""), argv[-1]
        if command in left:
            shutil.copytree(left[command], out, dirs_exist_ok=True)
        else:
            importlib.import_module(script.removesuffix(".py")).main(argv)
            left[command] = shutil.copytree(out, folder / str(len(left)))

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
    assert "frozen" in lines[2] and "10 labels" not in lines[2], "no column without a figure"
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


def test_one_row_is_run_alone(tiny, capsys):
    folder, ran = tiny
    (folder / "README.md").write_text("<!-- tiny -->\nold\n<!-- /tiny -->\n")
    reproduce.main(["tiny", "--only", "random_0"])
    assert ran == ["linear_eval.py"] and "Sim CLR" not in (folder / "README.md").read_text()
    reproduce.main(["tiny"])
    (trained,) = (key for key in reproduce.recorded("tiny") if "train_simclr.py" in key)
    capsys.readouterr()
    reproduce.main(["tiny", "--only", "CLR", "--dry-run"])
    assert capsys.readouterr().out.replace("\n", " && ").removesuffix(" && ") == trained
    reproduce.main(["tiny", "--only", "CLR", "--again"])
    assert ran[3:] == ["train_simclr.py", "linear_eval.py"] and len(reproduce.recorded("tiny")) == 2
    with pytest.raises(SystemExit):
        reproduce.main(["tiny", "--only", "CLR_1"])


def test_figures_of_another_training_are_not_taken_for_this_ones(tiny, monkeypatch):
    """The evaluation's command is the same."""
    _, ran = tiny
    reproduce.execute("tiny")
    table = reproduce.TABLES["tiny"]
    longer = table.runs[1]._replace(train=table.runs[1].train + " --temperature 0.3")
    monkeypatch.setitem(reproduce.TABLES, "tiny", table._replace(runs=(table.runs[0], longer)))
    assert not any(reproduce.figures("tiny", "Sim CLR", table.columns).values())
    with pytest.raises(SystemExit):                          # its folder holds the other run
        reproduce.execute("tiny")
    assert ran[3:] == ["train_simclr.py"]


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


def test_studies_are_of_seed_0_and_of_the_columns_that_name_them(monkeypatch):
    tune = "--finetune --shots 5 --layer"
    run = Run("any", "train_simclr.py", ("--shots 5", f"{tune} 4"), 2, (f"{tune} 3",))
    columns = {"5": "fine-tuned 5", "stage 3": "2 fine-tuned 5", "on val": "val 2 fine-tuned 5",
               "linear": "linear", "all": "every linear", "every 5": "every fine-tuned 5",
               "frozen": "frozen 5"}
    monkeypatch.setattr(reproduce, "TABLES", {"t": Table("toy", 1, columns, (run,))})
    assert [[*evaluations] for *_, evaluations in reproduce.runs("t")] == [[0, 1, 2], [0, 1]]
    records = {}
    monkeypatch.setattr(reproduce, "recorded", lambda name: records)
    assert reproduce.figures("t", "any", columns) == {column: [] for column in columns}

    def record(seed, i, *found):
        _, train, evaluations = reproduce.commands("t", run, seed)
        records[reproduce.line(train, evaluations[i])] = {
            "random_init": {"linear": 10 * seed + i},
            "few_labels": [{"method": method, "shots": 5, "test": test, "val": 10 * test}
                           for method, test in found]}

    record(0, 0, ("frozen", 1))
    record(0, 1, ("frozen", 2), ("fine-tuned", 3))
    record(0, 2, ("frozen", 4), ("fine-tuned", 5))
    record(1, 1, ("fine-tuned", 6))
    assert reproduce.figures("t", "any", columns) == {
        "5": [3, 6], "stage 3": [5], "on val": [50], "linear": [0], "all": [0, 1, 2, 11],
        "every 5": [3, 5, 6], "frozen": [1]}


def test_what_exceeds_the_noise_is_bold(monkeypatch):
    cells = {"plain": (10, 11, 12), "near": (11, 12, 13), "far": (12, 13, 14), "random": (1, 1, 1),
             "one run": (12.9,), "one far run": (13.1,)}
    runs = tuple(Run(label, label != "random" and "train_simclr.py") for label in cells)
    table = Table("toy", 1, {"k-NN": "knn"}, runs, "plain")
    monkeypatch.setattr(reproduce, "TABLES", {"views": table})
    monkeypatch.setattr(reproduce, "figures", lambda name, label, columns: {"k-NN": cells[label]})
    rows = reproduce.render("views", table.columns).splitlines()[2:]
    # variance 3/4; standard errors of three runs sqrt(3/4 (1/3 + 1/3)), of one sqrt(3/4 (1 + 1/3))
    found = [row.split("|")[1].strip() for row in rows if "**" in row]
    assert found == ["far", "random", "one far run"]


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
            for script, *argv in ([train] if train else []) + [*evaluations.values()]:
                importlib.import_module(script.removesuffix(".py")).arguments(argv)
    reproduce.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(reproduce.TABLES)
