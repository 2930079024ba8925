"""What a handout adds to pytest: which tests grade, what waits, and where one stands.

course.make copies it to tests/grading.py, where conftest.py imports it.
"""

import json
import re
from pathlib import Path

import pytest


def chosen(match, test):
    """Whether pytest's -k would choose the test of this name: "a and b or c"."""
    return any(all(word in test for word in choice.split(" and "))
               for choice in match.split(" or "))


def grades(exercise, nodeid):
    """Whether the test tests/FILE::NAME grades the exercise."""
    file, _, test = nodeid.partition("::")
    return Path(file).name == exercise["tests"] and chosen(exercise["match"], test)


def exercises():
    return json.loads((Path(__file__).parent / "assignment.json").read_text())


def blanks(exercise, report):
    """The errors of bodies still to write of which the report of a test speaks."""
    names = "|".join(map(re.escape, exercise["names"]))
    return re.findall(rf"exercise (?:{names}): write it.*", str(report.longrepr))


def pytest_configure(config):
    config.addinivalue_line("markers", "exercise: grades an exercise of this assignment")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(grades(exercise, item.nodeid) for exercise in exercises()):
            item.add_marker("exercise")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Of a blank body a line is enough; a test that it does not grade waits for it, skipped."""
    report = yield
    for exercise in exercises() if report.failed else ():
        if found := blanks(exercise, report):
            if not grades(exercise, item.nodeid):
                report.outcome = "skipped"
                why = f"Skipped: waits for {', '.join(exercise['names'])}"
                report.longrepr = str(item.path), item.location[1], why
            else:
                report.longrepr = found[-1]
            break
    return report


def state(exercise, stats):
    """(solved or what else, more about it), of the outcomes of its tests; None if none ran."""
    of = {kind: [report for report in stats.get(kind, ()) if grades(exercise, report.nodeid)]
          for kind in ("passed", "failed", "error", "skipped")}
    passed, failed = len(of["passed"]), of["failed"] + of["error"]
    share = f"{passed} of {passed + len(failed)} tests pass"
    if any(blanks(exercise, report) for report in failed):
        return "to write", exercise["hint"]
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(failed[0].longrepr)).strip().splitlines()
        why = lines[-1 if lines[0].rstrip().endswith(":") else 0]     # another process's: the last
        test = failed[0].nodeid.partition("::")[2]
        return "not yet", f"{share}; {test}: {why.removeprefix('AssertionError: ')}"
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in of["skipped"]]
    waits = [reason for reason in reasons if reason.startswith("waits for")]
    if waits or reasons and not passed:
        return "skipped", (waits or reasons)[0]
    if passed:
        return "solved", share
    for report in stats.get("error", ()):                    # the file was not even collected
        if Path(report.nodeid).name == exercise["tests"]:
            return "not yet", str(report.longrepr).split("\nE ")[-1].strip()
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)                # after pytest's own summaries
def pytest_terminal_summary(terminalreporter):
    yield
    terminalreporter.section("exercises")
    states = {", ".join(exercise["names"]): state(exercise, terminalreporter.stats)
              for exercise in exercises()}
    for name, found in states.items():
        if found:
            terminalreporter.line(f"{name:{max(map(len, states))}}  {found[0]:8}  {found[1]}")
    others = [name for name, found in states.items() if not found]
    if others:
        terminalreporter.line(f"not among the tests of this command: {'; '.join(others)}")
