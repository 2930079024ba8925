"""What a run stands on: schedule, batches, arguments, checkpoint, log, stop."""

import argparse
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import atomic
import fgssl
import kernels
import runfiles
from imagesets.progress import format_time

# ------------------------------------------------------------------------------------------------
# Schedule and batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 1), (10, 0), (97, 31), (100, 4), (1000, 50)])
def test_the_rate_rises_through_warm_up_never_after_it_and_ends_at_0(total, warmup):
    """A cosine with a wrong period, or stepped once an epoch, rebounds or never comes down."""
    rate = [fgssl.cosine_lr(step, total, warmup, 0.3) for step in range(total + 1)]
    run = f"total {total}, warmup {warmup}, peak 0.3"
    for step in range(warmup + 1):
        wanted = 0.3 * step / warmup if warmup else 0.3
        assert rate[step] == pytest.approx(wanted), (
            f"{run}: {rate[step]:.4g} at step {step}, wanted {wanted:.4g}. What is the straight "
            "line from 0 at step 0 to the peak at step `warmup`?")
    # a cosine of pi is rounded: 1e-9 of the peak is 0 as well
    assert rate[total] == pytest.approx(0, abs=1e-9), (
        f"{run}: {rate[total]:.4g} at the last step, wanted 0. Where does the half cosine end?")
    for part, height in ((2, 0.15), (3, 0.225)):
        step, rest = divmod(total - warmup, part)
        at = rate[warmup + step]
        assert rest or at == pytest.approx(height), (
            f"{run}: {at:.4g} after 1/{part} of the fall, wanted {height}. Is it half a cosine, "
            "from 1 to 0, and does it begin at `warmup`?")
    assert all(b < a for a, b in itertools.pairwise(rate[warmup:])), (
        f"{run}: it rises again after the peak. How long is half a period?")


def take(n, *args):
    return [index.tolist() for index in itertools.islice(fgssl.batches(*args), n)]


@pytest.mark.parametrize("n, batch", [(23, 5), (8, 8), (31, 2), (2, 1)])
def test_an_epoch_shows_each_image_at_most_once_in_full_batches(n, batch):
    full = n // batch
    epochs = np.array(take(40 * full, n, batch, 0)).reshape(40, full * batch)
    for epoch in epochs:
        assert len(set(epoch)) == full * batch and 0 <= epoch.min() and epoch.max() < n
    assert set(epochs.ravel()) == set(range(n)), "each epoch must leave out other images"
    assert n < 8 or len({tuple(epoch) for epoch in epochs}) == 40, "each epoch has its own order"


def test_batches_resume_at_any_step_as_if_never_stopped():
    whole = take(30, 23, 5, 7)
    for step in range(25):
        assert take(30 - step, 23, 5, 7, step) == whole[step:], f"resumed at step {step}"


def test_the_seed_decides_the_order_alone():
    state = np.random.get_state()[1].copy()
    assert take(9, 23, 5, 7) == take(9, 23, 5, 7) != take(9, 23, 5, 8)
    assert take(4, 23, 5, 7, 4) != take(4, 23, 5, 8), "epoch 1 of seed 7 is not epoch 0 of seed 8"
    assert (np.random.get_state()[1] == state).all(), "drawn from NumPy's global generator"


def test_too_few_images_for_a_batch_says_which_batch_would_do():
    with pytest.raises(ValueError, match="23 .* 24.*--batch 11"):
        take(1, 23, 24, 0)
    with pytest.raises(ValueError, match="1 .* batch of 2: add images"):
        take(1, 1, 2, 0)                                     # --batch 2 would do no better


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


def script(folder, *argv):
    p = fgssl.parser("Doc of 5 % text.", data="toy", out=str(folder), size=64, arch="resnet10",
                     epochs=3, batch=8, lr=1e-3, seed=0)
    return fgssl.parse(p, [str(word) for word in argv])


def refused(capsys, folder, *argv):
    """What a refused command line prints; it must end with argparse's exit code, 2."""
    with pytest.raises(SystemExit) as exit:
        script(folder, *argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flag, value, wanted", [
    ("--size", "15", "16"), ("--size", "1025", "1024"), ("--size", "64.5", "int"),
    ("--batch", "1", "2"), ("--batch", "many", "int"), ("--epochs", "0", "1"),
    ("--lr", "0", "above 0"), ("--lr", "-0.5", "above 0"), ("--lr", "nan", "above 0"),
    ("--lr", "inf", "finite"), ("--lr", "fast", "float"), ("--seed", "-1", "0"),
    ("--workers", "0", "1"), ("--arch", "resnet19", "resnet18"), ("--precision", "fp8", "bf16"),
    ("--impl", "triton", "emulated")])
def test_a_value_out_of_range_is_named_with_its_bounds(tmp_path, capsys, flag, value, wanted):
    error = refused(capsys, tmp_path, flag, value).splitlines()[-1]
    assert flag in error and value in error and wanted in error


def test_help_is_the_docstring_and_shows_the_defaults_that_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        script(tmp_path, "--help")
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "Doc of 5 % text." in text
    for part in ("--lr", "0.001", "--epochs", "resnet101", "--resume", "--skip-bad", "FGSSL_DATA"):
        assert part in text
    assert "None" not in text and "False" not in text, "such a default tells a reader nothing"
    assert "of everything random (default: 0)" in text
    assert "--epochs" not in fgssl.parser("", training=False).format_help()


@pytest.fixture
def run(tmp_path):
    """The folder of a run that stands at step 5."""
    args = script(tmp_path / "run", "--lr", "0.01", "--size", "32", "--data", "birds")
    (tmp_path / "run").mkdir()
    fgssl.save(tmp_path / "run" / "checkpoint.pt", 5, args, torch.Generator())
    return tmp_path / "run"


def test_an_existing_run_is_never_overwritten_in_silence(run, capsys):
    error = refused(capsys, run)
    assert str(run) in error and "--resume" in error and "--out" in error


def test_resume_takes_the_arguments_of_the_run(run):
    args = script(run, "--resume")
    assert (args.lr, args.size, args.data, args.batch) == (0.01, 32, "birds", 8)
    assert args.resume is True and args.out == str(run)
    args = script(run, "--resume", "--lr", "1e-2", "--workers", "3", "--root", "elsewhere")
    assert (args.lr, args.workers, args.root) == (0.01, 3, "elsewhere")


def test_resume_refuses_other_arguments_and_names_both_values(run, capsys):
    for flag, saved, given in (("--lr", "0.01", "0.02"), ("--size", "32", "64"),
                               ("--data", "birds", "toy"), ("--batch", "8", "16")):
        error = refused(capsys, run, "--resume", flag, given)
        assert all(part in error.splitlines()[-1] for part in (flag, saved, given))


def test_resume_without_a_run_says_so(tmp_path, capsys):
    error = refused(capsys, tmp_path, "--resume")
    assert str(tmp_path / "checkpoint.pt") in error


def test_resume_follows_a_run_whose_folder_moved(run):
    """The path in its arguments is gone, or worse: it is another run by now."""
    run.rename(run.parent / "moved")
    assert script(run.parent / "moved", "--resume").out == str(run.parent / "moved")


def test_resume_of_a_damaged_or_foreign_checkpoint_is_an_error_with_usage(run, capsys):
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    assert "checkpoint.pt is no checkpoint" in refused(capsys, run, "--resume")
    torch.save({"conv1.weight": torch.ones(1)}, run / "checkpoint.pt")
    assert "no checkpoint of a trainer" in refused(capsys, run, "--resume")


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bf16_takes_fp32(monkeypatch, native):
    """A T4 says that it supports bf16, unless it is asked for more than emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    enabled = {precision: fgssl.device_and_precision(precision)[1]._enabled
               for precision in ("auto", "bf16", "fp32")}
    assert enabled == {"auto": native, "bf16": True, "fp32": False}


# ------------------------------------------------------------------------------------------------
# Checkpoint
# ------------------------------------------------------------------------------------------------


class Training:
    """A small training that draws from every generator there is: dropout's and the views'."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.rng = torch.Generator().manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6),
                                       torch.nn.Dropout(0.3), torch.nn.Linear(6, 2))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 0.01)
        self.state = dict(encoder=self.net, optimizer=self.optimizer)

    def steps(self, n):
        losses = []
        for _ in range(n):
            x = torch.randn(7, 5, generator=self.rng)
            loss = self.net(x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


ARGS = argparse.Namespace(out="out", seed=3, lr=0.1, root=None, resume=False)


def test_a_resumed_training_goes_on_to_the_bit(tmp_path):
    training = Training(0)
    training.steps(3)
    fgssl.save(tmp_path / "a.pt", 3, ARGS, training.rng, **training.state)
    wanted, weights = training.steps(5), training.net.state_dict()
    resumed = Training(1)
    resumed.steps(2)
    assert fgssl.load(tmp_path / "a.pt", resumed.rng, **resumed.state)["step"] == 3
    assert resumed.steps(5) == wanted, "some state was not saved, or not put back"
    assert all(torch.equal(resumed.net.state_dict()[k], weights[k]) for k in weights)
    assert fgssl.read_checkpoint(tmp_path / "a.pt")["args"] == vars(ARGS)


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def on_a_full_disk(monkeypatch):
    """Make every draft a link to a device on which nothing has room."""
    if not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full")
    def make_draft(path, is_folder):
        draft = path.with_name(f".{path.name}.full.part")
        draft.symlink_to("/dev/full")
        return draft, None

    monkeypatch.setattr(atomic, "make_draft", make_draft)


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, when):
    file, training = tmp_path / "checkpoint.pt", Training(0)
    fgssl.save(file, 1, ARGS, training.rng, **training.state)
    before = file.read_bytes()
    if when == "renaming":
        monkeypatch.setattr(os, "replace", disk_full)
    else:
        on_a_full_disk(monkeypatch)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt: No space left.*untouched"):
        fgssl.save(file, 2, ARGS, training.rng, **training.state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert file.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write .*file.checkpoint.pt"):
        fgssl.save(tmp_path / "file" / "checkpoint.pt", 1, ARGS, torch.Generator())


def test_a_folder_that_was_removed_in_mid_run_is_made_again(tmp_path):
    """An hour of training must not be lost to a tidy hand."""
    log = start_log(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    fgssl.save(tmp_path / "run" / "checkpoint.pt", 1, ARGS, torch.Generator())
    log(1, loss=1.0, lr=0.1)
    assert fgssl.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    assert fgssl.read_log(log.file)[0]["loss"] == 1.0


def test_load_names_what_a_checkpoint_lacks_or_what_does_not_fit(tmp_path):
    training = Training(0)
    fgssl.save(tmp_path / "a.pt", 3, ARGS, training.rng, encoder=training.net)
    with pytest.raises(ValueError, match="a.pt.*lacks optimizer"):
        fgssl.load(tmp_path / "a.pt", training.rng, **training.state)
    with pytest.raises(ValueError, match="encoder in .*a.pt(?s:.*)missing 4.weight"):
        wider = torch.nn.Sequential(*training.net, torch.nn.Linear(2, 1))
        fgssl.load(tmp_path / "a.pt", training.rng, encoder=wider)


# ------------------------------------------------------------------------------------------------
# Log and stop
# ------------------------------------------------------------------------------------------------


def start_log(folder, step=0, total=100):
    args = argparse.Namespace(**{**vars(ARGS), "out": str(folder)})
    return fgssl.Log(args, total, step, torch.device("cpu"), 16)


def strict(file):
    """The records of a log, by JSON's own rules: Python's reader lets NaN pass, others do not."""
    def no(word):
        raise AssertionError(f"{word} is not JSON: other readers refuse the whole file")
    return [json.loads(line, parse_constant=no) for line in file.read_text().splitlines()]


def test_the_first_record_holds_every_argument_and_version(tmp_path):
    first = strict(start_log(tmp_path / "new" / "run").file)[0]
    assert first["args"] == {**vars(ARGS), "out": str(tmp_path / "new" / "run")}
    assert first["seed"] == 3 and first["argv"] == sys.argv
    assert first["kernels"] == kernels.status()
    assert (first["torch"], first["numpy"]) == (torch.__version__, np.__version__)
    assert first["python"] in sys.version and first.keys() >= {"pillow", "device", "commit"}


def test_a_yardstick_stands_in_brackets_behind_its_number(tmp_path, capsys):
    log = start_log(tmp_path)
    log.note(40, psnr=28.0, bicubic_psnr=25.5, knn=29.0, n=300, random_init=13.5, pixel=0.04)
    line = capsys.readouterr().out
    assert "psnr 28.00 dB (bicubic 25.5)  k-NN 29.0 % of 300 (random init 13.5)  pixel 0.04" in line


def test_lines_are_at_most_120_columns_wide(tmp_path, capsys):
    log = start_log(tmp_path)
    log(40, **{f"a_long_name_{i}": i / 7 for i in range(20)}, lr=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 120
    assert " ".join(lines).count("a long name") == 20, "a number was lost or cut in two"


def test_log_lines_are_json_even_when_the_loss_is_not_finite(tmp_path, capsys):
    log = start_log(tmp_path)
    log(10, loss=4.8125, chance=5.5, lr=0.1)
    log(20, loss=math.nan, chance=5.5, lr=0.1)
    log(30, loss=math.inf, chance=5.5, lr=0.1)
    _, ten, twenty, _ = strict(log.file)
    assert (ten["step"], ten["loss"], ten["chance"], twenty["step"]) == (10, 4.8125, 5.5, 20)
    lines = capsys.readouterr().out.splitlines()
    assert "step 10/100" in lines[0] and "eta" in lines[0]
    assert "loss 4.812 (chance 5.5)" in lines[0], "a number stands beside its yardstick"
    assert "nan" in lines[1] and "inf" in lines[2]
    log.curves(loss="chance")
    assert Image.open(tmp_path / "curves.png").size[0] > 100, "what is finite is drawn"


def test_a_resumed_log_drops_what_came_after_the_checkpoint_and_a_cut_line(tmp_path):
    log = start_log(tmp_path)
    for step in (10, 20, 30, 40):
        log(step, loss=1.0 / step, chance=1.0)
    with open(log.file, "a") as out:
        out.write('{"step": 50, "lo')
    assert [record["step"] for record in fgssl.read_log(log.file)] == [0, 10, 20, 30, 40]
    log = start_log(tmp_path, step=20)
    log(30, loss=0.5, chance=1.0)
    records = strict(log.file)
    assert [record["step"] for record in records] == [0, 10, 20, 20, 30]
    assert "args" in records[0] and "args" in records[3], "each start writes down its arguments"
    assert records[4]["loss"] == 0.5
    assert len(strict(start_log(tmp_path).file)) == 1, "a new run has nothing of an old one"


def test_a_disk_that_is_full_when_a_run_goes_on_does_not_cost_its_log(tmp_path, monkeypatch):
    log = start_log(tmp_path)
    log(10, loss=4.8, chance=5.5)
    before = log.file.read_text()
    on_a_full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        start_log(tmp_path, step=10)
    assert log.file.read_text() == before


@pytest.mark.parametrize("total", [1, 7, 50, 60, 99, 149, 151, 5000, 123_457])
def test_first_and_last_steps_are_logged_and_fifty_evenly_between(total):
    run = fgssl.Run.__new__(fgssl.Run)
    run.total, run.decided, run.saving = total, True, False
    due = []
    for run.step in range(1, total + 1):
        due += [run.step] * run.due()
    assert due[0] == 1 and due[-1] == total and len(due) >= min(total, 50)
    assert len(set(np.diff(due[1:-1]))) <= 1, "evenly"
    assert np.diff(due).max(initial=0) <= 50, "often enough to see that it lives"


@pytest.fixture
def handlers():
    saved = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in saved:
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_sets_a_flag_and_the_second_kills(handlers, capsys, number, code):
    stop = fgssl.StopSignal()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    for each in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(each) == signal.SIG_DFL, "a run that hangs could not be stopped"
    with pytest.raises(SystemExit) as exit:
        stop.exit("python train_simclr.py --out 'out/my run' --resume")
    assert exit.value.code == code, "a && b would run b"
    assert "to go on: python train_simclr.py --out 'out/my run' --resume" in capsys.readouterr().out


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"),
                                           (3599.7, "1:00:00"), (3661, "1:01:01")])
def test_times_carry_over(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize("first, last", [(32, 64), (8, 16), (112, 224), (50, 75), (64, 64),
                                         (64, 32)])
def test_views_grow_by_eights_to_their_full_side(first, last):
    """Full views from 70 % of the run on; a side never beyond either end."""
    sides = [fgssl.view_size(step, 100, first, last) for step in range(1, 101)]
    assert sides[0] == first or last < first and first - sides[0] == 8
    assert sides[69:] == [last] * 31 and sides == sorted(sides, reverse=last < first)
    assert all(side == last or (side - first) % 8 == 0 for side in sides)
    assert min(first, last) <= min(sides) and max(sides) <= max(first, last)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_told_and_gits_index_left_alone(tmp_path, monkeypatch):
    """`git describe --dirty` rewrites the index, under a lock that a killed run leaves behind."""
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(runfiles, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runfiles.commit() is None, "outside a checkout"
    git("init", "-q")
    assert runfiles.commit() is None, "before the first commit"
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "."), git("commit", "-qm", "first")
    (tmp_path / "result.json").write_text("{}")
    os.utime(tmp_path / "code.py", (1e9, 1e9))              # as it was, but git has to look
    before = (tmp_path / ".git" / "index").read_bytes()
    assert runfiles.commit() == git("rev-parse", "HEAD")[:12], "what is not tracked is no change"
    assert (tmp_path / ".git" / "index").read_bytes() == before
    (tmp_path / "code.py").write_text("a = 2\n")
    assert runfiles.commit() == git("rev-parse", "HEAD")[:12] + "+"
