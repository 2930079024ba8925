"""Assignments: what is blanked fails and teaches, what needs it waits, no bug has its name."""

import ast
import json
import re
import subprocess
import sys

import pytest
from test_kernels_emulator import CXX

from course import exercises, make, progress, source
from course.exercises import EXERCISES, ROOT

pytestmark = pytest.mark.course  # minutes: .ci/run has them

# Those whose tests would stop at another exercise, or at the bug, have a copy of their own.
SECOND = [e for e in EXERCISES if set(e.names) & {"gather_backward", "_backward_rows.backward",
                                                    "forward_simt"}]
FIRST = [e for e in EXERCISES if e not in SECOND]


def run(folder, files, match):
    """pytest in `folder`: {test: outcome}, and what it printed of each failure."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-rA", "--tb=line", "-p",
                          "no:cacheprovider", *files, "-k", match],
                         cwd=folder, capture_output=True, text=True, timeout=400)
    found = re.findall(r"^(PASSED|FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", ran.stdout, re.M)
    assert found, ran.stdout + ran.stderr
    return {test: outcome for outcome, test in found}, ran.stdout


def made(folder, chosen):
    names = [name for exercise in chosen for name in exercise.names]
    make.main([str(folder), *names])
    return folder


@pytest.mark.parametrize("chosen", [FIRST, SECOND], ids=["first", "second"])
def test_grading_tests_fail_with_a_hint_and_no_others(chosen, tmp_path):
    """A test that passes on a blank body grades nothing; one that fails elsewhere misleads."""
    if not CXX:
        chosen = [e for e in chosen if "emulated" not in e.match]
    folder = made(tmp_path / "assignment", chosen)
    assert "cross_entropy(sim" not in (folder / "README.md").read_text(), "it quotes a solution"
    match = " or ".join(e.match for e in chosen)
    files = sorted({f"tests/{e.tests}" for e in chosen})
    outcomes, said = run(folder, files, match)
    for e in chosen:
        graded = {test: outcome for test, outcome in outcomes.items()
                  if f"/{e.tests}::" in test and progress.chosen(e.match, test)}
        if e.names[0].endswith("_removed"):                  # a bug, which a part of them finds
            assert "FAILED" in graded.values(), f"{e.names} is not found"
        else:
            assert set(graded.values()) == {"FAILED"}, f"{e.names}: {graded}"
            assert any(f"exercise {name}: write it" in said for name in e.names), e.names
        for test in graded:
            outcomes[test] = "graded"
    assert set(outcomes.values()) <= {"graded", "PASSED"}, outcomes


def test_every_file_compiles_with_any_function_blank_or_delegated():
    for place in ("fgssl.py", "train_srgan.py", "kernels/__init__.py", "kernels/reference.py",
                  "evaluation/explain.py", "methods/super_resolution.py"):
        file = ROOT / place
        text = source.read(file)
        for function in source.functions(file):
            blank = source.blank(text, function, "hint")
            compile(blank, f"{file.name}:{function.name}", "exec", dont_inherit=True)
            assert blank.count(f"exercise {function.name}: write it") == 1
            asks = source.delegate(text, function, "key")
            compile(asks, f"{file.name}:{function.name}", "exec", dont_inherit=True)
            body = source.body_of(text, function)
            again = source.put(text, function, body)
            assert ast_of(again) == ast_of(text), "a body put back is the same program"


def ast_of(text):
    return ast.dump(ast.parse(text))


def test_a_kernel_put_back_is_the_same_and_its_braces_may_be_in_strings():
    file = ROOT / "kernels" / "nt_xent.cu"
    text = source.read(file)
    for function in source.functions(file):
        body = source.body_of(text, function)
        assert source.put(text, function, body).replace(body, body[body.index("\n", 1) + 1:]
                                                        ).split() == text.split()
    tricky = '__global__ void f() { char c[] = "}", d = \'}\'; // }\n /* } */ if (1) { } }\nint x;'
    function, = source.cuda_kernels(tricky, file)
    assert tricky[function.end:] == "}\nint x;"


def test_what_cannot_be_made_is_said(tmp_path, capsys):
    new = str(tmp_path / "new")
    for argv, wanted in (([new], "at least one function"), ([new, "nonsense"], "no function"),
                         ([new, "main"], "py:main or"),
                         ([str(tmp_path), "cosine_lr"], "name a new folder"),
                         ([new, "ptx_not_transposed"], "on a GPU"),
                         ([new, "wrong_row", "forward_simt"], "to be written"),
                         ([new, "wrong_row", "one_p_term"], "one bug in a kernel"),
                         ([new, "pictures.py:axis_label_that_is_not"], "no function")):
        with pytest.raises(SystemExit):
            make.main(argv)
        assert wanted in capsys.readouterr().err
        assert not (tmp_path / "new").exists(), "a half-made assignment was left"


def test_a_function_that_no_test_grades_apart_is_refused(tmp_path, capsys):
    """A blank train_simclr.py:main once counted as solved: it was graded by other mains' tests."""
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / "new"), "train_simclr.py:main"])
    assert "no test grades main of train_simclr.py" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_any_function_of_numbers_can_be_made_and_is_graded_by_tests_that_fail_without(tmp_path):
    entry, = make.make(tmp_path / "new", ["fgssl.py:luma"])
    assert entry["names"] == ["luma"] and entry["files"] == ["fgssl.py"]
    assert entry["match"].startswith("test_")
    assert json.loads((tmp_path / "new" / make.GRADING).read_text()) == [entry]


def test_a_bug_has_no_name_in_the_handout_and_each_student_another(tmp_path):
    names = {make.drawn_bug("nt_xent.cu", student) for student in "abcdefghijkl"}
    assert len(names) > 3
    make.main([str(tmp_path / "new"), "tile_shuffle.cu", "cosine_lr", "--students", "ann", "bob",
               "--key", str(tmp_path / "key")])
    key = (tmp_path / "key" / "KEY.md").read_text()
    for student in ("ann", "bob"):
        bug = make.drawn_bug("tile_shuffle.cu", student)
        folder = tmp_path / "new" / student
        text = "".join(file.read_text(errors="replace") for file in folder.rglob("*.*")
                       if file.suffix in (".md", ".json"))
        assert bug not in text and "bug in tile_shuffle" in text
        assert bug in key
        assert any((folder / file).read_text() != (ROOT / file).read_text()
                   for file in exercises.kernel_files("tile_shuffle.cu"))
        assert not list(folder.rglob("*.patch")) and not (folder / "course").exists()
    assert "math.cos" in key, "the key has no solution"


def test_the_list_names_every_exercise(capsys):
    make.main(["--list"])
    said = capsys.readouterr().out
    assert all(e.hint in said and exercises.command(e) in said for e in EXERCISES)


@pytest.mark.docs
def test_the_page_has_the_table_of_exercises():
    assert exercises.table() in (ROOT / "tests" / "README.md").read_text(), (
        "paste what course.exercises.table() returns")
