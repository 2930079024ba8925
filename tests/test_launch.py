"""How a run begins and ends, as its user sees it: first lines, mistakes, Ctrl-C, longer runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_trainers import TINY

import fgssl
import linear_eval
import train_jigsaw
import train_simclr
import train_srgan


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The folder of a finished run of SimCLR."""
    out = tmp_path_factory.mktemp("simclr")
    train_simclr.main(["--data", str(photos), "--out", str(out), *TINY])
    return out


@pytest.fixture
def loose(photos, tmp_path):
    """The photographs without labels."""
    (tmp_path / "loose").mkdir()
    for path in photos.glob("*/*.png"):
        shutil.copy(path, tmp_path / "loose" / f"{path.parent.name}{path.name}")
    return tmp_path / "loose"


def ends_in_one_line(module, argv, capsys):
    """What fgssl.launch prints on stderr when main(argv) fails, which must be one line."""
    with pytest.raises(SystemExit) as left:
        fgssl.launch(lambda: module.main([str(word) for word in argv]))
    assert left.value.code not in (0, None)
    lines = capsys.readouterr().err.split("\n")
    lines = [line for line in lines if line and not line.startswith("decoding")]
    lines += left.value.code.split("\n") if isinstance(left.value.code, str) else []
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("module, argv, wanted", [
    (train_simclr, "--data {tmp}/nowhere --out {tmp}/out", "no folder .*nowhere.*Expected a fold"),
    (train_simclr, "--data Grocery --out {tmp}/out", "did you mean grocery"),
    (train_simclr, "--data {photos} --batch 64 --out {tmp}/out", "28 training images.*--batch 14"),
    (train_jigsaw, "--data {photos} --grid 2 --perms 99 --out {tmp}/out {tiny}", "lower --perms"),
    (train_srgan, "--upscale {photo} --from {run}/checkpoint.pt", "no generator.*train_srgan"),
    (linear_eval, "{tmp}/absent.pt", "no checkpoint .*absent.pt.*out/simclr/checkpoint.pt"),
    (linear_eval, "{photo}", "is no checkpoint"),
    (linear_eval, "{run}/checkpoint.pt --predict {photo}", "no classifier.*python linear_eval.py"),
    (linear_eval, "{run}/checkpoint.pt --data {loose} --out {tmp}/out", "Evaluation needs labels"),
    (linear_eval, "--compare {run}/log.jsonl", "is no eval.json.*linear_eval.py CHECKPOINT"),
    (linear_eval, "{run}/checkpoint.pt --encoder generator", "no generator.*train_srgan.py"),
    (linear_eval, "{run}/checkpoint.pt --layer 9", "has the layers 4, 4:2x2"),
    (train_simclr, "--data {photos} --impl cuda --out {tmp}/out", "--impl cuda needs a GPU"),
    (train_simclr, "--data {photos} --out {photo}", "cannot write into .*another --out"),
    (linear_eval, "{run}/checkpoint.pt --arch resnet18", "holds a resnet10, not a resnet18"),
], ids=lambda value: value.split()[0] if isinstance(value, str) else None)
def test_a_users_mistake_ends_in_one_line_that_says_what_to_do(
        module, argv, wanted, run, photos, loose, tmp_path, capsys):
    argv = argv.format(tmp=tmp_path, photos=photos, run=run, loose=loose, tiny=shlex.join(TINY[:6]),
                       photo=next(photos.glob("*/*.png")))
    line = ends_in_one_line(module, argv.split(), capsys)
    assert line.startswith("error: ") and re.search(wanted, line), line


def test_a_bug_still_shows_where_it_is(capsys):
    """A shape error in a student's edit must not be reduced to one line."""
    with pytest.raises(ValueError, match="not enough values"):
        fgssl.launch(lambda: (lambda: [a for a, b in [(1,)]])())


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["decode", "knn_check"])
def test_ctrl_c_before_the_first_step_ends_in_one_line(where, photos, tmp_path, monkeypatch,
                                                       capsys):
    """Nothing is to be saved yet: decoding and the opening k-NN ended in tracebacks."""
    if where == "decode":
        monkeypatch.setenv("FGSSL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("imagesets.cache.progress", interrupt)
    else:
        monkeypatch.setattr(fgssl, where, interrupt)
    line = ends_in_one_line(train_simclr, ["--data", photos, "--out", tmp_path / "out", *TINY],
                            capsys)
    assert line.strip() == "stopped"


def test_ctrl_c_in_evaluation_ends_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.probe.fit_linear", interrupt)
    line = ends_in_one_line(linear_eval, [run / "checkpoint.pt", "--out", tmp_path], capsys)
    assert line.strip() == "stopped"


def test_the_first_lines_say_what_is_trained_on_and_where(photos, tmp_path, capsys):
    train_simclr.main(["--data", str(photos), "--out", str(tmp_path), *TINY])
    data, setting, knn, look = capsys.readouterr().out.splitlines()[:4]
    assert data == "photos0: 40 images, 2 classes (ash, oak); 28 train / 4 val / 8 test"
    assert setting.startswith("resnet10, 16 px, ") and "fp32; kernels: torch" in setting
    assert setting.endswith(f"folder {tmp_path}")
    assert re.fullmatch(r"step 0/6  k-NN \d+\.\d % of 4 \(random init \S+\)", knn)
    assert look.startswith(f"look at {tmp_path}/views.png")


def test_the_last_line_runs_as_it_is_printed(photos, tmp_path, capsys, monkeypatch):
    """It named a script that is not in this folder."""
    monkeypatch.chdir(tmp_path)
    train_simclr.main(["--data", str(photos), "--out", "a run", *TINY])
    command = capsys.readouterr().out.splitlines()[-1].strip()
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "| a run/checkpoint.pt" in done.stdout, done.stderr


def test_the_last_line_asks_for_labels_where_there_are_none(photos, loose, tmp_path, capsys,
                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_simclr.main(["--data", str(loose), "--out", "a run", *TINY])
    _, script, *argv = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert Path(script).samefile(ROOT / "linear_eval.py")
    assert argv[1:] == ["--data", "LABELLED", "--out", "a run_on_labelled"]
    linear_eval.main([*argv[:2], str(photos), *argv[3:], "--allow-seen"])
    assert "| a run/checkpoint.pt" in capsys.readouterr().out


def test_a_finished_run_can_be_lengthened_and_not_shortened(photos, tmp_path, capsys):
    train_simclr.main(["--data", str(photos), "--out", str(tmp_path), *TINY])
    before = fgssl.read_checkpoint(tmp_path / "checkpoint.pt")["encoder"]
    train_simclr.main(["--out", str(tmp_path), "--resume", "--epochs", "4"])
    assert "epochs raised from 2 to 4: the learning rate now" in capsys.readouterr().out
    after = fgssl.read_checkpoint(tmp_path / "checkpoint.pt")
    assert after["step"] == 4 * 3 and after["args"]["epochs"] == 4
    assert not torch.equal(before["conv1.weight"], after["encoder"]["conv1.weight"])
    rates = {r["step"]: r["lr"] for r in fgssl.read_log(tmp_path / "log.jsonl") if "lr" in r}
    assert rates[7] == pytest.approx(fgssl.cosine_lr(7, 12, 0, 0.04)), "the longer schedule"
    with pytest.raises(SystemExit):
        train_simclr.main(["--out", str(tmp_path), "--resume", "--epochs", "3"])
    assert "--epochs 4, not 3" in capsys.readouterr().err


# Older names ------------------------------------------------------------------------------------


def test_old_flags_of_srgan_are_understood_with_a_notice(capsys):
    old = train_srgan.arguments(["--out", "nowhere", "--warmup", "7", "--discriminator", "vgg"])
    assert (old.pixel_epochs, old.arch) == (7, "srgan-vgg")
    notices = capsys.readouterr().err.splitlines()
    assert notices == ["--warmup is now --pixel-epochs 7",
                       "--discriminator is now --arch srgan-vgg"]
    same = train_srgan.arguments(["--out", "nowhere", "--discriminator", "resnet"])
    assert vars(same) == vars(train_srgan.arguments(["--out", "nowhere"]))


@pytest.mark.parametrize("epochs, pixel_epochs", [(50, 20), (9, 4), (1, 0)])
def test_the_pixel_phase_is_a_share_of_any_length(epochs, pixel_epochs):
    args = train_srgan.arguments(["--out", "nowhere", "--epochs", str(epochs)])
    assert args.pixel_epochs == pixel_epochs


def test_a_checkpoint_with_the_old_names_is_read_and_resumed(photos, tmp_path):
    """Older runs have NumPy's generator in them, `warmup` and `discriminator` among arguments."""
    tiny = ["--data", str(photos), *TINY, "--pixel-epochs", "1", "--blocks", "1", "--width", "8"]
    train_srgan.main([*tiny, "--out", str(tmp_path), "--arch", "srgan-vgg"])
    file = tmp_path / "checkpoint.pt"
    old = torch.load(file, weights_only=True)
    old["args"]["warmup"] = old["args"].pop("pixel_epochs")
    old["args"] |= {"discriminator": "vgg", "arch": "resnet10"}
    old["rng"]["numpy"] = ["MT19937", torch.arange(624), 624, 0, 0.0]
    torch.save(old, file)
    encoder, args = fgssl.load_encoder(file)
    assert encoder.dim == 512 and (args["pixel_epochs"], args["arch"]) == (1, "srgan-vgg")
    train_srgan.main(["--out", str(tmp_path), "--resume", "--epochs", "3"])
    assert fgssl.read_checkpoint(file)["step"] == 9


def test_scripts_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_simclr.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0 and "--eval-every" in done.stdout


def test_an_older_torch_is_named_in_one_line(tmp_path):
    """It failed later, in whatever call was new."""
    for package in ("torch", "torch/nn"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("__version__ = '2.4.1+cpu'")
    (tmp_path / "torch" / "nn" / "functional.py").write_text("")
    done = subprocess.run([sys.executable, "-c", "import fgssl"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "needs Python 3.10 and torch 2.6, or later" in done.stderr and "2.4.1" in done.stderr
