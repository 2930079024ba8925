"""Muon and LARS."""

import copy

import pytest
import torch
from torch import nn

from methods.optimizers import LARS, OPTIMIZERS, Muon, orthogonalize

# Muon ---------------------------------------------------------------------------------------------


def rotations(n, k):
    """Orthogonal matrices A (n, n) and B (k, k)."""
    return [torch.linalg.qr(torch.randn(m, m, generator=torch.Generator().manual_seed(m)))[0]
            for m in (n, k)]


@pytest.mark.parametrize("n, k", [(5, 5), (3, 40), (40, 3), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_orthogonalize_keeps_directions_and_brings_their_lengths_to_about_one(n, k, scale):
    """A S B^T -> A T B^T with T from 0.68 to 1.2: rows or columns mixed up, a wide matrix treated
    as a tall one, or a step that depends on the scale of the loss."""
    a, b = rotations(n, k)
    s = torch.logspace(0, -2, min(n, k))
    shape = torch.zeros(n, k)
    x = a @ shape.diagonal_scatter(s) @ b.mT
    t = a.mT @ orthogonalize(scale * x) @ b
    lengths = t.diagonal().clone()
    assert lengths.min() > 0.67 and lengths.max() < 1.21
    t.diagonal().zero_()
    assert t.abs().max() < 1e-4, "a direction turned: rounding of s / |x| = 0.01 in five steps"


def test_orthogonalize_is_the_iteration_of_the_paper():
    """In float64, on the whole matrix, as it is written down by Jordan et al."""
    x = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    wanted = x.double() / x.double().norm()
    for _ in range(5):
        gram = wanted @ wanted.mT
        wanted = 3.4445 * wanted + (-4.7750 * gram + 2.0315 * gram @ gram) @ wanted
    torch.testing.assert_close(orthogonalize(x).double(), wanted, rtol=0, atol=1e-5)


def test_a_direction_without_gradient_does_not_move():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))
    x = torch.zeros(3, 5)
    x[0, 0] = 1e-20
    u = orthogonalize(x)
    assert 0.68 < u[0, 0] < 1.2 and u.count_nonzero() == 1


def test_muon_steps_as_computed_by_hand():
    """Two steps of one long direction, 3 : 4; Nesterov's momentum leaves it as it is. A matrix with
    four outputs to an input steps twice as far. A bias steps by signs."""
    w, bias = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = Muon([w, bias], lr=0.2, weight_decay=0.5, momentum=0.5)
    unit = torch.tensor([[0.6], [0.0], [-0.8], [0.0]])
    length = orthogonalize(torch.ones(1, 1)).item()
    w.grad, bias.grad = 7 * unit, torch.tensor([5.0, -1e-3, 0.0])
    optimizer.step()
    first = 0.9 * torch.ones(4, 1) - 0.2 * 2 * length * unit
    torch.testing.assert_close(w.data, first)
    torch.testing.assert_close(bias.data, torch.tensor([0.99, 2.01, 3.0]))
    w.grad, bias.grad = torch.zeros(4, 1), torch.tensor([-2.0, 1e-3, 0.0])
    optimizer.step()  # v = 0.5 (7 u), direction 0.5 v; of the bias, v = 0.5, 0.0005: 0.5 v + g
    torch.testing.assert_close(w.data, 0.9 * first - 0.2 * 2 * length * unit)
    torch.testing.assert_close(bias.data, torch.tensor([1.0, 2.0, 3.0]))


def test_a_convolution_is_the_matrix_of_its_outputs():
    """In either memory layout: weights of channels_last flatten to another order, if by stride."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 3, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 5, 9, 9)
    for conv in (plain, last):
        optimizer = Muon(conv.parameters(), lr=0.1)
        conv(x).square().sum().backward()
        before = conv.weight.detach().clone()
        optimizer.step()
        step = (before - conv.weight.detach()).flatten(1) / 0.1
        s = torch.linalg.svdvals(step)
        assert 0.68 < s.min() and s.max() < 1.2
    torch.testing.assert_close(plain.weight, last.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_is_left_alone(name):
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = OPTIMIZERS[name]([used, unused], lr=0.1, weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(unused.data, torch.ones(2, 2)) and not torch.equal(used.data, unused.data)


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
