"""linear_eval.py: the probe against its definition, the protocol, the user's errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fgssl
import linear_eval
from evaluation import probe, report

INFERENCE = probe.Inference(24, *fgssl.device_and_precision("fp32"))
NAMES = ["ash", "elm", "oak"]


@pytest.fixture
def checkpoint(shades, tmp_path):
    """An encoder trained by nobody, in a trainer's file: seed 7, so not the control's weights."""
    torch.manual_seed(7)
    args = dict(data=str(shades), root=None, size=24, arch="resnet10", seed=0)
    torch.save({"encoder": fgssl.resnet("resnet10").state_dict(), "args": args, "step": 1},
               tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def problem(n=60, dim=5, classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    return torch.randn(n, dim, generator=rng) + 0.7 * labels[:, None], labels


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_probe_is_at_the_minimum_of_its_objective(l2):
    """At the minimum of a convex function the gradient is 0; here it is written out in NumPy."""
    h, labels = problem()
    weight = probe.fit_linear(h, labels, 3, l2).double().numpy()
    x = np.c_[h.double().numpy(), np.ones(len(h))]
    p = np.exp(x @ weight - (x @ weight).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(3)[labels]) / len(x)
    gradient[:-1] += l2 * weight[:-1]  # the bias is not penalised
    assert np.abs(gradient).max() < 1e-4, "it ends at 1e-5, or where float32 gains no more"


def test_the_start_does_not_change_the_probe():
    h, labels = problem()
    cold = probe.fit_linear(h, labels, 3, 0.01)
    warm = probe.fit_linear(h, labels, 3, 0.01, weight=torch.randn(6, 3))
    logits = torch.nn.functional.pad(h, (0, 1), value=1.0)
    torch.testing.assert_close((logits @ cold).softmax(1), (logits @ warm).softmax(1),
                               atol=5e-4, rtol=0)  # both within the optimizer's tolerance


@pytest.fixture
def fits(monkeypatch):
    """{l2: weight}, filled by each call of fit_linear."""
    tried, fit = {}, probe.fit_linear

    def spy(h, labels, classes, l2, weight=None):
        tried[l2] = fit(h, labels, classes, l2, weight)
        return tried[l2]

    monkeypatch.setattr(probe, "fit_linear", spy)
    return tried


def test_the_head_over_h_scores_as_the_fit_over_standardised_h(fits):
    h, labels = problem()
    h = 7 * h + 3
    mean, std = probe.mean_and_std(h)
    _, head, l2 = probe.choose_linear(h, labels, h, labels, 3, (mean, std))
    wanted = (h - mean) / std @ fits[l2][:-1] + fits[l2][-1]
    torch.testing.assert_close(head(h), wanted, atol=1e-4, rtol=1e-4)  # fp32
    assert not head(h).requires_grad


def test_choices_rest_on_val_and_ties_take_the_stronger_l2(fits):
    h, labels = problem(n=30, dim=40)  # more features than images: any weak l2 fits train exactly
    h_val, labels_val = problem(n=300, dim=40, seed=1)
    as_it_is = torch.zeros(40), torch.ones(40)
    best, head, l2 = probe.choose_linear(h, labels, h_val, labels_val, 3, as_it_is)
    score = {s: fgssl.accuracy((h_val @ w[:-1] + w[-1]).argmax(1), labels_val)
             for s, w in fits.items()}
    assert tuple(fits) == probe.L2[:len(fits)] and len(fits) < len(probe.L2)
    worse = "".join("-w"[score[s] < max([*score.values()][:i + 1])] for i, s in enumerate(score))
    assert worse.index("www") == len(worse) - 3              # it stops there, and not before
    assert best == max(score.values())
    assert l2 == max(s for s in score if score[s] == best)
    assert torch.equal(head.weight.T, fits[l2][:-1])


def test_knn_never_asks_more_neighbours_than_there_are():
    """k = 200 on a set with 30 images a class asks mostly other classes."""
    h, labels = problem(n=4)
    score, k = probe.choose_neighbours(h, labels, h, labels, 3)
    assert k in (1, 3)


def test_confusion_rows_are_true_classes():
    """Exchanged rows and columns turn recall into precision."""
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 1, 0])
    confusion = report.confusion_matrix(labels, predicted, 4)
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    precision, recall, f1 = report.per_class(confusion)
    np.testing.assert_allclose(precision, [50, 50, np.nan, np.nan])
    np.testing.assert_allclose(recall, [100 / 3, 100, np.nan, 0])
    np.testing.assert_allclose(f1, [100 * 2 / 5, 100 * 4 / 6, np.nan, 0])  # 2 TP / (2 TP + errors)
    assert np.nanmean(f1) == pytest.approx(100 * (2 / 5 + 4 / 6) / 3), "an absent class has no F1"


def test_the_encoder_is_frozen_to_the_bit(shades):
    """In train mode its batch-norm would drift; left in the optimizer it would learn (28, 29)."""
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    encoder = fgssl.resnet("resnet10").train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    probe.evaluate(encoder, splits, NAMES, INFERENCE, ("4",))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed while it was measured"
    assert all(p.grad is None for p in encoder.parameters())


def test_test_labels_change_the_score_and_no_choice(shades):
    """Choosing on the split that is reported flatters every method."""
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    torch.manual_seed(0)
    encoder = fgssl.resnet("resnet10")
    honest, frozen = probe.evaluate(encoder, splits, NAMES, INFERENCE, ("4",))
    shuffled = splits[2]._replace(labels=(splits[2].labels + 1) % 3)
    other, frozen_too = probe.evaluate(encoder, [*splits[:2], shuffled], NAMES, INFERENCE,
                                        ("4",))
    assert (honest["l2"], honest["k"]) == (other["l2"], other["k"])
    assert torch.equal(frozen.head.weight, frozen_too.head.weight)
    assert honest["linear"] > 60 > other["linear"], "brightness tells these classes apart"


def test_layers_go_from_the_last_stage_to_the_first():
    """An order by name puts "10" before "2": ties would keep the wrong stage."""
    assert probe.layer_names(4) == ("4", "4:2x2", "3", "3:2x2", "2", "2:2x2", "1", "1:2x2")
    assert probe.layer_names(12)[4] == "10" and probe.stage_index("10:2x2") == 9
    assert probe.layer_names(12, "10:2x2") == ("10:2x2",)
    with pytest.raises(fgssl.UserError, match="--layer 3: .* 2, 2:2x2, 1, 1:2x2"):
        probe.layer_names(2, "3")


def test_layers_are_the_stages_averaged_over_the_image_or_its_quarters():
    encoder, x = fgssl.resnet("resnet10").eval(), torch.randn(2, 3, 40, 32)
    layers = probe.Layers(encoder, probe.layer_names(4))
    h = dict(zip(layers.names, layers(x).split(layers.dims, 1)))
    maps = encoder.stages(x)
    torch.testing.assert_close(h["4"], encoder(x))
    torch.testing.assert_close(h["2"], maps[1].mean((2, 3)))
    quarters = [maps[0][:, :, rows, columns].mean((2, 3)) for rows in (slice(10), slice(10, 20))
                for columns in (slice(8), slice(8, 16))]     # stage 1 is half of 40 x 32
    torch.testing.assert_close(h["1:2x2"].view(2, 32, 4), torch.stack(quarters, 2))


def test_the_best_layer_is_the_best_on_val(shades):
    """For every encoder, the untrained one too: a choice that the control lacks flatters."""
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    torch.manual_seed(0)
    encoder = fgssl.resnet("resnet10")
    given, layers = (encoder, splits, NAMES, INFERENCE), probe.layer_names(4)
    best, frozen = probe.evaluate(*given, layers)
    alone = {layer: probe.evaluate(*given, (layer,))[0] for layer in layers}
    for kind in ("linear", "knn"):
        scores = {layer: alone[layer][f"val_{kind}"] for layer in alone}
        chosen = max(scores, key=scores.get)                 # ties keep the last stage
        assert best[f"{kind}_layer"] == chosen
        assert best[kind] == alone[chosen][kind]
    assert best["map"] == alone[best["knn_layer"]]["map"], "retrieval has no choice of its own"
    assert frozen.layer == best["linear_layer"]


def test_the_table_holds_every_control_on_the_whole_test_split(checkpoint, capsys):
    linear_eval.main([str(checkpoint), "--precision", "fp32"])
    result = json.loads((checkpoint.parent / "eval.json").read_text())
    assert result["n"] == {"train": 36, "val": 18, "test": 27}, "no partial batch is dropped"
    for row in ("chance", "majority"):
        assert result[row] == pytest.approx(100 / 3)
    assert result["size"] == 24, "the size is the run's, not a default"
    assert result["encoder"] != result["random_init"], "the control has weights of its own"
    for row in ("encoder", "random_init"):
        assert {"linear", "knn", "l2", "k", "rank1", "map", "macro_f1"} < result[row].keys()
        assert result[row]["linear_layer"] == result[row]["knn_layer"] == "4"
        right = result[row]["linear"] * 27 / 100
        assert right == pytest.approx(round(right)), "percent of 27 images"
    printed = capsys.readouterr().out
    for words in ("chance", "majority class", "random init", str(checkpoint)[-60:], "linear",
                  "k-NN", "test, % of 27", "fp32"):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 120
    for picture in ("confusion", "retrieval", "map", "gradcam"):
        Image.open(checkpoint.parent / f"{picture}.png").verify()
    assert {"digest", "weights", "seed", "size", "arch", "layer", "commit", "argv"} < result.keys()


def test_random_init_is_the_control_of_the_same_seed(shades, checkpoint, tmp_path):
    linear_eval.main([str(checkpoint), "--precision", "fp32"])
    linear_eval.main(["--init", "random", "--data", str(shades), "--size", "24", "--seed", "0",
                      "--precision", "fp32", "--out", str(tmp_path / "random")])
    alone = json.loads((tmp_path / "random" / "eval.json").read_text())
    beside = json.loads((checkpoint.parent / "eval.json").read_text())
    assert "encoder" not in alone
    assert alone["random_init"] == beside["random_init"]


def test_torchvision_weights_take_the_place_of_a_checkpoint(shades, tmp_path):
    state = {**fgssl.resnet("resnet18").state_dict(), "fc.weight": torch.zeros(1000, 512),
             "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18.pth")
    linear_eval.main([str(tmp_path / "resnet18.pth"), "--arch", "resnet18", "--data", str(shades),
                      "--size", "24"])
    assert "encoder" in json.loads((tmp_path / "eval.json").read_text())


def test_a_missing_checkpoint_is_not_scored_as_a_random_network(tmp_path):
    """A wrong file name once gave a number all the same."""
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        linear_eval.main([str(tmp_path / "nowhere.pt")])
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_checkpoint_of_another_architecture_lists_what_differs(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    saved["args"]["arch"] = "resnet18"
    torch.save(saved, checkpoint)
    with pytest.raises(fgssl.UserError, match=r"conv1.weight is \(32, 3, 3, 3\), wanted \(64"):
        linear_eval.main([str(checkpoint)])


def test_features_that_are_not_finite_are_no_result(checkpoint):
    """A diverged checkpoint scored like a constant guess, or ended in an error of the pictures."""
    saved = torch.load(checkpoint, weights_only=True)
    saved["encoder"]["layer4.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(saved, checkpoint)
    with pytest.raises(fgssl.UserError, match="NaN or infinity.*diverged"):
        linear_eval.main([str(checkpoint), "--precision", "fp32"])
    assert not (checkpoint.parent / "eval.json").exists()


def test_neither_checkpoint_nor_init_is_an_error_and_both_too(capsys):
    for argv in ([], ["some.pt", "--init", "random"]):
        with pytest.raises(SystemExit) as left:
            linear_eval.main(argv)
        assert left.value.code == 2
        assert "--init random" in capsys.readouterr().err


def test_data_without_the_labels_it_takes_is_refused(shades, tmp_path):
    def run(folder):
        linear_eval.main(["--init", "random", "--data", str(folder), "--size", "24",
                          "--out", str(tmp_path / "out")])

    loose, single = tmp_path / "loose", tmp_path / "single" / "ash"
    for folder in (loose, single):
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (24, 24)).save(folder / f"{i}.png")
    with pytest.raises(fgssl.UserError, match="without labels|no val images"):
        run(loose)
    with pytest.raises(fgssl.UserError, match="one class only, ash"):
        run(single.parent)
    lacking = tmp_path / "lacking"
    for split, name in (("train", "ash"), ("train", "elm"), ("test", "yew")):
        (lacking / split / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 24)).save(lacking / split / name / f"{i}.png")
    with pytest.raises(ValueError, match="yew"):
        run(lacking)


def test_the_folds_share_out_train_and_val_and_leave_test_out(splits):
    held = [probe.hold_out(splits, f"{i}/4") for i in range(1, 5)]
    train, val, test = splits
    rows = np.sort(np.concatenate([fold[2].rows for fold in held]))
    assert rows.tolist() == sorted([*train.rows, *val.rows]), "each image is held out once"
    for fold in held:
        assert not {*test.rows} & {*np.concatenate([part.rows for part in fold])}
        assert {*fold[0].rows} <= {*train.rows} and {*fold[1].rows} <= {*val.rows}
        assert np.ptp(np.bincount(fold[2].labels)) <= 1, "of each class as many"
        for part in fold:
            for image, label, row in zip(part.images, part.labels, part.rows):
                whole = train if row in train.rows else val
                i = whole.rows.tolist().index(row)
                assert label == whole.labels[i] and np.array_equal(image, whole.images[i])


def test_a_fold_is_no_test_and_has_a_folder_of_its_own(checkpoint, capsys):
    linear_eval.main([str(checkpoint), "--precision", "fp32", "--fold", "2/3"])
    result = json.loads((checkpoint.parent / "fold2of3" / "eval.json").read_text())
    assert result["n"] == {"train": 24, "val": 12, "test": 18} and result["fold"] == "2/3"
    assert "| fold 2/3, % of 18" in capsys.readouterr().out


@pytest.mark.parametrize("fold", ["0/4", "5/4", "1/1", "x", "1", "1/4/2"])
def test_what_is_no_fold_is_refused(fold, capsys):
    with pytest.raises(SystemExit):
        linear_eval.main(["--init", "random", "--fold", fold])
    assert f"{fold} is no part, such as 1/4" in capsys.readouterr().err
