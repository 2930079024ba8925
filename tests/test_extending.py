"""docs/extending.md: another encoder in every trainer, and another method on the same Run."""

import importlib.util
import signal

import pytest
import torch
from conftest import ROOT
from test_trainers import TINY, assert_same
from tiny_vit import TinyViT

import fgssl
import train_jigsaw
import train_simclr
import train_srgan

EXAMPLE = ROOT / "docs" / "examples" / "train_byol.py"


@pytest.fixture(scope="module")
def byol():
    """The example, imported as if it had been copied beside the trainers."""
    spec = importlib.util.spec_from_file_location("train_byol", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vit(monkeypatch):
    monkeypatch.setitem(fgssl.ENCODERS, "tiny-vit", TinyViT)


def stopped_and_resumed(trainer, out, whole, monkeypatch, *command):
    """A run of `command`, stopped after step 2 and resumed, must equal the uninterrupted one."""
    asked = []

    def stop(self):
        asked.append(1)
        self.signal = signal.SIGINT if len(asked) == 2 else None
        return self.signal is not None

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(fgssl.StopSignal, "__bool__", stop)
        trainer.main([*command, "--out", str(out)])
    trainer.main(["--out", str(out), "--resume"])
    resumed = fgssl.read_checkpoint(out / "checkpoint.pt")
    resumed["args"]["resume"] = False
    assert_same(whole, resumed)


@pytest.mark.parametrize("trainer, flags", [
    (train_simclr, []), (train_jigsaw, ["--grid", "2", "--tile", "8", "--perms", "20"]),
    (train_srgan, ["--pixel-epochs", "1", "--blocks", "1", "--width", "8"])],
    ids=["simclr", "jigsaw", "srgan"])
def test_an_encoder_that_is_no_resnet_trains_and_resumes(vit, photos, tmp_path, monkeypatch,
                                                         trainer, flags):
    """Code that asks for layer4, four stages or doubling widths works for ResNets alone."""
    command = ["--data", str(photos), *TINY, "--arch", "tiny-vit", *flags]
    trainer.main([*command, "--out", str(tmp_path / "whole")])
    whole = fgssl.read_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    torch.manual_seed(0)
    for name, value in TinyViT().named_parameters():
        assert not torch.equal(value, whole["encoder"][name]), f"{name} was not trained"
    encoder, run = fgssl.load_encoder(tmp_path / "whole" / "checkpoint.pt")
    assert isinstance(encoder, TinyViT) and run["arch"] == "tiny-vit"
    stopped_and_resumed(trainer, tmp_path / "stopped", whole, monkeypatch, *command)


@pytest.mark.parametrize("name", fgssl.ENCODERS)
@pytest.mark.parametrize("size", [16, 33])
def test_every_encoder_keeps_the_promises_of_one(name, size):
    """What fgssl.py asks of an encoder: dim, maps from early to late, h the last one's mean."""
    encoder = fgssl.ENCODERS[name]().eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        maps, h = encoder.stages(x), encoder(x)
    widths = fgssl.stage_widths(encoder, size)
    assert [m.shape[1] for m in maps] == widths and widths[-1] == encoder.dim
    assert all(a.shape[2] >= b.shape[2] for a, b in zip(maps, maps[1:])), "from early to late"
    torch.testing.assert_close(h, maps[-1].mean((2, 3)))


def test_measuring_an_encoder_leaves_it_as_it_was():
    """A blank image in train mode would move the running statistics of batch-norm."""
    encoder = fgssl.resnet("resnet10")
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert fgssl.stage_widths(encoder, 32) == [32, 64, 128, 256]
    assert encoder.training
    assert_same(before, encoder.state_dict())


def test_a_checkpoint_of_an_encoder_that_is_not_registered_says_so(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(fgssl.ENCODERS, "tiny-vit", TinyViT)
        train_simclr.main(["--data", str(photos), *TINY, "--arch", "tiny-vit", "--epochs", "1",
                           "--out", str(tmp_path)])
    with pytest.raises(fgssl.UserError, match="'tiny-vit', which is not in fgssl.ENCODERS"):
        fgssl.load_encoder(tmp_path / "checkpoint.pt")


def test_the_byol_example_trains_logs_and_resumes(byol, photos, tmp_path, monkeypatch):
    command = ["--data", str(photos), *TINY]
    byol.main([*command, "--out", str(tmp_path / "whole")])
    whole = fgssl.read_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    last = [r for r in fgssl.read_log(tmp_path / "whole" / "log.jsonl") if "loss" in r][-1]
    assert 0 < last["loss"] < 4 and last["spread"] > 0 and (tmp_path / "whole/curves.png").exists()
    stopped_and_resumed(byol, tmp_path / "stopped", whole, monkeypatch, *command)


def test_byols_target_begins_as_the_online_network_also_with_init(byol, photos, tmp_path):
    """The target was copied before --init's weights came, and pulled them back to random ones."""
    start = tmp_path / "start.pt"
    torch.save(fgssl.resnet("resnet10").state_dict(), start)
    byol.main(["--data", str(photos), *TINY, "--epochs", "1", "--lr", "1e-12", "--init", str(start),
               "--out", str(tmp_path / "out")])
    target = fgssl.read_checkpoint(tmp_path / "out" / "checkpoint.pt")["target"]["0.conv1.weight"]
    torch.testing.assert_close(target, torch.load(start, weights_only=True)["conv1.weight"])


def test_byol_predicts_the_other_view_and_never_trains_the_target(byol):
    """Rolled by another number of rows, or with a gradient into the target, it still runs."""
    p = torch.randn(6, 4, requires_grad=True)
    z = p.detach()[[3, 4, 5, 0, 1, 2]].requires_grad_(True)  # each is its partner's prediction
    loss = byol.byol_loss(p, 3 * z)
    assert loss.item() == pytest.approx(0, abs=1e-6), "row i predicts row i + N"
    assert byol.byol_loss(p, -z).item() == pytest.approx(4), "the opposite direction"
    byol.byol_loss(p, z.detach()[[0, 2, 1, 3, 5, 4]].requires_grad_(True)).backward()
    assert p.grad.abs().max() > 0 and z.grad is None
    online, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = 0.9 * target.weight.detach() + 0.1 * online.weight.detach()
    byol.update_target(target, online, 0.9)
    torch.testing.assert_close(target.weight.detach(), wanted)
