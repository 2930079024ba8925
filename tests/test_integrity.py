"""What is read is checked: damaged and changed checkpoints, logs and results get one line."""

import json
import multiprocessing
import random

import pytest
import torch
from test_trainers import TINY

import atomic
import fgssl
import linear_eval
import train_simclr


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A finished run of SimCLR: its folder and its checkpoint."""
    out = tmp_path_factory.mktemp("simclr")
    train_simclr.main(["--data", str(photos), "--out", str(out), *TINY, "--epochs", "1"])
    return out, fgssl.read_checkpoint(out / "checkpoint.pt")


def test_a_damaged_checkpoint_never_loads_as_another(run, tmp_path):
    """One flipped byte in the weights was loaded: torch.load compares no checksum."""
    whole, file = (run[0] / "checkpoint.pt").read_bytes(), tmp_path / "damaged.pt"
    wanted, dice, refused = run[1]["encoder"], random.Random(0), 0
    for trial in range(60):
        broken = bytearray(whole)
        kind, at = trial % 3, dice.randrange(len(whole))
        if kind == 0:
            broken[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            broken[at:at + 4096] = bytes(len(broken[at:at + 4096]))
        else:
            del broken[at:]
        file.write_bytes(broken)
        try:
            found = fgssl.load_encoder(file)[0].state_dict()
        except fgssl.UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
        else:                                                # a byte that nothing reads
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert refused > 50


@pytest.mark.parametrize("change", [
    {"step": "7"}, {"step": -1}, {"step": None}, {"step": 1.5}, {"args": []}, {"args": None},
    {"rng": {}}, {"rng": 3}, {"rng": {"views": torch.zeros(3, dtype=torch.uint8)}},
    {"encoder": 1}, {"encoder": {}}, {"encoder": {"conv1.weight": "x"}}, {"optimizer": {}},
    {"optimizer": 5}, {"head": None}, {"size": "16"}, {"size": 3}, {"arch": ["resnet10"]},
    {"arch": "vgg"}, {"batch": 0}, {"seed": 1.5}, {"lr": float("nan")}, {"lr": "fast"},
    {"bbox": "yes"}, {"subset": 7.0}, {"classes": "two"}, {"data": 3}, {"precision": "fp8"}],
    ids=str)
def test_well_formed_but_wrong_values_get_one_line_with_the_file(run, tmp_path, change, capsys):
    checkpoint = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    (name, value), = change.items()
    (checkpoint if name in checkpoint else checkpoint["args"])[name] = value
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises((fgssl.UserError, SystemExit)) as refused:
        train_simclr.main(["--out", str(tmp_path), "--resume", "--epochs", "2"])
    line = str(refused.value) if refused.type is fgssl.UserError else capsys.readouterr().err
    assert "checkpoint.pt" in line
    assert line.strip().count("\n") <= 1 or "keys differ:" in line


def test_the_state_of_another_optimizer_is_refused(run, tmp_path):
    """An older run's AdamW, resumed by Muon, was a KeyError at the first step."""
    checkpoint = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    momenta = [state["momentum"] for state in checkpoint["optimizer"]["state"].values()]
    parameters = [torch.nn.Parameter(v) for v in momenta]
    checkpoint["optimizer"] = torch.optim.AdamW(parameters, 1e-3).state_dict()
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(fgssl.UserError, match="is of another optimizer than Muon: start a new run"):
        train_simclr.main(["--out", str(tmp_path), "--resume", "--epochs", "2"])


@pytest.mark.parametrize("where, shape", [("momentum", (3,)), ("momentum", None)])
def test_optimizer_state_of_other_shapes_or_with_nan_is_refused(run, tmp_path, where, shape):
    """PyTorch takes any, and fails, or not, at the next step."""
    checkpoint = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    state = checkpoint["optimizer"]["state"][0]
    state[where] = torch.zeros(shape) if shape else torch.full_like(state[where], torch.nan)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(fgssl.UserError, match=f"optimizer in .*{where}"):
        train_simclr.main(["--out", str(tmp_path), "--resume", "--epochs", "2"])


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    checkpoint = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    checkpoint["encoder"]["layer2.0.conv1.weight"][0] = torch.inf
    torch.save(checkpoint, tmp_path / "diverged.pt")
    with pytest.raises(fgssl.UserError, match="layer2.0.conv1.weight holds NaN or infinity"):
        fgssl.load_encoder(tmp_path / "diverged.pt")


def test_evaluation_checks_the_arguments_of_the_run_too(run, tmp_path):
    checkpoint = torch.load(run[0] / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["size"] = "16"
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(fgssl.UserError, match="checkpoint.pt was changed or damaged: --size '16'"):
        linear_eval.main([str(tmp_path / "checkpoint.pt")])


def test_a_log_with_damaged_lines_keeps_the_others(tmp_path):
    """One byte that is no UTF-8 made --resume impossible."""
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(4)]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(
        [good[0], b'{"step": 1, "note": "\xff"}', good[1], b"[]", b'{"step": "x"}', b"\0" * 40,
         good[2], good[3], b'{"step": 4, "lo']))
    assert [r["step"] for r in fgssl.read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def hold_until(file, ready, done):
    held = atomic.try_lock(file)
    ready.set()
    done.wait(60)
    held.close()


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
def test_two_runs_do_not_write_into_one_folder(photos, tmp_path):
    """The log had lines of both, the checkpoint was of one."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_until, args=(tmp_path / ".lock", ready, done))
    other.start()
    assert ready.wait(60)
    command = ["--data", str(photos), "--out", str(tmp_path), *TINY, "--epochs", "1"]
    with pytest.raises(fgssl.UserError, match="another process is training in"):
        train_simclr.main(command)
    assert not (tmp_path / "log.jsonl").exists()
    done.set()
    other.join()
    train_simclr.main(command)
