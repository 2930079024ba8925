"""Lessons: what is handed out is wrong or slow as its head says; right bodies pass, wrong ones do not;
a submission cannot speak for the watch."""

import csv
import subprocess
import sys

import pytest
from test_kernels_emulator import CXX
from test_lessons import FILES, KERNEL, ROOT, STEPS, complaint, conflicts, wavefronts, with_kernel
from variants import lesson_bodies

from course import make, source, submission
from kernels import watch

pytestmark = [pytest.mark.course, pytest.mark.skipif(not CXX, reason="lessons need g++")]

SOLUTIONS = ROOT / "course" / "solutions"
STATED = {"vector_add": "race", "histogram": "race", "block_sums": "race", "softmax": "wrong",
          "mma_tile": "wrong"}           # what `check` finds first in what is handed out


def text_of(kernel, change=lambda body: body):
    """The lesson with its solution's body, changed."""
    solution = source.read(SOLUTIONS / f"{kernel}.cu")
    function, = source.functions(SOLUTIONS / f"{kernel}.cu")
    body = change(solution[function.start:function.end])
    return with_kernel(kernel, solution[:function.start] + body + solution[function.end:])


def report_of(kernel, text, folder):
    file = folder / FILES[kernel].name
    file.write_text(text)
    return watch.report(str(file))


def complaints(kernel, report):
    return [complaint(report, *step[1:]) for step in STEPS if step[0] == kernel]
