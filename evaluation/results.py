"""Results on file (eval.json), and several of them side by side."""

import codecs
import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import sys
import traceback
from pathlib import Path

import numpy as np

import atomic
import fgssl
import pictures
import terminal
from imagesets.identity import file_ids
from runfiles import raise_if_disk_failed

COLUMNS = {"linear": "linear", "knn": "k-NN", "rank1": "rank-1", "rank5": "rank-5", "map": "mAP"}


# eval.json ----------------------------------------------------------------------------------------


def digest(*parts):
    """16 hex digits that identify these bytes or arrays; an array need not lie in one piece."""
    total = hashlib.sha256()
    for part in parts:
        for piece in [part] if isinstance(part, bytes) else map(np.ascontiguousarray, part):
            total.update(piece)
    return total.hexdigest()[:16]


def digest_weights(model):
    return digest(*(name.encode() + tensor.cpu().numpy().tobytes()
                    for name, tensor in sorted(model.state_dict().items())))


def digest_data(data, splits):
    """Of the classes, file names, labels, splits, crops and fit."""
    parts = [json.dumps(data.classes).encode()]
    for split in splits:
        files = ["/".join(data.records.paths[row].parts[-2:]) for row in split.rows]
        parts.append(json.dumps([files, split.labels.tolist()]).encode())
        if data.crops is not None:
            parts.append(data.crops[split.rows].tobytes())
    if data.records.fit != "crop":
        parts.append(data.records.fit.encode())
    return digest(*parts)


def count_seen(args, records, rows):
    """How many of the test images the checkpoint was trained on, or the one that its training began
    with; None where it does not say, and with --fold. UserError if there are any, unless
    --allow-seen: they are no test."""
    trained_on, file = set(), None if args.fold else args.checkpoint
    while file and Path(file).is_file():
        checkpoint = fgssl.read_checkpoint(file)
        data, run = checkpoint.get("data"), checkpoint.get("args")
        if data:
            trained_on |= {row.tobytes() for row, split in zip(data["ids"].numpy(), data["splits"])
                           if split == "train"}
        file = run.get("init") if isinstance(run, dict) else None
    if not trained_on:
        return None
    ids = file_ids([records.paths[row] for row in rows])
    seen = sum(row.tobytes() in trained_on for row in ids)
    if seen and not args.allow_seen:
        raise fgssl.UserError(f"{args.checkpoint} was trained on {seen} of the {len(rows)} test "
                              "images: choose another test set, or pass --allow-seen")
    return seen


NUMBER = (int, float)
SCORES = {"linear": NUMBER, "knn": NUMBER}
CELL = {"method": str, "shots": (int, str), "draw": int, "recipe": (dict, type(None)),
        "images": int, "val": NUMBER, "test": NUMBER}
RESULT = {"data": str, "digest": str, "weights": str, "size": int, "layer": str, "seed": int,
          "n": {"train": int, "val": int, "test": int}, "chance": NUMBER, "majority": NUMBER,
          "random_init": SCORES, "few_labels": [CELL]}       # every eval.json has these, and more


def fits(value, wanted):
    """Whether a JSON value is of a type, a dict with at least some keys, or a list of one kind."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], inner)
                                               for name, inner in wanted.items())
    if isinstance(wanted, list):
        return isinstance(value, list) and all(fits(inner, wanted[0]) for inner in value)
    return (isinstance(value, wanted) and not isinstance(value, bool)
            and not (isinstance(value, float) and not math.isfinite(value)))


def is_result(value):
    """Whether a JSON value is a result of this version of the script."""
    return (fits(value, RESULT)
            and all(fits(value[row], SCORES) for row in ("init", "encoder") if row in value)
            and all(isinstance(cell["shots"], int) or cell["shots"] == "all"
                    for cell in value["few_labels"]))


def read_result(file):
    """The eval.json of an earlier run; UserError for another file. One that was changed since it
    was written is used, and a line says so."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise_if_disk_failed(error, file)
        result = None
    if not is_result(result):
        raise fgssl.UserError(f"{file} is no eval.json of this version of the script, or damaged; "
                              "make one with python linear_eval.py CHECKPOINT --out FOLDER")
    if result.get("checksum") != checksum(result):
        print(f"{file} was changed or damaged since it was written, or is of an older version of "
              "the script: it is used as it is", file=sys.stderr)
    return result


def checksum(result):
    rest = {name: value for name, value in result.items() if name != "checksum"}
    return digest(json.dumps(rest, sort_keys=True).encode())


IDENTITY = {"digest": "data", "weights": "weights", "size": "size", "layer": "layer",
            "seed": "seed"}


def earlier_result(file, result):
    """What the eval.json in the folder already holds of the evaluation `result`; {} without one.

    One that cannot be used is moved aside, with a line. UserError where it is of another
    evaluation, which would be lost.
    """
    if not file.exists():
        return {}
    try:
        before = read_result(file)
    except fgssl.UserError:
        names = (f"{file.name}.damaged{i if i > 1 else ''}" for i in itertools.count(1))
        aside = next(path for path in map(file.with_name, names) if not path.exists())
        file.rename(aside)
        print(f"{file} is damaged, or of another version of the script: it is now {aside.name}, "
              "and the evaluation begins anew", file=sys.stderr)
        return {}
    other = [name for key, name in IDENTITY.items() if before.get(key) != result[key]]
    if other:
        count = len(before["few_labels"])
        held = f"{count} few-label results" if count else "an evaluation"
        raise fgssl.UserError(f"{file} holds {held} of other data, weights, size, layer or seed "
                              f"(here: {', '.join(other)}), which this one would replace: pass "
                              f"another --out, or remove {file.name}.")
    return before


def write_result(file, result):
    """Whole or not at all: hours of few-label results may be in it."""
    result = result | {"checksum": checksum(result)}
    with atomic.replacing(file) as draft:
        draft.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(file, rows):
    """Rows of texts and numbers as CSV in UTF-8, whole or not at all. Where there are letters
    beyond ASCII it begins with a byte order mark, without which Excel misreads them. A text that a
    spreadsheet would run as a formula, such as a file's name =1+1.jpg, gets an apostrophe."""
    def safe(cell):
        formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        return f"'{cell}" if formula else cell

    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(safe, row) for row in rows)
    content = terminal.to_utf8(text.getvalue())
    with atomic.replacing(file) as draft:
        draft.write_bytes(content if content.isascii() else codecs.BOM_UTF8 + content)


class Extras:
    """Files beside eval.json. One that cannot be drawn or written is reported, and the rest goes
    on: no picture is worth the numbers that are still to come.

        extras = Extras()
        with extras.write("map.png"): ...
        extras.finish()                                      # exit status 1 if one failed
    """

    def __init__(self):
        self.failed = []

    @contextlib.contextmanager
    def write(self, name):
        try:
            yield
        except Exception as error:
            self.failed.append(name)
            if not isinstance(error, (OSError, MemoryError)):
                traceback.print_exc()
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            print(f"{name} is not written: {reason}", file=sys.stderr)

    def finish(self):
        if self.failed:
            raise SystemExit(f"error: not written: {', '.join(self.failed)}; all else is done. Run "
                             "the same command again for them.")


# Tables -------------------------------------------------------------------------------------------


def markdown_table(rows):
    """Rows of texts as a Markdown table; the first row is the head."""
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) + " |"
             for row in rows]
    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def mean_std(values):
    """The mean of numbers as text, ± their std where there are several. None is left out; without
    any number the text is empty."""
    values = [value for value in values if value is not None]
    std = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}" if values else ""


def percent_of(result):
    """Of what the percentages in an eval.json are, for the head of a table."""
    part = f"fold {result['fold']}" if result.get("fold") else "test"
    return f"{part}, % of {result['n']['test']}"


def features_rows(named, head):
    """{name: [what evaluate measured, ...]} as rows of texts; head: percent_of the images."""
    return [[head, *COLUMNS.values()]] + [
        [name, *(mean_std([row.get(column) for row in rows]) for column in COLUMNS)]
        for name, rows in named.items()]


def rows_of(result):
    """{name: [what was measured]} of one eval.json, the controls first."""
    rows = {name: dict.fromkeys(("linear", "knn"), result[name.split()[0]])
            for name in ("chance", "majority class")} | {"random init": result["random_init"]}
    for row, key in (("init", "init_name"), ("encoder", "checkpoint")):
        if row in result:
            name = result[key]
            rows[name if len(name) <= 70 else f"...{name[-67:]}"] = result[row]
    return {name: [row] for name, row in rows.items()}


def print_result(result):
    """The table; below it the layers and the worst classes."""
    rows = rows_of(result)
    print(markdown_table(features_rows(rows, percent_of(result))))
    (measured,), report = [*rows.values()][-1], result["report"]
    if result["layer"] == "best":
        print(f"\nlayers: {measured['linear_layer']} (linear), {measured['knn_layer']} (others)")
    print(f"\nlinear: top-5 {report['top5']:.1f} %, mean over classes "
          f"{report['mean_per_class']:.1f} %; worst classes:")
    for row in report["worst"][:3]:
        print(f"  {row['class']}: {row['recall']:.0f} % of {row['images']}"
              + (f", most often taken for {row['taken_for']}" if "taken_for" in row else ""))


def print_grad_cam(cam):
    if cam:
        print(f"Grad-CAM inside the box: {mean_std([cam['class_score_in_box']])} % for the class, "
              f"{mean_std([cam['similarity_in_box']])} % for the similarity of views; the box is "
              f"{mean_std([cam['box_of_view']])} % of the view")


# Several results ----------------------------------------------------------------------------------


def read_results(arguments):
    """{name: [result, ...]} of several FILE or NAME=FILE; without a NAME, it is the file's folder.
    Raises UserError where data, splits or size of the images differ."""
    runs, first = {}, None
    for argument in arguments:
        parts = argument.split("=")                          # a name or a folder may hold one, too
        cuts = [("=".join(parts[:i]), fgssl.path("=".join(parts[i:]))) for i in range(len(parts))]
        name, file = next((cut for cut in cuts if Path(cut[1]).is_file()), cuts[-1])
        result = read_result(file)
        if "report" not in result:
            raise fgssl.UserError(f"{file} is of an evaluation that was stopped: run it again")
        first = first or result
        if any(result[key] != first[key] for key in ("digest", "size")):
            raise fgssl.UserError(
                f"{file} is not of the same data, splits and size as {arguments[0]} "
                f"({result['data']} at {result['size']} px, {first['data']} at {first['size']} "
                "px): there is nothing to compare. Evaluate one of them anew with --data and "
                "--size.")
        runs.setdefault(name or Path(file).resolve().parent.name, []).append(result)
    return runs


def compare_results(arguments, out):
    """Print the results in several eval.json as tables, and draw their few-label curves.

    arguments: as of read_results. The results of one name are seeds of one method, and are pooled:
    a std is over seeds and, for few labels, draws.
    """
    runs = read_results(arguments)
    measured = {name: [result.get("encoder", result["random_init"]) for result in results]
                for name, results in runs.items()}
    print(markdown_table(features_rows(measured, percent_of(next(iter(runs.values()))[0]))))
    show_few_labels(runs, out)


def few_label_tables(runs):
    """(method, rows of texts) of each method of few_label_scores."""
    (scores, methods, shots), first = few_label_scores(runs), next(iter(runs.values()))[0]
    for method in methods:
        yield method, [[f"{method}, {percent_of(first)}",
                        *(f"{k} label{'s' * (k != 1)}" for k in shots)]] + [
            [name, *(mean_std(scores.get((method, name, k), [])) for k in shots)] for name in runs]


def show_few_labels(runs, out):
    """Print few_label_tables; draw all as out/compare.png."""
    tables = [*few_label_tables(runs)]
    for _, rows in tables:
        print("\n" + markdown_table(rows))
    if tables:
        out.mkdir(parents=True, exist_ok=True)
        majority = next(iter(runs.values()))[0]["majority"]
        pictures.save(few_label_curves(runs, majority), out / "compare.png")
        print(f"\nwrote {out / 'compare.png'}")


def few_label_scores(runs):
    """Of {name: [result, ...]} the test accuracies {(method, name, shots): [score, ...]}, the
    methods, and the numbers of shots in order."""
    few = {}
    for name, results in runs.items():
        for cell in (cell for result in results for cell in result["few_labels"]):
            few.setdefault((cell["method"], name, cell["shots"]), []).append(cell["test"])
    return (few, list(dict.fromkeys(method for method, _, _ in few)),
            sorted({k for _, _, k in few}, key=lambda k: math.inf if k == "all" else k))


def few_label_curves(runs, majority):
    """A picture of few_label_scores: a panel a method, a curve a name, bars of one std."""
    (few, methods, ks), panels = few_label_scores(runs), []
    n = next(iter(runs.values()))[0].get("n")                # reproduce.py has its own
    about = f": {n['test']:,} test images" if n else ""
    for method in methods:
        curves = {}
        for i, name in enumerate(runs):
            shift = 0.04 * (i - (len(runs) - 1) / 2)         # so that bars do not overlap
            points = [(x + shift, few[method, name, k]) for x, k in enumerate(ks)
                      if (method, name, k) in few]
            curves[name] = ([x for x, _ in points], [np.mean(scores) for _, scores in points],
                            [np.std(scores, ddof=1) if len(scores) > 1 else 0
                             for _, scores in points])
        panels.append(pictures.curve(
            curves, {"majority class": majority}, "labels of each class", xnames=[*map(str, ks)],
            title=f"Few labels, {method}{about}",
            ylabel="right, %; bars: one standard deviation"))
    return pictures.stack(panels)
