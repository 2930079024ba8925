"""Every script on a pretended GPU: no mixed devices, nothing that waits in a step, few launches."""
import json
import subprocess
import sys

import pytest

from test_kernels_emulator import CXX, ROOT

pytestmark = pytest.mark.skipif(not CXX, reason="there is no g++ to pretend with")


def kernel_launches(report):
    """Launches a step of ops called in kernels/, where all work around a kernel would be."""
    of_kernels = [n for what, n in report["launches"].items() if what.startswith("kernels/")]
    return sum(of_kernels) / report["steps"]


@pytest.fixture(scope="module")
def reports(toy_root, tmp_path_factory):
    """What pretend_gpu.py counted, by the run's name: a few steps of each script."""
    folder = tmp_path_factory.mktemp("pretend")

    def training(script, out, *more):
        return [script, ["--data", "toy", "--root", str(toy_root), "--out", str(folder / out),
                         "--size", "24", "--batch", "16", "--epochs", "1", "--subset", "0.06",
                         "--precision", "bf16", *more]]

    runs = {view: training("train_simclr", view, "--view", view)
            for view in ("original", "gamma", "dropout", "swap", "jigsaw", "dcl", "region")}
    runs["chunk"] = training("train_simclr", "chunk", "--chunk", "16", "--blur", "0.5")
    runs["resumed"] = training("train_simclr", "chunk", "--chunk", "16", "--blur", "0.5",
                               "--resume")
    runs["puzzles"] = training("train_jigsaw", "puzzles")
    runs["tile norm"] = training("train_jigsaw", "tile_norm", "--tile-norm", "--grid", "2",
                                 "--perms", "20")
    runs["srgan"] = training("train_srgan", "srgan", "--epochs", "2", "--pixel-epochs", "1")
    of = str(folder / "original" / "checkpoint.pt")
    runs["evaluation"] = ["linear_eval", [of, "--out", str(folder / "eval"), "--shots", "1", "all",
                                          "--draws", "1", "--steps", "2", "--finetune"]]
    (folder / "runs.json").write_text(json.dumps([*runs.values()]))
    ran = subprocess.run([sys.executable, ROOT / "tests" / "pretend_gpu.py", folder / "runs.json"],
                         cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(runs, json.loads(ran.stdout.splitlines()[-1]), strict=True))


def test_every_script_runs(reports):
    """A tensor left on the CPU, a generator of the wrong device, .numpy() of a GPU's tensor."""
    for name, report in reports.items():
        assert report["error"] is None, f"{name}: {report['error']}"
        assert report["steps"] >= 2 or name in ("resumed", "evaluation"), name


def test_no_step_waits_for_the_gpu(reports):
    """Between two logged steps nothing may ask for a value, or copy from pageable memory."""
    evaluating = "pictures.py", "methods/super_resolution.py"   # SRGAN's, between its two phases
    for name, report in reports.items():
        found = [*report["waits"], *(what for what in report["copies"] if "PAGEABLE" in what)]
        found = [what for what in found if not what.startswith(evaluating)]
        assert not found, f"{name}: {found}"


def test_the_loss_is_two_ops_and_the_shuffle_one(reports):
    """The loss: forward and backward, three launches of kernels. Which kernel training calls: the
    one for fp32, since `embed` returns fp32, and floats for the tiles."""
    for name in ("original", "jigsaw", "puzzles"):
        called = {what.split(" ", 1)[1]: n / reports[name]["steps"]
                  for what, n in reports[name]["kernels"].items()}
        wanted = {"nt_xent torch.float32": 1, "nt_xent_backward torch.float32": 1}
        if name in ("jigsaw", "puzzles"):
            wanted = {**(wanted if name == "jigsaw" else {}), "tile_shuffle torch.float32": 1}
        assert called == wanted, f"{name}: {called}"
        assert kernel_launches(reports[name]) == len(wanted), f"{name}: {reports[name]['launches']}"
