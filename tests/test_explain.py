"""Retrieval, report, Grad-CAM, pictures: each against a plain definition."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import imagesets
import fgssl
import linear_eval
import pictures
from evaluation import explain, probe, report, retrieval

NAMES = ["ash", "elm", "oak"]
INFERENCE = probe.Inference(24, *fgssl.device_and_precision("fp32"))
PLAIN = ["--size", "24", "--precision", "fp32"]


@pytest.fixture(scope="module")
def evaluated(shades, tmp_path_factory):
    """A folder with eval.json, probe.pt and all, of an untrained encoder on three shades."""
    out = tmp_path_factory.mktemp("evaluated")
    linear_eval.main(["--init", "random", *PLAIN, "--data", str(shades), "--out", str(out),
                      "--shots", "1", "2", "--draws", "3"])
    return out


@pytest.fixture(scope="module")
def frozen(shades):
    torch.manual_seed(0)
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    return probe.evaluate(fgssl.resnet("resnet10"), splits, NAMES, INFERENCE, ("4",))[1]


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_retrieval_is_the_plain_loop(chunk):
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3] * 3 + [4])
    h = torch.randn(31, 6, generator=rng) + F.one_hot(labels % 6, 6)
    first, precision = [], []
    for i in range(31):
        sim = [float(F.cosine_similarity(h[i], h[j], 0)) for j in range(31)]
        others = sorted((j for j in range(31) if j != i), key=lambda j: -sim[j])
        ranks = [r for r, j in enumerate(others, 1) if labels[j] == labels[i]]
        if ranks:
            first.append(ranks[0])
            precision.append(np.mean([n / r for n, r in enumerate(ranks, 1)]))
    assert len(first) == 30, "the one image of class 4 has nothing to find"
    found, average = retrieval.ranking(h, labels, chunk)
    assert found.tolist() == first
    np.testing.assert_allclose(average, precision, rtol=1e-5)  # fp32 sums of at most 31 terms
    result = retrieval.retrieval(h, labels)
    assert result["queries"] == 30 and result["rank1"] == 100 * np.mean(np.array(first) == 1)
    assert result["map"] == pytest.approx(100 * np.mean(precision), rel=1e-5)


def test_one_image_a_class_leaves_nothing_to_retrieve(shades, tmp_path):
    """Every query is excluded: no number, rather than NaN or 0; and the rest still runs."""
    for split in ("train", "val", "test"):
        for name in NAMES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            image = Image.open(shades / split / name / "0.png")
            image.save(tmp_path / "data" / split / name / "0.png")
    linear_eval.main(["--init", "random", *PLAIN, "--data", str(tmp_path / "data"), "--shots", "5",
                      "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["random_init"]["rank1"] is None and result["random_init"]["queries"] == 0
    assert result["few_labels"][0]["images"] == 3


def test_the_report_names_the_worst_and_what_they_are_taken_for():
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3])
    predicted = torch.tensor([0, 1, 1, 1, 1, 0, 4])
    scores = F.one_hot(predicted, 7).float() + 0.1 * F.one_hot(labels, 7)
    found, confusion = report.class_report(scores, labels, list("abcdefg"))
    assert found["top1"] == pytest.approx(300 / 7) and found["top5"] == 100
    assert found["mean_per_class"] == pytest.approx((100 / 3 + 100) / 3), "an absent class is out"
    assert [row["class"] for row in found["worst"]] == ["d", "a", "b"]
    assert found["worst"][1]["taken_for"] == "b" and found["worst"][1]["times"] == 2
    assert found["classes"][2] == {"class": "c", "images": 0, "precision": None, "recall": None,
                                    "f1": None}
    assert confusion[3].tolist() == [1, 0, 0, 0, 1, 0, 0]


def test_confusion_csv_is_the_matrix(evaluated):
    first, *rows = csv.reader(open(evaluated / "confusion.csv"))
    assert first[1:] == NAMES == [row[0] for row in rows]
    counts = np.array([row[1:] for row in rows], int)
    result = json.loads((evaluated / "eval.json").read_text())
    assert counts.sum(1).tolist() == [9, 9, 9], "rows are true classes"
    assert 100 * np.trace(counts) / 27 == pytest.approx(result["random_init"]["linear"])
    assert [row["recall"] for row in result["report"]["classes"]] == pytest.approx(
        (100 * np.diag(counts) / 9).tolist())


def test_grad_cam_of_a_linear_score_is_the_class_activation_map(frozen):
    """For a linear head on averaged maps it is the map weighted by the class's row (Zhou et al.
    2016): of the whole stage's output, for half of that came through the shortcut."""
    images = torch.randint(0, 256, (3, 3, 72, 72), dtype=torch.uint8).numpy()
    x, _, class_cam, _ = explain.explain(frozen, images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = frozen.encoder.stages(fgssl.normalize(x))[-1]
        row = frozen.head.weight[frozen.head(maps.mean((2, 3))).argmax(1)]
        expected = (row[:, :, None, None] * maps).sum(1).clamp(min=0) / maps[0, 0].numel()
    assert class_cam.shape == expected.shape, (
        f"shape {tuple(class_cam.shape)}, wanted (B, h, w) = {tuple(expected.shape)}: what is "
        "summed over, what is kept?")
    assert torch.allclose(class_cam, expected, rtol=1e-4, atol=1e-6), (       # sums reordered
        "of a linear score the map is that of the class's weights, negative sums set to 0: when "
        "is 0 the limit, before or after the sum over channels?")


def test_grad_cam_of_an_uneven_score_has_one_weight_a_channel():
    """Gradients taken place by place, or averaged over the batch too, are another map."""
    rng = torch.Generator().manual_seed(0)
    maps, slope = torch.randn(2, 2, 5, 3, 4, generator=rng)
    cam = explain.grad_cam(maps, lambda m: (m * slope).sum((1, 2, 3)))
    wanted = torch.einsum("bc,bchw->bhw", slope.mean((2, 3)), maps).clamp(min=0)
    assert cam.shape == wanted.shape, f"shape {tuple(cam.shape)}, wanted {tuple(wanted.shape)}"
    assert torch.allclose(cam, wanted, rtol=1e-5, atol=1e-6), (               # float32 sums of 12
        f"{(cam - wanted).abs().max():.2g} off: one weight for each channel of each image, the "
        "global average pool of its gradient. Over which axes is your mean?")


def test_similarity_of_two_views_lights_what_they_share():
    """Of a map with one feature on each side, the side that the other view has too."""
    maps = torch.zeros(1, 2, 4, 8)
    maps[0, 0, 1, 1], maps[0, 1, 2, 6] = 1, 1
    other = torch.tensor([[0.0, 1.0]])
    cam = explain.grad_cam(maps, lambda m: F.cosine_similarity(m.mean((2, 3)), other))
    assert cam.shape == (1, 4, 8), f"shape {tuple(cam.shape)}, wanted (1, 4, 8)"
    assert cam[0].argmax() == 2 * 8 + 6, (
        f"brightest at {divmod(cam[0].argmax().item(), 8)}, wanted (2, 6), which the views share")
    assert cam[0, 1, 1] == 0, "what speaks against the score is dropped"


def test_a_map_of_zeros_is_no_division_by_zero():
    zeros = explain.grad_cam(torch.rand(2, 3, 4, 4), lambda m: -m.sum((1, 2, 3)))
    assert (zeros == 0).all(), "every place speaks against this score: the map is 0 everywhere"
    assert (explain.resize_cam(zeros, 16, 16) == 0).all()
    assert explain.overlay(torch.rand(2, 3, 16, 16), zeros).isfinite().all()
    assert np.isnan(explain.energy_inside(zeros, np.ones((2, 16, 16), bool))).all()


def test_an_overlay_on_a_wide_image_is_lit_where_the_map_is():
    """A map stretched to a square, or with its axes exchanged, lights another place."""
    cam = torch.zeros(1, 3, 9)
    cam[0, 2, 7] = 5.0
    lit = explain.overlay(torch.ones(1, 3, 30, 90), cam)[0].mean(0)
    assert lit.shape == (30, 90)
    assert lit[25, 75] > 0.95, "row 2 of 3, column 7 of 9"
    assert lit[5, 75] < 0.35 and lit[25, 5] < 0.35


@pytest.mark.parametrize("size", [(96, 96), (160, 90), (75, 130)])
def test_a_box_lies_on_what_it_was_drawn_around(tmp_path, size):
    """In the view, after the centre square, the cache and the evaluation crop; here the path of
    the pixels themselves is the reference."""
    left, top = size[0] // 2 - 18, size[1] // 2 - 10
    for name, (x, y) in (("a", (left, top)), ("b", (left + 20, top - 14))):
        image = Image.new("RGB", size)
        ImageDraw.Draw(image).rectangle((x, y, x + 23, y + 29), "white")  # 24 x 30 pixels
        image.save(tmp_path / f"{name}.png")
    records = imagesets.Records([tmp_path / "a.png", tmp_path / "b.png"], np.zeros(2, int), ["x"],
                               np.array(["test"] * 2),
                               np.array([[left, top, 24, 30], [left + 20, top - 14, 24, 30]]))
    masks = explain.boxes_in_view(records, [1, 0], 64)
    for mask, path in zip(masks, records.paths[::-1]):
        x = torch.from_numpy(fgssl.decode(path, fgssl.cache_side(64)).copy())[None]
        white = (fgssl.evaluation_view(x, 64)[0, 0] > 0.5).numpy()
        assert white.any() and (mask & white).sum() / (mask | white).sum() > 0.9, "an edge apart"


def test_the_outline_of_a_box_beyond_the_view_is_closed_at_its_rim():
    """Left open, the box of a bird that fills the view was two lines across the picture."""
    mask = torch.zeros(1, 1, 6, 6)
    mask[0, 0, 1:5, 3:] = 1
    inner = torch.zeros(6, 6, dtype=torch.bool)
    inner[2:4, 4] = True
    assert torch.equal(explain.outline(mask)[0, 0], (mask[0, 0] > 0) & ~inner)


def test_energy_is_shared_as_the_area_is():
    masks = np.zeros((2, 32, 32), bool)
    masks[:, :, :8] = True
    cam = torch.ones(2, 4, 4)
    cam[1, :, 1:] = 0
    even, within = explain.energy_inside(cam, masks)
    assert even == pytest.approx(25) and within > 75, "bilinear: a map's edge is half a cell soft"


def test_boxes_are_measured_where_the_set_has_them(toy_root, tmp_path):
    data = fgssl.load_data("toy", toy_root)
    test = data.cached("test", 64)
    assert (data.records.labels[test.rows] == test.labels).all()
    torch.manual_seed(0)
    encoder, head = fgssl.resnet("resnet10").eval(), torch.nn.Linear(256, 20)
    frozen = probe.Frozen(encoder, (None, None, test), data.classes,
                          INFERENCE._replace(size=16), {}, "4", head, {}, None)
    cam = explain.grad_cam_study(tmp_path / "a.png", frozen, data.records)
    assert 50 < cam["box_of_view"] < 90, "toy birds fill their pictures"
    assert all(0 < cam[name] <= 100 for name in ("class_score_in_box", "similarity_in_box"))
    Image.open(tmp_path / "a.png").verify()


def test_rows_skip_the_files_that_were_skipped(shades, tmp_path):
    """Boxes and names of the next image, else: they are looked up by row."""
    for i in range(4):
        for split in ("train", "val", "test"):
            for name in ("ash", "elm")[:1 + (split == "train")]:  # one class is no set
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (9, 9), (60 * i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "test" / "ash" / "1.png").write_bytes(b"no image")
    data = fgssl.load_data(tmp_path, skip_bad=True)
    test = data.cached("test", 16)
    assert [data.records.paths[row].name for row in test.rows] == ["0.png", "2.png", "3.png"]
    assert test.images[:, 0, 5, 5].tolist() == [0, 120, 180]


def test_the_sheet_frames_right_in_green_and_wrong_in_broken_red(tmp_path):
    images = np.full((4, 3, 56, 56), 255, np.uint8)
    split = fgssl.Split(images, np.array([0, 0, 1, 1]))
    h = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.3], [0, 1]])
    retrieval.retrieval_sheet(tmp_path / "a.png", h, split, ["ash", "elm"], count=1)
    sheet = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    green, red = sheet[..., 1] - sheet[..., 0] > 80, sheet[..., 0] - sheet[..., 1] > 120
    columns = [hit.any(0).nonzero()[0] for hit in (green, red)]
    assert columns[0].max() < columns[1].min(), "the nearest is right, the other two are wrong"
    assert green.sum() > 0.55 * red.sum() and red.sum() < 1.6 * green.sum(), "two, in dashes"


def test_the_map_shows_every_image_once(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "scatter", lambda groups, x, y, rest: drawn.update(
        groups=groups, rest=rest, titles=(x, y)) or Image.new("RGB", (8, 8)))
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 20
    report.feature_map(tmp_path / "a.png", torch.randn(200, 9, generator=rng), labels.numpy(),
                            [f"class {i}" for i in range(20)])
    assert len(drawn["groups"]) == 14 and len(drawn["rest"][0]) == 60
    assert all(len(xs) == len(ys) == 10 for xs, ys in drawn["groups"].values())
    h = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2]])  # fewer classes and dimensions than colours
    report.feature_map(tmp_path / "a.png", h, np.array([0, 1, 1]), ["a", "b", "c"])
    assert list(drawn["groups"]) == ["a", "b"] and "100 %" in drawn["titles"][0]
