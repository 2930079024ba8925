"""Results and classifiers on file: comparison, prediction, export, arguments."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fgssl
import linear_eval
from evaluation import classifier, probe, results

INFERENCE = probe.Inference(24, *fgssl.device_and_precision("fp32"))


@pytest.fixture(scope="module")
def evaluated(shades, tmp_path_factory):
    """A folder with eval.json, probe.pt and all, of an untrained encoder on three shades."""
    out = tmp_path_factory.mktemp("evaluated")
    linear_eval.main(["--init", "random", "--size", "24", "--precision", "fp32", "--data",
                      str(shades), "--out", str(out), "--shots", "1", "2", "--draws", "3"])
    return out


def test_compare_pools_the_seeds_of_a_name(evaluated, tmp_path, capsys):
    result = json.loads((evaluated / "eval.json").read_text())
    result["random_init"]["linear"] = 50.0
    for i, score in enumerate((60.0, 70.0)):
        (tmp_path / f"{i}").mkdir()
        other = json.loads(json.dumps(result))
        other["random_init"]["linear"] = score
        (tmp_path / f"{i}" / "eval.json").write_text(json.dumps(other))
    files = [f"ours={tmp_path}/0/eval.json", f"ours={tmp_path}/1/eval.json",
             str(evaluated / "eval.json")]
    linear_eval.main(["--compare", *files, "--out", str(tmp_path)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.split("\n")]
    head, _, ours, single, _, few, _, _, single_few, *_ = lines
    assert head == ["test, % of 27", "linear", "k-NN", "rank-1", "rank-5", "mAP"]
    assert few == ["frozen, test, % of 27", "1 label", "2 labels"]
    assert ours[:2] == ["ours", "65.0 ± 7.1"] and single[0] == single_few[0] == evaluated.name
    draws = [cell["test"] for cell in result["few_labels"] if cell["shots"] == 2]
    assert single_few[2] == f"{np.mean(draws):.1f} ± {np.std(draws, ddof=1):.1f}"
    Image.open(tmp_path / "compare.png").verify()


def test_a_name_and_a_folder_may_hold_an_equals_sign(evaluated, tmp_path, capsys):
    """A run with --out out/lr=0.1 ended in "is no eval.json", after all its work."""
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "eval.json").write_bytes((evaluated / "eval.json").read_bytes())
    for argument, name in ((f"{folder}/eval.json", "lr=0.1"), (f"a={folder}/eval.json", "a"),
                           (f"b=c={folder}/eval.json", "b=c")):
        linear_eval.main(["--compare", argument, "--out", str(folder)])
        assert capsys.readouterr().out.split("\n")[2].split("|")[1].strip() == name


def test_compare_refuses_other_data_splits_and_sizes(evaluated, tmp_path):
    """Two methods on two splits."""
    result = json.loads((evaluated / "eval.json").read_text())
    files = [str(evaluated / "eval.json"), str(tmp_path / "eval.json")]
    for key, value in (("digest", "0123456789abcdef"), ("size", 32)):
        (tmp_path / "eval.json").write_text(json.dumps({**result, key: value}))
        with pytest.raises(fgssl.UserError, match="nothing to compare"):
            linear_eval.main(["--compare", *files])
    for content in ("[]", "{", '{"linear": 3}', None):
        file = tmp_path / ("eval.json" if content else "nowhere.json")
        if content:
            file.write_text(content)
        with pytest.raises(fgssl.UserError, match="is no eval.json of this version"):
            linear_eval.main(["--compare", str(file)])


def test_the_digest_tells_labels_names_and_splits_apart(shades):
    data = fgssl.load_data(shades)
    train, val, test = splits = linear_eval.labelled_splits(data, 24)
    digest = results.digest_data(data, splits)
    assert digest == results.digest_data(fgssl.load_data(shades), splits)
    other = test._replace(labels=test.labels[::-1])
    fewer = test._replace(labels=test.labels[1:], rows=test.rows[1:])
    for changed in ((train, val, other), (train, val, fewer), (val, train, test)):
        assert results.digest_data(data, changed) != digest


def test_predict_names_what_it_cannot_read_and_does_the_others(shades, evaluated, tmp_path, capsys):
    grey = Image.open(shades / "test" / "oak" / "0.png").convert("L")
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("grey.png", "broken.png", "rgb.png", "absent.png")]
    with pytest.raises(SystemExit) as left:
        linear_eval.main([str(evaluated / "probe.pt"), "--predict", *paths, "--precision", "fp32"])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert "broken.png" in err and "absent.png" in err
    first, second = out.split(paths[2])
    assert first.replace(paths[0], "") == second, "grey is read as RGB, not skipped"
    lines = second.split("\n")[1:-1]
    assert [line.split("%")[1].strip() for line in lines][0] == "oak" and len(lines) == 3
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.2)


def test_the_saved_probe_scores_as_the_reported_one(shades, evaluated):
    model, run = classifier.load_classifier(evaluated / "probe.pt")
    test = fgssl.load_data(shades).cached("test", fgssl.cache_side(run["size"]))
    predicted = fgssl.features(model, test.images, *INFERENCE).argmax(1)
    reported = json.loads((evaluated / "eval.json").read_text())["random_init"]["linear"]
    assert fgssl.accuracy(predicted, torch.from_numpy(test.labels)) == reported


def test_a_pretrained_encoder_alone_predicts_nothing(tmp_path):
    """Whatever it is: a list of keys that do not fit a ResNet is no answer."""
    args, state = dict(size=24, arch="resnet10"), fgssl.resnet("resnet10").state_dict()
    for held in ({"encoder": state, "args": args}, {"encoder": {}, "args": args}, state):
        torch.save(held, tmp_path / "checkpoint.pt")
        with pytest.raises(fgssl.UserError, match="no classifier.*probe.pt"):
            linear_eval.main([str(tmp_path / "checkpoint.pt"), "--predict", "a.jpg"])


def test_export_is_a_plain_state_dict_that_loads_anywhere(evaluated, tmp_path):
    file = tmp_path / "new" / "encoder.pt"
    linear_eval.main([str(evaluated / "probe.pt"), "--export", str(file)])
    state = torch.load(file, weights_only=True)
    assert "layer1.0.conv1.weight" in state and not any(key.startswith("fc.") for key in state)
    encoder, _ = fgssl.load_encoder(file, "resnet10")
    kept, _ = classifier.load_classifier(evaluated / "probe.pt")
    for name, tensor in kept.layers.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])


def test_shots_asked_for_twice_are_run_once():
    """Their results were pooled as if they were other draws."""
    args = linear_eval.arguments(["--init", "random", "--shots", "5", "all", "5"])
    assert args.shots == [5, "all"]


@pytest.mark.parametrize("argv, wanted", [
    (["--init", "random", "--predict", "a.jpg"], "take a checkpoint"),
    (["a.pt", "--export", "./a.pt"], "overwrite the checkpoint"),
    (["--init", "random", "--shots", "0"], "--shots"), (["--init", "random", "--shots", "few"],
                                                        "--shots"),
    (["--init", "random", "--layer", "2:3"], "--layer"),
    (["--init", "random", "--stages", "-1"], "--stages")])
def test_arguments_out_of_range_are_named(argv, wanted, capsys):
    with pytest.raises(SystemExit) as left:
        linear_eval.main(argv)
    assert left.value.code == 2 and wanted in capsys.readouterr().err
