"""What is read is checked: damaged and changed checkpoints, logs and results get one line."""

import errno
import json
import multiprocessing
import random
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch
from test_trainers import TINY

import atomic
import fgssl
import linear_eval
import runfiles
import train_simclr
from evaluation import explore, results


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


def test_a_disk_that_fails_does_not_make_a_file_damaged(run, tmp_path, monkeypatch):
    """A good eval.json was moved aside, and a good checkpoint said to be damaged."""
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    result = tmp_path / "eval.json"
    result.write_text("{}")
    monkeypatch.setattr(runfiles.zipfile, "ZipFile", fail)
    with pytest.raises(OSError, match="cannot read .*checkpoint.pt: Input/output error"):
        fgssl.read_checkpoint(run[0] / "checkpoint.pt")
    monkeypatch.setattr(results.Path, "read_text", fail)
    with pytest.raises(OSError, match="cannot read .*eval.json: Input/output error"):
        results.earlier_result(result, {})
    assert [*tmp_path.iterdir()] == [result]
    (tmp_path / "embeddings.npz").touch()
    monkeypatch.setattr(explore.np, "load", fail)
    with pytest.raises(OSError, match="cannot read .*embeddings.npz: Input/output error"):
        explore.claim(tmp_path, "any")


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


def damaged(content, dice):
    """The bytes with one change: a flipped bit, a lost end, a zeroed or a lost block."""
    at, length = dice.randrange(len(content)), dice.choice([1, 16, 512])
    return dice.choice([
        content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1:],
        content[:at], content[:at] + bytes(len(content[at:at + length])) + content[at + length:],
        content[:at] + content[at + length:], content + content[:at]])


def test_a_damaged_result_is_named_and_never_overwritten(run, photos, tmp_path, capsys):
    """An extra comma, and 6 results with few labels were lost. 0 of 150 may pass in silence."""
    file, dice, moved, warned = tmp_path / "eval.json", random.Random(0), 0, 0
    linear_eval.main([str(run[0] / "checkpoint.pt"), "--data", str(photos), "--out", str(tmp_path),
                      "--precision", "fp32", "--shots", "1", "--draws", "2"])
    content = file.read_bytes()
    wanted = json.loads(content)
    for _ in range(150):
        broken = damaged(content, dice)
        file.write_bytes(broken)
        capsys.readouterr()
        refused = None
        try:
            found = results.earlier_result(file, wanted)
        except fgssl.UserError as error:                     # of other data, it says: not replaced
            refused, found = error, None
        said = capsys.readouterr().err
        if not file.exists():
            aside, = tmp_path.glob("eval.json.damaged")
            assert found == {} and said.count("\n") == 1 and str(file) in said
            assert aside.read_bytes() == broken
            aside.unlink()
            moved += 1
        elif refused or found != wanted:
            assert said.count("\n") == 1 and said.startswith(f"{file} was changed or damaged")
            assert file.read_bytes() == broken
            warned += 1
        else:
            assert said == ""                                # white space, say
    assert moved > 50 and warned > 10


@pytest.mark.parametrize("change", [
    {"few_labels": {}}, {"few_labels": [1]}, {"few_labels": [{}]}, {"digest": 3}, {"size": "16"},
    {"n": 7}, {"n": {}}, {"majority": None}, {"random_init": {"linear": "x", "knn": 1.0}},
    {"encoder": []}, {"chance": True}, {"seed": 1.5}], ids=str)
def test_a_result_of_wrong_values_is_none(run, tmp_path, photos, change):
    number = {"linear": 1.0, "knn": 2.0}
    cell = {"method": "frozen", "shots": "all", "draw": 0, "recipe": None, "images": 3,
            "val": 1.0, "test": 2}
    right = {"data": "a", "digest": "b", "weights": "c", "size": 16, "layer": "4", "seed": 0,
             "n": {"train": 1, "val": 2, "test": 3}, "chance": 10.0, "majority": 12.5,
             "random_init": number, "encoder": number, "few_labels": [cell, cell | {"shots": 5}]}
    assert results.is_result(right) and not results.is_result(right | change)
    for value in ("5", 0.5, None):
        assert not results.is_result(right | {"few_labels": [cell | {"shots": value}]})


def test_a_damaged_log_loses_the_lines_that_are_damaged(run, tmp_path, monkeypatch):
    content, dice = (run[0] / "log.jsonl").read_bytes(), random.Random(0)
    lines, args = content.splitlines(), SimpleNamespace(out=str(tmp_path), seed=0)
    monkeypatch.setattr(runfiles, "commit", lambda: None)    # it starts git
    for _ in range(150):
        broken = damaged(content, dice)
        (tmp_path / "log.jsonl").write_bytes(broken)
        found = fgssl.read_log(tmp_path / "log.jsonl")
        whole = [json.loads(line) for line in broken.splitlines() if line in lines]
        assert [record for record in found if record in whole] == whole
        assert len(found) - len(whole) <= 1, "a number may have another digit"
        log = fgssl.Log(args, 9, 5, torch.device("cpu"), 1)
        log.curves(loss="chance", knn="random_init")
        assert fgssl.read_log(tmp_path / "log.jsonl")[-1]["step"] == 5


@pytest.mark.parametrize("change", ['"loss": 1e300', f'"loss": {"9" * 400}', '"n": "many"',
                                    '"n": [1]', '"chance": null'])
def test_numbers_in_a_log_that_nothing_can_draw_do_not_end_the_run(tmp_path, monkeypatch, change):
    monkeypatch.setattr(runfiles, "commit", lambda: None)
    record = '{"step": 1, "loss": 1.0, "chance": 2.0, "knn": 50.0, "random_init": 40.0, "n": 9, %s}'
    (tmp_path / "log.jsonl").write_text(record % change + "\n")
    log = fgssl.Log(SimpleNamespace(out=str(tmp_path), seed=0), 9, 5, torch.device("cpu"), 1)
    log.curves(loss="chance", knn="random_init")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"no zip"])
def test_a_damaged_file_of_an_exploration_is_named(tmp_path, content):
    (tmp_path / "embeddings.npz").write_bytes(content)
    with pytest.raises(fgssl.UserError, match="embeddings.npz is damaged"):
        explore.claim(tmp_path, "identity")
    assert (tmp_path / "embeddings.npz").read_bytes() == content


def hold_until(file, ready, done):
    held = atomic.try_lock(file)
    ready.set()
    done.wait(60)
    held.close()


@pytest.mark.skipif(atomic.fcntl is None, reason="this system has no flock")
@pytest.mark.parametrize("doing", ["training", "evaluating"])
def test_two_processes_do_not_write_into_one_folder(photos, tmp_path, doing):
    """The log had lines of both runs, the checkpoint was of one; the few-label results of one
    evaluation took the place of the other's."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_until, args=(tmp_path / f".{doing}.lock", ready, done))
    other.start()
    assert ready.wait(60)
    common = ["--data", str(photos), "--out", str(tmp_path)]
    script, command, file = (
        (train_simclr, [*common, *TINY, "--epochs", "1"], "log.jsonl") if doing == "training" else
        (linear_eval, [*common, "--init", "random", "--size", "16"], "eval.json"))
    with pytest.raises(fgssl.UserError, match=f"another process is {doing} in"):
        script.main(command)
    assert not (tmp_path / file).exists()
    done.set()
    other.join()
    script.main(command)
    assert (tmp_path / file).exists()


def train_and_at_step_2(photos, out, monkeypatch, what):
    """SimCLR, of three steps; what() happens before the second."""
    embed, seen = train_simclr.embed, []

    def watched(*args):
        seen.append(1)
        if len(seen) == 2:
            what()
        return embed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_simclr, "embed", watched)
        train_simclr.main(["--data", str(photos), "--out", str(out), *TINY, "--epochs", "1"])


def test_a_folder_that_is_removed_in_mid_run_is_made_again(photos, tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    train_and_at_step_2(photos, out, monkeypatch, lambda: shutil.rmtree(out))
    found = fgssl.read_checkpoint(out / "checkpoint.pt")
    assert all(torch.equal(found["encoder"][name], value)
               for name, value in run[1]["encoder"].items()), "another run, of the same seed"
    assert fgssl.read_log(out / "log.jsonl")[-1]["step"] == 3 and (out / "curves.png").exists()


def test_weights_are_saved_elsewhere_where_the_folder_cannot_be_made_again(photos, tmp_path,
                                                                         monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def replace_by_file():
        shutil.rmtree(out)
        out.write_text("somebody else's")

    with pytest.raises(OSError, match="cannot write .*checkpoint.pt.*The run is saved in") as error:
        train_and_at_step_2(photos, out, monkeypatch, replace_by_file)
    elsewhere, = tmp_path.glob("run-*")
    assert f"--out {elsewhere} --resume" in error.value.strerror and out.is_file()
    assert fgssl.read_checkpoint(elsewhere / "checkpoint.pt")["step"] == 2
    train_simclr.main(["--out", str(elsewhere), "--resume"])
    assert fgssl.read_checkpoint(elsewhere / "checkpoint.pt")["step"] == 3
