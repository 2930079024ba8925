"""The error for what a user can fix."""


class UserError(ValueError):
    """A request that cannot be met: a folder, file, flag or image that does not fit.

    The message says what was found, what was expected, and what to do next; `fgssl.launch` prints
    it without a traceback.
    """
