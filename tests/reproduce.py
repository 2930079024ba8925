"""Writes a table of the README or of docs/, after running what is not yet recorded of it.

    python tests/reproduce.py                      # names the tables, and their hours
    python tests/reproduce.py grocery              # runs what is not yet recorded, then writes it
    python tests/reproduce.py grocery --again      # from scratch: forgets its runs and records
    python tests/reproduce.py grocery --only SimCLR_0 --again    # a row, of seed 0
    python tests/reproduce.py grocery --dry-run    # prints the commands
    python tests/reproduce.py grocery --write      # runs none: writes what is recorded so far

Runs lie in out/reproduce/; what linear_eval.py says of them is recorded in assets/results/, by its
command and that of the training, and not run again. Ctrl-C loses nothing: go on without --again.
Started in several terminals, the command without it shares the runs out; give each
OMP_NUM_THREADS=1.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import atomic  # noqa: E402
import fgssl  # noqa: E402
import pictures  # noqa: E402
from evaluation import results  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS, OUT = ROOT / "assets" / "results", Path("out/reproduce")
KEPT = ("digest", "n", "commit", "majority", "random_init", "encoder", "few_labels")  # of eval.json


class Run(NamedTuple):
    """A row. train: a trainer and its flags, or "" for random weights; evaluate: flags of each call
    of linear_eval.py; seeds: 0, 1, ..., whose mean and std stand in the row; studies: evaluations
    of seed 0 alone, numbered after the others, for columns that name their number."""
    label: str
    train: str
    evaluate: tuple = ("",)
    seeds: int = 3
    studies: tuple = ()


class Table(NamedTuple):
    """hours: about. columns: {title: what of a run}: "linear", "knn", ... of its first
    evaluation, "1 linear" of its second, "every linear" of all, which are folds; "fine-tuned all",
    "0 frozen 5", "every frozen 5", ... as `few_labels` has them, and "val 2 fine-tuned 5" on val;
    "log val_puzzles", what its training wrote last, "log core_minutes", how much of a core it
    took. against: the row with which the others are compared. also: {name: columns} of further
    tables of these runs. of: on what the percentages are."""
    data: str
    hours: float
    columns: dict
    runs: tuple
    against: str = ""
    also: dict = {}
    of: str = "test"


FROZEN = {"linear": "linear", "k-NN": "knn", "rank-1": "rank1", "mAP": "map"}
LABELS = {"1 label": "1", "5": "5", "10": "10", "all": "all"}
TUNED = {title: f"fine-tuned {shots}" for title, shots in LABELS.items()}
SHOTS = {title: f"0 frozen {shots}" for title, shots in LABELS.items()}
BEST, LAST = "--layer best --shots 1 5 10 all --draws 3", ""
NEAREST = {"linear": "linear", "k-NN": "knn"}
COST = {"core minutes": "log core_minutes"}
FOLDS = tuple(f"--fold {i}/4 --shots 5 --draws 2" for i in range(1, 5))  # test is not read
IN_FOLDS = COST | {"linear": "every linear", "k-NN": "every knn", "5 labels": "every frozen 5"}
NT_XENT = "--loss nt-xent"
FORMER = f"{NT_XENT} --optimizer adamw --lr 1e-3 --first-size 64 --temperature 0.2"  # defaults once
VIEWS = "original", "gamma", "dropout", "swap", "jigsaw", "dcl", "region"


def views(flags, network="", seeds=3):
    return (Run("random weights", "", (network,), seeds),
            *(Run(view, f"train_simclr.py {network} {flags} --view {view}", seeds=seeds)
              for view in VIEWS))


def variants(train, flags, evaluate=("",)):
    """A row for each {what it is: its flags}, of one seed."""
    return tuple(Run(f"{what}, `{more}`", f"{train} {more}", evaluate, 1)
                 for what, more in flags.items())


def tune(stage, shots, steps=2400):
    return f"--layer {stage} --draws 1 --finetune --shots {shots} --steps {steps}"


def fair(data, name, stage, simclr, jigsaw, srgan):
    """The Table of all methods, each pretrained for 10 minutes of one core. Their flags say which
    colours and crops suit the set; they were chosen in folds of train and val. stage: 3 or 4, from
    which all are fine-tuned: where, over the rows, seed 0 does better on val."""
    simclr = f"train_simclr.py --epochs 80 {simclr}"
    srgan = f"train_srgan.py --scale 2 --epochs 34 --pixel-epochs 4 --blocks 3 --width 32 {srgan}"
    rows = (("random weights; from scratch", ""), ("SimCLR", simclr),
            ("jigsaw", f"train_jigsaw.py --epochs 110 {jigsaw}"), ("SRGAN", srgan))
    controls = (("SRGAN, real or fake alone", f"{srgan} --match 0"),
                ("SRGAN, matching alone", f"{srgan} --truth 0 --adversarial 0"),
                (f"SimCLR, `{NT_XENT}`", f"{simclr} {NT_XENT}"),
                ("SimCLR, `--view jigsaw`", f"{simclr} --view jigsaw"))
    evaluate = BEST, LAST, tune(stage, "5 all"), tune(stage, "1 10")
    other, longer = tune(7 - stage, "5 all"), tune(stage, "5 all", 7200)
    studies = {f"{shots}, {what}{on}": f"{of}{i} fine-tuned {shots}"
               for shots in ("5", "all") for i, what in
               ((2, f"stage {stage}"), (4, f"stage {7 - stage}"), (5, "7,200 steps"))
               for on, of in (("", ""), (", val", "val "))}
    last = {f"{title}, last stage": f"1 {what}" for title, what in NEAREST.items()}
    return Table(data, 4, FROZEN | TUNED, (
        *(Run(label, train, evaluate, 3, (other, longer)) for label, train in rows),
        *(Run(label, train, (BEST, LAST), 1) for label, train in controls)), rows[0][0],
        also={f"{name}-frozen": COST | last | SHOTS,
              f"{name}-studies": studies})


def tried(data, flags):
    """The Table of the steps that made SimCLR cheaper, at about equal cost."""
    return Table(data, 0.5, IN_FOLDS, variants(f"train_simclr.py {flags}", {
        "AdamW": f"{FORMER} --epochs 15",
        "Muon": f"{NT_XENT} --first-size 64 --temperature 0.2 --epochs 15",
        "and growing views, at temperature 0.1": f"{NT_XENT} --epochs 20",
        "and decoupled": "--epochs 20"}, FOLDS),
        of="folds of train and val")


def rates(data, stage, flags):
    """The Table of fine-tuning at several peak learning rates, with few labels and with all."""
    lrs = "0.04", "0.02", "0.01", "0.005"
    return Table(data, 1.5, {f"{labels} at {lr}": f"{i} fine-tuned {shots}"
                             for labels, shots in (("5 labels", "5"), ("all", "all"))
                             for i, lr in enumerate(lrs)}, tuple(
        Run(label, train, tuple(f"--fold 1/4 {tune(stage, '5 all')} --lr {lr}" for lr in lrs), 1)
        for label, train in (("from scratch", ""), ("SimCLR", f"train_simclr.py {flags}"))),
        of="a fold of train and val")


GROCERY, BIRDS = "--color 0.1 --gray 0 --min-crop 0.08", "--color 0.25 --gray 0.1 --min-crop 0.2"
TABLES = {
    "grocery": fair("grocery", "grocery", 3, GROCERY, "--color 0 --gray 0", "--color 0.1 --gray 0"),
    "birds": fair("data/birds", "birds", 4, BIRDS, "--color 0.2 --gray 0.1",
                  "--color 0.25 --gray 0.1"),
    "toy": Table("toy", 0.5, FROZEN, tuple(
        Run(label, train, (BEST,), 1) for label, train in (
            ("random weights", ""), ("SimCLR", "train_simclr.py"),
            ("jigsaw", "train_jigsaw.py"), ("SRGAN", "train_srgan.py")))),
    "speed": Table("toy", 0.2, COST | NEAREST, (
        Run("random weights", "", seeds=1),
        *(Run(f"{what}, `{flags}`", f"train_simclr.py {flags}", seeds=seeds)
          for what, flags, seeds in (
              ("AdamW", f"{FORMER} --epochs 80", 1),
              ("Muon", f"{NT_XENT} --first-size 64 --temperature 0.2", 1),
              ("Muon, growing views", f"{NT_XENT} --temperature 0.2", 1),
              ("Muon, growing views, temperature 0.1", NT_XENT, 1),
              ("decoupled: the defaults", "--epochs 30", 5))))),
    "speed-grocery": Table("grocery", 0.7, COST | NEAREST, tuple(
        Run(f"{what}, `{flags}`", f"train_simclr.py {GROCERY} {flags}", seeds=seeds)
        for what, flags, seeds in (("AdamW", f"{FORMER} --epochs 100", 1),
                                   ("the defaults", "--epochs 35", 3)))),
    "tried-grocery": tried("grocery", GROCERY),
    "tried-birds": tried("data/birds", BIRDS),
    "rates-grocery": rates("grocery", 3, f"--epochs 80 {GROCERY}"),
    "rates-birds": rates("data/birds", 4, f"--epochs 80 {BIRDS}"),
    "views-grocery": Table("grocery", 1, NEAREST, views(f"--epochs 10 {GROCERY} {FORMER}"),
                           "original"),
    "views-toy": Table("toy", 1, NEAREST, views(f"--epochs 20 {FORMER}"), "original"),
    "views-birds": Table("data/birds", 6, COST | NEAREST, views(
        f"--epochs 20 {BIRDS}", "--size 112 --arch resnet18", 1)),
    "moved-simclr": Table("grocery", 1, NEAREST, (
        Run("random weights", "", seeds=1),
        *variants(f"train_simclr.py --epochs 20 {FORMER}", {
            "MoCo v2's, for ImageNet": "--color 0.5 --gray 0.2 --blur 0.5 --min-crop 0.2",
            "without blur": "--color 0.5 --gray 0.2 --min-crop 0.2",
            "and with colours kept": "--color 0.1 --gray 0 --min-crop 0.2",
            "and with smaller crops": "--color 0.1 --gray 0 --min-crop 0.08"}))),
    "moved-jigsaw": Table("grocery", 1, {
        "val puzzles": "log val_puzzles", "linear, stage 2": "linear", "stage 4": "1 linear"}, (
        Run("random weights", "", ("--layer 2", "--layer 4"), 1),
        *variants("train_jigsaw.py --epochs 12 --eval-every 12", {
            "colours kept": "--color 0 --gray 0",
            "one puzzle an image, not eight": "--color 0 --gray 0 --puzzles 1",
            "each tile less its mean, over its deviation": "--color 0 --gray 0 --tile-norm",
            "tiles jittered apart, one in five images grey": "--color 0.5 --gray 0.2",
            "all three guards": "--color 0.5 --gray 0.3 --tile-norm",
            "no gap": "--color 0 --gray 0 --tile 21"}, ("--layer 2", "--layer 4")))),
}


def runs(name, only=""):
    """(Run, seed, folder, training command or None, {i: evaluating command i}) of each run of a
    table whose folder has `only` in its name."""
    for seed in range(max(run.seeds for run in TABLES[name].runs)):
        for run in (run for run in TABLES[name].runs if seed < run.seeds):
            folder, *found = commands(name, run, seed)
            if only in folder.name:
                yield run, seed, folder, *found


def commands(name, run, seed):
    """The folder of a run, its training command or None, {i: evaluating command i}."""
    slug = "".join(c if c.isalnum() else "_" for c in run.label)
    folder = OUT / name / f"{slug}_{seed}"
    same = ["--data", TABLES[name].data, "--seed", str(seed), "--out"]
    train, source = None, ["--init", "random"]
    if run.train:
        train = [*shlex.split(run.train), *same, str(folder)]
        source = [str(folder / "checkpoint.pt")]
    evaluate = run.evaluate + (run.studies if seed == 0 else ())
    return folder, train, {i: ["linear_eval.py", *source, *shlex.split(flags), *same,
                               str(folder / f"eval{i}")] for i, flags in enumerate(evaluate)}


def line(train, command):
    """What a figure is recorded by: the commands that give it, as a shell runs them."""
    return " && ".join(f"python {shlex.join(each)}" for each in (train, command) if each)


def recorded(name):
    file = RECORDS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def execute(name, only=""):
    """Run what is neither recorded yet nor being run by another process. A training that was
    stopped goes on; of one with other flags the trainer says so."""
    for _, _, folder, train, evaluations in runs(name, only):
        folder.mkdir(parents=True, exist_ok=True)
        lock = atomic.try_lock(folder / "lock")
        if lock is None:
            continue
        with lock:
            todo = [command for command in evaluations.values()
                    if line(train, command) not in recorded(name)]
            finished = folder / "finished"                   # holds the command, once it is
            if todo and train and not (finished.exists()
                                       and finished.read_text() == shlex.join(train)):
                began = os.times()
                try:
                    python(*train, *["--resume"] * (folder / "checkpoint.pt").exists())
                    finished.write_text(shlex.join(train))
                finally:
                    add_core_minutes(folder, began)
            for command in todo:
                python(*command)
                record(name, train, command)


def forget(name, only):
    """Remove the folders of runs and their records."""
    kept = recorded(name)
    for _, _, folder, train, evaluations in runs(name, only):
        shutil.rmtree(folder, ignore_errors=True)
        for command in evaluations.values():
            kept.pop(line(train, command), None)
    save_records(name, kept)


def add_core_minutes(folder, began):
    """Add up, over the resumes of a run, the CPU time of its training since `began`."""
    file, now = folder / "core_minutes", os.times()
    before = float(file.read_text()) if file.exists() else 0.0
    spent = (now.children_user + now.children_system
             - began.children_user - began.children_system) / 60
    with atomic.replacing(file) as draft:
        draft.write_text(str(before + spent))


def record(name, train, command):
    """Keep what a call of linear_eval.py found, of eval.json the part that is shown."""
    result = json.loads((Path(command[-1]) / "eval.json").read_text())
    result["few_labels"] = [{key: value for key, value in cell.items() if key != "report"}
                            for cell in result["few_labels"]]
    recall = {row["class"]: round(row["recall"]) for row in result["report"]["classes"]}
    result = {key: result[key] for key in KEPT if key in result} | {"recall": recall}
    folder = Path(command[-1]).parent
    result["log"] = {key: value for line in fgssl.read_log(folder / "log.jsonl")
                     for key, value in line.items() if isinstance(value, float)}
    if (folder / "core_minutes").exists():
        result["log"]["core_minutes"] = float((folder / "core_minutes").read_text())
    with atomic.lock(OUT / name / "lock", f"waiting for another process to record {name}"):
        save_records(name, recorded(name) | {line(train, command): result})


def save_records(name, records):
    RECORDS.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items()]
    with atomic.replacing(RECORDS / f"{name}.json") as draft:
        draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def python(*command):
    print(f"\n$ python {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def few_labels(name, label):
    """{"1 fine-tuned 5": [cell of eval.json, ...] over seeds and draws} of a row, for its second
    evaluation; {"every fine-tuned 5": those of all}; {"fine-tuned 5": those of the first that has
    some, and is no study}."""
    found, known = {}, recorded(name)
    for run, _, _, train, evaluations in runs(name):
        if run.label != label:
            continue
        of = {}                                              # the evaluation that a kind is of
        for i, command in evaluations.items():
            for cell in known.get(line(train, command), {"few_labels": ()})["few_labels"]:
                kind = f"{cell['method']} {cell['shots']}"
                for which in (f"{i} ", "every "):
                    found.setdefault(which + kind, []).append(cell)
                if i < len(run.evaluate) and of.setdefault(kind, i) == i:
                    found.setdefault(kind, []).append(cell)
    return found


def figures(name, label, columns):
    """{column: [its values over seeds and, for few labels, draws]} of a row."""
    few, known = few_labels(name, label), recorded(name)
    found = {}
    for title, where in columns.items():
        of = "val" if where.startswith("val ") else "test"
        found[title] = [cell[of] for cell in few.get(where.removeprefix("val "), [])]
    for run, _, _, train, evaluations in runs(name):
        for i, command in evaluations.items() if run.label == label else ():
            result = known.get(line(train, command))
            for title, where in columns.items() if result else ():
                kind, _, what = where.rpartition(" ")
                if kind == "log" and i == 0:
                    found[title].append(result["log"].get(what))
                elif kind == "every" or kind.isdigit() and i == int(kind) or kind == "" and i == 0:
                    found[title].append(result.get("encoder", result["random_init"])[what])
    return found


def render(name, columns):
    """A table as Markdown; a figure of several runs is their mean ± standard deviation. A row or a
    column of which nothing is recorded is left out.

    Of the table's own columns, bold is what differs from the row `against` by more than two
    standard errors of the difference, for which all cells of a column are taken to vary alike.
    """
    table = TABLES[name]
    rows = {run.label: figures(name, run.label, columns) for run in table.runs}
    rows = {label: row for label, row in rows.items() if any(row.values())}
    titles = [title for title in columns if any(row[title] for row in rows.values())]
    lines = [[f"{Path(table.data).name}, {table.of}, %", *titles]]
    for label, row in rows.items():
        lines.append([label, *(results.mean_std(row[title]) for title in titles)])
    for i, title in enumerate(titles if columns is table.columns else (), 1):
        other = rows.get(table.against, {}).get(title)
        variances = [variance(row[title]) for row in rows.values() if len(row[title]) > 1]
        if not other or not variances:                       # not recorded yet
            continue
        for line, row in zip(lines[1:], rows.values()):
            if values := row[title]:
                error = math.sqrt(mean(variances) * (1 / len(values) + 1 / len(other)))
                if abs(mean(values) - mean(other)) > 2 * error:
                    line[i] = f"**{line[i]}**"
    return results.markdown_table(lines)


def draw(name):
    """Draw the few-label results of a table, if there are any: assets/few_labels-NAME.png. Folds
    have one number of labels, no curve."""
    if TABLES[name].of != "test":
        return
    rows = {run.label.replace("`", ""): [
        {"few_labels": [cell for kind, cells in few_labels(name, run.label).items()
                        if kind.startswith("f") for cell in cells]}]
            for run in TABLES[name].runs}
    if any(result["few_labels"] for (result,) in rows.values()):
        majority = next(iter(recorded(name).values()))["majority"]
        picture = results.few_label_curves(rows, majority)
        pictures.save(picture, RECORDS.parent / f"few_labels-{name}.png")


def write(name, table):
    """Put a table into the page that has its markers. Returns the page."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    for page in PAGES:
        before, found, rest = page.read_text().partition(start)
        _, closed, after = rest.partition(end)
        if found and closed:
            with atomic.replacing(page) as draft:
                draft.write_text(before + start + table + "\n" + end + after)
            return page
    raise ValueError(f"no {start.strip()} ... {end} to write between in "
                     + ", ".join(page.name for page in PAGES))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", nargs="?", choices=TABLES, help="which; without one, they are listed")
    p.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    p.add_argument("--again", action="store_true", help="run all of it, whatever is recorded")
    p.add_argument("--only", metavar="NAME", default="",
                   help="only runs with this in the name of their folder, which --dry-run shows")
    p.add_argument("--write", action="store_true",
                   help="run none: write what is recorded, and leave the other cells empty")
    args = p.parse_args(argv)
    if not args.table:
        for name, table in TABLES.items():
            print(f"{name:<16}{table.hours:g} h on 2 CPU cores")
        return
    chosen = [*runs(args.table, args.only)]
    if not chosen:
        p.error(f"--only {args.only}: no folder has this in its name; see --dry-run")
    if args.dry_run:
        for *_, train, evaluations in chosen:
            for command in ([train] if train else []) + [*evaluations.values()]:
                print(f"python {shlex.join(command)}")
        return
    if args.again:
        forget(args.table, args.only)
    if not args.write:
        execute(args.table, args.only)
    missing = [command for *_, train, evaluations in chosen for command in evaluations.values()
               if line(train, command) not in recorded(args.table)]
    if missing and not args.write:
        print(f"\nThe last {len(missing)} are run by other processes; the last writes the table.")
        return
    table = TABLES[args.table]
    for name, columns in ({args.table: table.columns} | table.also).items():
        text = render(args.table, columns)
        print(f"\n{text}\n\nwritten into {write(name, text)}")
    draw(args.table)


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, KeyboardInterrupt):  # the script has said why
        sys.exit("stopped; the same command goes on from here")
