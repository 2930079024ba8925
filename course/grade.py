"""Grades submissions of an assignment that course.make made: points, states, messages.

    python -m course.grade HANDOUT submissions/*                   # a folder, zip or file each
    python -m course.grade HANDOUT submissions/* --csv marks.csv --jobs 4
    python -m course.grade HANDOUT one.zip --results results.json  # as Gradescope reads it
    python -m course.grade HANDOUT --gradescope autograder         # a folder for Gradescope, to zip

HANDOUT is the folder as it was handed out, or holds one for each student. Of a submission only the
bodies of the assignment are taken; they run apart from the tests (see course/sandbox.py), which are
HANDOUT's, then those of course/hidden. Exits with 0 if every submission was graded, 1 if one could
not be, 130 after Ctrl-C; what is graded by then is written.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path

import atomic
from course import sandbox, source
from course.exercises import WATCH
from course.make import GRADING, LITTER, ROOT, SOLUTIONS

WITHHELD = "withheld, for it would solve the exercise: write it yourself"
SETUP = """#!/usr/bin/env bash
apt-get update && apt-get install -y python3 python3-pip g++
pip3 install -r /autograder/source/project/requirements.txt
"""
RUN = """#!/usr/bin/env bash
chmod -R go-rwx /autograder/source
cd /autograder/source/project
python3 -m course.grade ../handout /autograder/submission --results /autograder/results/results.json
"""


class Grading:
    """What all submissions share: the judge's copy of the project, the template of theirs."""

    def __init__(self, handout, timeout, hidden, folder):
        self.handout, self.timeout, self.folder = Path(handout), timeout, Path(folder)
        self.folder.chmod(0o755)                         # another user enters a part of it
        self.exercises = json.loads((self.handout / GRADING).read_text())
        self.hidden = [ROOT / "course" / "hidden", *map(Path, hidden)]
        self.running, self.lock = {}, threading.Lock()
        self.mode = sandbox.mode(self.folder / "probe")
        self.judge = make_judge(self.handout, self.exercises, self.folder / "judge")
        self.template = make_template(self.handout, self.exercises, self.folder / "template")
        self.judge.chmod(0o700), self.template.chmod(0o700)

    def grade(self, path, student, job):
        """(results of the exercises, error or ""), by the judge of this job."""
        work = self.folder / f"job{job}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o755)
        spec = dict(template=str(self.template), exercises=self.exercises, work=str(work),
                    mode=self.mode, user=sandbox.user_number(job), timeout=self.timeout,
                    seed=student, submission=str(Path(path).resolve()),
                    hidden=[str(folder.resolve()) for folder in self.hidden])
        judge = self.judge_of(job)
        late = threading.Timer(180 + 6 * self.timeout * len(self.exercises), judge.kill)
        late.start()
        try:
            judge.stdin.write(json.dumps(spec) + "\n")
            judge.stdin.flush()
            line = judge.stdout.readline()
        except OSError:
            line = ""
        finally:
            late.cancel()
        if line:
            return json.loads(line), ""
        judge.wait()
        why = (self.errors(job).read_text().strip().splitlines() or ["the grader was stopped"])[-1]
        return [dict(title=e["title"], state="error", passed=0, total=0, points=0, says=why,
                     most=e["points"], failed={}) for e in self.exercises], why

    def judge_of(self, job):
        """The judge of a job: one for all its submissions, or a new one if it ended."""
        with self.lock:
            judge = self.running.get(job)
            if not judge or judge.poll() is not None:
                env = os.environ | {
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": "", "PYTEST_ADDOPTS": ""}
                with open(self.errors(job), "w") as errors:
                    judge = self.running[job] = subprocess.Popen(
                        [sys.executable, "-m", "course.judge"], cwd=self.judge, env=env, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                        start_new_session=True)
            return judge

    def errors(self, job):
        return self.judge / f"errors{job}.txt"

    def stop(self):
        with self.lock:
            for judge in self.running.values():
                judge.kill()                             # its sandbox ends with it
                judge.wait()


def make_judge(handout, entries, out):
    """A copy of this project that runs the handout's tests, and asks for the graded functions."""
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(*LITTER, "docs", "assets",
                                                             SOLUTIONS.name))
    for file in sorted((handout / "tests").glob("*.py")):
        if file.name not in ("conftest.py", "grading.py"):
            shutil.copy(file, out / "tests" / file.name)
    asked = {(p, n) for e in entries if not e["cuda"] for n, p in zip(e["names"], e["files"])}
    if any(e.get("lesson") for e in entries):
        asked.add(WATCH)
    for place in {place for place, _ in asked}:
        text = source.read(out / place)
        found = [f for f in source.functions(place, text) if (place, f.name) in asked]
        for f in sorted(found, key=lambda f: -f.start):
            text = source.delegate(text, f, f"{place}:{f.name}")
        (out / place).write_text(text)
    return out


def make_template(handout, entries, out):
    """The handout without tests and documents, with what is withheld blank, and the worker."""
    shutil.copytree(handout, out, ignore=shutil.ignore_patterns(
        *LITTER, "tests", "docs", "assets", "*.md"))
    asked = {name for e in entries for name in e["names"]}
    for name in {n for e in entries for n in e["withheld"]} - asked:
        function = source.find(name, out)
        text = source.blank(source.read(function.file), function, WITHHELD)
        if function.is_cuda and "define EXERCISE" not in text:
            text = source.define_exercise(text)
        function.file.write_text(text)
    (out / "course").mkdir()
    for name in ("__init__.py", "link.py", "seam.py", "worker.py"):
        shutil.copy(ROOT / "course" / name, out / "course" / name)
    return out


def try_body(handout, entry, place, text):
    """{test: message or None} for one file's text as a submission, to try an exercise out."""
    with tempfile.TemporaryDirectory() as folder:
        grading = Grading(handout, 60, (), folder)
        grading.exercises = [entry]
        file = Path(folder, "submission", place)
        file.parent.mkdir(parents=True)
        file.write_text(text)
        (result,), _ = grading.grade(Path(folder, "submission"), "", 0)
        grading.stop()
        return result["failed"] | dict.fromkeys(result.get("good", ()))


def lines(student, results):
    """What the terminal shows of a submission."""
    points, most = (sum(r[key] for r in results) for key in ("points", "most"))
    width = max(len(r["title"]) for r in results)
    text = f"== {student}: {points:g} of {most:g} points\n"
    for r in results:
        share = f"{r['passed']} of {r['total']} tests pass" if r["total"] else ""
        says = "; ".join(part for part in (share, " ".join(r["says"].split())[:600]) if part)
        says = "".join(c if c.isprintable() else "?" for c in says)      # no codes of a terminal's
        text += f"{r['title']:{width}}  {r['state']:9}  {says}\n"
    return text


def csv_rows(rows, titles):
    """rows: [(student, handed in, results)]. One line a student; points and state an exercise."""
    yield ["student", "handed in", "points", "of",
           *(f"{title}{what}" for title in titles for what in ("", ": state", ": message"))]
    for student, when, results in rows:
        of = {r["title"]: r for r in results}
        yield [student, when, *(f"{sum(r[key] for r in results):g}" for key in ("points", "most")),
               *(of[t][key] if t in of else "" for t in titles
                 for key in ("points", "state", "says"))]


def gradescope(results):
    """results.json as Gradescope's documentation describes it."""
    return {"tests": [{"name": r["title"], "score": r["points"], "max_score": r["most"],
                       "status": "passed" if r["state"] == "solved" else "failed",
                       "output": f"{r['state']}: {r['passed']} of {r['total']} tests pass\n"
                                 f"{r['says']}"} for r in results]}


def write_autograder(out, handout):
    """A folder that Gradescope runs once it is zipped and uploaded."""
    with atomic.drafting(out, is_folder=True) as draft:
        shutil.copytree(ROOT, draft / "project", ignore=shutil.ignore_patterns(*LITTER))
        shutil.copytree(handout, draft / "handout", ignore=shutil.ignore_patterns(*LITTER))
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            (draft / name).write_text(text)
            (draft / name).chmod(0o755)
        atomic.publish(draft, out)


def handed_in(path):
    """When the newest source in a submission was written; what is late the teacher decides."""
    path = Path(path)
    files = [f for f in path.rglob("*") if f.suffix in (".py", ".cu", ".zip")] + [path]
    newest = max(f.lstat().st_mtime for f in files if f == path or f.is_file())
    return datetime.fromtimestamp(newest).isoformat(" ", "minutes")


def named(paths):
    """{student: path}: file names, with a number behind those that come twice."""
    found = {}
    for path in map(Path, paths):
        name = path.name if path.is_dir() else path.stem
        unique, n = name, 2
        while unique in found:
            unique, n = f"{name} {n}", n + 1
        found[unique] = path
    return found


def grade_all(handout, paths, args, folder):
    """Grade and print; yields (student, path, results, error) as they come."""
    gradings = {}

    def grading_of(student):
        own = Path(handout, student)
        where = own if (own / GRADING).exists() else Path(handout)
        if where not in gradings:
            new = Path(folder, str(len(gradings)))
            new.mkdir()
            gradings[where] = Grading(where, args.timeout, args.hidden, new)
        return gradings[where]

    students = {student: (path, grading_of(student)) for student, path in named(paths).items()}
    print(f"isolation: {sandbox.SAYS[next(iter(gradings.values())).mode]}", flush=True)
    slots = queue.SimpleQueue()
    for job in range(args.jobs):
        slots.put(job)

    def one(path, grading, student):
        job = slots.get()
        try:
            return grading.grade(path, student, job)
        finally:
            slots.put(job)

    pool = ThreadPoolExecutor(args.jobs)
    try:
        waiting = {pool.submit(one, path, grading, student): (student, path)
                   for student, (path, grading) in students.items()}
        for future in as_completed(waiting):
            yield *waiting[future], *future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for grading in gradings.values():
            grading.stop()
        pool.shutdown()


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m course.grade", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("handout", nargs="?", help="the assignment as it was handed out")
    p.add_argument("submissions", nargs="*", help="a folder, a zip or a file each")
    p.add_argument("--csv", help="write a line for each submission to this file")
    p.add_argument("--results", help="write Gradescope's results.json of the one submission")
    p.add_argument("--gradescope", help="write an autograder for Gradescope into this new folder")
    p.add_argument("--hidden", nargs="+", default=[], metavar="FOLDER",
                   help="more tests that were not handed out: test_NAME... grades exercise NAME")
    p.add_argument("--jobs", type=int, default=2, help="submissions at a time (default: 2)")
    p.add_argument("--timeout", type=int, default=60, help="seconds for an exercise; five times as "
                   "many where a kernel is compiled (default: 60)")
    args = p.parse_args(argv)
    if not args.handout:
        p.error("name the assignment as it was handed out, and the submissions")
    if not (Path(args.handout) / GRADING).exists() and not list(
            Path(args.handout).glob(f"*/{GRADING}")):
        p.error(f"{args.handout} is no assignment: it has no {GRADING}")
    if args.gradescope:
        write_autograder(args.gradescope, args.handout)
        return print(f"wrote {args.gradescope}: zip what is in it, and upload it as an autograder")
    missing = [path for path in args.submissions if not Path(path).exists()]
    if missing or not args.submissions or args.results and len(args.submissions) > 1:
        p.error(f"{missing[0]} is not there" if missing else "name one submission" if args.results
                else "name the submissions to grade")
    rows, status = [], 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        try:
            for student, path, results, error in grade_all(args.handout, args.submissions, args,
                                                           folder):
                rows.append((student, handed_in(path), results))
                save(args, rows)
                print(lines(student, results), flush=True)
                status = status or bool(error)
        except KeyboardInterrupt:
            print(f"stopped; {len(rows)} of {len(args.submissions)} are graded", file=sys.stderr)
            status = 130
        except (ValueError, OSError, RuntimeError) as error:
            p.error(str(error))
    return int(status)


def save(args, rows):
    """Write what is graded so far."""
    if args.csv:
        from evaluation.results import write_csv             # and with it torch: a second or two
        titles = list(dict.fromkeys(r["title"] for _, _, results in rows for r in results))
        write_csv(args.csv, csv_rows(sorted(rows), titles))
    if args.results:
        with atomic.replacing(args.results) as draft:
            draft.write_text(json.dumps(gradescope(rows[0][2]), indent=1))


if __name__ == "__main__":
    sys.exit(main())
