"""Makes an assignment: a copy of the project in which some functions are to be written anew.

    python -m course.make --list                        # exercises, with hints and times
    python -m course.make OUT cosine_lr nt_xent_dense   # these two
    python -m course.make OUT luma retrieval.py:ranking # or another function, by NAME or FILE:NAME
    python -m course.make OUT wait_for_too_few          # or find a bug of tests/mutants
    python -m course.make OUT nt_xent.cu --students ann bob    # a bug each, in OUT/ann, OUT/bob
    python -m course.make OUT cosine_lr --key KEY       # and solutions and rubric, for the teacher

In OUT the body of each is an error that says what to do; signature and docstring stay.
OUT/ASSIGNMENT.md lists place, hint and the tests that grade it. OUT/tests/assignment.json holds the
points (10 each), which you may change, also by test: "weights": {"word of a test's name": 2}.
course.grade grades what comes back.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import atomic
from course import exercises, source
from course.exercises import ROOT, EXERCISES, command, exercise_for, hint, is_bug, patch

GRADING = "tests/assignment.json"
LITTER = ".*", "__pycache__", "out", "data", "build"
UNWANTED = shutil.ignore_patterns(*LITTER, "course", "course.md", "test_course_*.py", "variants",
                                  "test_docs.py", "mutants", "test_kernels_mutants.py")
HEAD = """# Assignment

To write: the bodies that raise `NotImplementedError` or, in a .cu file, say `EXERCISE`. The
docstring, or the head of the .cu file, says what is wanted. Of a bug nothing is blank.

    python -m pytest -m exercise    # all tests that grade; the last lines say what is solved
    python -m pytest                # and all others: minutes. What waits for an exercise is skipped

Hand in the files that you changed. Only the bodies are taken from them, and imports at the
top: put helper functions inside. Further tests are added when they are graded.

"""


def make(out, names, student=None):
    """Write the assignment into a new folder; returns its exercises, as in assignment.json."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a new folder")
    names = [drawn_bug(name, student) if name in exercises.HUNTED else name for name in names]
    chosen = list(dict.fromkeys(map(exercise_for, names)))
    with atomic.drafting(out, is_folder=True) as draft:
        shutil.copytree(ROOT, draft, ignore=UNWANTED, dirs_exist_ok=True)
        fill(draft, chosen)
        made_up = [e for e in chosen if e not in EXERCISES and not is_bug(e)
                   and not source.find(e.names[0]).is_cuda]
        if made_up:
            chosen = [try_out(e, draft) if e in made_up else e for e in chosen]
            describe(draft, chosen)
        atomic.publish(draft, out)
    return json.loads((out / GRADING).read_text())


def fill(out, chosen):
    """Blank the functions, plant the bugs, and add what grades them."""
    readme = out / "README.md"                               # its Python is a solution
    readme.write_text(re.sub(r"(?ms)^```python\n.*?^```\n", "", readme.read_text()))
    tasks = [(source.find(name), e) for e in chosen if not is_bug(e) for name in e.names]
    for file in {function.file for function, _ in tasks}:
        of_file = [task for task in tasks if task[0].file == file]
        (out / file.relative_to(ROOT)).write_text(blanked(source.read(file), of_file))
    bugs = [e.names[0] for e in chosen if is_bug(e)]
    kernels = [exercises.patched_kernel(name) for name in bugs]
    kernels += {exercises.kernel_of(f.file) for f, _ in tasks if f.is_cuda and bugs}
    if len(set(kernels)) < len(kernels):
        raise ValueError("plant one bug in a kernel, and none in one that is to be written")
    for name in bugs:
        subprocess.run(["git", "apply", "--unidiff-zero", str(patch(name))], cwd=out, check=True,
                       env=os.environ | {"GIT_CEILING_DIRECTORIES": str(out.resolve().parent)})
    shutil.copy(ROOT / "course" / "progress.py", out / "tests" / "grading.py")
    with open(out / "tests" / "conftest.py", "a") as conftest:
        conftest.write("\n\nfrom grading import *  # which tests grade, and where you stand\n")
    describe(out, chosen)


def blanked(text, tasks):
    """The text with the bodies of [(Function, Exercise)] replaced; the last first."""
    for function, exercise in sorted(tasks, key=lambda task: -task[0].start):
        what = ("the head of the file has its formula, and who owns what" if function.is_cuda
                else "its docstring says what it computes")
        text = source.blank(text, function, f"{what}. {hint(exercise)} "
                                            f"Graded by: {command(exercise)}")
    return source.define_exercise(text) if tasks[0][0].is_cuda else text


def describe(out, chosen):
    """Write assignment.json and ASSIGNMENT.md."""
    grading = [entry(e) for e in chosen]
    (out / GRADING).write_text(json.dumps(grading, indent=1))
    places = []
    for exercise, e in zip(chosen, grading):
        where = ", ".join(e["files"]) if e["bug"] else ", ".join(
            f"{file}:{source.find(f'{file}:{name}', out).line}"
            for name, file in zip(e["names"], e["files"]))
        places.append((exercise, where))
    (out / "ASSIGNMENT.md").write_text(HEAD + page(places))


def entry(exercise):
    """An exercise as assignment.json has it. Of a bug it names the kernel alone."""
    bug = is_bug(exercise)
    if bug:
        files = exercises.kernel_files(exercises.patched_kernel(exercise.names[0]))
    else:
        found = [source.find(name) for name in exercise.names]
        files = [f.file.relative_to(ROOT).as_posix() for f in found]
    title = exercises.public_title(exercise)
    return {"title": title, "names": [title] if bug else [f.name for f in found], "files": files,
            "tests": exercise.tests, "match": exercise.match, "hint": exercise.hint,
            "command": command(exercise), "points": 10, "weights": {}, "bug": bug,
            "cuda": bug or files[0].endswith(".cu"), "withheld": list(exercise.withheld)}


def drawn_bug(file, student):
    """The name of a bug of this kernel; each student's own."""
    found = exercises.HUNTED[file][2]
    return found[int(hashlib.sha256(f"{file} {student}".encode()).hexdigest(), 16) % len(found)]


def try_out(exercise, out):
    """The exercise with those of its tests that grade it; raises ValueError if none does.

    A test grades if the project's own body passes and an empty one fails, computed as course.grade
    will: in a process that exchanges plain values with the test.
    """
    from course import grade
    name, place = entry(exercise)["names"][0], entry(exercise)["files"][0]
    empty = source.read(ROOT / place)
    function = source.find(f"{place}:{name}")
    empty = source.put(empty, function, 'raise ValueError("nothing is written")')
    right, wrong = (grade.try_body(out, entry(exercise), place, text)
                    for text in (source.read(ROOT / place), empty))
    tests = {test.partition("[")[0] for test in right}
    good = sorted(test for test in tests if all(
        right[t] is None for t in right if t.partition("[")[0] == test) and any(
        wrong.get(t) for t in wrong if t.partition("[")[0] == test))
    if not good:
        why = next((says for says in right.values() if says), "they pass whatever its body is")
        raise ValueError(f"no test grades {name} of {place} by its arguments and results alone: "
                         f"{why.splitlines()[0]}. Choose a function of numbers and arrays")
    return exercise._replace(match=" or ".join(good))


def page(places):
    """Markdown: what each exercise is, where, and how it is graded."""
    text = ""
    for exercise, place in places:
        text += f"## {exercises.public_title(exercise)}, {place}\n\n"
        text += f"Learn: {exercise.learn}.\n\n" if exercise.learn else ""
        text += f"{hint(exercise)}\n\n"
        text += f"About {exercise.minutes} minutes.\n\n" if exercise.minutes else ""
        text += (f"Not to be called: {', '.join(exercise.withheld)}.\n\n"
                 if exercise.withheld else "")
        text += f"    {command(exercise)}\n\n"
    return text


def write_key(key, made):
    """Solutions and rubric of handouts [(student or None, names)], for the teacher alone."""
    text = "# Key: not for students\n\n"
    for student, names in made:
        text += f"# {student}\n\n" if student else ""
        for exercise in dict.fromkeys(exercise_for(drawn_bug(n, student)
                                                   if n in exercises.HUNTED else n)
                                      for n in names):
            text += f"## {exercises.public_title(exercise)}\n\nRubric\n\n"
            text += "* the tests pass: 10 points, in part for a part of them\n"
            text += f"* asked in person: {exercise.rubric or exercise.learn or exercise.hint}\n\n"
            for name in exercise.names:
                if is_bug(exercise):
                    text += f"{name}\n\n```diff\n{patch(name).read_text()}```\n\n"
                else:
                    f = source.find(name)
                    body = source.read(f.file)[f.start:f.end].strip("\n")
                    text += f"{f.file.relative_to(ROOT)}: {name}\n\n```\n    {body}\n```\n\n"
    with atomic.drafting(key, is_folder=True) as draft:
        (draft / "KEY.md").write_text(text)
        atomic.publish(draft, Path(key))


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m course.make", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", nargs="?", help="a new folder")
    p.add_argument("names", nargs="*", help="functions (NAME or FILE:NAME), kernels, bugs; "
                                            "nt_xent.cu or tile_shuffle.cu: some bug of it")
    p.add_argument("--students", nargs="+", default=[], help="one handout each, in OUT/STUDENT")
    p.add_argument("--key", help="a new folder for solutions and rubric")
    p.add_argument("--list", action="store_true", help="show the suggested exercises")
    args = p.parse_args(argv)
    if args.list:
        return print(page([(e, e.tests) for e in EXERCISES]))
    if not args.names:
        p.error("name a new folder and at least one function; --list shows exercises")
    try:
        made = [(student, args.names) for student in args.students or (None,)]
        for student, names in made:
            out = Path(args.out, student or "")
            make(out, names, student)
            print((out / "ASSIGNMENT.md").read_text().removeprefix(HEAD)
                  + f"wrote {out}/ASSIGNMENT.md")
        if args.key:
            write_key(args.key, made)
            print(f"wrote {args.key}/KEY.md, for the teacher alone")
    except (ValueError, OSError, RuntimeError) as error:
        p.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
