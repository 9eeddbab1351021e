"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """Something the user can mend: a bad flag, file, directory or observation.

    The message is one line: what was expected, what was found, where, and what to do. `train.py` and `infer.py` print it
    as `error: ...` and exit with code 2.
    """
