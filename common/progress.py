"""Progress with the time that is left: a bar on a terminal, in a log file a line every few seconds."""

import shutil
import sys
import time

import tqdm as bars

SECONDS_BETWEEN_LINES = 10
WIDTH = 100
FIGURES = 4  # at most, after a bar
LINE = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
ROOM = 35  # columns that a line takes beside its description and its figures


class Progress(bars.tqdm):
    """A tqdm bar of at most 100 columns on stderr; where that is no terminal, a line now and then and one at the end."""

    def __init__(self, *args, **kwargs):
        self.in_log, self.drawn = not sys.stderr.isatty(), time.monotonic()
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        desc = f"{kwargs.pop('desc')}: " if "desc" in kwargs else None  # as `set_description` writes it
        super().__init__(*args, **{"ncols": width, "file": sys.stderr, "bar_format": LINE, "desc": desc, **kwargs})

    def refresh(self, *args, **kwargs):
        if not self.in_log:
            super().refresh(*args, **kwargs)
        elif time.monotonic() - self.drawn >= SECONDS_BETWEEN_LINES:
            self.drawn = time.monotonic()
            self.display()

    def display(self, msg=None, pos=None):
        if not self.in_log:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)

    def clear(self, *args, **kwargs):
        if not self.in_log:  # nothing is to be wiped out there
            super().clear(*args, **kwargs)

    def close(self):
        if not self.in_log or self.disable:
            return super().close()
        if self.leave:
            self.display()
        self.disable = True
        self._decr_instances(self)

    def show(self, figures):
        """Put the first few of a dict of figures behind the bar; losses and accuracy come first."""
        order = sorted(figures, key=lambda name: not name.startswith(("loss", "top1")))[:FIGURES]
        texts = [f"{name}={figures[name]:.4g}" for name in order]
        while texts and len(", ".join(texts)) > WIDTH - ROOM - len(self.desc):
            texts.pop()
        self.set_postfix_str(", ".join(texts), refresh=not self.in_log)


def close_all():
    """End the lines of all bars that are open, so that what is printed next has one of its own."""
    for bar in list(getattr(Progress, "_instances", ())):
        bar.close()


def say(line):
    """Print a line above the bars."""
    bars.tqdm.write(line)
