"""The error that ends a benchmark command with one clear line and exit code 2."""


class BenchError(Exception):
    """Something the user can mend: the message says what, and what to do about it."""
