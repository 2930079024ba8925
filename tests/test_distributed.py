"""Two processes train as one: gradients, losses, views, checkpoints, signals and failures.

This file is also the program of the two: torchrun starts `main` below, and the tests compare what
it leaves with the same functions run in this one process.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import fgssl
import kernels
import parallel
import train_jigsaw
import train_simclr
import train_srgan
from methods.large_batch import two_pass

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["--size", "16", "--batch", "8", "--epochs", "2", "--precision", "fp32", "--sync-bn"]
LARS = ["--loss", "nt-xent", "--optimizer", "lars", "--lr", "0.5"]  # Adam's first steps turn rounding into signs
STOPPED_AT = 4

# ------------------------------------------------------------------------------------------------
# What runs in two processes, and in one
# ------------------------------------------------------------------------------------------------


def networks(kind, batch_norm):
    """Without biases, whose gradients all but cancel, or ReLU, which rounding may switch."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if batch_norm else nn.Identity
    encoder = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, bias=False), norm(5), nn.Tanh(), nn.Conv2d(5, 7, 3, bias=False),
        norm(7), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Linear(7, 6, bias=False), nn.BatchNorm1d(6) if batch_norm else
                         nn.Tanh(), nn.Linear(6, 16, bias=False))
    parallel.convert_sync_batchnorm(encoder, head)
    return encoder.to(kind), head.to(kind)


def contrast(kind, batch_norm=False, chunk=None):
    """The loss of one global batch, all gradients, and what batch-norm learned."""
    encoder, head = networks(kind, batch_norm)
    wrapped = parallel.wrap_ddp(encoder, head)
    rng = torch.Generator().manual_seed(1)  # colours of their own: z that lie apart round less
    views = torch.randn(24, 3, 9, 9, generator=rng) + 2 * torch.randn(24, 3, 1, 1, generator=rng)
    x = views.to(kind)[parallel.rank()::parallel.ranks()]
    if chunk:
        _, loss = two_pass(train_simclr.embed, (encoder, head), wrapped, x,
                           contextlib.nullcontext(), chunk,
                           lambda z: kernels.nt_xent(z, 0.5, "torch", parallel.group()))
    else:
        h = wrapped[0](x if kind == torch.float64 else fgssl.normalize(x))
        z = F.normalize(wrapped[1](h), dim=1)
        loss = kernels.nt_xent(z, 0.5, "torch", parallel.group())
        loss.backward()
    left = {"loss": torch.tensor(parallel.mean(loss))}
    for part, network in (("encoder", encoder), ("head", head)):
        left |= {f"{part}.{name}": p.grad for name, p in network.named_parameters()}
        left |= {f"{part}.{name}": b.clone() for name, b in network.named_buffers()}
    return left


CASES = {"float32": (torch.float32,), "float64": (torch.float64,),
         "batch-norm": (torch.float64, True), "chunks": (torch.float32, False, 4)}


def train(trainer, photos, out, *more):
    trainer.main(["--data", photos, "--out", f"{out}/{trainer.__name__}", *TINY, *more])


def train_all(photos, out, patch):
    """All three trainers from end to end; returns the views that SimCLR was shown."""
    shown, embed = [], train_simclr.embed

    def watched(encoder, head, x, autocast):
        shown.append(x)
        return embed(encoder, head, x, autocast)

    with patch.context() as patch:
        patch.setattr(train_simclr, "embed", watched)
        train(train_simclr, photos, out, *LARS, "--view", "dropout", "--blur", "0.5")
    train(train_jigsaw, photos, out)
    train(train_srgan, photos, out, "--pixel-epochs", "1", "--blocks", "1", "--width", "8")
    return shown


def stop_early(photos, out, patch, rank):
    """SimCLR, stopped by a signal that only this rank got, within the second epoch."""
    asked = []

    def stop(self):
        asked.append(1)
        return parallel.rank() == rank and len(asked) == STOPPED_AT

    with patch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(fgssl.StopSignal, "__bool__", stop)
        train(train_simclr, photos, out, *LARS)


def written_below(folder):
    """A list that grows by each file that this process opens to write, makes or renames there."""
    seen = []

    def hook(event, details):
        path = str(details[-1] if event == "os.rename" else details[0] if details else "")
        writes = event in ("os.mkdir", "os.rename") or event == "open" and set(
            str(details[1])) & set("wax+")
        if writes and path.startswith(str(folder)):
            seen.append((event, path))

    sys.addaudithook(hook)
    return seen


def main(what, photos, out):
    if what == "fail":
        if parallel.rank() == 1:
            raise ValueError("no such bird")
        return parallel.wait()
    if what == "wait":
        return wait_for_the_first(photos)
    torch.set_num_threads(1)
    patch, written = pytest.MonkeyPatch(), written_below(out)
    left = {name: contrast(*case) for name, case in CASES.items()}
    left["shown"] = train_all(photos, f"{out}/two", patch)
    stop_early(photos, f"{out}/two_then_one", patch, rank=1)
    train_simclr.main(["--out", f"{out}/one_then_two/train_simclr", "--resume", "--sync-bn"])
    torch.save(left | {"written": list(written)}, f"{out}.rank{parallel.rank()}.pt")


def wait_for_the_first(how):
    """Local rank 0 takes two seconds over a download, or dies in it; the other waits."""
    parallel.any_rank = None                                 # a collective has a time limit
    for turn in range(2):
        with parallel.local_rank0_first():
            if parallel.rank() == 0:
                print(f"first {turn}", flush=True)
                time.sleep(2 * (1 - turn))
                if how != "done":
                    os.kill(os.getpid(), signal.SIGKILL)
            elif turn == 1:
                os.write(2, b"second")                       # its stderr is dropped, this is not


# ------------------------------------------------------------------------------------------------
# The tests
# ------------------------------------------------------------------------------------------------


def torchrun(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*TORCHRUN, *map(str, command)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The folder, what each of two ranks left, what one process left, and what was printed."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_early(str(photos), f"{out}/one_then_two", patch, rank=0)
        program = torchrun(__file__, "train", photos, out)
        one = {name: contrast(*case) for name, case in CASES.items() if name != "chunks"}
        one["shown"] = train_all(str(photos), f"{out}/one", patch)
        printed, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
        train_simclr.main(["--out", f"{out}/two_then_one/train_simclr", "--resume"])
    ranks = [torch.load(f"{out}.rank{rank}.pt") for rank in (0, 1)]
    return Namespace(out=out, ranks=ranks, one=one, printed=printed)


def error(ours, wanted):
    """Relative Frobenius error."""
    ours, wanted = ours.double(), wanted.double()
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("case, alone, limit", [
    ("float32", "float32", 1e-6), ("float64", "float64", 1e-10),
    ("batch-norm", "batch-norm", 1e-10), ("chunks", "float32", 1e-6)])
def test_loss_and_every_gradient_are_those_of_one_process(run, case, alone, limit):
    """A gather that cuts the gradient, a sum for a mean, negatives of one rank alone. Batch-norm,
    synchronised, is that of the whole batch; its running statistics too."""
    wanted = run.one[alone]
    for rank in run.ranks:
        assert rank[case].keys() == wanted.keys()
        for name, value in rank[case].items():
            assert error(value, wanted[name]) <= limit, name
    assert all(torch.equal(a, b) for a, b in zip(*(r[case].values() for r in run.ranks)))


def test_ranks_are_shown_different_images_in_the_views_of_one_process(run):
    """Row i of rank r is row 2 i + r of the batch: the shards neither overlap nor leave one out,
    and a view does not depend on the number of ranks."""
    assert len(run.one["shown"]) == 2 * (28 // 8)
    for one, *two in zip(run.one["shown"], *(rank["shown"] for rank in run.ranks)):
        torch.testing.assert_close(torch.stack(two, 1).flatten(0, 1), one, atol=1e-5, rtol=0)
        assert not torch.equal(*two)


@pytest.mark.parametrize("trainer", ["train_simclr", "train_jigsaw", "train_srgan"])
def test_trainers_log_and_leave_what_one_process_does(run, trainer):
    one, two = (run.out / folder / trainer for folder in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    alone, both = (fgssl.read_checkpoint(folder / "checkpoint.pt") for folder in (one, two))
    assert torch.equal(alone["rng"]["views"], both["rng"]["views"]), "the streams of draws parted"
    assert alone["encoder"].keys() == both["encoder"].keys(), "names of the plain modules"
    logs = [[r for r in fgssl.read_log(folder / "log.jsonl") if "lr" in r] for folder in (one, two)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    first, ours = ({name: value for record in reversed(log) for name, value in record.items()}
                   for log in logs)  # of each number; later ones have Adam's rounding in them
    for name, value in first.items():
        if not name.endswith("per_s"):
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


def test_rank_0_alone_prints_and_writes(run):
    assert run.ranks[0]["written"] and not run.ranks[1]["written"]
    assert run.printed.count("done: ") == 4, "one line of each trainer, and of the resumed one"


@pytest.mark.parametrize("path", ["two_then_one", "one_then_two"])
def test_a_run_goes_on_with_another_number_of_processes(run, path):
    """The wish to stop was one rank's: all must agree, or the others wait for ever."""
    stopped = run.out / path / "train_simclr"
    whole = run.out / "whole"
    if not whole.exists():
        train(train_simclr, fgssl.read_log(stopped / "log.jsonl")[0]["args"]["data"], whole, *LARS)
    ours, wanted = (fgssl.read_checkpoint(folder / "checkpoint.pt")
                    for folder in (stopped, whole / "train_simclr"))
    assert ours["step"] == wanted["step"] == 6
    starts = [r for r in fgssl.read_log(stopped / "log.jsonl") if "args" in r]
    assert [r["step"] for r in starts] == [0, STOPPED_AT]
    assert [r["processes"] for r in starts] == ([2, 1] if path == "two_then_one" else [1, 2])
    for name, value in wanted["encoder"].items():
        assert error(ours["encoder"][name], value) < 1e-4, name


def test_a_batch_must_divide_that_of_a_resumed_run_too(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "ranks", lambda: 3)
    for command in (["--batch", "8", "--out", str(tmp_path)],
                    ["--out", f"{run.out}/one/train_simclr", "--resume"]):
        with pytest.raises(SystemExit):
            train_simclr.arguments(command)
        assert "--batch 8 does not divide among 3 processes" in capsys.readouterr().err


def test_a_rank_that_fails_ends_all_with_its_error(photos, tmp_path):
    program = torchrun(__file__, "fail", photos, tmp_path)
    _, errors = program.communicate(timeout=300)
    assert program.returncode == 1
    assert "ValueError: no such bird" in errors and "rank 1 of 2 failed" in errors
    assert errors.count("File \"" + __file__) <= 4, "rank 0, which lost its partner, is silent"


@pytest.fixture
def pair():
    """Starts two ranks without torchrun, which would end the second when the first dies."""
    store, programs = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True), []

    def start(*command):
        for rank in "01":
            environment = os.environ | {
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank,
                "WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True"}
            programs.append(subprocess.Popen([sys.executable, __file__, *command], text=True,
                                             env=environment, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE))
        return programs

    yield start
    for program in programs:
        program.kill()
        program.communicate()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no kill -9")
@pytest.mark.parametrize("how", ["done", "dies"])
def test_the_first_is_waited_for_as_long_as_it_lives(pair, how):
    """In a collective, a download of more than its time limit failed, again at each try."""
    first, second = pair("wait", how, "nowhere")
    assert first.stdout.readline() == "first 0\n"
    if how == "done":
        assert first.wait(60) == second.wait(60) == 0
        assert first.stdout.read() == "first 1\n" and second.stderr.read() == "second"
    else:
        assert first.wait(60) == -signal.SIGKILL
        began = time.monotonic()
        assert second.wait(60) == 1 and time.monotonic() - began < 20  # it polls every 0.1 s
        assert "the first process of this machine ended" in second.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="signals are sent the POSIX way")
def test_ctrl_c_saves_and_says_how_to_go_on(photos, tmp_path):
    program = torchrun(ROOT / "train_simclr.py", "--data", photos, *TINY, "--epochs", 100000,
                       "--out", tmp_path / "run")
    for line in program.stdout:
        if "loss" in line:
            break
    program.send_signal(signal.SIGINT)
    rest, _ = program.communicate(timeout=300)
    assert program.returncode != 0
    assert re.search(r"torchrun --nproc-per-node 2 \S*train_simclr.py --out \S+ --resume", rest)
    step = fgssl.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    losses = [r for r in fgssl.read_log(tmp_path / "run" / "log.jsonl") if "loss" in r]
    assert step == losses[-1]["step"]


if __name__ == "__main__":
    parallel.run(lambda: main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
