"""What train_simclr.py has for large batches: LARS, and the loss of a whole batch in chunks."""

import contextlib

import pytest
import torch
from test_trainers import TINY, assert_same
from torch import nn

import fgssl
import kernels
import train_simclr
from methods.large_batch import LARS, two_pass

PLAIN = contextlib.nullcontext()

# LARS ---------------------------------------------------------------------------------------------


def test_lars_steps_as_computed_by_hand():
    """Lengths 5 and 10: ratio = 0.1 * 5 / (10 + 0.2 * 5) = 1 / 22. A bias takes a plain step."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LARS([w, bias], lr=0.5, weight_decay=0.2, momentum=0.9, trust=0.1)
    w.grad, bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([6.0, 8.0])
    optimizer.step()
    v = 0.5 / 22 * torch.tensor([[6.0 + 0.2 * 3, 8.0 + 0.2 * 4]])  # lr ratio (g + decay w)
    torch.testing.assert_close(w.data, torch.tensor([[3.0, 4.0]]) - v)
    torch.testing.assert_close(bias.data, torch.tensor([0.0, 0.0]))
    was, length = w.data.clone(), w.data.norm()
    w.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 1.0])
    optimizer.param_groups[0]["lr"] = 0.25  # momentum keeps steps, not gradients: old at old rates
    optimizer.step()
    ratio = 0.1 * length / (1 + 0.2 * length)
    v = 0.9 * v + 0.25 * ratio * (torch.tensor([[0.0, 1.0]]) + 0.2 * was)
    torch.testing.assert_close(w.data, was - v)
    torch.testing.assert_close(bias.data, -torch.tensor([0.9 * 3, 0.9 * 4 + 0.25]))


def test_lars_moves_a_layer_alike_whatever_the_scale_of_its_gradient():
    steps = []
    for scale in (1e-3, 1.0, 1e3):
        w = nn.Parameter(torch.ones(3, 2))
        optimizer = LARS([w], lr=1.0, weight_decay=0.0)
        w.grad = scale * torch.arange(6.0).view(3, 2)
        optimizer.step()
        steps.append(1 - w.data)
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(steps[2], steps[1])
    assert steps[1].norm() == pytest.approx(1e-3 * 6 ** 0.5, rel=1e-4), "trust times |w|"


@pytest.mark.parametrize("w, g", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_lars_of_zeros_is_finite_and_leaves_zero_weights(w, g):
    p = nn.Parameter(torch.full((2, 2), w))
    p.grad = torch.full((2, 2), g)
    LARS([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p.data, torch.full((2, 2), w - 0.1 * g if w == 0 else w))


# Chunks -------------------------------------------------------------------------------------------


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
