"""Photographs named by a classifier, explored without one, and enlarged: what people ask."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from test_srgan import run, srgan  # noqa: F401

import fgssl
import linear_eval
from evaluation import classifier, predict, similarity


@pytest.fixture(scope="module")
def evaluated(shades, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    linear_eval.main(["--init", "random", "--size", "24", "--precision", "fp32", "--data",
                      str(shades), "--out", str(out)])
    return out


def table(file):
    return list(csv.DictReader(open(file, encoding="utf-8-sig", newline="")))


def test_files_folders_patterns_and_standard_input(shades, tmp_path, monkeypatch):
    folder = shades / "test" / "ash"
    every = sorted(map(str, folder.glob("*.png")))
    assert predict.expand([str(folder)]) == every
    assert predict.expand([str(folder / "*.png"), every[0]]) == every, "each once"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*every[:2], ""])))
    assert predict.expand(["-"]) == every[:2]
    assert predict.expand([str(tmp_path / "no*.png")]) == [str(tmp_path / "no*.png")], "is named"


def test_the_table_has_a_row_for_each_file(shades, evaluated, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, level in enumerate((40, 120, 200)):
        Image.open(shades / "train" / ("ash", "elm", "oak")[i] / "0.png").save(photos / f"{i}.png")
    (photos / "bad.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    with pytest.raises(SystemExit):
        linear_eval.main([str(evaluated / "probe.pt"), "--predict", str(photos), "--precision",
                          "fp32", "--csv", str(tmp_path / "found.csv")])
    rows = {row["file"].split("/")[-1]: row for row in table(tmp_path / "found.csv")}
    assert list(rows) == ["0.png", "1.png", "2.png", "bad.png", "noise.png"]
    assert [rows[f"{i}.png"]["class"] for i in range(3)] == ["ash", "elm", "oak"]
    for i, name in enumerate(("ash", "elm", "oak")):
        row = rows[f"{i}.png"]
        assert row["nearest training image"] == str(shades / "train" / name / "0.png")
        assert float(row["probability"]) >= float(row["probability 2"]) >= 0
        assert 0 <= float(row["confidence"]) <= 1 and row["note"] == ""
    assert rows["bad.png"]["class"] == "" and "cannot read" in rows["bad.png"]["note"]
    assert "unlike every training image" in rows["noise.png"]["note"]
    err = capsys.readouterr().err
    assert "4 of 5 images classified, 1 cannot be read, 1 are unlike" in err
    Image.open(tmp_path / "found.png").verify()


def test_the_probe_for_use_learned_from_all_labels_after_its_figures(shades, evaluated):
    loaded = classifier.load_all(evaluated / "probe.pt")
    figures = json.loads((evaluated / "eval.json").read_text())["random_init"]
    assert loaded.run["refitted"] and loaded.run["accuracy"] == figures["linear"]
    assert len(loaded.run["files"]) == len(loaded.memory.h) == 36 + 18 + 27
    splits = linear_eval.labelled_splits(fgssl.load_data(shades), 24)
    inference = (24, *fgssl.device_and_precision("fp32"))
    h = torch.cat([fgssl.features(loaded.model.layers, s.images, *inference) for s in splits])
    y = torch.cat([torch.from_numpy(s.labels) for s in splits])
    mean, std = h.mean(0), h.std(0).clamp(min=1e-6)
    weight = classifier.fit_linear((h - mean) / std, y, 3, figures["l2"])
    torch.testing.assert_close(loaded.model.head(h).softmax(1), torch.softmax(
        (h - mean) / std @ weight[:-1] + weight[-1], 1), atol=2e-3, rtol=0)  # the optimizer's


def test_confidence_is_how_many_such_were_right():
    h = torch.arange(8.0)[:, None]
    scores = torch.stack([torch.linspace(0.1, 4, 100), torch.zeros(100)], 1)
    labels = (torch.arange(100) < 50).long()                 # the surer half is right
    memory = classifier.Memory((h, h, h), scores, labels)
    low, high = memory.confidence(torch.tensor([0.5, 0.99]), count=20).tolist()
    assert (low, high) == (0, 1)


# Exploring ----------------------------------------------------------------------------------------


def blobs(classes=4, each=30, dim=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    return 8 * torch.eye(dim)[labels] + torch.randn(len(labels), dim, generator=rng), labels.numpy()


def test_neighbours_are_the_most_similar_others(monkeypatch):
    x, _ = blobs()
    monkeypatch.setattr(fgssl, "MOST", 500)                  # in parts
    values, near = similarity.neighbours(x, 3)
    unit = x / x.norm(dim=1, keepdim=True)
    sim = (unit @ unit.T).fill_diagonal_(-2)
    assert torch.equal(near, sim.topk(3).indices)


def test_wrong_labels_come_first():
    x, labels = blobs(each=50)
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(labels), 10, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4
    probability = similarity.label_probabilities(x, labels, 4)
    own = probability[np.arange(len(labels)), labels]
    assert set(own.argsort()[:10].tolist()) == set(wrong.tolist())


def test_clusters_are_the_blobs_and_medoids_are_members():
    x, labels = blobs()
    member, medoids = similarity.clusters(x, 4)
    assert sorted(len(set(labels[(member == c).numpy()])) for c in range(4)) == [1] * 4
    assert [int(member[m]) for m in medoids] == [0, 1, 2, 3]
    assert len(similarity.clusters(torch.ones(5, 3), 3)[1]) == 1, "equal images are one cluster"


def test_the_next_to_label_is_the_farthest():
    x, labels = blobs()
    known = torch.zeros(len(x), dtype=torch.bool)
    known[:30] = True                                        # one class is labelled
    chosen = [labels[i] for i, _ in similarity.farthest_first(x, known, 3)]
    assert sorted(chosen) == [1, 2, 3], "one of each other class"
    known[:] = False
    assert len({i for i, _ in similarity.farthest_first(x, known, 500)}) == len(x), "each once"


def test_a_folder_is_explored(shades, evaluated, tmp_path, capsys):
    """Loose and labelled photographs, a copy that was resized, one that cannot be read."""
    folder, rng = tmp_path / "mine", np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            small = rng.normal(level, 30, (6, 6, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(small).resize((96, 96), Image.BICUBIC).save(folder / name / f"{i}.png")
    for i in range(4):
        small = rng.normal(120, 40, (6, 6, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(small).resize((96, 96), Image.BICUBIC).save(folder / f"{i}.png")
    Image.open(folder / "dark" / "3.png").resize((61, 61)).save(folder / "copy.jpg", quality=80)
    (folder / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    argv = [str(evaluated / "probe.pt"), "--explore", str(folder), "--out", str(out)]
    linear_eval.main(argv)
    assert "29 images, 24 with a label; 1 cannot be read" in capsys.readouterr().out
    assert [row["file"] for row in table(out / "unreadable.csv")] == [str(folder / "bad.jpg")]
    pair, = table(out / "duplicates.csv")
    assert {pair["file"], pair["duplicate"]} == {str(folder / "copy.jpg"),
                                                 str(folder / "dark" / "3.png")}
    for name, count in (("neighbours", 29), ("outliers", 29), ("clusters", 29),
                        ("doubtful_labels", 24), ("label_next", 5), ("embeddings", 29)):
        assert len(table(out / f"{name}.csv")) == count, name
    kept = np.load(out / "embeddings.npz")
    assert kept["h"].shape == (29, 256) and len(kept["files"]) == 29
    clusters = {row["cluster"] for row in table(out / "clusters.csv")}
    assert {file.stem for file in (out / "clusters").glob("*.png")} == clusters
    text = (out / "explore.html").read_text(encoding="utf-8")
    assert "Which labels are wrong?" in text and "http:" not in text and "https:" not in text
    linear_eval.main(argv)                                   # again: the folder's own
    with pytest.raises(fgssl.UserError, match="in another folder.*--out"):
        linear_eval.main([*argv[:2], str(folder / "dark"), *argv[3:]])


# Enlarging ----------------------------------------------------------------------------------------


def test_alpha_and_profile_are_kept(run, tmp_path):  # noqa: F811
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 4, 6))
    image.save(tmp_path / "a.png", icc_profile=profile)
    srgan.main(["--upscale", str(tmp_path / "a.png"), "--from", str(run[0] / "checkpoint.pt")])
    high = Image.open(tmp_path / "a_x4.png")
    assert high.mode == "RGBA" and high.size == (32, 24) and high.info["icc_profile"] == profile
    alpha = np.asarray(high)[..., 3]
    assert alpha[12, 2] == 0 and alpha[12, 29] == 255


def test_no_two_images_share_an_output_and_a_bad_one_ends_nothing(run, tmp_path, capsys):  # noqa: F811
    for name in ("a.png", "a.jpg", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), "red").save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [str(tmp_path / name) for name in ("bad.png", "a.png", "a.jpg", "b/a.png", "a.png")]
    with pytest.raises(fgssl.UserError, match="1 of 4 images are not enlarged.*bad.png"):
        srgan.main(["--upscale", *files, "--from", str(run[0] / "checkpoint.pt"), "--out",
                    str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_x4.png", "a_x4_2.png",
                                                                    "a_x4_3.png"]


def test_an_image_that_is_too_large_is_refused_by_its_limit(tmp_path, monkeypatch):
    """"could be decompression bomb DOS attack" is no help."""
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS * 2 == 500_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(fgssl.UserError, match="more than 500 megapixels"):
        fgssl.decode(tmp_path / "a.png", 32)


def test_an_enlarged_image_does_not_live_in_memory_as_numbers():
    """A photograph of 12 MP took 7.2 GB: here 3 MP, beyond what was there before."""
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1])\n"
            "import numpy as np, torch\n"
            "from PIL import Image\n"
            "from methods import upscale\n"
            "class Fast(torch.nn.Module):\n"
            "    scale, reach = 4, 2\n"
            "    def forward(self, x): return torch.nn.functional.interpolate(x, scale_factor=4.)\n"
            "Image.new('RGB', (2000, 1500)).save(sys.argv[2])\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "from pathlib import Path\n"
            "upscale.enlarge_file(Fast(), sys.argv[2], Path(sys.argv[2] + '_x4.png'),"
            " torch.device('cpu'))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    import tempfile
    from conftest import ROOT
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run([sys.executable, "-c", code, ROOT, f"{folder}/a.png"], text=True,
                               capture_output=True, check=True).stdout.split()[-1]
    assert int(found) < 350_000, "48 MP at 4 bytes, in kB, and a tile; as float32 it is 576 MB"
