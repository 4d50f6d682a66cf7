"""What every method shares word for word: quantizers, BatchNorm statistics, models, data, runs, export."""

from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do about it."""


def first_line(error):
    """What an exception says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def replacing(path):
    """Where to write a file that takes the place of `path` when the block ends: a killed run never leaves half of it."""
    partial = Path(f"{path}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:  # after an error, a full disk say, nothing is left of it
        partial.unlink(missing_ok=True)
