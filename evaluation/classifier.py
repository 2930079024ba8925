"""A classifier: an encoder read at a layer, and a linear head. Its file, and what it predicts."""

import shlex
import sys
from argparse import Namespace

import torch
from torch import nn

import fgssl
from evaluation.probe import Inference, Layers, extract_features


class Classifier(nn.Module):
    """An encoder read at a layer, and a head: (B, 3, H, W), normalised -> scores (B, classes)."""

    def __init__(self, encoder, head, layer):
        super().__init__()
        self.layers, self.head = Layers(encoder, (layer,)), head

    def forward(self, x):
        return self.head(self.layers(x))


def predict_scores(model, images, inference, what):
    """A Classifier's scores of uint8 images: (N, classes), float32, on the CPU."""
    return extract_features(model, images, inference, what)


def save_classifier(file, model, args, names):
    """A checkpoint like the trainers', with a head, the layer it reads and its classes' names."""
    args = Namespace(**{**vars(args), "layer": model.layers.names[0], "class_names": list(names)})
    fgssl.save(file, 0, args, torch.Generator(), encoder=model.layers.encoder, head=model.head)


def load_classifier(file):
    """The Classifier in a probe.pt or finetuned.pt, and the arguments of its run."""
    checkpoint = fgssl.read_checkpoint(file)
    if "class_names" not in checkpoint.get("args", {}):
        raise fgssl.UserError(f"{file} holds no classifier. Run python linear_eval.py "
                              f"{shlex.quote(str(file))}, then predict with the probe.pt that it "
                              "writes.")
    (encoder, run), state = fgssl.load_encoder(file), checkpoint["head"]
    model = Classifier(encoder, nn.Linear(*reversed(state["weight"].shape)), run["layer"])
    fgssl.load_weights(model.head, state, f"head in {file}")
    return model, run


def predict(file, images, precision):
    """Print the five most probable classes of each image, by the classifier in `file`.

    An image that cannot be read is named on stderr, and the others done; then the exit status is 1.
    """
    (model, run), failed = load_classifier(file), False
    inference = Inference(run["size"], *fgssl.device_and_precision(precision))
    model.to(inference.device, memory_format=torch.channels_last)
    for image in images:
        try:
            x = fgssl.decode(image, fgssl.cache_side(run["size"]))[None].copy()
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        probability = predict_scores(model, x, inference, image).softmax(1)[0]
        print(image)
        for label in probability.argsort(descending=True)[:5]:
            print(f"  {100 * probability[label]:5.1f} %  {run['class_names'][label]}")
    if failed:
        raise SystemExit(1)
