"""Makes an assignment: a copy of the project in which some functions are to be written anew.

    python tests/make_assignment.py --list                        # exercises, with hints and times
    python tests/make_assignment.py OUT cosine_lr nt_xent_dense   # these two
    python tests/make_assignment.py OUT retrieval                 # or any function, method, kernel
    python tests/make_assignment.py OUT wait_for_too_few          # or a bug of tests/mutants
    python tests/make_assignment.py --grade OUT ann bob           # two solutions, by OUT's tests

In OUT the body of each is an error that says what to do; signature and docstring stay.
OUT/ASSIGNMENT.md lists place, hint and the tests that grade it; tests/grading.py ends each run of
pytest with what is solved. Tests that merely need the function are skipped until it is written.
A solution to grade is a folder: all of OUT, or only the files that changed. Its code is run; its
tests/ is not looked at. The solution is the project itself.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT, MUTANTS = HERE.parent, HERE / "mutants"
GRADING = "tests/assignment.json"       # in the copy: names, tests, hint, command of each exercise
LITTER = ".*", "__pycache__", "out", "data", "build"
UNWANTED = shutil.ignore_patterns(
    *LITTER, "make_assignment.py", "test_assignment.py", "test_docs.py", "mutants",
    "test_kernels_mutants.py")
HEAD = """# Assignment

To write: the bodies that raise `NotImplementedError` or, in a .cu file, say `EXERCISE`. The
docstring, or the head of the .cu file, says what is wanted. Of a bug nothing is blank.

    python -m pytest -m exercise    # all tests that grade; the last lines say what is solved
    python -m pytest                # and all others: minutes. What waits for an exercise is skipped

"""


class Exercise(NamedTuple):
    """names: what is blanked. tests: a file of tests/, and words of pytest's -k; minutes: about."""
    names: tuple
    tests: str
    match: str
    minutes: int
    learn: str
    hint: str


EXERCISES = (
    Exercise(("cosine_lr",), "test_run.py", "rate_rises", 15,
             "the schedule that nearly every run uses",
             "a straight line from 0, then half a cosine from 1 to 0; check both ends by hand"),
    Exercise(("hflip",), "test_augment.py", "hflip", 15,
             "one decision an image, for a whole batch at once",
             "draw B numbers from rng, then torch.where"),
    Exercise(("crop_boxes",), "test_augment.py",
             "uniform_area or every_place or ten_tries or cannot_fit", 45,
             "what `scale` and `ratio` of a random crop really are: laws, not sizes",
             "area is uniform, the logarithm of the ratio is; draw all ten tries at once and take "
             "the first that fits"),
    Exercise(("crop_resize",), "test_augment.py", "crop_resize", 45,
             "bilinear sampling, and where the centre of a pixel is",
             "pixel i of n lies at (i + 0.5) / n of the box; clamp what you sample to the box"),
    Exercise(("knn",), "test_model.py", "knn_is or outvotes", 30,
             "measuring features without training anything",
             "cosines, topk, weights exp(s / 0.07), and scatter_add into (n, classes)"),
    Exercise(("nt_xent_dense",), "test_kernels_nt_xent.py", "dense_form", 30,
             "SimCLR's loss; write it as two loops first, then without any",
             "a similarity matrix, its diagonal at -inf, and a cross-entropy"),
    Exercise(("chunked_forward", "chunked_backward"), "test_kernels_nt_xent.py",
             "equals_the_loop and torch or near_float64 and torch or one_rank and torch", 180,
             "a loss whose matrix never exists, and the gradient that autograd would give",
             "derive d loss / d z on paper first: each similarity occurs in two rows"),
    Exercise(("_backward_rows.backward",), "test_kernels_nt_xent.py", "two_ranks and torch", 60,
             "why the gradient over several processes needs what the others know",
             "your rows are columns for the others: whose g and log-sum do those terms take?"),
    Exercise(("gather_forward",), "test_kernels_tiles.py",
             "equals_the_loops and torch or normalised and torch", 45,
             "indexing that replaces four loops",
             "unfold twice: a view of every place where a tile could be"),
    Exercise(("gather_backward",), "test_kernels_tiles.py",
             "adjoint and torch or gradient_type and torch", 60,
             "a gather's gradient is a scatter, and how to test one: <Ax, y> = <x, A'y>",
             "the inverse permutation says where each source tile went"),
    Exercise(("permutation_set",), "test_jigsaw.py", "far_apart or greedy or repeat_with", 45,
             "why 100 of 362,880 orders, and which",
             "keep each candidate's least distance to those chosen; take the farthest"),
    Exercise(("psnr", "ssim"), "test_super_resolution.py", "psnr_is or ssim_is", 45,
             "what super-resolution is measured by, and what that misses",
             "means, variances and covariance under one Gaussian window: five convolutions"),
    Exercise(("grad_cam",), "test_explain.py", "grad_cam_of or what_they_share or map_of_zeros", 30,
             "where in the image a score comes from",
             "the mean gradient of each channel weighs its map; negative sums are dropped"),
    Exercise(("tiles_forward",), "test_kernels_tiles.py",
             "equals_the_loops and emulated or normalised and emulated", 120,
             "a first CUDA kernel: who owns which output, 64-bit offsets, ragged ends",
             "one block a tile; threads stride over its rows and columns"),
    Exercise(("forward_simt",), "test_kernels_nt_xent.py",
             "equals_the_loop and emulated or float64-emulated", 240,
             "a softmax over a row that is never whole: the running maximum and sum",
             "`similarities` fills a 4 x 4 piece for each thread; Row<W> holds the running state"),
    Exercise(("barrier_before_reuse_removed",), "test_kernels_nt_xent.py",
             "near_float64 and emulated and bfloat16 or same_bits and emulated", 60,
             "a race: where a __syncthreads is missing, and what can go wrong without it",
             "in each loop: who may still read what is written next? CUDA_ON_CPU_ORDER=reverse "
             "before the command runs the threads in another order; so does random:1"),
)


class Function(NamedTuple):
    """A function or kernel: its body is file.read_text()[start:end]."""
    name: str
    file: Path
    line: int
    start: int
    end: int
    says: str


def python_functions(file):
    """The functions of a file; methods and inner functions by their dotted names."""
    text = file.read_text()
    ends = [m.end() for m in re.finditer("\n|$", text)]     # of each line, its newline included

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                body = child.body[ast.get_docstring(child) is not None:]
                if body:
                    yield Function(prefix + child.name, file, child.lineno,
                                   ends[body[0].lineno - 2] + body[0].col_offset,
                                   ends[child.end_lineno - 1] - 1,
                                   "its docstring says what it computes")
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(ast.parse(text), "")


def cuda_kernels(file):
    """The __global__ functions of a .cu file; a body ends where its braces do."""
    text = file.read_text()
    for found in re.finditer(r"__global__ void\s+__launch_bounds__\([^)]*\)\s+(\w+)\(", text):
        start = end = text.index("{", found.end()) + 1
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield Function(found[1], file, text.count("\n", 0, found.start(1)) + 1, start, end - 1,
                       "the head of the file has its formula, and who owns what")


def find(name, root=ROOT):
    """The one function called NAME, or FILE:NAME. Raises ValueError for none or several."""
    of_file, _, short = name.rpartition(":")
    files = (file for folder in (".", "methods", "evaluation", "imagesets", "kernels")
             for kind in ("*.py", "*.cu") for file in sorted((root / folder).glob(kind)))
    found = [f for file in files if str(file).endswith(of_file)
             for f in (cuda_kernels if file.suffix == ".cu" else python_functions)(file)
             if f.name == short]
    if not found:
        raise ValueError(f"no function, kernel or mutant is named {name}; --list shows exercises")
    if len(found) > 1:
        names = " or ".join(f"{f.file.relative_to(root)}:{f.name}" for f in found)
        raise ValueError(f"{name} is in several files: say {names}")
    return found[0]


def exercise_for(name):
    """The suggested exercise that holds `name`, or one made up: a mutant or kernel is graded by the
    tests of its file under the emulator, a function or method by those that call it, or its class.
    """
    for exercise in EXERCISES:
        if name.rpartition(":")[2] in exercise.names:
            return exercise
    is_mutant = patch(name).exists()
    source = patch(name).read_text() if is_mutant else find(name).file.name
    if ".cu" in source:
        tests = f"test_kernels_{'tiles' if 'tile_shuffle.cu' in source else 'nt_xent'}.py"
        return Exercise((name,), tests, "emulated", 60 * is_mutant, "",
                        "the head of the file has the formula, and who owns what")
    short, graders = name.rpartition(":")[2].partition(".")[0], {}
    for file in sorted({*HERE.glob("test_*.py")} - {HERE / "test_assignment.py"}):
        source = file.read_text()
        graders[file.name] = [
            node.name for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            and re.search(rf"\b{short}\(", ast.get_source_segment(source, node))]
    file = max(graders, key=lambda file: (short in " ".join(graders[file]), len(graders[file])))
    if not graders[file]:
        raise ValueError(f"no test calls {name}: nothing would grade it")
    return Exercise((name,), file, " or ".join(graders[file]), 0, "", "its tests say more")


def command(exercise):
    return f'python -m pytest tests/{exercise.tests} -k "{exercise.match}"'


def hint(exercise):
    return f"Hint: {exercise.hint}{'' if exercise.hint.endswith('?') else '.'}"


def blank(text, function, exercise):
    """The file's text with the function's body replaced by an error that says what to do."""
    says = (f"exercise {function.name}: write it; {function.says}. {hint(exercise)} "
            f"Graded by: {command(exercise)}").replace('"', "'")
    if function.file.suffix == ".cu":
        body = f'\n    EXERCISE("{says}");\n'
    else:
        margin = " " * (function.start - text.rindex("\n", 0, function.start) - 1)
        lines = textwrap.wrap(says, 90 - len(margin), break_on_hyphens=False)
        body = "raise NotImplementedError(" + "".join(f'\n{margin}    "{line} "' for line in lines)
        body += ")"
    return text[:function.start] + body + text[function.end:]


CUDA_ERROR = """
#ifdef __CUDACC__
#define EXERCISE(why) __trap()
#else
#define EXERCISE(why) cuda_on_cpu::refuse(why)
#endif
"""


def make(out, names):
    """Write the assignment into a new folder; returns [(name, Exercise, its place)]."""
    out, tasks = Path(out), {}                               # {name: (Exercise, Function or None)}
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a new folder")
    for exercise in map(exercise_for, names):
        for name in exercise.names:
            function = None if patch(name).exists() else find(name)
            tasks[function.name if function else name] = exercise, function
    shutil.copytree(ROOT, out, ignore=UNWANTED)
    readme = out / "README.md"                               # its Python is a solution
    readme.write_text(re.sub(r"(?ms)^```python\n.*?^```\n", "", readme.read_text()))
    for file in {function.file for _, function in tasks.values() if function}:
        text = file.read_text()
        of_file = [task for task in tasks.values() if task[1] and task[1].file == file]
        for exercise, function in sorted(of_file, key=lambda task: -task[1].start):
            text = blank(text, function, exercise)           # the last first: starts stay true
        if file.suffix == ".cu":
            last = [m.end() for m in re.finditer(r"#include[^\n]*\n", text)][-1]
            text = text[:last] + CUDA_ERROR + text[last:]
        (out / file.relative_to(ROOT)).write_text(text)
    for name in (name for name, (_, function) in tasks.items() if not function):
        subprocess.run(["git", "apply", str(patch(name))], cwd=out, check=True,
                       env=os.environ | {"GIT_CEILING_DIRECTORIES": str(out.resolve().parent)})
    grading = [{"names": [name for name in tasks if tasks[name][0] is exercise],
                "tests": exercise.tests, "match": exercise.match, "hint": exercise.hint,
                "command": command(exercise)}
               for exercise in dict.fromkeys(exercise for exercise, _ in tasks.values())]
    (out / GRADING).write_text(json.dumps(grading, indent=1))
    with open(out / "tests" / "conftest.py", "a") as conftest:
        conftest.write("\n\nfrom grading import *  # which tests grade, and where you stand\n")
    places = []
    for name, (exercise, function) in tasks.items():         # in the copy other lines hold them
        if function:
            file = function.file.relative_to(ROOT)
            place = f"{file}:{find(f'{file}:{name}', out).line}"
        else:
            place = "a bug in " + re.search(r"\+\+\+ b/(.*)", patch(name).read_text())[1]
        places.append((name, exercise, place))
    (out / "ASSIGNMENT.md").write_text(HEAD + page(places))
    return places


def patch(name):
    return MUTANTS / f"{name}.patch"


def grade(homework, solution):
    """The lines on its exercises with which pytest ends for a solution of `homework`."""
    files = {f"tests/{e['tests']}" for e in json.loads(Path(homework, GRADING).read_text())}
    with tempfile.TemporaryDirectory() as top:
        copy = Path(shutil.copytree(homework, Path(top, "copy")))
        shutil.copytree(solution, copy, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(*LITTER, "tests"))
        try:
            said = subprocess.run([sys.executable, "-m", "pytest", "-m", "exercise", "-p",
                                   "no:cacheprovider", "--continue-on-collection-errors", *files],
                                  cwd=copy, capture_output=True, text=True, timeout=3600).stdout
        except subprocess.TimeoutExpired:
            return "no result in an hour: a loop that never ends?\n"
    found = re.search(r"^=+ exercises =+\n((?:[^=\n].*\n)*)", said, re.M)
    return found[1] if found else said


def page(places):
    """Markdown: what each exercise is, where, and how it is graded."""
    text = ""
    for name, exercise, place in places:
        text += f"## {name}, {place}\n\n"
        text += f"Learn: {exercise.learn}.\n\n" if exercise.learn else ""
        text += f"{hint(exercise)}\n\n"
        text += f"About {exercise.minutes} minutes.\n\n" if exercise.minutes else ""
        text += f"    {command(exercise)}\n\n"
    return text


def table():
    """The suggested exercises as the Markdown table of tests/README.md."""
    rows = [("exercise", "what to learn", "minutes", "graded by"), ("---", "---", "--:", "---")]
    rows += [(", ".join(f"`{name}`" for name in e.names), e.learn, str(e.minutes), f"`{e.tests}`")
             for e in EXERCISES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", nargs="?", help="a new folder; to grade, the one handed out")
    p.add_argument("names", nargs="*", help="functions (NAME or FILE:NAME), kernels, mutants")
    p.add_argument("--list", action="store_true", help="show the suggested exercises")
    p.add_argument("--grade", action="store_true", help="names are folders with solutions of OUT")
    args = p.parse_args(argv)
    if args.list:
        return print(page([(", ".join(e.names), e, e.tests) for e in EXERCISES]))
    if not args.names:
        p.error("name a new folder and at least one function; --list shows exercises")
    try:
        for solution in args.names if args.grade else ():
            print(f"== {solution}\n{grade(args.out, solution)}", flush=True)
        if not args.grade:
            print(page(make(args.out, args.names)) + f"wrote {args.out}/ASSIGNMENT.md")
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
