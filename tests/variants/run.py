"""Prints, as JSON, what the grader says of the bodies of bodies.py: {exercise: {variant: ...}}.

    python tests/variants/run.py RIGHT WRONG [NAME ...]   # so many of each, of these exercises
    python tests/variants/run.py hunt BUG [...]           # and of bugs of tests/mutants: {bug: ...}

Runs in a copy of the project that course.grade makes; the bodies run in this process. Those that
are compiled, or that processes of the tests call, are written into that copy, one at a time. Of
kernels only the changed file is compiled, and a copy of this process loads it.
"""

import ast
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import bodies
import pytest

from course import sandbox, seam, source
from course.exercises import exercise_for, patch
from course.judge import Tests
from course.make import entry
from kernels import build
from torch.utils import cpp_extension

OF_PROCESSES = "_backward_rows.backward",
IN_PLACE = "in place"                    # asks for what the tests say of the source as it is


def function_with(place, name, body):
    """The function of this name with another body, among the names of its module."""
    module = importlib.import_module(place.removesuffix(".py").replace("/", "."))
    text = source.read(place)
    f, = (f for f in source.functions(place) if f.name == name)
    tree = ast.parse(source.put(text, f, body))
    node = next(n for n in tree.body if getattr(n, "name", None) == name)
    space = {**vars(module), "np": np_or_none(module)}
    exec(compile(ast.Module([node], []), f"{name} of bodies.py", "exec"), space)
    return space[name]


def np_or_none(module):
    import numpy
    return getattr(module, "np", numpy)


def variants(name, place, right, wrong):
    """[(title, body)]: the project's own lines in PLAIN are those before seam.py was put in."""
    text = source.read(os.path.join(os.environ["PLAIN"], place))
    f, = (f for f in source.functions(place, text) if f.name == name)
    margin = "" if f.is_cuda else " " * f.node.body[0].col_offset
    for i, body in enumerate(bodies.RIGHT[name][:right]):
        yield f"right {i}", body if f.is_cuda else body.strip()
    body = "\n".join(line.removeprefix(margin) for line in text[f.start:f.end].split("\n"))
    for title, old, new in bodies.WRONG[name][:wrong]:
        old, new = (part.replace(f"\n{margin}", "\n") for part in (old, new))
        assert old in body, f"{name}, {title}: the body has no {old}"
        yield f"wrong: {title}", body.replace(old, new)


def graded(exercise, title):
    """{test: message} of the tests that the bodies now in place fail."""
    files = [f"tests/{exercise['tests']}", "course/hidden/test_hidden.py"]
    plugin = Tests(exercise, f"student of {title}", ["hidden"])
    pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:terminal", "-o", "addopts=", *files],
                plugins=[plugin])
    failed = {test: says for test, says in plugin.results.items() if says}
    return failed if plugin.results else {"": "no test ran"}


def graded_in_place(name, exercise, place, body, title):
    """The same of a body in the source itself."""
    text = source.read(place)
    f, = (f for f in source.functions(place, text) if f.name == name)
    Path(place).write_text(source.put(text, f, body))
    try:
        if f.is_cuda:
            return in_a_copy(lambda: graded(exercise, title))
        run = subprocess.run([sys.executable, __file__, IN_PLACE, title, name],
                             capture_output=True, text=True)
        return json.loads(run.stdout) if run.returncode == 0 else {"": run.stderr[-500:]}
    finally:
        Path(place).write_text(text)


def graded_bug(name):
    """The same of a bug: what the tests that are handed out with it find."""
    def apply(*options):
        subprocess.run(["git", "apply", "--unidiff-zero", *options, patch(name)], check=True,
                       env=os.environ | {"GIT_CEILING_DIRECTORIES": os.path.dirname(os.getcwd())})
    apply()
    try:
        return in_a_copy(lambda: graded(entry(exercise_for(name)), name))
    finally:
        apply("-R")


def in_a_copy(run):
    """What run() returns, in a copy of this process: it loads a library, and that may crash it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (600, 600))                 # one may never end
        try:
            os.write(theirs, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else {"": "the process has crashed, or never ended"}


def compile_what_changed(kind, work):
    """In place of build.compile_library: in one folder for all bodies, ninja compiles the changed
    file alone. The tests take another cache, and so another `work`, each time."""
    compiled = Path("compiled").resolve()
    compiled.mkdir(exist_ok=True)
    sources = [build.HERE / "bindings.cpp", *(compiled / f"{name}.cpp" for name in build.KERNELS)]
    for name, file in zip(build.KERNELS, sources[1:]):
        if not file.exists():
            file.write_text(f'#include "{build.HERE / name}"\n')
    cpp_extension.load(f"fgssl_{kind}", list(map(str, sources)), build_directory=str(compiled),
                       extra_cflags=build.FLAGS[kind], is_python_module=False)
    library = work / "kernels.so"
    os.link(compiled / f"fgssl_{kind}.so", library)          # the file that is loaded already
    return library


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    first, *names = sys.argv[1:]
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    resource.setrlimit(resource.RLIMIT_AS, (sandbox.LIMITS["AS"],) * 2)     # as a submission has
    build.compile_library = compile_what_changed
    if first == "hunt":
        found = {name: graded_bug(name) for name in names}
    elif first == IN_PLACE:
        title, name = names
        found = graded(entry(exercise_for(name)), title)
    else:
        wrong, *names = names
        found = {name: judge(name, int(first), int(wrong)) for name in names or bodies.RIGHT}
    print(json.dumps(found), file=answers, flush=True)


def judge(name, right, wrong):
    """{variant: what the grader says} of so many bodies of an exercise."""
    exercise, found = entry(exercise_for(name)), {}
    place = exercise["files"][exercise["names"].index(name)]
    for title, body in variants(name, place, right, wrong):
        if exercise["cuda"] or name in OF_PROCESSES:
            found[title] = graded_in_place(name, exercise, place, body, title)
            continue
        with seam.instead({f"{place}:{name}": function_with(place, name, body)}):
            found[title] = graded(exercise, title)
    return found


if __name__ == "__main__":
    main()
