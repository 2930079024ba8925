"""Few labels: which images are drawn, what a cell learns from and chooses on, how a run goes on."""

import errno
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_study import INFERENCE, NAMES, TINY, arguments

import fgssl
import linear_eval
from evaluation import classifier, few_labels, probe, results
from evaluation.finetune import recipe


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def run(shades, out, *more):
    linear_eval.main([*TINY, "--data", str(shades), "--out", str(out), *more])
    return json.loads((out / "eval.json").read_text())


def test_draws_are_paired_nested_and_stratified():
    labels = np.array([0] * 20 + [2] * 3 + [1] * 12)
    for draw in range(3):
        one, five, every = (set(few_labels.draw_shots(labels, k, draw)) for k in (1, 5, "all"))
        assert one < five < every, "a larger k holds the images of a smaller one"
        assert np.bincount(labels[sorted(one)]).tolist() == [1, 1, 1]
        assert np.bincount(labels[sorted(five)]).tolist() == [5, 5, 3], "all that a small class has"
        assert every == set(range(35))
    torch.manual_seed(9)
    np.random.seed(9)  # no global generator decides: every encoder and seed gets the same images
    assert set(few_labels.draw_shots(labels, 5, 2)) == five
    assert set(few_labels.draw_shots(labels, 5, 0)) != five


def test_fine_tuning_starts_from_the_probe_or_from_zeros(splits, frozen, tmp_path, monkeypatch):
    """The probe's head must score the images as the probe did (Kumar et al. 2022)."""
    started = []
    monkeypatch.setattr(few_labels, "finetune", lambda model, *_: started.append(model) or 0)
    for head in ("probe", "zero"):
        args = arguments("--head", head)
        list(few_labels.run_cells(frozen, args, tmp_path))
    with torch.no_grad():
        probe, zero = (fgssl.features(model, splits[2].images, *INFERENCE) for model in started)
    expected = frozen.head(frozen.h["4"][2])
    torch.testing.assert_close(probe, expected, rtol=1e-4, atol=1e-3)  # fp32, scores of about 10
    assert (zero == 0).all()
    assert started[0].layers.encoder is not frozen.encoder, "a copy of it is tuned"


def test_a_cell_chooses_with_as_few_labels_as_it_learns_from(splits, frozen, tmp_path, monkeypatch):
    """Five labels a class, tuned with hundreds more, are not five labels (30, 31)."""
    sizes, choose = [], probe.choose_linear

    def spy(h, labels, h_val, labels_val, classes, scale):
        sizes.append((len(h), len(h_val)))
        return choose(h, labels, h_val, labels_val, classes, scale)

    monkeypatch.setattr(few_labels, "choose_linear", spy)
    args = linear_eval.arguments([*TINY, "--shots", "1", "4", "all", "--draws", "2"])
    cells = list(few_labels.run_cells(frozen, args, tmp_path))
    assert sizes == [(3, 3)] * 2 + [(12, 12)] * 2 + [(36, 18)]
    assert [(cell["shots"], cell["draw"], cell["images"]) for cell in cells] == [
        (1, 0, 3), (1, 1, 3), (4, 0, 12), (4, 1, 12), ("all", 0, 36)]


def test_fine_tuning_is_shown_few_images_of_train_alone(splits, frozen, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(few_labels, "finetune", lambda model, train, *_: shown.append(train))
    args = arguments("--shots", "4", "all", "--draws", "1")
    list(few_labels.run_cells(frozen, args, tmp_path))
    for k, given in zip((4, "all"), shown, strict=True):
        rows = few_labels.draw_shots(splits[0].labels, k, 0)
        assert np.array_equal(given.images, splits[0].images[rows])
        assert np.array_equal(given.labels, splits[0].labels[rows])


def test_test_labels_change_no_choice_of_any_cell(splits, frozen, tmp_path):
    """The best of many on test flatters every method."""
    args = arguments("--shots", "4", "--draws", "1")
    shuffled = splits[2]._replace(labels=(splits[2].labels + 1) % 3)
    honest, other = (list(few_labels.run_cells(frozen._replace(splits=[*splits[:2], test]), args,
                                                 tmp_path)) for test in (splits[2], shuffled))
    for a, b in zip(honest, other):
        for choice in ("l2", "val"):
            assert a.get(choice) == b.get(choice)
        assert a["test"] != b["test"]


def test_fine_tuning_learns_and_its_file_predicts_what_was_reported(shades, splits, tmp_path):
    result = run(shades, tmp_path, "--finetune", "--steps", "40", "--lr", "3e-3", "--class-weights",
                 "--head", "zero")
    cell = result["few_labels"][-1]
    assert cell["method"] == "fine-tuned" and cell["test"] > 80, "brightness tells them apart"
    model, args = classifier.load_classifier(tmp_path / "finetuned.pt")
    assert args["class_names"] == NAMES
    scores = fgssl.features(model, splits[2].images, *INFERENCE)
    labels = torch.from_numpy(splits[2].labels)
    assert fgssl.accuracy(scores.argmax(1), labels) == pytest.approx(cell["test"])
    assert cell["report"]["top1"] == cell["test"]
    assert (tmp_path / "confusion-finetuned.csv").exists()


def test_finished_cells_are_not_run_again_but_another_recipe_is(shades, tmp_path, monkeypatch,
                                                                capsys):
    study = "--shots", "1", "2", "--draws", "2", "--finetune"
    first = run(shades, tmp_path, *study)["few_labels"]
    assert len(first) == 8
    ran, cell = [], few_labels.run_cell

    def spy(frozen, args, out, asked, title, stop):
        ran.append(title)
        return cell(frozen, args, out, asked, title, stop)

    monkeypatch.setattr(few_labels, "run_cell", spy)
    assert run(shades, tmp_path, *study)["few_labels"] == first and not ran
    assert run(shades, tmp_path)["few_labels"] == first, "a plain run keeps them"
    other = run(shades, tmp_path, "--shots", "2", "--draws", "2", "--finetune", "--lr", "1e-4")
    assert ran == ["fine-tuned, shots 2, draw 0", "fine-tuned, shots 2, draw 1"]
    assert len(other["few_labels"]) == 8, "results of the old recipe gave way"
    assert "±" in capsys.readouterr().out, "draws are reported with their std"
    with pytest.raises(fgssl.UserError, match="8 few-label results of other data.*--out"):
        run(shades, tmp_path, "--seed", "1")


def test_results_of_few_labels_at_the_former_rate_give_way_and_those_of_all_stay():
    """The rate depends on the number of labelled images, not only on the flags."""
    args = linear_eval.arguments(["x.pt", "--finetune", "--shots", "5", "all"])
    former = recipe(args, 2000)
    cells = [{"method": "fine-tuned", "shots": k, "draw": 0, "recipe": former, "images": n}
             for k, n in ((5, 500), ("all", 2640))]
    assert few_labels.finished_cells({"few_labels": cells}, args) == cells[1:]


def test_a_stop_between_cells_is_obeyed_and_keeps_those_that_are_done(shades, tmp_path, monkeypatch,
                                                                      capsys):
    """Frozen cells never asked: Ctrl-C said "stopping" and went on for all of them."""
    cell, ran = few_labels.run_cell, []

    def stopped(*how):
        ran.append(how)
        how[-1].signal = 2
        return cell(*how)

    study = "--shots", "1", "2", "--draws", "2"
    monkeypatch.setattr(few_labels, "run_cell", stopped)
    with pytest.raises(SystemExit) as left:
        run(shades, tmp_path, *study)
    assert left.value.code == 130 and len(ran) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "saved; to go on: " + shlex.join([Path(sys.executable).name, *sys.argv])
    monkeypatch.setattr(few_labels, "run_cell", cell)
    assert len(run(shades, tmp_path, *study)["few_labels"]) == 4


def test_a_run_is_kept_until_its_results_are_written(splits, frozen, tmp_path, monkeypatch):
    """It was removed before val and test were read: killed in those minutes, it was lost."""
    args, file = arguments(), tmp_path / "finetuning.pt"
    monkeypatch.setattr(few_labels, "finetune", lambda *_: file.touch() or 0)
    cells = few_labels.run_cells(frozen, args, tmp_path)
    assert [next(cells)["method"] for _ in range(2)] == ["frozen", "fine-tuned"] and file.exists()
    assert not list(cells) and not file.exists(), "a finished run leaves nothing to resume"


def test_a_class_with_fewer_images_is_said_and_used(shades, tmp_path, capsys):
    result = run(shades, tmp_path, "--shots", "20", "--draws", "1")
    assert result["few_labels"][0]["images"] == 36
    said = "shots 20: all images of the 3 classes that have fewer, such as ash"
    assert said in capsys.readouterr().out


def test_a_file_of_a_cell_that_a_full_disk_kept_out_is_written_by_the_same_command(
        frozen, tmp_path, monkeypatch):
    """The cell was in eval.json, so it was never run again, and finetuned.pt never came. Its run
    is kept meanwhile: it was removed, and trained again."""
    args, saved, file = arguments(), few_labels.save_classifier, tmp_path / "finetuning.pt"
    monkeypatch.setattr(few_labels, "finetune", lambda *_: file.touch() or 0)
    monkeypatch.setattr(few_labels, "save_classifier", disk_full)
    cells = [*few_labels.run_cells(frozen, args, tmp_path, extras=results.Extras())]
    assert file.exists()
    monkeypatch.setattr(few_labels, "save_classifier", saved)
    assert [*few_labels.run_cells(frozen, args, tmp_path, cells)] == [], "eval.json has it"
    assert (tmp_path / "finetuned.pt").is_file()
    monkeypatch.setattr(few_labels, "run_cell", disk_full)
    assert [*few_labels.run_cells(frozen, args, tmp_path, cells)] == [], "nothing is missing"
