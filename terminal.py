"""Output that never ends a run: letters that the terminal lacks, a reader or a disk that is gone.

    with terminal.tolerant():      # in fgssl.launch, around every script
        print("12.0 ± 0.3")        # "12.0 +- 0.3" on an ASCII terminal; nothing into a closed pipe
"""

import codecs
import contextlib
import errno
import os
import sys
import unicodedata

SPELLED = str.maketrans({"±": "+-", "×": "x", "–": "-", "—": "-", "→": "->", "…": "...", "“": '"',
                         "”": '"', "‘": "'", "’": "'", "ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o",
                         "Ø": "O", "œ": "oe", "Œ": "OE", "ł": "l", "Ł": "L", "đ": "d", "\xa0": " "})


def to_ascii(text):
    """Text in ASCII: signs spelled, letters without their accents, others as question marks; bytes
    of a file name that are no text as \\xNN."""
    text = unicodedata.normalize("NFKD", text.translate(SPELLED)).translate(SPELLED)
    text = "".join(f"\\x{ord(c) - 0xdc00:02x}" if 0xdc80 <= ord(c) <= 0xdcff else c for c in text
                   if not unicodedata.combining(c))
    return text.encode("ascii", "replace").decode()


def to_utf8(text):
    """Text as bytes of UTF-8, for files: a file name of UTF-8 that an ASCII locale read as bytes is
    letters again; bytes of a name that are no UTF-8 are written as \\xNN."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace").encode()


codecs.register_error("to_ascii", lambda error: (
    to_ascii(error.object[error.start:error.end]), error.end))


class Stream:
    """A text stream; once it cannot be written to, what follows is dropped. full: the error of a
    full disk."""

    def __init__(self, stream):
        self._stream, self.full = stream, None

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self):
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self):
        try:
            yield
        except OSError as error:  # closed pipe, closed terminal, full disk
            self.full = error if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
            nowhere = os.open(os.devnull, os.O_WRONLY)       # takes the rest of the buffer, too
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def tolerant():
    """Within the block, writing to stdout and stderr raises nothing, also where they are closed.
    OSError at its end where stdout is a file on a disk that became full."""
    before = sys.stdout, sys.stderr
    for stream in filter(None, before):
        if hasattr(stream, "reconfigure") and stream.errors != "surrogateescape":
            stream.reconfigure(errors="to_ascii")
    sys.stdout, sys.stderr = (Stream(stream or open(os.devnull, "w")) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        full = sys.stdout.full
        sys.stdout, sys.stderr = before
    if full:
        raise OSError(full.errno, f"cannot write all of the output: {full.strerror}") from full
