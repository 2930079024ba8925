"""python -m kernels check and profile: each fault is found in every order of threads, each word of
CUDA does what its definition says, the counts are those of a warp, and bad input is told plainly.
"""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import watch
from test_kernels_emulator import CXX, ROOT

MUTANTS = Path(__file__).parent / "mutants"
FAULTS = MUTANTS / "faults.cu"
RACING = ("barrier_after_load_removed", "barrier_before_reuse_removed", "wait_for_too_few")
pytestmark = pytest.mark.skipif(not CXX, reason="there is no g++ to compile the kernels with")


@pytest.fixture(scope="module")
def faults():
    with watch.compiled(FAULTS) as program:
        yield program


@pytest.mark.parametrize("kernel, kind, text", [
    ("lost_update", "race", r"s \+ 4 bytes"),
    ("histogram", "race", r"x\[[0-3]\]"),
    ("across_blocks", "race of blocks", r"x\[5\]"),
    ("two_writers", "race", r"x\[\d+\]"),
    ("no_syncwarp", "race", r"shared memory \+ \d+ bytes"),
    ("shuffle_is_no_barrier", "race", r"s \+ \d+ bytes"),
    ("partial_syncwarp", "race", r"s \+ 64 bytes"),
    ("same_value", "race", r"s \+ \d+ bytes"),
    ("atomic_and_plain", "race", r"n\[0\]"),
    ("byte_neighbours", "race", r"s \+ 4 bytes"),
    ("no_fence", "race of blocks", r"x\[64\]"),
    ("no_wait", "race with cp.async", r"shared memory \+ \d+ bytes"),
    ("unwritten_shared", "unwritten", r"s \+ 36 bytes"),
    ("unwritten_global", "unwritten", r"unwritten\[0\]"),
    ("no_tail", "outside", r"x\[\d{4}\]; x has 4096 elements"),
    ("below", "outside", r"x\[-1\]; x has 4096 elements"),
    ("past_dynamic", "outside", r"shared memory \+ 256 bytes"),
    ("past_static", "outside", r"64 of 'float \[64\]'"),
    ("null_pointer", "outside", "a null pointer"),
    ("misaligned", "misaligned", r"x\[1\], not at a multiple of 16 bytes"),
    ("waits_for_ever", "hang", "waits for what no thread"),
    ("spins", "hang", "waits for what no thread"),
    ("computes_for_ever", "hang", "has run for"),
    ("divergent_barrier", "refused", "waits at the barrier"),
    ("assertion", "refused", r"assert\(threadIdx.x < 40\) fails"),
    ("divides_by_zero", "crash", "by zero"),
])
def test_fault_is_found_in_every_order(faults, kernel, kind, text, monkeypatch):
    """By its kind, its kernel, the place in memory and the line that is marked in the source."""
    if text == "has run for":                                # the others end by themselves
        monkeypatch.setenv("CUDA_WATCH_SECONDS", "1")
    report = watch.watch(faults, [kernel])
    fault, = report.faults
    assert (fault.kind, fault.kernel) == (kind, kernel)
    assert re.search(text, fault.text), fault.text
    assert any("// FAULT" in place.source for place in fault.places), str(fault)
    assert kind == "hang" or fault.orders == list(watch.ORDERS)
    if "race" in kind:
        first, second = fault.places
        assert first.who != second.who or kind == "race with cp.async"
        assert {first.verb, second.verb} - {"read by "}, "two reads are no race"
    if kind != "hang":
        assert re.fullmatch(r"block \(\d+, 0, 0\), thread \(\d+, 0, 0\)", fault.places[0].who)


@pytest.mark.parametrize("job, kind, text", [
    ("host_pointer", "outside", "no array: the CPU's own memory"),
    ("output", "unwritten", r"unwritten\[3\]"),
    ("wrong", "wrong", r"x\[2\] is .*, wanted 2; 1 of 4096"),
    ("crash", "crash", "address 8"),
])
def test_fault_of_main(faults, job, kind, text):
    fault, = watch.watch(faults, [job]).faults
    assert fault.kind == kind and re.search(text, fault.text), str(fault)


def test_what_is_right_has_no_fault(faults):
    """Warp barriers, neighbouring bytes, atomics; a last block that sums what the others stored."""
    assert watch.watch(faults, ["well_behaved"]).faults == []


def test_counts_are_those_of_the_marked_lines(faults):
    report = watch.watch(faults, ["wasteful"])
    assert not report.faults
    marked = {number: source for number, source in enumerate(FAULTS.read_text().splitlines(), 1)
              if re.search(r"\d+ (SECTORS|WAVEFRONTS?)", source)}
    seen = {line.line: line for line in report.lines
            if line.line in marked and (line.space == "global") == ("SECTORS" in marked[line.line])}
    assert seen.keys() == marked.keys()
    for number, source in marked.items():
        wanted = int(re.search(r"(\d+) [SW]", source)[1])
        lanes = re.search(r"(\d+) LANES", source)
        assert seen[number].per_request == wanted, source
        assert seen[number].lanes == (int(lanes[1]) if lanes else 32), source
    assert report.kernels["wasteful"] == (1, 2 * 32 * 4, 16 * 4)


def test_each_word_of_cuda_does_what_its_definition_says():
    report = watch.run(MUTANTS / "words.cu")
    assert not report.faults, "\n".join(map(str, report.faults))
    assert report.output.strip() == "block 0 thread 69"          # printf, and nothing "wrong:"


# ------------------------------------------------ the project's own kernels, and mutants of them

def broken(name, folder):
    """The report on a copy of the kernels with one patch applied, or none."""
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    if name in RACING + ("no_swizzle",):
        patch = str(MUTANTS / f"{name}.patch")
        subprocess.run(["git", "apply", "--unidiff-zero", patch], cwd=folder, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
        name = "nt_xent.cu"
    return watch.run(folder / "kernels" / name)


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """{name: future of its report} of what will be tested, two at a time."""
    names = [item.callspec.params["name"] for item in request.session.items
             if item.path == request.path and "reports" in item.fixturenames]
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(broken, name, tmp_path_factory.mktemp("watched")) for name in names}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ["nt_xent.cu", "tile_shuffle.cu"])
def test_own_kernels_have_no_fault_and_move_the_bytes_of_their_headers(name, reports):
    report = reports[name].result()
    assert not report.faults, "\n".join(map(str, report.faults))
    assert report.formulas.keys() == report.kernels.keys()
    for kernel, (_, *moved) in report.kernels.items():
        for got, wanted in zip(moved, report.formulas[kernel]):
            assert wanted <= got <= wanted + 200, kernel         # tickets are not in the formula
    swizzled = [line for line in report.lines if line.source.startswith("ldmatrix")]
    assert bool(swizzled) == (name == "nt_xent.cu")
    assert all(line.per_request == line.ideal == 4 for line in swizzled)     # four matrices


@pytest.mark.mutants
@pytest.mark.skipif(not shutil.which("git"), reason="there is no git to apply the patches with")
@pytest.mark.parametrize("name", RACING)
def test_racing_mutant_is_caught_in_every_order(name, reports):
    races = [fault for fault in reports[name].result().faults if "race" in fault.kind]
    assert races and all(fault.orders == list(watch.ORDERS) for fault in races)


@pytest.mark.mutants
@pytest.mark.skipif(not shutil.which("git"), reason="there is no git to apply the patches with")
@pytest.mark.parametrize("name", ["no_swizzle"])
def test_no_swizzle_is_caught_by_its_wavefronts(name, reports):
    report = reports[name].result()
    assert not report.faults
    ratios = [line.per_request / line.ideal for line in report.lines
              if line.source.startswith("ldmatrix")]
    assert len(ratios) >= 2 and min(ratios) == 8                 # eight rows in the same banks


# ------------------------------------------------ bad input

def refused(file, text, **environment):
    """What the command prints of a file with this text; it must end with status 1."""
    file.write_text(text)
    run = subprocess.run([sys.executable, "-m", "kernels", "check", str(file)], cwd=ROOT,
                         env={**os.environ, **environment}, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    return run.stdout


@pytest.mark.parametrize("line, said", [
    ("__nanosleep(1);", "__nanosleep is misspelt, or not among the words of CUDA"),
    ("extern __shared__ float s[];", r"DYN_SMEM\(type, name\)"),
    ("x[0] = __shfl_sync(~0u, 1.f);", "too few arguments|no matching function"),
])
def test_what_does_not_compile_is_told_by_its_line(line, said, tmp_path):
    (tmp_path / "bad.cu").write_text('#include "host.cuh"\n__global__ void bad(float* x) {\n'
                                     f'{line}\n}}\nint main() {{}}\n')
    with pytest.raises(watch.Refused, match=rf"bad\.cu:3: .*\n.*({said})"):
        watch.run(tmp_path / "bad.cu")


def test_launch_brackets_and_missing_main(tmp_path):
    bad = tmp_path / "bad.cu"
    bad.write_text('#include "host.cuh"\n__global__ void f() {}\nint main() { f<<<1, 1>>>(); }\n')
    with pytest.raises(watch.Refused, match=r"bad\.cu:3: .*\n.*LAUNCH\(kernel, grid, block"):
        watch.run(bad)
    bad.write_text('#include "host.cuh"\n__global__ void f() {}\n')
    with pytest.raises(watch.Refused, match="has no main"):
        watch.run(bad)
    with pytest.raises(watch.Refused, match="no file"):
        watch.run(tmp_path / "absent.cu")


def compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_compilers_that_cannot_do_it(tmp_path):
    """None; one that is clang, by its macros; a g++ that lacks the flag."""
    file = tmp_path / "empty.cu"
    assert "there is no nowhere/g++" in refused(file, "", CXX="nowhere/g++")
    clang = compiler(tmp_path / "clang", "echo '#define __GNUC__ 4'; echo '#define __clang__ 1'")
    assert "is not g++" in refused(file, "", CXX=clang)
    without = compiler(tmp_path / "old", f"""case "$*" in *-fsanitize=thread*)
        echo "g++: error: unrecognized option -fsanitize=thread" >&2; exit 1;;
        esac; exec {CXX} "$@\"""")
    assert "has no -fsanitize=thread" in refused(file, "", CXX=without)
    silent = compiler(tmp_path / "silent", f"""for a; do
        shift; case $a in -fsanitize*) ;; *) set -- "$@" "$a";; esac
        done; exec {CXX} "$@\"""")
    text = '#include "host.cuh"\n__global__ void f() {}\nint main() { LAUNCH(f, 1, 1, 0, 0); }'
    assert "inserts no calls" in refused(file, text, CXX=silent)


def test_endless_output_ends(tmp_path):
    file = tmp_path / "talks.cu"
    assert "MiB" in refused(file, '#include "host.cuh"\nint main() { for (;;) puts("again"); }')


def test_kernel_is_chosen_by_name(faults):
    assert watch.watch(faults, ["histogram"], "histogram").faults
    with pytest.raises(watch.Refused, match="no kernel absent, but histogram"):
        watch.watch(faults, ["histogram"], "absent")
