"""What a run stands on: schedule, batches, arguments, checkpoint, log, image cache, pictures."""

import argparse
import errno
import io
import itertools
import json
import math
import os
import signal
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import fgssl

# ------------------------------------------------------------------------------------------------
# Schedule and batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 1), (10, 0), (97, 31), (100, 5), (1000, 50)])
def test_the_rate_rises_through_warm_up_never_after_it_and_ends_at_0(total, warmup):
    """A cosine with a wrong period, or stepped once an epoch, rebounds or never comes down."""
    rate = [fgssl.cosine_lr(step, total, warmup, 0.3) for step in range(total + 1)]
    rise, fall = rate[:warmup + 1], rate[warmup:]
    assert rise == pytest.approx(np.linspace(0, 0.3, warmup + 1) if warmup else [0.3])
    assert fall[0] == 0.3 and all(b < a for a, b in itertools.pairwise(fall)), "must only fall"
    assert rate[total] == 0, "the last step is the end of the half cosine"
    if (total - warmup) % 2 == 0:
        assert fall[(total - warmup) // 2] == pytest.approx(0.15), "half way down at half time"


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
    assert "None" not in text, "a default of None tells a reader nothing"
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


# ------------------------------------------------------------------------------------------------
# Checkpoint
# ------------------------------------------------------------------------------------------------


class Training:
    """A small training that draws from every generator there is: dropout, NumPy, the views'."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.rng = torch.Generator().manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6),
                                       torch.nn.Dropout(0.3), torch.nn.Linear(6, 2))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 0.01)
        self.state = dict(encoder=self.net, optimizer=self.optimizer)

    def steps(self, n):
        losses = []
        for _ in range(n):
            x = torch.randn(7, 5, generator=self.rng) + np.random.normal()
            loss = self.net(x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


ARGS = argparse.Namespace(out="out", seed=3, lr=0.1, root=None, resume=False)


def test_a_resumed_training_goes_on_to_the_bit(tmp_path):
    training = Training(0)
    training.steps(3)  # an odd number: NumPy keeps the other half of a pair of normal draws
    fgssl.save(tmp_path / "a.pt", 3, ARGS, training.rng, **training.state)
    wanted, weights = training.steps(5), training.net.state_dict()
    resumed = Training(1)
    resumed.steps(2)
    assert fgssl.load(tmp_path / "a.pt", resumed.rng, **resumed.state) == 3
    assert resumed.steps(5) == wanted, "some state was not saved, or not put back"
    assert all(torch.equal(resumed.net.state_dict()[k], weights[k]) for k in weights)
    assert fgssl.read_checkpoint(tmp_path / "a.pt")["args"] == vars(ARGS)


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_save_that_fails_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, when):
    file, training = tmp_path / "checkpoint.pt", Training(0)
    fgssl.save(file, 1, ARGS, training.rng, **training.state)
    before = file.read_bytes()
    if when == "renaming":
        monkeypatch.setattr(os, "replace", disk_full)
    elif not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full, a disk on which nothing has room")
    else:
        (tmp_path / "checkpoint.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt.*untouched"):
        fgssl.save(file, 2, ARGS, training.rng, **training.state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("folder", ["gone", "file"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=f"cannot write .*{folder}.checkpoint.pt"):
        fgssl.save(tmp_path / folder / "checkpoint.pt", 1, ARGS, torch.Generator())


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
    return fgssl.Log(args, total, step, torch.device("cpu"), "reference", 16)


def strict(file):
    """The records of a log, by JSON's own rules: Python's reader lets NaN pass, others do not."""
    def no(word):
        raise AssertionError(f"{word} is not JSON: other readers refuse the whole file")
    return [json.loads(line, parse_constant=no) for line in file.read_text().splitlines()]


def test_the_first_record_holds_every_argument_and_version(tmp_path):
    first = strict(start_log(tmp_path / "new" / "run").file)[0]
    assert first["args"] == {**vars(ARGS), "out": str(tmp_path / "new" / "run")}
    assert first["seed"] == 3 and first["argv"] == sys.argv and first["kernels"] == "reference"
    assert (first["torch"], first["numpy"]) == (torch.__version__, np.__version__)
    assert first["python"] in sys.version and first.keys() >= {"pillow", "device", "commit"}


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


@pytest.mark.parametrize("total", [1, 7, 50, 60, 99, 149, 151, 5000, 123_457])
def test_first_and_last_steps_are_logged_and_fifty_evenly_between(total, tmp_path):
    log = start_log(tmp_path, total=total)
    due = [step for step in range(1, total + 1) if log.due(step)]
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
def test_a_signal_is_a_wish_and_the_second_kills(handlers, monkeypatch, capsys, number, code):
    stop = fgssl.StopSignal()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    for each in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(each) == signal.SIG_DFL, "a run that hangs could not be stopped"
    monkeypatch.setattr(sys, "argv", ["/some/where/train_simclr.py", "--batch", "8"])
    with pytest.raises(SystemExit) as exit:
        stop.leave(argparse.Namespace(out="out/my run"))
    assert exit.value.code == code, "a && b would run b"
    assert "python train_simclr.py --out 'out/my run' --resume" in capsys.readouterr().out


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"),
                                           (3599.7, "1:00:00"), (3661, "1:01:01")])
def test_times_carry_over(seconds, text):
    assert fgssl.minutes(seconds) == text


# ------------------------------------------------------------------------------------------------
# Image cache
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten flat images, the i-th of grey 20 i, and an image cache of the test's own."""
    monkeypatch.setenv("FGSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for i in range(10):
        grey(tmp_path / "photos" / f"{i}.png", 20 * i)
    return tmp_path / "photos"


def grey(path, value):
    Image.new("L", (40, 30), value).save(path)


def dataset(folder, skip_bad=False):
    """All images in train, but for the last two in val; image i has label i."""
    paths = sorted(folder.iterdir())
    splits = np.array(["train"] * (len(paths) - 2) + ["val"] * 2)
    records = datasets.Records(paths, np.arange(len(paths)), [path.stem for path in paths], splits)
    return fgssl.Dataset(records, skip_bad)


def cache_files(folder):
    return sorted(folder.parent.glob("cache/**/*.npy"))


def values(split):
    return split.images[:, 0, 0, 0].tolist()


def test_the_cache_holds_each_image_of_a_split_once_in_order(photos):
    data = dataset(photos)
    train, val, test = (data.cached(split, 24) for split in ("train", "val", "test"))
    assert train.images.shape == (8, 3, 24, 24) and train.images.dtype == np.uint8
    assert isinstance(train.images, np.memmap), "large sets do not fit in memory"
    assert values(train) == [20 * i for i in range(8)] and values(val) == [160, 180]
    assert train.labels.tolist() == list(range(8)) and val.labels.tolist() == [8, 9]
    assert test.images.shape == (0, 3, 24, 24) and test.labels.shape == (0,)
    assert (train.images == train.images[:, :, :1, :1]).all(), "flat images stay flat"
    train.images[:] = 7
    times = [file.stat().st_mtime_ns for file in cache_files(photos)]
    again = dataset(photos).cached("train", 24)
    assert values(again) == [20 * i for i in range(8)], "a stray write reached the disk"
    assert times == [file.stat().st_mtime_ns for file in cache_files(photos)], "decoded again"
    assert data.cached("train", 16).images.shape == (8, 3, 16, 16)


def test_the_cache_keeps_colours_and_places(photos):
    corners = np.array([[(250, 0, 9), (60, 61, 62)], [(7, 200, 100), (0, 0, 255)]], np.uint8)
    Image.fromarray(corners.repeat(12, 0).repeat(12, 1)).save(photos / "1.png")
    image = dataset(photos).cached("train", 24).images[1]
    assert (image.transpose(1, 2, 0)[::12, ::12] == corners).all()


def test_a_changed_file_makes_a_new_cache(photos):
    dataset(photos).cached("train", 24)
    size, mtime = (photos / "3.png").stat().st_size, (photos / "3.png").stat().st_mtime_ns
    grey(photos / "3.png", 61)
    assert (photos / "3.png").stat().st_size == size, "the test wants the same size"
    os.utime(photos / "3.png", ns=(mtime + 1, mtime + 1))
    assert values(dataset(photos).cached("train", 24))[3] == 61, "changed, of the same size"
    Image.effect_noise((90, 90), 50).save(photos / "3.png")
    os.utime(photos / "3.png", ns=(mtime + 1, mtime + 1))
    assert dataset(photos).cached("train", 24).images[3].std() > 5, "changed, of the same time"
    (photos / "0.png").rename(photos / "z.png")
    split = dataset(photos).cached("train", 24)
    assert values(split)[:2] == [20, 40] and len(split.labels) == 8, "another list of files"


def test_an_interrupted_build_leaves_nothing(photos, monkeypatch):
    decode = fgssl.decode

    def interrupted(path, side):
        if path.name == "5.png":
            raise KeyboardInterrupt
        return decode(path, side)

    monkeypatch.setattr(fgssl, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset(photos).cached("train", 24)
    assert list((photos.parent / "cache").rglob("*")) == []
    monkeypatch.undo()
    monkeypatch.setenv("FGSSL_CACHE", str(photos.parent / "cache"))
    assert len(dataset(photos).cached("train", 24).images) == 8


def test_a_full_disk_names_the_cache_folder_and_leaves_nothing(photos):
    resource = pytest.importorskip("resource", reason="Windows has no limit on a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # 8 x 3 x 96 x 96 = 221,184
    try:
        with pytest.raises(OSError, match="cannot write the image cache in .*FGSSL_CACHE"):
            dataset(photos).cached("train", 96)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((photos.parent / "cache").rglob("*")) == []


def test_a_cache_folder_that_cannot_be_written_is_named(photos, monkeypatch):
    monkeypatch.setenv("FGSSL_CACHE", str(photos / "0.png" / "cache"))
    with pytest.raises(OSError, match="cannot write the image cache in .*0.png.cache.*FGSSL_CACHE"):
        dataset(photos).cached("train", 24)


def spoil(photos):
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:50])
    (photos / "6.png").write_text("<html>404 Not Found</html>")


def test_an_unreadable_image_stops_the_run_by_name(photos):
    spoil(photos)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.png.*1 more.*--skip-bad"):
            dataset(photos).cached("train", 24)
    (photos / "2.png").write_bytes((photos / "3.png").read_bytes())
    with pytest.raises(ValueError, match=r"6\.png"):
        dataset(photos).cached("train", 24)
    (photos / "6.png").write_bytes((photos / "3.png").read_bytes())
    assert values(dataset(photos).cached("train", 24)) == [0, 20, 60, 60, 80, 100, 60, 140]


def test_skip_bad_counts_them_and_keeps_each_label_with_its_image(photos, capsys):
    spoil(photos)
    for _ in range(2):  # the build, then the cache
        split = dataset(photos, skip_bad=True).cached("train", 24)
        assert split.labels.tolist() == [0, 1, 3, 4, 5, 7]
        assert values(split) == [20 * label for label in split.labels]
        assert "2 of 8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2.png"):
        dataset(photos).cached("train", 24)


def test_a_failure_that_passes_is_not_remembered(photos, monkeypatch):
    """A network disk's hiccup changes neither size nor time of a file."""
    decode = fgssl.decode
    with monkeypatch.context() as patch:
        patch.setattr(fgssl, "decode", lambda path, side: decode(
            photos / "gone" if path.name == "2.png" else path, side))
        with pytest.raises(ValueError, match="gone"):
            dataset(photos).cached("train", 24)
    assert len(dataset(photos).cached("train", 24).images) == 8


def test_a_set_without_one_readable_image_is_an_error_even_with_skip_bad(photos):
    for path in photos.iterdir():
        path.write_text("no image")
    with pytest.raises(ValueError, match="0.png"):
        dataset(photos, skip_bad=True).cached("train", 24)


# ------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------


def palette(transparent):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 255, 200, 60, 30])
    if transparent:
        image.info["transparency"] = 1
    return image


RED = (200, 60, 30)
MODES = {  # name: (image, file type, the colour that a viewer shows)
    "RGB": (Image.new("RGB", (6, 6), RED), "png", RED),
    "grey": (Image.new("L", (6, 6), 100), "png", (100, 100, 100)),
    "grey jpeg": (Image.new("L", (64, 64), 100), "jpeg", (100, 100, 100)),
    "1 bit": (Image.new("1", (6, 6), 1), "png", (255, 255, 255)),
    "CMYK": (Image.new("CMYK", (64, 64), (0, 179, 217, 55)), "jpeg", (200, 60, 30)),
    "palette": (palette(transparent=False), "png", RED),
    "palette, transparent": (palette(transparent=True), "png", (255, 255, 255)),
    "RGBA, clear": (Image.new("RGBA", (6, 6), (*RED, 0)), "png", (255, 255, 255)),
    "RGBA, half clear": (Image.new("RGBA", (6, 6), (0, 100, 200, 128)), "png", (127, 177, 227)),
    "LA": (Image.new("LA", (6, 6), (0, 51)), "png", (204, 204, 204)),
    "16 bit": (Image.new("I;16", (6, 6), 32768), "png", (128, 128, 128)),
    "16 bit, dark": (Image.new("I;16", (6, 6), 200), "png", (1, 1, 1)),
    "16 bit tiff": (Image.new("I;16", (6, 6), 32768), "tiff", (128, 128, 128)),
    "float": (Image.new("F", (6, 6), 0.5), "tiff", (128, 128, 128)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_file_becomes_the_rgb_that_a_viewer_shows(name, tmp_path):
    """16 bit clipped to white, clear pixels in a hidden colour, greyscale left out (pitfall 18)."""
    image, kind, colour = MODES[name]
    image.save(tmp_path / "image", kind)
    pixels = fgssl.decode(tmp_path / "image", 5)
    assert pixels.shape == (3, 5, 5) and pixels.dtype == np.uint8
    tolerance = 4 if kind == "jpeg" else 1  # JPEG rounds in YCbCr; the others round once
    shown = pixels.reshape(3, -1).T.astype(int)
    assert np.abs(shown - colour).max() <= tolerance, f"shown {shown[0]}, wanted {colour}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_numbers_are_refused(tmp_path, value):
    pixels = np.full((6, 6), 0.5, np.float32)
    pixels[2, 3] = value
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff.*not finite"):
        fgssl.decode(tmp_path / "a.tiff", 5)


SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top",
         6: "right top", 7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])  # Pillow itself turns a TIFF, on load
def test_exif_orientation_is_obeyed(orientation, kind, tmp_path):
    """The EXIF standard: where the stored row 0 and the stored column 0 are seen."""
    row, column = SIDES[orientation].split()
    other = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    stored = np.zeros((32, 32, 3), np.uint8)
    corners = {}
    for y, x, value in ((0, 0, 250), (0, 1, 180), (1, 0, 110), (1, 1, 40)):
        stored[16 * y:16 * y + 16, 16 * x:16 * x + 16] = value
        corners[frozenset((other[row] if y else row, other[column] if x else column))] = value
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image", kind, exif=exif)
    seen = fgssl.decode(tmp_path / "image", 32)[0]
    for y, x, corner in ((4, 4, "top left"), (4, 28, "top right"), (28, 4, "bottom left"),
                         (28, 28, "bottom right")):
        assert abs(int(seen[y, x]) - corners[frozenset(corner.split())]) < 12, corner


@pytest.mark.parametrize("exif", [
    b"MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    + struct.pack(">HHII", 0x011A, 2, 1, 0x41000000) + bytes(4),  # a resolution that is a word
    b"MM\0*\0\0",  # cut short
    b"not what it should be"], ids=["mistyped", "cut", "junk"])
def test_damaged_exif_does_not_cost_the_picture(exif, tmp_path):
    Image.new("RGB", (12, 8), RED).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    assert fgssl.decode(tmp_path / "a.png", 4)[:, 2, 2].tolist() == list(RED)


def test_the_centre_square_is_kept(tmp_path):
    thirds = np.repeat(np.array([10, 100, 200], np.uint8), 20)
    Image.fromarray(np.tile(thirds, (20, 1))).save(tmp_path / "wide.png")
    Image.fromarray(np.tile(thirds[:, None], (1, 20))).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        inside = fgssl.decode(tmp_path / name, 10)[:, 1:-1, 1:-1]  # its rim is mixed with beyond
        assert (inside == 100).all(), name
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert (fgssl.decode(tmp_path / "dot.png", 8) == np.reshape(RED, (3, 1, 1))).all()


def test_a_jpeg_decoded_small_is_the_jpeg_decoded_whole(tmp_path):
    """A draft below the wanted side would blur it; a box in the wrong pixels would shift it."""
    y, x = np.mgrid[:200, :304]
    waves = 128 + 60 * np.sin(x / 3) + 60 * np.cos(y / 4)
    Image.fromarray(waves.astype(np.uint8)).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    for side in (50, 40, 101):  # drafts of 1/4, 1/4 and none
        whole = Image.open(tmp_path / "a.jpg").crop((52, 0, 252, 200))
        whole = np.asarray(whole.resize((side, side), Image.BILINEAR), float)
        error = np.abs(fgssl.decode(tmp_path / "a.jpg", side).transpose(1, 2, 0) - whole).mean()
        assert error < 4, f"{error:.1f} at side {side}: half a pixel of shift makes 12 to 24"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, on the way to its errors
def test_whatever_is_wrong_with_a_file_the_error_names_it(tmp_path):
    """One nameless struct.error from a reader would end a run of a million images."""
    image, damaged, dice = Image.effect_noise((40, 30), 60), 0, np.random.default_rng(0)
    for kind in ("jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm"):
        whole = io.BytesIO()
        image.save(whole, kind)
        for cut in np.linspace(0, len(whole.getvalue()) - 1, 25).astype(int):
            for flips in (0, 8):
                content = bytearray(whole.getvalue()[:cut] if not flips else whole.getvalue())
                for place in dice.integers(0, len(content), flips):
                    content[place] = dice.integers(256)
                (tmp_path / "bad").write_bytes(content)
                try:
                    fgssl.decode(tmp_path / "bad", 8)
                except ValueError as error:
                    damaged += 1
                    assert str(tmp_path / "bad") in str(error)
    assert damaged > 150, "the damage was none"


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def near(pixel, colour, tolerance=3):
    return np.abs(np.subtract(pixel, colour)).max() <= tolerance


def flat(*colour):
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)


def test_a_grid_shows_each_image_in_its_row_and_column(tmp_path):
    first = torch.stack([flat(255, 0, 0), flat(0, 255, 0), flat(0, 0, 255)])
    second = torch.stack([flat(9, 80, 200), flat(90, 90, 90)]).float() / 255
    second[1, 0], second[1, 1] = 1.3, -0.2  # brighter than white, darker than black
    fgssl.grid(tmp_path / "a.png", [first, second], side=32)
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (4 + 3 * 36, 4 + 2 * 36), "32 pixels an image and gaps of 4"
    for r, row in enumerate(([(255, 0, 0), (0, 255, 0), (0, 0, 255)],
                             [(9, 80, 200), (255, 0, 90), (255, 255, 255)])):
        for c, colour in enumerate(row):
            assert near(picture.getpixel((20 + 36 * c, 20 + 36 * r)), colour), (r, c)
    fgssl.grid(tmp_path / "b.png", [first, second], ("image", "a longer title"), side=32)
    titled = Image.open(tmp_path / "b.png")
    assert titled.height == picture.height and titled.width > picture.width + 60
    assert near(titled.getpixel((titled.width - 20, 20)), (0, 0, 255)), "titles stand at the left"


def drawn(picture, colour, columns):
    """The rows in which a colour is found, averaged, in each of the given columns."""
    pixels = np.asarray(picture).astype(int)
    hit = np.abs(pixels - np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).max(2) < 30
    return [np.flatnonzero(hit[:, x]).mean() for x in columns]


def test_a_curve_stands_where_its_numbers_say():
    line = {"rising": ([0, 10], [0.0, 1.0])}
    picture = fgssl.curve(line, {"half": 0.5}, "step", "loss")
    assert picture.size == (640, 360)
    left, middle, right = drawn(picture, fgssl.COLORS[0], (100, 300, 480))
    assert left > middle > right, "a rising curve rises to the right"
    assert (left - middle) / 200 == pytest.approx((middle - right) / 180, rel=0.05), "straight"
    dashes = drawn(picture, fgssl.COLORS[1], (186, 476))  # 16 of each 20 columns hold no gap
    assert dashes[0] == dashes[1], "a yardstick is level"
    crossing = np.interp(dashes[0], [right, left], [480, 100])
    assert crossing == pytest.approx(64 + (624 - 64) / 2, abs=5), "y = 0.5 is met half way"


@pytest.mark.parametrize("ys", [[0.5, 0.5, 0.5], [0.5, math.nextafter(0.5, 1), 0.5],
                                [1e-12, 2e-12, 3e-12], [0.0, 0.0, 0.0], [1e9, 1e9 + 1, 1e9],
                                [-5.0, 3.0, 1e6]])
def test_a_curve_of_all_but_equal_numbers_does_not_end_a_run(ys):
    """Drawn after hours of training: a division by zero there would be the last thing one sees."""
    for n in (1, 3):
        picture = fgssl.curve({"loss": ([1, 2, 3][:n], ys[:n])}, {"chance": ys[0]})
        assert picture.getextrema() != ((255, 255),) * 3


@pytest.mark.parametrize("low, high", [(0, 1), (1, 9300), (-0.5, 0.5), (0.1, 0.3), (4.84, 5.54),
                                       (1e-12, 3e-12), (-3, 7e5), (1e9, 1e9 + 7), (0, 1e-300)])
def test_ticks_are_round_even_and_cover_the_range(low, high):
    ticks = fgssl.ticks(low, high)
    steps = np.diff(ticks)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack, "a point would lie outside"
    assert 3 <= len(ticks) <= 12 and steps.min() > 0
    assert steps.max() - steps.min() <= 1e-6 * steps.max(), "evenly spaced"
    mantissa = steps.mean() / 10 ** math.floor(math.log10(steps.mean()) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3, f"step {steps.mean():g}"


def test_a_heatmap_has_row_0_on_top_and_darkens_with_its_values(tmp_path):
    matrix = [[0.0, 1.0], [0.5, 0.25], [1.0, 0.0]]
    fgssl.heatmap(tmp_path / "a.png", matrix, "true", "taken for")
    picture = Image.open(tmp_path / "a.png").convert("L")
    cell = np.array([[picture.getpixel((30 + 24 * c + 12, 30 + 24 * r + 12)) for c in (0, 1)]
                     for r in (0, 1, 2)])
    assert (np.argsort(cell.ravel(), kind="stable") == [1, 4, 2, 3, 0, 5]).all(), cell
    assert cell[0, 0] == 255 and cell[0, 1] < 40
    assert (np.diff(fgssl.heat(np.linspace(0, 1, 50)).sum(-1, dtype=int)) < 0).all(), "darker only"
    assert (fgssl.heat([math.nan, -1]) == 255).all() and (fgssl.heat(7) == fgssl.heat(1)).all()
    names = [f"species {i}" for i in range(200)]
    fgssl.heatmap(tmp_path / "b.png", np.eye(200), names=names)
    assert max(Image.open(tmp_path / "b.png").size) < 1100, "200 classes still fit a screen"
