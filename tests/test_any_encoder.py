"""linear_eval.py on an encoder that is no ResNet and has three stages: all that it does."""

import json

import pytest
import torch
from PIL import Image
from tiny_vit import TinyViT

import fgssl
import linear_eval
from evaluation import classifier, finetune, probe

PLAIN = ["--size", "24", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(fgssl.ENCODERS, "tiny-vit", TinyViT)


@pytest.fixture
def checkpoint(shades, tmp_path):
    """A tiny ViT in a trainer's file."""
    torch.manual_seed(7)
    args = dict(data=str(shades), root=None, size=24, arch="tiny-vit", seed=0)
    torch.save({"encoder": TinyViT().state_dict(), "args": args, "step": 1},
               tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def evaluate(checkpoint, *flags):
    linear_eval.main([str(checkpoint), "--precision", "fp32", *flags])
    return json.loads((checkpoint.parent / "eval.json").read_text())


def test_the_last_stage_is_read_by_default(checkpoint):
    result = evaluate(checkpoint)
    assert result["layer"] == result["encoder"]["linear_layer"] == "3"
    assert result["arch"] == "tiny-vit" and result["encoder"]["linear"] > 50, "chance is 33"
    assert fgssl.read_checkpoint(checkpoint.parent / "probe.pt")["args"]["layer"] == "3"


def test_all_layers_are_tried_and_the_file_predicts(shades, checkpoint, capsys):
    result = evaluate(checkpoint, "--layer", "best")
    assert result["encoder"]["linear_layer"] in probe.layer_names(3)
    model, run = classifier.load_classifier(checkpoint.parent / "probe.pt")
    test = fgssl.load_data(shades).cached("test", fgssl.cache_side(24))
    inference = probe.Inference(run["size"], *fgssl.device_and_precision("fp32"))
    predicted = classifier.predict_scores(model, test.images, inference, "test").argmax(1)
    labels = torch.from_numpy(test.labels)
    assert fgssl.accuracy(predicted, labels) == result["encoder"]["linear"]
    capsys.readouterr()
    photo = str(shades / "test" / "oak" / "0.png")
    linear_eval.main([str(checkpoint.parent / "probe.pt"), "--predict", photo])
    assert len(capsys.readouterr().out.splitlines()) == 4, "the file and three classes"
    Image.open(checkpoint.parent / "gradcam.png").verify()


def test_one_stage_is_fine_tuned_and_the_rest_stays_to_the_bit(checkpoint):
    result = evaluate(checkpoint, "--finetune", "--stages", "1", "--layer-decay", "0.5",
                      "--steps", "6", "--batch", "8")
    assert result["few_labels"][1]["recipe"]["stages"] == 1
    before, after = (torch.load(checkpoint.parent / name, weights_only=True)["encoder"]
                     for name in ("checkpoint.pt", "finetuned.pt"))
    for name in before:
        learns = name.startswith(("blocks.2.", "norm."))     # LayerNorm("norm") is of the last map
        assert torch.equal(before[name], after[name]) != learns, name
    model, _ = classifier.load_classifier(checkpoint.parent / "finetuned.pt")
    assert isinstance(model.layers.encoder, TinyViT)


def test_rates_decay_by_stage():
    model = classifier.Classifier(TinyViT(), torch.nn.Linear(32, 3), "3")
    groups = finetune.parameter_groups(model, model.layers.encoder, 24, 3, 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    encoder = model.layers.encoder
    assert scale[id(encoder.norm.weight)] == 0.5 and scale[id(model.head.weight)] == 1
    for i, block in enumerate(encoder.blocks):
        assert {scale[id(p)] for p in block.parameters()} == {0.5 ** (3 - i)}
    assert scale[id(encoder.position)] == scale[id(encoder.embed.weight)] == 0.125, "stage 1"


def test_what_is_exported_loads_again(checkpoint, tmp_path):
    linear_eval.main([str(checkpoint), "--export", str(tmp_path / "encoder.pt")])
    encoder, _ = fgssl.load_encoder(tmp_path / "encoder.pt", "tiny-vit")
    for name, tensor in torch.load(checkpoint, weights_only=True)["encoder"].items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_layers_and_stages_that_an_encoder_lacks_are_named(shades):
    start = ["--init", "random", "--arch", "tiny-vit", "--data", str(shades), *PLAIN]
    with pytest.raises(fgssl.UserError, match="--layer 4: .* 3, 3:2x2, 2, 2:2x2, 1, 1:2x2"):
        linear_eval.main([*start, "--layer", "4"])
    with pytest.raises(fgssl.UserError, match="--stages 4: tiny-vit has 3 stages"):
        linear_eval.main([*start, "--stages", "4"])
