"""The loss of a whole batch in chunks, and an optimizer for large batches."""

import contextlib

import pytest
import torch
from test_trainers import TINY, assert_same
from torch import nn

import fgssl
import kernels
import train_simclr
from methods.large_batch import two_pass

PLAIN = contextlib.nullcontext()


def networks(batch_norm):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if batch_norm else nn.Identity
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    head = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6) if batch_norm else nn.ReLU(),
                         nn.Linear(6, 16))
    return encoder, head


def state(networks):
    """All gradients, and all buffers."""
    named = [(f"{i}.{name}", value) for i, network in enumerate(networks)
             for name, value in (*((n, p.grad) for n, p in network.named_parameters()),
                                 *network.named_buffers())]
    return dict(named)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("chunk", [4, 8, 24])
def test_chunks_have_the_loss_and_gradient_of_one_graph(batch_norm, chunk):
    """Negatives of a chunk alone; statistics learned twice, or other ones in the second pass. With
    batch-norm the one graph is of chunks too, for each is normalised by itself."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(24, 3, 9, 9, generator=rng) + 2 * torch.rand(24, 3, 1, 1, generator=rng)
    ours, wanted = networks(batch_norm), networks(batch_norm)
    z, loss = two_pass(train_simclr.embed, ours, ours, x, PLAIN, chunk,
                       lambda z: kernels.nt_xent(z, 0.5, "torch"))
    parts = x.split(chunk if batch_norm else 24)
    whole = torch.cat([train_simclr.embed(*wanted, part, PLAIN) for part in parts])
    reference = kernels.nt_xent_dense(whole, 0.5)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(z.detach(), whole.detach())
    scale = max(p.grad.norm() for network in wanted for p in network.parameters())
    for name, value in state(wanted).items():  # a bias before batch-norm has gradient 0
        torch.testing.assert_close(state(ours)[name], value, rtol=2e-5, atol=2e-6 * scale.item(),
                                   msg=lambda text: f"{name}: {text}")


def test_a_chunked_run_with_lars_resumes_to_the_bit(photos, tmp_path, monkeypatch):
    command = ["--data", str(photos), *TINY, "--chunk", "4", "--optimizer", "lars", "--lr", "0.3"]
    train_simclr.main([*command, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        asked = []
        patch.setattr(fgssl.StopSignal, "__bool__", lambda self: asked.append(1) or len(asked) == 4)
        train_simclr.main([*command, "--out", str(tmp_path / "stopped")])
    train_simclr.main(["--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (fgssl.read_checkpoint(tmp_path / name / "checkpoint.pt")
                      for name in ("whole", "stopped"))
    resumed["args"]["resume"] = False
    assert_same(whole, resumed)


def test_a_chunk_must_divide_the_views(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_simclr.main(["--batch", "8", "--chunk", "5", "--out", str(tmp_path)])
    assert "--chunk 5 does not divide the 16 views" in capsys.readouterr().err
