"""BYOL: predict, from one view of an image, what a slow copy of the network makes of another.

The online network (encoder, projector, predictor) learns; the target network (encoder, projector)
is an exponential moving average of it and gets no gradient. There are no negatives: the predictor
and the moving average keep the features from collapsing to a constant.

Grill et al., Bootstrap Your Own Latent, NeurIPS 2020.

    cp docs/examples/train_byol.py . && python train_byol.py --data my_photos

Writes out/byol/: checkpoint.pt, log.jsonl, curves.png.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import fgssl
from methods.optimizers import Muon


def random_view(x, args, rng):
    """One distorted view of every image: uint8 (B, 3, C, C) -> (B, 3, size, size) in [0, 1]."""
    x = fgssl.random_resized_crop(x, args.size, rng, scale=(args.min_crop, 1.0))
    return fgssl.recolor(fgssl.hflip(x, rng), args, rng)


def mlp(dim, hidden, out):
    """Projector and predictor: linear, batch-norm, ReLU, linear."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden),
                         nn.ReLU(inplace=True), nn.Linear(hidden, out))


def byol_loss(p, z):
    """The paper's equation 2: mean squared distance of L2-normalised p and z (2N, D), 0 to 4.

    Row i of p predicts the target's embedding of the other view of its image, row i + N or i - N.
    """
    z = z.detach().roll(len(z) // 2, 0)
    return (2 - 2 * F.cosine_similarity(p.float(), z.float())).mean()


@torch.no_grad()
def update_target(target, online, momentum):
    for old, new in zip(target.parameters(), online.parameters()):
        old.lerp_(new, 1 - momentum)


def main(argv=None):
    args = arguments(argv)
    run = fgssl.Run(args, views=2)
    encoder = fgssl.ENCODERS[args.arch]().to(run.device, memory_format=torch.channels_last)
    projector = mlp(encoder.dim, args.hidden, 128).to(run.device)
    predictor = mlp(128, args.hidden, 128).to(run.device)
    online = nn.Sequential(encoder, projector)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = Muon([*online.parameters(), *predictor.parameters()], args.lr, weight_decay=1e-4)
    embed, predict = run.wrap(online, predictor)
    run.start(encoder=encoder, head=projector, predictor=predictor, target=target,
              optimizer=optimizer)
    if run.step == 0:                                        # the encoder may have --init's weights
        target.load_state_dict(online.state_dict())

    for step, x in run:                                      # x: uint8 (N, 3, C, C)
        lr = fgssl.cosine_lr(step, run.total, run.total // 20, args.lr)
        fgssl.set_lr(optimizer, lr)
        x = fgssl.map_chunks(random_view, x.repeat(2, 1, 1, 1), args, run.rng)
        with run.autocast:
            x = fgssl.normalize(x)
            p, z = predict(embed(x)), target(x)              # (2N, 128)
        loss = byol_loss(p, z)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress = (1 + math.cos(math.pi * step / run.total)) / 2        # from 1 to 0
        update_target(target, online, 1 - (1 - args.momentum) * progress)
        if run.due():
            spread = F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5
            run.log(loss=loss, chance=2.0, lr=lr, spread=spread)  # a spread of 0 is collapse
        if run.evaluates():
            run.note(**run.knn())
    run.finish(loss="chance", knn="random_init")


def arguments(argv):
    p = fgssl.parser(__doc__, data="toy", out="out/byol", size=64, arch="resnet10", epochs=80,
                     batch=64, lr=0.04, seed=0)
    p.add_argument("--momentum", type=fgssl.number(float, 0, 1), default=0.99,
                   help="of the target's moving average at the start; it rises to 1")
    p.add_argument("--hidden", type=fgssl.number(int, 1), default=256,
                   help="width of the hidden layers of projector and predictor")
    p.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.4,
                   help="smallest fraction of the image's area that a view shows")
    p.add_argument("--color", type=fgssl.number(float, 0, 1.25), default=0.5,
                   help="strength of colour jitter")
    p.add_argument("--gray", type=fgssl.number(float, 0, 1), default=0.2,
                   help="probability of a grey view")
    return fgssl.parse(p, argv)


if __name__ == "__main__":
    fgssl.launch(main)
