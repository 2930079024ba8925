"""Pictures of images, curves, points and matrices, with Pillow alone.

    grid       images in rows, with titles and captions
    curve      numbers over steps, with a legend; stack puts several below each other
    scatter    points in named groups
    heatmap    a matrix of numbers in [0, 1]
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import atomic

COLORS = ("#3366aa", "#dd7733", "#449955", "#bb3344", "#8866aa", "#886655", "#cc77aa", "#777777")


def font(size):
    return ImageFont.load_default(size)


def grid(path, rows, titles=(), side=None, captions=()):
    """Write a PNG of image tensors in rows: (n, 3, H, W) each, uint8 or float in [0, 1].

    titles: one a row, at its left. side: width of a drawn image; by default at least 96 pixels.
    captions: a list a row, of what stands under its images; empty for a row without.
    """
    side, gap = side or max(96, rows[0].shape[-1]), 4
    margin = gap + (8 * max(map(len, titles)) + 8 if titles else 0)
    tops = [gap]  # of the rows, and of what would follow
    for r in range(len(rows)):
        tops.append(tops[-1] + side + gap + (16 if r < len(captions) and captions[r] else 0))
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (side + gap), tops[-1]), "white")
    for r, (top, row) in enumerate(zip(tops, rows)):
        if titles:
            ImageDraw.Draw(sheet).text((6, top + side // 2), titles[r], "black", font(14), "lm")
        for c, x in enumerate(row):
            image = to_image(x).resize((side, side), Image.BICUBIC)
            left = margin + c * (side + gap)
            sheet.paste(image, (left, top))
            if tops[r + 1] - top > side + gap:
                place = (left + side // 2, top + side + 9)
                ImageDraw.Draw(sheet).text(place, captions[r][c], "black", font(12), "mm")
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


def curve(series, lines=(), xlabel="", size=(640, 360), xnames=()):
    """A picture of curves with axes and numbers.

    series: {name: (xs, ys)} or (xs, ys, stds), which are drawn as bars; finite. One without
    points is left out with its colour: two pictures of the same names have the same colours.
    lines: {name: y}, dashed: chance, a baseline. xnames: of x = 0, 1, ..., in place of numbers.
    """
    lines, series = dict(lines), {k: (*v, [0] * len(v[0]))[:3] for k, v in series.items()}
    xs = [-0.5, len(xnames) - 0.5] if xnames else [x for xs, _, _ in series.values() for x in xs]
    ys = [y + sign * e for _, *of in series.values() for y, e in zip(*of) for sign in (1, -1)]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    named = [(name, color) for name, color in zip([*series, *lines], COLORS)
             if name in lines or len(series[name][0])]
    bottom = legend(draw, named, 64, size[0] - 16)
    box = 64, bottom, size[0] - 16, size[1] - 44
    px, py = axes(picture, box, xs, [*ys, *lines.values()], xlabel, xnames=xnames)
    for name, color in named:
        if name in series:
            points = [(px(x), py(y)) for x, y, _ in zip(*series[name])]
            draw.line(points, color, 2, joint="curve")
            for x, y in points if len(points) <= 30 else ():
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), color)
            for x, y, e in zip(*series[name]):
                if e:
                    draw.line((px(x), py(y - e), px(x), py(y + e)), color, 2)
        else:
            for x in range(box[0], box[2], 10):
                draw.line((x, py(lines[name]), x + 5, py(lines[name])), color, 2)
    return picture


def legend(draw, named, left, right):
    """Write (name, colour) pairs in rows from the top of a picture, between left and right; returns
    where the last row ends."""
    x, y = left, 14
    for name, color in named:
        width = 36 + draw.textlength(name, font(13))
        if x > left and x + width > right:
            x, y = left, y + 18
        draw.line((x, y, x + 20, y), color, 3)
        draw.text((x + 26, y), name, "black", font(13), anchor="lm")
        x += width + 14
    return y + 14


def stack(panels):
    """Pictures of one size below each other."""
    sheet = Image.new("RGB", (panels[0].width, panels[0].height * len(panels)))
    for i, panel in enumerate(panels):
        sheet.paste(panel, (0, i * panel.height))
    return sheet


def scatter(groups, xlabel="", ylabel="", rest=((), ()), size=(860, 560)):
    """A picture of points in up to 14 named groups, with a legend at its right.

    groups: {name: (xs, ys)}, drawn as discs in seven colours, then as rings. rest: the xs and ys of
    all others, drawn below them in grey.
    """
    marks = [(False, "#d8d8d8")] + [(hollow, color) for hollow in (0, 1) for color in COLORS[:7]]
    drawn = [("others", rest), *groups.items()]
    xs, ys = ([v for _, group in drawn for v in group[axis]] for axis in (0, 1))
    picture = Image.new("RGB", size, "white")
    px, py = axes(picture, (64, 16, size[0] - 250, size[1] - 44), xs, ys, xlabel, ylabel)
    draw = ImageDraw.Draw(picture)

    def dot(x, y, hollow, color):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), None if hollow else color, color)

    for i, ((name, group), mark) in enumerate(zip(drawn, marks)):
        for x, y in zip(*group):
            dot(px(x), py(y), *mark)
        if len(group[0]):
            y = 26 + 20 * ((i or len(drawn)) - 1)  # the others stand last
            dot(size[0] - 236, y, *mark)
            draw.text((size[0] - 226, y), name[:28], "black", font(13), anchor="lm")
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
        draw.text((px(x), bottom + 6), text, "black", font(12), anchor="ma")
    for y in yt:
        draw.line((left, py(y), right, py(y)), "#eeeeee")
        draw.text((left - 6, py(y)), f"{y:g}", "black", font(12), anchor="rm")
    draw.rectangle(box, outline="#888888")
    draw.text(((left + right) / 2, picture.height - 6), xlabel, "black", font(13), anchor="ms")
    draw.text((left + 6, top + 6), ylabel, "black", font(13), anchor="la")
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


def heatmap(path, matrix, ylabel="", xlabel="", names=()):
    """Write a PNG of a matrix of numbers in [0, 1], row 0 on top. names: of its rows."""
    n, m = np.shape(matrix)
    cell = max(4, min(24, 640 // max(n, m)))
    named = bool(names) and cell >= 10
    margin = 30 + (7 * min(24, max(map(len, names))) if named else 0)
    picture = Image.new("RGB", (margin + m * cell + 70, 30 + n * cell + 10), "white")
    draw = ImageDraw.Draw(picture)
    cells = Image.fromarray(heat(matrix)).resize((m * cell, n * cell), Image.NEAREST)
    picture.paste(cells, (margin, 30))
    draw.rectangle((margin - 1, 29, margin + m * cell, 30 + n * cell), outline="#888888")
    for i, name in enumerate(names if named else ()):
        draw.text((margin - 6, 30 + (i + 0.5) * cell), name[:24], "black", font(10), anchor="rm")
    draw.text((margin + m * cell / 2, 8), xlabel, "black", font(13), anchor="ma")
    draw.text((4, 8), ylabel, "black", font(13), anchor="la")
    scale = Image.fromarray(heat(np.linspace(1, 0, 100))[:, None]).resize((14, 100))
    picture.paste(scale, (margin + m * cell + 16, 30))
    for value, y in ((1, 30), (0, 130)):
        draw.text((margin + m * cell + 36, y), f"{value}", "black", font(12), anchor="lm")
    save(picture, path)
