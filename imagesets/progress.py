"""The progress line of all long work, and numbers in words."""

import sys
import time


def progress(items, total, what, weigh=None, done=0, patience=0):
    """Yield the items and report count, rate and time left on stderr.

    total: of the count; None where it is not known. weigh: an item's bytes, where those are to be
    counted in place of items. done: what the count starts from. patience: seconds in which nothing
    is said. On a terminal one line is rewritten five times a second; elsewhere one comes every ten
    seconds, and one at the end.
    """
    start, begin = time.monotonic(), done
    shown, terminal, write = start, sys.stderr.isatty(), amount if weigh else "{:.0f}".format

    def show(end):
        rate = max(done - begin, 1e-9) / max(time.monotonic() - start, 1e-9)
        speed = write(rate) if weigh or rate >= 10 else f"{rate:.2g}"
        line = f"{what}  {write(done)}  {speed}/s"
        if total is not None:
            line = (f"{what}  {write(done)}/{write(total)}  {speed}/s  "
                    f"eta {minutes(max(0, total - done) / rate)}")
        print(f"\r{line:<70}" if terminal else line, file=sys.stderr, flush=True, end=end)

    for item in items:
        yield item
        done += weigh(item) if weigh else 1
        now = time.monotonic()
        if done != total and now - start > patience and now - shown > (0.2 if terminal else 10):
            shown = now
            show("" if terminal else "\n")
    if time.monotonic() - start > patience:
        show("\n")


def amount(n):
    """A number of bytes in words: 1.15 GB, 123 MB, 15 kB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if n >= 0.9995 * 10 ** power:
            return f"{n / 10 ** power:.3g} {unit}"
    return f"{n:.0f} bytes"


def minutes(seconds):
    """Seconds as m:ss or h:mm:ss."""
    m, s = divmod(round(seconds), 60)
    return f"{m}:{s:02d}" if m < 60 else f"{m // 60}:{m % 60:02d}:{s:02d}"
