"""Grades submissions: the tests run here, the handed-in bodies in a sandbox.

Started by grade.py, which writes a line of JSON for each submission (see Grading.grade); answers
with a line of JSON for each. Works in a copy of the project in which graded functions ask seam.py,
and runs no code that was handed in.
"""

import json
import os
import random
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from course import sandbox, seam, source, submission
from course.progress import chosen

COMPILED = 5                             # a kernel's exercise gets so many times the time


class Tests:
    """A pytest plugin: chooses the tests of one exercise, and keeps what became of each.

    results: {test: message, or None if it passed}; skipped: {test: reason}. begin() is called
    before the first test: to collect them is no time of the submission's.
    """

    def __init__(self, exercise, student, hidden, begin=lambda: None):
        self.exercise, self.student, self.hidden, self.begin = exercise, student, hidden, begin
        self.results, self.skipped, self.stopped = {}, {}, None

    def grades(self, item):
        if Path(item.fspath).parent.name in self.hidden:
            names = [re.sub(r"\W", "_", name) for name in self.exercise["names"]]
            return item.name.startswith(tuple(f"test_{name}" for name in names))
        return chosen(self.exercise["match"], item.name)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.grades(item)]

    @pytest.fixture
    def draw(self):
        """Random numbers of this student's own, for hidden tests."""
        return random.Random(self.student)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = item.nodeid.rpartition("/")[2].partition("::")[2]
        if report.failed:
            self.results[name] = message(call.excinfo, item.function.__doc__)
            if isinstance(call.excinfo.value, TimeoutError):
                self.stopped = self.results[name]
        elif report.skipped:
            self.skipped[name] = str(report.longrepr[2])
        elif report.when == "call":
            self.results.setdefault(name, None)
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        if self.begin:
            self.begin()
            self.begin = None
        if self.stopped:
            pytest.fail(self.stopped, pytrace=False)

    def pytest_collectreport(self, report):
        if report.failed:
            self.results[report.nodeid] = f"its tests cannot be read: {str(report.longrepr)[-500:]}"


def message(excinfo, doc=None):
    """What a student is told of a failed test, in a line or a few; doc: the test's docstring."""
    error, text = excinfo.value, str(excinfo.value).strip()
    kind = type(error).__name__
    if isinstance(error, TimeoutError):
        return "no answer in time: a loop without end, or one that should be an array operation?"
    if kind == "LinkError":
        return (f"{text}. Did the body end the process, use up the memory (4 GiB), or crash?"
                if "ended" in text else text)
    if kind == "ProcessRaisedException":
        text = text.splitlines()[-1]
    found = re.search(r"exercise [\w.]+: write it", text)
    if found:
        return found[0]
    compiler = re.search(r"([\w.]+\.cuh?):(\d+)(?::\d+)?: (?:fatal )?error: (.*)", text)
    if compiler:
        return f"{compiler[1]} line {compiler[2]}: {compiler[3]}"
    text = text.partition("\nassert ")[0] if kind == "AssertionError" else text
    if text.startswith("assert "):                   # no words of its own: what the test is about
        return " ".join((doc or "the result is not what the docstring says").split())
    if kind == "Failed":
        return text
    if kind == "NotSendable":
        return f"it returns {text}, which is none of what the docstring says"
    if kind == "NameError":
        text += "; only the body is graded: put helper functions into it"
    return text if kind == "AssertionError" else f"{kind}: {text}"


def submission_tree(spec, files, work):
    """The project as handed out, less tests and documents, with the bodies of a submission.

    Returns (folder, {name: Body}).
    """
    tree = Path(shutil.copytree(spec["template"], work / "tree"))
    for path in (tree, *tree.rglob("*")):                # another user reads it
        path.chmod(0o755 if path.is_dir() else 0o644)
    texts, bodies = {}, {}
    for exercise in spec["exercises"]:
        if exercise["bug"]:
            old = {place: source.read(tree / place) for place in exercise["files"]}
            bodies[exercise["names"][0]], new = submission.whole_files(files, old)
            texts |= new
            continue
        for name, place in zip(exercise["names"], exercise["files"]):
            old = texts.setdefault(place, source.read(tree / place))
            body = bodies[name] = submission.one_body(files, place, name, old)
            if body.text is not None:
                function, = (f for f in source.functions(place, old) if f.name == name)
                texts[place] = source.put(old, function, body.text)
    for place, text in texts.items():
        (tree / place).write_text(text, encoding="utf-8", errors="backslashreplace")
    return tree, bodies


class Grader:
    """Runs the tests of one exercise after the other; restarts the sandbox when it is spoilt."""

    def __init__(self, spec, tree):
        self.spec, self.tree, self.box, self.path, self.cuda = spec, tree, None, None, None

    def start(self, cuda):
        """A new sandbox. Only an exercise in CUDA finds kernels there: they compute the same as
        kernels/reference.py, whose functions are exercises, too."""
        self.stop()
        self.cuda, here, aside = cuda, self.tree / "kernels", self.tree.parent / "aside"
        aside.mkdir(mode=0o700, exist_ok=True)
        for file in (aside if cuda else here).glob("*.cu*"):
            file.rename((here if cuda else aside) / file.name)
        self.path = str(self.tree.parent / f"door{time.monotonic_ns()}")
        door = socket.socket(socket.AF_UNIX)
        door.bind(self.path)
        door.listen(16)
        self.box = sandbox.Sandbox(self.tree, door, self.spec["mode"], self.spec["user"],
                                   self.spec["timeout"] * COMPILED)
        door.close()                                 # if the worker dies, nobody listens

    def stop(self):
        if self.box:
            self.box.kill()
            self.box = None

    def ask(self, seconds, keys=()):
        """From now on, for so long, the functions of these keys are the submission's."""
        os.environ[seam.VARIABLE] = json.dumps(
            {"keys": keys, "socket": self.path, "deadline": time.monotonic() + seconds})

    def run(self, exercise):
        """The Tests plugin with the results of an exercise."""
        if not self.box or self.box.process.poll() is not None or self.cuda != exercise["cuda"]:
            self.start(exercise["cuda"])
        hidden = [Path(folder) for folder in self.spec["hidden"]]
        keys = [f"{file}:{name}" for name, file in zip(exercise["names"], exercise["files"])]
        seconds = self.spec["timeout"] * (COMPILED if exercise["cuda"] else 1)
        plugin = Tests(exercise, self.spec["seed"], [folder.name for folder in hidden],
                       lambda: self.ask(seconds, keys))
        if exercise["cuda"]:
            seam.register_ops()
        files = [f"tests/{exercise['tests']}",
                 *(str(file) for folder in hidden for file in sorted(folder.glob("test_*.py")))]
        try:
            pytest.main(["-p", "no:cacheprovider", "-p", "no:terminal", "-o", "addopts=",
                         *files], plugins=[plugin])
        finally:
            os.environ.pop(seam.VARIABLE, None)
        if any(plugin.results.values()):
            self.stop()                              # it may have left processes behind
        return plugin


def result(exercise, bodies, plugin):
    """What grade.py is told of an exercise: state, points and messages."""
    found = [bodies[name] for name in exercise["names"]]
    problem = next((body for body in found if body.state), None)
    outcome = plugin.results if plugin else {}
    weight = {test: weight_of(exercise, test) for test in outcome}
    passed = [test for test, says in outcome.items() if says is None]
    total = sum(weight.values())
    share = sum(weight[test] for test in passed) / total if total else 0
    failed = {test: says for test, says in outcome.items() if says is not None}
    if problem:
        state, says = problem.state, problem.says or exercise["hint"]
    elif failed:
        state, (test, says) = "not yet", first_failure(failed)
        says = f"{says} ({test})"
    elif passed and not plugin.skipped:
        state, says = "solved", ""
    else:
        state = "not run"
        says = next(iter(plugin.skipped.values()), "no test was found") if plugin else "no test"
    if state in ("missing", "to write") and len(found) == sum(bool(b.state) for b in found):
        share = 0
    return {"title": exercise["title"], "state": state, "passed": len(passed),
            "total": len(outcome), "points": round(share * exercise["points"], 2),
            "most": exercise["points"], "says": says, "failed": failed, "good": passed}


def weight_of(exercise, test):
    return next((w for word, w in exercise["weights"].items() if word in test), 1)


def first_failure(failed):
    """The failure that says most: an error in the code before a wrong number."""
    return min(failed.items(), key=lambda item: "line `" not in item[1])


def grade(spec):
    """The results of one submission, as `result` gives them."""
    try:
        files = submission.read(spec["submission"])
    except (ValueError, OSError) as error:
        bad = submission.Body(None, "unreadable", str(error))
        return [result(e, dict.fromkeys(e["names"], bad), None) for e in spec["exercises"]]
    tree, bodies = submission_tree(spec, files, Path(spec["work"]))
    if all(body.text is None for body in bodies.values()) and "to write" in {
            body.state for body in bodies.values()}:
        same = submission.Body(None, "unchanged", "no body of the handout was changed")
        bodies = dict.fromkeys(bodies, same)
    grader, results = Grader(spec, tree), []
    try:
        for exercise in spec["exercises"]:
            written = any(bodies[name].text is not None for name in exercise["names"])
            results.append(result(exercise, bodies, grader.run(exercise) if written else None))
    finally:
        grader.stop()
    return results


def main():
    answers = os.fdopen(os.dup(1), "w")              # pytest's own output goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    for line in sys.stdin:
        print(json.dumps(grade(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
