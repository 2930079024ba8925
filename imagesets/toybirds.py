"""The toy birds: a fine-grained set drawn with Pillow in about a minute.

20 species have the same body, colours and poses, and differ only in a few parts, which is what
makes CUB-200-2011 (Wah et al. 2011) hard. The files have CUB's layout, so one reader serves both.
"""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ------------------------------------------------------------------------------------------------
# The set
# ------------------------------------------------------------------------------------------------

COMMON = dict(bill="cone", crest="none", eye="plain", wing="plain", breast="plain", tail="square")
SPECIES = {  # the common bird with two parts changed: two species differ in two, three or four
    "Hook-billed_Barwing": dict(bill="hook", wing="bars"),
    "Hook-billed_Forktail": dict(bill="hook", tail="fork"),
    "Masked_Hookbill": dict(bill="hook", eye="mask"),
    "Streaked_Spearbill": dict(bill="spear", breast="streaks"),
    "Crested_Spearbill": dict(bill="spear", crest="peak"),
    "Spear-billed_Fantail": dict(bill="spear", tail="fan"),
    "Plumed_Sicklebill": dict(bill="sickle", crest="plume"),
    "Sickle-billed_Flagwing": dict(bill="sickle", wing="patch"),
    "Spectacled_Sicklebill": dict(bill="sickle", eye="ring"),
    "Crested_Barwing": dict(crest="peak", wing="bars"),
    "Crested_Ringneck": dict(crest="peak", breast="band"),
    "Tufted_Ribbontail": dict(crest="tuft", tail="ribbon"),
    "Tufted_Spectaclebird": dict(crest="tuft", eye="ring"),
    "Plumed_Fantail": dict(crest="plume", tail="fan"),
    "White-browed_Forktail": dict(eye="brow", tail="fork"),
    "White-browed_Streakling": dict(eye="brow", breast="streaks"),
    "Masked_Flagwing": dict(eye="mask", wing="patch"),
    "Banded_Ribbontail": dict(breast="band", tail="ribbon"),
    "Spectacled_Bibling": dict(eye="ring", breast="bib"),
    "Bibbed_Flagwing": dict(wing="patch", breast="bib"),
}
PARTS = ["back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg",
         "left wing", "nape", "right eye", "right leg", "right wing", "tail", "throat"]  # as in CUB


def draw(folder, seed=0, per_class=(60, 20, 20)):
    """Draw the toy birds in CUB's layout: `per_class` (train, val, test) images of each species.

    An existing set is kept. The set is drawn beside `folder` and renamed when complete: an
    interruption leaves nothing, and if two processes draw, the first to finish wins. Equal seeds
    give equal files. OSError names a folder that cannot be written.
    """
    import atomic  # here, because both imports fail in `python toybirds.py`

    folder = Path(folder)
    if (folder / "images.txt").is_file():
        return
    try:
        with atomic.drafting(folder, is_folder=True) as draft:
            rows = draw_images(draft / "images", seed, sum(per_class))
            write_labels(draft, image_names(sum(per_class)), rows, per_class)
            atomic.publish(draft, folder)
    except OSError as error:
        if (folder / "images.txt").is_file():
            return  # another process was faster
        raise OSError(f"cannot draw the toy birds in {folder}: {error}. Free some space there, or "
                      "choose another --root.") from error


def draw_images(folder, seed, count):
    """Draw `count` images of each species; returns the rows that draw_shard prints, split.

    Each core runs a process of its own, `python toybirds.py`, because that needs neither fork nor a
    main guard in the caller.
    """
    from .progress import progress

    cores, paths, rows, workers = min(os.cpu_count() or 1, 16), image_names(count), [], []
    try:
        for path in paths[::count]:
            (folder / path).parent.mkdir(parents=True)
        for core in range(cores):
            arguments = map(str, (folder, seed, count, core, cores))
            workers.append(subprocess.Popen([sys.executable, __file__, *arguments], text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for i in progress(range(len(paths)), len(paths), "drawing toy birds"):
            rows.append(workers[i % cores].stdout.readline().split())
            if not rows[-1]:
                raise OSError(workers[i % cores].stderr.read().strip().split("\n")[-1])
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return rows


def draw_shard(folder, seed, count, core, cores):
    """Draw images core, core + cores, ...; print a row for each: its box, then x, y, visible of
    each part."""
    for i, path in list(enumerate(image_names(count)))[core::cores]:
        rng = np.random.default_rng([seed, *divmod(i, count)])
        picture, box, parts = photograph(list(SPECIES)[i // count], rng)
        jpeg = io.BytesIO()
        picture.save(jpeg, "jpeg", quality=92)
        Path(folder, path).write_bytes(jpeg.getvalue())  # on a full disk, save(path) may not raise
        numbers = list(box)
        for part in PARTS:
            numbers += (*parts[part], 1) if part in parts else (0, 0, 0)
        print(*(f"{number:.4g}" for number in numbers), flush=True)


def image_names(count):
    """Paths below images/ of `count` images per species, as in CUB."""
    return [f"{label:03}.{species}/{species}_{number:04}.jpg"
            for label, species in enumerate(SPECIES, 1) for number in range(1, count + 1)]


def write_labels(folder, paths, rows, per_class):
    """Write CUB's text files and val.txt; rows: those that draw_shard printed for the images."""
    train, val, test = per_class
    label, number = np.divmod(np.arange(len(paths)), train + val + test)
    columns = {  # of lines `<id> <value>`, ids from 1
        "classes": [f"{label:03}.{species}" for label, species in enumerate(SPECIES, 1)],
        "images": paths,
        "image_class_labels": label + 1,
        "train_test_split": (number < train + val).astype(int),
        "val": ((train <= number) & (number < train + val)).astype(int),
        "bounding_boxes": [" ".join(row[:4]) for row in rows],
        "parts/parts": PARTS}
    (folder / "parts").mkdir()
    for name, values in columns.items():
        lines = [f"{i} {value}\n" for i, value in enumerate(values, 1)]
        (folder / f"{name}.txt").write_text("".join(lines))
    lines = [f"{i} {part} {' '.join(row[3 * part + 1:3 * part + 4])}\n"
             for i, row in enumerate(rows, 1) for part in range(1, len(PARTS) + 1)]
    (folder / "parts" / "part_locs.txt").write_text("".join(lines))


# ------------------------------------------------------------------------------------------------
# The drawing
#
# A shape is (points, fill): a polygon (n, 2) and its colour, or one point and the name of the part
# at that point. A bird faces +x, y points down, and its body is 1.3 long.
# ------------------------------------------------------------------------------------------------

SIDE, SUPERSAMPLING = 96, 3  # pixels of an image; drawn 3 times as large, then averaged down
UPPER = ["5f7896", "768245", "a05f3c", "8a7050", "3f8285", "7f6488", "5f7068"]
LOWER = ["f1e7cd", "ecd2a6", "f0bd8d", "efe09a", "e3e6e2", "eacabd"]
BILL = ["45424a", "dda43c", "a08f7c", "cf6f40"]
BARK = ["7b6250", "938372", "66574c"]
# Colours of a scene: sky at the top and at the horizon, two of foliage, leaves.
SCENES = [["a9cfe6", "dfe9e2", "9dbb7c", "c4d3a0", "6f9a4a"],  # spring
          ["8fbad6", "b9d0a6", "6d9a5c", "8fb36c", "4f8040"],  # summer
          ["cfd9dc", "e3cfa4", "c98f52", "dcb268", "c56a32"],  # autumn
          ["c6d3de", "e6e9ea", "a7b6bd", "d3dbdd", "8f9c80"],  # winter
          ["e6b98f", "edd7b6", "9a8f76", "caa981", "7a8250"],  # evening
          ["5d7d5c", "7f9a66", "45664c", "a3b56f", "5f8a48"]]  # deep forest
OUTLINES = {  # corners x y of each part, in hundredths; `outline` rounds them
    "body": "54 -40  66 0  48 36  8 47  -34 33  -76 14  -74 0  -28 -26  2 -46  14 -74  36 -70",
    "belly": "56 -52  66 0  48 36  8 46  -34 32  -66 15  -30 10  10 6  26 -20  38 -50",
    "wing": "38 -20  34 8  10 24  -35 25  -90 20  -55 2  -20 -26  14 -36",
    "long coverts": "38 -20  33 8  6 20  -22 15  -30 -2  -24 -24  14 -36",
    "short coverts": "38 -20  33 8  16 20  -2 15  -10 -2  -4 -24  14 -36",
    "patch": "-5 -20  0 16  -30 20  -62 16  -40 -6",
    "square": "10 -9  -44 -12  -56 -14  -56 12  -44 12  10 10",
    "ribbon": "10 -8  -70 -10  -110 -13  -114 10  -70 8  10 8",
    "prong": "10 -6  -45 -12  -86 -34  -50 0  10 6",
    "feather": "10 -4  -45 -13  -66 -12  -66 12  -45 13  10 4",
    "band": "10 -16  40 -4  58 -16  66 -14  66 8  60 16  40 24  10 14",
    "cheek": "27 5  2 2  -20 10  -12 27  10 36  30 20",
    "bib": "28 6  4 10  -6 30  4 62  26 56  33 20",
    "peak": "24 -14  10 -28  -16 -42  -46 -66  -32 -20  -28 4  0 0",
    "tuft": "6 0  10 -38  0 -66  -10 -38  -6 0",
    "cone": "16 -12  30 -9  54 5  50 8  30 16  16 16",
    "spear": "16 -9  30 -6  95 4  93 6  30 12  16 13",
    "hook": "14 -20  38 -18  58 -4  55 34  47 30  42 14  16 16",
    "sickle": "16 -10  40 -12  74 4  86 50  82 50  62 18  40 8  16 13",
    "leaf": "0 0  30 -28  70 -20  100 0  70 20  30 28",
    "leaf half": "0 0  50 2  100 0  70 20  30 28",
}


def photograph(species, rng):
    """Draw one bird: image, box (x, y, width, height) and {visible part: (x, y)}, in pixels.

    Colours, pose, scene and light use the same random draws for every species, so they carry no
    information about it.
    """
    def colour(texts):
        return rgb(texts[rng.integers(len(texts))]) * rng.uniform(0.88, 1.1)

    scene = [rgb(text) * rng.uniform(0.94, 1.06, 3) for text in SCENES[rng.integers(len(SCENES))]]
    look = COMMON | SPECIES[species]
    look |= dict(upper=colour(UPPER), lower=colour(LOWER), beak=colour(BILL))
    tilt, nod, wag, roll = rng.uniform((-0.55, -0.3, -0.25, -0.12), (0.15, 0.3, 0.25, 0.12))
    scale, flip = rng.uniform(0.38, 0.54), rng.choice([-1, 1])
    tree = transform(branch(rng, bark=colour(BARK), green=scene.pop()), roll)
    shapes = transform(bird(look, tilt, nod, wag), roll)

    extent = np.concatenate([points for points, _ in shapes]) * (flip, 1)
    low, high = extent.min(0), extent.max(0)
    scale = min(scale, 0.95 / (high - low).max())
    margin = 0.97 - (high - low) * scale
    shift = 0.5 + rng.uniform(-0.5, 0.5, 2) * margin - (low + high) / 2 * scale
    picture, parts = backdrop(rng, scene), {}
    draw = ImageDraw.Draw(picture)
    near, far = ("right", "left")[::flip]
    for points, fill in tree + shapes:
        points = (points * (scale * flip, scale) + shift) * SIDE
        if isinstance(fill, str):
            parts[fill.replace("near", near).replace("far", far)] = points[0]
        else:
            draw.polygon((points * SUPERSAMPLING).ravel().tolist(), pixel(fill))
    box = (*(low * scale + shift) * SIDE, *(high - low) * scale * SIDE)
    return daylight(rng, picture.reduce(SUPERSAMPLING)), box, parts


def daylight(rng, picture):
    """Add light from one side, exposure, a colour cast and sensor noise."""
    down, across = np.ogrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j]
    light = 1 + rng.uniform(-0.15, 0.15) * across + rng.uniform(-0.2, 0.1) * down
    cast = rng.uniform(0.82, 1.08) * rng.uniform(0.92, 1.08, 3)
    pixels = np.asarray(picture) * light[..., None] * cast + rng.normal(0, 2.5, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def backdrop(rng, scene):
    """Draw sky, clouds and foliage out of focus: small, blurred, then enlarged."""
    def blob(x, y, wide, high, colour):
        draw.ellipse((x - wide, y - high, x + wide, y + high), pixel(colour))

    above, below, *foliage = scene
    half, horizon, slope = SIDE // 2, rng.uniform(0, SIDE // 2), rng.uniform(-0.5, 0.5)
    picture = Image.new("RGB", (half, half))
    draw = ImageDraw.Draw(picture)
    for y in range(half):
        draw.line((0, y, half, y), pixel(mix(above, below, y / half)))
    for x, y, size in rng.uniform((0, 0, 2), (half, half / 2, 8), (rng.integers(5), 3)):
        blob(x, y, 2 * size, size, mix(above, WHITE, 0.5))
    for x, y, size, hue, haze in rng.uniform(0, (half, half / 2, 6, 1, 0.5), (40, 5)):
        y += horizon + slope * (x - half / 2)
        blob(x, y, size + 2, size + 2, mix(mix(*foliage, hue), below, haze))
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2)))
    return blurred.resize((SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), Image.BILINEAR)


def branch(rng, bark, green):
    """The perch, its top at y = 0.64 under the feet, with leafy twigs clear of the legs."""
    slope, bend, thick, taper = rng.uniform((-0.2, -0.3, 0.15, 0.4), (0.2, 0.3, 0.26, 0.9))
    middle = 0.64 + thick * (1 + taper) / 4
    shapes = []
    for _ in range(rng.integers(2, 6)):
        x, sideways, up = rng.uniform((0.55, -0.4, 0.3), (1.8, 0.4, 0.9)) * rng.choice([-1, 1], 3)
        start, end = np.array([[x, middle + slope * x], [x + sideways, middle + slope * x + up]])
        shapes += [(stroke(start, mix(start, end, 0.5) + (0.06, 0), end, 0.055, 0.4), bark * 0.8)]
        leaves = rng.integers(2, 5)
        for angle, size, shade in rng.uniform((0, 0.22, 0.8), (6.28, 0.42, 1.2), (leaves, 3)):
            shapes += transform([(outline("leaf") * size, green * shade),
                             (outline("leaf half") * size, green * shade * 0.82)], angle, to=end)
    for drop, width, shade in ((0.02, 1.0, 0.62), (-0.006, 0.8, 1.0), (-0.04, 0.3, 1.18)):
        left, right = [(x, middle + slope * x + bend + drop) for x in (-2.8, 2.8)]
        shapes += [(stroke(left, (0, middle + drop), right, thick * width, taper), bark * shade)]
    for x, y in rng.uniform((-1.6, -0.03), (1.6, 0.05), (6, 2)):
        y += middle + slope * x + bend * (x / 2.8) ** 2
        crack = stroke((x, y), (x + 0.1, y), (x + 0.2, y + 0.2 * slope), 0.02, 0.3)
        shapes += [(crack, bark * 0.66)]
    return shapes


def bird(look, tilt, nod, wag):
    """The shapes of one bird from back to front, in the variants and colours of `look`.

    tilt, nod, wag: angles of body, head and tail in radians; the feet stay where they are.
    """
    trunk = transform(tail(look), wag, to=(-0.6, 0.08)) + body(look) + breast(look) + wing(look)
    neck, *hips = rotate(corners("38 -60  0 32  16 30"), tilt)
    return legs(hips) + transform(trunk, tilt) + transform(head(look), nod, to=neck)


def legs(hips):
    """Two legs from the hips to the perch, three toes each."""
    shapes, colour = [], rgb("4a3c38")
    for (x, y), foot, side in zip(hips, (-0.02, 0.18), ("far", "near")):
        knee, ankle = ((x + foot) / 2 - 0.04, 0.5), (foot, 0.62)
        shapes += [(stroke((x, y), knee, ankle, 0.05), colour), mark(f"{side} leg", foot, 0.56)]
        for toe in (0.04, 0.11, 0.17):
            grip = stroke((foot - 0.06, 0.65), (foot + 0.03, 0.61), (foot + toe, 0.69), 0.05, 0.6)
            shapes += [(grip, colour)]
    return shapes


def body(look):
    """Upper parts from neck to rump, and the pale belly."""
    return (volume(outline("body"), look["upper"]) + volume(outline("belly"), look["lower"])
            + [mark("back", -0.1, -0.3), mark("belly", 0.1, 0.3), mark("breast", 0.45, 0.0)])


def breast(look):
    """A dark band or streaks; a bib hangs from the head."""
    places = "42 -20  54 -12  34 -5  47 0  26 10  55 8  38 14  18 22  30 27  45 22"
    marks = {"band": [outline("band")],
             "streaks": [stroke((x, y), (x - 0.02, y + 0.07), (x - 0.06, y + 0.14), 0.07, 0.3)
                         for x, y in corners(places)]}
    return [(points, mix(look["upper"], INK, 0.7)) for points in marks.get(look["breast"], [])]


def wing(look):
    """The folded wing: flight feathers under two rows of coverts; a pale patch or two pale bars."""
    dark, pale = mix(look["upper"], INK, 0.42), mix(look["lower"], WHITE, 0.75)
    shadow = outline("wing") + (0.02, 0.05)
    shapes = [mark("near wing", -0.1, 0.0), (shadow, mix(look["lower"], INK, 0.3))]
    shapes += volume(outline("wing"), dark, 0.8, 0.05)
    for y in (0.1, 0.0, -0.1):
        feather = stroke((-0.1, y), (-0.38, y + 0.08), (-0.74 + 0.3 * y, 0.155), 0.02)
        shapes += [(feather, mix(dark, WHITE, 0.22))]
    if look["wing"] == "patch":
        shapes += volume(outline("patch"), pale, 0.85)
    for row, x, light in (("long coverts", -0.2, 0.3), ("short coverts", 0.0, 0.6)):
        shapes += volume(outline(row), mix(dark, look["upper"], light), 0.86, 0.1)
        if look["wing"] == "bars":
            bar = stroke((x - 0.02, -0.24), (x - 0.06, -0.02), (x + 0.06, 0.17), 0.085)
            shapes += [(bar, pale)]
    return shapes


def tail(look):
    """Square, forked, a long ribbon, or a fan of five feathers."""
    feathers = {"square": [outline("square")], "ribbon": [outline("ribbon")],
                "fork": [outline("prong"), outline("prong") * (1, -1)],
                "fan": [rotate(outline("feather"), turn) for turn in (-0.64, 0.64, -0.32, 0.32, 0)]}
    shapes = [mark("tail", -0.4, 0.0)]
    for points in feathers[look["tail"]]:
        shapes += [(points, mix(look["upper"], INK, 0.75)),
                   (mix(points, points.mean(0), 0.16), mix(look["upper"], INK, 0.4))]
    return shapes


def head(look):
    """The head about its own centre: crest, skull, cheek, bib, bill and eye."""
    shapes = crest(look) + volume(ellipse(0, 0, 0.3, 0.28), look["upper"], 0.8)
    shapes += [(outline("cheek"), mix(look["lower"], INK, 0.06)), mark("crown", 0.0, -0.24),
               mark("forehead", 0.2, -0.16), mark("nape", -0.24, 0.0), mark("throat", 0.14, 0.24)]
    if look["breast"] == "bib":
        shapes += [(outline("bib"), mix(look["upper"], INK, 0.8))]
    bill = outline(look["bill"])
    shapes += [(bill, mix(look["beak"], INK, 0.55)), (mix(bill, (0.25, -0.03), 0.15), look["beak"]),
               mark("beak", 0.36, 0.02)]
    return shapes + eye(look)


def crest(look):
    """A peaked hood, a tuft of four feathers, or one curled plume."""
    colour = mix(look["upper"], INK, 0.25)
    tuft = [(outline("tuft"), mix(colour, INK, 0.4)), (outline("tuft") * (0.6, 0.9), colour)]
    return {"none": [],
            "peak": volume(outline("peak"), colour),
            "tuft": sum((transform(tuft, angle) for angle in (-1.0, -0.6, -0.2, 0.2)), []),
            "plume": [(stroke((0.04, -0.2), (0.02, -0.5), (0.26, -0.6), 0.055, 1.2), INK),
                      (ellipse(0.27, -0.56, 0.1, 0.085), INK)]}[look["crest"]]


def eye(look):
    """A dark eye: plain, in a pale ring, under a pale brow, or in a dark mask."""
    pale = mix(look["lower"], WHITE, 0.8)
    around = {
        "plain": [],
        "ring": [(ellipse(0.08, -0.05, 0.135, 0.135), pale)],
        "brow": [(stroke((0.24, -0.1), (0.02, -0.16), (-0.27, -0.06), 0.1, 0.7), pale)],
        "mask": [(stroke((0.26, 0.02), (0.03, -0.05), (-0.27, 0.05), 0.2, 0.6), INK)]}
    return around[look["eye"]] + [mark("near eye", 0.08, -0.05),
                                  (ellipse(0.08, -0.05, 0.075, 0.075), INK),
                                  (ellipse(0.105, -0.08, 0.027, 0.027), WHITE)]


def mark(part, x, y):
    """A shape that marks where a part is; it moves with the shapes around it."""
    return np.array([[x, y]], float), part


def volume(points, colour, shadow=0.7, light=0.16):
    """A rounded form lit from above: a dark outline, then smaller and lighter copies."""
    lit = mix(points.min(0), points.max(0), np.array([0.62, 0.14]))
    t = np.linspace(0, 0.8, 10)[:, None]
    colours = mix(colour * shadow, mix(colour, WHITE, light), (t / 0.8) ** 0.7)
    return list(zip(mix(points, lit, t[:, None]), colours))


def corners(text):
    """Points (n, 2) from text in hundredths."""
    return np.array(text.split(), float).reshape(-1, 2) / 100


@functools.cache
def outline(name):
    """One of OUTLINES as a polygon, rounded by three passes of corner cutting (Chaikin 1974)."""
    points = corners(OUTLINES[name])
    for _ in range(3):
        after = np.roll(points, -1, axis=0)
        points = np.stack([mix(points, after, 0.25), mix(points, after, 0.75)], 1).reshape(-1, 2)
    return points


def ellipse(x, y, rx, ry):
    """An ellipse as a polygon."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


# Weights of three points: the parabola through them at times T, and its slope.
T = np.linspace(0, 1, 12)
THROUGH = np.stack([(1 - T) * (1 - 2 * T), 4 * T * (1 - T), T * (2 * T - 1)], 1)
SLOPE = np.stack([4 * T - 3, 4 - 8 * T, 4 * T - 1], 1)


def stroke(start, middle, end, width, taper=1.0):
    """A band along the parabola through three points; its end is `taper` times as wide."""
    points = np.array([start, middle, end])
    line, along = THROUGH @ points, SLOPE @ points
    half = width / 2 * mix(1, taper, T) / np.hypot(*along.T)
    across = along[:, ::-1] * (-1, 1) * half[:, None]
    return np.concatenate([line + across, (line - across)[::-1]])


def rotate(points, angle):
    """Points (..., 2) rotated about the origin; with y down, a positive angle turns clockwise."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def transform(shapes, angle, to=(0, 0)):
    """Shapes rotated about the origin and then shifted by `to`."""
    return [(rotate(points, angle) + to, fill) for points, fill in shapes]


def mix(a, b, t):
    """Linear interpolation from a (t = 0) to b (t = 1), of colours or points."""
    return a + (np.asarray(b) - a) * t


def rgb(text):
    """Colour from six hex digits, as floats 0 to 255."""
    return np.array(list(bytes.fromhex(text)), float)


def pixel(colour):
    """A colour as Pillow expects it."""
    return tuple(min(255, int(value)) for value in colour.tolist())


INK, WHITE = rgb("221f24"), rgb("fffaf0")

if __name__ == "__main__":
    draw_shard(sys.argv[1], *map(int, sys.argv[2:]))
