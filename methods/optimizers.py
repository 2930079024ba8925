"""Optimizers that PyTorch lacks: Muon, the default here, and LARS, for batches of thousands."""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are as long in every direction that a layer's weights have.

    A layer's weights are a matrix W (outputs, inputs); a convolution's inputs are those of all its
    taps. A gradient has a few long directions and many short ones, from which Adam's rate for each
    number does not help. Muon (Jordan et al. 2024) makes all singular values of the step about 1:
        v = momentum v + g;  W = (1 - lr decay) W - lr sqrt(max(1, outputs / inputs)) U,
        U = orthogonalize(g + momentum v).
    That is steepest descent where the length of a step is its greatest singular value (Bernstein &
    Newhouse 2024). The weights of a batch-norm are a diagonal matrix; the same rule gives the signs
    of g + momentum v. Parameters of one dimension step by these, at lr / 20, and do not decay.
    (Jordan et al. have Adam for them.)
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                v = momentum_of(self.state[w], w)
                v.mul_(momentum).add_(w.grad)
                direction = w.grad + momentum * v
                if w.dim() > 1:
                    scale = max(1, w.shape[0] / w[0].numel()) ** 0.5
                    u = orthogonalize(direction.flatten(1)).view(w.shape)
                    w.mul_(1 - lr * group["weight_decay"]).sub_(u, alpha=lr * scale)
                else:
                    w.sub_(direction.sign(), alpha=lr / 20)


def momentum_of(state, w):
    """The momentum of the weights w, zeros before their first step."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(w)
    return state["momentum"]


def orthogonalize(x, steps=5):
    """x = A S B^T, by its singular values S, (n, k) -> about A B^T: values of 0.68 to 1.2.

    Newton-Schulz iteration: a matrix polynomial brings each singular value s to
    3.4445 s - 4.7750 s^3 + 2.0315 s^5, which grows small ones quickly and keeps great ones about 1
    (Jordan et al. 2024); after 5 steps those above a thousandth of |x| have arrived, and 0 stays 0.
    Every iterate is Q x with a symmetric Q, a polynomial in x x^T: only Q, of the shorter side, is
    iterated, which is a third of the work, and float32 takes the place of bfloat16.
    """
    def polynomial(gram):
        p = 2.0315 * (gram @ gram) - 4.7750 * gram
        p.diagonal().add_(3.4445)
        return p

    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.mT, steps).mT
    x = x / x.norm().clamp(min=1e-30)
    gram = x @ x.mT
    q = p = polynomial(gram)
    for _ in range(steps - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        q = p @ q
    return q @ x


class LARS(torch.optim.Optimizer):
    """SGD with momentum that moves each layer by a fraction of the norm of its weights.

    You, Gitman & Ginsburg 2017, Algorithm 1, for weights w with gradient g:
        ratio = trust |w| / (|g| + decay |w|);  v = momentum v + lr ratio (g + decay w);  w = w - v
    As in SimCLR's code, biases and batch-norm (parameters of one dimension) have neither ratio nor
    decay, and the ratio of weights that are all zero is 1.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.9, trust=1e-3):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                          trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g, lr, decay = w.grad, group["lr"], group["weight_decay"]
                if w.dim() > 1:
                    norm = w.norm()
                    ratio = group["trust"] * norm / (g.norm() + decay * norm).clamp(min=1e-30)
                    lr = lr * torch.where(norm > 0, ratio, 1.0)
                    g = g + decay * w
                v = momentum_of(self.state[w], w)
                w.sub_(v.mul_(group["momentum"]).add_(lr * g))


OPTIMIZERS = {"muon": Muon, "adamw": torch.optim.AdamW, "lars": LARS}  # of --optimizer
