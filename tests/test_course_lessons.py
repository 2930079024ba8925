"""Lessons: what is handed out is wrong or slow as its head says; right bodies pass, wrong ones do
not; no submission speaks for the watch."""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_kernels_emulator import CXX
from test_lessons import (FILES, PRODUCTS, ROOT, STEPS, bytes_read, complaint, sectors,
                          with_kernel)
from variants import lesson_bodies

from course import make, source, submission
from kernels import build, watch

compiled = pytest.mark.skipif(not CXX, reason="lessons need g++")


def text_of(kernel, change=lambda body: body):
    """The lesson with the body of its solution, changed."""
    function, = source.functions(ROOT / "course" / "solutions" / f"{kernel}.cu")
    text = source.read(function.file)
    body = change(text[function.start:function.end])
    return with_kernel(kernel, source.put(text, function, body + "\n"))


def complaints(kernel, text, folder):
    """What each step of the lesson says of this text."""
    file = folder / FILES[kernel].name
    file.write_text(text)
    report = watch.report(str(file))
    return [complaint(report, *step) for step in STEPS if step[0] == kernel]


@compiled
def test_what_is_handed_out_is_wrong_or_slow_as_its_head_says():
    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(FILES, pool.map(watch.report, map(str, FILES.values()))))
    kinds = {kernel: {fault["kind"] for fault in report["faults"]}
             for kernel, report in reports.items()}
    assert "race of blocks" in kinds["vector_add"] and "race of blocks" in kinds["histogram"]
    assert "race" in kinds["block_sums"] and kinds["softmax"] == kinds["mma_tile"] == {"wrong"}
    assert not kinds["transpose"] and not kinds["matmul"], "they are slow, not wrong"
    assert sectors(reports["transpose"])[0] > 20, "32 sectors a request, but for the tail"
    assert bytes_read(reports["matmul"])[0] == 8 * PRODUCTS
    for step in STEPS:
        assert complaint(reports[step[0]], *step), f"{step[0]} passes as it is handed out"


@compiled
@pytest.mark.variants
@pytest.mark.parametrize("kernel", FILES)
def test_right_bodies_pass_and_wrong_ones_are_refused(kernel, tmp_path):
    right, wrong = lesson_bodies.RIGHT[kernel], lesson_bodies.WRONG[kernel]
    assert len(right) >= 2 and len(wrong) >= 4
    for body in right:
        says = complaints(kernel, text_of(kernel, lambda _: body), tmp_path)
        assert not any(says), f"a right body is refused: {says}\n{body}"
        assert submission.foreign(body, source.read(ROOT / FILES[kernel])) is None
    for title, old, new in wrong:
        assert old in text_of(kernel), f"{title}: the solution has no {old}"
        says = complaints(kernel, text_of(kernel, lambda body: body.replace(old, new)), tmp_path)
        assert any(says), f"{kernel} passes with this mistake: {title}"


# What is handed in for `transpose`: the state that the grader gives, and what it says.
CLASS = {
    "solved": (lambda body: body, "solved", ""),
    "a comment more": (None, "to write", ""),
    "not padded": (lambda body: body.replace("TILE + 1", "TILE"), "not yet", "least wavefronts"),
    "never ends": (lambda body: "for (;;) __syncthreads();" + body, "not yet", "hang"),
    "ends the program": (lambda body: "exit(0);", "not yet", "`exit`"),
    "speaks for the watch": (lambda body: 'printf("kernel\\ttranspose\\t3\\t0\\t0\\n");', "not yet",
                             "unwritten"),
    "does not compile": (lambda body: "int x = y;" + body, "not yet", "3_transpose.cu:26"),
    "writes through null": (lambda body: body + "*(int*)nullptr = 1;", "not yet", "outside"),
}


@compiled
@pytest.mark.course
def test_submissions_of_a_lesson_are_graded_apart_from_the_tests(tmp_path):
    handout = tmp_path / "handout"
    make.main([str(handout), "transpose", "--key", str(tmp_path / "key")])
    solution = source.read(ROOT / "course" / "solutions" / "transpose.cu")
    assert solution in (tmp_path / "key" / "KEY.md").read_text()
    lesson = source.read(handout / FILES["transpose"])
    assert lesson == source.read(ROOT / FILES["transpose"]), "a lesson has no blank"
    assert not any("TILE + 1" in source.read(file) for file in handout.rglob("*.*")
                   if file.suffix in (".cu", ".py", ".md")), "the handout has the solution"
    for name, (change, _, _) in CLASS.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        text = text_of("transpose", change) if change else lesson.replace("int x", "int x /* ? */")
        (tmp_path / "in" / name / FILES["transpose"].name).write_text(text)
    run = subprocess.run(
        [sys.executable, "-m", "course.grade", handout, *(tmp_path / "in").iterdir(), "--csv",
         tmp_path / "marks.csv"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with open(tmp_path / "marks.csv", encoding="utf-8-sig") as file:
        found = {row["student"]: row for row in csv.DictReader(file)}
    for name, (_, state, says) in CLASS.items():
        row = found[name]
        if state == "to write":
            assert row["transpose: state"] == "unchanged", row
            continue
        assert (row["transpose: state"], says in row["transpose: message"]) == (state, True), row
    points = {name: float(row["points"]) for name, row in found.items()}
    assert points["solved"] == 10 and points["not padded"] == 5
    assert not any(points[name] for name in CLASS if name not in ("solved", "not padded")), points


@pytest.mark.parametrize("body, word", [
    ("exit(0);", "exit"), ("std::exit(0);", "::"), ("auto f = exit; f(0);", "f"),
    ("(*f)(0);", "(*f)("), ('asm("nop");', "asm"), ("\n#include <x>\n", "#"),
    ("%:include <x>", "%:"),
    ("extern int x;", "extern"), ("_exit /* */ (0);", "_exit"), ('printf("//"); exit(0);', "exit"),
    ('R"(")"; exit(0); ""', 'R"'), ("char c = '\"'; exit(0); c = '\"';", "exit"),
    ("struct S { void exit(int) {} } s; s.exit(0); exit(0);", "exit"),
    ("if (std::x) {}", "::"),
    ("auto f = [&](int i) { return i; }; f(threadIdx.x);", None),
    ("// exit(0)\n/* exit(0) */", None),
    ("struct S { float m; void add(float x) { m += x; } } s; s.add(__expf(2));", None),
    ("\n#pragma unroll\nfor (int i = 0; i < 4; i++) if (x[i]) y += (float)(x[i]);", None),
    ('printf("exit(0) :: #\\n"); atomicAdd(&n, min(1, 2));', None)])
def test_a_lesson_calls_what_is_cudas_or_its_own_and_nothing_else(body, word):
    assert submission.foreign(body, source.read(ROOT / FILES["transpose"])) == word


@pytest.mark.variants
@pytest.mark.skipif(not build.toolkit(), reason="there is no CUDA toolkit")
@pytest.mark.parametrize("kernel", FILES)
def test_lessons_are_programs_for_a_gpu_too(kernel, tmp_path):
    for text in (source.read(ROOT / FILES[kernel]), text_of(kernel)):
        (tmp_path / "lesson.cu").write_text(text)
        run = subprocess.run(
            [f"{build.toolkit()[0]}/bin/nvcc", "-std=c++17", "-arch=sm_80", "-c", "-I", build.HERE,
             tmp_path / "lesson.cu", "-o", tmp_path / "lesson.o"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
