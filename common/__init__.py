"""What every method shares word for word: quantizers, BatchNorm statistics, models, data, runs, export."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do about it."""
