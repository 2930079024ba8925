"""kernels/gpu_check.py: what it reads from a profile and from reports, and that failures are named
and do not end it. No GPU and no process of its own: those are replaced."""
import json
import subprocess
import types

import pytest
import torch

from kernels import bench, gpu_check


def test_idle_time_counts_overlapping_kernels_once():
    """Two streams: 0 to 4 and 2 to 6; nothing from 6 to 8; 8 to 10. Idle 2 of 10, not 0."""
    def event(start, end, kind=torch.autograd.DeviceType.CUDA):
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(time_range=span, device_type=kind)

    events = [event(8, 10), event(0, 4), event(2, 6), event(0, 99, torch.autograd.DeviceType.CPU)]
    found = gpu_check.summarize(events)
    assert found == {"launches a step": 3 / 4, "idle": pytest.approx(0.2)}


def test_a_failed_cuda_test_is_named_with_its_shape_and_error(tmp_path, monkeypatch):
    xml = """<testsuites><testsuite>
        <testcase name="test_near_float64[130-17-cuda]"><failure message="off by 0.1&#10;more"/>
        </testcase><testcase name="test_bits[cuda]"/></testsuite></testsuites>"""

    def run(command, **_):
        (tmp_path / "tests.xml").write_text(xml)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_check.check_tests(tmp_path) == [
        ("CUDA tests", "1 passed, 0 skipped", "all pass", False),
        ("test_near_float64[130-17-cuda]", "off by 0.1", "passes", False)]


def test_a_slow_kernel_and_a_crash_are_failures(monkeypatch):
    """0.03 ms is within the prediction for 512 views, 0.06 ms is not; a crash shows its error."""
    for seconds, good in ((3e-5, True), (6e-5, False)):
        table = {"NT-Xent, 512 views": {"PyTorch dense fp32": (5e-5, 9), "kernel mma fp32":
                                        (seconds, 2**21)}}
        monkeypatch.setattr(gpu_check, "run_child", lambda job, table=table: table)
        (what, measured, _, ok), = gpu_check.check_bench(256)
        assert (what, ok) == ("NT-Xent, 512 views, kernel mma fp32", good) and "2 MiB" in measured
    monkeypatch.setattr(gpu_check, "run_child", lambda job: {"error": "illegal address"})
    assert gpu_check.check_bench(256)[0][1:] == ("illegal address", "runs", False)


def test_the_check_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """One trainer fails, one has a wrong loss in its third step, one is right, though its last loss
    is 10 % off: all three are in the report."""
    losses = {"train_jigsaw": ((1.0, 2.0), (1.01, 2.0)),     # on the GPU, on the CPU
              "train_srgan": ((1.0, 2.0), (1.0005, 2.2))}
    reports = {"train_simclr": {"error": "RuntimeError: mixed devices"},
               **{name: {"error": None, "launches a step": 7.} for name in losses}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.build, "obstacle", lambda kind: None)
    monkeypatch.setattr(gpu_check, "pretend", lambda out, root: reports)
    monkeypatch.setattr(gpu_check, "run_child", lambda job, **_: {})
    monkeypatch.setattr(gpu_check, "losses",
                        lambda folder: losses[folder.name][folder.parent.name == "cpu"])
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["ok"] for row in rows] == [False, False, True, True, True, True, True]
    assert "mixed devices" in (tmp_path / "report.txt").read_text()
    monkeypatch.setattr(gpu_check.build, "obstacle", lambda kind: "there is no C++ compiler")
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert "no C++ compiler" in capsys.readouterr().out


def test_the_losses_compared_are_the_third_and_the_last(tmp_path):
    records = [{"step": 0, "knn": 5.0}, *({"step": step, "loss": step / 8} for step in (1, 3, 15)),
               {"step": 15, "knn": 6.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert gpu_check.losses(tmp_path) == (3 / 8, 15 / 8)
    (tmp_path / "log.jsonl").write_text("")
    assert gpu_check.losses(tmp_path) == (None, None)


def test_a_root_is_passed_on_and_otherwise_the_trainers_own(tmp_path):
    """Drawing the toy birds once more takes longer than the check."""
    assert gpu_check.training("train_jigsaw", tmp_path, "birds")[2:4] == ["--root", "birds"]
    assert "--root" not in gpu_check.training("train_jigsaw", tmp_path)


def test_counted_time_is_the_readme_table():
    """kernels/README.md: 0.26 to 0.45 ms at 8,192 views, 4.2 to 7.3 ms at 32,768."""
    assert bench.counted(8192) == pytest.approx((0.26e-3, 0.45e-3), rel=0.02)
    assert bench.counted(32768) == pytest.approx((4.2e-3, 7.3e-3), rel=0.02)
