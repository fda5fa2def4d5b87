"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""
