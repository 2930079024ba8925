"""The trainers from end to end, tiny: what they write, how they stop, go on, and refuse."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import fgssl
import kernels
import linear_eval
import train_jigsaw
import train_simclr
import train_srgan

TINY = ["--size", "16", "--batch", "8", "--epochs", "2", "--precision", "fp32"]


@pytest.fixture(params=[train_simclr, train_jigsaw], ids=lambda module: module.__name__)
def trainer(request):
    return request.param


def train(trainer, photos, out, *more):
    trainer.main(["--data", str(photos), "--out", str(out), *TINY, *more])
    return fgssl.read_checkpoint(out / "checkpoint.pt"), fgssl.read_log(out / "log.jsonl")


def assert_same(a, b, where="checkpoint"):
    """Equal to the bit, through dicts and lists; `args` may differ in --out."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "out":
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs"
    else:
        assert a == b, f"{where}: {a!r} is not {b!r}"


CHANCE = {train_simclr: math.log(2 * 8 - 2), train_jigsaw: math.log(100)}
PICTURE = {train_simclr: "views.png", train_jigsaw: "puzzles.png"}


def break_loss(patch, trainer, broken_at):
    """The trainer's loss is NaN from the given call on."""
    calls = []
    where, name = {train_simclr: (train_simclr.kernels, "nt_xent"),
                   train_jigsaw: (train_jigsaw.F, "cross_entropy")}[trainer]

    def loss(x, *_, **__):
        calls.append(1)
        return x.sum() * (math.nan if len(calls) >= broken_at else 1)

    patch.setattr(where, name, loss)


def test_a_run_leaves_checkpoint_log_and_pictures(trainer, photos, tmp_path, capsys):
    checkpoint, records = train(trainer, photos, tmp_path)
    steps, chance = checkpoint["step"], CHANCE[trainer]
    assert steps == 2 * (28 // 8), "40 images: 8 to test, 4 to val, 28 to train, 3 batches an epoch"
    printed = capsys.readouterr().out
    assert re.search(rf"step {steps}/{steps}  loss \S+ \(chance {chance:.4g}\)", printed)
    assert "linear_eval.py" in printed, "the last line says what to do next"
    for picture in (PICTURE[trainer], "curves.png"):
        Image.open(tmp_path / picture).verify()
    first, last = records[0], [r for r in records if "loss" in r][-1]
    assert first["args"]["batch"] == 8 and first["torch"] == torch.__version__
    assert {"argv", "seed", "device", "kernels", "commit", "python", "numpy"} <= first.keys()
    assert last["chance"] == pytest.approx(chance) and last["lr"] == 0
    assert [r["step"] for r in records if "knn" in r] == [0, steps], "k-NN before and after"


@pytest.mark.parametrize("trainer, more", [
    (train_simclr, ("--view", "swap")), (train_jigsaw, ()), (train_srgan, ("--pixel-epochs", "1"))])
def test_impl_reaches_every_call_of_a_kernel(trainer, more, photos, tmp_path, monkeypatch):
    """--impl torch turns a suspect kernel off: in the views and the pictures, too."""
    asked = []
    for module in (kernels, kernels.tiles):
        def spy(impl, x, use_kernel=module.use_kernel):
            asked.append(impl)
            return use_kernel(impl, x)
        monkeypatch.setattr(module, "use_kernel", spy)
    train(trainer, photos, tmp_path, "--impl", "torch", *more)
    ignored = asked.count("auto")
    assert asked and set(asked) == {"torch"}, f"{ignored} of {len(asked)} calls ignore it"


def test_an_older_run_goes_on_as_it_began(photos, tmp_path):
    """Before --loss and --first-size, SimCLR had the paper's loss, and views of one size."""
    checkpoint, _ = train(train_simclr, photos, tmp_path, "--loss", "nt-xent", "--epochs", "1")
    del checkpoint["args"]["loss"], checkpoint["args"]["first_size"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    resumed, records = train(train_simclr, photos, tmp_path, "--resume", "--epochs", "2")
    assert resumed["args"]["loss"] == "nt-xent"
    assert resumed["args"]["first_size"] == resumed["args"]["size"]
    assert [r for r in records if "loss" in r][-1]["chance"] == pytest.approx(math.log(15))


def test_one_seed_repeats_to_the_bit_and_another_differs(trainer, photos, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)                                 # their order must not matter
    first, again = (train(trainer, photos, tmp_path / name, "--epochs", "1")[0] for name in "ab")
    torch.set_num_threads(before)
    other, _ = train(trainer, photos, tmp_path / "c", "--epochs", "1", "--seed", "1")
    assert_same(first, again)
    assert not torch.equal(first["encoder"]["conv1.weight"], other["encoder"]["conv1.weight"])


def test_resume_is_the_run_that_was_never_interrupted(trainer, photos, tmp_path, monkeypatch):
    whole, _ = train(trainer, photos, tmp_path / "whole")
    for stop_after in (1, 3, 4):  # within an epoch, at its end, in the next
        out = tmp_path / f"stopped{stop_after}"
        asked = []

        def stop(self):  # as if Ctrl-C came during that step; the loop asks once in each
            asked.append(1)
            self.signal = signal.SIGINT if len(asked) == stop_after else None
            return self.signal is not None

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(fgssl.StopSignal, "__bool__", stop)
            train(trainer, photos, out)
        assert left.value.code == 130
        assert fgssl.read_checkpoint(out / "checkpoint.pt")["step"] == stop_after
        trainer.main(["--out", str(out), "--resume"])
        resumed = fgssl.read_checkpoint(out / "checkpoint.pt")
        resumed["args"]["resume"] = False
        assert_same(whole, resumed)


def test_no_trainable_tensor_is_left_behind(trainer, photos, tmp_path):
    """A head built after the optimizer, or left out of it, never trains."""
    torch.manual_seed(0)
    encoder = fgssl.resnet("resnet10")
    before = {f"encoder.{k}": v.clone() for k, v in encoder.named_parameters()}
    checkpoint, _ = train(trainer, photos, tmp_path)
    for name, old in before.items():
        new = checkpoint["encoder"][name.removeprefix("encoder.")]
        assert not torch.equal(old, new), f"{name} is as it was initialised"
    optimised = checkpoint["optimizer"]["state"]
    of_head = sum(1 for name in checkpoint["head"]
                  if not re.search("running|num_batches|perms", name))  # buffers
    assert len(optimised) == len(before) + of_head, "every parameter has optimizer state"


def test_validation_does_not_teach_batch_norm(trainer, photos, tmp_path):
    """A check on val in train mode would move the running statistics."""
    often, _ = train(trainer, photos, tmp_path / "often", "--eval-every", "1")
    once, _ = train(trainer, photos, tmp_path / "once", "--eval-every", "99")
    assert_same(often["encoder"], once["encoder"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
        trainer, photos, tmp_path, monkeypatch):
    train(trainer, photos, tmp_path)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    break_loss(monkeypatch, trainer, 1)
    with pytest.raises(FloatingPointError, match=r"loss nan at step 1, learning rate .*diverged"):
        train(trainer, photos, broken)
    assert fgssl.read_checkpoint(broken / "diverged.pt")["step"] == 1
    assert not (broken / "checkpoint.pt").exists()
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_a_loss_that_diverges_between_two_logged_steps_is_not_saved(
        trainer, photos, tmp_path, monkeypatch):
    """A timed save, or that of Ctrl-C, must look at the loss: NaN weights cannot be resumed."""
    break_loss(monkeypatch, trainer, 4)
    clock = iter(range(0, 10 ** 9, 61))  # each look at the clock finds a minute gone: all are saved
    monkeypatch.setattr(fgssl.time, "monotonic", lambda: next(clock))
    with pytest.raises(FloatingPointError, match="step 4"):
        train(trainer, photos, tmp_path)
    assert fgssl.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_an_existing_run_is_not_overwritten(trainer, photos, tmp_path, capsys):
    train(trainer, photos, tmp_path)
    with pytest.raises(SystemExit) as left:
        train(trainer, photos, tmp_path)
    assert left.value.code == 2
    assert "--resume continues it" in capsys.readouterr().err


def test_unlabelled_images_train_without_a_knn_check(trainer, photos, tmp_path):
    loose = tmp_path / "loose"
    loose.mkdir()
    for path in photos.glob("*/*.png"):
        shutil.copy(path, loose / f"{path.parent.name}{path.name}")
    checkpoint, records = train(trainer, loose, tmp_path / "run")
    assert checkpoint["step"] == 2 * (40 // 8)
    assert not any("knn" in record for record in records)


def test_too_few_images_for_a_batch_say_what_to_do(trainer, photos, tmp_path):
    with pytest.raises(ValueError, match=r"28 training images do not fill a batch.*--batch 14"):
        train(trainer, photos, tmp_path, "--batch", "64")


def test_both_views_of_a_row_show_the_same_image():
    """Partners zipped from two listings shift by one when a file is missing."""
    parser_defaults = train_simclr.arguments(["--out", "nowhere", "--size", "16", "--color", "0"])
    x = torch.zeros(6, 3, 24, 24, dtype=torch.uint8)
    for i in range(6):
        x[i] = 40 * i + 20  # flat grey: crops, mirrors and blurs leave it as it is
    views = train_simclr.random_view(x.repeat(2, 1, 1, 1), parser_defaults,
                                     torch.Generator().manual_seed(0))
    grey = views.mean((1, 2, 3)) * 255
    torch.testing.assert_close(grey, x[:, 0, 0, 0].float().repeat(2), atol=0.01, rtol=0)


def test_positive_rank_counts_the_views_that_are_closer():
    rng = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(10, 4, generator=rng))
    ranks = []
    for i in range(10):
        order = sorted((j for j in range(10) if j != i), key=lambda j: -float(z[i] @ z[j]))
        ranks.append(1 + order.index((i + 5) % 10))
    assert train_simclr.positive_rank(z).item() == pytest.approx(sum(ranks) / 10)
    pairs = torch.eye(5).repeat(2, 1)
    assert train_simclr.positive_rank(pairs).item() == 1, "partners that coincide rank first"


@pytest.mark.parametrize("flag, value", [
    ("--size", "8"), ("--batch", "1"), ("--epochs", "0"), ("--temperature", "0"),
    ("--temperature", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--min-crop", "1.5"),
    ("--arch", "vgg"), ("--precision", "fp8")])
def test_a_value_out_of_range_is_named(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train_simclr.main([flag, value, "--out", str(tmp_path)])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and value in error


@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
@pytest.mark.parametrize("trainer, number", [(train_simclr, signal.SIGINT),
                                             (train_jigsaw, signal.SIGTERM)])
def test_ctrl_c_saves_and_says_how_to_go_on(trainer, photos, tmp_path, number):
    script = f"{trainer.__name__}.py"
    command = [sys.executable, str(ROOT / script), "--data", str(photos), *TINY,
               "--epochs", "100000", "--out", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in run.stdout:
        if "loss" in line:
            break
    run.send_signal(number)
    rest = run.stdout.read()
    assert run.wait(60) == 128 + number, "so that `train && evaluate` does not evaluate"
    assert f"python {ROOT / script} --out {tmp_path} --resume" in rest
    step = fgssl.read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert step == [r for r in fgssl.read_log(tmp_path / "log.jsonl") if "loss" in r][-1]["step"]


@pytest.mark.parametrize("script", [train_simclr, train_jigsaw, train_srgan, linear_eval])
def test_help_shows_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--data", "--root", "--size", "--arch", "--seed", "--out", "--precision"):
        assert flag in shown, f"--help lacks {flag}"
    assert "(default: " in shown
