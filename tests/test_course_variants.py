"""The graders of the exercises: any right body passes, and each known wrong one fails."""

import json
import os
import subprocess
import sys

import pytest
from test_kernels_emulator import CXX
from variants import bodies

from course import exercises, grade, make, source

ROOT = source.ROOT


def graded(folder, names, *what):
    """What the grader says of bodies of these exercises, as run.py prints it: of so many right and
    wrong ones, or of bugs."""
    handout, judge = folder / "handout", folder / "judge"
    grade.make_judge(handout, make.make(handout, names), judge)
    run = subprocess.run(
        [sys.executable, judge / "tests" / "variants" / "run.py", *what],
        cwd=judge, capture_output=True, text=True,
        env=os.environ | {"PLAIN": str(ROOT), "PYTHONPATH": str(judge)})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def check(found):
    refused = {(name, title): says for name, of in found.items() for title, says in of.items()
               if says and title.startswith("right")}
    assert not refused, f"right bodies are refused: {refused}"
    accepted = [(name, title) for name, of in found.items() for title, says in of.items()
                if not says and title.startswith("wrong")]
    assert not accepted, f"wrong bodies pass: {accepted}"
    bare = {(name, title): says for name, of in found.items() for title, says in of.items()
            for says in says.values() if says.startswith("assert ") or not says.strip()}
    assert not bare, f"these messages teach nothing: {bare}"


def test_graders_accept_a_right_body_and_refuse_two_wrong_ones(tmp_path):
    names = ["cosine_lr", "hflip", "nt_xent_dense", "knn", "grad_cam"]
    check(graded(tmp_path, names, "1", "2", *names))


@pytest.mark.variants
@pytest.mark.parametrize("name", bodies.RIGHT)
def test_graders_accept_every_right_body_and_refuse_every_wrong_one(name, tmp_path):
    assert len(bodies.RIGHT[name]) >= 3 and len(bodies.WRONG[name]) >= 8
    check(graded(tmp_path, [name], "99", "99", name))


BUGS = [bug for _, _, bugs in exercises.HUNTED.values() for bug in bugs]


@pytest.mark.course
@pytest.mark.skipif(not CXX, reason="there is no g++ to compile the kernels with")
def test_the_tests_handed_out_with_a_bug_find_it(tmp_path):
    """A hunt for a bug that no test shows cannot end. Each of these is planted, and graded by the
    tests of its handout alone."""
    names = [*BUGS, *(e.names[0] for e in exercises.EXERCISES if exercises.is_bug(e))]
    found = graded(tmp_path, ["cosine_lr"], "hunt", *names)
    hidden = {name: says for name, says in found.items() if not says or "" in says}
    assert found.keys() == set(names) and not hidden, f"not found by a test: {hidden}"
