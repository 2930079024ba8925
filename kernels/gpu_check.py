"""All that a machine with a GPU can say of this project, in one command:

    python -m kernels gpu-check              # writes out/gpu-check/report.json and report.txt

The CUDA tests; bench.py at each size; a short epoch of each trainer, with its losses beside the
CPU's, its peak memory, and the launches and the idle time of a step. Each stands beside what was
predicted. Each runs in a process of its own, since a failed kernel ends its process's use of the
GPU; a failure is written down, and the check goes on. Where there is no GPU, the trainers run on
the pretended one (tests/pretend_gpu.py), which shows no times: a few minutes.
"""
import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import torch

import atomic

from . import bench, build

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_kernels_{name}.py" for name in ("build", "nt_xent", "tiles")]
PAIRS = [128, 256, 512, 4096, 16384]
PREDICTED = {512: 0.04, 1024: 0.05, 8192: 0.5, 32768: 8.}   # ms at most, H100: README.md
TRAINERS = {"train_simclr": [], "train_jigsaw": [], "train_srgan": ["--pixel-epochs", "1"]}
LOSSES = "loss", "pixel"                                     # what a trainer's log calls its loss
# The draws are the CPU's, sums in fp32 are not. Between kernel and PyTorch, both on a CPU, three
# seeds of SimCLR differ by 1e-6 of the loss after two updates, and then by ten times as much at
# each step, up to 7 %: training is chaotic. So a wrong gradient is seen in the third step.
EARLY, NEAR, FAR = 3, 1e-3, 0.2
PROFILED = 4, 7                                              # steps that are not logged


def run_child(job, **environment):
    """The JSON that job, a list for `child`, prints last in a process of its own; or the error."""
    ran = subprocess.run([sys.executable, "-m", "kernels.gpu_check", json.dumps(job)], cwd=ROOT,
                         env={**os.environ, **environment}, capture_output=True, text=True)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).splitlines() or ["no output"]
    return json.loads(lines[-1]) if ran.returncode == 0 else {"error": lines[-1]}


def child(kind, *job):
    """What a process does: times one size, or trains."""
    if kind == "bench":
        return bench.main(["--pairs", str(job[0])])
    script, arguments = job
    torch.backends.cudnn.allow_tf32 = False                  # to compare losses with the CPU's
    counted = profile_steps() if torch.cuda.is_available() else {}
    importlib.import_module(script).main(arguments)
    if counted:
        counted["peak MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return counted


def profile_steps():
    """Profile a few steps of the run that follows. Returns the dict that they fill."""
    import fgssl
    run, found = fgssl.Run, {"launches a step": None, "idle": None}
    iterate, due = run.__iter__, run.due
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def steps(self):
        for item in iterate(self):
            if self.step == PROFILED[0]:
                torch.cuda.synchronize()
                profiler.start()
            yield item
            if self.step == PROFILED[1]:
                torch.cuda.synchronize()
                profiler.stop()
                found.update(summarize(profiler.events()))

    run.__iter__ = steps
    run.due = lambda self: due(self) and not PROFILED[0] <= self.step <= PROFILED[1]
    return found


def summarize(events):
    """Launches a step, and the share of the time in which no kernel or copy ran, of a profile."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events
                   if event.device_type == torch.autograd.DeviceType.CUDA
                   and not getattr(event, "is_user_annotation", False))
    if not spans:
        return {}
    busy, end = 0., spans[0][0]
    for start, stop in spans:                                # spans of two streams may overlap
        busy, end = busy + max(0., stop - max(start, end)), max(end, stop)
    return {"launches a step": len(spans) / (PROFILED[1] - PROFILED[0] + 1),
            "idle": 1 - busy / (end - spans[0][0])}


def training(script, out, root=None):
    """Arguments of a short epoch on the toy set, about 15 steps; root: where that lies."""
    return ["--data", "toy", *(["--root", root] if root else []), "--out", str(out / script),
            "--size", "24", "--batch", "16", "--epochs", "2" if script == "train_srgan" else "1",
            "--subset", "0.2", "--precision", "fp32", *TRAINERS[script]]


def losses(folder):
    """The losses in the log of a run: at step EARLY and the last, None where there is none."""
    import fgssl
    found = {record["step"]: record[name] for record in fgssl.read_log(folder / "log.jsonl")
             for name in LOSSES if name in record}
    return found.get(EARLY), found.get(max(found, default=None))


def check_tests(out):
    """A row, and one for each CUDA test that failed: its name holds the kernel and the shape."""
    file = out / "tests.xml"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", f"--junitxml={file}", *TESTS]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not file.exists():
        return [("CUDA tests", ran.stdout[-200:] + ran.stderr[-200:], "all pass", False)]
    cases = list(xml.etree.ElementTree.parse(file).iter("testcase"))
    bad = [(case, why) for case in cases for why in (case.find("failure"), case.find("error"))
           if why is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    return [("CUDA tests", f"{passed} passed, {skipped} skipped", "all pass", not bad),
            *((case.get("name"), why.get("message").split("\n")[0], "passes", False)
              for case, why in bad)]


def check_bench(pairs):
    """Rows of one size: the kernels', beside the prediction and the best PyTorch."""
    rows = []
    for title, found in run_child(["bench", pairs]).items():
        if title == "error":
            return [(f"bench, NT-Xent, {2 * pairs} views", found, "runs", False)]
        rival = min(seconds for name, (seconds, _) in found.items() if "kernel" not in name)
        for name, (seconds, memory) in found.items():
            if "kernel" in name:
                limit = PREDICTED.get(2 * pairs) if name == "kernel mma fp32" else None
                wanted = f"{limit} ms at most; " if limit else ""
                rows.append((f"{title}, {name}", f"{seconds * 1e3:.3f} ms, {memory >> 20} MiB",
                             f"{wanted}best PyTorch {rival * 1e3:.3f} ms",
                             seconds * 1e3 <= (limit or rival * 1e3)))
    return rows


def check_training(script, arguments, out, here):
    """Rows of one trainer, on the GPU (`here` what it reported) and, run now, on the CPU."""
    if here.get("error"):
        return [(script, here["error"], "runs", False)]
    cpu = run_child(["train", script, arguments], CUDA_VISIBLE_DEVICES="")
    if "error" in cpu:
        return [(f"{script} on the CPU", cpu["error"], "runs", False)]
    rows = []
    for name, near, ours, wanted in zip((f"loss at step {EARLY}", "last loss"), (NEAR, FAR),
                                        losses(out / script), losses(out / "cpu" / script)):
        good = None not in (ours, wanted) and abs(ours - wanted) <= near * abs(wanted)
        rows.append((f"{script}, {name}", f"{ours:.6g}" if ours else "was not logged",
                     f"{wanted:.6g} on the CPU, within {near:.1%}", good))
    return rows + [(f"{script}, {name}", f"{value:.4g}", "", True)
                   for name, value in here.items() if isinstance(value, (int, float))]


def pretend(out, root):
    """What the pretended GPU reports, by script."""
    jobs = [[script, training(script, out, root)] for script in TRAINERS]
    (out / "runs.json").write_text(json.dumps(jobs))
    ran = subprocess.run([sys.executable, str(ROOT / "tests" / "pretend_gpu.py"),
                          str(out / "runs.json")], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "FGSSL_CACHE": os.environ.get("FGSSL_CACHE") or
                              str(out / "cache")})
    if ran.returncode:
        return dict.fromkeys(TRAINERS, {"error": (ran.stderr.splitlines() or ["failed"])[-1]})
    return {report["run"][0]: {
        "error": report["error"] and report["error"].splitlines()[-1],
        **{f"{kind} a step": sum(report[kind].values()) / report["steps"]
           for kind in ("launches", "waits") if report["steps"]}}
            for report in json.loads(ran.stdout.splitlines()[-1])}


def line(row):
    """A row of the printed table."""
    verdict = "ok" if row["ok"] else "FAILED"
    return f"{verdict:7}{row['what']:45} {row['measured']:28} {row['predicted']}"


def main(argv=None):
    """Run all, print each row as it comes, and write the report. Returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m kernels gpu-check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="where the toy set lies (default: $FGSSL_DATA, or ./data)")
    parser.add_argument("--out", default="out/gpu-check", help="folder for what is written")
    args = parser.parse_args(argv)
    out, root = Path(args.out).resolve(), args.root and str(Path(args.root).resolve())
    for folder in (out, out / "cpu"):                        # no trainer overwrites an earlier run
        folder.mkdir(parents=True, exist_ok=True)
        for script in TRAINERS:
            shutil.rmtree(folder / script, ignore_errors=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows = []

    def add(found):
        for what, measured, predicted, good in found:
            rows.append({"what": what, "measured": measured, "predicted": predicted, "ok": good})
            print(line(rows[-1]), flush=True)

    if card:
        print(f"{card}, torch {torch.__version__}")
        add(check_tests(out))
        for pairs in PAIRS:
            add(check_bench(pairs))
        reports = {script: run_child(["train", script, training(script, out, root)])
                   for script in TRAINERS}
    elif build.obstacle("emulated"):
        print(f"There is no GPU, and none can be pretended: {build.obstacle('emulated')}.")
        return 0
    else:
        print("There is no GPU: the trainers run on a pretended one, and nothing is timed.")
        reports = pretend(out, root)
    for script, here in reports.items():
        add(check_training(script, training(script, out / "cpu", root), out, here))
    report = {"device": card or "pretended GPU", "torch": torch.__version__, "rows": rows}
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"),
                       ("report.txt", "".join(line(row) + "\n" for row in rows))):
        with atomic.replacing(out / name) as draft:
            draft.write_text(text)
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} as predicted; {out / 'report.json'}")
    return bad


if __name__ == "__main__":
    print(json.dumps(child(*json.loads(sys.argv[1]))))
