"""What is suggested as an exercise, and how a function that is not on the list becomes one."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

from course import source

ROOT = source.ROOT
TESTS, MUTANTS = ROOT / "tests", ROOT / "tests" / "mutants"
LESSONS = "test_lessons.py"              # grades what is no blank: kernels/lessons/, wrong or slow
WATCH = "kernels/watch.py", "report"     # what those tests ask for runs beside the submission


class Exercise(NamedTuple):
    """names: what is blanked, or planted. tests: a file of tests/, and words of pytest's -k.

    minutes: about. withheld: other functions that are blank while this exercise is graded, for a
    call of one of them would be a solution. rubric: what a teacher asks beyond the tests.
    """
    names: tuple
    tests: str
    match: str
    minutes: int
    learn: str
    hint: str
    withheld: tuple = ()
    rubric: str = ""

    @property
    def title(self):
        return ", ".join(name.rpartition(":")[2] for name in self.names)


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
             "a similarity matrix, its diagonal at -inf, and a cross-entropy",
             ("chunked_forward", "chunked_backward")),
    Exercise(("chunked_forward", "chunked_backward"), "test_kernels_nt_xent.py",
             "equals_the_loop and torch or near_float64 and torch or one_rank and torch", 180,
             "a loss whose matrix never exists, and the gradient that autograd would give",
             "derive d loss / d z on paper first: each similarity occurs in two rows"),
    Exercise(("_backward_rows.backward",), "test_kernels_nt_xent.py", "two_ranks and torch", 60,
             "why the gradient over several processes needs what the others know",
             "your rows are columns for the others: whose g and log-sum do those terms take?"),
    Exercise(("gather_forward",), "test_kernels_tiles.py",
             "equals_the_loops and torch or normalised and torch or recolours and torch", 60,
             "indexing that replaces four loops",
             "unfold twice: a view of every place where a tile could be", ("tiles_forward",)),
    Exercise(("gather_backward",), "test_kernels_tiles.py",
             "adjoint and torch or gradient_type and torch", 60,
             "a gather's gradient is a scatter, and how to test one: <Ax, y> = <x, A'y>",
             "the inverse permutation says where each source tile went", ("tiles_backward",)),
    Exercise(("permutation_set",), "test_jigsaw.py",
             "far_apart or greedy or repeat_with or than_there_are", 45,
             "why 100 of 362,880 orders, and which",
             "keep each candidate's least distance to those chosen; take the farthest"),
    Exercise(("psnr", "ssim"), "test_super_resolution.py", "psnr_is or ssim_is", 45,
             "what super-resolution is measured by, and what that misses",
             "means, variances and covariance under one Gaussian window: five convolutions"),
    Exercise(("grad_cam",), "test_explain.py", "grad_cam_of or what_they_share or map_of_zeros", 30,
             "where in the image a score comes from",
             "the mean gradient of each channel weighs its map; negative sums are dropped"),
    Exercise(("vector_add",), LESSONS, "vector_add", 20,
             "indices of threads and blocks, and the tail",
             "a thread's place among all is blockIdx.x * blockDim.x + threadIdx.x; is it below n?"),
    Exercise(("histogram",), LESSONS, "histogram", 40,
             "lost updates, atomic operations, and counting in shared memory first",
             "atomicAdd; then a __shared__ array of counts: zero it, count, add it up"),
    Exercise(("transpose",), LESSONS, "transpose", 45,
             "coalescing, then bank conflicts",
             "read rows, write rows, and turn the tile in shared memory; then pad its rows"),
    Exercise(("block_sums",), LESSONS, "block_sums", 45,
             "what a barrier is for, and sums without one",
             "__syncthreads outside the branch; then five shuffles, and one number from each warp"),
    Exercise(("softmax",), LESSONS, "softmax", 60,
             "a softmax in one pass: the running maximum and sum",
             "when the maximum rises, what becomes of the sum so far? Begin with a finite maximum"),
    Exercise(("matmul",), LESSONS, "matmul", 90,
             "how often a number is fetched: tiles in shared memory, then in registers",
             "two barriers a step; four numbers of a row and four of a column make 16 products"),
    Exercise(("mma_tile",), LESSONS, "mma_tile", 90,
             "a matrix spread over the registers of a warp; swizzled shared memory",
             "which register holds row g + 8? Then chunk c of row j at c ^ (j % 8)"),
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

HUNT = "some tests fail: what do their cases have in common, and what do those that pass? Then " \
       "read the kernel that only they run"
HUNTED = {                               # kernel: test file, words of -k, bugs that they find
    "nt_xent.cu": ("test_kernels_nt_xent.py", "equals_the_loop and emulated or near_float64 and "
                   "emulated or same_bits and emulated or special and emulated or "
                   "rows_of_one and emulated or test_layouts and emulated",
                   ("barrier_after_load_removed", "last_tile_skipped", "maximum_not_kept",
                    "no_diagonal_mask", "one_p_term", "padded_columns_count",
                    "positive_ignores_first", "wrong_row")),
    "tile_shuffle.cu": ("test_kernels_tiles.py", "equals_the_loops and emulated or normalised and "
                        "emulated or adjoint and emulated or recolours and emulated or "
                        "test_layouts and emulated",
                        ("gap_keeps_gradient", "grid_above_5_is_5", "matrix_transposed",
                         "not_clamped", "offset_by_output_tile", "ragged_edge_unwritten"))}
HUNT_RUBRIC = "the line; a case in which it shows and one in which it does not; why a GPU " \
              "might not show it at all"


def patch(name):
    """The patch that plants the bug of this name; it need not exist."""
    return MUTANTS / f"{name}.patch"


def kernel_of(file):
    """The key of HUNTED for a file of kernels/. Raises ValueError for what all kernels share."""
    found = [kernel for kernel in HUNTED if Path(file).name.startswith(Path(kernel).stem)]
    if not found:
        raise ValueError(f"{file} serves all kernels on a GPU: no handed-out test sees a bug there")
    return found[0]


def patched_kernel(name):
    """The kernel that a patch breaks, as a key of HUNTED."""
    return kernel_of(re.search(r"\+\+\+ b/(.*)", patch(name).read_text())[1])


def kernel_files(kernel):
    """All files of a kernel, from the top of the project."""
    return [file.relative_to(ROOT).as_posix()
            for file in sorted((ROOT / "kernels").glob(f"{Path(kernel).stem}*.cu*"))]


def is_bug(exercise):
    return patch(exercise.names[0]).exists()


def is_lesson(exercise):
    return exercise.tests == LESSONS


def public_title(exercise):
    """What students see: of a bug the kernel alone."""
    name = exercise.names[0]
    return f"bug in {Path(patched_kernel(name)).stem}" if is_bug(exercise) else exercise.title


def exercise_for(name):
    """The suggested exercise that holds `name`, or one made up: a bug or kernel is graded by the
    tests of its file under the emulator, a function by those that call it. Raises ValueError.
    """
    for exercise in EXERCISES:
        short = name.rpartition(":")[2]
        if short in exercise.names and (name == short or source.find(name) == source.find(short)):
            return exercise
    if patch(name).exists():
        tests, match, _ = HUNTED[patched_kernel(name)]
        return Exercise((name,), tests, match, 60, "", HUNT, (), HUNT_RUBRIC)
    function = source.find(name)
    refuse_if_unsendable(function)
    if function.is_cuda:
        tests, match, _ = HUNTED[kernel_of(function.file)]
        return Exercise((name,), tests, match, 0, "", "the head of the file has the formula, and "
                        "who owns what")
    return Exercise((name,), *callers(function), 0, "", "its tests say more")


def refuse_if_unsendable(function):
    """Raises ValueError for a function that cannot be graded by its arguments and result alone."""
    if function.is_cuda:
        return
    nodes = list(source.own_nodes(function.node))
    of_object = [a.arg for a in function.node.args.args[:1]] == ["self"]
    why = ("its object stays in its own process" if of_object else
           "it yields, and so has no result" if any(isinstance(n, ast.Yield) for n in nodes) else
           "it returns nothing" if not any(isinstance(n, ast.Return) and n.value for n in nodes)
           else "")
    if why:
        raise ValueError(f"no test grades {function.name} of {function.file.name} by its arguments "
                         f"and result alone: {why}. Choose a function of numbers and arrays")


def callers(function):
    """The test file with most tests that call a function, and words that choose those tests.

    Raises ValueError if none does. Whether they do grade it, course.make tries out.
    """
    short = function.name.rpartition(".")[0] or function.name     # of a method: its class
    short, graders = short.rpartition(".")[2], {}
    module = function.file.stem if function.file.stem != "__init__" else function.file.parent.name
    for file in sorted(TESTS.glob("test_*.py")):
        text = source.read(file)
        if re.search(rf"\b{module}\b", text) and not file.name.startswith("test_course"):
            graders[file.name] = re.findall(
                rf"(?ms)^def (test_\w+)\((?:(?!^def ).)*?\b(?<!def ){short}\(", text)
    file = max(graders, default=None, key=lambda file: (
        short in " ".join(graders[file]), module in file, len(graders[file])))
    if file is None or not graders[file]:
        raise ValueError(f"no test calls {function.name} of {function.file.name}: nothing would "
                         "grade it")
    return file, " or ".join(graders[file])


def command(exercise):
    return f'python -m pytest tests/{exercise.tests} -k "{exercise.match}"'


def hint(exercise):
    return f"Hint: {exercise.hint}{'' if exercise.hint.endswith('?') else '.'}"


def table():
    """The suggested exercises as the Markdown table of tests/README.md."""
    rows = [("exercise", "what to learn", "minutes", "graded by"), ("---", "---", "--:", "---")]
    rows += [(", ".join(f"`{name}`" for name in e.names), e.learn, str(e.minutes), f"`{e.tests}`")
             for e in EXERCISES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
