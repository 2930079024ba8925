"""Prints, as JSON, what the grader says of the bodies of bodies.py: {exercise: {variant: ...}}.

    python tests/variants/run.py RIGHT WRONG [NAME ...]   # so many of each, of these exercises

Runs in a copy of the project that course.grade makes; the bodies run in this process.
"""

import ast
import importlib
import json
import os
import resource
import sys

import bodies
import pytest

from course import sandbox, seam, source
from course.exercises import exercise_for
from course.judge import Tests
from course.make import entry


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
    yield from ((f"right {i}", body.strip()) for i, body in enumerate(bodies.RIGHT[name][:right]))
    text = source.read(os.path.join(os.environ["PLAIN"], place))
    f, = (f for f in source.functions(place, text) if f.name == name)
    margin = " " * f.node.body[0].col_offset
    body = "\n".join(line.removeprefix(margin) for line in text[f.start:f.end].splitlines())
    for title, old, new in bodies.WRONG[name][:wrong]:
        old, new = (part.replace(f"\n{margin}", "\n") for part in (old, new))
        assert old in body, f"{name}, {title}: the body has no {old}"
        yield f"wrong: {title}", body.replace(old, new)


def main():
    resource.setrlimit(resource.RLIMIT_AS, (sandbox.LIMITS["AS"],) * 2)     # as a submission has
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    right, wrong, *names = sys.argv[1:]
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    found = {}
    for name in names or bodies.RIGHT:
        exercise = entry(exercise_for(name))
        place = exercise["files"][exercise["names"].index(name)]
        files = [f"tests/{exercise['tests']}", "course/hidden/test_hidden.py"]
        found[name] = {}
        for title, body in variants(name, place, int(right), int(wrong)):
            plugin = Tests(exercise, f"student of {title}", ["hidden"])
            with seam.instead({f"{place}:{name}": function_with(place, name, body)}):
                pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:terminal", "-o",
                             "addopts=", *files], plugins=[plugin])
            failed = {test: says for test, says in plugin.results.items() if says}
            found[name][title] = failed if plugin.results else {"": "no test ran"}
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
