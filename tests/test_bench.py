"""The benchmarks run; test_explore.py and test_kernels_build.py run the two others."""
import re

import bench_step
import bench_views


def test_bench_step_times_every_stage(photos, monkeypatch, capsys):
    """It called a function that had moved, and nobody noticed."""
    monkeypatch.setattr(bench_step, "STEPS", 1)
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--data", str(photos), "--size", "16",
                                     "--batch", "8"])
    bench_step.main()
    out = capsys.readouterr().out
    stages = "decode", "cache read", "augment", "forward", "loss", "backward", "optimizer", "step"
    assert tuple(re.findall(r"^([a-z ]+?) +\d+ (?:images|views)/s", out, re.M)) == stages, out


def test_bench_views_times_both_pipelines(photos, monkeypatch, capsys):
    monkeypatch.setattr(bench_views, "BATCH", 8)
    monkeypatch.setattr(bench_views, "SECONDS", 0)
    monkeypatch.setattr("sys.argv", ["bench_views.py", "--data", str(photos)])
    bench_views.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["64", "224"] and all(float(n) > 0 for n in sum(rows, []))
