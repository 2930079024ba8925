"""Results that cannot be lost: on file before pictures, replaced by no other, printed anywhere."""

import csv
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import fgssl
import linear_eval
from evaluation import few_labels, page, probe, results
from imagesets import cache_file

PLAIN = ["--init", "random", "--size", "24", "--precision", "fp32"]


@pytest.fixture
def checkpoint(shades, tmp_path):
    torch.manual_seed(7)
    args = dict(data=str(shades), root=None, size=24, arch="resnet10", seed=0)
    torch.save({"encoder": fgssl.resnet("resnet10").state_dict(), "args": args, "step": 1},
               tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def read(folder):
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


STAGES = {"print_result": ["encoder", "report"], "refit": ["encoder", "report"],
          "write_confusion": ["report"], "retrieval_sheet": ["report"], "feature_map": ["report"],
          "grad_cam_study": ["report"], "page.report": ["report", "grad_cam"]}


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("stage, error", [*((stage, KeyboardInterrupt) for stage in STAGES),
                                          ("refit", FULL), ("feature_map", FULL)])
def test_what_was_computed_is_on_file_at_every_stage(stage, error, checkpoint, monkeypatch, capsys):
    """eval.json was written after all pictures: a full disk or Ctrl-C there cost every number."""
    def fail(*_, **__):
        raise error

    where = page if stage == "page.report" else linear_eval
    monkeypatch.setattr(where, stage.split(".")[-1], fail)
    with pytest.raises((KeyboardInterrupt, OSError, SystemExit)):
        linear_eval.main([str(checkpoint), "--precision", "fp32"])
    result = read(checkpoint.parent)
    assert {"random_init", "few_labels", *STAGES[stage]} <= result.keys()
    if stage != "print_result":
        assert "random init" in capsys.readouterr().out, "the table was printed"


def test_the_first_row_is_on_file_while_the_second_is_computed(checkpoint, monkeypatch):
    evaluate = probe.evaluate

    def once(*args):
        monkeypatch.setattr(linear_eval, "evaluate", lambda *_: sys.exit(9))
        return evaluate(*args)

    monkeypatch.setattr(linear_eval, "evaluate", once)
    with pytest.raises(SystemExit):
        linear_eval.main([str(checkpoint), "--precision", "fp32"])
    result = read(checkpoint.parent)
    assert "random_init" in result and "encoder" not in result
    with pytest.raises(fgssl.UserError, match="was stopped: run it again"):
        results.compare_results([str(checkpoint.parent / "eval.json")], checkpoint.parent)


def test_a_cell_is_on_file_before_its_pictures(shades, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(few_labels, "write_confusion", fail)
    with pytest.raises(SystemExit, match="confusion-finetuned.png"):
        linear_eval.main([*PLAIN, "--data", str(shades), "--out", str(tmp_path), "--finetune",
                          "--steps", "2", "--batch", "8"])
    assert [cell["method"] for cell in read(tmp_path)["few_labels"]] == ["frozen", "fine-tuned"]
    assert (tmp_path / "finetuned.pt").exists() and not (tmp_path / "finetuning.pt").exists()


def test_a_cell_is_on_file_before_it_is_printed(shades, tmp_path, monkeypatch):
    """A closed pipe or Ctrl-C at its line cost the minutes that it took."""
    def interrupted(text, **_):
        if text.startswith("["):
            raise KeyboardInterrupt

    monkeypatch.setattr(few_labels, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        linear_eval.main([*PLAIN, "--data", str(shades), "--out", str(tmp_path), "--shots", "1"])
    assert [cell["images"] for cell in read(tmp_path)["few_labels"]] == [3]


def test_a_full_disk_still_prints_the_table_and_names_the_file(checkpoint, monkeypatch, capsys):
    replace = os.replace

    def full(old, new):
        if str(new).endswith("eval.json"):
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="eval.json: No space left on device"):
        linear_eval.main([str(checkpoint), "--precision", "fp32"])
    assert "random init" in capsys.readouterr().out


def test_another_evaluation_is_not_replaced(checkpoint, shades, photos, capsys):
    """Of other data, weights or layer: without few-label results it was overwritten silently."""
    linear_eval.main([str(checkpoint), "--precision", "fp32"])
    before = (checkpoint.parent / "eval.json").read_bytes()
    torch.manual_seed(8)
    other = torch.load(checkpoint, weights_only=True)
    other["encoder"] = fgssl.resnet("resnet10").state_dict()
    torch.save(other, checkpoint.parent / "other.pt")
    for argv in ([str(checkpoint), "--data", str(photos)], [str(checkpoint), "--layer", "3"],
                 [str(checkpoint.parent / "other.pt")]):
        with pytest.raises(fgssl.UserError, match="holds an evaluation of other.*--out"):
            linear_eval.main([*argv, "--precision", "fp32"])
        assert (checkpoint.parent / "eval.json").read_bytes() == before


def test_a_file_that_is_no_result_is_moved_aside(checkpoint, capsys):
    """A comma too many in eval.json, and its few-label results were overwritten."""
    for name in ("eval.json.damaged", "eval.json.damaged2"):
        (checkpoint.parent / "eval.json").write_text(f"mine, {name}")
        linear_eval.main([str(checkpoint), "--precision", "fp32"])
        line, = (line for line in capsys.readouterr().err.splitlines() if "damaged" in line)
        assert line.startswith(str(checkpoint.parent / "eval.json")) and f"now {name}," in line
        assert (checkpoint.parent / name).read_text() == f"mine, {name}"
    assert read(checkpoint.parent)["encoder"]


def test_a_probe_is_evaluated_beside_the_run(checkpoint):
    linear_eval.main([str(checkpoint), "--precision", "fp32"])
    folder = checkpoint.parent
    kept = {name: (folder / name).read_bytes() for name in ("eval.json", "probe.pt")}
    linear_eval.main([str(folder / "probe.pt"), "--precision", "fp32"])
    assert read(folder / "probe")["encoder"] == read(folder)["encoder"]
    with pytest.raises(fgssl.UserError, match="would replace .*probe.pt"):
        linear_eval.main([str(folder / "probe.pt"), "--out", str(folder)])
    assert kept == {name: (folder / name).read_bytes() for name in kept}


SCRIPT = ("import sys; sys.path.insert(0, sys.argv[1]); import {module}\n"
          "def main():\n"
          "    print('12.0 ± 0.3 Çédille \\u82f9 \\udcff')\n"
          "    print('x' * 100_000, flush=True)\n"
          "    print('done', file=sys.stderr)\n")
PRINTED = SCRIPT.format(module="terminal") + "with terminal.tolerant(): main()"
LAUNCHED = SCRIPT.format(module="fgssl") + "fgssl.launch(main)"


@pytest.mark.parametrize("encoding, wanted", [("ascii", b"12.0 +- 0.3 Cedille ? \\xff"),
                                              ("cp1252", "12.0 ± 0.3 Çédille ? ".encode("cp1252")),
                                              ("utf-8", "12.0 ± 0.3 Çédille 苹".encode())])
def test_letters_that_a_terminal_lacks_are_spelled(encoding, wanted):
    """UnicodeEncodeError at the ± of the table, after all the work."""
    found = subprocess.run([sys.executable, "-c", PRINTED, ROOT], capture_output=True,
                           env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert found.returncode == 0 and b"done" in found.stderr
    assert found.stdout.startswith(wanted), found.stdout[:60]


def test_a_closed_pipe_ends_nothing():
    read_end, write_end = os.pipe()
    os.close(read_end)
    found = subprocess.run([sys.executable, "-c", LAUNCHED, ROOT], stdout=write_end,
                           stderr=subprocess.PIPE)
    os.close(write_end)
    assert (found.returncode, found.stderr.strip()) == (0, b"done")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_into_a_full_disk_is_said_at_the_end():
    """--predict photos > classes.txt lost the classes, with exit status 0."""
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-c", LAUNCHED, ROOT], stdout=full,
                               stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr.splitlines()) == (1, [
        "done", "error: cannot write all of the output: No space left on device"])


def test_no_output_at_all_ends_nothing(tmp_path):
    """A job without stdout and stderr: the first line of progress ended it."""
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r})\n"
            "import fgssl; from imagesets.progress import progress\n"
            "def main(): [*progress('ab', 2, 'letters')]; print('done'); open('done', 'w')\n"
            "fgssl.launch(main)")
    found = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code])
    assert found.returncode == 0 and (tmp_path / "done").exists()


def test_tables_are_utf8_in_any_locale_and_excel_sees_it(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from evaluation import results\n"
            "results.write_csv(sys.argv[2], [['\\u00c9pinard', 1], ['b\\udcff', 2], "
            "['\\udcc3\\udc89', 3]])")
    subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "a.csv"], check=True,
                   env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert (tmp_path / "a.csv").read_bytes() == (
        "\ufeffÉpinard,1\r\nb\\xff,2\r\nÉ,3\r\n").encode(), "of two bytes, an É again"
    results.write_csv(tmp_path / "b.csv", [["plain", 1]])
    assert (tmp_path / "b.csv").read_bytes() == b"plain,1\r\n", "no mark where none is needed"


def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path):
    names = ["=HYPERLINK(1)", "+1", "-x.jpg", "@SUM(1)", "\tx", "\rx", "a=b", 'two\nlines, "x"']
    results.write_csv(tmp_path / "a.csv", [["name", "number"], *([name, -1.5] for name in names)])
    with open(tmp_path / "a.csv", newline="") as file:
        found = [*csv.reader(file)][1:]
    assert found == [["'" * (i < 6) + name, "-1.5"] for i, name in enumerate(names)]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")
def test_the_images_that_were_read_do_not_stay_in_memory(tmp_path, monkeypatch):
    """100,000 images at 64 px are a file of 3.8 GB, which was in memory whole after a look."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    row = cache_file.row_type(112)
    with open(tmp_path / "rows", "wb") as file:
        file.truncate(cache_file.HEADER + 1024 * row.itemsize)
    images, held = cache_file.memory_map(tmp_path / "rows", 112)["image"], []
    monkeypatch.setattr(fgssl, "features", lambda _, part, *more: (
        part.sum(), held.append(resident() - before), torch.zeros(len(part), 1))[-1])
    before = resident()
    assert len(probe.extract_features(None, images, (), "test")) == 1024
    assert len(held) == 4 and max(held) < 20e6, "a chunk has 9.6 MB, the file 38 MB"


def test_few_similarities_are_held_and_nothing_changes(monkeypatch):
    """1 GiB for 32,000 x 8,000 neighbours; 8 GB for the scores of 10,000 classes."""
    rng = torch.Generator().manual_seed(0)
    h, labels = torch.randn(90, 5, generator=rng), torch.arange(90) % 3
    h += 2 * torch.nn.functional.one_hot(labels, 5)
    whole = fgssl.knn(h, labels, h, 5, 3), probe.fit_linear(h, labels, 3, 0.1)
    monkeypatch.setattr(fgssl, "MOST", 200)
    parts = fgssl.knn(h, labels, h, 5, 3), probe.fit_linear(h, labels, 3, 0.1)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], atol=1e-3, rtol=0)  # where float32 ends it


@pytest.mark.parametrize("kind", ["imagenet", "ours"])
def test_training_starts_from_a_file_and_the_table_has_its_row(kind, checkpoint, photos, tmp_path):
    import train_simclr
    state = torch.load(checkpoint, weights_only=True)
    file = tmp_path / "start.pt"
    torch.save(state["encoder"] | {"fc.weight": torch.zeros(9, 256)} if kind == "imagenet" else
               state, file)
    out = tmp_path / "run"
    train_simclr.main(["--data", str(photos), "--out", str(out), "--size", "16", "--batch", "8",
                       "--epochs", "1", "--lr", "1e-12", "--precision", "fp32",
                       "--init", str(file)])
    trained = fgssl.read_checkpoint(out / "checkpoint.pt")["encoder"]
    torch.testing.assert_close(trained["conv1.weight"], state["encoder"]["conv1.weight"])
    linear_eval.main([str(out / "checkpoint.pt"), "--precision", "fp32"])
    result = read(out)
    assert result["init_name"] == ("ImageNet init" if kind == "imagenet" else f"init {file}")
    assert {"random_init", "init", "encoder"} <= result.keys()
    assert result["init"] != result["random_init"]
