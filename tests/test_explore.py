"""A folder explored: each question against its definition, and all of them on a tiny folder."""

import errno

import bench_explore
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_study import table

import fgssl
import linear_eval
from evaluation import similarity


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
    with pytest.raises(fgssl.UserError, match="lies in .*mine.*--out"):
        linear_eval.main([*argv[:4], str(folder / "found")])
    for i in range(4):                                       # a name of 255 bytes
        (folder / f"{i}.png").rename(folder / f"{i:0251}.png")
    linear_eval.main(argv)
    clusters = {row["cluster"] for row in table(out / "clusters.csv")}
    assert {file.stem for file in (out / "clusters").glob("*.png")} == clusters, "none of before"
    (out / "embeddings.npz").write_bytes(b"PK\3\4 mine")
    with pytest.raises(fgssl.UserError, match="embeddings.npz is damaged"):
        linear_eval.main(argv)


def test_faults_are_planted_and_counted(shades, evaluated, capsys):
    """tests/bench_explore.py, from which the documents have their figures."""
    bench_explore.main(["--checkpoint", str(evaluated / "probe.pt"), "--data", str(shades)])
    *_, labels, copies = capsys.readouterr().out.splitlines()
    assert labels.startswith("131 images, 4 labels changed; of the first 7 doubtful labels ")
    assert copies.startswith("50 copies; ")


def test_a_picture_that_cannot_be_written_does_not_cost_the_tables(shades, evaluated, tmp_path,
                                                                   monkeypatch, capsys):
    """A full disk at the first picture of a cluster ended it: no doubtful label was named."""
    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pictures.grid", disk_full)
    with pytest.raises(SystemExit, match="not written: clusters; all else is done"):
        linear_eval.main([str(evaluated / "probe.pt"), "--explore", str(shades), "--out",
                          str(tmp_path)])
    assert "clusters is not written: No space left on device" in capsys.readouterr().err
    for name in ("clusters", "doubtful_labels", "embeddings"):
        assert len(table(tmp_path / f"{name}.csv")) == 81, name
