"""Fine-tuning: what learns and how fast, and how a stopped run goes on."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_study import INFERENCE, arguments
from torch import nn

import fgssl
from evaluation import classifier, finetune


def fresh(frozen):
    return classifier.Classifier(copy.deepcopy(frozen.encoder), copy.deepcopy(frozen.head), "4")


def groups_of(model, *args):
    """The groups of an encoder whose weights are as long as those of the untrained one."""
    return finetune.parameter_groups(model, model.layers.encoder, *args)


def train(model, splits, tmp_path, args, stop=False):
    finetune.finetune(model, splits[0], args, INFERENCE, "a run", tmp_path / "finetuning.pt", stop)


class Stop(fgssl.StopSignal):
    """Ctrl-C before it is asked for the n-th time."""

    def __init__(self, n):
        self.signal, self.left = 2, n

    def __bool__(self):
        self.left -= 1
        return self.left == 0


def test_class_weights_are_inverse_frequencies_of_mean_one():
    """Weights equal to the frequency make rare classes rarer."""
    weight = finetune.class_weights(np.array([0] * 8 + [1] * 2 + [3] * 4), 4)
    assert weight[2] == 0, "a class without images is not part of the mean"
    torch.testing.assert_close(weight * torch.tensor([8.0, 2, 0, 4]), weight[0] * 8 *
                               torch.tensor([1.0, 1, 0, 1]))
    assert weight[[0, 1, 3]].mean() == pytest.approx(1)


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_what_is_meant_to_learn_learns_and_the_rest_stays_to_the_bit(splits, frozen, tmp_path,
                                                                     stages):
    """A head built after the optimizer, or `module.requires_grad = True`, would leave its first
    values (17, 26, 27); a frozen stage in train mode would drift in its buffers."""
    model = fresh(frozen)
    before = copy.deepcopy(model.state_dict())
    train(model, splits, tmp_path, arguments("--stages", str(stages)))
    for name, after in model.state_dict().items():
        part = name.removeprefix("layers.encoder.").split(".")[0]
        stage = int(part[-1]) if part.startswith("layer") else 1
        if part == "head" or stage > 4 - stages:
            assert not torch.equal(after, before[name]), f"{name} never learned"
        else:
            assert torch.equal(after, before[name]), f"{name} is frozen, and changed"


def test_kept_statistics_are_kept_and_their_weights_learn(splits, frozen, tmp_path):
    """fgssl.features, which evaluates val, puts modules back into train mode."""
    model = fresh(frozen)
    before = copy.deepcopy(model.state_dict())
    train(model, splits, tmp_path, arguments("--batch-norm", "kept"))
    for name, after in model.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(after, before[name]), name
        else:
            assert not torch.equal(after, before[name]), name


def test_rates_decay_from_the_head_to_the_stem(frozen):
    size = Counter()
    for group in groups_of(fresh(frozen), 24, 4, 0.5):
        size[group["scale"]] += sum(p.numel() for p in group["params"])
    assert sorted(size) == [0.5 ** i for i in (4, 3, 2, 1, 0)]
    stem, first = 3 * 32 * 9 + 64, 2 * (32 * 32 * 9 + 64)
    assert size[1] == 256 * 3 + 3 and size[0.5 ** 4] == stem + first, "the stem is of stage 1"
    total = sum(p.numel() for p in fresh(frozen).parameters())
    assert sum(size.values()) == total


def longer(encoder, c):
    """The same function, with every weight before a batch-norm c times as long: c, a power of two,
    rounds nothing."""
    encoder = copy.deepcopy(encoder)
    modules = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    with torch.no_grad():
        for conv, norm in zip(modules[::2], modules[1::2]):
            conv.weight.mul_(c)
            norm.running_mean.mul_(c)
            norm.running_var.mul_(c ** 2)
            norm.eps *= c ** 2
    return encoder


def test_how_long_weights_are_changes_nothing_behind_a_batch_norm(splits, frozen, tmp_path):
    """One rate for all would turn weights that pretraining made 8 times as long 8 times less: they
    would hardly learn."""
    ends = {}
    for c in (1, 8):
        model = classifier.Classifier(longer(frozen.encoder, c), copy.deepcopy(frozen.head), "4")
        train(model, splits, tmp_path, arguments())
        ends[c] = model.state_dict()
    before = frozen.encoder.state_dict()
    for name, w in frozen.encoder.named_parameters():
        if w.dim() > 1:
            first, second = (ends[c][f"layers.encoder.{name}"] / c - before[name] for c in ends)
            assert torch.equal(first, second), name


@pytest.mark.parametrize("init, flags, expected", [
    (None, [], 0.00036), ("random", [], 0.04), (None, ["--lr", "0.5"], 0.5),
    ("random", ["--lr", "0.5"], 0.5)])
def test_few_labels_change_a_pretrained_network_slowly(splits, frozen, tmp_path, monkeypatch,
                                                       init, flags, expected):
    """At the rate that suits all labels, five a class undid part of what pretraining learned."""
    peaks, schedule = set(), fgssl.cosine_lr

    def spy(step, total, warmup, peak):
        peaks.add(peak)
        return schedule(step, total, warmup, peak)

    monkeypatch.setattr(fgssl, "cosine_lr", spy)
    args = arguments(*flags)
    args.init = init
    train(fresh(frozen), splits, tmp_path, args)
    assert len(splits[0].labels) == 36 and [*peaks] == [pytest.approx(expected)]


def test_the_rate_stays_the_same_from_2000_images_on():
    rates = [finetune.peak_rate(n, False) for n in (500, 1000, 2000, 2640, 100_000)]
    assert rates == [0.005, 0.01, 0.02, 0.02, 0.02]


def test_weights_of_no_length_learn_at_the_rate_itself():
    zero, w = torch.zeros(4, 3), torch.ones(4, 3)
    assert finetune.relative_norm(w, zero) == finetune.relative_norm(zero, w) == 1
    assert finetune.relative_norm(3 * w, w) == pytest.approx(3)
    assert finetune.relative_norm(3 * w[0], w[0]) == 1, "a norm's weights keep their rate"


def test_stages_are_counted_from_the_one_that_the_head_reads():
    """From the last, `--layer 3 --stages 1` would train a stage that nothing reads."""
    model = classifier.Classifier(fgssl.resnet("resnet10"), torch.nn.Linear(128, 3), "3")
    groups = groups_of(model, 24, 1, 0.5)
    learn = {name.split(".")[2] for name, p in model.layers.named_parameters("layers")
             if p.requires_grad}
    assert learn == {"layer3"} and {group["scale"] for group in groups} == {1, 0.5}
    groups_of(model, 24, 4, 0.5)
    idle = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {"layer4"}


class Odd(torch.nn.Module):
    """Two stages after a stem that no gradient reaches, with layers that a ResNet has not."""

    def __init__(self):
        super().__init__()
        self.fixed = torch.nn.Conv2d(3, 4, 3)                # names say nothing about the stage
        self.late = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.GroupNorm(2, 4))
        self.early = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Dropout(),
                                         torch.nn.BatchNorm2d(4, affine=False))
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def stages(self, x):
        with torch.no_grad():
            x = self.fixed(x)
        x = self.early(x)
        return [x, self.late(x)]


def test_a_parameter_belongs_to_the_first_stage_that_depends_on_it():
    found = finetune.stages_of_parameters(Odd(), 24)
    names = [name.partition(".")[0] for name, _ in Odd().named_parameters()]
    assert dict(zip(names, found)) == {"unused": 2, "fixed": 2, "late": 2, "early": 1}


def test_a_frozen_stage_neither_drops_out_nor_learns_statistics():
    """A norm without weights has no requires_grad to tell that its stage is frozen."""
    model, x = classifier.Classifier(Odd(), torch.nn.Linear(4, 3), "2"), torch.randn(5, 3, 24, 24)
    groups_of(model, 24, 1, 1.0)
    finetune.learning_mode(model, "batch")
    assert torch.equal(model(x), model(x))
    assert (model.layers.encoder.early[2].running_mean == 0).all()
    groups_of(model, 24, 2, 1.0)
    finetune.learning_mode(model, "batch")
    assert not torch.equal(model(x), model(x)), "a stage that learns drops out"
    assert not (model.layers.encoder.early[2].running_mean == 0).all()


def test_a_stopped_run_ends_like_one_that_was_never_stopped(splits, frozen, tmp_path):
    whole = fresh(frozen)
    train(whole, splits, tmp_path, arguments())
    for after in (1, 4):
        with pytest.raises(SystemExit) as left:
            train(fresh(frozen), splits, tmp_path, arguments(), Stop(after))
        assert left.value.code == 130
        saved = fgssl.read_checkpoint(tmp_path / "finetuning.pt")
        assert saved["step"] == after
        model = fresh(frozen)
        train(model, splits, tmp_path, arguments())
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        (tmp_path / "finetuning.pt").unlink()


@pytest.mark.parametrize("other", ["recipe", "images"])
def test_the_saved_run_of_another_recipe_or_other_data_is_not_taken_up(splits, frozen, tmp_path,
                                                                       other):
    """From scratch the weights are the same whatever the data: a trial on --subset, stopped, was
    continued on all images, with the optimizer of the trial."""
    before, flags = splits, ["--lr", "0.5"]
    if other == "images":
        before, flags = [splits[0]._replace(images=255 - splits[0].images), *splits[1:]], []
    with pytest.raises(SystemExit):
        train(fresh(frozen), before, tmp_path, arguments(*flags), Stop(1))
    resumed, anew = fresh(frozen), fresh(frozen)
    train(resumed, splits, tmp_path, arguments())
    train(anew, splits, tmp_path, arguments())
    for name, tensor in anew.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_loss_that_is_not_finite_names_step_and_rate(splits, frozen, tmp_path):
    model = fresh(frozen)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"a run: loss nan at step 6, .*smaller --lr"):
        train(model, splits, tmp_path, arguments())


