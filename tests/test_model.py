"""ResNet, the loaders of its weights, and what measures its features.

The references are written from the papers and from the names in torchvision's weight files.
"""

import argparse
import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fgssl

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3),
          "resnet101": (3, 4, 23, 3)}
CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def torchvision_shapes(arch):
    """{name: shape} of every tensor in torchvision's file for `arch`, less fc, by its naming rule.

    Stage s is layer1 to layer4, of 64, 128, 256 and 512 channels; block i of it is layer<s>.<i>. A
    basic block holds two 3x3 convolutions; a bottleneck 1x1, 3x3, 1x1, the last 4 times as wide.
    Where the shape changes, downsample.0 is a 1x1 convolution and downsample.1 its batch-norm.
    """
    shapes = {}

    def convolution(name, norm, outside, inside, side):
        shapes[f"{name}.weight"] = (outside, inside, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outside,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution("conv1", "bn1", 64, 3, 7)
    inside = 64
    for stage, count in enumerate(BLOCKS[arch]):
        width = 64 * 2 ** stage
        outside = width if arch in ("resnet18", "resnet34") else 4 * width
        for i in range(count):
            at = f"layer{stage + 1}.{i}"
            if outside == width:
                sides = [(width, inside, 3), (width, width, 3)]
            else:
                sides = [(width, inside, 1), (width, width, 3), (outside, width, 1)]
            for k, (wide, narrow, side) in enumerate(sides, 1):
                convolution(f"{at}.conv{k}", f"{at}.bn{k}", wide, narrow, side)
            if i == 0 and (stage > 0 or outside != inside):
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", outside, inside, 1)
            inside = outside
    return shapes


def functional_resnet(w, x, blocks):
    """The features of a torchvision state dict `w` in eval mode, in F.conv2d and F.batch_norm."""
    def conv_bn(x, conv, bn, stride=1):
        kernel = w[f"{conv}.weight"]
        y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)
        return F.batch_norm(y, w[f"{bn}.running_mean"], w[f"{bn}.running_var"], w[f"{bn}.weight"],
                            w[f"{bn}.bias"])

    x = F.max_pool2d(F.relu(conv_bn(x, "conv1", "bn1", 2)), 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, stride, y = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1, x
            depth = 3 if f"{at}.conv3.weight" in w else 2
            for k in range(1, depth + 1):  # the stride sits on the first 3x3
                y = conv_bn(y, f"{at}.conv{k}", f"{at}.bn{k}", stride if k == depth - 1 else 1)
                y = F.relu(y) if k < depth else y
            if f"{at}.downsample.0.weight" in w:
                x = conv_bn(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = F.relu(x + y)
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


def with_statistics(encoder):
    """The same with batch-norm statistics, scales and shifts that show where each is left out."""
    rng = seeded(1)
    for name, tensor in encoder.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            if name.endswith(("running_mean", "bias")):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=rng))
            elif name.endswith(("running_var", "weight")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
    return encoder


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [fgssl.BasicBlock, fgssl.Bottleneck])
def test_the_gradient_of_a_map_of_one_pixel_is_not_read_from_stray_memory(block):
    """oneDNN's bf16 gradient of a strided 3x3 convolution is, there: free memory is made NaN first,
    as it may be, and would show in the weights."""
    torch.manual_seed(0)
    network = block(64, 64, 2).to(memory_format=torch.channels_last)
    x = torch.randn(8, 64, 1, 1).contiguous(memory_format=torch.channels_last)
    gradients = {}
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", kind, enabled=kind == torch.bfloat16):
            loss = network(x).float().square().sum()
        stray = [torch.full((4 ** power,), torch.nan) for power in range(3, 11) for _ in range(8)]
        del stray
        gradients[kind] = torch.autograd.grad(loss, list(network.parameters()))
    for exact, rounded in zip(*gradients.values()):
        assert (exact - rounded).norm() <= 0.05 * exact.norm() + 1e-3, "bf16 rounds to 0.4 %"


@pytest.mark.parametrize("arch, count", [("resnet18", 11_176_512), ("resnet34", 21_284_672),
                                         ("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_names_shapes_and_counts_are_torchvisions(arch, count):
    with torch.device("meta"):  # shapes without memory
        encoder = fgssl.resnet(arch)
    assert sum(p.numel() for p in encoder.parameters()) == count
    ours = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    wanted = torchvision_shapes(arch)
    assert ours.keys() == wanted.keys(), f"names that differ: {ours.keys() ^ wanted.keys()}"
    assert ours == wanted


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_forward_and_gradient_are_those_of_the_plain_functions(arch):
    """Catches a stride on the wrong convolution, a lost ReLU, norm, shortcut or mean."""
    encoder = with_statistics(fgssl.resnet(arch)).double().eval()
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64, generator=seeded())
    h = encoder(x)
    w = {k: v.clone() for k, v in encoder.state_dict().items()}
    for name, _ in encoder.named_parameters():
        w[name].requires_grad_()
    wanted = functional_resnet(w, x, BLOCKS[arch])
    cotangent = torch.randn(wanted.shape, dtype=torch.float64, generator=seeded(2))
    h.backward(cotangent)
    wanted.backward(cotangent)
    # float64, about 50 layers: rounding of 1e-16 a sum
    assert h.shape == wanted.shape and torch.allclose(h, wanted, rtol=1e-9, atol=0)
    for name, p in encoder.named_parameters():
        error = (p.grad - w[name].grad).norm() / w[name].grad.norm()
        assert error < 1e-9, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("arch, dim, stem", [("resnet10", 256, 2), ("resnet18", 512, 4),
                                             ("resnet50", 2048, 4)])
@pytest.mark.parametrize("height, width", [(64, 64), (33, 47), (5, 1)])
def test_each_stage_halves_the_map_and_odd_sizes_pass(arch, dim, stem, height, width):
    encoder = fgssl.resnet(arch).eval()
    x = torch.randn(2, 3, height, width, generator=seeded())
    with torch.no_grad():
        h, maps = encoder(x), encoder.stages(x)
    assert encoder.dim == dim and h.shape == (2, dim) and h.isfinite().all()
    assert torch.equal(h, maps[3].mean((2, 3)))
    for stage, map in enumerate(maps):
        down = stem * 2 ** stage
        wanted = (2, dim // 2 ** (3 - stage), math.ceil(height / down), math.ceil(width / down))
        assert map.shape == wanted, f"stage {stage + 1}"


def test_initial_weights_keep_the_variance_of_gradients():
    """He et al. 2015, fan-out, as torchvision: variance 2 / (outputs x kernel area)."""
    for name, p in fgssl.resnet("resnet18").named_parameters():
        if p.dim() == 4:
            wanted = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
            # of n draws the deviation is known to 1 / sqrt(2 n); 5 of these
            assert abs(p.std().item() / wanted - 1) < 5 / math.sqrt(2 * p.numel()), name
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="resnet19.*resnet18.*resnet101"):
        fgssl.resnet("resnet19")


# ------------------------------------------------------------------------------------------------
# Weights from files
# ------------------------------------------------------------------------------------------------


def test_load_weights_lists_every_key_that_does_not_fit_and_changes_nothing():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    before = copy.deepcopy(module.state_dict())
    state = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(5, 2), "1.bias": torch.ones(5),
             "2.weight": torch.ones(1), "extra": torch.ones(1)}
    with pytest.raises(ValueError) as error:
        fgssl.load_weights(module, state, "some file")
    for part in ("some file", "missing 0.bias", "unexpected 2.weight", "unexpected extra",
                 "1.weight is (5, 2), wanted (4, 2)", "1.bias is (5,), wanted (4,)"):
        assert part in str(error.value), f"{part!r} is not in: {error.value}"
    assert "0.weight" not in str(error.value), "it fits"
    assert all(torch.equal(module.state_dict()[k], before[k]) for k in before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(file, encoder) of a run of ours."""
    file, encoder = tmp_path_factory.mktemp("run") / "checkpoint.pt", fgssl.resnet("resnet10")
    args = argparse.Namespace(arch="resnet10", size=64, data="toy")
    with_statistics(encoder)
    fgssl.save(file, 7, args, seeded(), encoder=encoder, head=torch.nn.Linear(2, 2))
    return file, encoder


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_our_checkpoint_brings_its_architecture_and_arguments(checkpoint):
    file, encoder = checkpoint
    loaded, run = fgssl.load_encoder(file)
    assert_same_weights(loaded, encoder)
    assert (run["arch"], run["size"], run["data"]) == ("resnet10", 64, "toy")
    assert_same_weights(fgssl.load_encoder(file, "resnet10")[0], encoder)


def test_an_architecture_asked_for_in_vain_is_an_error(checkpoint):
    """Else an evaluation would report one network under the name of another."""
    with pytest.raises(ValueError, match="resnet10.*resnet18"):
        fgssl.load_encoder(checkpoint[0], "resnet18")


@pytest.mark.parametrize("counters", [True, False], ids=["new file", "file of before 2018"])
def test_a_torchvision_file_loads_with_its_classifier_left_out(tmp_path, counters):
    """torchvision's first weight files, still the most common, lack num_batches_tracked."""
    encoder = with_statistics(fgssl.resnet("resnet18"))
    state = {k: v for k, v in encoder.state_dict().items()
             if counters or not k.endswith("num_batches_tracked")}
    torch.save({**state, "fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
               tmp_path / "resnet18.pth")
    loaded, run = fgssl.load_encoder(tmp_path / "resnet18.pth", "resnet18")
    assert_same_weights(loaded, encoder)
    assert run == {}
    with pytest.raises(ValueError, match="resnet18.pth.*--arch"):
        fgssl.load_encoder(tmp_path / "resnet18.pth")


def test_dataparallels_prefix_is_left_out_and_a_wrapped_file_says_what_it_holds(tmp_path):
    """PyTorch's ImageNet example writes module.conv1.weight, into state_dict of a larger dict."""
    encoder = with_statistics(fgssl.resnet("resnet10"))
    state = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    torch.save(state | {"module.fc.weight": torch.ones(9, 256)}, tmp_path / "a.pth")
    assert_same_weights(fgssl.load_encoder(tmp_path / "a.pth", "resnet10")[0], encoder)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth is neither.*it holds epoch, state_dict"):
        fgssl.load_encoder(tmp_path / "b.pth", "resnet10")


def test_a_state_dict_of_another_architecture_is_refused_key_by_key(tmp_path):
    torch.save(fgssl.resnet("resnet18").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        fgssl.load_encoder(tmp_path / "a.pth", "resnet50")
    here, there = torchvision_shapes("resnet18"), torchvision_shapes("resnet50")
    lines = str(error.value).splitlines()[1:]
    for name in there.keys() | here.keys():
        if here.get(name) != there.get(name) and not name.endswith("num_batches_tracked"):
            assert any(name in line.split() for line in lines), f"{name} is not listed"


def test_what_is_no_checkpoint_is_refused_by_name(checkpoint, tmp_path):
    whole, bad = checkpoint[0].read_bytes(), tmp_path / "bad.pt"
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    cut = [whole[:n] for n in (0, 10, len(whole) // 2, len(whole) - 50)]
    for content in (*cut, png.getvalue(), b"hello\n"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt is no checkpoint"):
            fgssl.load_encoder(bad, "resnet10")
    for value in ([1, 2], torch.ones(2), {}, {"model": {"conv1.weight": torch.ones(2)}}):
        torch.save(value, bad)
        with pytest.raises(ValueError, match="bad.pt"):
            fgssl.load_encoder(bad, "resnet10")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pt"):
        fgssl.load_encoder(tmp_path / "absent.pt")


class Intruder:
    """A pickle runs what __reduce__ returns: this one writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def bare_pickle(value, file):
    file.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, bare_pickle])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path, write):
    file, mark = tmp_path / "evil.pt", tmp_path / "mark"
    write({"encoder": Intruder(mark), "args": {"arch": "resnet10"}}, file)
    with pytest.raises(ValueError, match="evil.pt is no checkpoint"):
        fgssl.load_encoder(file)
    assert not mark.exists(), "loading a checkpoint ran the code in it"
    pickle.loads(pickle.dumps(Intruder(mark)))
    assert mark.exists(), "this test's own intruder is harmless: it proves nothing"


# ------------------------------------------------------------------------------------------------
# Features and what is made of them
# ------------------------------------------------------------------------------------------------


def uint8_images(n, side=18, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_encoder_as_it_was_to_the_bit(training):
    encoder = with_statistics(fgssl.resnet("resnet10")).train(training)
    before = copy.deepcopy(encoder.state_dict())
    images, labels = uint8_images(20), np.arange(20) % 2
    h = fgssl.features(encoder, images, 16, CPU)
    split = fgssl.Split(images, labels)
    fgssl.knn_check(encoder, split, split, 16, CPU, torch.autocast("cpu", enabled=False))
    for name, tensor in encoder.state_dict().items():  # buffers too: batch-norm learns in silence
        assert torch.equal(tensor, before[name]), f"{name} changed while only measuring"
    assert all(module.training == training for module in encoder.modules()), "mode not restored"
    assert not h.requires_grad and h.shape == (20, 256) and h.dtype == torch.float32


def test_a_feature_depends_on_its_image_alone():
    """In train mode, or with a last batch dropped or repeated, it would not."""
    encoder, images = with_statistics(fgssl.resnet("resnet10")), uint8_images(11)
    whole = fgssl.features(encoder, images, 16, CPU)
    for batch in (1, 4, 11):
        again = fgssl.features(encoder, images, 16, CPU, batch=batch)
        # 1e-4 of values about 1: convolutions of other batch sizes add in another order
        assert torch.allclose(again, whole, atol=1e-4)
    assert torch.allclose(fgssl.features(encoder, images[7:8], 16, CPU), whole[7:8], atol=1e-4)
    view = fgssl.normalize(fgssl.evaluation_view(torch.from_numpy(images), 16))
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(view), whole, atol=1e-4), "h of the evaluation view"
    assert fgssl.features(encoder, images[:0], 16, CPU).shape == (0, 256)


@pytest.mark.parametrize("k", [1, 3, 7, 200])
def test_knn_is_the_weighted_vote_of_wu_et_al(k):
    h, h_test = torch.randn(40, 3, generator=seeded()), torch.randn(60, 3, generator=seeded(1))
    labels = torch.randint(0, 5, (40,), generator=seeded(2))
    wanted = []
    for query in h_test.double():
        near = []
        for row, label in zip(h.double(), labels.tolist()):
            similarity = (query @ row / query.norm() / row.norm()).item()
            near.append((similarity, label))
        votes = [0.0] * 6
        for similarity, label in sorted(near, reverse=True)[:k]:
            votes[label] += math.exp(similarity / 0.07)
        wanted.append(votes.index(max(votes)))
    assert fgssl.knn(h, labels, h_test, k, 6).tolist() == wanted, (
        f"the {k} of greatest cosine (of 40 at most all) vote with the weight exp(cosine / 0.07). "
        "Are both sides of unit length? Who votes, and how much is each vote?")
    scaled = fgssl.knn(1e3 * h, labels, 1e-3 * h_test, k, 6)
    assert scaled.tolist() == wanted, "the cosine knows no length"


def test_one_close_neighbour_outvotes_two_distant_ones():
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = fgssl.knn(h, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), 3, 2)
    assert found.tolist() == [0], (
        "one neighbour of cosine 0.995 against two of at most 0.2: which votes are larger?")


def test_accuracy_is_a_percentage_and_of_nothing_is_not_a_number():
    assert fgssl.accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])) == 75
    assert math.isnan(fgssl.accuracy(torch.tensor([]), torch.tensor([])))


def test_knn_check_needs_labels_on_both_sides_and_ignores_unlabelled_train_images():
    encoder, images = fgssl.resnet("resnet10"), uint8_images(8)
    off = torch.autocast("cpu", enabled=False)
    labels, unknown = np.arange(8) % 2, np.full(8, -1)
    split, bare = fgssl.Split(images, labels), fgssl.Split(images, unknown)
    nothing = fgssl.Split(images[:0], labels[:0])
    for train, val in ((bare, split), (split, bare), (split, nothing)):
        assert fgssl.knn_check(encoder, train, val, 16, CPU, off) is None
    half = fgssl.Split(images, np.where(np.arange(8) < 4, labels, -1))
    first = fgssl.Split(images[:4], labels[:4])
    assert fgssl.knn_check(encoder, half, first, 16, CPU, off, k=1) == 100, "each finds itself"
