"""Assignments: what is blanked fails and teaches, what needs it waits, a solution passes."""

import re
import subprocess
import sys

import make_assignment
import pytest
from make_assignment import EXERCISES, ROOT
from test_kernels_emulator import CXX

# Those whose tests would stop at another exercise have a copy of their own.
SECOND = [e for e in EXERCISES if set(e.names) & {"gather_backward", "_backward_rows.backward"}]
FIRST = [e for e in EXERCISES if e not in SECOND]


def run(folder, files, match):
    """pytest in `folder`: {test: outcome}, and what it printed of each failure."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-rA", "--tb=line", "-p",
                          "no:cacheprovider", *files, "-k", match],
                         cwd=folder, capture_output=True, text=True, timeout=400)
    found = re.findall(r"^(PASSED|FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", ran.stdout, re.M)
    assert found, ran.stdout + ran.stderr
    return {test: outcome for outcome, test in found}, ran.stdout


def made(folder, exercises):
    names = [name for exercise in exercises for name in exercise.names]
    make_assignment.main([str(folder), *names])
    return folder


@pytest.mark.parametrize("exercises", [FIRST, SECOND], ids=["first", "second"])
def test_grading_tests_fail_with_a_hint_and_no_others(exercises, tmp_path):
    """A test that passes on a blank body grades nothing; one that fails elsewhere misleads."""
    if not CXX:
        exercises = [e for e in exercises if "emulated" not in e.match]
    folder = made(tmp_path / "assignment", exercises)
    match = " or ".join(e.match for e in exercises)
    files = sorted({f"tests/{e.tests}" for e in exercises})
    outcomes, said = run(folder, files, match)
    for e in exercises:
        graded = {test: outcome for test, outcome in outcomes.items()
                  if f"/{e.tests}::" in test and make_assignment.grades(e.match, test)}
        if e.names[0].endswith("_removed"):                  # a bug, which a part of them finds
            assert "FAILED" in graded.values(), f"{e.names} is not found"
        else:
            assert set(graded.values()) == {"FAILED"}, f"{e.names}: {graded}"
            assert any(f"exercise {name}: write it" in said for name in e.names), e.names
        for test in graded:
            outcomes[test] = "graded"
    assert set(outcomes.values()) <= {"graded", "PASSED"}, outcomes


def test_a_right_solution_passes_and_a_wrong_one_fails(tmp_path):
    folder = made(tmp_path / "assignment", [e for e in EXERCISES if e.names == ("cosine_lr",)])
    graded, text = (["tests/test_run.py"], "rate_rises"), (ROOT / "fgssl.py").read_text()
    (folder / "fgssl.py").write_text(text)
    assert set(run(folder, *graded)[0].values()) == {"PASSED"}
    body = make_assignment.find("cosine_lr")
    (folder / "fgssl.py").write_text(text[:body.start] + "return peak" + text[body.end:])
    outcomes, said = run(folder, *graded)
    assert set(outcomes.values()) == {"FAILED"} and "NotImplementedError" not in said


def test_every_file_compiles_with_any_function_blank():
    for file in sorted(ROOT.glob("*.py")):
        text = file.read_text()
        for function in make_assignment.python_functions(file):
            blank = make_assignment.blank(text, function, EXERCISES[0])
            compile(blank, f"{file.name}:{function.name}", "exec", dont_inherit=True)
            assert blank.count(f"exercise {function.name}: write it") == 1


def test_what_cannot_be_made_is_said(tmp_path, capsys):
    for argv, wanted in ((["out"], "at least one function"), (["out", "nonsense"], "no function"),
                         (["out", "main"], "py:main or"),
                         ([str(tmp_path), "cosine_lr"], "name a new folder")):
        with pytest.raises(SystemExit):
            make_assignment.main(argv)
        assert wanted in capsys.readouterr().err


def test_the_list_names_every_exercise(capsys):
    make_assignment.main(["--list"])
    said = capsys.readouterr().out
    assert all(e.hint in said and make_assignment.command(e) in said for e in EXERCISES)


def test_the_readme_has_the_table_of_exercises():
    assert make_assignment.table() in (ROOT / "README.md").read_text(), (
        "paste what tests/make_assignment.py's table() returns")
