"""Pages of pictures: one HTML file each, which needs no network and no other file."""

import base64
import html
import io
import json
from pathlib import Path
from typing import NamedTuple

import torch

import atomic
import fgssl
import pictures
import terminal
from evaluation.results import features_rows, few_label_tables, percent_of, rows_of

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; --faint: #666;
        --mark: #fff3d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --line: #444; --faint: #a0a0a0; --mark: #4a3c12 } }
@page wide { size: landscape }
@media print { :root { --ink: #000; --paper: #fff; --line: #999; --faint: #333; --mark: #eee }
  section, .row, tr { break-inside: avoid-page } .buttons { display: none }
  section:has(.matrix) { page: wide } .matrix { zoom: .7 } .wide { overflow: visible } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin: 2em 0 .3em }
p { margin: .3em 0; max-width: 75ch } .faint { color: var(--faint); font-size: .9em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5em 0 }
td, th { border-bottom: 1px solid var(--line); padding: .15em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } th[data-sort] { cursor: pointer }
th[data-sort]::after { content: " \\2195"; color: var(--faint) }
.wide { overflow-x: auto } img { max-width: 100%; height: auto }
.row { display: flex; flex-wrap: wrap; gap: .4em; margin: .4em 0 }
.row.short { display: inline-flex; vertical-align: top; margin-right: 2em }
figure { margin: 0; width: 112px } figure img { display: block; width: 112px }
figcaption { font-size: .7em; line-height: 1.25; overflow-wrap: anywhere; color: var(--faint) }
.matrix td { width: 16px; min-width: 16px; height: 16px; padding: 0; border: 1px solid var(--line);
             font-size: 9px; text-align: center; cursor: pointer; print-color-adjust: exact }
.matrix th { font-size: 10px; font-weight: normal; padding: 0 .3em; border: 0; white-space: nowrap }
.matrix th.above { writing-mode: vertical-rl; transform: rotate(180deg); padding: .3em 0;
                   text-align: left }
code { overflow-wrap: anywhere }
"""


class Section(NamedTuple):
    """A heading, one line that sums it up, a note, and rows of (picture, caption)."""
    title: str
    summary: str
    note: str = ""
    rows: list = ()
    body: str = ""    # more HTML

    def html(self):
        rows = "".join(f'<div class="row{" short" * (len(row) < 5)}">'
                       f'{"".join(map(figure, *zip(*row)))}</div>' for row in self.rows if row)
        note = f'<p class="faint">{html.escape(self.note)}</p>' if self.note and rows else ""
        return (f"<section><h2>{html.escape(self.title)}</h2><p>{html.escape(self.summary)}</p>"
                f"{note}{rows}{self.body}</section>")


def figure(source, caption):
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def write(file, title, about, sections, script=""):
    """A page of Sections; about: lines below the title. Written whole or not at all."""
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width">',
             f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
             f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in about),
             *(section.html() for section in sections),
             f"<script>{script}</script></body></html>\n"]
    with atomic.replacing(file) as draft:
        draft.write_bytes(terminal.to_utf8("\n".join(parts)))


def data_uri(picture, kind="PNG", **options):
    """A Pillow picture as an address that holds it."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def image_of(file):
    """An <img> that holds a PNG file; nothing where there is none."""
    if not Path(file).is_file():
        return ""
    content = base64.b64encode(Path(file).read_bytes()).decode()
    return f'<p><img alt="{Path(file).stem}" src="data:image/png;base64,{content}"></p>'


class Thumbnails:
    """Small pictures of some of the images (N, 3, C, C), as addresses."""

    def __init__(self, images, size, side=112):
        self.images, self.size, self.side = images, size, side

    def __call__(self, i):
        x = fgssl.evaluation_view(torch.from_numpy(self.images[i][None].copy()), self.side)[0]
        return data_uri(pictures.to_image(x), "JPEG", quality=80)


# The report of an evaluation ----------------------------------------------------------------------

SORTING = """
document.querySelectorAll('th[data-sort]').forEach(head => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], at = head.cellIndex, down = head.dataset.down != 1;
  head.dataset.down = down ? 1 : 0;
  const value = row => { const text = row.cells[at].textContent, v = parseFloat(text);
                         return isNaN(v) ? text : v };
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    const order = typeof x == 'number' && typeof y == 'number' ? x - y
                  : String(x).localeCompare(String(y));
    return down ? -order : order }).forEach(row => body.append(row)) }));
"""

MATRIX = """
const table = document.getElementById('matrix'), shown = document.getElementById('cell');
const total = M.counts.map(row => row.reduce((a, b) => a + b, 0));
const recall = M.counts.map((row, i) => total[i] ? row[i] / total[i] : 2);
function add(parent, tag, text) {
  const e = parent.appendChild(document.createElement(tag)); e.textContent = text; return e }
function draw(key) {
  const order = M.names.map((_, i) => i);
  if (key == 'name') order.sort((a, b) => M.names[a].localeCompare(M.names[b]));
  if (key == 'recall') order.sort((a, b) => recall[a] - recall[b]);
  table.textContent = '';
  const head = table.createTHead().insertRow(), body = table.createTBody();
  add(head, 'th', 'true / predicted');
  order.forEach(j => add(head, 'th', M.names[j]).className = 'above');
  order.forEach(i => { const row = body.insertRow(); add(row, 'th', M.names[i]);
    order.forEach(j => { const n = M.counts[i][j], cell = row.insertCell();
      const part = total[i] ? n / total[i] : 0;
      cell.textContent = n || '';
      cell.title = `${M.names[i]} taken for ${M.names[j]}: ${n} of ${total[i]}`;
      if (n) { cell.style.background = i == j ? `rgba(0, 114, 178, ${.15 + .7 * part})`
                                              : `rgba(213, 94, 0, ${.2 + .8 * part})`; }
      cell.onclick = () => { shown.textContent = cell.title;
        const images = document.createElement('div'); images.className = 'row';
        (M.images[i + '-' + j] || []).forEach(source => {
          const img = images.appendChild(document.createElement('img'));
          img.src = source; img.width = 112; img.alt = cell.title });
        shown.append(images) } }) }) }
document.querySelectorAll('.buttons button').forEach(button =>
  button.onclick = () => draw(button.dataset.key));
draw('set');
"""


def html_table(rows, sort=False):
    """Rows of texts as a table; the first is the head, sortable by a click."""
    head, *others = [[html.escape(str(cell)) for cell in row] for row in rows]
    mark = " data-sort=1" if sort else ""
    return ('<div class="wide"><table><thead><tr>' + "".join(f"<th{mark}>{c}</th>" for c in head)
            + "</tr></thead><tbody>"
            + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in others)
            + "</tbody></table></div>")


def report(out, result, frozen, most=60, images_per_cell=4, cells=150):
    """out/report.html: an evaluation to look at.

    The confusion matrix shows at most the `most` classes of least recall, and the images behind the
    `cells` largest cells off its diagonal.
    """
    names, test, confusion = frozen.names, frozen.splits[2], frozen.confusion
    predicted = frozen.head(frozen.h[frozen.layer][2]).argmax(1).numpy()
    show = Thumbnails(test.images, frozen.inference.size)
    classes = result["report"]["classes"]
    order = sorted((i for i, row in enumerate(classes) if row["images"]),
                   key=lambda i: classes[i]["recall"])
    kept = sorted(order[:most])
    inner = confusion[kept][:, kept].copy()
    wrong = inner.copy()
    wrong[range(len(kept)), range(len(kept))] = 0
    largest = wrong.ravel().argsort(kind="stable")[::-1][:cells]
    images = {}
    for i, j in zip(*divmod(largest[wrong.ravel()[largest] > 0], len(kept))):
        where = (test.labels == kept[i]) & (predicted == kept[j])
        images[f"{i}-{j}"] = [show(k) for k in where.nonzero()[0][:images_per_cell]]
    data = json.dumps({"names": [names[i] for i in kept], "counts": inner.tolist(),
                       "images": images}, ensure_ascii=False).replace("<", "\\u003c")
    tables = [("Frozen features", features_rows(rows_of(result), percent_of(result))),
              *((f"Few labels, {method}", rows) for method, rows in
                few_label_tables({out.resolve().name: [result]}))]
    measured = [Section(title, f"% of {len(test.labels)} test images", body=html_table(rows))
                for title, rows in tables]
    mistakes = []
    for i in order[:10]:
        missed = ((test.labels == i) & (predicted != i)).nonzero()[0][:8]
        if len(missed):
            mistakes.append([(show(k), f"{names[i]}, taken for {names[predicted[k]]}")
                             for k in missed])
    head = ["class", "images", "recall, %", "precision, %", "F1, %", "taken for", "times"]
    per_class = [head] + [
        [row["class"], row["images"],
         *("" if row[key] is None else f"{row[key]:.1f}" for key in ("recall", "precision", "f1")),
         row.get("taken_for", ""), row.get("times", "")] for row in classes]
    only = f", the {most} of least recall" if len(order) > most else ""
    buttons = "".join(f'<button data-key="{key}">{text}</button> ' for key, text in (
        ("set", "as in the set"), ("name", "by name"), ("recall", "by recall")))
    sections = [
        *measured,
        Section("Curves", "Training, and few labels", body=image_of(out / "curves.png")
                + image_of(out / "compare.png"))
        if (out / "curves.png").is_file() or (out / "compare.png").is_file() else None,
        Section("Worst classes", "Their mistakes", rows=mistakes),
        Section(f"Confusion{only}", "Rows are true classes. Blue: right; orange: taken for "
                "another, darker for a larger part of the class. Hover for numbers, click for "
                "images.",
                body=f'<p class="buttons">Order: {buttons}</p><div id="cell"></div>'
                     '<div class="wide"><table class="matrix" id="matrix"></table></div>'),
        Section("Classes", "Click a heading to sort.", body=html_table(per_class, sort=True)),
        *(Section(title, note, body=body) for title, note, body in (
            ("Retrieval", "Test images and their nearest others; a green frame: the same class.",
             image_of(out / "retrieval.png")),
            ("Map", "Test features on two principal components.", image_of(out / "map.png")),
            ("Grad-CAM", "What does not matter to the score is dark.",
             image_of(out / "gradcam.png"))) if body),
        Section("How to repeat it", f"commit {result['commit']}, torch {torch.__version__}, "
                f"{result['precision']}, seed {result['seed']}, layer {result['layer']}, weights "
                f"{result['weights']}, data {result['digest']}",
                body=f"<p><code>{html.escape(' '.join(result['argv']))}</code></p>")]
    n = result["n"]
    write(out / "report.html", f"{result['data']}: {result['checkpoint'] or 'random weights'}",
          [f"{result['classes']} classes; {n['train']} images to train, {n['val']} to choose, "
           f"{n['test']} to test; {result['arch']}, {result['size']} px"],
          filter(None, sections), f"const M = {data};{SORTING}{MATRIX}")
