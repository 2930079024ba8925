"""Prints, as JSON, what the grader says of the bodies of bodies.py: {exercise: {variant: ...}}.

    python tests/variants/run.py RIGHT WRONG [NAME ...]   # so many of each, of these exercises

Runs in a copy of the project that course.grade makes; the bodies run in this process. Those that
are compiled, or that processes of the tests call, are written into that copy, one at a time.
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
from course.exercises import exercise_for
from course.judge import Tests
from course.make import entry
from kernels import build

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


def graded_apart(name, place, body, title):
    """The same of a body in the source itself, by a process of its own."""
    text = source.read(place)
    f, = (f for f in source.functions(place, text) if f.name == name)
    Path(place).write_text(source.put(text, f, body))
    try:
        run = subprocess.run([sys.executable, __file__, IN_PLACE, title, name],
                             capture_output=True, text=True)
        return json.loads(run.stdout) if run.returncode == 0 else {"": run.stderr[-500:]}
    finally:
        Path(place).write_text(text)


def compile_what_changed(kind, target):
    """In place of build.compile_library: in one folder for all bodies, ninja compiles the changed
    file alone."""
    from torch.utils import cpp_extension
    work = build.cache() / "variants"
    work.mkdir(exist_ok=True)
    sources = [build.HERE / "bindings.cpp", *(work / f"{name}.cpp" for name in build.KERNELS)]
    for name, file in zip(build.KERNELS, sources[1:]):
        if not file.exists():
            file.write_text(f'#include "{build.HERE / name}"\n')
    cpp_extension.load(f"fgssl_{kind}", list(map(str, sources)), build_directory=str(work),
                       extra_cflags=build.FLAGS[kind], is_python_module=False)
    os.link(work / f"fgssl_{kind}.so", target)               # the file that is loaded already


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    right, wrong, *names = sys.argv[1:]
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    resource.setrlimit(resource.RLIMIT_AS, (sandbox.LIMITS["AS"],) * 2)     # as a submission has
    if right == IN_PLACE:
        build.compile_library = compile_what_changed
        found = graded(entry(exercise_for(names[0])), wrong)
    else:
        found = {name: judge(name, int(right), int(wrong)) for name in names or bodies.RIGHT}
    print(json.dumps(found), file=answers, flush=True)


def judge(name, right, wrong):
    """{variant: what the grader says} of so many bodies of an exercise."""
    exercise, found = entry(exercise_for(name)), {}
    place = exercise["files"][exercise["names"].index(name)]
    for title, body in variants(name, place, right, wrong):
        if exercise["cuda"] or name in OF_PROCESSES:
            found[title] = graded_apart(name, place, body, title)
            continue
        with seam.instead({f"{place}:{name}": function_with(place, name, body)}):
            found[title] = graded(exercise, title)
    return found


if __name__ == "__main__":
    main()
