"""Few labels and fine-tuning: what learns, what is drawn, what is chosen by, how a run goes on."""

import copy
import json
import types

import numpy as np
import pytest
import torch

import fgssl
import linear_eval

NAMES = ["ash", "elm", "oak"]
HOW = 24, *fgssl.device_and_precision("fp32")
TINY = ["--init", "random", "--size", "24", "--precision", "fp32", "--batch", "8", "--steps", "6"]


def arguments(*more):
    args = linear_eval.arguments([*TINY, "--finetune", *more])
    args.seed = 0
    return args


@pytest.fixture(scope="module")
def splits(shades):
    return linear_eval.labelled_splits(fgssl.load_data(shades), 24)


@pytest.fixture(scope="module")
def frozen(splits):
    torch.manual_seed(0)
    return linear_eval.evaluate(fgssl.resnet("resnet10"), splits, NAMES, HOW)[1]


def classifier(frozen):
    return linear_eval.Classifier(copy.deepcopy(frozen.encoder), copy.deepcopy(frozen.head))


def finetune(model, splits, tmp_path, args, stop=False):
    return linear_eval.finetune(model, splits[0], splits[1], args, HOW, "a run",
                                tmp_path / "finetuning.pt", stop)


def run(shades, out, *more):
    linear_eval.main([*TINY, "--data", str(shades), "--out", str(out), *more])
    return json.loads((out / "eval.json").read_text())


def test_draws_are_paired_nested_and_stratified():
    labels = np.array([0] * 20 + [2] * 3 + [1] * 12)
    for draw in range(3):
        one, five, every = (set(linear_eval.draw_shots(labels, k, draw)) for k in (1, 5, "all"))
        assert one < five < every, "a larger k holds the images of a smaller one"
        assert np.bincount(labels[sorted(one)]).tolist() == [1, 1, 1]
        assert np.bincount(labels[sorted(five)]).tolist() == [5, 5, 3], "all that a small class has"
        assert every == set(range(35))
    torch.manual_seed(9)
    np.random.seed(9)  # no global generator decides: every encoder and seed gets the same images
    assert set(linear_eval.draw_shots(labels, 5, 2)) == five
    assert set(linear_eval.draw_shots(labels, 5, 0)) != five


def test_class_weights_are_inverse_frequencies_of_mean_one():
    """Weights equal to the frequency make rare classes rarer."""
    weight = linear_eval.class_weights(np.array([0] * 8 + [1] * 2 + [3] * 4), 4)
    assert weight[2] == 0, "a class without images is not part of the mean"
    torch.testing.assert_close(weight * torch.tensor([8.0, 2, 0, 4]), weight[0] * 8 *
                               torch.tensor([1.0, 1, 0, 1]))
    assert weight[[0, 1, 3]].mean() == pytest.approx(1)


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_what_is_meant_to_learn_learns_and_the_rest_stays_to_the_bit(splits, frozen, tmp_path,
                                                                     stages):
    """A head built after the optimizer, or `module.requires_grad = True`, would leave its first
    values (17, 26, 27); a frozen stage in train mode would drift in its buffers."""
    model = classifier(frozen)
    before = copy.deepcopy(model.state_dict())
    finetune(model, splits, tmp_path, arguments("--stages", str(stages)))
    for name, after in model.state_dict().items():
        part = name.removeprefix("layers.encoder.").split(".")[0]
        stage = int(part[-1]) if part.startswith("layer") else 0
        if part == "head" or stages == 4 or stage > 4 - stages:
            assert not torch.equal(after, before[name]), f"{name} never learned"
        else:
            assert torch.equal(after, before[name]), f"{name} is frozen, and changed"


def test_kept_statistics_are_kept_and_their_weights_learn(splits, frozen, tmp_path):
    """fgssl.features, which looks at val, puts modules back into train mode."""
    model = classifier(frozen)
    before = copy.deepcopy(model.state_dict())
    finetune(model, splits, tmp_path, arguments("--batch-norm", "kept"))
    for name, after in model.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(after, before[name]), name
        else:
            assert not torch.equal(after, before[name]), name


def test_rates_decay_from_the_head_to_the_stem(frozen):
    groups = linear_eval.parameter_groups(classifier(frozen), 4, 0.5)
    assert sorted(group["scale"] for group in groups) == [0.5 ** i for i in (5, 4, 3, 2, 1, 0)]
    size = {group["scale"]: sum(p.numel() for p in group["params"]) for group in groups}
    assert size[1] == 256 * 3 + 3 and size[0.5 ** 5] == 3 * 32 * 9 + 64, "head; stem"
    total = sum(p.numel() for p in classifier(frozen).parameters())
    assert sum(size.values()) == total


def test_stages_are_counted_from_the_one_that_the_head_reads():
    """From the last, `--layer 3 --stages 1` would train a stage that nothing reads."""
    model = linear_eval.Classifier(fgssl.resnet("resnet10"), torch.nn.Linear(128, 3), "3")
    groups = linear_eval.parameter_groups(model, 1, 0.5)
    learn = {name.split(".")[2] for name, p in model.layers.named_parameters("layers")
             if p.requires_grad}
    assert learn == {"layer3"} and {group["scale"] for group in groups} == {1, 0.5}
    linear_eval.parameter_groups(model, 4, 0.5)
    idle = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {"layer4"}


def test_the_weights_kept_are_those_of_the_best_look_at_val(splits, frozen, tmp_path, monkeypatch):
    """Saved at the first worse look, or the last one whatever its score."""
    model, seen = classifier(frozen), []
    scores = iter([50.0, 80.0, 80.0, 60.0, 70.0, 10.0])

    def look(predicted, labels):
        assert len(labels) == len(splits[1].labels), "only val is looked at"
        seen.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    monkeypatch.setattr(fgssl, "accuracy", look)
    assert finetune(model, splits, tmp_path, arguments()) == 3, "of equals, the later"
    for name, after in model.state_dict().items():
        assert torch.equal(after, seen[2][name]), name


def test_a_stopped_run_ends_like_one_that_was_never_stopped(splits, frozen, tmp_path):
    whole = classifier(frozen)
    best = finetune(whole, splits, tmp_path, arguments())
    for after in (1, 4):
        calls = []

        class Stop:
            signal = 2

            def __bool__(self):
                calls.append(1)
                return len(calls) == after

        with pytest.raises(SystemExit) as left:
            finetune(classifier(frozen), splits, tmp_path, arguments(), Stop())
        assert left.value.code == 130
        saved = fgssl.read_checkpoint(tmp_path / "finetuning.pt")
        assert saved["step"] == after
        model = classifier(frozen)
        assert finetune(model, splits, tmp_path, arguments()) == best
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        (tmp_path / "finetuning.pt").unlink()


@pytest.mark.parametrize("other", ["recipe", "images"])
def test_the_saved_run_of_another_recipe_or_other_data_is_not_taken_up(splits, frozen, tmp_path,
                                                                       other):
    """From scratch the weights are the same whatever the data: a trial on --subset, stopped, was
    continued on all images, with the optimizer and the best val of the trial."""
    stop, before, flags = types.SimpleNamespace(signal=2), splits, ["--lr", "0.5"]
    if other == "images":
        before, flags = [splits[0]._replace(images=255 - splits[0].images), *splits[1:]], []
    with pytest.raises(SystemExit):
        finetune(classifier(frozen), before, tmp_path, arguments(*flags), stop)
    resumed, fresh = classifier(frozen), classifier(frozen)
    finetune(resumed, splits, tmp_path, arguments())
    finetune(fresh, splits, tmp_path, arguments())
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_loss_that_is_not_finite_names_step_and_rate(splits, frozen, tmp_path):
    model = classifier(frozen)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"a run: loss nan at step 1, .*smaller --lr"):
        finetune(model, splits, tmp_path, arguments())


def test_fine_tuning_starts_from_the_probe_or_from_zeros(splits, frozen, tmp_path, monkeypatch):
    """The probe's head must score the images as the probe did (Kumar et al. 2022)."""
    started = []
    monkeypatch.setattr(linear_eval, "finetune", lambda model, *_: started.append(model) or 0)
    for head in ("probe", "zero"):
        args = arguments("--head", head)
        list(linear_eval.few_labels(frozen, args, tmp_path))
    with torch.no_grad():
        probe, zero = (fgssl.features(model, splits[2].images, *HOW) for model in started)
    expected = frozen.head(frozen.h["4"][2])
    torch.testing.assert_close(probe, expected, rtol=1e-4, atol=1e-3)  # fp32, scores of about 10
    assert (zero == 0).all()
    assert started[0].layers.encoder is not frozen.encoder, "a copy of it is tuned"


def test_a_cell_chooses_with_as_few_labels_as_it_learns_from(splits, frozen, tmp_path, monkeypatch):
    """Five labels a class, tuned with hundreds more, are not five labels (30, 31)."""
    sizes, choose = [], linear_eval.choose_linear

    def spy(h, labels, h_val, labels_val, classes, scale):
        sizes.append((len(h), len(h_val)))
        return choose(h, labels, h_val, labels_val, classes, scale)

    monkeypatch.setattr(linear_eval, "choose_linear", spy)
    args = linear_eval.arguments([*TINY, "--shots", "1", "4", "all", "--draws", "2"])
    cells = list(linear_eval.few_labels(frozen, args, tmp_path))
    assert sizes == [(3, 3)] * 2 + [(12, 12)] * 2 + [(36, 18)]
    assert [(cell["shots"], cell["draw"], cell["images"]) for cell in cells] == [
        (1, 0, 3), (1, 1, 3), (4, 0, 12), (4, 1, 12), ("all", 0, 36)]


def test_fine_tuning_is_shown_few_images_of_train_and_val_alone(splits, frozen, tmp_path,
                                                                monkeypatch):
    shown = []
    monkeypatch.setattr(linear_eval, "finetune", lambda model, *of: shown.append(of[:2]) or 0)
    args = arguments("--shots", "4", "all", "--draws", "1")
    list(linear_eval.few_labels(frozen, args, tmp_path))
    for k, few in zip((4, "all"), shown):
        for given, whole in zip(few, splits):
            rows = linear_eval.draw_shots(whole.labels, k, 0)
            assert np.array_equal(given.images, whole.images[rows])
            assert np.array_equal(given.labels, whole.labels[rows])


def test_test_labels_change_no_choice_of_any_cell(splits, frozen, tmp_path):
    """The best epoch on test flatters every method."""
    args = arguments("--shots", "4", "--draws", "1")
    shuffled = splits[2]._replace(labels=(splits[2].labels + 1) % 3)
    honest, other = (list(linear_eval.few_labels(frozen._replace(splits=[*splits[:2], test]), args,
                                                 tmp_path)) for test in (splits[2], shuffled))
    for a, b in zip(honest, other):
        for choice in ("l2", "step", "val"):
            assert a.get(choice) == b.get(choice)
        assert a["test"] != b["test"]


def test_fine_tuning_learns_and_its_file_predicts_what_was_reported(shades, splits, tmp_path):
    result = run(shades, tmp_path, "--finetune", "--steps", "40", "--lr", "3e-3", "--class-weights",
                 "--head", "zero")
    cell = result["few_labels"][-1]
    assert cell["method"] == "fine-tuned" and cell["test"] > 80, "brightness tells them apart"
    model, args = linear_eval.load_classifier(tmp_path / "finetuned.pt")
    assert args["class_names"] == NAMES
    scores = fgssl.features(model, splits[2].images, *HOW)
    labels = torch.from_numpy(splits[2].labels)
    assert fgssl.accuracy(scores.argmax(1), labels) == pytest.approx(cell["test"])
    assert cell["report"]["top1"] == cell["test"]
    assert (tmp_path / "confusion-finetuned.csv").exists()


def test_finished_cells_are_not_run_again_but_another_recipe_is(shades, tmp_path, monkeypatch,
                                                                capsys):
    study = "--shots", "1", "2", "--draws", "2", "--finetune"
    first = run(shades, tmp_path, *study)["few_labels"]
    assert len(first) == 8
    ran, cell = [], linear_eval.few_label_cell

    def spy(frozen, args, out, asked, title, stop):
        ran.append(title)
        return cell(frozen, args, out, asked, title, stop)

    monkeypatch.setattr(linear_eval, "few_label_cell", spy)
    assert run(shades, tmp_path, *study)["few_labels"] == first and not ran
    assert run(shades, tmp_path)["few_labels"] == first, "a plain run keeps them"
    other = run(shades, tmp_path, "--shots", "2", "--draws", "2", "--finetune", "--lr", "1e-4")
    assert ran == ["fine-tuned, shots 2, draw 0", "fine-tuned, shots 2, draw 1"]
    assert len(other["few_labels"]) == 8, "results of the old recipe gave way"
    assert "±" in capsys.readouterr().out, "draws are reported with their deviation"
    with pytest.raises(ValueError, match="8 few-label results of other data.*--out"):
        run(shades, tmp_path, "--seed", "1")


def test_a_stop_between_cells_is_obeyed_and_keeps_those_that_are_done(shades, tmp_path, monkeypatch,
                                                                      capsys):
    """Frozen cells never asked: Ctrl-C said "stopping" and went on for all of them."""
    cell, ran = linear_eval.few_label_cell, []

    def stopped(*how):
        ran.append(how)
        how[-1].signal = 2
        return cell(*how)

    study = "--shots", "1", "2", "--draws", "2"
    monkeypatch.setattr(linear_eval, "few_label_cell", stopped)
    with pytest.raises(SystemExit) as left:
        run(shades, tmp_path, *study)
    assert left.value.code == 130 and len(ran) == 1
    assert "the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setattr(linear_eval, "few_label_cell", cell)
    assert len(run(shades, tmp_path, *study)["few_labels"]) == 4


def test_a_run_is_kept_until_its_results_are_written(splits, frozen, tmp_path, monkeypatch):
    """It was removed before val and test were read: killed in those minutes, it was lost."""
    args, file = arguments(), tmp_path / "finetuning.pt"
    monkeypatch.setattr(linear_eval, "finetune", lambda *_: file.touch() or 0)
    cells = linear_eval.few_labels(frozen, args, tmp_path)
    assert [next(cells)["method"] for _ in range(2)] == ["frozen", "fine-tuned"] and file.exists()
    assert not list(cells) and not file.exists(), "a finished run leaves nothing to resume"


def test_a_class_with_fewer_images_is_said_and_used(shades, tmp_path, capsys):
    result = run(shades, tmp_path, "--shots", "20", "--draws", "1")
    assert result["few_labels"][0]["images"] == 36
    assert "shots 20: of 3 classes with fewer images, such as ash, all" in capsys.readouterr().out
