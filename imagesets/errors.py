"""Errors of two kinds: what a user can fix, and what may pass by itself."""


class UserError(ValueError):
    """A request that cannot be met: a folder, file, flag or image that does not fit.

    The message says what was found, what was expected, and what to do next; `fgssl.launch` prints
    it without a traceback.
    """


class PassingError(RuntimeError):
    """An image that cannot be read for a reason that may pass: of the disk, the network, the
    memory. Nothing about the image may be remembered, and no --skip-bad leaves it out."""
