"""The error that a user can mend."""


class UserError(ValueError):
    """What was asked for cannot be done: a folder, file, flag or image that does not fit.

    The message says what it was, what was wanted, and what to do next; `fgssl.launch` prints it in
    place of a traceback.
    """
