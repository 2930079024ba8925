"""Grading: what a submission does to itself, to the tests or to the machine changes no verdict.

One run grades them all, as a teacher would; each test looks at a line of the CSV.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from course import grade, make, sandbox, source, submission

pytestmark = pytest.mark.course  # minutes: .ci/run has them

ROOT = source.ROOT
RIGHT = """\
if step < warmup:
    return peak * step / warmup
return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2
"""
HALF = "if step < warmup:\n    return peak * step / warmup\nreturn peak"
# Each ends with a wrong answer: what comes before must not make it right.
HOSTILE = {
    "ends the process": "import os\nos._exit(0)",
    "says it passed": "import sys\nsys.exit(0)",
    "kills everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "forks without end": "import os\nwhile True:\n    os.fork()",
    "never ends": "while True:\n    pass",
    "takes all memory": "x = []\nwhile True:\n    x.append(torch.empty(2 ** 26))",
    "floods the output": "import os\nos.write(1, b'solved ' * 10 ** 7)\n" + HALF,
    "patches pytest, torch and math": """\
import sys
math.isclose = lambda *a, **k: True
torch.equal = torch.allclose = lambda *a, **k: True
for name, module in list(sys.modules.items()):
    if "test" in name:
        module.__dict__.clear()
class Equal(float):
    def __eq__(self, other): return True
    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __sub__(self, other): return Equal(0)
    __rsub__ = __sub__
    __hash__ = None
return Equal(0)""",
    "answers for the tests": """\
import gc, socket, struct, json
for plug in [x for x in gc.get_objects() if isinstance(x, socket.socket)]:
    text = json.dumps(["value", {"tuple": ["solved", {"dict": []}, None]}, []]).encode()
    try:
        plug.sendall(3 * (struct.pack(">Q", len(text)) + text))
    except OSError:
        pass
return 0.0""",
    "answers with nonsense": """\
import gc, socket
for plug in [x for x in gc.get_objects() if isinstance(x, socket.socket)]:
    try:
        plug.sendall(b"\\xff" * 10 ** 6)
    except OSError:
        pass
return 0.0""",
    "writes to every descriptor": """\
import os
for fd in range(3, 256):
    try:
        os.write(fd, b'{"state": "solved"}\\n' * 1000)
    except OSError:
        pass
return peak""",
    "stops what is above it": """\
import ctypes, os, signal
for pid in (1, os.getppid()):
    ctypes.CDLL(None).ptrace(16, pid, 0, 0)              # PTRACE_ATTACH
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except OSError:
            pass
return peak""",
    "answers with a gigabyte": """\
import gc, socket
for plug in [x for x in gc.get_objects() if isinstance(x, socket.socket)]:
    try:
        plug.sendall((2 ** 30).to_bytes(8, "big") + b"[" + b"[]," * 2 ** 24)
    except OSError:
        pass
return peak""",
    "leaves a thread and a process behind": """\
import os, threading, time
def later():
    while True:
        time.sleep(0.1)
        for fd in range(3, 40):
            try:
                os.write(fd, b"x" * 99)
            except OSError:
                pass
threading.Thread(target=later, daemon=True).start()
if not os.fork():
    os.setsid()
    later()
return peak""",
    "calls the project's own": """\
import importlib, sys
for name in ("fgssl", "course.seam", "course.grade", "course.hidden.test_hidden"):
    try:
        own = importlib.import_module(name).cosine_lr
        if own.__code__ is not sys._getframe().f_code:
            return own(step, total, warmup, peak)
    except (ImportError, AttributeError):
        pass
return peak""",
    "deletes files": """\
import glob, os, shutil
for folder in (PRECIOUS, os.getcwd(), os.path.expanduser("~"), "/tmp"):
    shutil.rmtree(folder, ignore_errors=True)
""" + HALF,
    "reads the solution": """\
import glob, re
for file in glob.glob(PRECIOUS + "*.py") + glob.glob("/proc/*/root" + PRECIOUS + "*.py") + \\
        glob.glob("/proc/*/cwd/*.py") + glob.glob("/tmp/**/fgssl.py", recursive=True):
    try:
        found = re.search(r"    if step < warmup:\\n.*?math.cos.*?\\n", open(file).read(), re.S)
        space = {"math": math}
        exec("def f(step, total, warmup, peak):\\n" + found[0], space)
        return space["f"](step, total, warmup, peak)
    except (OSError, TypeError):
        pass
return 0.0""",
    "calls out": """\
import socket
plug = socket.create_connection(("127.0.0.1", PORT), 5)
plug.sendall(b"here")
""" + RIGHT,
}


def text_with(body, name="cosine_lr"):
    """fgssl.py as a student would hand it in, with this body."""
    function = source.find(name)
    return source.put(source.read(function.file), function, body)


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    out = tmp_path_factory.mktemp("handout") / "out"
    make.make(out, ["cosine_lr"])
    return out


@pytest.fixture(scope="module")
def marks(handout, tmp_path_factory):
    """{student: line of the CSV} of a class, with what the grader printed and its exit status."""
    top = tmp_path_factory.mktemp("class")
    precious = top / "precious"
    precious.mkdir()
    (precious / "fgssl.py").write_text(source.read(ROOT / "fgssl.py"))
    for file in (precious, top):
        file.chmod(0o777)
    (top / "in").mkdir()
    for name, body in HOSTILE.items():
        body = body.replace("PRECIOUS", repr(f"{precious}/")).replace("PORT", "9")
        (top / "in" / name).mkdir()
        (top / "in" / name / "fgssl.py").write_text(text_with(body))
    folder = {"plain": RIGHT, "half": HALF, "with its own tests": "return peak"}
    for name, body in folder.items():
        (top / "in" / name).mkdir()
        (top / "in" / name / "fgssl.py").write_text(text_with(body))
    own = top / "in" / "with its own tests"
    (own / "tests").mkdir()
    (own / "tests" / "test_run.py").write_text("def test_rate_rises(): pass")
    for file in (own / "conftest.py", own / "pytest.py", own / "math.py", own / "tests" /
                 "conftest.py"):
        file.write_text("import os; os._exit(0)")
    (own / "pytest.ini").write_text("[pytest]\naddopts = --collect-only")
    nested = top / "in" / "nested" / "hw 1" / "homework"
    nested.mkdir(parents=True)
    (nested / "fgssl.py").write_bytes(
        ("# -*- coding: latin-1 -*-\n# é\n" + text_with(RIGHT)).encode("latin-1"))
    undeclared = text_with(RIGHT + "# für Städte\n")
    (top / "in" / "Jérôme.py").write_bytes(undeclared.encode("latin-1"))
    with zipfile.ZipFile(top / "in" / "zipped.zip", "w") as archive:
        archive.writestr("homework/fgssl.py", text_with(RIGHT))
        archive.writestr("__MACOSX/homework/fgssl.py", "junk")
    (top / "in" / "damaged.zip").write_bytes(b"PK\3\4 no zip")
    (top / "in" / "broken.py").write_text(text_with("return peak *"))
    (top / "in" / "deep.py").write_text(text_with(RIGHT) + "x = " + "(" * 5000 + ")" * 5000)
    (top / "in" / "same").mkdir()
    (top / "in" / "same" / "fgssl.py").write_bytes((handout / "fgssl.py").read_bytes())
    (top / "in" / "empty").mkdir()
    (top / "in" / "helper.py").write_text(
        text_with("return half(step)") + "\n\ndef half(x):\n    return 0.5\n")
    run = subprocess.run(
        [sys.executable, "-m", "course.grade", handout, *sorted((top / "in").iterdir()),
         "--csv", top / "marks.csv", "--timeout", "10"], cwd=ROOT, capture_output=True, text=True)
    with open(top / "marks.csv", encoding="utf-8-sig") as file:
        found = {row["student"]: row for row in csv.DictReader(file)}
    assert (precious / "fgssl.py").exists() or "limits" in run.stdout, "a submission deleted it"
    return found, run


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_body_is_solved_and_all_are_graded(marks, name):
    row = marks[0][name]
    if name in ("reads the solution", "calls out") and sandbox.SAYS["namespaces"] not in \
            marks[1].stdout:
        pytest.skip("this system allows no namespaces, and the grader says so")
    assert row["cosine_lr: state"] == "not yet", row
    assert float(row["points"]) < 10, row


@pytest.mark.parametrize("name, says", [
    ("ends the process", "has ended"), ("never ends", "no answer in time"),
    ("takes all memory", "memory"), ("broken", "broken.py line"),
    ("deep", "deep.py"), ("helper", "put helper functions into it"), ("damaged", "damaged.zip"),
    ("half", "wanted 0")])
def test_what_went_wrong_is_named(marks, name, says):
    assert says in marks[0][name]["cosine_lr: message"], marks[0][name]


@pytest.mark.parametrize("name, state", [
    ("plain", "solved"), ("nested", "solved"), ("Jérôme", "solved"), ("zipped", "solved"),
    ("half", "not yet"), ("with its own tests", "not yet"), ("broken", "not yet"),
    ("same", "unchanged"), ("empty", "missing"), ("damaged", "unreadable"), ("deep", "not yet")])
def test_every_kind_of_submission_is_read(marks, name, state):
    assert marks[0][name]["cosine_lr: state"] == state, marks[0][name]


def test_partial_credit_and_status(marks):
    found, run = marks
    assert run.returncode == 0, run.stderr
    assert found["plain"]["points"] == found["plain"]["of"] == "10"
    assert 0 <= float(found["half"]["points"]) < 10
    assert "isolation: " in run.stdout and "== zipped: 10 of 10 points" in run.stdout


def test_ctrl_c_keeps_what_is_graded(handout, tmp_path):
    for name, body in (("ann", RIGHT), ("bob", "while True:\n    pass")):
        (tmp_path / f"{name}.py").write_text(text_with(body))
    run = subprocess.Popen(
        [sys.executable, "-m", "course.grade", handout, tmp_path / "ann.py", tmp_path / "bob.py",
         "--csv", tmp_path / "marks.csv", "--timeout", "300"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # it may be ignored here
    for line in run.stdout:
        if line.startswith("cosine_lr"):
            break
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and "1 of 2" in run.stderr.read()
    assert "ann" in (tmp_path / "marks.csv").read_text()
    time.sleep(0.5)
    tree = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in tree, "a launcher, judge or grader still runs"


def test_gradescope_gets_its_results_and_its_folder(handout, tmp_path):
    (tmp_path / "fgssl.py").write_text(text_with(HALF))
    status = grade.main([str(handout), str(tmp_path / "fgssl.py"), "--results",
                         str(tmp_path / "results.json")])
    test, = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert status == 0 and test["name"] == "cosine_lr" and test["max_score"] == 10
    assert test["status"] == "failed" and test["output"].startswith("not yet")
    grade.main([str(handout), "--gradescope", str(tmp_path / "autograder")])
    for name in ("setup.sh", "run_autograder"):
        assert os.access(tmp_path / "autograder" / name, os.X_OK)
    assert (tmp_path / "autograder" / "project" / "course" / "hidden").is_dir()
    assert (tmp_path / "autograder" / "handout" / "tests" / "assignment.json").is_file()


def test_marks_open_in_a_spreadsheet_as_they_are(tmp_path):
    """Letters as letters, in Excel too, and no name as a formula that runs on the teacher's desk."""
    result = {"title": "half", "points": 0, "most": 10, "state": "not yet", "says": "-1 is no rate"}
    args = argparse.Namespace(csv=tmp_path / "marks.csv", results=None)
    grade.save(args, [("Zoë", "", [result]), ("=cmd()", "", [result])])
    assert (tmp_path / "marks.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader((tmp_path / "marks.csv").read_text("utf-8-sig").splitlines()))
    assert [(row["student"], row["half: message"]) for row in rows] == [
        ("'=cmd()", "'-1 is no rate"), ("Zoë", "'-1 is no rate")]


def test_two_submissions_of_one_name_are_both_graded(tmp_path):
    assert list(grade.named([tmp_path / "a" / "x.zip", tmp_path / "b" / "x.zip"])) == ["x", "x 2"]


def test_a_kernel_comes_with_the_line_that_it_had_in_the_students_file():
    """So that a compiler's error names that line."""
    text = source.read(ROOT / "kernels" / "tile_shuffle.cu")
    function = source.find("tiles_forward")
    blank = source.blank(text, function, "hint")
    files = {"hw/tile_shuffle.cu": ("// mine\n" + text).encode()}
    body = submission.one_body(files, "kernels/tile_shuffle.cu", "tiles_forward", blank)
    line = text.count("\n", 0, function.start) + 2
    assert body.text.startswith(f'\n#line {line} "tile_shuffle.cu"\n'), body
    same = submission.one_body({"tile_shuffle.cu": blank.encode()}, "kernels/tile_shuffle.cu",
                               "tiles_forward", blank)
    assert same.state == "to write"


def test_a_link_in_a_submission_is_not_followed(tmp_path):
    (tmp_path / "secret.py").write_text("1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "fgssl.py").symlink_to(tmp_path / "secret.py")
    assert submission.read(tmp_path / "in") == {}


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_without_namespaces_a_process_that_left_its_group_ends_too():
    """It would run on, as the same user, beside the next submission of this job."""
    with tempfile.TemporaryDirectory() as folder:
        tree, user = Path(folder, "tree"), sandbox.user_number(62)
        tree.mkdir()
        Path(folder).chmod(0o755)
        argv = ["/bin/sh", "-c", "setsid sleep 600 & sleep 600"]
        process = sandbox.launch(dict(tree=str(tree), kind="user", user=user, seconds=60,
                                      argv=argv))

        def running():
            return subprocess.run(["ps", "-U", str(user), "-o", "args="], capture_output=True,
                                  text=True).stdout.count("sleep 600\n")
        end = time.monotonic() + 60
        while running() < 2 and time.monotonic() < end:
            time.sleep(0.1)
        sandbox.end_all_of(user)
        process.wait()
        assert time.monotonic() < end and not running()


def test_isolation_is_the_best_that_the_system_has(tmp_path):
    """It must not fall back in silence."""
    kind = sandbox.mode(tmp_path / "probe")
    unshare = subprocess.run(["unshare", "-mpnf", *(["-Ur"] if os.getuid() else []), "true"],
                             capture_output=True) if sys.platform == "linux" else None
    if unshare is not None and unshare.returncode == 0:
        assert kind == "namespaces"
    assert kind in sandbox.SAYS
