"""How good are the features? Evaluate an encoder that learned without labels.

The encoder is frozen. Its features h of the labelled images train a logistic regression ("linear")
and vote as nearest neighbours ("k-NN"); without training, each test image ranks the others by
similarity ("rank-1", "mAP"). Every choice is made on val; test is read once, at the end. The table
also has what a result must be compared with: chance, the majority class, the untrained encoder.

    python linear_eval.py out/simclr/checkpoint.pt
    python linear_eval.py out/jigsaw/checkpoint.pt --layer best                   # earlier stages
    python linear_eval.py out/srgan/checkpoint.pt --layer best --encoder generator
    python linear_eval.py out/simclr/checkpoint.pt --shots 1 5 10 all             # few labels
    python linear_eval.py out/simclr/checkpoint.pt --shots 1 5 10 all --finetune  # and fine-tuned
    python linear_eval.py --init random --data toy --finetune              # supervised from scratch
    python linear_eval.py --compare out/simclr/eval.json out/random/eval.json
    python linear_eval.py out/simclr/probe.pt --predict bird.jpg
    python linear_eval.py out/simclr/checkpoint.pt --export encoder.pt     # a state dict
    python linear_eval.py resnet50.pth --arch resnet50 --size 224 --data cub --out out/resnet50

What is not given (data, size, seed) is as in the run that made the checkpoint; without a run, the
toy set at 64 pixels. Prints one table; writes eval.json, probe.pt and pictures beside the
checkpoint, or into --out.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import torch

import fgssl
from evaluation import page
from evaluation.classifier import Classifier, Memory, load_init, refit, save_classifier
from evaluation.explain import grad_cam_study
from evaluation.explore import explore
from evaluation.few_labels import finished_cells, run_cells
from evaluation.predict import predict
from evaluation.probe import (
    SPLITS, Inference, evaluate, hold_out, labelled_splits, layer_names)
from evaluation.report import feature_map, write_confusion
from evaluation.results import (
    Extras, compare_results, count_seen, digest_data, digest_weights, earlier_result,
    print_grad_cam, print_result, show_few_labels, write_result)
from evaluation.retrieval import retrieval_sheet
from imagesets.files import is_image
from methods import srgan  # and its encoder "srgan-vgg"
from runfiles import save_tensors

# Arguments ----------------------------------------------------------------------------------------


def layer(text):
    if not re.fullmatch(r"best|[1-9]\d*(:2x2)?", text):
        raise argparse.ArgumentTypeError(f"{text} is no layer, such as 3, 3:2x2 or best")
    return text


def shots(text):
    return text if text == "all" else fgssl.number(int, 1)(text)


def fold(text):
    i, _, count = text.partition("/")
    if not (i.isdecimal() and count.isdecimal() and 1 <= int(i) <= int(count) > 1):
        raise argparse.ArgumentTypeError(f"{text} is no part, such as 1/4, the first of four")
    return text


def arguments(argv):
    p = fgssl.parser(__doc__, training=False)
    p.usage = "%(prog)s [checkpoint] [options]"
    p.add_argument("checkpoint", nargs="?", type=fgssl.path,
                   help="of a trainer, or a state dict, such as torchvision's, with its --arch")
    what = p.add_argument_group("what is evaluated")
    what.add_argument("--init", metavar="random|FILE", type=fgssl.path,
                      help="random, in place of a checkpoint: an untrained encoder alone; FILE: a "
                           "row for the weights that training began with, such as torchvision's")
    what.add_argument("--encoder", choices=("discriminator", "generator"), default="discriminator",
                      help="which network of a run of train_srgan.py")
    what.add_argument("--allow-seen", action="store_true",
                      help="evaluate even though pretraining saw some of the test images")
    what.add_argument("--fold", metavar="I/K", type=fold,
                      help="to choose a recipe: part I of K of train and val takes the place of "
                           "test, which is not read")
    what.add_argument("--layer", type=layer,
                      help="stage whose map is read, 1, 2, ..., averaged whole or, 3:2x2, by "
                           "quarters; best: the layer that does best on val, for each encoder and "
                           "classifier (default: the last stage)")
    other = p.add_argument_group("in place of an evaluation")
    other.add_argument("--compare", nargs="+", metavar="[NAME=]FILE",
                       help="print and draw the results in these eval.json side by side; files of "
                            "one NAME are seeds of one run")
    other.add_argument("--predict", nargs="+", metavar="IMAGE", type=fgssl.path,
                       help="name the classes of these files, folders or patterns, or - for a "
                             "list on standard input; the checkpoint is a probe.pt or a "
                             "finetuned.pt")
    other.add_argument("--csv", metavar="FILE", type=fgssl.path,
                       help="with --predict: write a table, and a picture of the least certain "
                            "images")
    other.add_argument("--explore", metavar="FOLDER", type=fgssl.path,
                       help="what is in these photographs, labelled or not: which look alike, are "
                            "there twice, unlike all others, in a group; which labels are wrong, "
                            "which image to label next")
    other.add_argument("--export", metavar="FILE", type=fgssl.path,
                       help="write the encoder's state dict alone; a ResNet's has torchvision's "
                            "names")
    few = p.add_argument_group("few labels")
    few.add_argument("--shots", nargs="+", type=shots, metavar="K",
                     help="learn from K images a class; all: from every one")
    few.add_argument("--draws", type=fgssl.number(int, 1), default=5,
                     help="how often the K images are drawn; mean and std are printed")
    tune = p.add_argument_group("fine-tuning")
    tune.add_argument("--finetune", action="store_true",
                      help="train the encoder too: for every K of --shots, or on all labels")
    tune.add_argument("--steps", type=fgssl.number(int, 1), default=2400,
                      help="length of training, the same for few labels and for many")
    tune.add_argument("--lr", type=fgssl.number(float, above=0),
                      help="peak learning rate (default: 0.02 with 2,000 labelled images or more, "
                           "in proportion fewer; 0.04 with --init random)")
    tune.add_argument("--batch", type=fgssl.number(int, 2), default=32, help="images a step")
    tune.add_argument("--head", choices=("zero", "probe"), default="zero",
                      help="where the head starts: from zeros, or as the frozen probe (Kumar et "
                           "al. 2022), which fits at once and teaches the encoder little")
    tune.add_argument("--stages", type=fgssl.number(int, 0),
                      help="how many stages learn, counted back from the one that is read; 0: the "
                           "head alone (default: all)")
    tune.add_argument("--layer-decay", type=fgssl.number(float, above=0, high=1), default=1.0,
                      help="each stage's rate is this times that of the next; the stem has the "
                           "first stage's")
    tune.add_argument("--batch-norm", choices=("batch", "kept"), default="batch",
                      help="normalise by the batch, or by the statistics of pretraining")
    tune.add_argument("--min-crop", type=fgssl.number(float, 0.01, 1), default=0.25,
                      help="smallest fraction of the image's area that a training view shows")
    tune.add_argument("--class-weights", action="store_true",
                      help="weigh each class by the inverse of its frequency")
    args = p.parse_args(argv)
    if args.compare is None and (args.checkpoint is None) != (args.init == "random"):
        p.error("name a checkpoint, e.g. out/simclr/checkpoint.pt, or pass --init random")
    if (args.predict or args.explore or args.export
            or args.encoder == "generator") and not args.checkpoint:
        p.error("--predict, --explore, --export and --encoder generator take a checkpoint")
    if args.csv and not args.predict or args.explore and args.layer == "best":
        p.error("--csv goes with --predict, and --layer best not with --explore")
    if args.csv and is_image(args.csv):
        p.error(f"--csv {args.csv} would be an image: name a table, such as classes.csv")
    if args.export and Path(args.export).resolve() == Path(args.checkpoint).resolve():
        p.error("--export would overwrite the checkpoint: name another FILE")
    args.shots = [*dict.fromkeys(args.shots or (["all"] if args.finetune else []))]
    return args


def fill_in(args, run):
    """What is not given is as in the run of the checkpoint, or a default."""
    wrong = [*fgssl.invalid_arguments(fgssl.parser("", training=False), run | {"arch": None})]
    if wrong:
        raise fgssl.UserError(f"{args.checkpoint} was changed or damaged: {', '.join(wrong)}")
    defaults = dict(data="toy", root=None, size=64, arch="resnet10", seed=0, fit=None)
    if args.data is None:                                    # another set has other labels, boxes
        defaults |= dict.fromkeys(fgssl.DATA_FLAGS)
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, run.get(name, default))


def out_folder(args, run):
    """The folder to write into: --out, or that of the checkpoint; below it for --fold and for
    another network than the run's encoder, the generator or that of a probe.pt. UserError where it
    would replace the file that is evaluated."""
    out = Path(args.out or (Path(args.checkpoint).parent if args.checkpoint else "out/random"))
    if not args.out and args.encoder == "generator":
        out /= "generator"
    elif not args.out and "class_names" in run:
        out /= Path(args.checkpoint).stem
    if not args.out and args.fold:
        out /= f"fold{args.fold}".replace("/", "of")
    for name in ("probe.pt", "finetuned.pt"):
        if args.checkpoint and (out / name).resolve() == Path(args.checkpoint).resolve():
            raise fgssl.UserError(f"the evaluation would replace {args.checkpoint}: pass another "
                                  "--out")
    return out


def resolve_layers(args, encoder):
    """The layers to read; fills in --layer and --stages, which depend on the encoder's stages."""
    count = len(fgssl.stage_widths(encoder, args.size))
    args.layer = args.layer or str(count)
    args.stages = count if args.stages is None else args.stages
    if args.stages > count:
        raise fgssl.UserError(f"--stages {args.stages}: {args.arch} has {count} stages")
    return layer_names(count, args.layer)


# The study ----------------------------------------------------------------------------------------


def study(args, encoders, out, init_name):
    """Evaluate the encoders, {"random_init": the untrained one} and perhaps {"init": `init_name`,
    "encoder": the trained one}; print the table; write eval.json and, for the last of them, its
    classifier and pictures."""
    layers = resolve_layers(args, encoders["random_init"])
    inference = Inference(args.size, *fgssl.device_and_precision(args.precision))
    data = fgssl.load_data_for(args)
    splits, names = labelled_splits(data, args.size), data.classes
    if args.fold:
        splits = hold_out(splits, args.fold)
    counts, test = np.bincount(splits[0].labels, minlength=len(names)), splits[2]
    result = {"data": data.name, "digest": digest_data(data, splits), "classes": len(names),
              "size": args.size, "arch": args.arch, "layer": args.layer, "seed": args.seed,
              "fold": args.fold, "checkpoint": args.checkpoint,
              "weights": digest_weights([*encoders.values()][-1]),
              "n": {name: len(split.labels) for name, split in zip(SPLITS, splits)},
              "chance": 100 / len(names),
              "majority": 100 * float((test.labels == counts.argmax()).mean()),
              "precision": "bf16" if inference.autocast._enabled else "fp32",
              "argv": sys.argv, "commit": fgssl.commit()} | (
                  {"init_name": init_name} if init_name else {})
    seen = result["test_seen"] = count_seen(args, data.records, test.rows)
    file, extras = out / "eval.json", Extras()
    before = earlier_result(file, result)
    result = before | result | {"few_labels": finished_cells(before, args)}
    if seen is not None:
        print(f"pretraining saw {seen} of the {len(test.labels)} test images")
    print(f"{args.arch}, {args.size} px, {fgssl.describe_device(inference.device)}, "
          f"{result['precision']}; folder {out}\n", flush=True)

    for row, encoder in encoders.items():
        result[row], frozen = evaluate(encoder, splits, names, inference, layers)
        with contextlib.suppress(OSError):                   # it is tried again below
            write_result(file, result)
    result["report"] = frozen.report
    try:
        write_result(file, result)
    finally:                                                 # a full disk does not hide them
        print_result(result)

    h, knn_layer = frozen.h, result[row]["knn_layer"]
    files = [str(data.records.paths[row]) for split in splits for row in split.rows]
    if args.encoder != "generator":                          # which no --arch can build
        with extras.write("probe.pt"):
            probe = Classifier(encoder, refit(frozen, result[row]["l2"]), frozen.layer)
            memory = Memory(h[frozen.layer], frozen.head(h[frozen.layer][2]),
                            torch.from_numpy(test.labels))
            save_classifier(out / "probe.pt", probe, args, names, memory, files=files,
                            accuracy=result[row]["linear"], refitted=True)
            print("probe.pt, for --predict, learned from val and test, too, after these figures")
    with extras.write("confusion.png"):
        write_confusion(out, "confusion", frozen.confusion, names)
    with extras.write("retrieval.png"):
        retrieval_sheet(out / "retrieval.png", h[knn_layer][2], test, names)
    with extras.write("map.png"):
        feature_map(out / "map.png", h[frozen.layer][2], test.labels, names)
    with extras.write("gradcam.png"):
        result["grad_cam"] = grad_cam_study(out / "gradcam.png", frozen, data.records,
                                            extras=extras)
        print_grad_cam(result["grad_cam"])
    write_result(file, result)
    with extras.write("report.html"):
        page.report(out, result, frozen)

    done = [*result["few_labels"]]
    for cell in run_cells(frozen, args, out, done, extras, files) if args.shots else ():
        result["few_labels"].append(cell)
        write_result(file, result)
    if result["few_labels"]:
        with extras.write("compare.png"):
            show_few_labels({out.resolve().name: [result]}, out)
        with extras.write("report.html"):                    # with the new curves
            page.report(out, result, frozen)
    print(f"\nwrote eval.json, {'' if args.encoder == 'generator' else 'probe.pt, '}report.html "
          f"and pictures into {out}")
    extras.finish()


def main(argv=None):
    args = arguments(argv)
    if args.compare:
        return compare_results(args.compare, Path(args.out or "out"))
    if args.predict:
        return predict(args.checkpoint, args.predict, args)
    encoder, build, run, init_name = None, None, {}, ""
    if args.encoder == "generator":
        if args.finetune or args.export:
            raise fgssl.UserError("SRGAN's generator is evaluated as it is, without --finetune or "
                                  "--export: leave out --encoder generator for those")
        encoder, build, run = srgan.load_generator(args.checkpoint)
    elif args.checkpoint:
        encoder, run = fgssl.load_encoder(args.checkpoint, args.arch)
    if args.export:
        save_tensors(args.export, encoder.state_dict())
        return print(f"wrote {args.export}")
    args.data = args.explore or args.data
    fill_in(args, run)
    if args.explore:
        args.skip_bad = True
        beside = Path(args.checkpoint).parent / f"explore_{Path(args.explore).resolve().name}"
        return explore(encoder, args, Path(args.out or beside))
    torch.manual_seed(args.seed)                             # of the untrained weights
    encoders = {"random_init": (build or fgssl.ENCODERS[args.arch])()}
    if args.checkpoint:
        init_name, init = load_init(args.init or run.get("init"), args.arch)
        encoders |= init | {"encoder": encoder}
    out = out_folder(args, run)
    with fgssl.lock_folder(out, "evaluating"):
        study(args, encoders, out, init_name)


if __name__ == "__main__":
    fgssl.launch(main)
