"""The base class of errors that a user can fix."""


class UserError(Exception):
    """An error in the user's input: a file, a setting, a model.

    The message says what is wrong, where, and what to do. Command-line tools print it without a traceback
    and exit with code 2, as they do for an OSError.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
