"""The graders of the exercises: any right body passes, and each known wrong one fails."""

import json
import os
import subprocess
import sys

import pytest
from variants import bodies

from course import grade, make, source

ROOT = source.ROOT


def graded(folder, right, wrong, names):
    """What the grader says of so many right and wrong bodies of each exercise."""
    handout, judge = folder / "handout", folder / "judge"
    entries = make.make(handout, names)
    grade.make_judge(handout, entries, judge)
    run = subprocess.run(
        [sys.executable, judge / "tests" / "variants" / "run.py", str(right), str(wrong), *names],
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
    check(graded(tmp_path, 1, 2, ["cosine_lr", "hflip", "nt_xent_dense", "knn", "grad_cam"]))


ON_CUDA = {"tiles_forward", "forward_simt"}                  # compiled for each: a minute or two


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.cuda_variants if name in ON_CUDA else pytest.mark.variants)
    for name in bodies.RIGHT])
def test_graders_accept_every_right_body_and_refuse_every_wrong_one(name, tmp_path):
    assert len(bodies.RIGHT[name]) >= 3 and len(bodies.WRONG[name]) >= 8
    check(graded(tmp_path, 99, 99, [name]))
