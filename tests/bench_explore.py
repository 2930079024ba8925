"""How much of what is wrong with a folder does --explore find? Faults are planted, and looked for.

    python tests/bench_explore.py --checkpoint out/grocery/checkpoint.pt --data grocery

Links the images of a labelled set into a folder, where 5 % lie in the folder of a wrong class,
drawn at random, and 50 are there twice: the copies are resized to 50 to 90 % or only saved again,
as JPEGs of quality 50 to 90. Then prints how many of the first 5 % of doubtful_labels.csv are
wrong, and what is in duplicates.csv.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fgssl  # noqa: E402
import linear_eval  # noqa: E402


def plant(records, top, rng, fraction=0.05, copies=50):
    """Write the folder, files named by their row of the records. Returns the rows with a wrong
    label, as six digits, and the pairs of copies, sets of two names."""
    rows = np.flatnonzero(records.labels >= 0)
    labels, classes = records.labels.copy(), len(records.classes)
    wrong = rng.choice(rows, round(fraction * len(rows)), replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    twice, pairs = {*rng.choice(rows, copies, replace=False).tolist()}, set()
    for row in rows:
        path, folder = records.paths[row], top / f"class{labels[row]:04}"
        folder.mkdir(exist_ok=True)
        name = f"{row:06}{path.suffix}"
        os.symlink(os.path.abspath(path), folder / name)
        if row in twice:
            with Image.open(path) as image:
                image = image.convert("RGB")
            if len(pairs) % 2:
                scale = rng.uniform(0.5, 0.9)
                image = image.resize([max(1, round(scale * side)) for side in image.size],
                                     Image.LANCZOS)
            image.save(folder / f"{row:06}_copy.jpg", quality=int(rng.integers(50, 91)))
            pairs.add(frozenset([name, f"{row:06}_copy.jpg"]))
    return {f"{row:06}" for row in wrong}, pairs


def read(file):
    with open(file, encoding="utf-8-sig", newline="") as rows:
        return [{key: Path(value).name if key in ("file", "duplicate") else value
                 for key, value in row.items()} for row in csv.DictReader(rows)]


def main(argv=None):
    p = fgssl.parser(__doc__, training=False)
    p.add_argument("--checkpoint", type=fgssl.path, default="out/simclr/checkpoint.pt")
    args = p.parse_args(argv)
    run = fgssl.load_encoder(args.checkpoint)[1]
    records = fgssl.load_data(args.data or run["data"], args.root).records
    with tempfile.TemporaryDirectory() as top:
        folder, out = Path(top, "planted"), Path(top, "out")
        folder.mkdir()
        wrong, pairs = plant(records, folder, np.random.default_rng(args.seed or 0))
        linear_eval.main([args.checkpoint, "--explore", str(folder), "--out", str(out)])
        doubtful, found = read(out / "doubtful_labels.csv"), read(out / "duplicates.csv")
    first = doubtful[:round(0.05 * len(doubtful))]
    right = sum(row["file"][:6] in wrong for row in first)       # a copy is where its image is
    told = {frozenset([row["file"], row["duplicate"]]) for row in found}
    print(f"{len(doubtful)} images, {len(wrong)} labels changed; of the first {len(first)} "
          f"doubtful labels {right} were changed, {100 * right / len(first):.1f} %")
    print(f"{len(pairs)} copies; {len(pairs & told)} found, {len(told - pairs)} other pairs told")


if __name__ == "__main__":
    fgssl.launch(main)
