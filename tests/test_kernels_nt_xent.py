"""NT-Xent against a loop from the paper and the dense form in float64, in every implementation."""
import contextlib
import itertools
import math
import os
import socket

import pytest
import torch
import torch.nn.functional as F

from kernels import build, nt_xent, nt_xent_dense, reference

NO_GPU = build.obstacle("cuda") or "" if torch.cuda.is_available() else "no CUDA device is visible"
NO_CPU = build.obstacle("emulated") or ""
IMPLS = ["torch",
         pytest.param("emulated", marks=pytest.mark.skipif(bool(NO_CPU), reason=NO_CPU)),
         pytest.param("cuda", marks=pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU))]
KERNELS = IMPLS[1:]

# Every size is at, just under or just over a tile (64 rows, 16 features) or a tensor-core limit.
# The last are beyond every bound: several shards of unequal length, eight slabs of features.
SIZES = [(2, 3), (4, 1), (62, 15), (64, 16), (66, 17), (126, 64), (130, 123), (200, 128), (66, 129),
         (62, 256), (34, 300), (578, 20), (34, 2048)]
TEMPERATURES = [0.5, 0.1, 0.05, 0.01, 1e-3, 1e3]


def device(impl):
    return "cuda" if impl == "cuda" else "cpu"


def views(m, d, seed=0, noise=0.5):
    """Unit rows (m, d) in float64; rows i and i + m/2 are `noise` apart."""
    rng = torch.Generator().manual_seed(seed)
    one = torch.randn(m // 2, d, dtype=torch.float64, generator=rng)
    two = one + noise * torch.randn(m // 2, d, dtype=torch.float64, generator=rng)
    return F.normalize(torch.cat((one, two)))


def paper(z, temperature, decoupled=False):
    """Equation 1 and Algorithm 1 of Chen et al. 2020, summed by hand over pairs (i, j); decoupled:
    without j below the fraction's line, as in Yeh et al. 2022."""
    n, total = len(z) // 2, 0.
    sim = [[sum(a * b for a, b in zip(x, y)) for y in z.tolist()] for x in z.tolist()]
    for i in range(2 * n):
        j = i + n if i < n else i - n
        below = sum(math.exp(sim[i][k] / temperature) for k in range(2 * n)
                    if k != i and not (decoupled and k == j))
        total -= math.log(math.exp(sim[i][j] / temperature) / below)
    return total / (2 * n)


def dense_rows(z, temperature, decoupled=False):
    """The loss of each row, so that a test can weigh the rows."""
    sim = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    if not decoupled:
        return F.cross_entropy(sim, positive, reduction="none")
    at = positive[:, None]
    return sim.scatter(1, at, -torch.inf).logsumexp(1) - sim.gather(1, at)[:, 0]


def functions(impl):
    """Forward and backward with the arguments of the compiled op."""
    if impl == "torch":
        return reference.chunked_forward, reference.chunked_backward
    build.load(impl)
    return torch.ops.fgssl.nt_xent, torch.ops.fgssl.nt_xent_backward


def run(z, temperature, decoupled, impl, cotangent):
    """The mean loss, the log-sum-exp of each row, and the gradient of the rows' losses weighed by
    a cotangent (M,) of any kind: with the mean's alone, a row's wrong weight could hide."""
    forward, backward = functions(impl)
    z = z.detach()
    how = z, z, 0, temperature, decoupled
    loss, lse, *left = forward(*how, "")
    return loss, lse.sum(1), backward(*how, lse, cotangent.to(lse), *left)


def gradient(loss, z, cotangent):
    return torch.autograd.grad(loss, z, cotangent.to(loss))[0]


def error(ours, exact):
    """Relative Frobenius error; NaN stays NaN, and `not error <= limit` rejects it."""
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def check(name, ours, exact, theirs, cap):
    """Under the cap and, given theirs, at most twice the error of PyTorch at the same precision.

    PyTorch's own error may be 0 on small inputs, so four roundings of the type are allowed on top.
    """
    limit = cap
    if theirs is not None:
        limit = min(cap, 2 * error(theirs, exact) + 4 * torch.finfo(ours.dtype).eps)
    assert error(ours, exact) <= limit, (
        f"{name} is off by {error(ours, exact):.1e} of its size, {limit:.1e} is allowed. "
        "Compare it with nt_xent_dense in float64.")


# ---------------------------------------- the numbers

@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_loop_of_the_paper(impl):
    z = views(14, 5)
    for t, decoupled in ((0.5, False), (0.1, False), (0.5, True), (0.1, True)):
        ours = nt_xent(z.to(device(impl)), t, impl, decoupled=decoupled).item()
        wanted = paper(z, t, decoupled)
        assert math.isclose(ours, wanted, rel_tol=1e-12), (
            f"{impl} says {ours}, equation 1 says {wanted}; decoupled={decoupled}")


def test_the_dense_form_is_the_loop_of_the_paper():
    """The yardstick of all other tests here, measured itself."""
    z = views(14, 5)
    for rows, t, norm in ((z, 0.5, 1), (z, 0.1, 1), (2 * z, 0.5, 2)):
        ours, wanted = nt_xent_dense(rows, t).item(), paper(rows, t)
        # float64 sums of 14 terms: 1e-12 covers any order, and a sum of exp beside log_softmax
        assert math.isclose(ours, wanted, rel_tol=1e-12), (
            f"{ours:.6g} for 7 pairs of norm {norm} at t = {t}; equation 1 says {wanted:.6g}. "
            "Which columns are below the fraction's line, which is above it, over what is the mean?"
            " Rows are taken as they are, in float64 here.")
    equal = nt_xent_dense(torch.full((8, 4), 0.5), 1e-3).item()
    assert math.isclose(equal, math.log(7), rel_tol=1e-4), (    # the spacing of floats at 1000
        f"{equal} for equal rows, wanted ln 7: exp(1000) overflows where no maximum is subtracted")
    assert torch.autograd.gradcheck(
        lambda z: nt_xent_dense(z, 0.5), z.requires_grad_(), raise_exception=False), (
        "the gradient is not that of the loss: is every step from z to the loss in PyTorch?")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16],
                         ids=lambda kind: str(kind)[6:])
@pytest.mark.parametrize("size", range(len(SIZES)), ids=lambda i: "x".join(map(str, SIZES[i])))
@pytest.mark.parametrize("decoupled", [False, True], ids=["nt-xent", "decoupled"])
def test_loss_and_gradient_near_float64(impl, kind, size, decoupled):
    """A padded column that counts, a wrong row, a power-of-two stride, mixed logarithms show."""
    (m, d), t = SIZES[size], TEMPERATURES[size % len(TEMPERATURES)]
    m = max(m, 4) if decoupled else m
    noise = 2 if t > 0.01 else 30         # near views at a low temperature have no gradient left
    z = views(m, d, size, noise).to(device(impl), kind).requires_grad_()
    exact = z.detach().double().requires_grad_()
    plain = z.detach().clone().requires_grad_()
    cotangent = torch.randn(m, generator=torch.Generator().manual_seed(1)).to(z.device)
    wanted, theirs = dense_rows(exact, t, decoupled), dense_rows(plain, t, decoupled)
    loss, lse, grad = run(z, t, decoupled, impl, cotangent)
    positive = (exact * exact.roll(m // 2, 0)).sum(1).detach() / t
    of = positive.mean().item() if decoupled else 0  # that loss may be near 0: an error is of its terms
    # float32: sums of D products; below t = 0.02 the products' rounding is magnified by 1/t. On
    # tensor cores z has 16 bits, which is 4e-7 / t, and P, where 4 rows do not average 2^-17.
    # bfloat16: the gradient's own rounding is 1.7e-3 rms, that of P before the second product
    # 1.2e-3, together 2.1e-3, and up to 2^-7 where few rows do not average it. float16: an eighth.
    # The chunked form may sum in other orders: at t = 0.05 they differ by 2e-5.
    low = 0.05 if impl == "torch" else 0.02
    cap = {torch.float64: 1e-10, torch.float32: 1e-4 if t <= low else max(1.5e-5, 1e-6 / t),
           torch.float16: 1e-3, torch.bfloat16: 3e-3 if m > 8 else 1.5e-2}[kind]
    # The float64 form is itself the oracle; BLAS, which the chunked form uses, rounds s_ij and
    # s_ji differently; PyTorch has 24 bits where the tensor cores have 16. There the cap alone.
    tensor_cores = kind == torch.float32 and d <= 256 and t >= 0.02
    alone = kind == torch.float64 or impl == "torch" or tensor_cores
    check("the loss", loss + of, wanted.mean() + of,
          None if alone else theirs.mean() + of, cap)
    if impl != "torch":                   # whose two terms are others
        check("the log-sum-exp", lse, wanted + positive, None, cap)
    theirs = None if alone else gradient(theirs, plain, cotangent)
    check("the gradient", grad, gradient(wanted, exact, cotangent), theirs, cap)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_near_the_unrounded_input(impl):
    """1e-2: to round 128 coordinates moves a cosine by about 2e-3 / sqrt(128), divided by t."""
    z = views(130, 128).to(device(impl)).requires_grad_()
    wanted = nt_xent_dense(z, 0.1)
    low = z.detach().bfloat16().requires_grad_()
    ours = nt_xent(low, 0.1, impl)
    assert ours.dtype == torch.float32 and error(ours, wanted) <= 1e-2
    assert error(*torch.autograd.grad(ours, low), *torch.autograd.grad(wanted, z)) <= 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3), (66, 3)])
def test_gradient_is_that_of_the_returned_loss(impl, shape):
    """Finite differences of what is returned: a value wrong alone, or a gradient, disagrees."""
    z = torch.randn(shape, dtype=torch.float64, device=device(impl), requires_grad=True)
    for decoupled in {False, shape[0] > 2}:
        assert torch.autograd.gradcheck(lambda z: 1.7 * nt_xent(z, 0.5, impl, decoupled=decoupled),
                                        z, nondet_tol=0, fast_mode=shape[0] > 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_run(impl, monkeypatch):
    """Also in every order in which threads may run: nothing may depend on who comes first."""
    orders = ["forward", "reverse", "random:1", "random:2"] if impl == "emulated" else ["-"] * 9
    for kind, multiprocessors in ((torch.float32, "6"), (torch.bfloat16, "1")):
        monkeypatch.setenv("CUDA_ON_CPU_MULTIPROCESSORS", multiprocessors)   # many shards, or one
        z = views(130, 33).to(device(impl), kind).requires_grad_()
        first = nt_xent(z, 0.1, impl)
        grad, = torch.autograd.grad(first, z)
        for order in orders:
            monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
            again = nt_xent(z, 0.1, impl)
            assert torch.equal(again, first), f"another loss in order {order}"
            same = torch.equal(*torch.autograd.grad(again, z), grad)
            assert same, f"another gradient in order {order}"
        monkeypatch.delenv("CUDA_ON_CPU_ORDER")


# ---------------------------------------- inputs that break careless sums

SPECIAL = {
    "all rows equal": torch.ones(8, 4),
    "duplicated images": torch.cat((torch.eye(4), torch.eye(4)))[[0, 0, 1, 1, 4, 4, 5, 5]],
    "views opposite": torch.cat((torch.eye(4), -torch.eye(4))),
    "norms of 100": 100 * torch.eye(6, 5),
    "one large negative": torch.cat((torch.eye(3), torch.tensor([9., 1, 1]).diag())),
    "a zero row": torch.cat((torch.zeros(1, 4), torch.eye(4)[:3])),
    "all rows zero": torch.zeros(6, 3),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_inputs(impl, name):
    """A fixed maximum of 1/t underflows or overflows here; a running maximum does not."""
    for t, kind, decoupled in itertools.product((0.5, 0.01), (torch.float32, torch.bfloat16),
                                                (False, True)):
        z = SPECIAL[name].to(device(impl), kind).requires_grad_()
        exact = z.detach().double().requires_grad_()
        ours = nt_xent(z, t, impl, decoupled=decoupled)
        wanted = dense_rows(exact, t, decoupled).mean()
        got, grad = *torch.autograd.grad(ours, z), *torch.autograd.grad(wanted, exact)
        close = 1e-5 if kind == torch.float32 else 1e-2   # absolute: some gradients are 0
        assert torch.allclose(ours.double(), wanted, rtol=1e-5, atol=1e-5), (ours, wanted)
        assert torch.allclose(got.double(), grad, rtol=close, atol=close * max(1, 1 / t)), name
        if name == "all rows equal" and not decoupled:
            assert math.isclose(ours.item(), math.log(7), rel_tol=1e-6), "it is ln(M - 1)"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_passed_on(impl, bad):
    """A comparison or maximum that skips NaN would hide a broken network."""
    for kind in (torch.float32, torch.bfloat16):
        z = views(66, 8).to(device(impl), kind)
        z[3, 2] = bad
        z.requires_grad_()
        ours, theirs = nt_xent(z, 0.5, impl), nt_xent_dense(z, 0.5)
        assert ours.isnan() == theirs.isnan() and ours.isinf() == theirs.isinf(), (ours, theirs)
        got, grad = *torch.autograd.grad(ours, z), *torch.autograd.grad(theirs, z)
        assert torch.equal(got.isnan().any(1), grad.isnan().any(1)), "other rows than PyTorch's"


@pytest.mark.parametrize("impl", IMPLS)
def test_one_pair_has_nothing_to_contrast(impl):
    for kind in (torch.float32, torch.bfloat16):
        z = views(2, 7).to(device(impl), kind).requires_grad_()
        loss = nt_xent(z, 0.1, impl)
        assert loss.item() == 0 and not torch.autograd.grad(loss, z)[0].any()
        with pytest.raises(ValueError, match="no negatives"):
            nt_xent(z, 0.1, impl, decoupled=True)


# ---------------------------------------- layouts, modes, errors

@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layouts(impl, kind):
    """Transposed, strided, expanded, and at odd addresses within NaN: a read past the end shows."""
    m, d = 66, 24
    z = views(m, d).to(device(impl), kind)
    layouts = {"transposed": z.T.contiguous().T, "strided": z.repeat_interleave(2, 1)[:, ::2],
               "expanded": z[:1].expand(m, d)}
    for shift in (1, 3, 8):
        room = torch.full((m * d + 16,), math.nan, dtype=kind, device=z.device)
        layouts[f"shifted by {shift}"] = room[shift:shift + m * d].view(m, d).copy_(z)
    for name, x in layouts.items():
        plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        x = x.detach().requires_grad_()
        a, b = nt_xent(x, 0.2, impl), nt_xent(plain, 0.2, impl)
        assert torch.allclose(a, b), f"another loss where z is {name}"
        got, wanted = *torch.autograd.grad(a, x), *torch.autograd.grad(b, plain)
        assert torch.allclose(got, wanted, atol=1e-6), f"another gradient where z is {name}"


@pytest.mark.parametrize("impl", IMPLS)
def test_modes(impl):
    """Autocast must not lower the loss's precision; inference mode and no_grad must just work."""
    z = views(66, 32).to(device(impl), torch.float32).requires_grad_()
    plain = nt_xent(z, 0.1, impl)
    grad, = torch.autograd.grad(plain, z)
    with torch.autocast(device(impl), torch.bfloat16):
        loss = nt_xent(z, 0.1, impl)
        assert torch.equal(loss, plain) and torch.equal(*torch.autograd.grad(loss, z), grad)
    with torch.no_grad():
        assert torch.equal(nt_xent(z, 0.1, impl), plain)
    with torch.inference_mode():
        assert torch.equal(nt_xent(z.detach().clone(), 0.1, impl), plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_invariants(impl):
    """Exchange the views; permute the pairs; z times c with t times c squared: the same loss."""
    z = views(34, 9).to(device(impl))
    loss = nt_xent(z, 0.3, impl)
    order = torch.randperm(17)
    permuted = torch.cat((z[:17][order], z[17:][order]))
    for same, t in ((z.roll(17, 0), 0.3), (permuted, 0.3), (z * 3, 2.7)):
        assert torch.allclose(nt_xent(same, t, impl), loss, rtol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input(impl):
    z = views(4, 3).to(device(impl))
    for bad in (z[:3], z[:0], z[0], z[None], z[:, :0]):
        with pytest.raises(ValueError, match="wanted"):
            nt_xent(bad, 0.5, impl)
    for t in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            nt_xent(z, t, impl)
    for kind in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="wanted"):
            nt_xent(z.to(kind), 0.5, impl)
    with pytest.raises(ValueError, match="wanted auto, cuda, torch or emulated"):
        nt_xent(z, 0.5, "fast")
    with pytest.raises(ValueError, match="got a tensor on"):
        nt_xent(z, 0.5, "emulated" if z.is_cuda else "cuda")


@pytest.mark.parametrize("impl", KERNELS)
def test_op_refuses_mixed_tensors(impl):
    build.load(impl)
    op, back = torch.ops.fgssl.nt_xent, torch.ops.fgssl.nt_xent_backward
    z, wide = views(4, 3).float().to(device(impl)), torch.zeros(4, device=device(impl))
    for columns, first, message in ((z.double(), 0, "wanted Float"), (z, 1, "are not among"),
                                    (z[:, :2], 0, "has shape"), (z, -1, "are not among")):
        with pytest.raises(RuntimeError, match=message):
            op(z, columns, first, 0.5, True, "")
    loss, lse, *left = op(z, z, 0, 0.5, True, "")
    with pytest.raises(RuntimeError, match="lse has shape"):
        back(z, z, 0, 0.5, True, lse[:3], wide, *left)
    with pytest.raises(RuntimeError, match="grad has shape"):
        back(z, z, 0, 0.5, True, lse, wide[:3], *left)
    for parts, tickets, message in ((left[0][:, :2], left[1], "parts has shape"),
                                    (left[0].float(), left[1], "parts is Float"),
                                    (left[0], left[1][:1], "tickets has shape")):
        with pytest.raises(RuntimeError, match=message):     # they were read past their end
            back(z, z, 0, 0.5, True, lse, wide, parts, tickets)
    with pytest.raises(RuntimeError, match="temperature"):
        op(z, z, 0, -1., True, "")


# ---------------------------------------- as an op of PyTorch, over ranks, in memory

@pytest.mark.parametrize("impl", KERNELS)
def test_op_is_well_registered(impl):
    build.load(impl)
    z = views(6, 5).float().to(device(impl)).requires_grad_()
    torch.library.opcheck(torch.ops.fgssl.nt_xent.default, (z, z.detach(), 0, 0.5, True, ""))
    _, *left = torch.ops.fgssl.nt_xent(z.detach(), z.detach(), 0, 0.5, True, "")
    left.insert(1, torch.rand(6, device=device(impl)))
    torch.library.opcheck(torch.ops.fgssl.nt_xent_backward.default,
                          (z.detach(), z.detach(), 0, 0.5, True, *left))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_raises(impl):
    """It was wrong by half its size in silence."""
    z = views(6, 5).to(device(impl)).requires_grad_()
    grad, = torch.autograd.grad(nt_xent(z, 0.5, impl), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.square().sum(), z)


@pytest.mark.parametrize("impl", KERNELS)
def test_backward_twice_over_one_graph(impl):
    """The counters of blocks that share rows must be left as they were found."""
    z = views(130, 16).float().to(device(impl)).requires_grad_()
    loss = nt_xent(z, 0.2, impl)
    first, again = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("impl", IMPLS)
def test_under_torch_compile(impl):
    z = views(6, 5).float().to(device(impl)).requires_grad_()
    plain = nt_xent(z, 0.5, impl, decoupled=True)
    compiled = torch.compile(nt_xent, fullgraph=True, backend="aot_eager")
    compiled = compiled(z, 0.5, impl, decoupled=True)
    assert torch.allclose(compiled, plain)
    assert torch.allclose(*torch.autograd.grad(compiled, z), *torch.autograd.grad(plain, z))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["nt-xent", "decoupled"])
def test_rows_of_one_rank_against_columns_of_all(impl, kind, decoupled):
    """Three ranks of 22 rows: positive and diagonal follow from a row's place among all columns."""
    ranks, n, d, t = 3, 11, 20, 0.3
    z = views(2 * n * ranks, d).to(device(impl), kind)
    pair = z.view(2, ranks, n, d).transpose(0, 1)                     # (rank, view, n, d)
    columns = pair.reshape(-1, d)
    exact = z.double().requires_grad_()
    weights = torch.randn(2 * n * ranks, generator=torch.Generator().manual_seed(2)).to(z.device)
    wanted = dense_rows(exact, t, decoupled)
    grad = gradient(wanted, exact, weights.view(ranks, 2, n).transpose(0, 1).reshape(-1))
    grad = grad.view(2, ranks, n, d).transpose(0, 1).reshape(-1, d)
    wanted = wanted.view(2, ranks, n).transpose(0, 1).reshape(-1)

    forward, backward = functions(impl)
    parts = [(columns[i:i + 2 * n], columns, i, t, decoupled)
             for i in range(0, len(columns), 2 * n)]
    loss, lse, *left = zip(*(forward(*part, "") for part in parts))
    lse = torch.cat(lse)
    limit = 1e-12 if kind == torch.float64 else 3e-3
    assert error(torch.stack(loss), wanted.view(ranks, -1).mean(1)) <= limit
    ours = torch.cat([backward(*part, lse, weights.to(lse), *(of[rank] for of in left))
                      for rank, part in enumerate(parts)])
    assert error(ours, grad) <= limit, (
        "row i of these is row first + i of all: its diagonal, positive and statistics are there")
    each = torch.tensor([0.5, -1., 2.], device=z.device)      # one cotangent for each rank's mean
    by_rank = torch.cat([backward(*part, lse, each.to(lse), *(of[rank] for of in left))
                         for rank, part in enumerate(parts)])
    by_row = torch.cat([backward(*part, lse, each.to(lse).repeat_interleave(2 * n) / (2 * n),
                                 *(of[rank] for of in left)) for rank, part in enumerate(parts)])
    assert error(by_rank, by_row.double()) <= limit, "g_j = grad[j // (M/G)] / (M/G)"


def rank_of_two(rank, port, impl, report):
    """One of two processes: its rows, then both of its losses and their gradients, which DDP would
    average."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    z, found = views(20, 6).view(2, 2, 5, 6)[:, rank].reshape(10, 6).requires_grad_(), []
    for decoupled in (False, True):
        loss = nt_xent(z, 0.3, impl, torch.distributed.group.WORLD, decoupled)
        weight = torch.tensor(rank + 1., dtype=z.dtype)      # each rank's loss has one
        found.append((loss.item(), torch.autograd.grad(loss, z, weight)[0].tolist()))
    report.put((rank, found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_two_ranks_equal_one_process(impl):
    """A gather that cuts the gradient, or scales it by 1/W, fails here."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if impl == "emulated":
        build.load(impl)                                              # build once, before both ask
    context = torch.multiprocessing.get_context("spawn")
    report = context.SimpleQueue()
    torch.multiprocessing.spawn(rank_of_two, (port, impl, report), nprocs=2)
    ranks = [found for _, found in sorted(report.get() for _ in range(2))]
    z = views(20, 6).requires_grad_()
    for decoupled, parts in zip((False, True), zip(*ranks)):
        losses = dense_rows(z, 0.3, decoupled).view(2, 2, 5).mean((0, 2))    # of each rank
        wanted, = torch.autograd.grad(losses[0] + 2 * losses[1], z)
        grad = torch.tensor([part[1] for part in parts], dtype=torch.float64).view(2, 2, 5, 6)
        for part, loss in zip(parts, losses):
            assert math.isclose(part[0], loss.item(), rel_tol=1e-12), "the mean of this rank's rows"
        assert error(grad.transpose(0, 1).reshape(20, 6), wanted) <= 1e-12, (
            "the ranks' gradients are not those of loss 0 + 2 * loss 1. Whose cotangent and whose "
            "log-sums belong to a term in which your row is another rank's column?")


def test_chunked_form_keeps_no_square_matrix():
    """The dense form keeps several (2N, 2N) matrices; this one must stay linear in N."""
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return result

    z = views(5000, 8).float().requires_grad_()
    with Largest() as seen:
        nt_xent(z, 0.1, "torch").backward()
    assert 5000 * 8 <= seen.elements <= 2**24, f"{seen.elements} elements in one tensor"


def test_cuda_tensors_use_the_current_stream():
    """A launch on the default stream would run before the work it depends on."""
    if NO_GPU:
        pytest.skip(NO_GPU)
    z = views(1000, 64).float().cuda()
    wanted, side = nt_xent(z, 0.1, "cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros_like(z)
        torch.cuda._sleep(10**8)
        late.copy_(z)
        loss = nt_xent(late, 0.1, "cuda")
    side.synchronize()
    assert torch.equal(loss, wanted)
