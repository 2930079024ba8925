"""The progress line of long work; bytes and times as text."""

import sys
import time


def progress(items, total, label, size_of=None, done=0, patience=0):
    """Yield the items and report count, rate and time left on stderr.

    total: the final count, or None if unknown. size_of: an item's bytes, to count bytes instead of
    items. done: where the count starts. patience: seconds before the first report. A terminal line
    is rewritten five times a second; elsewhere a line is printed every ten seconds, and at the end.
    """
    start, first = time.monotonic(), done
    shown, terminal = start, sys.stderr.isatty()
    text = format_bytes if size_of else "{:.0f}".format

    def show(end):
        rate = max(done - first, 1e-9) / max(time.monotonic() - start, 1e-9)
        speed = text(rate) if size_of or rate >= 10 else f"{rate:.2g}"
        line = f"{label}  {text(done)}  {speed}/s"
        if total is not None:
            line = (f"{label}  {text(done)}/{text(total)}  {speed}/s  "
                    f"eta {format_time(max(0, total - done) / rate)}")
        print(f"\r{line:<70}" if terminal else line, file=sys.stderr, flush=True, end=end)

    for item in items:
        yield item
        done += size_of(item) if size_of else 1
        now = time.monotonic()
        if done != total and now - start > patience and now - shown > (0.2 if terminal else 10):
            shown = now
            show("" if terminal else "\n")
    if time.monotonic() - start > patience:
        show("\n")


def format_bytes(n):
    """A number of bytes as 1.15 GB, 123 MB, 15 kB, 99 bytes."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 0.9995 * 10 ** power:
            return f"{n / 10 ** power:.3g} {unit}"
    return f"{n:.0f} bytes"


def format_time(seconds):
    """Seconds as m:ss or h:mm:ss."""
    m, s = divmod(round(seconds), 60)
    return f"{m}:{s:02d}" if m < 60 else f"{m // 60}:{m % 60:02d}:{s:02d}"
