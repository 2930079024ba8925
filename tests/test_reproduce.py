"""Tables rerun: what runs, what is not run again, what is written where."""

import importlib

import pytest
import reproduce
from reproduce import Run, Table


@pytest.fixture
def tiny(shades, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    fast = "--size 16 --shots 1 --draws 2 --finetune --steps 2"
    runs = (Run("random", "", (fast,), 2),
            Run("Sim CLR", "train_simclr.py --size 16 --batch 8 --epochs 1", (fast,), 1))
    columns = {"linear": "linear", "1 label": "tuned 1", "frozen": "frozen 1"}
    monkeypatch.setattr(reproduce, "TABLES", {"tiny": Table(str(shades), 0.1, columns, runs)})

    def here(script, *argv):  # a process for each would take a minute
        importlib.import_module(script.removesuffix(".py")).main(argv)

    monkeypatch.setattr(reproduce, "python", here)
    return tmp_path


def test_a_table_is_run_once_and_written_between_its_markers(tiny, capfd):
    readme = tiny / "README.md"
    readme.write_text("before\n<!-- tiny -->\nold\n<!-- /tiny -->\nafter\n")
    reproduce.main(["tiny"])
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["random", "Sim CLR"]
    assert lines[4].count("±") == 3 and lines[5].count("±") == 2, "two seeds; one seed, two draws"
    assert capfd.readouterr().out.count("$ python") == 4
    reproduce.main(["tiny"])
    assert "$ python" not in capfd.readouterr().out, "nothing is run again"
    (tiny / "out" / "tiny" / "Sim_CLR_0" / "done.txt").unlink()
    reproduce.main(["tiny"])  # as after a crash at the end of training
    assert capfd.readouterr().out.count("$ python") == 2


def test_a_readme_without_the_markers_is_left_as_it_is(tiny):
    (tiny / "README.md").write_text("nothing here\n")
    with pytest.raises(ValueError, match="<!-- tiny -->"):
        reproduce.write("tiny", "| a |")
    assert (tiny / "README.md").read_text() == "nothing here\n"


def test_every_command_is_one_that_its_script_takes(capsys):
    for name in reproduce.TABLES:
        for _, (script, *argv) in reproduce.commands(name):
            importlib.import_module(script.removesuffix(".py")).arguments(argv)
    reproduce.main([])
    assert all(name in capsys.readouterr().out for name in list(reproduce.TABLES)[:1])
