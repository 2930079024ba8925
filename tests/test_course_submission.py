"""What is taken from a submission: the body that its author means, whatever is around it."""

import socket
import threading
import zipfile

import numpy as np
import pytest
import torch

from course import link, source, submission

pytestmark = pytest.mark.course  # .ci/run has them

PLACE, NAME = "fgssl.py", "cosine_lr"
BLANK = '''import math


def cosine_lr(step, total, warmup, peak):
    """The rate of a step."""
    raise NotImplementedError("exercise cosine_lr: write it")
'''
HEAD = "def cosine_lr(step, total, warmup, peak):\n"


def body(text, **others):
    """The Body in a fgssl.py of this text; others: NAME=text of further files."""
    files = {"fgssl.py": text} | {f"{name}.py": more for name, more in others.items()}
    return submission.one_body({k: v.encode() for k, v in files.items()}, PLACE, NAME, BLANK)


@pytest.mark.parametrize("text", [
    HEAD + "    return peak\n", HEAD.strip() + " return peak\n",
    "def cosine_lr(step: int, total: int, warmup, peak: float) -> float:\n    return peak\n",
    HEAD + '    """Mine."""\n    return peak\n', BLANK + "\n\n" + HEAD + "    return peak\n"],
    ids=["plain", "one line", "with types", "another docstring", "below the blank"])
def test_every_way_to_write_a_function_is_read(text):
    """A body on the line of its signature, or below what was handed out, was not found."""
    assert body(text).text == "return peak"


@pytest.mark.parametrize("text", [BLANK, HEAD + '    """Only this."""\n', HEAD + "    pass\n",
                                  HEAD + "    ...\n", BLANK.replace("raise", "# mine\n    raise")])
def test_what_is_not_written_is_to_write(text):
    assert body(text) == submission.Body(None, "to write")


def test_another_signature_is_named():
    """It would end as a NameError of a variable that its author sees defined."""
    found = body("\ndef cosine_lr(t, total, warmup, peak):\n    return peak * t\n")
    assert found.text is None and "fgssl.py line 2: cosine_lr(t, total" in found.says


def test_of_two_files_the_one_with_a_body_counts():
    """The handout beside the solution: which comes first in the alphabet must not decide."""
    assert body(BLANK, my_solution=HEAD + "    return 1\n").text == "return 1"
    assert body("def cosine_lr(:", my_solution=HEAD + "    return 1\n").text == "return 1"
    assert "fgssl.py line 1" in body("def cosine_lr(:", notes="# cosine_lr is hard").says


def test_only_imports_that_the_body_needs_come_along():
    """One for a plot in another function would end a right body on a machine without it."""
    text = "import matplotlib.pyplot as plt\nfrom math import cos, pi\nimport numpy as np\n"
    assert body(text + HEAD + "    return peak * np.float64(cos(pi))\n").text == (
        "from math import cos, pi\nimport numpy as np\nreturn peak * np.float64(cos(pi))")


@pytest.mark.parametrize("expression", [
    "+".join(["1"] * 1500), "0x" + "f" * 5000, "-" * 900 + "1", "(" * 5000 + ")" * 5000],
    ids=["sum", "hexadecimal", "minus", "brackets"])
def test_what_python_cannot_read_is_the_students_error(expression):
    """It ended the judge, and was reported as the grader's own failure."""
    found = body(f"{HEAD}    return {expression}\n")
    assert found.state == "not yet" and found.says.startswith("fgssl.py"), found


@pytest.mark.parametrize("coding", ["undefined", "idna", "rot13", "utf-7", "no-such"])
def test_no_coding_line_ends_the_judge(coding):
    text = f"# coding: {coding}\n# \xe9\n{HEAD}    return peak\n"
    files = {"fgssl.py": text.encode("latin-1")}
    assert submission.one_body(files, PLACE, NAME, BLANK).text == "return peak"


def test_no_link_is_followed_and_no_path_leads_out(tmp_path):
    (tmp_path / "secret.py").write_text(HEAD + "    return 1\n")
    (tmp_path / "in").mkdir()
    for name in ("in/fgssl.py", "ann.py"):
        (tmp_path / name).symlink_to(tmp_path / "secret.py")
    (tmp_path / "bob").symlink_to(tmp_path)
    assert submission.read(tmp_path / "in") == {}
    for name in ("ann.py", "bob"):
        with pytest.raises(ValueError, match="is a link"):
            submission.read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        archive.writestr("../../fgssl.py", HEAD + "    return 2\n")
    assert submission.read(tmp_path / "up.zip") == {}


def test_a_bug_hunt_takes_the_changed_file():
    old = {"kernels/nt_xent.cu": "int x = 1;"}
    files = {"a/kernels/nt_xent.cu": b"int x = 1;", "b/kernels/nt_xent.cu": b"int x = 2;"}
    found, new = submission.whole_files(files, old)
    assert found.text and new == {"kernels/nt_xent.cu": "int x = 2;"}
    found, new = submission.whole_files({"nt_xent.cu": b"int  x = 1;"}, old)
    assert found.state == "to write"


def test_the_functions_of_a_project_file_are_found_by_both_searches():
    text = source.read(source.ROOT / "fgssl.py")
    for function in source.functions("fgssl.py", text):
        node = source.definition(text, function.name)
        assert source.python_body(node) == source.body_of(text, function)


# Answers ------------------------------------------------------------------------------------------

def linked(function):
    """A Link whose other end, in a thread, serves this function."""
    here, there = socket.socketpair()
    other = link.Link(there, lambda name, settings: function)

    def serve():
        try:
            other.serve()
        except link.LinkError:
            pass
    threading.Thread(target=serve, daemon=True).start()
    return link.Link(here)


@pytest.mark.parametrize("x", [torch.ones(3), np.ones(3)], ids=["tensor", "array"])
def test_a_body_that_changes_its_argument_is_refused(x):
    """x.zero_(); return 0: a test that computes what it wants from x afterwards would pass."""
    def zero(x):
        x[:] = 0
        return x.sum()
    with pytest.raises(AssertionError, match="argument 1 was changed in place"):
        linked(zero).call("f", (x,))
    assert x.sum() == 3


def test_draws_from_a_generator_are_drawn_here_too():
    rng, same = (torch.Generator().manual_seed(0) for _ in range(2))
    ours = linked(lambda rng: torch.rand(2, generator=rng)).call("f", (rng,))
    assert torch.equal(ours, torch.rand(2, generator=same))
    assert torch.equal(rng.get_state(), same.get_state())


@pytest.mark.parametrize("size", [2**25, 2**63])
def test_an_answer_that_would_fill_the_memory_is_not_read(size):
    """[[],[],...] of 1 GB is 20 GB once it is read: the judge's memory ended, not the student's."""
    here, there = socket.socketpair()
    there.sendall(size.to_bytes(8, "big") + b"[")
    with pytest.raises(link.LinkError, match=f"an answer of {size} bytes"):
        link.Link(here, deadline=None).receive()


def test_arrays_of_many_gigabytes_are_not_read():
    here, there = socket.socketpair()
    text = b'["value", null, [1000000000, 1000000000]]'
    there.sendall(len(text).to_bytes(8, "big") + text)
    with pytest.raises(link.LinkError, match="2000000000 bytes"):
        link.Link(here).receive()
