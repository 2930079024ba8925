"""train_srgan.py: images, networks, losses, measures, and the run from end to end, tiny."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_trainers import assert_same

import fgssl
import kernels
import linear_eval
import train_srgan as srgan
from methods import super_resolution
from methods.srgan import (
    Discriminator, Generator, build_discriminator, freeze, load_content_encoder, update_ema)

TINY = ["--size", "16", "--batch", "8", "--epochs", "3", "--pixel-epochs", "1", "--blocks", "1",
        "--width", "8", "--precision", "fp32"]
UNCHANGED = ["--color", "0", "--gray", "0"]
PER_EPOCH = 28 // 8  # 40 images: 8 to test, 4 to val, 28 to train


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """One finished run, which several tests look at."""
    out = tmp_path_factory.mktemp("run")
    checkpoint, records = train(photos, out)
    return out, checkpoint, records


def train(photos, out, *more):
    srgan.main(["--data", str(photos), "--out", str(out), *TINY, *more])
    return fgssl.read_checkpoint(out / "checkpoint.pt"), fgssl.read_log(out / "log.jsonl")


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def trained_like(scale=4, blocks=1, width=8):
    """A generator whose last layer is no longer zero."""
    torch.manual_seed(0)
    generator = Generator(blocks, width, scale)
    torch.nn.init.normal_(generator.detail.weight, std=0.1)
    return generator


# Images -----------------------------------------------------------------------------------------


def test_a_crop_is_of_the_photograph_in_its_own_row():
    """Shifted by one, every true pair would be taught as false."""
    x = torch.zeros(6, 3, 24, 24, dtype=torch.uint8)
    for i in range(6):
        x[i] = 40 * i + 20  # flat grey: crops and mirrors leave it as it is
    crops = srgan.random_crops(x, 16, torch.Generator().manual_seed(0))
    assert crops.shape == (6, 3, 16, 16)
    torch.testing.assert_close(crops * 255, x[..., :16, :16].float(), atol=0.5, rtol=0)


def test_both_networks_turns_judge_images_whose_colours_are_changed(photos, tmp_path, monkeypatch):
    """By colours that are kept, the second task is solved: two crops of a photograph share them."""
    seen, forward = [], Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward",
                        lambda self, x: seen.append(x.detach()) or forward(self, x))
    train(photos, tmp_path / "grey", "--epochs", "1", "--pixel-epochs", "0", "--gray", "1")
    assert [len(x) for x in seen[:2]] == [2 * 8, 8], "its own step, and the generator's"
    assert all((x == x[:, :1]).all() for x in seen)
    seen.clear()
    monkeypatch.setattr(srgan, "random_crops", lambda x, *_: torch.full((len(x), 3, 16, 16), 0.5))
    train(photos, tmp_path / "jitter", "--epochs", "1", "--pixel-epochs", "0", "--gray", "0")
    real, fake = seen[0].mean((2, 3)).chunk(2)               # at first, generated is bicubic
    assert len(real.unique(dim=0)) > 4 and not torch.equal(real, fake), "each image its own way"


def test_an_older_run_goes_on_without_changes_of_colour(photos, tmp_path):
    state, _ = train(photos, tmp_path, *UNCHANGED)
    del state["args"]["color"], state["args"]["gray"]
    torch.save(state, tmp_path / "checkpoint.pt")
    args = srgan.arguments(["--data", str(photos), "--out", str(tmp_path), "--resume"])
    assert args.color == args.gray == 0


# Networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_an_untrained_generator_is_bicubic_and_a_trained_one_is_not_clamped(scale):
    low = noise(2, 3, 5, 7)
    assert torch.equal(Generator(2, 8, scale)(low), super_resolution.enlarge(low, scale))
    fake = trained_like(scale)(20 * low)
    assert fake.shape == (2, 3, 5 * scale, 7 * scale)
    assert fake.min() < 0 and fake.max() > 1, "clamped: no gradient beyond"


def test_vgg19_takes_torchvisions_weights_and_names_what_does_not_fit(tmp_path):
    shapes, index, inside = {}, 0, 3  # convolutions of features.*, a ReLU after each, then pooling
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            shapes[f"features.{index}"] = (width, inside, 3, 3)
            inside, index = width, index + 2
        index += 1
    assert list(shapes)[-1] == "features.34"
    state = {f"{name}.weight": 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    state["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "vgg19.pth")
    network = load_content_encoder(tmp_path / "vgg19.pth", "resnet10")
    features, = network.stages(noise(1, 3, 40, 33))
    assert features.shape == (1, 512, 2, 2) and features.min() >= 0, "phi_5,4: before the last pool"
    assert torch.equal(network.state_dict()["features.34.weight"], state["features.34.weight"])
    del state["features.0.bias"]
    torch.save(state, tmp_path / "vgg19.pth")
    with pytest.raises(ValueError, match=r"missing features\.0\.bias"):
        load_content_encoder(tmp_path / "vgg19.pth", "resnet10")


def test_the_content_encoder_may_be_of_another_architecture_than_the_discriminator(tmp_path):
    """It was refused: "holds a resnet18, not a resnet10"."""
    encoder = fgssl.resnet("resnet18")
    torch.save({"encoder": encoder.state_dict(), "args": {"arch": "resnet18"}}, tmp_path / "a.pt")
    found = load_content_encoder(tmp_path / "a.pt", "resnet10")
    assert_same(encoder.state_dict(), found.state_dict())


# Losses -----------------------------------------------------------------------------------------


def gradients(network):
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item()
            for name, p in network.named_parameters()}


@pytest.fixture(params=["resnet10", "srgan-vgg"])
def game(request):
    """A generator, a discriminator, and the images of one step."""
    args = srgan.arguments(["--out", "nowhere", "--arch", request.param])
    torch.manual_seed(0)
    discriminator = build_discriminator(args)
    generator, high = trained_like(), noise(4, 3, 32, 32)
    return generator, discriminator, high, generator(super_resolution.shrink(high, 4))


@pytest.mark.parametrize("term", ["pixel", "features", "adversarial"])
def test_each_term_of_the_generator_reaches_all_of_it_and_nothing_else(game, term):
    """A content loss wrapped in a new tensor has no gradient; a discriminator that is
    not frozen learns to be fooled."""
    generator, discriminator, high, fake = game
    freeze(discriminator)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    loss = {"pixel": lambda: srgan.pixel_loss(fake, high),
            "features": lambda: srgan.feature_loss(discriminator.encoder, fake, high),
            "adversarial": lambda: srgan.adversarial_loss(discriminator(fake)[0])}
    loss[term]().backward()
    assert all(g > 0 for g in gradients(generator).values()), gradients(generator)
    assert not any(gradients(discriminator).values()), "its parameters are not the generator's"
    assert_same(before, discriminator.state_dict(), "discriminator, batch-norm included")


def test_the_losses_of_the_discriminator_reach_all_of_it_and_not_the_generator(game):
    generator, discriminator, high, fake = game
    truth, z = discriminator(torch.cat([high, fake.detach()]))
    assert z.norm(dim=1).tolist() == pytest.approx([1] * 8)
    srgan.discriminator_loss(*truth.chunk(2)).backward(retain_graph=True)
    reached = gradients(discriminator)
    assert all((g > 0) != ("match" in name) for name, g in reached.items()), reached
    kernels.nt_xent(z, 0.2, "torch").backward()
    assert all(g > 0 for g in gradients(discriminator).values()), gradients(discriminator)
    assert not any(gradients(generator).values())


def test_the_losses_are_those_of_the_paper():
    high, fake = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([-1.0, 0.7, 40.0])
    d_high, d_fake = high.double().sigmoid(), fake.double().sigmoid()
    wanted = -d_high.log().mean() + F.softplus(fake.double()).mean()
    assert srgan.discriminator_loss(high, fake).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert srgan.adversarial_loss(fake).item() == pytest.approx(-d_fake.log().mean().item(),
                                                                rel=1e-5)
    guess = srgan.discriminator_loss(torch.zeros(3), torch.zeros(3))
    assert guess.item() == pytest.approx(2 * math.log(2)), "the yardstick of the log"
    assert math.isfinite(srgan.adversarial_loss(torch.full((2,), -500.0)).item()), "log(sigmoid)"


def test_truth_is_read_from_every_stage_and_match_from_the_last(game):
    """Read from the last alone, texture takes the room in h that the features need."""
    discriminator, high = game[1:3]
    maps = [m.detach().requires_grad_(True) for m in discriminator.encoder.stages(high)]
    with torch.autocast("cpu", torch.bfloat16):
        truth, z = discriminator.head(maps)
    assert truth.dtype == z.dtype == torch.float32, "logits of 8 bits tell few images apart"
    shares = torch.autograd.grad(truth.sum(), maps)
    assert all(g.abs().sum() > 0 for g in shares)
    shares = torch.autograd.grad(z.square()[:, 0].sum(), maps, allow_unused=True)
    assert shares[:3] == (None, None, None) and shares[3].abs().sum() > 0


def test_feature_loss_is_zero_for_equal_images_only(game):
    _, discriminator, high, fake = game
    encoder = freeze(discriminator).encoder
    assert srgan.feature_loss(encoder, high, high).item() == 0
    assert srgan.feature_loss(encoder, fake, high).item() > 0


def test_each_phase_has_its_own_cosine():
    args = srgan.arguments(["--out", "nowhere"])
    rates = [srgan.learning_rates(step, 40, 100, args) for step in range(1, 101)]
    g, d = np.array(rates).T
    assert g[:40].max() == args.lr and g[39] == 0 and g[99] == 0 and d[99] == 0
    assert (d[:40] == 0).all(), "in the pixel phase the discriminator does not learn"
    assert g[40:].max() == args.lr_generator and d[40:].max() == args.lr_discriminator
    assert (np.diff(g[43:]) <= 0).all() and (np.diff(d[43:]) <= 0).all()
    assert srgan.learning_rates(1, 0, 10, args)[1] > 0, "no pixel phase at all"
    assert srgan.learning_rates(10, 10, 10, args) == (0, 0), "nothing but the pixel phase"


def test_the_average_follows_the_generator():
    generator, ema = trained_like(), freeze(trained_like())
    with torch.no_grad():
        generator.first.weight.add_(1)

    def gap():
        return (generator.first.weight - ema.first.weight).mean().item()

    update_ema(ema, generator, 1)
    assert gap() == pytest.approx(0.1, rel=1e-3), "quick at first"
    update_ema(ema, generator, 10 ** 6)
    assert gap() == pytest.approx(0.1 * 0.999, rel=1e-3)


# The run ----------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoint_log_and_pictures(run):
    out, checkpoint, records = run
    assert checkpoint["step"] == 3 * PER_EPOCH
    for picture in ("samples.png", "samples_pixel.png", "curves.png"):
        Image.open(out / picture).verify()
    warm = next(r for r in records if "pixel" in r)
    last = [r for r in records if "discriminator" in r][-1]
    assert "adversarial" not in warm
    assert {"pixel", "adversarial", "psnr", "bicubic"} <= last.keys(), "every term of the loss"
    assert 0 < last["D_real"] < 1 and 0 < last["D_fake"] < 1 and last["lr"] == 0
    assert last["chance"] == pytest.approx(2 * math.log(2))
    measured = [r for r in records if "val_psnr" in r]
    assert [r["step"] for r in measured] == [0, PER_EPOCH, 3 * PER_EPOCH]
    assert measured[0]["val_psnr"] == measured[0]["bicubic_psnr"], "untrained, it is bicubic"
    assert [r["step"] for r in records if "random_init" in r] == [0, 3 * PER_EPOCH], \
        "a yardstick without its number says nothing"
    assert measured[-1]["val_ssim"] != measured[-1]["bicubic_ssim"]


def test_the_discriminator_reads_one_batch_a_step_and_the_generator_runs_once(
        photos, tmp_path, monkeypatch):
    """Three generator forwards a step; batch-norm moved by the generator's turn."""
    calls, forward = [], Generator.forward

    def counted(self, low):
        calls.append(torch.is_grad_enabled() and self.training)
        return forward(self, low)

    monkeypatch.setattr(Generator, "forward", counted)
    checkpoint, _ = train(photos, tmp_path)
    assert sum(calls) == checkpoint["step"]
    assert checkpoint["encoder"]["bn1.num_batches_tracked"] == 2 * PER_EPOCH


def test_without_truth_the_discriminator_learns_by_matching_alone(photos, tmp_path, run):
    """The head of the first task only decays, and keeps its bias; the others learn."""
    alone = train(photos, tmp_path, "--truth", "0", "--adversarial", "0")[0]["head"]
    torch.manual_seed(0)
    args = srgan.arguments(["--data", str(photos), "--out", str(tmp_path), *TINY, "--resume"])
    first = srgan.build_discriminator(args).head.state_dict()
    assert torch.equal(alone["truth.0.bias"], first["truth.0.bias"])
    torch.testing.assert_close(alone["truth.0.weight"], first["truth.0.weight"], rtol=1e-4, atol=0)
    assert not torch.equal(alone["match.0.bias"], first["match.0.bias"])
    assert not torch.equal(run[1]["head"]["truth.0.bias"], first["truth.0.bias"])


def test_a_generated_image_is_matched_with_its_own_photograph(photos, tmp_path, monkeypatch):
    """With the one a row further, it would be taught what is wrong."""
    pairs, nt_xent = [], kernels.nt_xent
    monkeypatch.setattr(srgan, "random_crops",               # flat: enlarged it is the same again
                        lambda x, size, _: (x[:, :, :1, :1] / 255).repeat(1, 1, size, size))
    monkeypatch.setattr(kernels, "nt_xent",
                        lambda z, *how, **more: pairs.append(z) or nt_xent(z, *how, **more))
    train(photos, tmp_path, "--epochs", "1", "--pixel-epochs", "0", *UNCHANGED)
    real, fake = pairs[0].detach().chunk(2)
    assert torch.allclose(real, fake, atol=1e-5) and not torch.allclose(real, fake.roll(1, 0))


def test_real_images_are_other_parts_of_their_photographs(photos, tmp_path, monkeypatch):
    """Of the generated part itself, the second task would be solved pixel by pixel."""
    drawn, crops = [], srgan.random_crops
    monkeypatch.setattr(srgan, "random_crops", lambda *a: drawn.append(crops(*a)) or drawn[-1])
    train(photos, tmp_path, "--epochs", "1", "--pixel-epochs", "0")
    assert len(drawn) == 2 * PER_EPOCH and not torch.allclose(drawn[0], drawn[1], atol=0.1)


@pytest.mark.parametrize("pixel, adversarial", [(0, "0"), (1, "0"), (0, "1")])
def test_each_network_is_moved_by_its_own_losses_alone(
        photos, tmp_path, monkeypatch, pixel, adversarial):
    """What main wires together: without a loss the generator stands still, with either it moves;
    the discriminator learns all the same."""
    loss = srgan.pixel_loss
    monkeypatch.setattr(srgan, "pixel_loss", lambda fake, high: pixel * loss(fake, high))
    after, _ = train(photos, tmp_path, "--epochs", "1", "--pixel-epochs", "0", "--adversarial",
                     adversarial)
    torch.manual_seed(0)  # main makes the discriminator first, then the generator
    before = build_discriminator(srgan.arguments(["--out", "nowhere"]))
    still = not after["generator"]["detail.weight"].any()
    assert still == (pixel == 0 and adversarial == "0"), "its last layer starts at zero"
    for name, network in before.named_children():
        for key, value in network.named_parameters():
            assert not torch.equal(value, after[name][key]), f"{name}.{key} stood still"


@pytest.mark.parametrize("stop_after", [2, PER_EPOCH, PER_EPOCH + 1, 2 * PER_EPOCH + 2])
def test_resume_is_the_run_that_was_never_interrupted(photos, run, tmp_path, monkeypatch,
                                                      stop_after):
    """In the pixel phase, exactly between the phases, at the first adversarial step, and later."""
    asked = []

    def stop(self):  # as if Ctrl-C came during that step; the loop asks once in each
        asked.append(1)
        self.signal = signal.SIGINT if len(asked) == stop_after else None
        return self.signal is not None

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(fgssl.StopSignal, "__bool__", stop)
        train(photos, tmp_path)
    assert left.value.code == 130
    assert fgssl.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == stop_after
    srgan.main(["--out", str(tmp_path), "--resume"])
    resumed = fgssl.read_checkpoint(tmp_path / "checkpoint.pt")
    resumed["args"]["resume"] = False
    assert_same(run[1], resumed)


def test_a_checkpoint_without_one_of_its_parts_is_refused(photos, run, tmp_path):
    """Resume must not pass over a key that is missing (pitfalls 21, 23)."""
    state = dict(run[1])
    del state["ema"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="lacks ema"):
        srgan.main(["--out", str(tmp_path), "--resume"])


@pytest.mark.parametrize("loss, step", [("pixel_loss", 1), ("discriminator_loss", PER_EPOCH + 1),
                                        ("adversarial_loss", PER_EPOCH + 1)])
def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path, monkeypatch, loss, step):
    function = getattr(srgan, loss)
    monkeypatch.setattr(srgan, loss, lambda *a: function(*a) * math.nan)
    with pytest.raises(FloatingPointError, match=rf"nan at step {step}, .*diverged"):
        train(photos, tmp_path)
    assert fgssl.read_checkpoint(tmp_path / "diverged.pt")["step"] == step
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags", [
    ["--arch", "srgan-vgg"], ["--scale", "2"], ["--pixel-epochs", "0"], ["--match", "0"],
    ["--content", "features"]])
def test_other_roads_run_through(photos, tmp_path, flags):
    checkpoint, records = train(photos, tmp_path, "--epochs", "2", *flags)
    assert checkpoint["step"] == 2 * PER_EPOCH
    assert ("features" in records[-2]) == ("features" in flags), "the term that was asked for"


def test_the_encoder_of_another_run_can_be_the_content_loss(photos, run, tmp_path):
    file = str(run[0] / "checkpoint.pt")
    _, records = train(photos, tmp_path, "--content", "features", "--content-from", file)
    assert [r for r in records if "discriminator" in r][-1]["features"] > 0


@pytest.mark.parametrize("flags, error", [
    (["--pixel-epochs", "9"], "--pixel-epochs 9 is more than all --epochs 3"),
    (["--size", "18"], "--size 18 is not a multiple of --scale 4"),
    (["--scale", "8"], "--size 16 is not a multiple of --scale 8"),
    (["--content-from", "x.pt"], "--content-from is used by --content features"),
    (["--scale", "3"], "--scale"), (["--blocks", "0"], "--blocks"),
    (["--upscale", "x.png"], "go together"), (["--from", "x.pt"], "go together")])
def test_arguments_that_make_no_sense_are_named(photos, tmp_path, capsys, flags, error):
    with pytest.raises(SystemExit) as left:
        train(photos, tmp_path, *flags)
    assert left.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("flags, name, dim", [
    ([], "resnet10", 256), (["--encoder", "generator"], "generator", 8),
    (["--arch", "srgan-vgg"], "srgan-vgg", 512)])
def test_linear_eval_reads_either_network_beside_the_same_untrained(
        photos, run, tmp_path, monkeypatch, flags, name, dim):
    out = run[0]
    if "srgan-vgg" in flags:
        out, flags = tmp_path, []
        train(photos, out, "--arch", "srgan-vgg", "--epochs", "1", "--pixel-epochs", "0")
    seen, evaluate = [], linear_eval.evaluate

    def spy(network, *how):
        with torch.no_grad():
            seen.append(network.stages(noise(1, 3, 32, 32))[-1])
        return evaluate(network, *how)

    monkeypatch.setattr(linear_eval, "evaluate", spy)
    linear_eval.main([str(out / "checkpoint.pt"), "--precision", "fp32", *flags])
    untrained, trained = seen
    assert untrained.shape == trained.shape and untrained.shape[1] == dim
    assert not torch.equal(untrained, trained)
    folder = out / "generator" if name == "generator" else out
    assert json.loads((folder / "eval.json").read_text())["arch"] == name
    assert (folder / "probe.pt").exists() == (name != "generator"), "what --predict can read"
    if name == "generator":
        for more in (["--finetune"], ["--export", str(tmp_path / "encoder.pt")]):
            with pytest.raises(fgssl.UserError, match="generator is evaluated as it is"):
                linear_eval.main([str(out / "checkpoint.pt"), *more, *flags])
    if name == "srgan-vgg":
        linear_eval.main([str(out / "probe.pt"), "--export", str(tmp_path / "encoder.pt")])
        fgssl.load_encoder(tmp_path / "encoder.pt", name)
        linear_eval.main([str(out / "checkpoint.pt"), "--finetune", "--steps", "2"])
        linear_eval.main([str(out / "finetuned.pt"), "--predict",
                          str(next(photos.glob("*/*.png")))])


def test_only_a_run_of_this_script_has_a_generator(tmp_path):
    torch.save({"encoder": {}, "args": {}}, tmp_path / "simclr.pt")
    with pytest.raises(ValueError, match=r"simclr\.pt holds no generator"):
        linear_eval.main([str(tmp_path / "simclr.pt"), "--encoder", "generator"])
    with pytest.raises(SystemExit):
        linear_eval.main(["--init", "random", "--encoder", "generator"])
