"""Builds: none at import, one per source and toolchain, none that waits for a dead process."""
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import kernels
from kernels import build, dispatch
from test_kernels_emulator import ROOT

NO_NVCC = "" if build.toolkit() else "there is no CUDA toolkit: no nvcc, and no $CUDA_HOME"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("FGSSL_CACHE", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "loaded", set())
    monkeypatch.setattr(build, "failed", {})
    dispatch.say_once.cache_clear()
    toolkit = build.toolkit
    toolkit.cache_clear()
    yield tmp_path
    toolkit.cache_clear()


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env},
                          text=True, capture_output=True, check=True)


def holder_of(folder, then):
    """A process that holds the folder's lock, then runs statements in which `folder` is bound."""
    code = (f"from pathlib import Path; import atomic, time\n"
            f"folder = Path({str(folder)!r})\n"
            f"with atomic.lock(folder / 'in_use', ''): print('held', flush=True); {then}")
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_import_builds_nothing(tmp_path):
    """A build at import, or one that asks for a visible GPU, locks out everyone without one."""
    code = ("import sys, kernels; kernels.status()\n"
            "print('torch.utils.cpp_extension' in sys.modules)")
    run = python(code, FGSSL_CACHE=str(tmp_path / "cache"), CUDA_VISIBLE_DEVICES="")
    assert run.stdout == "False\n" and run.stderr == "" and not (tmp_path / "cache").exists()


def test_status_says_what_runs_and_why(fresh, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    said = kernels.status()
    assert said["cpu"] == said["cuda"] == "torch" and "built without CUDA" in said["why"]
    monkeypatch.setattr(build, "obstacle", lambda kind: None)
    monkeypatch.setattr(build, "library", lambda kind: fresh / "kernels.so")
    assert kernels.status() == {"cpu": "torch", "cuda": "cuda",
                                "why": "the kernels will be built at the first call"}
    (fresh / "kernels.so").touch()
    assert kernels.status()["why"] == "the kernels are built"


def test_command_line_status(fresh):
    (build.library("emulated").parent).mkdir(parents=True)
    build.library("emulated").touch()
    out = subprocess.run([sys.executable, "-m", "kernels"], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout
    for word in ("CPU tensors    torch", "CUDA tensors", "toolkit", "architectures",
                 f"{build.library('emulated').parent.name}, the one in use"):
        assert word in out, out


def test_command_line_help():
    """`--help` answered "takes nothing, gpu-check, ...; not --help"."""
    for argument, status in (("--help", 0), ("chekc", 1)):
        ran = subprocess.run([sys.executable, "-m", "kernels", argument], cwd=ROOT, text=True,
                             capture_output=True)
        assert ran.returncode == status
        said = ran.stderr if status else ran.stdout
        for command in ("gpu-check", "check FILE.cu", "profile FILE.cu"):
            assert f"python -m kernels {command} " in said, said
    assert "no command 'chekc'" in said


def fake_nvcc(folder, version):
    """An nvcc that knows its version, behind a wrapper script in another folder."""
    real, wrapper = folder / "toolkit" / "bin" / "nvcc", folder / "wrapper" / "nvcc"
    for path in (real, wrapper):
        path.parent.mkdir(parents=True)
    real.write_text(f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ TOP={folder}/toolkit/bin/..' >&2;;\n"
                    f"*) echo 'Cuda compilation tools, release {version}, V{version}.1';; esac\n")
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    real.chmod(0o755), wrapper.chmod(0o755)
    return wrapper.parent


def test_an_empty_cache_variable_is_none(monkeypatch):
    """It put the builds into ./build, where the scripts' caches did not go."""
    monkeypatch.setenv("FGSSL_CACHE", "")
    assert build.cache() == build.Path.home() / ".cache" / "fgssl" / "build"


def test_toolkit_of_pip(fresh, monkeypatch):
    """Most people have torch from pip, and no root."""
    real = fake_nvcc(fresh, "13.0").parent / "toolkit"
    home = fresh / "nvidia" / "cu13"
    home.parent.mkdir()
    real.rename(home)
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
    monkeypatch.syspath_prepend(str(fresh))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert build.toolkit() == (str(home), "13.0")


def test_toolkit_behind_a_wrapper(fresh, monkeypatch):
    """The folder above a wrapper script is no toolkit; $CUDA_HOME is believed."""
    monkeypatch.setattr(build, "pip_toolkit", lambda: None)
    monkeypatch.setenv("PATH", f"{fake_nvcc(fresh, '13.0')}:/usr/bin:/bin")
    assert build.toolkit() == (str(fresh / "toolkit"), "13.0")
    monkeypatch.setenv("CUDA_HOME", str(fresh / "elsewhere"))
    build.toolkit.cache_clear()
    assert build.toolkit() is None


@pytest.mark.parametrize("torch_cuda, nvcc, words", [
    (None, "13.0", "is built without CUDA"),
    ("13.0", None, 'pip install "nvidia-cuda-nvcc==13.0'),
    ("13.0", "12.4", "nvcc is of CUDA 12.4, torch of CUDA 13.0"),
    ("13.0", "9.2", "nvcc is of CUDA 9.2, torch of CUDA 13.0; pip install"),     # knows no sm_75
    ("12.8", "11.8", r"nvcc is of CUDA 11.8, torch of CUDA 12.8\. "),      # pip has no such names
    ("12.8", None, r"no CUDA compiler .*CUDA_HOME\)\. "),
])
def test_obstacles_to_cuda(fresh, monkeypatch, capsys, torch_cuda, nvcc, words):
    """impl="cuda" raises with the reason; impl="auto" falls back and says it once."""
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(build, "pip_toolkit", lambda: None)
    monkeypatch.setattr(build.shutil, "which", lambda name: name != "nvcc" and f"/usr/bin/{name}"
                        or nvcc and str(fake_nvcc(fresh, nvcc) / "nvcc"))
    x = types.SimpleNamespace(is_cuda=True, device="cuda:0")
    with pytest.raises(RuntimeError, match=words):
        dispatch.use_kernel("cuda", x)
    assert dispatch.use_kernel("auto", x) is dispatch.use_kernel("auto", x) is False
    said = capsys.readouterr().err
    assert said.count("PyTorch runs in place of the CUDA kernels") == 1 and re.search(words, said)


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(RuntimeError, match="there is no C.. compiler"):
        kernels.nt_xent(torch.eye(4), 0.5, "emulated")
    assert kernels.nt_xent(torch.eye(4), 0.5).isfinite()


def test_folder_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").touch()
    monkeypatch.setenv("FGSSL_CACHE", str(fresh / "file"))
    with pytest.raises(RuntimeError, match="Set .FGSSL_CACHE"):
        build.load("emulated")


def test_a_change_of_anything_builds_anew(fresh, monkeypatch):
    """A stale library would run yesterday's kernel under today's tests."""
    seen = {build.library("emulated")}
    monkeypatch.setitem(build.FLAGS, "emulated", ["-O1"])
    seen.add(build.library("emulated"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    seen.add(build.library("emulated"))
    for name in build.SOURCES:
        (fresh / name).write_text((build.HERE / name).read_text() + "// changed\n")
    monkeypatch.setattr(build, "HERE", fresh)
    seen.add(build.library("emulated"))
    monkeypatch.setattr(build, "toolkit", lambda: ("/toolkit", "13.0"))
    for wanted in ("8.0", "9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        seen.add(build.library("cuda"))
    assert len(seen) == 6, seen


def test_the_hash_is_of_the_architectures_built_not_of_the_cards(fresh, monkeypatch):
    """One build serves every machine, with whatever card or none; but not a card that is older than
    all that it is built for."""
    monkeypatch.setattr(build, "toolkit", lambda: ("/toolkit", "13.0"))

    def library(*cards):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i])
        return build.library("cuda")

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")       # knows no Blackwell
    before = library()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert library() == library((9, 0)) == library((8, 0), (12, 1)) != before
    assert build.architectures() == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert library() != library((7, 0), (9, 0)) == library((9, 0), (7, 0))
    assert build.architectures().startswith("7.0;7.5;")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert library() == library((9, 0)) == library((7, 0))


def pretend_to_compile(name, sources, build_directory, **settings):
    """In place of cpp_extension.load: takes no time."""
    open(f"{build_directory}/{name}.so", "w").close()


def test_a_killed_build_delays_nobody(fresh, monkeypatch, capsys):
    """Its lock goes with it, and what it left half done is removed."""
    import torch.utils.cpp_extension
    folder = build.library("emulated").parent
    folder.mkdir(parents=True)
    holder = holder_of(folder, "(draft := atomic.drafting(folder / 'work', True)).__enter__(); "
                       "(folder / 'drafted').touch(); time.sleep(600)")
    while not (folder / "drafted").exists():
        time.sleep(0.01)
    assert len(list(folder.glob(".work.*"))) == 1
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    monkeypatch.setattr(torch.utils.cpp_extension, "load", pretend_to_compile)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    start = time.monotonic()
    build.load("emulated")
    assert time.monotonic() - start < 30 and build.library("emulated").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["drafted", "in_use", "kernels.so"]


def test_a_second_process_waits_for_the_first(fresh, monkeypatch, capsys):
    folder = build.library("emulated").parent
    folder.mkdir(parents=True)
    holder = holder_of(folder, "time.sleep(1); (folder / 'kernels.so').touch()")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    build.load("emulated")                                   # compiling would print
    holder.wait()
    error = capsys.readouterr().err
    assert "building" not in error and "waiting for another process" in error


def test_a_failed_build_is_not_tried_again(fresh, monkeypatch):
    import torch.utils.cpp_extension
    tries = []

    def fail(*args, **kwargs):
        tries.append(1)
        raise RuntimeError("line 7: expected ';'")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="line 7: expected ';'"):
            build.load("emulated")
    assert len(tries) == 1 and not build.library("emulated").exists()


@pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)
@pytest.mark.parametrize("name", build.KERNELS)
def test_nvcc_compiles_without_spills(name, tmp_path):
    """By nvcc alone, for every generation since sm_75: no warning, no spilled register, no stack
    frame. PTX, which is most of the work, is made once for those where it hardly differs."""
    generations = {75: [75], 80: [80], 86: [86, 89], 90: [90], 100: [100, 120]}
    code = ["--threads=2", *(f"-gencode=arch=compute_{ptx},code=[{','.join(f'sm_{g}' for g in of)}]"
                             for ptx, of in generations.items())]
    flags = "-std=c++17 -O3 -Werror all-warnings -Xptxas -v -c".split()
    command = [f"{build.toolkit()[0]}/bin/nvcc", *flags, *code, str(build.HERE / name)]
    run = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame, "
                        r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    wanted = 7 * {"nt_xent.cu": 2 * 4, "nt_xent_mma.cu": 2 * 2 * 3 + 2,
                  "tile_shuffle.cu": 5 + 5 + 4}[name]
    assert len(frames) == wanted, f"{len(frames)} kernels compiled, {wanted} expected"
    for kernel, *numbers in frames:
        assert numbers == ["0", "0", "0"], f"{kernel}: stack frame, spills are {numbers}"


@pytest.mark.skipif(bool(build.obstacle("cuda")), reason=str(build.obstacle("cuda")))
def test_cuda_extension_builds_and_loads():
    """Needs a CUDA build of torch, not a GPU."""
    build.load("cuda")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fgssl::nt_xent", "CUDA")


def test_benchmark_runs(capsys):
    from kernels import bench
    bench.main(["--pairs", "8", "--dim", "5", "--batch", "2", "--side", "30", "--repeat", "1"])
    out = capsys.readouterr().out
    assert "NT-Xent, forward and backward, N = 8, D = 5" in out and "PyTorch gather" in out
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench.check("a wrong kernel", torch.full((2,), torch.nan), torch.ones(2), 1e-3)
