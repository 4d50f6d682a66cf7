"""What every method shares word for word: quantizers, BatchNorm statistics, models, data, runs, export."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do about it."""


def first_line(error):
    """What an exception says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
