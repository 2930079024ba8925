"""The lessons of kernels/lessons: right, without a fault in three orders of threads, and fast.

These tests grade. In an assignment they try its lessons as they stand in kernels/lessons; in the
project, where those are wrong or slow on purpose, the solutions of course/solutions.
"""

import json
import re
from pathlib import Path

import pytest
from test_kernels_emulator import CXX

from kernels import watch

pytestmark = pytest.mark.skipif(not CXX, reason="lessons need g++")

ROOT = Path(__file__).resolve().parent.parent
KERNEL = re.compile(r"__global__ void (\w+)\(.*?^}\n", re.M | re.S)
FILES = {KERNEL.search(file.read_text())[1]: file.relative_to(ROOT)
         for file in sorted(ROOT.glob("kernels/lessons/*.cu"))}


def with_kernel(kernel, text):
    """A lesson's text with another definition of its kernel."""
    return KERNEL.sub(lambda _: KERNEL.search(text)[0], (ROOT / FILES[kernel]).read_text())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """watched(kernel): what the watch says of a lesson; each is compiled and run once."""
    found = {}
    assignment = ROOT / "tests" / "assignment.json"
    asked = json.loads(assignment.read_text()) if assignment.exists() else None

    def of(kernel):
        if asked is not None and not any(kernel in exercise["names"] for exercise in asked):
            pytest.skip(f"{FILES[kernel]} is no exercise of this assignment")
        if kernel not in found:
            file = FILES[kernel]                             # from the top of the project
            solution = ROOT / "course" / "solutions" / f"{kernel}.cu"
            if solution.exists():
                file = tmp_path_factory.mktemp("lesson") / file.name
                file.write_text(with_kernel(kernel, solution.read_text()))
            found[kernel] = watch.report(str(file))
        return found[kernel]

    return of


# ---------------------------------------- what is measured: (value, the line that costs most)

def in_space(report, space, op=""):
    return [line for line in report["lines"] if line["space"] == space and op in line["op"]]


def worst(lines, cost):
    return max(lines, key=cost, default=None)


def sectors(report):
    line = worst(in_space(report, "global"), lambda line: line["per_request"])
    return line["per_request"], line


def conflicts(report):
    line = worst(in_space(report, "shared"), lambda line: line["per_request"] / line["ideal"])
    return line and line["per_request"] / line["ideal"], line


def global_atomics(report):
    lines = in_space(report, "global", "atomic")
    return (sum(line["requests"] * line["lanes"] for line in lines),
            worst(lines, lambda line: line["requests"]))


def shared_requests(report):
    lines = in_space(report, "shared")
    return (sum(line["requests"] for line in lines),
            worst(lines, lambda line: line["requests"]))


def wavefronts(report):
    lines = in_space(report, "shared")
    return (sum(line["requests"] * line["per_request"] for line in lines) or None,
            worst(lines, lambda line: line["requests"] * line["per_request"]))


def bytes_read(report):
    return (sum(read for _, read, _ in report["kernels"].values()),
            worst(in_space(report, "global", "read"), lambda line: line["requests"]))


# kernel, the measure, what it is divided by, the limit, what it is called. The divisors are those
# of the launches in main(); the limits are those in the head of each lesson.
LAUNCHES = {"vector_add": 3, "histogram": 4, "transpose": 3, "block_sums": 4, "softmax": 4,
            "matmul": 2, "mma_tile": 1}
PRODUCTS = 128 * 128 * 64 + 67 * 3 * 17
STEPS = [
    ("vector_add", sectors, 1, 4.5, "sectors a request"),
    ("histogram", None, 1, 0, ""),
    ("histogram", global_atomics, 4, 1024, "atomic operations on global memory a launch"),
    ("transpose", sectors, 1, 4.5, "sectors a request"),
    ("transpose", conflicts, 1, 1.1, "times the least wavefronts"),
    ("block_sums", None, 1, 0, ""),
    ("block_sums", shared_requests, 8, 16, "requests of shared memory a block"),
    ("softmax", None, 1, 0, ""),
    ("softmax", bytes_read, 6 * (200 + 64 + 5 + 1), 8.1, "bytes read an element"),
    ("matmul", bytes_read, PRODUCTS, 0.25, "bytes read a multiply-add"),
    ("matmul", wavefronts, PRODUCTS / 32, 1.1, "wavefronts for a multiply-add of a warp"),
    ("mma_tile", None, 1, 0, ""),
    ("mma_tile", wavefronts, 2, 140, "wavefronts of shared memory a block"),
]


def complaint(report, kernel, measure, unit, most, what):
    """What is wrong or too slow, or nothing."""
    if report["faults"]:
        return report["faults"][0]["text"]
    if report["kernels"].get(kernel, [0])[0] != LAUNCHES[kernel]:
        return f"main() ended before all launches of {kernel}"
    if measure is None:
        return ""
    value, line = measure(report)
    if value is None:
        return f"shared memory is not used; wanted at most {most} {what}"
    place = f"; most at line {line['line']}: `{line['source']}`" if line else ""
    wrong = value / unit > most
    return f"{value / unit:.3g} {what}, wanted at most {most}{place}" if wrong else ""


@pytest.mark.parametrize("step", STEPS, ids=[
    f"{kernel}-{measure.__name__ if measure else 'right'}" for kernel, measure, *_ in STEPS])
def test_lesson(watched, step):
    """No fault in three orders of threads, and no more of what costs time than the head allows."""
    says = complaint(watched(step[0]), *step)
    assert not says, says
