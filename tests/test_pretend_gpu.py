"""Every script on a pretended GPU: no mixed devices, nothing that waits in a step, few launches."""
import json
import subprocess
import sys

import pytest

from test_kernels_emulator import CXX, ROOT

pytestmark = pytest.mark.skipif(not CXX, reason="there is no g++ to pretend with")


# Launches a step at most, of ResNet-10: views, network and loss, forward and backward; `chunk` has
# two passes over two chunks. Muon's are apart, about 60 for each matrix.
MOST = {"train_simclr": 230, "region": 270, "chunk": 720, "resumed": 720, "train_jigsaw": 215,
        "train_srgan": 450, "linear_eval": 160}
MUON = 950


def launches(report, place):
    """Launches a step of ops called in a file or folder of the project; of all: ""."""
    found = [n for what, n in report["launches"].items() if what.startswith(place)]
    return sum(found) / report["steps"]


@pytest.fixture(scope="module")
def reports(toy_root, tmp_path_factory):
    """What pretend_gpu.py counted, by the run's name: a few steps of each script."""
    folder = tmp_path_factory.mktemp("pretend")
    photos = next((toy_root / "toy" / "images").iterdir())

    def training(script, out, *more):
        return [script, ["--data", "toy", "--root", str(toy_root), "--out", str(folder / out),
                         "--size", "24", "--batch", "16", "--epochs", "1", "--subset", "0.06",
                         "--precision", "bf16", *more]]

    runs = {view: training("train_simclr", view, "--view", view)
            for view in ("original", "gamma", "dropout", "swap", "jigsaw", "dcl", "region")}
    runs["chunk"] = training("train_simclr", "chunk", "--chunk", "16", "--blur", "0.5")
    runs["resumed"] = training("train_simclr", "chunk", "--chunk", "16", "--blur", "0.5",
                               "--resume", "--epochs", "2")
    runs["puzzles"] = training("train_jigsaw", "puzzles")
    runs["tile norm"] = training("train_jigsaw", "tile_norm", "--tile-norm", "--grid", "2",
                                 "--perms", "20")
    runs["srgan"] = training("train_srgan", "srgan", "--epochs", "2", "--pixel-epochs", "1")
    of = str(folder / "original" / "checkpoint.pt")
    runs["evaluation"] = ["linear_eval", [of, "--out", str(folder / "eval"), "--shots", "1", "all",
                                          "--draws", "1", "--steps", "2", "--finetune"]]
    for name in ("probe", "finetuned"):
        runs[f"prediction, {name}"] = ["linear_eval", [
            str(folder / "eval" / f"{name}.pt"), "--predict", str(photos), "--csv",
            str(folder / f"{name}.csv")]]
    runs["exploration"] = ["linear_eval", [of, "--explore", str(photos), "--out",
                                           str(folder / "explored")]]
    (folder / "runs.json").write_text(json.dumps([*runs.values()]))
    ran = subprocess.run([sys.executable, ROOT / "tests" / "pretend_gpu.py", folder / "runs.json"],
                         cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(runs, json.loads(ran.stdout.splitlines()[-1]), strict=True))


def test_every_script_runs(reports):
    """A tensor left on the CPU, a generator of the wrong device, .numpy() of a GPU's tensor."""
    for name, report in reports.items():
        assert report["error"] is None, f"{name}: {report['error']}"
        counted = report["run"][0] != "linear_eval" or name == "evaluation"
        assert report["steps"] >= 2 or not counted, name


def test_no_step_waits_for_the_gpu(reports):
    """Between two logged steps nothing may ask for a value, or copy from pageable memory."""
    for name, report in reports.items():
        found = [*report["waits"], *(what for what in report["copies"] if "PAGEABLE" in what)]
        assert not found, f"{name}: {found}"


def test_a_step_launches_no_more_than_is_stated(reports):
    """A loop over images, or a check on the GPU, is some launches more. Each takes the host about
    5 us: 1,000 of them are 5 ms, in which a fast GPU waits."""
    for name, report in reports.items():
        if report["steps"]:
            muon = launches(report, "methods/optimizers.py")
            others = launches(report, "") - muon
            most = MOST.get(name, MOST[report["run"][0]])
            assert others <= most and muon <= MUON, f"{name}: {others} and, of Muon, {muon}"


LOSS = {f"{op} torch.float32 D = 128, t = 0.1" for op in ("nt_xent", "nt_xent_backward")}
SHUFFLE, PUZZLE = ({f"tile_shuffle torch.float32 {how}"} for how in ("a copy", "with colour"))
SHUFFLED = "swap", "jigsaw", "dcl"                           # views


def test_each_trainer_calls_the_kernels_that_the_readme_names(reports):
    """z is fp32 with 128 features and t is above 0.02: the tensor-core kernel for fp32. Images are
    floats; puzzles have colour. And once a step: the loss forward and backward, the shuffle; all
    work around a kernel is in kernels/, too."""
    for name, report in reports.items():
        script = report["run"][0]
        wanted = LOSS if script in ("train_simclr", "train_srgan") else set()
        wanted = PUZZLE if script == "train_jigsaw" else wanted
        wanted = wanted | SHUFFLE if name in SHUFFLED else wanted
        called = {what.split(" ", 1)[1] for what in report["kernels"]}
        assert called == wanted, f"{name}: {called}"
        if report["steps"] and script != "train_srgan":      # whose first phase has no loss of this
            assert set(report["kernels"].values()) <= {report["steps"]}, report["kernels"]
            found = launches(report, "kernels/")
            assert found == len(wanted), f"{name}: {report['launches']}"
