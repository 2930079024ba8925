"""Pictures of images, curves, points and matrices, with Pillow alone.

    grid       images in rows, with titles and captions
    curve      numbers over steps, with a legend; stack puts several below each other
    scatter    points in named groups
    heatmap    a matrix of numbers in [0, 1]
"""

import functools
import math
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import atomic
from terminal import to_ascii

# Like Okabe & Ito's colours, which colour-blind readers tell apart; each curve
# and group of points also has a shape
COLORS = ("#3366aa", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c00", "#777777")
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf",
         "arial.ttf", "Helvetica.ttc", "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc")


@functools.lru_cache
def font(size, name=None):
    """Pillow's own font, the same on every machine, or one of the system; None if it has none."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.lru_cache(maxsize=None)
def has_glyph(name, letter):
    """Whether a font has the letter, or draws a box in its place."""
    glyph, box = (font(20, name).getmask(c) for c in (letter, "\uffff"))
    return (glyph.size, bytes(glyph)) != (box.size, bytes(box))


@functools.lru_cache(maxsize=4096)
def lettering(text, size):
    """The text and the font that has the most of its letters: Pillow's, or one of the system; the
    letters that it lacks in ASCII, without their accents; tabs and other controls as spaces."""
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)

    def lacks(name):
        return [letter for letter in text if letter != " " and not has_glyph(name, letter)]

    names = [name for name in (None, *FONTS) if font(size, name)]
    best = None if text.isascii() else min(names, key=lambda name: len(lacks(name)))
    absent = () if text.isascii() else lacks(best)
    return "".join(to_ascii(c) if c in absent else c for c in text), font(size, best)


def width_of(text, size):
    text, face = lettering(text, size)
    return face.getlength(text)


def put(draw, place, text, size=13, anchor="la"):
    """Write a line of text at a place."""
    text, face = lettering(text, size)
    draw.text(place, text, "black", face, anchor)


def fit(text, size, width):
    """The text, cut to a width in pixels, with dots where it is cut."""
    if width_of(text, size) <= width:
        return text
    text = text[:int(width)]                                 # a letter is a pixel wide or more
    while text and width_of(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def grid(path, rows, titles=(), side=None, captions=(), heads=()):
    """Write a PNG of image tensors in rows: (n, 3, H, W) each, uint8 or float in [0, 1].

    titles: one a row, at its left, of lines. side: width of a drawn image; by default at least 96
    pixels. captions: a list a row, of what stands under its images, in lines; empty for a row
    without. heads: one a column.
    """
    side, gap = side or max(96, rows[0].shape[-1]), 4
    lines = [title.split("\n") for title in titles]
    widest = max((width_of(line, 14) for title in lines for line in title), default=0)
    margin = gap + (round(widest) + 10 if titles else 0)
    tops = [gap + (18 if heads else 0)]  # of the rows, and of what would follow
    for r in range(len(rows)):
        below = [caption.split("\n") for caption in captions[r]] if r < len(captions) else []
        tops.append(tops[-1] + side + gap + 16 * max(map(len, below), default=0))
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (side + gap), tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for c, head in enumerate(heads):
        put(draw, (margin + c * (side + gap) + side // 2, 12), fit(head, 13, side), 13, "mm")
    for r, (top, row) in enumerate(zip(tops, rows)):
        for i, line in enumerate(lines[r] if titles else ()):
            put(draw, (6, top + side // 2 + 18 * i - 9 * (len(lines[r]) - 1)), line, 14, "lm")
        for c, x in enumerate(row):
            image = to_image(x).resize((side, side), Image.BICUBIC)
            left = margin + c * (side + gap)
            sheet.paste(image, (left, top))
            caption = captions[r][c] if r < len(captions) and captions[r] else ""
            for i, line in enumerate(caption.split("\n")):
                place = left + side // 2, top + side + 9 + 16 * i
                put(draw, place, fit(line, 12, side), 12, "mm")
    save(sheet, path)


def save(picture, path):
    """Write a Pillow picture as a PNG, whole or not at all."""
    with atomic.replacing(path) as draft:
        picture.save(draft, "PNG")


def to_image(x):
    """A (3, H, W) tensor, uint8 or float in [0, 1], as a Pillow image."""
    if x.dtype != torch.uint8:
        x = x.float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def ticks(low, high, count=5):
    """About `count` round numbers (1, 2 or 5 times a power of ten) covering low..high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def curve(series, lines=(), xlabel="", size=(640, 360), xnames=(), title="", ylabel="",
          xrange=()):
    """A picture of curves with axes and numbers.

    series: {name: (xs, ys)} or (xs, ys, stds), which are drawn as bars; finite. One without
    points is left out with its colour: two pictures of the same names have the same colours.
    lines: {name: y}, dashed: chance, a baseline. xnames: of x = 0, 1, ..., in place of numbers.
    xrange: what the x-axis shows at least, so that stacked pictures have the same.
    """
    lines, series = dict(lines), {k: (*v, [0] * len(v[0]))[:3] for k, v in series.items()}
    xs = [-0.5, len(xnames) - 0.5] if xnames else [x for xs, _, _ in series.values() for x in xs]
    ys = [y + sign * e for _, *of in series.values() for y, e in zip(*of) for sign in (1, -1)]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    named = [(name, color, None if name in lines else i % 4)
             for i, (name, color) in enumerate(zip([*series, *lines], COLORS))
             if name in lines or len(series[name][0])]
    put(draw, (64, 6), fit(title, 14, size[0] - 80), 14)
    bottom = legend(draw, named, 64, size[0] - 16, 36 if title else 14)
    box = 64, bottom, size[0] - 16, size[1] - 44
    px, py = axes(picture, box, [*xs, *xrange], [*ys, *lines.values()], xlabel, ylabel, xnames)
    for name, color, shape in named:
        if shape is None:
            dashed(draw, box[0], box[2], py(lines[name]), color)
            continue
        points = [(px(x), py(y)) for x, y, _ in zip(*series[name])]
        draw.line(points, color, 2, joint="curve")
        for point in points[::max(1, -(-len(points) // 30))]:
            mark(draw, *point, shape, color)
        for x, y, e in zip(*series[name]):
            if e:
                draw.line((px(x), py(y - e), px(x), py(y + e)), color, 2)
    return picture


def dashed(draw, left, right, y, color):
    for x in range(int(left), int(right), 10):
        draw.line((x, y, x + 5, y), color, 2)


def mark(draw, x, y, shape, color, hollow=False):
    """A point: disc, square, diamond or triangle (shape 0 to 3)."""
    fill = None if hollow else color
    corners = {1: ((-3, -3), (3, -3), (3, 3), (-3, 3)), 2: ((0, -4), (4, 0), (0, 4), (-4, 0)),
               3: ((0, -4), (4, 3), (-4, 3))}
    if shape in corners:
        draw.polygon([(x + dx, y + dy) for dx, dy in corners[shape]], fill, color)
    else:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill, color)


def legend(draw, named, left, right, y=14):
    """Write (name, colour, shape; None: a dashed line) in rows from y on, between left and right;
    returns where the last row ends."""
    x = left
    for name, color, shape in named:
        width = 36 + width_of(name, 13)
        if x > left and x + width > right:
            x, y = left, y + 18
        if shape is None:
            dashed(draw, x, x + 20, y, color)
        else:
            draw.line((x, y, x + 20, y), color, 2)
            mark(draw, x + 10, y, shape, color)
        put(draw, (x + 26, y), name, 13, "lm")
        x += width + 14
    return y + 14


def stack(panels):
    """Pictures below each other."""
    sheet = Image.new("RGB", (max(panel.width for panel in panels),
                              sum(panel.height for panel in panels)), "white")
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def scatter(groups, xlabel="", ylabel="", rest=((), ()), size=(860, 560)):
    """A picture of points in up to 14 named groups, with a legend at its right.

    groups: {name: (xs, ys)}, in seven colours and four shapes, filled, then hollow. rest: the xs
    and ys of all others, drawn below them in grey.
    """
    marks = [(0, "#d8d8d8", False)] + [(i % 4, COLORS[i % 7], i >= 7) for i in range(14)]
    drawn = [("others", rest), *groups.items()]
    xs, ys = ([v for _, group in drawn for v in group[axis]] for axis in (0, 1))
    picture = Image.new("RGB", size, "white")
    px, py = axes(picture, (64, 16, size[0] - 250, size[1] - 44), xs, ys, xlabel, ylabel)
    draw = ImageDraw.Draw(picture)
    for i, ((name, group), (shape, color, hollow)) in enumerate(zip(drawn, marks)):
        for x, y in zip(*group):
            mark(draw, px(x), py(y), shape, color, hollow)
        if len(group[0]):
            y = 26 + 20 * ((i or len(drawn)) - 1)  # the others stand last
            mark(draw, size[0] - 236, y, shape, color, hollow)
            put(draw, (size[0] - 226, y), fit(name, 13, 220), 13, "lm")
    return picture


def axes(picture, box, xs, ys, xlabel, ylabel="", xnames=()):
    """Draw gridlines, numbers and labels around box (left, top, right, bottom), for the numbers xs
    and ys; xnames: of x = 0, 1, ... Returns the functions from x and from y to pixels."""
    left, top, right, bottom = box
    xt, yt = list(xs) if xnames else ticks(*bounds(xs), 8), ticks(*bounds(ys), 8)

    def px(x):
        return left + (x - xt[0]) / (xt[-1] - xt[0]) * (right - left)

    def py(y):
        return bottom - (y - yt[0]) / (yt[-1] - yt[0]) * (bottom - top)

    draw = ImageDraw.Draw(picture)
    for x, text in enumerate(xnames) if xnames else ((x, f"{x:g}") for x in xt):
        draw.line((px(x), top, px(x), bottom), "#eeeeee")
        put(draw, (px(x), bottom + 6), text, 12, "ma")
    for y in yt:
        draw.line((left, py(y), right, py(y)), "#eeeeee")
        put(draw, (left - 6, py(y)), f"{y:g}", 12, "rm")
    draw.rectangle(box, outline="#888888")
    put(draw, ((left + right) / 2, picture.height - 6), xlabel, 13, "ms")
    put(draw, (left + 6, top + 6), ylabel)
    return px, py


def bounds(values):
    """The least and the greatest, set apart where they are all but one."""
    values = list(values)
    low, high = min(values), max(values)
    apart = high - low > 1e-6 * max(abs(low), abs(high))
    return (low, high) if apart else (low - 0.5, high + 0.5)


def heat(values):
    """Numbers in [0, 1] to colours, uint8 (..., 3), from white through orange to dark red."""
    stops = np.array([(255, 255, 255), (255, 214, 120), (240, 130, 50), (180, 30, 40), (60, 0, 30)])
    place = np.clip(np.nan_to_num(np.asarray(values, float)), 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    return (stops[low] + (place - low)[..., None] * (stops[low + 1] - stops[low])).astype(np.uint8)


def heatmap(path, matrix, ylabel="", xlabel="", names=(), title=""):
    """Write a PNG of a matrix of numbers in [0, 1], row 0 on top, at most 640 cells a side: of a
    larger one, the greatest number of each block. names: of its rows and columns, written where
    there are at most 64."""
    save(heat_picture(matrix, ylabel, xlabel, names, title), path)


def heat_picture(matrix, ylabel="", xlabel="", names=(), title=""):
    """The picture of `heatmap`."""
    matrix = shrink_matrix(matrix)
    n, m = matrix.shape
    cell = max(1, min(24, 640 // max(n, m)))
    named = bool(names) and len(names) == n and cell >= 10
    longest = min(180, round(max(width_of(name, 10) for name in names))) + 10 if named else 0
    left, top = 30 + longest, 30 + (20 if title else 0) + (longest if named and n == m else 0)
    width = max(left + m * cell + 70, round(width_of(title, 14)) + 20 if title else 0)
    picture = Image.new("RGB", (width, max(top + n * cell, top + 130) + 10), "white")
    draw = ImageDraw.Draw(picture)
    cells = Image.fromarray(heat(matrix)).resize((m * cell, n * cell), Image.NEAREST)
    picture.paste(cells, (left, top))
    draw.rectangle((left - 1, top - 1, left + m * cell, top + n * cell), outline="#888888")
    for i, name in enumerate(names if named else ()):
        put(draw, (left - 6, top + (i + 0.5) * cell), fit(name, 10, 180), 10, "rm")
    if named and n == m:
        strip = Image.new("RGB", (longest, m * cell), "white")  # to be turned by a quarter
        for j, name in enumerate(names):
            put(ImageDraw.Draw(strip), (2, (j + 0.5) * cell), fit(name, 10, 180), 10, "lm")
        picture.paste(strip.transpose(Image.ROTATE_90), (left, top - longest - 2))
    put(draw, (8, 8), title, 14)
    put(draw, (left + m * cell / 2, top - 22 - (longest if named and n == m else 0)), xlabel, 13,
        "ma")
    put(draw, (4, top - 22), ylabel, 13)
    scale = Image.fromarray(heat(np.linspace(1, 0, 100))[:, None]).resize((14, 100))
    picture.paste(scale, (left + m * cell + 16, top))
    for value, y in ((1, top), (0, top + 100)):
        put(draw, (left + m * cell + 36, y), f"{value}", 12, "lm")
    return picture


def shrink_matrix(matrix, most=640):
    """The matrix; where a side is longer than `most`, the greatest number of each block."""
    matrix = np.asarray(matrix)
    for axis in (0, 1):
        block = -(-matrix.shape[axis] // most)
        if block > 1:
            matrix = np.maximum.reduceat(matrix, np.arange(0, matrix.shape[axis], block), axis)
    return matrix
