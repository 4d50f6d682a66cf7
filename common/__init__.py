"""What the scripts share: quantizers, BatchNorm statistics, models, data, runs, export; and parts of single
methods, which the first lines of their modules name."""

import os
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
    """Where to write a file that takes the place of `path` when the block ends: a killed run never leaves half of it.

    Raises:
        InputError: it cannot be written; `path` is as it was, and nothing else is left.
    """
    partial = Path(f"{path}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # before the file has its name, so that a power failure cannot leave an empty one
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        full = any(place in str(error) for place in ("inline_container", "iostream"))  # torch.save's, which do not say why
        if isinstance(error, RuntimeError) and not full:
            raise
        why = "no space left, or the file is too large" if full else getattr(error, "strerror", None) or first_line(error)
        advice = "when that is fixed, repeat the command, with --resume for a run"
        raise InputError(f"{path} cannot be written ({why}) and is left as it was; {advice}") from None
    finally:
        partial.unlink(missing_ok=True)
