"""The base class of errors that a user can put right."""


class UserError(Exception):
    """A problem with what the user gave: a file, a setting, a model.

    The message says what is wrong, where, and what to do. Command-line tools print the message alone and
    exit with code 2; any other exception is a bug and keeps its traceback.
    """
