"""How good are the features? A linear classifier and k nearest neighbours, on a frozen encoder.

The encoder stays as pretraining left it. Its features h of the labelled images train a logistic
regression ("linear") and serve as neighbours ("k-NN"). How strongly to regularise, and how many
neighbours to ask, is chosen on val; test is looked at once, at the end. Beside the result stand
the controls without which it means nothing: the majority class, and the same network untrained.

    python linear_eval.py out/simclr/checkpoint.pt
    python linear_eval.py out/jigsaw/checkpoint.pt --layer best      # earlier stages too
    python linear_eval.py out/srgan/checkpoint.pt --layer best --encoder generator
    python linear_eval.py --init random --arch resnet18 --data my_photos
    python linear_eval.py resnet50.pth --arch resnet50 --size 224 --data cub  # torchvision weights

What is not given (data, size, seed) is as in the run that made the checkpoint. Prints one table;
writes eval.json and confusion.png beside the checkpoint, or into --out.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fgssl
import train_srgan

L2 = tuple(10.0 ** (k / 2) for k in range(0, -11, -1))  # regularisation tried, from strong to weak
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
LAYERS = ("4", "4:2x2", "3", "3:2x2", "2", "2:2x2", "1", "1:2x2")


class Layers(nn.Module):
    """A frozen encoder read at several layers: (B, 3, H, W) -> their features side by side.

    Layer "3" is the map of the third stage, averaged over all places; "3:2x2" its averages over the
    four quarters of the image, one after the other. "4" is h, what the encoder itself returns.
    """

    def __init__(self, encoder, names):
        super().__init__()
        self.encoder, self.names, self.dims = encoder, names, []
        self.eval()

    def forward(self, x):
        maps = self.encoder.stages(x)
        h = [F.adaptive_avg_pool2d(maps[int(name[0]) - 1].float(), 2 if ":" in name else 1)
             .flatten(1) for name in self.names]
        self.dims = [each.shape[1] for each in h]
        return torch.cat(h, 1)

    def read(self, images, *how):
        """{layer: features (N, d)} of uint8 images; `how` as for fgssl.features."""
        h = fgssl.features(self, images, *how)
        return dict(zip(self.names, h.split(self.dims, 1)))


def fit_linear(h, labels, classes, l2, weight=None):
    """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + l2 / 2 |W|^2.

    h (N, D), labels (N,) -> weight (D + 1, classes); its last row is the bias, not penalised.
    weight: where to start, such as the solution for another l2. The problem is convex: the start
    changes the time it takes, not the result.
    """
    h = F.pad(h, (0, 1), value=1.0)
    weight = torch.zeros(h.shape[1], classes) if weight is None else weight.clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight, labels) + l2 / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def predict_linear(h, weight):
    """(N, D) -> the most probable class of each, (N,)."""
    return (h @ weight[:-1] + weight[-1]).argmax(1)


def choose_linear(h, labels, h_val, labels_val, classes):
    """Fit for every strength in L2, each from the last: (accuracy on val, weight, l2) of the best.

    Where two do equally well, the more strongly regularised.
    """
    best, weight = (-1.0,), None
    for l2 in L2:
        weight = fit_linear(h, labels, classes, l2, weight)
        score = fgssl.accuracy(predict_linear(h_val, weight), labels_val)
        if score > best[0]:
            best = score, weight, l2
    return best


def choose_neighbours(h, labels, h_val, labels_val, classes):
    """(accuracy on val, k) of the best k in NEIGHBOURS, of those that the training set has."""
    scores = {k: fgssl.accuracy(fgssl.knn(h, labels, h_val, k, classes), labels_val)
              for k in NEIGHBOURS if k <= len(h)}
    k = max(scores, key=scores.get)
    return scores[k], k


def confusion_matrix(labels, predicted, classes):
    """Counts (classes, classes): row = the true class, column = what it was taken for."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes ** 2)
    return pairs.reshape(classes, classes)


def per_class(confusion):
    """Recall and F1 of each class, in percent; NaN for a class without images, not 0."""
    right, true, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        recall, f1 = right / true, 2 * right / (true + said)
    return 100 * recall, 100 * np.where(true > 0, f1, np.nan)


def standardised(train, *others):
    """Every feature less its mean over train, and over its deviation there: the scale of L2."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    return [(h - mean) / std for h in (train, *others)]


def evaluate(encoder, splits, size, classes, device, autocast, layer="4"):
    """Probe one frozen encoder: choices on val, then test, once and whole.

    splits: train, val and test. layer: one of LAYERS, or "best": the linear classifier and k-NN
    each read the layer that does best on val. Returns percentages and choices, and the linear
    predictions.
    """
    encoder.to(device, memory_format=torch.channels_last)
    layers = Layers(encoder, LAYERS if layer == "best" else (layer,))
    h, h_val, h_test = (layers.read(s.images, size, device, autocast) for s in splits)
    labels, labels_val, labels_test = (torch.from_numpy(s.labels) for s in splits)
    neighbours, linear = (-1.0,), (-1.0,)
    for name in layers.names:                                # of equals, the last layer
        score, k = choose_neighbours(h[name], labels, h_val[name], labels_val, classes)
        if score > neighbours[0]:
            neighbours = score, name, k
        x, x_val = standardised(h[name], h_val[name])
        score, weight, l2 = choose_linear(x, labels, x_val, labels_val, classes)
        if score > linear[0]:
            linear = score, name, weight, l2
    val_knn, knn_layer, k = neighbours
    val_linear, linear_layer, weight, l2 = linear

    knn = fgssl.knn(h[knn_layer], labels, h_test[knn_layer], k, classes)
    _, x_test = standardised(h[linear_layer], h_test[linear_layer])
    predicted = predict_linear(x_test, weight)
    recall, f1 = per_class(confusion_matrix(labels_test.numpy(), predicted.numpy(), classes))
    return {"linear": fgssl.accuracy(predicted, labels_test),
            "knn": fgssl.accuracy(knn, labels_test), "mean_per_class": float(np.nanmean(recall)),
            "macro_f1": float(np.nanmean(f1)), "val_linear": val_linear, "val_knn": val_knn,
            "linear_layer": linear_layer, "l2": l2, "knn_layer": knn_layer, "k": k}, predicted


def labelled_splits(data, size):
    """The train, val and test Splits of a set. Raises ValueError where they cannot be used."""
    splits = [data.cached(split, fgssl.cache_side(size)) for split in ("train", "val", "test")]
    for name, split in zip(("train", "val", "test"), splits):
        if not len(split.labels):
            raise ValueError(f"{data.name} has no {name} images. Evaluation needs class folders; "
                             'see README, "Your own images".')
        if (split.labels < 0).any():
            raise ValueError(f"{data.name} has {(split.labels < 0).sum()} {name} images without "
                             "labels. Evaluation needs them: put images into one folder a class.")
    if len(data.classes) < 2:
        raise ValueError(f"{data.name} has one class only, {data.classes[0]}: nothing to tell.")
    return splits


def arguments(argv):
    p = fgssl.parser(__doc__, training=False)
    p.add_argument("checkpoint", nargs="?", help="of a trainer, or a torchvision state dict")
    p.add_argument("--init", choices=("random",), help="evaluate an untrained encoder alone")
    p.add_argument("--encoder", choices=("discriminator", "generator"), default="discriminator",
                   help="which network of a run of train_srgan.py")
    p.add_argument("--layer", choices=(*LAYERS, "best"), default="4",
                   help="stage whose features are read, averaged over the image or its quarters; "
                        "best: chosen on val, for each encoder and classifier")
    args = p.parse_args(argv)
    if (args.checkpoint is None) == (args.init is None):
        p.error("name a checkpoint, e.g. out/simclr/checkpoint.pt, or pass --init random")
    if args.init and args.encoder == "generator":
        p.error("--encoder generator wants a checkpoint; the untrained one is shown beside it")
    return args


def load_network(file, arch, which):
    """The encoder of a checkpoint, a function that makes the same untrained, the run's arguments.

    which: of SRGAN's two networks. Only the paper's discriminator and a generator are no ResNets.
    """
    run = fgssl.read_checkpoint(file).get("args", {})
    if which == "generator" or run.get("discriminator") == "vgg":
        return train_srgan.load_network(file, which)
    encoder, run = fgssl.load_encoder(file, arch)
    return encoder, lambda: fgssl.resnet(run.get("arch", arch)), run


def main(argv=None):
    args = arguments(argv)
    encoder, untrained, run = None, lambda: fgssl.resnet(args.arch), {}
    if args.checkpoint:
        encoder, untrained, run = load_network(args.checkpoint, args.arch, args.encoder)
    defaults = dict(data="toy", root=None, size=64, arch="resnet10", seed=0)
    for name, default in defaults.items():
        if getattr(args, name) is None:  # what is not asked for is as in the run
            setattr(args, name, run.get(name, default))
    out = Path(args.out or (Path(args.checkpoint).parent if args.checkpoint else "out/random"))
    out.mkdir(parents=True, exist_ok=True)
    device, autocast = fgssl.device_and_precision(args.precision)
    data = fgssl.load_data(args.data, args.root, args.skip_bad, args.workers)
    splits = labelled_splits(data, args.size)
    classes = len(data.classes)

    counts = np.bincount(splits[0].labels, minlength=classes)
    test = splits[2].labels
    result = {"data": data.name, "classes": classes, "size": args.size, "arch": args.arch,
              "seed": args.seed, "layer": args.layer,
              "n": {name: len(s.labels) for name, s in zip(("train", "val", "test"), splits)},
              "chance": 100 / classes, "majority": 100 * float((test == counts.argmax()).mean()),
              "argv": sys.argv, "commit": fgssl.commit()}
    print(f"{data.name}, {classes} classes, {args.size} px, {args.arch}: "
          f"{' / '.join(map(str, result['n'].values()))} images to train / choose / test")

    torch.manual_seed(args.seed)
    how = (splits, args.size, classes, device, autocast, args.layer)
    result["random_init"], predicted = evaluate(untrained(), *how)
    rows = {"chance": dict.fromkeys(("linear", "knn"), result["chance"]),
            "majority class": dict.fromkeys(("linear", "knn"), result["majority"]),
            "random init": result["random_init"]}
    if encoder is not None:
        result["encoder"], predicted = evaluate(encoder, *how)
        rows[args.checkpoint] = result["encoder"]

    width = max(map(len, rows))
    print(f"\n{'test accuracy, %':{width}}  linear    k-NN")
    for name, row in rows.items():
        layers = ""
        if args.layer == "best" and "l2" in row:
            layers = f"   layers {row['linear_layer']} and {row['knn_layer']}"
        print(f"{name:{width}}  {row['linear']:6.1f}  {row['knn']:6.1f}{layers}")
    confusion = confusion_matrix(test, predicted.numpy(), classes)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    which = "_generator" if args.encoder == "generator" else ""
    fgssl.heatmap(out / f"confusion{which}.png", share, "true class", "taken for", data.classes)
    (out / f"eval{which}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out}/eval{which}.json and confusion{which}.png")


if __name__ == "__main__":
    main()
